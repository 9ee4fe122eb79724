"""What a model looks at in one image: the shifts its local attention chooses, and where its global attention looks."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from lsag.device import tf32
from lsag.errors import UsageError
from lsag.inference.classifier import Classifier
from lsag.model.blocks import GlobalAttention
from lsag.model.network import LSAG

if TYPE_CHECKING:
    from lsag.inference.session import Session

MAX_LOOKS = 3_200_000
"""Numbers in `Explanation.looks`, so that a page with one byte for each stays under 5 MB."""


@dataclass(frozen=True)
class Explanation:
    """The explanation of one image.

    `pixels`, uint8 (size, size, C), are the input of the model. `local` (H, T, side, side) are the weights of each head
    and patch over the T `shifts`; they sum to one. `stages` has, for the last global block of each stage, the attention
    weights (H, side, side) of the token that contains `point` (x, y), in pixels; None for a stage without a global
    block. `looks` (N, s, s) has those of each of its N tokens, averaged over the heads and in multiples of uniform
    attention; s is `side`, or less where each number is the mean of a square of tokens, to limit the memory. `classes`
    are the likeliest classes with their probabilities.
    """

    pixels: np.ndarray
    shifts: tuple[tuple[int, int], ...]
    local: Tensor
    stages: tuple[Tensor | None, ...]
    looks: tuple[Tensor | None, ...]
    point: tuple[int, int]
    classes: tuple[tuple[str, float], ...]

    @property
    def entropy(self) -> Tensor:
        """The entropy of `local` in bits, averaged over the heads: (side, side), from 0 to log2 T."""
        return -(self.local * self.local.clamp(min=1e-12).log2()).sum(dim=1).mean(dim=0)


@torch.inference_mode()
def explain(
    classifier: "Classifier | Session", image: Image.Image, *, point: tuple[int, int] | None = None
) -> Explanation:
    """Explain what `classifier` sees in `image`, with the attention of the token at `point`.

    `point` is (x, y) in pixels of the model's input, by default its centre. UsageError for a point outside, or a model
    without local attention over shifts.
    """
    preset = classifier.preset
    if not isinstance(classifier, Classifier):
        raise UsageError(
            f"{preset.name} is an exported graph, which shows no attention",
            "explain the checkpoint it was exported from",
        )
    model = classifier.model
    if not isinstance(model, LSAG) or model.config.local != "shift":
        what = f"model.local is {model.config.local}" if isinstance(model, LSAG) else "it is a timm model"
        raise UsageError(f"{preset.name} chooses no shifts ({what})", "explain an LSAG with local attention")
    config = model.config
    x, y = point or (config.image_size // 2, config.image_size // 2)
    if not (0 <= x < config.image_size and 0 <= y < config.image_size):
        raise UsageError(
            f"point {x},{y} is outside the {config.image_size} x {config.image_size} pixels", "choose another"
        )
    pixels = classifier.transform(image)
    inputs: dict[nn.Module, Tensor] = {}

    def record_input(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        inputs[module] = arguments[0]

    modules = [module for module in model.modules() if isinstance(module, GlobalAttention)]
    hooks = [module.register_forward_pre_hook(record_input) for module in modules]
    try:
        probabilities = classifier(pixels[None]).softmax(dim=1)[0]
    finally:
        for hook in hooks:
            hook.remove()

    stages: list[Tensor | None] = []
    looks: list[Tensor | None] = []
    lasts = [stage.blocks[-1].attn for stage in model.stages]  # type: ignore[union-attr, index]
    sides = [side if last in inputs else 0 for last, side in zip(lasts, config.grid_sizes, strict=True)]
    with tf32(classifier.precision == "tf32"):
        images = classifier.normalize(pixels[None].to(classifier.device)).to(classifier.dtype)
        embed, first, side = model.embed, model.stages[0], config.grid_sizes[0]
        variants = first.norm1(embed(images))  # type: ignore[operator]
        weights = first.blocks[0].attn.attention_weights(variants)  # type: ignore[union-attr, index]
        local = weights[0].permute(1, 2, 0).unflatten(2, (side, side)).float().cpu()
        for last, side, block in zip(lasts, sides, _blocks(sides), strict=True):
            if not isinstance(last, GlobalAttention):
                stages.append(None)
                looks.append(None)
                continue
            token = y * side // config.image_size * side + x * side // config.image_size
            weights = last.attention_weights(inputs[last], slice(token, token + 1))[0, :, 0]
            stages.append(weights.unflatten(1, (side, side)).float().cpu())
            step = max(1, MAX_LOOKS // side**2)  # tokens at a time
            parts = []
            for start in range(0, side**2, step):
                weights = last.attention_weights(inputs[last], slice(start, start + step))[0].float().mean(dim=0)
                parts.append(F.avg_pool2d(weights.unflatten(1, (side, side)), block, ceil_mode=True).cpu() * side**2)
            looks.append(torch.cat(parts))
    best = probabilities.topk(min(3, len(classifier.classes)))
    names = [classifier.classes[index] for index in best.indices]
    classes = tuple(zip(names, best.values.tolist(), strict=True))
    return Explanation(
        pixels.permute(1, 2, 0).numpy(), config.shifts, local, tuple(stages), tuple(looks), (x, y), classes
    )


def _blocks(sides: Sequence[int]) -> list[int]:
    """The side of the squares of tokens whose attention is averaged in each stage, so that MAX_LOOKS is kept."""
    blocks = [1] * len(sides)

    def numbers(stage: int) -> int:
        return sides[stage] ** 2 * math.ceil(sides[stage] / blocks[stage]) ** 2

    while sum(map(numbers, range(len(sides)))) > MAX_LOOKS:
        blocks[max(range(len(sides)), key=numbers)] += 1
    return blocks
