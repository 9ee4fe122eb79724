"""lsag train --dry-run"""

import json
from pathlib import Path
from typing import Any

from lsag.config import DATASETS, Preset, TimmConfig, flatten
from lsag.errors import InputError, UnavailableError, UsageError
from lsag_cli.display import counted, duration
from lsag_cli.flops import count_network
from lsag_cli.options import loading
from lsag_cli.output import note, operations, print_json, say
from lsag_cli.processes import TrainCommand


def count_images(preset: Preset, data_dir: Path, *, download: bool = False) -> tuple[int, int, int]:
    """The numbers of classes, training images and evaluation images; those of images of one's own are counted.

    The errors of open_split, and those of an order that the images do not have.
    """
    if known := DATASETS.get(preset.data.dataset):
        preset.data.check_shards(False)
        return known.num_classes, known.train_images, known.eval_images
    with loading():
        from lsag.data.splits import open_split

    train, evaluation = (
        open_split(
            preset.data.dataset,
            data_dir,
            train=train,
            mode=preset.image_mode,
            download=download,
            val_split=preset.data.val_split,
            seed=preset.train.seed,
        )
        for train in (True, False)
    )
    preset.data.check_shards(train.shards is not None)
    return len(train.classes), len(train), len(evaluation)


def show_plan(preset: Preset, options: TrainCommand, *, processes: int, probe: bool, as_json: bool) -> None:
    """The resolved preset and the training it means, on `processes` devices; with `probe` measured time and memory.

    Neither the devices nor a folder of images need to be here.
    """
    accum, recipe = options.accum, preset.train
    slice_size = preset.slice_size(processes * accum)
    train_images = eval_images = 0
    steps = None
    try:
        classes, train_images, eval_images = count_images(preset, options.data_dir)
        steps = train_images // recipe.batch_size
        if preset.data.dataset not in DATASETS:
            preset = preset.with_classes(classes)
    except (InputError, UnavailableError) as error:
        note(f"images are not counted: {error.what}")
    if steps == 0:
        raise UsageError(
            f"{train_images:,} training images do not fill one batch of {recipe.batch_size}",
            "choose a smaller one with --set train.batch_size=N",
        )
    if isinstance(preset.model, TimmConfig):
        with loading():
            from lsag.model.build import check_training

        check_training(preset.model, slice_size=slice_size, recompute=options.recompute, frozen=recipe.freeze)
    total = count_network(preset)
    plan: dict[str, Any] = {
        "parameters": total.params,
        "macs": total.macs,
        "macs_run": total.macs_run,
        "train_images": train_images or None,
        "eval_images": eval_images or None,
        "steps_per_epoch": steps,
        "steps": steps and steps * recipe.epochs,
        "batch_size": recipe.batch_size,
        "processes": processes,
        "accum": accum,
        "slice_size": slice_size,
        "peak_lr": recipe.learning_rates[1],
    }
    if options.gpus and options.gpus != "0":
        with loading():
            import torch

        plan["gpus_here"] = torch.cuda.device_count()
    if probe:
        with loading():
            from lsag.bench import probe as measure

        seconds, memory = measure(
            preset,
            device=options.device,
            slice_size=slice_size,
            precision=options.precision,
            compile=options.compile,
            recompute=options.recompute,
        )
        plan |= {"step_seconds": seconds * accum, "memory_bytes": memory}
        if steps is not None:
            plan["training_seconds"] = plan["steps"] * plan["step_seconds"]
            # An evaluated image costs a forward pass, a third of a training step.
            per_epoch = eval_images / recipe.batch_size * plan["step_seconds"] / 3
            plan["total_seconds"] = plan["training_seconds"] + recipe.epochs * per_epoch
    if as_json:
        print_json("train", dry_run=True, preset=preset.model_dump(mode="json"), **plan)
        return
    for key, value in flatten(preset.model_dump(mode="json")).items():
        say(f"{key} = {json.dumps(value)}")
    show_figures(preset, plan)


def show_figures(preset: Preset, plan: dict[str, Any]) -> None:
    """What the settings amount to, a line for each figure."""
    recipe, steps = preset.train, plan["steps_per_epoch"]
    devices, slices = counted(plan["processes"], "device"), counted(plan["accum"], "slice")
    of_steps = "as many steps as the images fill batches" if steps is None else counted(steps, "step")
    say("")
    say(f"parameters       {plan['parameters']:,}")
    say(f"MACs per image   {operations(plan['macs'])}, {operations(plan['macs_run'])} executed")
    if steps is not None:
        share = steps * plan["slice_size"] * plan["accum"]
        each = f" ({share:,} an epoch on each device)" if plan["processes"] > 1 else ""
        say(f"images           {plan['train_images']:,} training{each}, {plan['eval_images']:,} evaluation")
    say(f"steps            {counted(recipe.epochs, 'epoch')} of {of_steps}")
    say(f"effective batch  {recipe.batch_size} = {devices} x {slices} x {counted(plan['slice_size'], 'image')}")
    if "gpus_here" in plan:
        say(f"GPUs             {plan['processes']}; this machine has {plan['gpus_here']}")
    say(f"peak lr          {plan['peak_lr']:.3g} ({recipe.lr:g} x {recipe.batch_size} / 512)")
    if "step_seconds" in plan:
        say(f"time per step    {plan['step_seconds']:.3f} s, measured on one device")
        say(f"memory           {plan['memory_bytes'] / 2**30:.2f} GiB at its peak")
        if "total_seconds" in plan:
            say(f"total time       about {duration(plan['total_seconds'])} with evaluation, without loading")
