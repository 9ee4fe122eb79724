"""The optimizer and its learning rate (paper, section 3.3)."""

import math
from collections.abc import Sequence

import torch
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lsag.config import TrainConfig


def lr_at(step: int, *, train: TrainConfig, steps_per_epoch: int) -> float:
    """The learning rate of optimizer step `step`, counted from 0: linear warm-up, then cosine to the end.

    With lr_schedule "step" the cosine starts where the warm-up ends, and min_lr follows the last step.
    """
    first, peak, last = train.learning_rates
    warmup, total = train.warmup_epochs * steps_per_epoch, train.epochs * steps_per_epoch
    start = warmup
    if train.lr_schedule == "epoch":
        step, start = max(step // steps_per_epoch - 1, 0) * steps_per_epoch, 0
    if step < warmup:
        return first + (peak - first) * step / warmup
    progress = min((step - start) / max(total - start, 1), 1.0)
    return last + (peak - last) * (1 + math.cos(math.pi * progress)) / 2


def make_optimizer(model: nn.Module, train: TrainConfig) -> torch.optim.AdamW:
    """AdamW. Biases, norms and, without `decay_positions`, what the model names are not decayed (as in DeiT).

    With `layer_decay` there are groups for each layer, whose "lr_scale" is the factor of its learning rate.
    """
    asks = hasattr(model, "no_weight_decay") and not train.decay_positions
    spared = model.no_weight_decay() if asks else ()  # type: ignore[operator]
    if train.layer_decay == 1:
        groups = param_groups_weight_decay(model, train.weight_decay, no_weight_decay_list=spared)
    else:
        groups = param_groups_layer_decay(model, train.weight_decay, spared, layer_decay=train.layer_decay)
    return torch.optim.AdamW(groups, lr=train.lr, fused=True)


def moving_average(model: nn.Module, decay: float) -> AveragedModel:
    """The moving average of weights and running statistics; integer buffers are copied, such as timm's counters."""
    average = get_ema_multi_avg_fn(decay)

    def update(averages: Sequence[torch.Tensor], values: Sequence[torch.Tensor], updates: int | torch.Tensor) -> None:
        if averages[0].is_floating_point():
            average(averages, values, updates)
        else:
            for old, new in zip(averages, values, strict=True):
                old.copy_(new)

    return AveragedModel(model, multi_avg_fn=update, use_buffers=True)
