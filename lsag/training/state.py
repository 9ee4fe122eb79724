"""The state of a training: what changes in it, what a checkpoint keeps of that, and how it is restored."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from lsag.checkpoint import Checkpoint
from lsag.config import Preset, changed_keys
from lsag.errors import InputError, UsageError
from lsag.inference.evaluate import Metrics
from lsag.training.events import Epoch
from lsag.training.optim import lr_at


@dataclass
class Position:
    """How far a training is. With the weights and the optimizer's state, all that its rest depends on."""

    step: int = 0
    """Optimizer steps done, including skipped ones."""
    epoch: int = 0
    """Epochs done and evaluated."""
    loss_sum: float = 0.0
    """Sum of the losses of the current epoch's steps that were not skipped."""
    loss_steps: int = 0
    """Number of those steps."""
    skipped: int = 0
    skipped_in_a_row: int = 0
    best_top1: float = -1.0
    best_epoch: int = 0
    last_top1: float = 0.0
    last_eval_loss: float = 0.0
    seconds: float = 0.0
    """Time that the training has taken, over all sittings."""

    def count_step(self, loss: float | None) -> None:
        """A step is done; without a loss it was skipped."""
        self.step += 1
        if loss is None:
            self.skipped += 1
            self.skipped_in_a_row += 1
        else:
            self.loss_sum += loss
            self.loss_steps += 1
            self.skipped_in_a_row = 0


@dataclass
class State:
    """What changes in a training, and what it is a training of."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    ema: AveragedModel | None
    preset: Preset
    classes: tuple[str, ...]
    dataset: str
    """Fingerprint of the images."""
    steps_per_epoch: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    """Type of matrix products under autocast."""
    num_slices: int = 1
    """Slices of a batch, over all ranks."""
    num_ranks: int = 1
    position: Position = field(default_factory=Position)
    ddp: DistributedDataParallel | None = None

    @property
    def net(self) -> nn.Module:
        """The module to call in a training step: the model, in DDP if there are several ranks."""
        return self.ddp or self.model

    @property
    def evaluated(self) -> nn.Module:
        """The model whose accuracy counts: the moving average if there is one."""
        return self.ema.module if self.ema else self.model

    @property
    def num_parameters(self) -> int:
        """Parameters of the model."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def step_in_epoch(self) -> int:
        """Steps of the current epoch that are done."""
        return self.position.step - self.position.epoch * self.steps_per_epoch

    def lr_at(self, step: int) -> float:
        """The learning rate of optimizer step `step`, counted from 0."""
        return lr_at(step, train=self.preset.train, steps_per_epoch=self.steps_per_epoch)

    @property
    def numerics(self) -> dict[str, Any]:
        """What the rounding of the results depends on, beside the preset."""
        precision = str(self.dtype).removeprefix("torch.")
        return {"slices": self.num_slices, "ranks": self.num_ranks, "precision": precision}

    def finish_epoch(self, metrics: Metrics, rates: dict[str, float]) -> Epoch:
        """Count the current epoch as done, with what its evaluation found; a row of metrics.jsonl."""
        position = self.position
        train_loss = position.loss_sum / max(position.loss_steps, 1)
        position.epoch += 1
        position.loss_sum, position.loss_steps = 0.0, 0
        position.last_top1, position.last_eval_loss = metrics.top1, metrics.loss
        if metrics.top1 > position.best_top1:
            position.best_top1, position.best_epoch = metrics.top1, position.epoch
        return Epoch(
            epoch=position.epoch,
            step=position.step,
            lr=self.lr_at(position.step - 1),
            train_loss=train_loss,
            eval_loss=metrics.loss,
            top1=metrics.top1,
            top5=metrics.top5,
            best_top1=position.best_top1,
            **rates,
            skipped_steps=position.skipped,
            seconds=position.seconds,
        )

    def checkpoint(self) -> Checkpoint:
        """All of it, as it is now. No generator's state: what is random depends on the position alone."""
        position = self.position
        metrics = {"top1": position.last_top1, "loss": position.last_eval_loss} if position.epoch else {}
        training: dict[str, Any] = {
            **asdict(position),
            "optimizer": self.optimizer.state_dict()["state"],
            "scaler": self.scaler.state_dict(),
            "weights": self.model.state_dict() if self.ema else None,
            "ema_updates": int(self.ema.n_averaged) if self.ema else 0,
            "dataset": self.dataset,
            "numerics": self.numerics,
        }
        return Checkpoint(self.evaluated, self.preset, self.classes, position.epoch, metrics, training)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Make everything what it was when `checkpoint` was saved. InputError if it does not hold that."""
        try:
            training = checkpoint.training or {}
            weights = training["weights"]
            self.model.load_state_dict(checkpoint.model.state_dict() if weights is None else weights)
            if self.ema:
                self.ema.module.load_state_dict(checkpoint.model.state_dict())
                self.ema.n_averaged.fill_(training["ema_updates"])
            groups = self.optimizer.state_dict()["param_groups"]
            parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
            position = Position(**{item.name: training[item.name] for item in fields(Position)})
            for item in fields(Position):
                value = getattr(position, item.name)
                if type(value) is not item.type or not math.isfinite(value) or (item.type is int and value < 0):
                    raise ValueError(f"its {item.name} is {value!r}")
            # Empty before the first step that counted, else complete.
            wanted = range(len(parameters)) if position.step > position.skipped else ()
            if set(training["optimizer"]) != set(wanted):
                raise ValueError("the optimizer's state is not complete")
            for index, moments in training["optimizer"].items():
                for name in ("exp_avg", "exp_avg_sq"):
                    found, weight = moments[name], parameters[index]
                    if (found.shape, found.dtype) != (weight.shape, weight.dtype) or not found.isfinite().all():
                        raise ValueError(f"the optimizer's {name} of weight {index} does not fit it")
            self.optimizer.load_state_dict({"state": training["optimizer"], "param_groups": groups})
            if self.scaler.is_enabled() and training["scaler"]:
                self.scaler.load_state_dict(training["scaler"])
            self.position = position
        except Exception as error:  # contents of any type may stand where ours are expected
            raise InputError(f"the newest checkpoint cannot be resumed: {error}", "start another run") from error

    def check_same_run(self, checkpoint: Checkpoint, *, allow_change: Sequence[str], where: Path) -> None:
        """UsageError if `checkpoint` is of another run: one with other settings, classes or images."""
        known = changed_keys(None, self.preset)
        unknown = [key for key in allow_change if key not in known and key != "data"]
        if unknown:
            raise UsageError(
                f"--allow-change {unknown[0]}: no such setting",
                "lsag train --dry-run lists the settings; 'data' stands for the images",
            )
        different = [key for key in changed_keys(checkpoint.preset, self.preset) if key not in allow_change]
        if different:
            allowed = [f"--allow-change {key}" for key in different[:5] if not key.startswith("model.")]
            fix = " ".join(["resume with the original settings", *(["or", *allowed] if allowed else [])])
            raise UsageError(f"{where} is a run with another {', '.join(different[:5])}", fix)
        same = checkpoint.classes == self.classes and (checkpoint.training or {}).get("dataset") == self.dataset
        if not same and not ("data" in allow_change and len(checkpoint.classes) == len(self.classes)):
            raise UsageError(
                f"{where} is a run on other images", "resume with the original images, or --allow-change data"
            )


def keep_buffers(model: nn.Module) -> Callable[[], None]:
    """Keep the values of the buffers, such as running statistics; the function returned restores them."""
    kept = [(buffer, buffer.clone()) for buffer in model.buffers()]

    def restore_buffers() -> None:
        for buffer, value in kept:
            buffer.copy_(value)

    return restore_buffers
