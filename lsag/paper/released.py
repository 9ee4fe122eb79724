"""The network as the authors released it: what benchmarks and tests compare with, never part of the product's path.

Each variant has a convolution of its own, keys and values are projected for all T variants, and both attentions write
out their weights.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lsag.model.blocks import MLP, Attention, GlobalAttention, LocalAttention, LocalBlock, ShiftEmbedding
from lsag.model.cpu import Linear
from lsag.model.network import LSAG


class _ReleasedEmbedding(ShiftEmbedding):
    def embed_rows(self, shifted: Tensor, pos: Tensor, matrices: object) -> Tensor:
        """Pixel rows of the shifted images (T, B, C, rows, P), and the positions of their n tokens -> (B, n, T, D)."""
        variants = [
            F.conv2d(images.contiguous(), weight, bias, self.conv.stride).flatten(2).transpose(1, 2)
            for images, weight, bias in zip(shifted, *self.kernels(), strict=True)
        ]
        return self.norm(torch.stack(variants, dim=2)) + pos


def _attend(attention: Attention, x: Tensor, keys_from: Tensor) -> Tensor:
    """Queries from x (..., Q, D), keys and values from (..., S, D) -> (..., Q, D)."""
    kv_heads, head_dim = attention.num_kv_heads, attention.head_dim
    group = attention.num_heads // kv_heads
    # The G query heads of a key/value head are placed one after another.
    query = attention.q(x).unflatten(-1, (kv_heads, group, head_dim)).movedim(-4, -2).flatten(-3, -2)
    key, value = attention.kv(keys_from).unflatten(-1, (2, kv_heads, head_dim)).transpose(-4, -2).unbind(-3)
    weights = (query @ key.transpose(-1, -2) * head_dim**-0.5).softmax(dim=-1)
    out = (weights @ value).unflatten(-2, (group, x.shape[-2])).movedim(-2, -4)
    return attention.proj(out.flatten(-3))


class _ReleasedLocal(LocalAttention):
    def forward(self, variants: Tensor, own: object = None) -> Tensor:
        """(B, N, T, D) -> (B, N, D)."""
        return _attend(self, variants[:, :, :1], variants).squeeze(2)


class _ReleasedGlobal(GlobalAttention):
    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        return _attend(self, x, x)


class _ReleasedBlock(LocalBlock):
    def forward(self, images: Tensor, embed: ShiftEmbedding, norm1: nn.Module, norm2: nn.Module) -> Tensor:  # type: ignore[override]
        """(B, C, height, width) -> (B, N, D)."""
        variants = embed(images)
        return self.add_mlp(variants[:, :, 0] + self.drop_path(self.attn(norm1(variants))), norm2)


RELEASED: dict[type[nn.Module], type[nn.Module]] = {
    Linear: nn.Linear,
    MLP: nn.Sequential,
    ShiftEmbedding: _ReleasedEmbedding,
    LocalAttention: _ReleasedLocal,
    LocalBlock: _ReleasedBlock,
    GlobalAttention: _ReleasedGlobal,
}


def as_released(model: LSAG) -> LSAG:
    """A copy of `model` that computes the same in the released way; blocks of Swin and CvT stay as they are."""
    copied = copy.deepcopy(model)
    for module in copied.modules():
        module.__class__ = RELEASED.get(type(module), type(module))
    return copied
