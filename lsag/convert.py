"""Checkpoints of the authors' release, brought into this project's layout."""

import argparse
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from lsag.checkpoint import Checkpoint, save_checkpoint
from lsag.config import ModelConfig, Preset
from lsag.data.sources import placeholder_classes
from lsag.errors import InputError, UsageError
from lsag.model.network import LSAG

_RENAMED = {
    "Wq_even": "attn.q",
    "Wq_odd": "attn.q",
    "Wkv_even": "attn.kv",
    "Wkv_odd": "attn.kv",
    "proj": "attn.proj",
    "fc1": "mlp.0",
    "fc2": "mlp.2",
}


def read_released(path: str | Path) -> dict[str, Tensor]:
    """The weights of a released file: a dict with the key `model` or `state_dict`, or the weights themselves.

    Loaded with `weights_only`; of other objects only the release's `argparse.Namespace` is let in, else InputError.
    """
    try:
        if Path(path).exists() and not Path(path).is_file():
            raise OSError("not a regular file")
        with torch.serialization.safe_globals([argparse.Namespace]):
            contents = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist", "check the path") from error
    except Exception as error:  # torch.load raises many types for a file that is not its own
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"{path} is not a checkpoint that can be read safely: {reason}", "give a released .pth"
        ) from error
    for key in ("model", "state_dict"):
        if isinstance(contents, dict):
            contents = contents.get(key, contents)
    if not isinstance(contents, dict) or not all(
        isinstance(key, str)
        and isinstance(value, Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        for key, value in contents.items()
    ):
        raise InputError(f"{path} holds no weights under 'model' or 'state_dict'", "give a released .pth")
    return contents


def convert_file(file: str | Path, preset: Preset, out: str | Path) -> None:
    """Write the released checkpoint `file`, which fits `preset`, to `out` in this project's format.

    The release does not name its classes. InputError if the weights do not fit.
    """
    if not isinstance(preset.model, ModelConfig):
        raise UsageError(f"{preset.name} is timm's, the release has LSAG alone", "choose a preset of lsag presets")
    model = from_released(read_released(file), preset.model)
    converted = preset.model_copy(update={"model": model.config})
    save_checkpoint(out, Checkpoint(model, converted, placeholder_classes(preset.model.num_classes)))


def from_released(state_dict: Mapping[str, Tensor], config: ModelConfig) -> LSAG:
    """A model in evaluation mode with the released weights `state_dict`; its logits are those of the released code.

    `config.shifts` lists the variants as section 4 of the paper does. `config.shift_mode` tells the family: the CIFAR
    code ("roll") reads each tuple of that list as (vertical, horizontal), so the returned model's own config holds the
    transposed tuples; the ImageNet code ("extend") reads (horizontal, vertical), as the paper does.

    Raises InputError (a ValueError) that names the keys that are missing, unknown or of another shape.
    """
    if config.shift_mode == "roll":
        # Departure: the paper says (Px horizontal, Py vertical); the released CIFAR code transposes them.
        config = config.model_copy(update={"shifts": tuple((py, px) for px, py in config.shifts)})
    source = {key.removeprefix("module."): value for key, value in state_dict.items()}
    model = LSAG(config)
    wanted = model.state_dict()
    converted: dict[str, Tensor] = {}
    for kind in ("weight", "bias"):
        names = [f"to_patch_embedding.projections.{s}.{kind}" for s in range(config.num_variants)]
        if all(name in source and source[name].dim() > 0 for name in names):
            converted[f"embed.conv.{kind}"] = torch.cat([source.pop(name) for name in names])
    for key, value in source.items():
        if key == "layers.0.0.pos_emb" and value.dim() == 3:
            converted["embed.pos"] = value.transpose(0, 1)
        else:
            converted[_rename(key)] = value
    missing = [key for key in wanted if key not in converted]
    unknown = [key for key in converted if key not in wanted]
    misshapen = [
        f"{key} is {_shape(converted[key])}, the model has {_shape(value)}"
        for key, value in wanted.items()
        if key in converted and converted[key].shape != value.shape
    ]
    infinite = [key for key, value in converted.items() if not value.isfinite().all()]
    problems = [
        f"{len(keys)} {what}: {', '.join(keys[:3])}"
        for what, keys in (
            ("missing", missing),
            ("unknown", unknown),
            ("of another shape", misshapen),
            ("not finite", infinite),
        )
        if keys
    ]
    if problems:
        fix = "choose the preset of these weights"
        if any(".kv." in line for line in misshapen):
            fix += (
                "; the release shares one key/value head in all CIFAR models: --set model.stages.0.num_kv_heads=1, ..."
            )
        raise InputError(f"the released weights do not fit: {'; '.join(problems)}", fix)
    model.load_state_dict(converted)
    return model.eval()


def _rename(key: str) -> str:
    """Our name for a released key; one that is not known comes back as it is, and is refused."""
    match key.split("."):
        case ["mlp_head", kind]:
            return f"head.{kind}"
        case ["layers", stage, "1", ("conv" | "norm") as name, kind] if stage.isdecimal():
            # The release puts the downsampling at the end of a stage, we at the start of the next.
            return f"stages.{int(stage) + 1}.down.{name}.{kind}"
        case ["layers", stage, "0", "pos_emb"]:
            return f"stages.{stage}.pos"
        case ["layers", stage, "0", "layers", block, _, name, kind] if name in _RENAMED:
            return f"stages.{stage}.blocks.{block}.{_RENAMED[name]}.{kind}"
        case ["layers", stage, "0", ("norm1" | "norm2") as name, kind]:
            return f"stages.{stage}.{name}.{kind}"
    return key


def _shape(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape))
