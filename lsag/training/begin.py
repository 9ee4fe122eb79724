"""How a training begins: fresh, fine-tuned from a checkpoint, or resumed."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lsag.checkpoint import Checkpoint, check_weights, load_checkpoint
from lsag.config import Preset, TimmConfig
from lsag.data.loading import random_key
from lsag.data.sources import placeholder_classes
from lsag.device import DTYPES, autocast, choose_precision
from lsag.distributed.world import World, lost_peers
from lsag.errors import InputError, UsageError
from lsag.model.build import build_model, freeze, image_shape, resize_positions, set_recompute
from lsag.model.network import LSAG
from lsag.training.data import Data
from lsag.training.optim import make_optimizer, moving_average
from lsag.training.options import TrainOptions
from lsag.training.run import NoRun
from lsag.training.state import State, keep_buffers


def begin(preset: Preset, data: Data, run: NoRun, world: World, options: TrainOptions) -> tuple[State, list[str]]:
    """The state that a training begins with, fresh, fine-tuned or resumed from the run; and notes for a person.

    UsageError for a checkpoint of another run, InputError for weights that do not fit.
    """
    path, checkpoint = run.newest() or (None, None)
    path = world.from_main(path)
    if path is not None and not world.is_main:
        checkpoint = load_checkpoint(path)
    torch.manual_seed(random_key(preset.train.seed, "init"))
    model = build_model(preset.model).to(world.device)
    notes = []
    if options.init_from is not None and checkpoint is None:
        notes.append(f"weights from {options.init_from}")
        notes += initialise_from(model, options.init_from, classes=data.classes, reset_head=options.reset_head)
    set_recompute(model, options.recompute)
    if frozen := freeze(model, preset.train.freeze):
        notes.append(f"train.freeze = {preset.train.freeze} keeps {frozen:,} parameters as they are")
    optimizer = make_optimizer(model, preset.train)
    timm = isinstance(preset.model, TimmConfig)
    precision = choose_precision(world.device, options.precision, timm=timm)
    if options.precision == "auto" and world.device.type == "cpu":
        native = "multiplies" if precision == "bf16" else "does not multiply"
        reason = "bf16 on a CPU is for LSAG" if timm else f"this processor {native} bf16 natively"
        notes.append(f"precision {precision}: {reason}")
    state = State(
        model=model,
        optimizer=optimizer,
        scaler=torch.amp.GradScaler(world.device.type, enabled=precision == "fp16"),
        ema=moving_average(model, preset.train.ema_decay) if preset.train.ema_decay else None,
        preset=preset,
        classes=data.classes,
        dataset=data.fingerprint,
        steps_per_epoch=data.steps_per_epoch,
        device=world.device,
        precision=precision,
        num_slices=world.size * options.accum,
        num_ranks=world.size,
    )
    if checkpoint is not None:
        state.check_same_run(checkpoint, allow_change=options.allow_change, where=options.out)
    if options.compile:
        model.compile()
    if world.size > 1:
        shape = (data.order.slice_size, *image_shape(preset.model))
        state.ddp = data_parallel(model, world.device, DTYPES[precision], shape=shape)
        optimizer.zero_grad()
    if checkpoint is not None:
        state.restore(checkpoint)
        notes += _resumed(state, checkpoint, options.out)
    return state, notes


def _resumed(state: State, checkpoint: Checkpoint, out: Path) -> list[str]:
    """Notes on a resumed run. UsageError if its position is not one of this preset on this data."""
    step = state.position.step
    if not 0 <= state.step_in_epoch <= state.steps_per_epoch:
        raise UsageError(
            f"step {step} of {out} lies outside its epoch: other batch size or number of images",
            "resume with the original batch size and data",
        )
    earlier = dict((checkpoint.training or {}).get("numerics") or {})
    changes = [
        f"{key} changed from {earlier[key]} to {now}"
        for key, now in state.numerics.items()
        if earlier.get(key, now) != now
    ]
    notes = [f"resumed after step {step}"]
    if state.finished:
        epochs = f"epoch {state.position.epoch} of {state.preset.train.epochs}"
        notes = [f"{out} is already finished ({epochs}): nothing is left to train"]
    return notes if not changes else [*notes, f"{', '.join(changes)}: results may differ in rounding"]


def data_parallel(
    model: nn.Module, device: torch.device, dtype: torch.dtype, *, shape: tuple[int, int, int, int]
) -> DistributedDataParallel:
    """The model in DDP, after two backward passes of images of `shape` (B, C, height, width); gradients are not zero.

    After its first backward DDP rebuilds its buckets, and sums in another order from then on. With that behind it, a
    resumed training sums as an uninterrupted one does. Buffers keep their values.
    """
    restore_buffers = keep_buffers(model)
    device_ids = [device.index] if device.type == "cuda" else None
    with lost_peers():
        ddp = DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True)
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")  # with one channel
        for _ in range(2):
            with autocast(device, dtype):
                logits = ddp(torch.zeros(shape, device=device))
            logits.float().sum().backward()
    restore_buffers()
    return ddp


def initialise_from(
    model: nn.Module, path: str | Path, *, classes: Sequence[str], reset_head: bool = False
) -> list[str]:
    """Load the weights of a checkpoint into `model`, to fine-tune it; returns notes on what had to be changed.

    Rows of the head are those of the class with that name; a class that the checkpoint does not know, and with
    `reset_head` every class, keeps the initial weights. Classes without names are taken in order if there are as many.
    LSAG's position embeddings are resized (bicubic) to the model's image size. InputError that names both models if
    the rest does not fit.
    """
    found = load_checkpoint(path)
    weights, notes = found.model.state_dict(), []
    wanted = {key: value.cpu() for key, value in model.state_dict().items()}
    if reset_head or found.classes != tuple(classes):
        known: Any = getattr(model, "pretrained_cfg", {})
        heads = known.get("classifier", "head")
        prefixes = tuple(f"{name}." for name in ((heads,) if isinstance(heads, str) else heads))
        head = {key: value for key, value in wanted.items() if key.startswith(prefixes)}
        notes.append(_replace_head(weights, head, old=() if reset_head else found.classes, new=classes))
    if isinstance(model, LSAG) and isinstance(found.model, LSAG):
        notes += resize_positions(weights, model.config)
    try:
        check_weights(weights, wanted)
    except ValueError as error:
        raise InputError(
            f"{path} holds {found.preset.name}, which is another network: {error}", "use its preset"
        ) from error
    model.load_state_dict(weights)
    return notes


def _replace_head(
    weights: dict[str, torch.Tensor], head: Mapping[str, torch.Tensor], *, old: Sequence[str], new: Sequence[str]
) -> str:
    """Replace the head in `weights` by `head`, in which a class that was among the `old` ones keeps its row.

    Classes without names are taken to be the same if there are as many. Returns a note that says which rows are kept.
    """
    if tuple(old) == placeholder_classes(len(new)):
        return "head: kept, as the checkpoint has as many classes, without names"
    rows = {name: row for row, name in enumerate(old)}
    kept = [name for name in new if name in rows]
    if not kept:
        weights |= head
        return f"a new head for {len(new)} classes"
    for key, fresh in head.items():
        trained = weights.get(key)
        if trained is not None and trained.shape == (len(old), *fresh.shape[1:]) and len(fresh) == len(new):
            weights[key] = fresh.clone()
            weights[key][[row for row, name in enumerate(new) if name in rows]] = trained[[rows[name] for name in kept]]
    added = [name for name in new if name not in rows]
    return f"head: rows of {_listed(kept)} kept" + (f", of {_listed(added)} new" if added else "")


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5:,} more" if len(names) > 5 else "")
