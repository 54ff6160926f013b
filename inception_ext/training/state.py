"""All that a run must remember to go on with the same numbers."""

from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from inception_ext._console import CommandError
from inception_ext.googlenet import GoogLeNet
from inception_ext.training.distributed import World
from inception_ext.training.recipe import Recipe, make_optimizer
from inception_ext.training.transforms import Sizes

__all__ = ["State"]


class State:
    """A model in training, and where in the run it is.

    What is random and not here depends on the seed and the position alone (:mod:`.seeds`); so does
    the learning rate.

    Attributes:
        step: steps done.
        epoch, step_in_epoch: the epoch under way, counted from 0, and the steps of it done.
        sums: what the epoch's means are made of.
        epochs: facts about each finished epoch.
        skipped: reason by name of each unreadable image that this process met.
        best: the highest accuracy of the main head so far, in the test.
    """

    def __init__(
        self, model: GoogLeNet, recipe: Recipe, classes: list[str], photographs: bool, world: World
    ) -> None:
        self.model, self.recipe, self.classes, self.world = model, recipe, classes, world
        self.sizes = Sizes.of(recipe, photographs)
        self.optimizer = make_optimizer(recipe, model)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=recipe.amp == "fp16")
        self.ema: AveragedModel | None = None
        if recipe.model_ema:
            average = get_ema_multi_avg_fn(recipe.model_ema_decay)
            self.ema = AveragedModel(model, multi_avg_fn=average, use_buffers=True)
        self.step = self.epoch = self.step_in_epoch = 0
        self.sums: dict[str, float] = {}
        self.epochs: list[dict[str, Any]] = []
        self.skipped: dict[str, str] = {}
        self.best = 0.0

    def capture(self) -> dict[str, Any]:
        """Everything, as tensors and plain types. All processes take part."""
        device = self.world.device
        on_cuda = device.type == "cuda"
        random = {
            "cpu": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state(device) if on_cuda else None,
        }
        return {
            "model": dict(self.model.state_dict()),
            "ema": None if self.ema is None else dict(self.ema.module.state_dict()),
            "ema_averaged": 0 if self.ema is None else int(self.ema.n_averaged),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random": self.world.gather(random),
            "step": self.step,
            "epoch": self.epoch,
            "step_in_epoch": self.step_in_epoch,
            "sums": dict(self.sums),
            "epochs": list(self.epochs),
            "skipped": {k: v for part in self.world.gather(self.skipped) for k, v in part.items()},
            "best": self.best,
            "recipe": self.recipe.as_dict(),
            "classes": list(self.classes),
            "input": {
                "resize": self.sizes.val_resize,
                "crop": self.sizes.val_crop,
                "transform_input": self.model.transform_input,
            },
        }

    def restore(self, content: dict[str, Any], source: str) -> list[str]:
        """Goes back to what :meth:`capture` gave.

        Args:
            source: names the checkpoint in errors.

        Returns:
            what will not be as it was, a line each.

        Raises:
            CommandError: it does not fit this model, or these classes.
        """
        if content["classes"] != self.classes:
            raise CommandError(
                f"{source} was trained on {len(content['classes'])} classes, the data has "
                f"{len(self.classes)}, or others"
            )
        self.load_model(content, source)
        try:
            self.optimizer.load_state_dict(content["optimizer"])
        except (ValueError, KeyError) as error:
            raise CommandError(f"{source}: its optimizer does not fit: {error}") from error
        remarks = []
        if self.scaler.is_enabled() and content["scaler"]:
            self.scaler.load_state_dict(content["scaler"])
        if self.ema is not None and content["ema"] is None:
            self.ema.module.load_state_dict(content["model"])
            remarks.append("it has no averaged model: averaging starts from its model")
        self.step, self.epoch = content["step"], content["epoch"]
        self.step_in_epoch, self.sums = content["step_in_epoch"], dict(content["sums"])
        self.epochs, self.best = list(content["epochs"]), content["best"]
        self.skipped = dict(content["skipped"]) if self.world.is_main else {}
        if len(content["random"]) == self.world.size:
            self._restore_random(content["random"][self.world.rank])
        else:
            remarks.append(f"it comes from {len(content['random'])} processes: dropout will differ")
        # Paths may move, and a run may be made longer.
        moved = {"data", "val_data", "weights", "epochs", "workers", "device"}
        remarks += [
            f"{name} was {was}, is {now}"
            for name, now in self.recipe.as_dict().items()
            if name not in moved and (was := content["recipe"].get(name, now)) != now
        ]
        return remarks

    def load_model(self, content: dict[str, Any], source: str) -> None:
        """The weights alone."""
        targets: list[tuple[nn.Module, str]] = [(self.model, "model")]
        if self.ema is not None and content["ema"] is not None:
            targets.append((self.ema.module, "ema"))
            self.ema.n_averaged.fill_(content["ema_averaged"])
        try:
            for module, key in targets:
                module.load_state_dict(content[key])
        except RuntimeError as error:
            what = str(error).splitlines()[0]
            raise CommandError(f"{source} does not fit this network: {what}") from error

    def _restore_random(self, random: dict[str, Any]) -> None:
        torch.set_rng_state(random["cpu"])
        if random["cuda"] is not None and self.world.device.type == "cuda":
            torch.cuda.set_rng_state(random["cuda"], self.world.device)
