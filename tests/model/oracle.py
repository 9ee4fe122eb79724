"""The network once more, slowly and literally: loops over images, patches, variants and heads, after Eq. 1-4.

It shares no code with lsag.model; it reads the same parameters.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lsag.config import ModelConfig, StageConfig


def variant_tokens(image: Tensor, weights: dict[str, Tensor], config: ModelConfig) -> Tensor:
    """Section 3.1 for one image (C, H, W): tokens (N, T, D), each patch of each variant cut out by itself."""
    kernel, stride, padding, size = config.patch_kernel, config.patch_stride, config.patch_padding, config.image_size
    side = config.grid_sizes[0]
    num_variants, dim = config.num_variants, config.stages[0].embed_dim
    # A shared convolution and shared positions exist once.
    conv = (
        weights["embed.conv.weight"].view(-1, dim, config.in_channels, kernel, kernel).expand(num_variants, *[-1] * 4)
    )
    bias = weights["embed.conv.bias"].view(-1, dim).expand(num_variants, -1)
    positions = weights["embed.pos"].expand(-1, num_variants, -1)
    tokens = torch.zeros(side * side, num_variants, dim)
    for s, (px, py) in enumerate(config.shifts):
        # "extend" grows the image on its left and top edge by px and py; "roll" keeps its size.
        width, height = (size + px, size + py) if config.shift_mode == "extend" else (size, size)
        for row in range(side):
            for column in range(side):
                patch = torch.zeros(config.in_channels, kernel, kernel)
                for i in range(kernel):
                    for j in range(kernel):
                        y, x = row * stride - padding + i, column * stride - padding + j
                        if 0 <= y < height and 0 <= x < width:  # outside lies the convolution's zero padding
                            inside = reflected if config.variants == "translation" else int.__mod__
                            patch[:, i, j] = image[:, inside(y - py, size), inside(x - px, size)]
                n = row * side + column
                tokens[n, s] = (conv[s] * patch).sum(dim=(1, 2, 3)) + bias[s] + positions[n, s]
    return tokens


def reflected(index: int, size: int) -> int:
    """The mirror image of an index outside of 0..size - 1."""
    return -index if index < 0 else min(index, 2 * (size - 1) - index)


def local_attention(z: Tensor, weights: dict[str, Tensor], prefix: str, stage: StageConfig) -> Tensor:
    """Eq. 1-4 for one image: (N, T, D) -> (N, D)."""
    head_dim = stage.embed_dim // stage.num_heads
    group = stage.num_heads // stage.num_kv_heads
    out = torch.zeros(z.shape[0], stage.embed_dim)
    for i in range(z.shape[0]):
        query = F.linear(z[i, 0], weights[f"{prefix}.q.weight"], weights[f"{prefix}.q.bias"])
        key, value = F.linear(z[i], weights[f"{prefix}.kv.weight"], weights[f"{prefix}.kv.bias"]).chunk(2, dim=1)
        for h in range(stage.num_heads):
            q = query[h * head_dim : (h + 1) * head_dim]
            shared = slice(h // group * head_dim, (h // group + 1) * head_dim)
            w = torch.softmax(key[:, shared] @ q / math.sqrt(head_dim), dim=0)
            out[i, h * head_dim : (h + 1) * head_dim] = w @ value[:, shared]
    return F.linear(out, weights[f"{prefix}.proj.weight"], weights[f"{prefix}.proj.bias"])


def global_attention(x: Tensor, weights: dict[str, Tensor], prefix: str, stage: StageConfig) -> Tensor:
    """Multi-head self-attention over the tokens of one image: (N, D) -> (N, D)."""
    head_dim = stage.embed_dim // stage.num_heads
    group = stage.num_heads // stage.num_kv_heads
    query = F.linear(x, weights[f"{prefix}.q.weight"], weights[f"{prefix}.q.bias"])
    key, value = F.linear(x, weights[f"{prefix}.kv.weight"], weights[f"{prefix}.kv.bias"]).chunk(2, dim=1)
    heads = []
    for h in range(stage.num_heads):
        shared = slice(h // group * head_dim, (h // group + 1) * head_dim)
        scores = query[:, h * head_dim : (h + 1) * head_dim] @ key[:, shared].T / math.sqrt(head_dim)
        heads.append(torch.softmax(scores, dim=1) @ value[:, shared])
    return F.linear(torch.cat(heads, dim=1), weights[f"{prefix}.proj.weight"], weights[f"{prefix}.proj.bias"])


def logits(batch: Tensor, weights: dict[str, Tensor], config: ModelConfig) -> Tensor:
    """(B, C, H, W) -> (B, num_classes), one image at a time."""
    return torch.stack([_image_logits(image, weights, config) for image in batch])


def _image_logits(image: Tensor, weights: dict[str, Tensor], config: ModelConfig) -> Tensor:
    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-6)

    def mlp(x: Tensor, prefix: str) -> Tensor:
        hidden = F.gelu(F.linear(x, weights[f"{prefix}.mlp.0.weight"], weights[f"{prefix}.mlp.0.bias"]))
        return F.linear(hidden, weights[f"{prefix}.mlp.2.weight"], weights[f"{prefix}.mlp.2.bias"])

    z = variant_tokens(image, weights, config)
    x = z[:, 0]
    for index, stage in enumerate(config.stages):
        name = f"stages.{index}"
        if index:
            side = config.grid_sizes[index - 1]
            maps = x.T.reshape(1, -1, side, side)
            maps = F.conv2d(maps, weights[f"{name}.down.conv.weight"], weights[f"{name}.down.conv.bias"], padding=1)
            maps = norm(maps.permute(0, 2, 3, 1), f"{name}.down.norm").permute(0, 3, 1, 2)
            x = F.max_pool2d(maps, 3, 2, 1).flatten(2)[0].T + weights[f"{name}.pos"]
        for depth in range(stage.depth):
            block = f"{name}.blocks.{depth}"
            if index == 0 and depth == 0 and config.local == "shift":
                x = x + local_attention(norm(z, f"{name}.norm1"), weights, f"{block}.attn", stage)
            else:
                x = x + global_attention(norm(x, f"{name}.norm1"), weights, f"{block}.attn", stage)
            x = x + mlp(norm(x, f"{name}.norm2"), block)
    return F.linear(norm(x, "norm").mean(dim=0), weights["head.weight"], weights["head.bias"])
