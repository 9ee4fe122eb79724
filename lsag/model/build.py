"""The network that a configuration describes: LSAG, or a classifier of timm under the same recipe."""

import ast
import copy
import re
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lsag.config import ModelConfig, Recompute, TimmConfig
from lsag.errors import UsageError, first_line
from lsag.model.flops import Count, count
from lsag.model.network import LSAG

ARGUMENTS = {
    "num_classes": "num_classes",
    "in_chans": "in_channels",
    "img_size": "image_size",
    "drop_path_rate": "drop_path",
}
"""timm's names for fields of a configuration."""


def build_model(config: ModelConfig | TimmConfig) -> nn.Module:
    """The network with random weights; it takes (B, in_channels, image_size, image_size), gives (B, num_classes).

    UsageError for a classifier of timm that does not exist, or does not take such images.
    """
    if isinstance(config, ModelConfig):
        return LSAG(config)
    with torch.device("meta"):  # shapes alone, and no memory
        _try(timm_model(config.timm, config).eval(), config, batch=1)
    return timm_model(config.timm, config)


def check_training(config: ModelConfig | TimmConfig, *, slice_size: int, recompute: Recompute = "none") -> None:
    """UsageError, at once and without any memory, for a classifier of timm that cannot be trained in this way."""
    if isinstance(config, ModelConfig):
        return
    with torch.device("meta"):
        model = build_model(config).train()
        _try(model, config, batch=slice_size).sum().backward()
        set_recompute(model, recompute)
    idle = [name for name, weight in model.named_parameters() if weight.requires_grad and weight.grad is None]
    if idle:
        raise UsageError(f"timm:{config.timm} has weights that its logits do not depend on, as {idle[0]}", "another")


def _try(model: nn.Module, config: TimmConfig, *, batch: int) -> Tensor:
    """The logits (B, num_classes) of `batch` images; UsageError if there are none."""
    try:
        logits = model(torch.zeros(batch, *image_shape(config)))
    except Exception as error:  # networks of any author
        mode = f"be trained on {batch} at a time" if model.training else "be used"
        raise UsageError(
            f"timm:{config.timm} cannot {mode} with images of {config.image_size} x {config.image_size} pixels: "
            f"{first_line(error)[:150]}",
            "choose patches or windows that fit (timm:NAME,patch_size=2), or --set model.image_size",
        ) from error
    if not isinstance(logits, Tensor) or logits.shape != (batch, config.num_classes):
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        what = f"timm:{config.timm} gives {got}{' in training' if model.training else ''}"
        raise UsageError(f"{what}, not logits {(batch, config.num_classes)}", "choose a classifier with one output")
    return logits


def timm_model(spec: str, config: TimmConfig | None = None) -> nn.Module:
    """timm's model or class for `NAME[,KEY=VALUE...]` with random weights, and of the sizes of `config`.

    Networks of convolutions have no image size and are not given one. UsageError for all else that does not fit.
    """
    name, own = read_spec(spec)
    given = {key: getattr(config, field) for key, field in ARGUMENTS.items()} if config else {}
    for key in own:
        if key in given:
            raise UsageError(f"timm:{spec}: {key} is a setting of the preset", f"--set model.{ARGUMENTS[key]}=...")
    while True:
        try:
            made = _class(name)
            return made(**given, **own) if made else timm.create_model(name, **given, **own)
        except Exception as error:  # networks of any author
            missing = re.search(r"unexpected keyword argument '(img_size|drop_path_rate)'", str(error))
            if missing and missing[1] == "img_size" and own.pop("img_size", None):
                continue  # it then is the size of the images alone
            if not missing or missing[1] not in given:
                raise UsageError(f"timm:{spec}: {first_line(error)[:200]}", "write timm:NAME,KEY=VALUE") from error
            if given.pop(missing[1]) and missing[1] == "drop_path_rate":
                raise UsageError(f"timm:{spec} has no drop-path", "--set model.drop_path=0.0") from error


def read_spec(spec: str) -> tuple[str, dict[str, Any]]:
    """`NAME[,KEY=VALUE...]` -> the name of a model or class of timm, and its arguments. UsageError if it is none."""
    name, *settings = split_settings(spec)
    if not timm.is_model(name) and not _class(name):
        near = ", ".join((timm.list_models(f"{name}*") or timm.list_models(f"*{name}*"))[:3])
        raise UsageError(f"timm has no model '{name}'", f"use one of: {near}" if near else "see timm.list_models()")
    pairs = [setting.partition("=")[::2] for setting in settings]
    if any(key.startswith(("pretrained", "checkpoint")) for key, _ in pairs):
        raise UsageError(f"timm:{spec}: its models have random weights here", "leave pretrained away")
    if len(dict(pairs)) < len(pairs):
        raise UsageError(f"timm:{spec} has an argument twice", "give it once")
    values = {}
    for key, value in pairs:
        try:
            values[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
            what = f"timm:{spec[:150]}: the value of {key} is no number, text or list"
            raise UsageError(what, "write timm:NAME,KEY=VALUE") from error
    return name, values


def _class(name: str) -> Any:
    """timm's class of that name: some of its models, as nest_tiny, have widths that only their class lets choose."""
    found = getattr(timm.models, name, None)
    return found if isinstance(found, type) and issubclass(found, nn.Module) else None


def split_settings(spec: str) -> list[str]:
    """'a,b=[1,2],c=3' -> ['a', 'b=[1,2]', 'c=3']."""
    return re.split(r",(?=[\w.]+=)", spec)


def set_recompute(model: nn.Module, recompute: Recompute) -> None:
    """Keep less for the backward, and compute the local block ("local") or all blocks once more instead.

    UsageError if the network cannot.
    """
    if isinstance(model, LSAG):
        model.set_grad_checkpointing(recompute != "none", local_only=recompute == "local")
    elif recompute == "local":
        raise UsageError("--recompute local is for the local block, which LSAG alone has", "use --recompute all")
    elif recompute == "all":
        try:
            model.set_grad_checkpointing(True)  # type: ignore[operator]
        except (AttributeError, AssertionError) as error:
            raise UsageError(f"timm's {type(model).__name__} cannot recompute", "leave --recompute away") from error


def image_shape(config: ModelConfig | TimmConfig) -> tuple[int, int, int]:
    """(C, height, width) of a model's images."""
    return config.in_channels, config.image_size, config.image_size


def count_model(config: ModelConfig | TimmConfig) -> Count:
    """The parameters and MACs: of LSAG in closed form, else as torch counts them."""
    if isinstance(config, ModelConfig):
        return count(config)
    with torch.device("meta"):
        model = build_model(config)
    macs = count_macs(model, image_shape(config))
    return Count("total", sum(parameter.numel() for parameter in model.parameters()), macs, macs)


def count_macs(model: nn.Module, shape: tuple[int, int, int]) -> int:
    """Multiply-accumulates of matrix products and convolutions in a forward pass of one image, as torch counts them.

    On the meta device, since fused attention on a CPU counts as nothing.
    """
    copied = copy.deepcopy(model).to("meta").eval().requires_grad_(False)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        copied(torch.zeros(1, *shape, device="meta"))
    return counter.get_total_flops() // 2
