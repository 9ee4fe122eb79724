"""From a name, a file and --set to a validated Preset. No torch here."""

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lsag.config import DATASETS, Preset, TimmConfig, did_you_mean, validate_preset
from lsag.errors import LsagError, UsageError

MAX_PRESET_BYTES, MAX_EXTENDS = 1_000_000, 16


def preset_paths() -> dict[str, Path]:
    """The presets that come with the package, by name."""
    here = Path(__file__).parent
    # In a wheel they lie inside the package; in a checkout beside it.
    folder = next(path for path in (here / "preset_files", here.parent / "presets") if path.is_dir())
    return {path.stem: path for path in [*sorted(folder.glob("*.toml")), *sorted(folder.glob("ablation/*.toml"))]}


def load_preset(
    name_or_path: str | Path,
    overrides: Mapping[str, Any] | None = None,
    *,
    dataset: str | None = None,
    base: str | Path | None = None,
    timm: str | None = None,
) -> Preset:
    """Load a preset by name, or from a TOML or JSON file.

    A file with `extends = "NAME"` (a preset's name, or a file relative to it) says only what it changes. `base` takes
    the place of NAME, also in the preset's own name: cifar-tiny-a with the base cifar-nano is cifar-nano-a. `dataset`
    puts the preset on another dataset (with its classes and pixel statistics), `timm` another network in the place of
    its own (see TimmConfig); then `overrides` with dotted keys, such as {"train.epochs": 10}, are applied. Raises
    UsageError (a ValueError) that names every field at fault.
    """
    path, values = _read(name_or_path)
    values.setdefault("name", path.stem)
    if base is not None:
        if not isinstance(extended := values.get("extends"), str):
            raise UsageError(f"{path} extends no preset that {base} could replace", "leave the base away")
        change = str(values["name"]).removeprefix(Path(extended).stem).removeprefix("-")
        values |= {
            "name": f"{Path(base).stem}-{change}",
            "extends": str(_read(base)[0].absolute()),
            "paper": None,
        }
    values = _extended(values, path)
    if dataset is not None:
        _set_dataset(values, dataset)
    if timm is not None:
        _set_timm(values, timm)
    for key, value in (overrides or {}).items():
        _set_by_path(values, key, value)
    return validate_preset(values, origin=f"preset {path.stem}")


def _read(name_or_path: str | Path, *, extended_by: Path | None = None) -> tuple[Path, dict[str, Any]]:
    """A preset's file and what it holds; a path is relative to the file that is `extended_by` it."""
    known = preset_paths()
    path = known.get(str(name_or_path)) or (extended_by.parent if extended_by else Path()) / name_or_path
    where = f", which {extended_by} extends" if extended_by else ""
    names = [name for name, file in known.items() if file.parent.name != "ablation"]  # one letter off a model's name
    try:
        if not path.is_file():
            raise UsageError(
                f"no preset or file '{name_or_path}'{where}{did_you_mean(Path(name_or_path).name, names)}",
                "see: lsag presets",
            )
        if path.stat().st_size > MAX_PRESET_BYTES:
            raise UsageError(f"{path} is too large for a preset", "give a TOML file")
        text = path.read_bytes().decode("utf-8-sig")
        values = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except LsagError:
        raise
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not a valid TOML or JSON file: {error}", "correct the file") from error
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}", "see: lsag presets") from error
    if not isinstance(values, dict):
        raise UsageError(f"{path} holds no preset", "give a file with [model], [data] and [train]")
    return path, values


def _extended(values: dict[str, Any], path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The `values` of the file `path` over those of the preset that it extends; the files `above` extend this one."""
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
        raise UsageError(f"{path} extends {name}, which extends it in turn", "let one of them stand alone")
    inherited = _extended(inherited, base, above)
    for key in ("name", "description", "paper"):  # of that preset alone
        inherited.pop(key, None)
    if _are_tables(inherited.get("model"), values.get("model")) and "timm" in values["model"]:
        inherited["model"] = _for_timm(inherited["model"])
    return _merged(inherited, values)


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Tables are merged, all else is replaced."""
    both = {key: _merged(below[key], above[key]) for key in below.keys() & above if _are_tables(below[key], above[key])}
    return below | above | both


def _are_tables(*values: Any) -> bool:
    return all(isinstance(value, dict) for value in values)


def parse_override(text: str) -> tuple[str, Any]:
    """Split 'a.b=value' into its key and its value; the value is read as TOML, or else taken as a string."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise UsageError(f"--set {text!r} is not of the form key=value", "for example --set train.epochs=10")
    try:
        parsed = tomllib.loads(f"value = {value}")
        return key.strip(), parsed["value"] if len(parsed) == 1 else value
    except (ValueError, RecursionError):
        return key.strip(), value


def _set_dataset(values: dict[str, Any], dataset: str) -> None:
    """Classes and pixel statistics follow the dataset; `folder` keeps them until its classes are counted."""
    data, model = values.get("data"), values.get("model")
    if not isinstance(data, dict) or not isinstance(model, dict) or data.get("dataset") == dataset:
        return
    data["dataset"] = dataset
    if known := DATASETS.get(dataset):
        data |= {"mean": list(known.mean), "std": list(known.std)}
        model |= {"num_classes": known.num_classes, "in_channels": len(known.mean)}


def _set_timm(values: dict[str, Any], spec: str) -> None:
    """Put timm's network in the place of the preset's, with its image size, channels, classes and drop-path."""
    model = values.get("model")
    if not isinstance(model, dict) or model.get("timm") == spec:
        return
    values["model"] = _for_timm(model) | {"timm": spec}
    name = spec.partition(",")[0].replace("/", "-")
    values |= {"name": f"{values['name']}-{name}", "description": f"timm's {name} under the recipe of {values['name']}"}
    values.pop("paper", None)


def _for_timm(model: dict[str, Any]) -> dict[str, Any]:
    """What a classifier of timm has of the model section of an LSAG."""
    return {key: model[key] for key in TimmConfig.model_fields if key in model}


def _set_by_path(values: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    node: Any = values
    try:
        for part in parents:
            node = node[int(part)] if isinstance(node, list) else node.setdefault(part, {})
        node[int(last) if isinstance(node, list) else last] = value
    except (ValueError, IndexError, TypeError, AttributeError) as error:
        raise UsageError(f"no setting '{key}'", "see the preset's keys with: lsag train --dry-run") from error
