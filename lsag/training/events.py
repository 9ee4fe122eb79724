"""What a training reports while it runs."""

from dataclasses import dataclass
from pathlib import Path

from pydantic import ConfigDict

from lsag.config import Preset

ROW = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
"""How rows of a log are validated when they are read."""


@dataclass(frozen=True)
class Started:
    """The training begins: nothing that could be refused is left. `notes` are for a person to read."""

    preset: Preset
    out: Path
    device: str
    parameters: int
    train_images: int
    eval_images: int
    steps_per_epoch: int
    first_step: int
    ranks: int
    slice_size: int
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Step:
    """Where the training is; mean loss and speed since the last report; peak memory of this rank in bytes."""

    epoch: int
    step: int
    loss: float
    lr: float
    images_per_second: float
    data_wait: float
    memory: int


@dataclass(frozen=True)
class StepRow:
    """An optimizer step: a row of steps.jsonl. Loss and norm of a skipped step are None."""

    __pydantic_config__ = ROW
    step: int
    epoch: int
    loss: float | None
    lr: float
    grad_norm: float | None


@dataclass(frozen=True)
class Epoch:
    """A finished epoch: a row of metrics.jsonl. Accuracies are in 0..1; `seconds` is the training time so far."""

    __pydantic_config__ = ROW
    epoch: int
    step: int
    lr: float
    train_loss: float
    eval_loss: float
    top1: float
    top5: float
    best_top1: float
    images_per_second: float
    data_wait: float
    save_share: float
    skipped_steps: int
    seconds: float


@dataclass(frozen=True)
class Finished:
    """The training is complete."""

    out: Path
    epochs: int
    best_top1: float
    best_epoch: int
    last_top1: float
    seconds: float


Progress = Started | Step | Epoch | Finished
