"""From a name, a file and --set to a validated Preset. No torch here."""

import json
import tomllib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from lsag.config import (
    DATASETS,
    MAX_TOML_BYTES,
    Preset,
    TimmConfig,
    TrainConfig,
    did_you_mean,
    parse_spec,
    validate_preset,
)
from lsag.errors import LsagError, UsageError

MAX_JSON_BYTES, MAX_EXTENDS = 1_000_000, 16
ABLATED = "cifar-tiny"
"""The preset that the paper's Tables 5 and 6 ablate, and for which they give figures."""
FINE_TUNING_LR, FINE_TUNING_STEPS = 0.1, 10
"""Fine-tuning from a checkpoint alone: the peak learning rate as a factor of its own, and the fewest steps an epoch."""


def load_preset(
    name_or_path: str | Path | Preset,
    overrides: Mapping[str, Any] | None = None,
    *,
    dataset: str | None = None,
    timm: str | None = None,
    notes: list[str] | None = None,
) -> Preset:
    """Load a preset by name, or from a TOML or JSON file, whose ending may be left out, or change a loaded one.

    PRESET-ABLATION, such as cifar-nano-a, is an ablation of Tables 5 and 6 of that preset. A file with
    `extends = "NAME"` (a preset's name, or a file relative to it) contains only what it changes. `dataset` switches to
    another dataset, with its classes and pixel statistics. `timm` is `NAME[,KEY=VALUE...]`, a timm model that replaces
    the network (see TimmConfig). `overrides` have dotted keys, such as {"train.epochs": 10}, and are applied last. If
    they set the epochs but not the warm-up, and it would take longer, it is shortened; `notes` gets a line about that.
    UsageError (a ValueError) names every field at fault.
    """
    if isinstance(name_or_path, Preset):
        path, values = Path(name_or_path.name), name_or_path.model_dump(mode="json")
    else:
        path, values = _read(name_or_path)
        values = _extended({"name": path.stem} | values, path)
    if dataset is not None:
        _set_dataset(values, dataset)
    if timm is not None:
        _set_timm(values, timm)
    for key, value in (overrides or {}).items():
        _set_key(values, key, value)
    if "train.epochs" in (overrides or {}) and "train.warmup_epochs" not in (overrides or {}):
        _fit_warmup(values["train"], notes if notes is not None else [])
    return validate_preset(values, origin=f"preset {path.stem}")


def for_fine_tuning(
    preset: Preset, trained: TrainConfig, *, given: Collection[str], num_images: int, num_slices: int
) -> tuple[Preset, list[str]]:
    """`preset`, which is that of a checkpoint with changes, as a recipe for fine-tuning; and a note for each change.

    The batch is cut so far that an epoch of `num_images` has ten steps, but not below two images for each of the
    `num_slices`. Learning rates are a tenth of the checkpoint's, whose recipe was `trained`; with "train.lr" among the
    `given` settings they stay, and so does every other setting that is `given`.
    """
    before, batch, notes = preset.train.batch_size, preset.train.batch_size, []
    if "train.batch_size" not in given and num_images < FINE_TUNING_STEPS * before:
        batch = 2 * num_slices
        while 2 * batch * FINE_TUNING_STEPS <= num_images:
            batch *= 2
    changes: dict[str, Any] = {"batch_size": batch}
    if "train.epochs" not in given:
        notes.append(f"epochs: {preset.train.epochs}, as the checkpoint was trained; change it with --epochs")
    if batch != before:
        notes.append(f"batches of {batch} instead of {before}, because there are {num_images:,} images")
    if "train.lr" not in given:
        first, peak, last = (rate * FINE_TUNING_LR for rate in trained.learning_rates)
        rates = {"lr": peak * 512 / batch, "warmup_lr": first, "min_lr": last, "lr_scaling": "peak"}
        changes |= {name: rate for name, rate in rates.items() if f"train.{name}" not in given}
        notes.append(f"peak learning rate {peak:.3g}, a tenth of the checkpoint's; change it with --set train.lr")
    return preset.model_copy(update={"train": preset.train.model_copy(update=changes)}), notes


def preset_names() -> list[str]:
    """The presets that come with the package, with the paper's ablations."""
    return [*preset_paths(), *(f"{ABLATED}-{ablation}" for ablation in ablations())]


def preset_paths() -> dict[str, Path]:
    """The preset files that come with the package, by name."""
    return {path.stem: path for path in sorted(_folder().glob("*.toml")) if path.stem != "ablations"}


def ablations() -> dict[str, dict[str, Any]]:
    """What each ablation of Tables 5 and 6 changes in a preset, by its name: `description`, `model` and `paper`."""
    tables = tomllib.loads((_folder() / "ablations.toml").read_text())
    return {name: table | {"model": tables["full"]["model"] | table["model"]} for name, table in tables.items()}


def _folder() -> Path:
    """The presets are inside the package in a wheel, next to it in a checkout."""
    here = Path(__file__).parent
    return next(path for path in (here / "preset_files", here.parent / "presets") if path.is_dir())


def _read(name_or_path: str | Path, *, extended_by: Path | None = None) -> tuple[Path, dict[str, Any]]:
    """The path and the values of a preset, with `extends` still in them; paths are relative to the extending file."""
    known, name = preset_paths(), str(name_or_path)
    path = (extended_by.parent if extended_by else Path()) / name
    files = [known.get(name, path), *(path.with_name(path.name + ending) for ending in (".toml", ".json") if path.name)]
    base, _, ablation = name.rpartition("-")
    try:
        file = next((file for file in files if file.is_file()), None)
        if base and ablation in ablations() and (base in known or not file):
            return path, _ablation(base, ablation)
        if not file:
            where = f", which {extended_by} extends" if extended_by else ""
            raise UsageError(
                f"no preset or file '{name}'{where}{did_you_mean(Path(name).name, known)}", "see: lsag presets"
            )
        if file.stat().st_size > (MAX_JSON_BYTES if file.suffix == ".json" else MAX_TOML_BYTES):
            raise UsageError(f"{file} is too large for a preset", "give a TOML file")
        text = file.read_bytes().decode("utf-8-sig")
        values = json.loads(text) if file.suffix == ".json" else tomllib.loads(text)
    except LsagError:
        raise
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not a valid TOML or JSON file: {error}", "correct the file") from error
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}", "see: lsag presets") from error
    if not isinstance(values, dict):
        raise UsageError(f"{file} is not a preset", "give a file with [model], [data] and [train]")
    return file, values


def _ablation(base: str, ablation: str) -> dict[str, Any]:
    """An ablation of the preset `base`. The paper's figures are for one preset only."""
    changes = ablations()[ablation]
    paper = changes.pop("paper")
    file = Path(base).name
    own = {"name": f"{Path(base).stem}-{ablation}", "extends": base if file == base else f"./{file}"}
    return own | changes | ({"paper": paper} if base == ABLATED else {})


def _extended(values: dict[str, Any], path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The `values` of the file `path` over those of the preset it extends; the files `above` extend this one."""
    name = values.pop("extends", None)
    if name is None:
        return values
    if not isinstance(name, str):
        raise UsageError(f"{path}: extends is {name!r}", "give a preset's name or file in quotes")
    base, inherited = _read(name, extended_by=path)
    above = (*above, path.resolve())
    if len(above) > MAX_EXTENDS:
        raise UsageError(f"{above[0]} extends a preset that extends another, {MAX_EXTENDS} times", "use fewer files")
    if base.resolve() in above:
        raise UsageError(f"{path} extends {name}, which extends it in turn", "remove one of the two")
    inherited = _extended(inherited, base, above)
    for key in ("name", "description", "paper"):  # they describe that preset only
        inherited.pop(key, None)
    if isinstance(values.get("model"), dict) and "timm" in values["model"]:
        inherited["model"] = _sizes(inherited.get("model"))
    return _merged(inherited, values)


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Tables are merged; everything else is replaced."""
    merged = below | above
    for key in below.keys() & above:
        if isinstance(below[key], dict) and isinstance(above[key], dict):
            merged[key] = _merged(below[key], above[key])
    return merged


def _set_dataset(values: dict[str, Any], dataset: str) -> None:
    """Set the dataset with its classes and pixel statistics; `folder` keeps those until its classes are counted."""
    data, model = values.get("data"), values.get("model")
    if not isinstance(data, dict) or not isinstance(model, dict) or data.get("dataset") == dataset:
        return
    data["dataset"] = dataset
    data.pop("val_split", None)
    if known := DATASETS.get(dataset):
        data |= {"mean": list(known.mean), "std": list(known.std)}
        model |= {"num_classes": known.num_classes, "in_channels": len(known.mean)}


def _set_timm(values: dict[str, Any], spec: str) -> None:
    """Replace the network by timm's, unless it is the same one already."""
    model, (timm, arguments) = values.get("model"), parse_spec(spec)
    if not isinstance(model, dict):
        return
    if spec == model.get("timm") or (timm, arguments) == (model.get("timm"), model.get("arguments", {})):
        return
    values["model"] = _sizes(model) | {"timm": timm, "arguments": arguments}
    name = timm.replace("/", "-")
    values |= {"name": f"{values['name']}-{name}", "description": f"timm's {name} under the recipe of {values['name']}"}
    values.pop("paper", None)


def _fit_warmup(train: dict[str, Any], notes: list[str]) -> None:
    """Shorten a warm-up that takes the whole training to a fifth of it."""
    epochs = train["epochs"]
    warmup = train.get("warmup_epochs", TrainConfig.model_fields["warmup_epochs"].default)
    if isinstance(epochs, int) and isinstance(warmup, int | float) and 0 < epochs <= warmup:
        train["warmup_epochs"] = epochs / 5
        notes.append(f"the warm-up takes {epochs / 5:g} instead of {warmup:g} epochs")


def _sizes(model: Any) -> dict[str, Any]:
    """What a model section says for any network: image size, channels, classes and drop-path."""
    fields = TimmConfig.model_fields.keys() - {"timm", "arguments"}
    return {key: value for key, value in model.items() if key in fields} if isinstance(model, dict) else {}


def _set_key(values: dict[str, Any], key: str, value: Any) -> None:
    """Set the dotted `key` in nested tables and lists."""
    *parents, last = key.split(".")
    node: Any = values
    try:
        for part in parents:
            node = node[_index(part)] if isinstance(node, list) else node.setdefault(part, {})
        node[_index(last) if isinstance(node, list) else last] = value
    except (ValueError, IndexError, TypeError, AttributeError) as error:
        raise UsageError(f"no setting '{key}'", "see the preset's keys with: lsag train --dry-run") from error


def _index(part: str) -> int:
    """A place in a list, counted from 0. ValueError for anything else, such as -1."""
    if not (part.isascii() and part.isdecimal()):
        raise ValueError(part)
    return int(part)
