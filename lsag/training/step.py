"""One optimizer step: forward and backward of this rank's slices, what the ranks agree on, and the update."""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.nn.functional as F
from timm.data import Mixup
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lsag.config import Preset
from lsag.data.loading import random_key
from lsag.device import DTYPES, autocast
from lsag.distributed.world import World, lost_peers
from lsag.failpoints import failpoint
from lsag.training.events import StepRow
from lsag.training.meter import Meter
from lsag.training.signals import Signals, agreed_stop, wish_to_stop
from lsag.training.state import State, keep_buffers

Batches = Iterator[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class StepResult(StepRow):
    """A row of steps.jsonl, and what all ranks agreed to do after it."""

    stop: int
    """The number of the signal that asks to stop, 0 for none."""
    save: bool

    @property
    def row(self) -> dict[str, float | None]:
        """The row of steps.jsonl."""
        return {item.name: getattr(self, item.name) for item in fields(StepRow)}


class TrainStep:
    """Updates the state with a batch, of which this rank takes `slices`, one after another."""

    def __init__(
        self, state: State, slices: range, world: World, signals: Signals, meter: Meter, *, class_weights: Tensor | None
    ) -> None:
        self.state, self.slices, self.world, self.signals, self.meter = state, slices, world, signals, meter
        self.class_weights = class_weights
        self.mixup = make_mixup(state.preset)
        # Mixup smooths the labels itself.
        self.label_smoothing = 0.0 if self.mixup else state.preset.augment.label_smoothing

    def __call__(self, batches: Batches, *, save_due: bool) -> StepResult:
        """Take the next slices from `batches` and update the state, unless any rank's loss or gradient is not finite.

        `save_due` is this rank's wish to save. StopRequestedError for a wish to stop that comes while waiting for data.
        """
        state, position, signals = self.state, self.state.position, self.signals
        lr = state.lr_at(position.step)
        for group in state.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        restore_buffers = keep_buffers(state.model)
        total = torch.zeros((), device=self.world.device)
        for index in self.slices:
            total += self.accumulate(*self.fetch(batches, index), index)
        state.scaler.unscale_(state.optimizer)
        norm = nn.utils.clip_grad_norm_(state.model.parameters(), state.preset.train.clip_grad or math.inf)
        loss, grad_norm = torch.stack([total, norm]).tolist()
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        own_stop = signals.stop
        agreed = self.world.total(
            **wish_to_stop(own_stop),
            save=signals.save or save_due,
            broken=not finite,
            loss=loss if finite else 0.0,
        )
        failpoint("before_opt")
        mean_loss = None if agreed["broken"] else agreed["loss"] / self.world.size
        if mean_loss is None:
            restore_buffers()
        else:
            state.scaler.step(state.optimizer)
            if state.ema:
                state.ema.update_parameters(state.model)
        state.scaler.update()
        state.optimizer.zero_grad()
        position.count_step(mean_loss)
        failpoint("after_opt")
        return StepResult(
            step=position.step,
            epoch=position.epoch + 1,
            loss=mean_loss,
            lr=lr,
            grad_norm=None if mean_loss is None else grad_norm,
            stop=agreed_stop(own_stop, agreed),
            save=agreed["save"] > 0,
        )

    def fetch(self, batches: Batches, index: int) -> tuple[Tensor, Tensor]:
        """The next slice. A lone process can be stopped while it waits for the first one of a step."""
        alone = self.world.size == 1 and index == self.slices[0]
        with self.meter.waiting():
            failpoint("fetch")
            with self.signals.interruptible() if alone else contextlib.nullcontext():
                return next(batches)

    def accumulate(self, images: Tensor, labels: Tensor, index: int) -> Tensor:
        """Add the gradients of a slice; its share of the batch's loss, in nats, detached.

        Mixup and drop-path draw from generators seeded by the slice's number in the run, so that a slice is treated
        alike whichever rank takes it.
        """
        state, device = self.state, self.world.device
        num_slices = state.num_slices
        number, seed = state.position.step * num_slices + index, state.preset.train.seed
        torch.manual_seed(random_key(seed, "net", number))
        np.random.seed(random_key(seed, "mix", number) & 0xFFFFFFFF)
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        targets = labels
        if self.mixup:
            images, targets = self.mixup(images, labels)
        net = state.net
        last = index == self.slices[-1]
        waits = isinstance(net, DistributedDataParallel) and not last
        with net.no_sync() if waits else contextlib.nullcontext(), lost_peers():  # type: ignore[operator]
            with autocast(device, DTYPES[state.precision]):
                logits = net(images)
            loss = self.loss(logits.float(), targets) / len(self.slices)
            if failpoint("after_forward"):
                loss = loss * math.nan
            state.scaler.scale(loss).backward()
        failpoint("after_backward")
        return loss.detach()

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The mean over the images of -sum(weights * targets * log_softmax(logits)) over the classes, in nats.

        `targets` are labels (B,), which are smoothed here, or distributions (B, K), as mixup makes them. Each class's
        term of a target has the weight of that class, so a mixed or smoothed image counts in proportion to what it is
        made of. Dividing by the number of images, not by the sum of their weights as torch's mean does, gives the same
        loss however a batch is cut into slices.
        """
        weights, smoothing = self.class_weights, self.label_smoothing
        if weights is None:
            return F.cross_entropy(logits, targets, label_smoothing=smoothing)
        return F.cross_entropy(logits, targets, weights, reduction="sum", label_smoothing=smoothing) / len(logits)


def make_mixup(preset: Preset) -> Mixup | None:
    """timm's Mixup with the preset's settings, or None if the preset mixes nothing."""
    augment = preset.augment
    if not augment.mixes:
        return None
    return Mixup(
        mixup_alpha=augment.mixup,
        cutmix_alpha=augment.cutmix,
        prob=augment.mixup_prob,
        switch_prob=augment.mixup_switch_prob,
        label_smoothing=augment.label_smoothing,
        num_classes=preset.model.num_classes,
    )
