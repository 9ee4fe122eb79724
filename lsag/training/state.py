"""The state of a training: all that its continuation depends on, what is saved of it, and how it is put back."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from lsag.checkpoint import Checkpoint
from lsag.config import Preset, changed_keys
from lsag.errors import InputError, UsageError


@dataclass
class Position:
    """How far a training is: with the weights and the optimizer's state, all that its continuation depends on."""

    step: int = 0
    """Optimizer steps done, skipped ones included."""
    epoch: int = 0
    """Epochs done and evaluated."""
    loss_sum: float = 0.0
    """Of the steps of the epoch under way that were not skipped."""
    loss_steps: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    best_top1: float = -1.0
    best_epoch: int = 0
    last_top1: float = 0.0
    last_eval_loss: float = 0.0
    seconds: float = 0.0


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
    ways: dict[str, Any]
    """How it is computed; another way is no other run, but does not give the same bits."""
    position: Position

    @property
    def evaluated(self) -> nn.Module:
        """The model whose accuracy counts: the moving average where there is one."""
        return self.ema.module if self.ema else self.model

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
            "ways": self.ways,
        }
        return Checkpoint(self.evaluated, self.preset, self.classes, position.epoch, metrics, training)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Put everything back as it was when `checkpoint` was saved. InputError if that is not in it."""
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
            raise InputError(f"the newest checkpoint cannot be continued: {error}", "start another run") from error

    def check_same_run(self, checkpoint: Checkpoint, *, allow_change: Sequence[str], where: Path) -> None:
        """UsageError if `checkpoint` is of another run: other settings, classes or images than this one's."""
        known = changed_keys(None, self.preset)
        unknown = [key for key in allow_change if key not in known and key != "data"]
        if unknown:
            raise UsageError(
                f"--allow-change {unknown[0]}: no such setting", "see lsag train --dry-run; 'data' for images"
            )
        different = [key for key in changed_keys(checkpoint.preset, self.preset) if key not in allow_change]
        if different:
            allowed = [f"--allow-change {key}" for key in different[:5] if not key.startswith("model.")]
            fix = " ".join(["leave the settings as they were", *(["or", *allowed] if allowed else [])])
            raise UsageError(f"{where} is a run with another {', '.join(different[:5])}", fix)
        same = checkpoint.classes == self.classes and (checkpoint.training or {}).get("dataset") == self.dataset
        if not same and not ("data" in allow_change and len(checkpoint.classes) == len(self.classes)):
            raise UsageError(f"{where} is a run on other images", "give it its own, or --allow-change data")
