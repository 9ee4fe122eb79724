"""lsag flops and lsag presets"""

from typing import Annotated

import typer

from lsag.config import DATASETS, ModelConfig, Preset
from lsag.errors import UsageError
from lsag.model.flops import Count, count, count_stages
from lsag.presets import preset_names
from lsag.weights import cards
from lsag_cli.options import Json, Model, Overrides, complete_preset, loading, read_preset
from lsag_cli.output import mega, operations, percent, print_json, say_prose, say_table


def flops(
    preset: Annotated[
        list[str] | None,
        typer.Option("--preset", help="Only this preset (name or file); repeatable.", autocompletion=complete_preset),
    ] = None,
    model: Model = None,
    overrides: Overrides = None,
    by_stage: Annotated[bool, typer.Option("--by-stage", help="One line per stage.")] = False,
    as_json: Json = False,
) -> None:
    """Count parameters, MACs and FLOPs per image, next to the paper's figures. Nothing is run."""
    if model and not preset:
        raise UsageError("--model needs a --preset for its image size and classes", "add --preset cifar-tiny")
    presets = [read_preset(name, overrides, model=model) for name in preset or preset_names()]
    if as_json:
        print_json("flops", presets=[describe(item) for item in presets])
        return
    counts = ("parameters", "MACs\nplain", "FLOPs\nplain", "MACs\nexecuted")
    headings = ("stage", *counts) if by_stage else (*counts, "paper:\nparams", "paper:\n'GFLOPs'")
    rows = []
    for item in presets:
        paper = item.paper
        if by_stage:
            total = count_network(item)
            rows += [(item.name, stage.name, *cells(stage, total.flops)) for stage in [*stages_of(item), total]]
        else:
            params = f"{paper.params_m} M" if paper and paper.params_m else "-"
            gmacs = f"{paper.gmacs} G" if paper and paper.gmacs else "-"
            rows.append((item.name, *cells(count_network(item)), params, gmacs))
    say_table(("preset", *headings), rows, title="per image, one forward pass", drop=("FLOPs\nplain", "MACs\nplain"))
    say_prose(
        "plain: with keys and values of every shifted variant. executed: the same function with their projections "
        "absorbed (docs/design.md). FLOPs = 2 x MACs. The paper's 'GFLOPs' are MACs, and include only one of the T "
        "embedding convolutions."
    )


def presets(as_json: Json = False) -> None:
    """List the presets."""
    loaded = sorted((read_preset(name, None) for name in preset_names()), key=lambda item: count_network(item).macs_run)
    if as_json:
        print_json("presets", presets=[describe(item) for item in loaded])
        return
    columns = ("preset", "dataset", "image size", "params", "MACs executed", "epochs", "training")
    rows = []
    for item in loaded:
        total = count_network(item)
        rows.append(
            (
                item.name,
                item.data.dataset,
                str(item.model.image_size),
                mega(total.params),
                operations(total.macs_run),
                str(item.train.epochs),
                in_words(training_flops(item, total)),
            )
        )
    say_table(columns, rows, drop=("epochs", "image size", "training"))
    say_prose("training: 3 x 2 x MACs executed x images x epochs. See one with: lsag train --preset NAME --dry-run")
    trained = " and ".join(f"{name} ({percent(card.top1)})" for name, card in cards().items())
    say_prose(f"{trained} come with trained weights. Try them with: lsag eval digits-nano")
    say_prose("NAME-a to -e, -full, -i and -ii are the paper's ablations of any preset, such as cifar-nano-a.")


def count_network(preset: Preset) -> Count:
    """The whole network: LSAG in closed form without torch, a timm model as torch counts it."""
    if isinstance(preset.model, ModelConfig):
        return count(preset.model)
    with loading():
        from lsag.model.build import count_model

    return count_model(preset.model)


def stages_of(preset: Preset) -> list[Count]:
    """The stages of an LSAG; none for a timm model."""
    return count_stages(preset.model) if isinstance(preset.model, ModelConfig) else []


def cells(total: Count, largest: float | None = None) -> tuple[str, ...]:
    counts = (operations(number, largest) for number in (total.macs, total.flops, total.macs_run))
    return f"{total.params:,}", *counts


def training_flops(preset: Preset, total: Count) -> float | None:
    """A forward pass and a backward pass of twice the cost for each image of each epoch, if their number is known."""
    known = DATASETS.get(preset.data.dataset)
    return 6.0 * total.macs_run * known.train_images * preset.train.epochs if known else None


def in_words(flops: float | None) -> str:
    """3.6e18 -> '3.6 EFLOPs'."""
    if flops is None:
        return "-"
    size, unit = next(((size, unit) for size, unit in ((1e18, "E"), (1e15, "P")) if flops >= size), (1e12, "T"))
    return f"{flops / size:,.1f} {unit}FLOPs"


def describe(preset: Preset) -> dict[str, object]:
    """A preset as `--json` shows it."""
    total, card = count_network(preset), cards().get(preset.name)
    return {
        "name": preset.name,
        "description": preset.description,
        "dataset": preset.data.dataset,
        "image_size": preset.model.image_size,
        "epochs": preset.train.epochs,
        "training_flops": training_flops(preset, total),
        **figures(total),
        "paper": preset.paper.model_dump() if preset.paper else None,
        "weights": card.model_dump(mode="json") if card else None,
        "stages": [{"name": stage.name, **figures(stage)} for stage in stages_of(preset)],
    }


def figures(total: Count) -> dict[str, object]:
    return {"params": total.params, "macs": total.macs, "flops": total.flops, "macs_run": total.macs_run}
