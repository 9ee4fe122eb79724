"""lsag train --dry-run"""

import json
from typing import Any

from lsag.config import DATASETS, Preset, TimmConfig, flatten
from lsag.errors import UsageError
from lsag_cli.display import counted, duration
from lsag_cli.flops import count_network
from lsag_cli.options import loading
from lsag_cli.output import operations, print_json, say
from lsag_cli.processes import TrainCommand


def show_plan(preset: Preset, options: TrainCommand, *, processes: int, probe: bool, as_json: bool) -> None:
    """The resolved preset and the training it means, on `processes` devices; with `probe` measured time and memory."""
    accum, recipe = options.accum, preset.train
    slice_size = preset.slice_size(processes * accum)
    if isinstance(preset.model, TimmConfig):
        with loading():
            from lsag.model.build import check_training

        check_training(preset.model, slice_size=slice_size, recompute=options.recompute)
    total = count_network(preset)
    known = DATASETS.get(preset.data.dataset)
    steps = known.train_images // recipe.batch_size if known else None
    if known and not steps:
        raise UsageError(
            f"{known.train_images:,} training images do not fill one batch of {recipe.batch_size}",
            "choose a smaller one with --set train.batch_size=N",
        )
    plan: dict[str, Any] = {
        "parameters": total.params,
        "macs": total.macs,
        "macs_run": total.macs_run,
        "train_images": known.train_images if known else None,
        "steps_per_epoch": steps,
        "steps": steps * recipe.epochs if steps is not None else None,
        "batch_size": recipe.batch_size,
        "processes": processes,
        "accum": accum,
        "slice_size": slice_size,
        "peak_lr": recipe.lr * recipe.lr_scale,
    }
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
        plan["training_seconds"] = plan["steps"] and plan["steps"] * plan["step_seconds"]
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
    of_steps = "as many steps as the folder has batches" if steps is None else counted(steps, "step")
    say("")
    say(f"parameters       {plan['parameters']:,}")
    say(f"MACs per image   {operations(plan['macs'])}, {operations(plan['macs_run'])} executed")
    say(f"steps            {counted(recipe.epochs, 'epoch')} of {of_steps}")
    say(f"effective batch  {recipe.batch_size} = {devices} x {slices} x {counted(plan['slice_size'], 'image')}")
    say(f"peak lr          {plan['peak_lr']:.3g} ({recipe.lr:g} x {recipe.batch_size} / 512)")
    if "step_seconds" in plan:
        say(f"time per step    {plan['step_seconds']:.3f} s, measured on one device, without loading and evaluation")
        say(f"memory           {plan['memory_bytes'] / 2**30:.2f} GiB at its peak")
        if plan["training_seconds"]:
            say(f"training time    {duration(plan['training_seconds'])}")
