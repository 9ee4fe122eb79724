"""The network that a configuration describes: LSAG, or a classifier of timm under the same recipe."""

import contextlib
import copy
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

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
MAX_TENSORS, MAX_PARAMETERS = 10_000, 10**10
"""Above any model in use; what is larger is a typing error, or a file that would use up time and memory."""


def build_model(config: ModelConfig | TimmConfig) -> nn.Module:
    """The network with random weights: (B, in_channels, image_size, image_size) -> logits (B, num_classes).

    UsageError if timm has no such classifier, or if it does not accept such images.
    """
    if isinstance(config, ModelConfig):
        _check_size(config)
        return LSAG(config)
    with torch.device("meta"), _limited_size():  # only shapes, without memory
        _logits(timm_model(config.timm, config.arguments, config).eval(), config, batch=1)
    return timm_model(config.timm, config.arguments, config)


def _check_size(config: ModelConfig) -> None:
    if (parameters := count(config).params) > MAX_PARAMETERS:
        raise UsageError(f"a model of {parameters:,} parameters is too large", "choose smaller settings of model")


@contextlib.contextmanager
def _limited_size() -> Iterator[None]:
    """UsageError as soon as what is built meanwhile has more tensors or parameters than any model in use."""
    tensors = parameters = 0

    def add(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal tensors, parameters
        tensors, parameters = tensors + 1, parameters + (0 if parameter is None else parameter.numel())
        if tensors > MAX_TENSORS or parameters > MAX_PARAMETERS:
            what = f"a model of more than {MAX_TENSORS:,} tensors or {MAX_PARAMETERS:,} parameters is too large"
            raise UsageError(what, "choose smaller arguments")

    hook = register_module_parameter_registration_hook(add)
    try:
        yield
    finally:
        hook.remove()


def check_training(
    config: ModelConfig | TimmConfig, *, slice_size: int, recompute: Recompute = "none", frozen: int = 0
) -> None:
    """UsageError if a model is too large, or a timm classifier cannot be trained like this; needs no data or memory."""
    if isinstance(config, ModelConfig):
        return _check_size(config)
    with torch.device("meta"):
        model = build_model(config).train()
        freeze(model, frozen)
        _logits(model, config, batch=slice_size).sum().backward()
        set_recompute(model, recompute)
    unused = [name for name, weight in model.named_parameters() if weight.requires_grad and weight.grad is None]
    if unused:
        raise UsageError(f"timm:{config.timm}: the logits do not depend on {unused[0]}", "choose another model")


def _logits(model: nn.Module, config: TimmConfig, *, batch: int) -> Tensor:
    """The logits (batch, num_classes) of empty images; UsageError if the model does not give any."""
    try:
        logits = model(torch.zeros(batch, *image_shape(config)))
    except Exception as error:  # timm's networks raise whatever they like
        use = f"be trained on {batch} at a time" if model.training else "be used"
        raise UsageError(
            f"timm:{config.timm} cannot {use} with images of {config.image_size} x {config.image_size} pixels: "
            f"{first_line(error)[:150]}",
            "choose patches or windows that fit (timm:NAME,patch_size=2), or --set model.image_size",
        ) from error
    if not isinstance(logits, Tensor) or logits.shape != (batch, config.num_classes):
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        what = f"timm:{config.timm} gives {found}{' in training' if model.training else ''}"
        raise UsageError(f"{what}, not logits {(batch, config.num_classes)}", "choose a classifier with one output")
    return logits


def timm_model(name: str, arguments: Mapping[str, Any], config: TimmConfig | None = None) -> nn.Module:
    """A timm model, or model class, with these arguments, random weights and the sizes of `config`.

    Convolutional networks do not take an image size and are not given one. UsageError for anything that does not fit.
    """
    import timm

    make = _model_class(name)
    if not make and not timm.is_model(name):
        near = ", ".join((timm.list_models(f"{name}*") or timm.list_models(f"*{name}*"))[:3])
        raise UsageError(f"timm has no model '{name}'", f"use one of: {near}" if near else "see timm.list_models()")
    sizes = {key: getattr(config, field) for key, field in ARGUMENTS.items()} if config else {}
    given = {key: _tuples(value) for key, value in arguments.items()}
    for key in given:
        if key.startswith(("pretrained", "checkpoint")):
            raise UsageError(
                f"timm:{name}: {key}={given[key]} is not supported", "remove it; models start with random weights"
            )
        if key in sizes:
            raise UsageError(f"timm:{name}: {key} is a setting of the preset", f"--set model.{ARGUMENTS[key]}=...")
    while True:
        try:
            return make(**sizes, **given) if make else timm.create_model(name, **sizes, **given)
        except UsageError:
            raise
        except Exception as error:  # timm's networks raise whatever they like
            missing = re.search(r"unexpected keyword argument '(img_size|drop_path_rate)'", str(error))
            if missing and missing[1] == "img_size" and given.pop("img_size", None):
                continue  # it is the size of the images only
            if not missing or missing[1] not in sizes:
                raise UsageError(f"timm:{name}: {first_line(error)[:200]}", "write timm:NAME,KEY=VALUE") from error
            if sizes.pop(missing[1]) and missing[1] == "drop_path_rate":
                raise UsageError(f"timm:{name} has no drop-path", "--set model.drop_path=0.0") from error


def _model_class(name: str) -> Any:
    """timm's class of that name: the widths of some models, such as nest_tiny, can be chosen only through the class."""
    import timm

    found = getattr(timm.models, name, None)
    return found if isinstance(found, type) and issubclass(found, nn.Module) else None


def _tuples(value: Any) -> Any:
    """timm takes tuples where TOML has lists."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def freeze(model: nn.Module, stages: int) -> int:
    """Let the embedding and the first `stages` stages keep their weights, and count them; 0 freezes nothing.

    Of timm's networks, these are the stem and the groups that the network itself names. UsageError if there are fewer.
    """
    if not stages:
        return 0
    from timm.models import group_parameters

    groups = {}
    if hasattr(model, "group_matcher"):
        groups = group_parameters(model, model.group_matcher(coarse=True), reverse=True)  # type: ignore[operator]
    found = max(groups.values(), default=1) - 1  # the first group is the embedding, the last one the head
    if stages > found:
        raise UsageError(f"train.freeze {stages} is more than the {found} stages of {type(model).__name__}", "lower it")
    frozen = [model.get_parameter(name) for name, group in groups.items() if group <= stages]
    for weight in frozen:
        weight.requires_grad_(False)
    return sum(weight.numel() for weight in frozen)


def set_recompute(model: nn.Module, recompute: Recompute) -> None:
    """Save memory: keep less for the backward pass, and run the local block ("local") or all blocks once more instead.

    UsageError if the network cannot do so.
    """
    if isinstance(model, LSAG):
        model.set_grad_checkpointing(recompute != "none", local_only=recompute == "local")
    elif recompute == "local":
        raise UsageError("--recompute local is for LSAG only; timm models have no local block", "use --recompute all")
    elif recompute == "all":
        try:
            model.set_grad_checkpointing(True)  # type: ignore[operator]
        except (AttributeError, AssertionError) as error:
            raise UsageError(f"timm's {type(model).__name__} cannot recompute", "remove --recompute") from error


def resize_positions(weights: dict[str, Tensor], config: ModelConfig) -> list[str]:
    """Resize LSAG's position embeddings among `weights` to another image size (bicubic); a note for each."""
    notes = []
    keys = [key for key in weights if key.endswith("pos")]
    for key, after in zip(keys, config.grid_sizes, strict=False):
        before = math.isqrt(len(weights[key]))
        if before != after:
            grid = weights[key].flatten(1).T.unflatten(1, (before, before))[None]
            resized = F.interpolate(grid, size=(after, after), mode="bicubic", antialias=True)[0]
            weights[key] = resized.flatten(1).T.unflatten(1, weights[key].shape[1:])
            notes.append(f"{key} resized from {before} x {before} to {after} x {after} patches")
    return notes


def image_shape(config: ModelConfig | TimmConfig) -> tuple[int, int, int]:
    """(C, height, width) of a model's images."""
    return config.in_channels, config.image_size, config.image_size


def count_model(config: ModelConfig | TimmConfig) -> Count:
    """Parameters and MACs: LSAG's in closed form, timm's as torch counts them."""
    if isinstance(config, ModelConfig):
        return count(config)
    with torch.device("meta"):
        model = build_model(config)
    macs = count_macs(model, image_shape(config))
    return Count("total", sum(parameter.numel() for parameter in model.parameters()), macs, macs)


def count_macs(model: nn.Module, shape: tuple[int, int, int]) -> int:
    """Multiply-accumulates of matrix products and convolutions in a forward pass of one image, as torch counts them.

    Counted on the meta device, because torch does not count fused attention on a CPU.
    """
    from torch.utils.flop_counter import FlopCounterMode  # imports triton

    copied = copy.deepcopy(model).to("meta").eval().requires_grad_(False)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        copied(torch.zeros(1, *shape, device="meta"))
    return counter.get_total_flops() // 2
