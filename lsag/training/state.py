"""The state of a training: what changes in it, what a checkpoint keeps of that, and how it is restored."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, InstanceOf, NonNegativeInt
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from lsag.checkpoint import Checkpoint, check_weights
from lsag.config import Precision, Preset, changed_keys, validated
from lsag.errors import InputError, UsageError, is_out_of_memory
from lsag.inference.evaluate import Metrics
from lsag.training.events import Epoch
from lsag.training.optim import lr_at

WEIGHT_ORDER = ("train.freeze", "train.layer_decay", "train.decay_positions")
"""Settings by which the optimizer orders the weights; they cannot change in a run."""


class Position(BaseModel):
    """How far a training is. With the weights and the optimizer's state, all that its rest depends on."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)

    step: NonNegativeInt = 0
    """Optimizer steps done, including skipped ones."""
    epoch: NonNegativeInt = 0
    """Epochs done and evaluated."""
    loss_sum: float = 0.0
    """Sum of the losses of the current epoch's steps that were not skipped."""
    loss_steps: NonNegativeInt = 0
    """Number of those steps."""
    skipped: NonNegativeInt = 0
    skipped_in_a_row: NonNegativeInt = 0
    best_top1: float = -1.0
    best_epoch: NonNegativeInt = 0
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


class Kept(Position):
    """What a checkpoint keeps of a training beside its model."""

    optimizer: dict[int, dict[Literal["step", "exp_avg", "exp_avg_sq"], Tensor]]
    """AdamW's state for each weight."""
    scaler: dict[str, int | float]
    weights: dict[str, Tensor] | None
    """Those that are trained, where the model is their moving average."""
    ema_updates: NonNegativeInt
    dataset: InstanceOf[str]
    numerics: dict[str, int | str] = {}


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
    precision: Precision = "fp32"
    """Of matrix products."""
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

    @property
    def finished(self) -> bool:
        """Whether all epochs are done, or as many as the preset has patience for have brought no better accuracy."""
        train, epoch = self.preset.train, self.position.epoch
        return epoch >= train.epochs or 0 < train.patience <= epoch - self.position.best_epoch

    def train(self) -> None:
        """Put the model in training mode, but not what is frozen: it drops no paths, and keeps its statistics."""
        self.model.train()
        for module in self.model.modules() if self.preset.train.freeze else ():
            trained = [weight.requires_grad for weight in module.parameters()]
            if trained and not any(trained):
                module.eval()

    def lr_at(self, step: int) -> float:
        """The learning rate of optimizer step `step`, counted from 0."""
        return lr_at(step, train=self.preset.train, steps_per_epoch=self.steps_per_epoch)

    @property
    def numerics(self) -> dict[str, Any]:
        """What the rounding of the results depends on, beside the preset."""
        return {
            "slices": self.num_slices,
            "ranks": self.num_ranks,
            "precision": self.precision,
            "device": self.device.type,
        }

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
            **position.model_dump(),
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
            kept = validated(Kept, checkpoint.training or {}, origin="its training")
            weights = checkpoint.model.state_dict() if kept.weights is None else kept.weights
            check_weights(weights, self.model.state_dict())
            self.model.load_state_dict(weights)
            if self.ema:
                self.ema.module.load_state_dict(checkpoint.model.state_dict())
                self.ema.n_averaged.fill_(kept.ema_updates)
            groups = self.optimizer.state_dict()["param_groups"]
            parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
            # Empty before the first step that counted, else complete.
            wanted = range(len(parameters)) if kept.step > kept.skipped else ()
            if set(kept.optimizer) != set(wanted):
                raise ValueError("the optimizer's state is not complete")
            for index, found in kept.optimizer.items():
                weight = parameters[index]
                check_weights(found, {"step": torch.tensor(0.0), "exp_avg": weight, "exp_avg_sq": weight})
                if found["step"] < 1 or found["exp_avg_sq"].min() < 0:
                    raise ValueError(f"the optimizer's state of weight {index} is negative")
            self.optimizer.load_state_dict({"state": kept.optimizer, "param_groups": groups})
            if self.scaler.is_enabled() and kept.scaler:
                self.scaler.load_state_dict(kept.scaler)
            self.position = Position(**kept.model_dump(include=set(Position.model_fields)))
        except Exception as error:  # contents of any type may stand where ours are expected
            if is_out_of_memory(error):
                raise
            reason = error.what if isinstance(error, UsageError) else error
            raise InputError(f"the newest checkpoint cannot be resumed: {reason}", "start another run") from error

    def check_same_run(self, checkpoint: Checkpoint, *, allow_change: Sequence[str], where: Path) -> None:
        """UsageError if `checkpoint` is of another run: one with other settings, classes or images."""
        known = changed_keys(None, self.preset)
        unknown = [key for key in allow_change if key not in known and key != "data"]
        if unknown:
            raise UsageError(
                f"--allow-change {unknown[0]}: no such setting",
                "lsag train --dry-run lists the settings; 'data' stands for the images",
            )
        different = [
            key
            for key in changed_keys(checkpoint.preset, self.preset)
            if key not in allow_change or key in WEIGHT_ORDER
        ]
        if different:
            allowed = [
                f"--allow-change {key}" for key in different[:5] if not key.startswith(("model.", *WEIGHT_ORDER))
            ]
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
