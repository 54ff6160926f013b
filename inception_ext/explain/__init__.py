"""Why GoogLeNet has three softmaxes, shown on real networks.

======================  ==========================================================================
:mod:`.gradient_flow`   the gradient that reaches each module, with and without auxiliary losses
:mod:`.softmaxes`       accuracy and calibration of the three softmaxes, and early exits
:mod:`.topology`        the network as a picture
======================  ==========================================================================
"""
