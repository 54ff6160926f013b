"""Training of GoogLeNet with its three softmaxes, one concept a file.

========================  ======================================================================
:mod:`.recipe`            every setting of a run, the optimizer, the learning rate of a moment
:mod:`.data`              what ``DATA`` may be: digits, folders, WebDataset shards, synthetic
:mod:`.batches`           the order of the images, unreadable ones, mixup and cutmix
:mod:`.network`           the model that a recipe asks for, and its three heads in eval mode
:mod:`.distributed`       the processes that train together
:mod:`.state`             all that a run must remember to go on with the same numbers
:mod:`.checkpoint`        that state on disk
:mod:`.metrics`           steps to CSV, epochs to JSON, TensorBoard
:mod:`.curves`            both as a picture
:mod:`.report`            what a run says on the terminal
:mod:`.loop`              one step, one epoch, one run
========================  ======================================================================
"""
