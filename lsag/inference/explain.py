"""What a model looks at in one image: the shifts its local attention chooses, and where its global attention looks."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from lsag.device import tf32
from lsag.errors import UsageError
from lsag.inference.classifier import Classifier
from lsag.model.blocks import GlobalAttention
from lsag.model.network import LSAG


@dataclass(frozen=True)
class Explanation:
    """The explanation of one image.

    `pixels`, uint8 (size, size, C), are the input of the model. `local` (H, T, side, side) are the weights of each head
    and patch over the T `shifts`; they sum to one. `stages` has, for the last global block of each stage, the attention
    weights (H, side, side) of the token that contains `point` (x, y), in pixels; None for a stage without a global
    block. `classes` are the likeliest classes with their probabilities.
    """

    pixels: np.ndarray
    shifts: tuple[tuple[int, int], ...]
    local: Tensor
    stages: tuple[Tensor | None, ...]
    point: tuple[int, int]
    classes: tuple[tuple[str, float], ...]

    @property
    def entropy(self) -> Tensor:
        """The entropy of `local` in bits, averaged over the heads: (side, side), from 0 to log2 T."""
        return -(self.local * self.local.clamp(min=1e-12).log2()).sum(dim=1).mean(dim=0)


@torch.inference_mode()
def explain(classifier: Classifier, image: Image.Image, *, point: tuple[int, int] | None = None) -> Explanation:
    """Explain what `classifier` sees in `image`, with the attention of the token at `point`.

    `point` is (x, y) in pixels of the model's input, by default its centre. UsageError for a point outside, or a model
    without local attention over shifts.
    """
    model, preset = classifier.model, classifier.preset
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
    with tf32(classifier.precision == "tf32"):
        images = classifier.normalize(pixels[None].to(classifier.device)).to(classifier.dtype)
        embed, first, side = model.embed, model.stages[0], config.grid_sizes[0]
        variants = first.norm1(embed(images))  # type: ignore[operator]
        weights = first.blocks[0].attn.attention_weights(variants)  # type: ignore[union-attr, index]
        local = weights[0].permute(1, 2, 0).unflatten(2, (side, side)).float().cpu()
        for stage, side in zip(model.stages, config.grid_sizes, strict=True):
            last = stage.blocks[-1].attn  # type: ignore[union-attr, index]
            if not isinstance(last, GlobalAttention):
                stages.append(None)
                continue
            token = y * side // config.image_size * side + x * side // config.image_size
            stages.append(last.attention_weights(inputs[last], token)[0].unflatten(1, (side, side)).float().cpu())
    best = probabilities.topk(min(3, len(classifier.classes)))
    names = [classifier.classes[index] for index in best.indices]
    classes = tuple(zip(names, best.values.tolist(), strict=True))
    return Explanation(pixels.permute(1, 2, 0).numpy(), config.shifts, local, tuple(stages), (x, y), classes)
