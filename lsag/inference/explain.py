"""What a model looks at in one image: the choice of the local attention, and the reach of the global one."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from lsag.checkpoint import Checkpoint
from lsag.data.transforms import Normalize, eval_transform
from lsag.errors import UsageError
from lsag.model.blocks import GlobalAttention
from lsag.model.network import LSAG


@dataclass(frozen=True)
class Explanation:
    """All that a picture of one image shows.

    `pixels` uint8 (size, size, C) are what the model sees. `local` (H, T, side, side) are the weights of each head and
    patch over the T `shifts`, which add up to one. `stages` has, for the last global block of each stage, the weights
    (H, side, side) of the token that `point` (x, y), in pixels, lies in; None for a stage without a global block.
    `classes` are the likeliest ones with their probabilities.
    """

    pixels: np.ndarray
    shifts: tuple[tuple[int, int], ...]
    local: Tensor
    stages: tuple[Tensor | None, ...]
    point: tuple[int, int]
    classes: tuple[tuple[str, float], ...]

    @property
    def entropy(self) -> Tensor:
        """Of the local choice in bits, the mean over the heads: (side, side), from 0 to log2 T."""
        return -(self.local * self.local.clamp(min=1e-12).log2()).sum(dim=1).mean(dim=0)


@torch.inference_mode()
def explain(checkpoint: Checkpoint, image: Image.Image, *, point: tuple[int, int] | None = None) -> Explanation:
    """Explain what the model of `checkpoint` sees in `image`, with the attention of the token at `point`.

    `point` is (x, y) in pixels of what the model sees, by default the middle. UsageError if it lies outside.
    """
    model = checkpoint.model.cpu().eval()
    if not isinstance(model, LSAG) or model.config.local != "shift":
        what = f"model.local is {model.config.local}" if isinstance(model, LSAG) else "it is timm's"
        raise UsageError(f"{checkpoint.preset.name} chooses no shifts ({what})", "explain an LSAG with local attention")
    config = model.config
    x, y = point or (config.image_size // 2, config.image_size // 2)
    if not (0 <= x < config.image_size and 0 <= y < config.image_size):
        raise UsageError(
            f"point {x},{y} is outside the {config.image_size} x {config.image_size} pixels", "choose another"
        )
    pixels = eval_transform(checkpoint.preset)(image)
    seen: dict[nn.Module, Tensor] = {}

    def remember(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        seen[module] = inputs[0]

    modules = [module for module in model.modules() if isinstance(module, GlobalAttention)]
    hooks = [module.register_forward_pre_hook(remember) for module in modules]
    images = Normalize(checkpoint.preset.data)(pixels[None])
    try:
        probabilities = model(images).softmax(dim=1)[0]
    finally:
        for hook in hooks:
            hook.remove()

    embed, first, side = model.embed, model.stages[0], config.grid_sizes[0]
    variants = first.norm1(embed(images))  # type: ignore[operator]
    weights = first.blocks[0].attn.attention_weights(variants)  # type: ignore[union-attr, index]
    local = weights[0].permute(1, 2, 0).unflatten(2, (side, side))
    stages: list[Tensor | None] = []
    for stage, side in zip(model.stages, config.grid_sizes, strict=True):
        last = stage.blocks[-1].attn  # type: ignore[union-attr, index]
        if not isinstance(last, GlobalAttention):
            stages.append(None)
            continue
        token = y * side // config.image_size * side + x * side // config.image_size
        stages.append(last.attention_weights(seen[last], token)[0].unflatten(1, (side, side)))
    best = probabilities.topk(min(3, len(checkpoint.classes)))
    names = [checkpoint.classes[index] for index in best.indices]
    classes = tuple(zip(names, best.values.tolist(), strict=True))
    return Explanation(pixels.permute(1, 2, 0).numpy(), config.shifts, local, tuple(stages), (x, y), classes)
