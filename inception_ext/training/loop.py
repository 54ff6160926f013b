"""One step, one epoch, one run."""

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from inception_ext._console import CommandError, Progress, say
from inception_ext.losses import GoogLeNetLoss
from inception_ext.training import checkpoint, sync_batch_norm
from inception_ext.training.batches import Batch, Batches
from inception_ext.training.curves import save_curves
from inception_ext.training.data import DataSets
from inception_ext.training.distributed import World
from inception_ext.training.evaluation import evaluate
from inception_ext.training.metrics import Metrics, read_steps
from inception_ext.training.network import HEADS, build_network, set_training
from inception_ext.training.recipe import Recipe
from inception_ext.training.report import Pace, epoch_line, losses_text
from inception_ext.training.seeds import seeded
from inception_ext.training.state import State
from inception_ext.training.stop import StopRequest
from inception_ext.training.transforms import batch_mixer

__all__ = ["Output", "Trainer"]

AMP = {"fp16": torch.float16, "bf16": torch.bfloat16}
MEANS = ("loss", *HEADS, *(f"accuracy_{head}" for head in HEADS))


@dataclass(frozen=True)
class Output:
    """Where a run writes, and how often it speaks and saves.

    save_every: steps between checkpoints within an epoch; None: one at its end.
    keep: how many checkpoints stay.
    """

    folder: Path
    print_freq: int = 10
    save_every: int | None = None
    keep: int = 2
    tensorboard: bool = False


class NotFinite(CommandError):
    """A loss that is NaN or infinite."""


class Trainer:
    """A run: the state, and everything that moves it."""

    def __init__(self, recipe: Recipe, data: DataSets, world: World, output: Output) -> None:
        self.recipe, self.data, self.world, self.output = recipe, data, world, output
        self.batches = Batches(data, recipe, world)
        model = build_network(recipe, len(data.classes), quiet=not world.is_main)
        if recipe.sync_bn:
            sync_batch_norm.convert(model, world.device)
        self.state = State(model.to(world.device), recipe, data.classes, data.photographs, world)
        self.criterion = GoogLeNetLoss(
            recipe.aux_weight, nn.CrossEntropyLoss(label_smoothing=recipe.label_smoothing)
        )
        self.mixer = batch_mixer(recipe, len(data.classes))
        self.forward: Callable[[Tensor], Any] = model
        if world.is_distributed:
            self.forward = DistributedDataParallel(
                model, device_ids=[world.device] if world.device.type == "cuda" else None
            )
        if recipe.compile:
            self.forward = torch.compile(self.forward)
        self._say: Callable[[str], None] = say
        # Dropout differs between processes, from here on.
        torch.manual_seed(recipe.seed + world.rank)

    # ---- the run ---------------------------------------------------------------------------------

    def run(self, stop: StopRequest) -> bool:
        """Trains up to the last epoch.

        Returns:
            whether it got there; otherwise a signal came, and a checkpoint is saved.

        Raises:
            NotFinite: a loss is NaN or infinite; the state and the batch are saved.
            CommandError: nothing can be read, or written.
        """
        self.stop = stop
        state = self.state
        self.metrics: Metrics | None = None
        if self.world.is_main:
            self.metrics = Metrics(self.output.folder, state.step, self.output.tensorboard)
        try:
            while state.epoch < self.recipe.epochs:
                if not self._epoch():
                    saved = self.save()
                    if self.world.is_main:
                        say(
                            f"stopped by {stop.signal or 'another process'} after step "
                            f"{state.step}; saved {saved}; --resume goes on from there"
                        )
                    return False
        finally:
            if self.metrics is not None:
                self.metrics.close()
        return True

    def _epoch(self) -> bool:
        """The rest of the epoch under way; whether it came to its end."""
        state, start = self.state, time.perf_counter()
        set_training(state.model, self.recipe)
        steps = self.batches.steps_per_epoch
        self._pace = Pace()
        label = f"epoch {state.epoch + 1}/{self.recipe.epochs}"
        with Progress(steps, label, done=state.step_in_epoch, shown=self.world.is_main) as bar:
            self._say = bar.line
            for batch in self.batches.train(state.epoch, state.step_in_epoch):
                row = self._step(batch)
                self._report(row, bar)
                state.step += 1
                state.step_in_epoch += 1
                if self._stopping():
                    return False
                every = self.output.save_every
                if every and state.step % every == 0 and state.step_in_epoch < steps:
                    self.save()
        self._say = say
        if not state.sums.get("images"):
            reasons = [f"{name}: {reason}" for name, reason in state.skipped.items()]
            raise CommandError(f"no batch could be read ({(reasons or ['no data'])[0]})")
        state.step += steps - state.step_in_epoch  # shards may end early
        state.step_in_epoch = steps
        tested = self._test()
        if self._stopping():
            return False
        self._finish_epoch(tested, time.perf_counter() - start)
        return True

    def _stopping(self) -> bool:
        return self.world.sum([float(bool(self.stop))])[0] > 0

    def _finish_epoch(self, tested: dict[str, Any], seconds: float) -> None:
        state = self.state
        images = state.sums["images"]
        facts = {
            "epoch": state.epoch,
            "step": state.step,
            "lr": state.optimizer.param_groups[0]["lr"],
            "train": {
                **{name: state.sums[name] / images for name in MEANS},
                "images": int(images),
                "skipped": int(state.sums["skipped"]),
            },
            **tested,
            "seconds": round(seconds, 2),
        }
        state.epochs.append(facts)
        state.epoch, state.step_in_epoch, state.sums = state.epoch + 1, 0, {}
        test = tested["test"]
        is_best = bool(test) and test["accuracy_main"] > state.best
        if is_best:
            state.best = test["accuracy_main"]
        self.save(best=is_best)
        if self.world.is_main:
            say(epoch_line(facts, self.recipe.epochs))
            self._write_summary()

    def _write_summary(self) -> None:
        state, folder = self.state, self.output.folder
        assert self.metrics is not None
        self.metrics.epochs(
            {
                "recipe": self.recipe.as_dict(),
                "processes": self.world.size,
                "classes": len(state.classes),
                "steps_per_epoch": self.batches.steps_per_epoch,
                "skipped": state.skipped,
                "best_accuracy_main": state.best,
                "epochs": state.epochs,
            }
        )
        save_curves(
            folder / "curves.png",
            read_steps(folder / "steps.csv"),
            state.epochs,
            self.batches.steps_per_epoch,
            f"GoogLeNet on {self.recipe.data or 'synthetic images'}",
        )

    # ---- one step --------------------------------------------------------------------------------

    def _step(self, batch: Batch) -> dict[str, Any] | None:
        """Forward, backward and update; its line for the CSV, or None where nothing was trained.

        Where processes have batches of different sizes (images were unreadable), each counts by
        its size, so that the update is that of the joined batch.
        """
        state, recipe, world = self.state, self.recipe, self.world
        self._note_skipped(batch)
        too_small = len(batch) < min(2, recipe.batch_size)  # batch norm needs two values
        count, skipped, unusable = world.sum([len(batch), len(batch.skipped), too_small])
        self._add(skipped=skipped)
        if unusable:
            return None

        images = batch.images.to(world.device, non_blocking=True)
        targets = labels = batch.labels.to(world.device, non_blocking=True)
        if self.mixer is not None:
            with seeded(recipe.seed, state.epoch, state.step_in_epoch, world.rank):
                images, targets = self.mixer(images, labels)
            labels = targets.argmax(1)
        if recipe.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)

        lr = recipe.learning_rate(state.epoch + state.step_in_epoch / self.batches.steps_per_epoch)
        for group in state.optimizer.param_groups:
            group["lr"] = lr
        state.optimizer.zero_grad(set_to_none=True)
        with self.autocast():
            outputs = self.forward(images)
            parts = self.criterion.parts(outputs, targets)
            loss = parts["main"] + self.criterion.aux_weight * (parts["aux1"] + parts["aux2"])
        means = self._means(loss, parts, outputs, labels, count)
        if not all(map(math.isfinite, means.values())):
            self._give_up(batch, means)
        state.scaler.scale(loss * (len(batch) * world.size / count)).backward()
        grad_norm = self._update()
        self._add(images=count, **{name: value * count for name, value in means.items()})
        self._pace.add(count)
        return {
            "step": state.step,
            "epoch": state.epoch,
            "lr": lr,
            **means,
            "grad_norm": grad_norm,
            "images": int(count),
            "seconds": round(self._pace.seconds, 4),
        }

    def _means(
        self,
        loss: Tensor,
        parts: dict[str, Tensor],
        outputs: Any,
        labels: Tensor,
        count: float,
    ) -> dict[str, float]:
        """Losses and accuracies of the joined batch, by the names in MEANS."""
        heads = (outputs.logits, outputs.aux_logits1, outputs.aux_logits2)
        accuracies = [(head.detach().argmax(1) == labels).float().mean() for head in heads]
        values = [loss, *(parts[head] for head in HEADS), *accuracies]
        own = torch.stack([value.detach().double() for value in values]) * len(labels)
        return dict(zip(MEANS, (v / count for v in self.world.sum(own.tolist())), strict=True))

    def _update(self) -> float | None:
        """Optimizer, scaler and average; the norm of the gradient where it is clipped."""
        state, recipe = self.state, self.recipe
        norm = None
        if recipe.clip_grad_norm is not None:
            state.scaler.unscale_(state.optimizer)
            norm = nn.utils.clip_grad_norm_(state.model.parameters(), recipe.clip_grad_norm).item()
        state.scaler.step(state.optimizer)
        state.scaler.update()
        if state.ema is not None and (state.step + 1) % recipe.model_ema_steps == 0:
            if state.epoch < recipe.lr_warmup_epochs:
                state.ema.n_averaged.fill_(0)  # what comes out of the warm-up is the first of it
            state.ema.update_parameters(state.model)
        return norm

    def autocast(self) -> AbstractContextManager[None]:
        amp = self.recipe.amp
        return torch.autocast(
            self.world.device.type, AMP[amp] if amp else torch.bfloat16, enabled=amp is not None
        )

    def _add(self, **values: float) -> None:
        for name, value in values.items():
            self.state.sums[name] = self.state.sums.get(name, 0.0) + value

    def _note_skipped(self, batch: Batch) -> None:
        for name, reason in batch.skipped:
            if name not in self.state.skipped:
                self.state.skipped[name] = reason
                self._say(f"skipped {name}: {reason}")

    def _give_up(self, batch: Batch, means: dict[str, float]) -> None:
        """Saves the state before the update, with the batch, and raises."""
        state = self.state
        bad = ", ".join(f"{k} {v}" for k, v in means.items() if not math.isfinite(v))
        names = [name for part in self.world.gather(batch.names) for name in part]
        path = self.output.folder / f"not-finite-{state.step:08}.pt"
        content = state.capture()
        if self.world.is_main:
            own = {"images": batch.images, "labels": batch.labels, "names": names}
            checkpoint.save(path, {**content, "batch": own})
        shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        raise NotFinite(
            f"step {state.step}: {bad}; images: {shown}; the state before the update and the batch "
            f"are in {path}"
        )

    # ---- what surrounds the steps ----------------------------------------------------------------

    def _report(self, row: dict[str, Any] | None, bar: Progress) -> None:
        if row is None or not self.world.is_main:
            return
        assert self.metrics is not None
        self.metrics.step(row)
        text = losses_text(row, self._pace.images_per_second)
        bar.step(text)
        number = self.state.step_in_epoch + 1
        if not bar.is_terminal and number % self.output.print_freq == 0:
            steps = self.batches.steps_per_epoch
            say(f"epoch {self.state.epoch + 1}  step {number}/{steps}  {text}  lr {row['lr']:.4g}")

    def _test(self) -> dict[str, Any]:
        """``test`` and ``test_ema``; None for what is not there."""
        state = self.state
        results: dict[str, Any] = {"test": None, "test_ema": None}
        models = {"test": state.model, "test_ema": state.ema and state.ema.module}
        for name, model in models.items():
            if model is not None and self.data.test is not None:
                results[name] = self.test(model)
        return results

    def test(self, model: nn.Module) -> dict[str, float] | None:
        """All three heads on the test images; None where a signal came."""
        if self.world.is_distributed:
            for buffer in model.buffers():  # each process has seen other batches
                torch.distributed.broadcast(buffer, 0)
        stop = getattr(self, "stop", None)
        return evaluate(
            model,
            self.batches.test(),
            self.world,
            stop=lambda: bool(stop),
            autocast=self.autocast,
            on_batch=self._note_skipped,
        )

    def save(self, best: bool = False) -> Path:
        """Writes a checkpoint, and drops old ones once it is there. All processes take part."""
        path = checkpoint.path_of(self.output.folder, self.state.step)
        content = self.state.capture()
        if self.world.is_main:
            try:
                checkpoint.save(path, content)
                if best:
                    checkpoint.save(self.output.folder / "best.pt", content)
            except CommandError as error:
                whole = [p for p in checkpoint.all_in(self.output.folder) if p != path]
                last = f"; the newest checkpoint is {whole[-1]}" if whole else ""
                raise CommandError(f"{error}{last}") from error
            checkpoint.prune(self.output.folder, self.output.keep)
        return path

    def resume(self, path: Path, content: dict[str, Any]) -> None:
        """Goes on from a checkpoint."""
        remarks = self.state.restore(content, str(path))
        if self.world.is_main:
            say(f"resuming after step {self.state.step} from {path}")
            for remark in remarks:
                say(f"  {remark}")
