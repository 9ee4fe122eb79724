"""The optimiser and its learning rate (paper, section 3.3)."""

import math

import torch
from timm.optim import param_groups_weight_decay

from lsag.config import TrainConfig
from lsag.model import LSAG


def lr_at(step: int, *, train: TrainConfig, steps_per_epoch: int) -> float:
    """The learning rate of optimizer step `step`, counted from 0: linear warm-up, then cosine to the end.

    Rates are scaled by batch_size / 512. The cosine starts where the warm-up ends; min_lr follows the last step.
    """
    scale = train.lr_scale
    warmup, total = train.warmup_epochs * steps_per_epoch, train.epochs * steps_per_epoch
    if step < warmup:
        return scale * (train.warmup_lr + (train.lr - train.warmup_lr) * step / warmup)
    progress = min((step - warmup) / max(total - warmup, 1), 1.0)
    return scale * (train.min_lr + (train.lr - train.min_lr) * (1 + math.cos(math.pi * progress)) / 2)


def make_optimizer(model: LSAG, train: TrainConfig) -> torch.optim.AdamW:
    """AdamW; biases, norms and position embeddings are not decayed (DeiT's practice)."""
    groups = param_groups_weight_decay(model, train.weight_decay, no_weight_decay_list=model.no_weight_decay())
    return torch.optim.AdamW(groups, lr=train.lr, fused=True)
