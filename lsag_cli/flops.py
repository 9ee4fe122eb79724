"""lsag flops and lsag presets"""

from typing import Annotated

import typer

from lsag.config import DATASETS, ModelConfig, Preset
from lsag.errors import UsageError
from lsag.model.flops import Count, count, count_stages
from lsag.presets import preset_paths
from lsag_cli.options import Json, Model, Overrides, complete_preset, leaving_at_once, read_preset
from lsag_cli.output import giga, mega, print_json, say, say_table, table


def flops(
    preset: Annotated[
        list[str] | None,
        typer.Option("--preset", help="Only this preset (name or file); repeatable.", autocompletion=complete_preset),
    ] = None,
    model: Model = None,
    overrides: Overrides = None,
    by_stage: Annotated[bool, typer.Option("--by-stage", help="A line for each stage.")] = False,
    as_json: Json = False,
) -> None:
    """Count parameters, MACs and FLOPs per image, beside the paper's figures. Nothing is run."""
    if model and not preset:
        raise UsageError("--model needs --preset, whose images and classes it has", "add --preset cifar-tiny")
    presets = [read_preset(name, overrides, model=model) for name in preset or preset_paths()]
    if as_json:
        print_json("flops", presets=[describe(item) for item in presets])
        return
    counts = ("parameters", "MACs\nplain", "FLOPs\nplain", "MACs\nrun")
    headings = ("stage", *counts) if by_stage else (*counts, "paper:\nparams", "paper:\n'GFLOPs'")
    shown = table("preset", *headings, title="per image, one forward pass")
    for item in presets:
        paper = item.paper
        printed = (
            f"{paper.params_m} M" if paper and paper.params_m else "-",
            f"{paper.gmacs} G" if paper and paper.gmacs else "-",
        )
        if by_stage:
            for stage in [*stages_of(item), count_network(item)]:
                shown.add_row(item.name, stage.name, *cells(stage), end_section=stage.name == "total")
        else:
            shown.add_row(item.name, *cells(count_network(item)), *printed)
    say_table(shown)
    say(
        "plain: keys and values of every shift variant. run: the same function with them absorbed (docs/design.md).\n"
        "FLOPs = 2 x MACs. The paper's 'GFLOPs' are MACs, and its counter counts one of the T embedding convolutions."
    )


def presets(as_json: Json = False) -> None:
    """List the presets."""
    loaded = [read_preset(name, None) for name in preset_paths()]
    if as_json:
        print_json("presets", presets=[describe(item) for item in loaded])
        return
    headings = ("preset", "dataset", "image", "params", "MACs run", "epochs", "training")
    shown = table(*headings)
    for item in loaded:
        total = count_network(item)
        cost = training_flops(item, total)
        shown.add_row(
            item.name,
            item.data.dataset,
            str(item.model.image_size),
            mega(total.params),
            giga(total.macs_run),
            str(item.train.epochs),
            f"{cost / 1e18:,.4f} E" if cost else "-",
        )
    say_table(shown)
    say(
        "training: 3 x 2 x MACs run x images x epochs, in 10^18 FLOPs. See one with: lsag train --preset NAME --dry-run"
    )


def count_network(preset: Preset) -> Count:
    """The whole network: ours in closed form and without torch, timm's as torch counts it."""
    if isinstance(preset.model, ModelConfig):
        return count(preset.model)
    with leaving_at_once():
        from lsag.model.build import count_model

    return count_model(preset.model)


def stages_of(preset: Preset) -> list[Count]:
    """Only ours are known by their stages."""
    return count_stages(preset.model) if isinstance(preset.model, ModelConfig) else []


def cells(total: Count) -> tuple[str, ...]:
    return f"{total.params:,}", giga(total.macs), giga(total.flops), giga(total.macs_run)


def training_flops(preset: Preset, total: Count) -> float | None:
    """A forward and twice that backward, for each image of each epoch."""
    known = DATASETS.get(preset.data.dataset)
    return 6.0 * total.macs_run * known.train_images * preset.train.epochs if known else None


def describe(preset: Preset) -> dict[str, object]:
    def figures(item: Count) -> dict[str, object]:
        return {"params": item.params, "macs": item.macs, "flops": item.flops, "macs_run": item.macs_run}

    total = count_network(preset)
    return {
        "name": preset.name,
        "description": preset.description,
        "dataset": preset.data.dataset,
        "image_size": preset.model.image_size,
        "epochs": preset.train.epochs,
        "training_flops": training_flops(preset, total),
        **figures(total),
        "paper": preset.paper.model_dump() if preset.paper else None,
        "stages": [{"name": stage.name, **figures(stage)} for stage in stages_of(preset)],
    }
