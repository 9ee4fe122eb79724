"""Sections 3.1 and 3.2 of the paper: the shift embedding, both attentions, the MLP and the blocks made of them."""

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import StochasticDepth

from lsag.config import ModelConfig, StageConfig
from lsag.model.cpu import Linear, attention, linear, mlp, serves

# The release's value; the paper names none.
NORM_EPS = 1e-6
# Of the variants that exist at a time. On a CPU 4 MiB stay in the cache: as fast as all at once where freed memory is
# kept, 1.27 times as fast where it is not; 1 MiB loses 7 %, 256 KiB a fifth. A GPU wants fewer kernels (not measured).
CHUNK_BYTES, GPU_CHUNKS = 2**22, 64


class ShiftEmbedding(nn.Module):
    """Section 3.1: T shifted copies of the image, a convolution for each, and a position for each patch and variant."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.shifts = config.shifts
        self.padding_mode = "reflect" if config.variants == "translation" else "circular"
        self.extend = config.variants != "translation" and config.shift_mode == "extend"
        self.padding = config.patch_padding
        side, stride, kernel = config.grid_sizes[0], config.patch_stride, config.patch_kernel
        self.canvas_size = (side - 1) * stride + kernel
        num_variants, dim = config.num_variants, config.stages[0].embed_dim
        # Weights of T separate convolutions, held as a grouped one would hold them.
        groups = 1 if config.variants == "translation" else num_variants
        self.conv = nn.Conv2d(groups * config.in_channels, groups * dim, kernel, stride, groups=groups)
        self.pos = nn.Parameter(torch.zeros(side * side, 1 if config.position == "shared" else num_variants, dim))
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS) if config.local == "cvt" else nn.Identity()

    def forward(self, canvas: Tensor, pos: Tensor, matrices: tuple[Tensor, Tensor]) -> Tensor:
        """Rows of the canvas (T, B, C, height, canvas), and the positions of its tokens -> (B, n, T, D).

        Positions are (n, T, D), or (n, 1, D) for all variants; `matrices` are what the method of this name gives.
        """
        (kernel, _), (stride, _) = self.conv.kernel_size, self.conv.stride
        if torch.onnx.is_in_onnx_export():
            # With patches onnxruntime has 0.97 of the img/s of cifar-tiny, 0.79 of in1k-tiny's.
            maps = [F.conv2d(*each, stride) for each in zip(canvas, *self.kernels(), strict=True)]
            x = torch.stack([each.permute(0, 2, 3, 1) for each in maps], dim=3).flatten(1, 2)
            return self.norm(x) + pos
        weight, bias = matrices
        # A product for each variant, all in one call: for in1k-tiny 4 to 5 % less time than a grouped convolution.
        patches = canvas.unfold(3, kernel, stride).unfold(4, kernel, stride).permute(0, 1, 3, 4, 5, 6, 2)
        x = torch.baddbmm(bias, patches.flatten(4).flatten(1, 3), weight)
        x = self.norm(x.unflatten(1, (canvas.shape[1], -1)).permute(1, 2, 0, 3))
        # Laid out in memory as its first term, a sum brings the variants of a token together without another copy.
        return (pos + x).contiguous()

    def kernels(self) -> tuple[Tensor, Tensor]:
        """Weights (T, D, C, kernel, kernel) and biases (T, D) of the variants, which may be T times the same."""
        variants, dim, bias = len(self.shifts), self.conv.out_channels // self.conv.groups, self.conv.bias
        assert bias is not None
        weight, bias = self.conv.weight.unflatten(0, (-1, dim)), bias.unflatten(0, (-1, dim))
        return weight.expand(variants, -1, -1, -1, -1), bias.expand(variants, -1)

    def matrices(self) -> tuple[Tensor, Tensor]:
        """The kernels as matrices (T, kernel * kernel * C, D), and their biases (T, 1, D)."""
        weight, bias = self.kernels()
        return weight.permute(0, 3, 4, 2, 1).flatten(1, 3), bias.unsqueeze(1)

    def tokens(self, images: Tensor) -> Tensor:
        """The unshifted variant alone, for a first block that looks at no other: (B, C, height, width) -> (B, N, D)."""
        return self(self.canvas(images), self.pos, self.matrices())[:, :, 0]

    def chunk_size(self, batch: int, num_bytes: int) -> tuple[int, int]:
        """How many images, and how many rows of tokens of each, have variants that take about `num_bytes` in fp32.

        Rather many images, as they share the positions of a row.
        """
        num_tokens, _, dim = self.pos.shape
        side = math.isqrt(num_tokens)
        num_rows = max(1, num_bytes // (side * len(self.shifts) * dim * 4))  # of all images together
        num_images = max(1, min(batch, num_rows))
        return num_images, min(side, num_rows // num_images)

    def bands(self, canvas: Tensor, num_rows: int) -> Iterator[Tensor]:
        """Cut the canvas into what each `num_rows` rows of tokens see."""
        (kernel, _), (stride, _) = self.conv.kernel_size, self.conv.stride
        side = (self.canvas_size - kernel) // stride + 1
        for first in range(0, side, num_rows):
            last = min(first + num_rows, side)
            yield canvas[..., first * stride : (last - 1) * stride + kernel, :]

    def canvas(self, images: Tensor) -> Tensor:
        """The shifted copies, each on the zero-padded canvas of the convolution; channels last in memory.

        Content moves px to the right and py down. What moves in is what moved out, or the content beside the edge,
        mirrored. (B, C, height, width) -> (T, B, C, canvas, canvas).
        """
        reach, before = max(abs(pixels) for shift in self.shifts for pixels in shift), self.padding
        height, width = images.shape[2:]
        wider = F.pad(images, (reach,) * 4, mode=self.padding_mode).contiguous(memory_format=torch.channels_last)
        copies = []
        for px, py in self.shifts:
            # Departure: the release ("extend") lets the image grow, so that with kernel 9 the last row and column of
            # tokens see what a rolled image would have lost.
            cut_x, cut_y = (0, 0) if self.extend else (px, py)
            moved = wider[:, :, reach - py : reach - cut_y + height, reach - px : reach - cut_x + width]
            below, beside = (self.canvas_size - before - size for size in moved.shape[2:])
            copies.append(F.pad(moved, (before, beside, before, below)))
        return torch.cat(copies).unflatten(0, (len(copies), -1))


class Attention(nn.Module):
    """The projections that local and global attention share: queries, keys and values with biases, output."""

    def __init__(self, stage: StageConfig) -> None:
        super().__init__()
        dim = stage.embed_dim
        self.num_heads, self.num_kv_heads = stage.num_heads, stage.num_kv_heads
        self.head_dim = dim // stage.num_heads
        self.q = Linear(dim, dim)
        self.kv = Linear(dim, 2 * self.num_kv_heads * self.head_dim)
        self.proj = Linear(dim, dim)


class LocalAttention(Attention):
    """Eq. 1-4: each patch asks with its unshifted variant, its T variants answer.

    The key and value matrices are absorbed into the query and the output. With one query for T keys, it is cheaper to
    bring the query into the space of the variants (q_h Wk_h) and the weighted mean out of it (u_h Wv_h) than to project
    every variant: 2 D^2 + 2 T H D multiplications a patch instead of 2 T D^2. The key bias adds the same to all T
    logits of a head and cancels in the softmax; the value bias is added once, as the weights sum to one.
    """

    def forward(self, variants: Tensor) -> Tensor:
        """(B, N, T, D) -> (B, N, D)."""
        value_weight = self.kv.weight.unflatten(0, (2, self.num_kv_heads, self.head_dim))[1]
        value_bias = self.kv.bias.unflatten(0, (2, self.num_kv_heads, 1, self.head_dim))[1]
        mean = (self.weights(variants) @ variants).unflatten(2, (self.num_kv_heads, -1))
        out = per_head(mean, value_weight.transpose(1, 2)) + value_bias
        return self.proj(out.flatten(2))

    def weights(self, variants: Tensor) -> Tensor:
        """How much each head of a patch attends to each variant: (B, N, T, D) -> (B, N, H, T)."""
        key_weight = self.kv.weight.unflatten(0, (2, self.num_kv_heads, self.head_dim))[0]
        query = self.q(variants[:, :, 0]).unflatten(2, (self.num_kv_heads, -1, self.head_dim)) * self.head_dim**-0.5
        return (per_head(query, key_weight).flatten(2, 3) @ variants.transpose(2, 3)).softmax(dim=-1)


def per_head(x: Tensor, weight: Tensor) -> Tensor:
    """(B, N, K, G, a) with a matrix for each key/value head, (K, a, b) -> (B, N, K, G, b)."""
    if len(weight) == 1:
        return linear(x, weight[0].T)
    batch, tokens, _, group, _ = x.shape
    return (x.permute(2, 0, 1, 3, 4).flatten(1, 3) @ weight).unflatten(1, (batch, tokens, group)).permute(1, 2, 0, 3, 4)


class GlobalAttention(Attention):
    """Section 3.2: multi-head self-attention over all tokens, fused."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        query, keys_values = self.q(x), self.kv(x).unflatten(2, (2, self.num_kv_heads, self.head_dim))
        return self.attend(query, *keys_values.permute(2, 0, 3, 1, 4).unbind(0))

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """(B, N, D), and (B, K, M, d) twice -> (B, N, D)."""
        kv_heads, group, tokens = self.num_kv_heads, self.num_heads // self.num_kv_heads, query.shape[1]
        # The G query heads of a key/value head are G queries a token: nothing is repeated, and for K = 1 nothing moved.
        query = query.unflatten(2, (kv_heads, group, self.head_dim)).transpose(1, 2).flatten(2, 3)
        out = attention(query, key, value)
        return self.proj(out.unflatten(2, (tokens, group)).transpose(1, 2).flatten(2))

    def weights(self, x: Tensor, token: int) -> Tensor:
        """How much each head of one token attends to each token: (B, N, D) -> (B, H, N)."""
        query = self.q(x[:, token]).unflatten(1, (self.num_kv_heads, -1, self.head_dim)) * self.head_dim**-0.5
        key = self.kv(x).unflatten(2, (2, self.num_kv_heads, self.head_dim))[:, :, 0]
        return torch.einsum("bkgd,bnkd->bkgn", query, key).flatten(1, 2).softmax(dim=-1)


class MLP(nn.Sequential):
    """Linear, GELU, linear."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__(Linear(dim, hidden), nn.GELU(), Linear(hidden, dim))

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return mlp(x, self[0], self[2])  # type: ignore[arg-type]


class Recomputed(nn.Module):
    """A module that may keep only its input for the backward."""

    recompute = False

    def remember(self, run: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """`run` of the inputs; with `recompute` only these are kept for the backward, and it runs there once more."""
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(run, *inputs, use_reentrant=False)
        return run(*inputs)


class Block(Recomputed):
    """x + Attention(norm(x)), then x + MLP(norm(x)), each branch dropped for a whole image with some probability.

    Departure: the paper does not say so, but the release and its parameter counts share one pair of norms among all
    blocks of a stage; they are passed in.
    """

    def __init__(self, config: ModelConfig, stage: StageConfig, attn: Attention) -> None:
        super().__init__()
        hidden = int(stage.embed_dim * config.mlp_ratio)
        self.attn = attn
        self.mlp = MLP(stage.embed_dim, hidden)
        self.drop_path = StochasticDepth(config.drop_path, mode="row")

    def forward(self, x: Tensor, norm1: nn.Module, norm2: nn.Module) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        return self.remember(lambda x: self.feed(x + self.drop_path(self.attn(norm1(x))), norm2), x)

    def feed(self, x: Tensor, norm2: nn.Module) -> Tensor:
        """(B, N, D) -> (B, N, D): the second half of the block."""
        return x + self.drop_path(self.mlp(norm2(x)))


class LocalBlock(Block):
    """The first block, which embeds the image itself, a chunk of tokens after another.

    The variants of all tokens, (B, N, T, D), are by far the largest tensor of the network. Without gradients only those
    of one chunk exist at a time, and in a training with `recompute`. Else a training keeps them all for the backward.
    """

    def __init__(self, config: ModelConfig, stage: StageConfig) -> None:
        super().__init__(config, stage, LocalAttention(stage))
        self.chunk_bytes: int | None = CHUNK_BYTES

    def forward(self, images: Tensor, embed: ShiftEmbedding, norm1: nn.Module, norm2: nn.Module) -> Tensor:  # type: ignore[override]
        """(B, C, height, width) -> (B, N, D)."""
        matrices = embed.matrices()  # once, not for each chunk

        def attend(kept: Tensor, canvas: Tensor, pos: Tensor) -> Tensor:
            variants = embed(canvas, pos, matrices)
            return torch.addcmul(variants[:, :, 0], kept, self.attn(norm1(variants)))

        canvas, kept = embed.canvas(images), self.drop_path(images.new_ones(images.shape[0], 1, 1))
        if self.chunk_bytes is None or torch.compiler.is_compiling():  # a graph for any batch, fused by its compiler
            x = self.remember(attend, kept, canvas, embed.pos)
        else:
            scale = 1 if images.device.type == "cpu" else GPU_CHUNKS
            num_images, num_rows = embed.chunk_size(images.shape[0], self.chunk_bytes * scale)
            # Split once, not per image: the gradient of a slice is as large as the whole.
            positions = embed.pos.split(num_rows * math.isqrt(len(embed.pos)))
            some = (
                [
                    self.remember(attend, kept, band, pos)
                    for band, pos in zip(embed.bands(canvas, num_rows), positions, strict=True)
                ]
                for canvas, kept in zip(canvas.split(num_images, dim=1), kept.split(num_images), strict=True)
            )
            x = torch.cat([torch.cat(bands, dim=1) for bands in some])
        # Through oneDNN the MLP keeps its input alone in any case.
        if serves(x, self.mlp[0].weight):  # type: ignore[arg-type]
            return self.feed(x, norm2)
        return self.remember(lambda x: self.feed(x, norm2), x)
