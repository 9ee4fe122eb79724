"""Sections 3.1 and 3.2 of the paper: the shift embedding, both attentions, the MLP and the blocks made of them.

Shapes: B images of a batch, C channels, T shift variants, N tokens (patches), D width, H heads, d = D / H width of a
head, K key/value heads (K = H for plain multi-head attention, K = 1 for multi-query), G = H / K query heads for each
of them.
"""

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lsag.config import ModelConfig, StageConfig
from lsag.model.cpu import Linear, attention, linear, mlp

# The release's value; the paper names none.
NORM_EPS = 1e-6
# Size of the variants that exist at a time. On a CPU they stay in its cache; a GPU gets larger chunks for fewer kernels
# (docs/benchmarks.md, Where the time goes, On a GPU).
CHUNK_BYTES, GPU_CHUNK_FACTOR = 2**22, 128
# A GPU's fast matrix products need rows of whole 16 bytes, in half precision as many values as this.
GPU_ALIGNMENT = 8


def on_gpu(x: Tensor) -> bool:
    """Whether `x` is where launches and memory traffic decide, not the caches of a CPU."""
    return x.device.type not in ("cpu", "meta")


class ShiftEmbedding(nn.Module):
    """Section 3.1: T shifted copies of the image, a convolution for each, and a position for each patch and variant."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.shifts = config.shifts
        self.image_shape = (config.in_channels, config.image_size, config.image_size)
        self.padding_mode = "reflect" if config.variants == "translation" else "circular"
        self.extend = config.variants != "translation" and config.shift_mode == "extend"
        self.padding = config.patch_padding
        side, stride, kernel = config.grid_sizes[0], config.patch_stride, config.patch_kernel
        self.padded_size = (side - 1) * stride + kernel
        num_variants, dim = config.num_variants, config.stages[0].embed_dim
        # The weights of T separate convolutions, stored as those of a grouped one.
        groups = 1 if config.variants == "translation" else num_variants
        self.conv = nn.Conv2d(groups * config.in_channels, groups * dim, kernel, stride, groups=groups)
        self.pos = nn.Parameter(torch.zeros(side * side, 1 if config.position == "shared" else num_variants, dim))
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS) if config.local == "cvt" else nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        """All variants of all patches: (B, C, height, width) -> (B, N, T, D)."""
        if torch.compiler.is_exporting():
            return self.embed_for_export(images)
        return self.embed_rows(self.shift(images), self.pos, self.kernel_matrices())

    def shift(self, images: Tensor) -> Tensor:
        """The shifted copies, zero-padded for the convolution to P x P pixels; channels last in memory.

        (B, C, height, width) -> (T, B, C, P, P).
        """
        copies = []
        for moved in self.moved(images):
            bottom, right = (self.padded_size - self.padding - size for size in moved.shape[2:])
            copies.append(F.pad(moved, (self.padding, right, self.padding, bottom)))
        return torch.cat(copies).unflatten(0, (len(copies), -1))

    def moved(self, images: Tensor) -> list[Tensor]:
        """The shifted copies without their padding, (B, C, height, width) each; larger ones if the image may grow.

        Content moves px to the right and py down. What moves in is what moved out or, for translations, the mirrored
        border. ValueError for images of another shape than the model's, which would be cut silently.
        """
        if tuple(images.shape[1:]) != self.image_shape:
            expected = ", ".join(map(str, self.image_shape))
            raise ValueError(
                f"expected images of shape (batch, {expected}), got {tuple(images.shape)}; resize them, or build the "
                f"model for their size (image_size, or img_size= in timm)"
            )
        reach = max(abs(pixels) for shift in self.shifts for pixels in shift)
        height, width = images.shape[2:]
        wider = _wider(images, reach, mode=self.padding_mode).contiguous(memory_format=torch.channels_last)
        copies = []
        for px, py in self.shifts:
            # Departure: the release ("extend") lets the image grow, so that with kernel 9 the last row and column of
            # tokens see what a rolled image would have lost.
            cut_x, cut_y = (0, 0) if self.extend else (px, py)
            copies.append(wider[:, :, reach - py : reach - cut_y + height, reach - px : reach - cut_x + width])
        return copies

    def embed_rows(self, shifted: Tensor, pos: Tensor, matrices: tuple[Tensor, Tensor]) -> Tensor:
        """Pixel rows of the shifted images (T, B, C, rows, P), and the positions of their n tokens -> (B, n, T, D).

        Positions are (n, T, D), or (n, 1, D) for all variants; `matrices` come from `kernel_matrices`.
        """
        (kernel, _), (stride, _) = self.conv.kernel_size, self.conv.stride
        weight, bias = matrices
        # One batched product is faster than a grouped convolution (docs/benchmarks.md, Where the time goes).
        patches = shifted.unfold(3, kernel, stride).unfold(4, kernel, stride).permute(0, 1, 3, 4, 5, 6, 2)
        patches = patches.flatten(4).flatten(1, 3)
        if on_gpu(patches):
            missing = -patches.shape[2] % GPU_ALIGNMENT
            patches, weight = F.pad(patches, (0, missing)), F.pad(weight, (0, 0, 0, missing))
        x = torch.baddbmm(bias, patches, weight)
        x = self.norm(x.unflatten(1, (shifted.shape[1], -1)).permute(1, 2, 0, 3))
        # A sum has the memory layout of its first term: this order brings the variants of a token together for free.
        return (pos + x).contiguous()

    def embed_for_export(self, images: Tensor) -> Tensor:
        """`forward` with operators that every runtime has, and has fast: (B, C, height, width) -> (B, N, T, D).

        The convolutions pad, so that no copy is made of an image; what lies beyond the last token is cut off.
        """
        side, dim, edge = math.isqrt(len(self.pos)), self.pos.shape[2], self.padded_size - self.padding
        weight, bias, maps = self.conv.weight, self.conv.bias, []
        assert bias is not None
        for index, moved in enumerate(self.moved(images)):
            own = slice(index * dim % len(weight), index * dim % len(weight) + dim)  # translations share one kernel
            embedded = F.conv2d(moved[:, :, :edge, :edge], weight[own], bias[own], self.conv.stride, self.padding)
            maps.append(embedded[:, :, :side, :side])
        variants = torch.cat(maps, dim=1).flatten(2).transpose(1, 2).unflatten(2, (len(maps), dim))
        return self.norm(variants) + self.pos

    def kernels(self) -> tuple[Tensor, Tensor]:
        """Weights (T, D, C, kernel, kernel) and biases (T, D) of all variants, which may share them."""
        num_variants, dim, bias = len(self.shifts), self.conv.out_channels // self.conv.groups, self.conv.bias
        assert bias is not None
        weight, bias = self.conv.weight.unflatten(0, (-1, dim)), bias.unflatten(0, (-1, dim))
        return weight.expand(num_variants, -1, -1, -1, -1), bias.expand(num_variants, -1)

    def kernel_matrices(self) -> tuple[Tensor, Tensor]:
        """The kernels as matrices (T, kernel * kernel * C, D), and their biases (T, 1, D)."""
        weight, bias = self.kernels()
        return weight.permute(0, 3, 4, 2, 1).flatten(1, 3), bias.unsqueeze(1)

    def chunk_size(self, batch_size: int, num_values: int) -> tuple[int, int]:
        """The number of images, and of their token rows, whose variants are about `num_values` numbers.

        More images come before more rows, as the same row of all images has the same positions.
        """
        num_tokens, _, dim = self.pos.shape
        side = math.isqrt(num_tokens)
        num_rows = max(1, num_values // (side * len(self.shifts) * dim))  # of all images together
        num_images = max(1, min(batch_size, num_rows))
        return num_images, min(side, num_rows // num_images)

    def split_rows(self, shifted: Tensor, num_rows: int) -> Iterator[Tensor]:
        """The pixel rows (T, B, C, rows, P) of the shifted images that each `num_rows` token rows see."""
        (kernel, _), (stride, _) = self.conv.kernel_size, self.conv.stride
        side = (self.padded_size - kernel) // stride + 1
        for first in range(0, side, num_rows):
            last = min(first + num_rows, side)
            yield shifted[..., first * stride : (last - 1) * stride + kernel, :]


def _wider(images: Tensor, reach: int, *, mode: str) -> Tensor:
    """Images with a border of `reach` pixels: mirrored in mode "reflect", the other side's in mode "circular"."""
    if not reach:
        return images
    if mode == "reflect":
        return F.pad(images, (reach,) * 4, mode=mode)
    # Slices, because several runtimes of graphs have no such padding.
    rows = torch.cat([images[:, :, -reach:], images, images[:, :, :reach]], dim=2)
    return torch.cat([rows[..., -reach:], rows, rows[..., :reach]], dim=3)


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
    """Eq. 1-4: the query of each patch is its unshifted variant, keys and values are its T variants.

    The key and value matrices are absorbed into the query and the output. With one query for T keys, it is cheaper to
    bring the query into the space of the variants (q_h Wk_h) and the weighted mean out of it (u_h Wv_h) than to project
    every variant: 2 D^2 + 2 T H D multiplications a patch instead of 2 T D^2. The key bias adds the same to all T
    logits of a head and cancels in the softmax; the value bias is added once, as the weights sum to one.
    """

    def forward(self, variants: Tensor, own: Tensor | None = None) -> Tensor:
        """(B, N, T, D) -> (B, N, D); `own` are the unshifted variants if not those of `variants`, (B, N, D)."""
        value_weight = self.kv.weight.unflatten(0, (2, self.num_kv_heads, self.head_dim))[1]
        value_bias = self.kv.bias.unflatten(0, (2, self.num_kv_heads, 1, self.head_dim))[1]
        mean = (self.attention_weights(variants, own) @ variants).unflatten(2, (self.num_kv_heads, -1))
        out = per_head(mean, value_weight.transpose(1, 2)) + value_bias
        return self.proj(out.flatten(2))

    def attention_weights(self, variants: Tensor, own: Tensor | None = None) -> Tensor:
        """How much each head of a patch attends to each variant, Eq. 3: (B, N, T, D) -> (B, N, H, T)."""
        key_weight = self.kv.weight.unflatten(0, (2, self.num_kv_heads, self.head_dim))[0]
        query = self.q(variants[:, :, 0] if own is None else own)
        query = query.unflatten(2, (self.num_kv_heads, -1, self.head_dim)) * self.head_dim**-0.5
        return (per_head(query, key_weight).flatten(2, 3) @ variants.transpose(2, 3)).softmax(dim=-1)


def per_head(x: Tensor, weight: Tensor) -> Tensor:
    """(B, N, K, G, a) with a matrix for each key/value head, (K, a, b) -> (B, N, K, G, b)."""
    if len(weight) == 1:
        return linear(x, weight[0].T)
    batch, num_tokens, _, group, _ = x.shape
    out = x.permute(2, 0, 1, 3, 4).flatten(1, 3) @ weight
    return out.unflatten(1, (batch, num_tokens, group)).permute(1, 2, 0, 3, 4)


class GlobalAttention(Attention):
    """Section 3.2: multi-head self-attention over all tokens, fused."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        query = self.q(x)
        key, value = (self.heads_first(part) for part in self.kv(x).chunk(2, dim=2))
        return self.attend(query, key, value)

    def heads_first(self, x: Tensor) -> Tensor:
        """(B, N, K * width) -> (B, K, N, width)."""
        if self.num_kv_heads == 1:  # a graph would transpose
            return x.unsqueeze(1)
        return x.unflatten(2, (self.num_kv_heads, -1)).transpose(1, 2)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Queries (B, N, D), keys and values (B, K, M, d) -> (B, N, D)."""
        group, num_tokens = self.num_heads // self.num_kv_heads, query.shape[1]
        # The G query heads of a key/value head become G queries per token: keys and values are never repeated.
        query = self.heads_first(query).unflatten(3, (group, self.head_dim)).flatten(2, 3)
        out = attention(query, key, value).unflatten(2, (num_tokens, group)).flatten(3)
        return self.proj(out.squeeze(1) if self.num_kv_heads == 1 else out.transpose(1, 2).flatten(2))

    def attention_weights(self, x: Tensor, tokens: slice) -> Tensor:
        """How much each head of Q of the tokens attends to each token: (B, N, D) -> (B, H, Q, N)."""
        query = self.q(x[:, tokens]).unflatten(2, (self.num_kv_heads, -1, self.head_dim)) * self.head_dim**-0.5
        key = self.kv(x).unflatten(2, (2, self.num_kv_heads, self.head_dim))[:, :, 0]
        return torch.einsum("bqkgd,bnkd->bkgqn", query, key).flatten(1, 2).softmax(dim=-1)


class MLP(nn.Sequential):
    """Linear, GELU, linear."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__(Linear(dim, hidden_dim), nn.GELU(), Linear(hidden_dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return mlp(x, self[0], self[2])  # type: ignore[arg-type]


class Recomputable(nn.Module):
    """A module that can keep only its inputs for the backward, and recompute its activations there."""

    recompute = False

    def maybe_recompute(self, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """`function(*inputs)`; with `recompute` its activations are recomputed in the backward, not kept."""
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(function, *inputs, use_reentrant=False)
        return function(*inputs)


class DropPath(nn.Module):
    """Stochastic depth (torchvision's takes seconds to import): a branch is dropped for whole images in training."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """(B, ...) -> the same shape; what is kept is scaled, so that the mean stays."""
        if not self.training or not self.rate:
            return x
        kept = x.new_empty(len(x), *[1] * (x.dim() - 1)).bernoulli_(1 - self.rate)
        return x * kept.div_(1 - self.rate)


class Block(Recomputable):
    """x + Attention(norm1(x)), then x + MLP(norm2(x)); stochastic depth drops each branch for whole images.

    Departure: the paper does not say so, but the release shares one pair of norms among all blocks of a stage; they are
    passed in.
    """

    def __init__(self, config: ModelConfig, stage: StageConfig, attn: Attention) -> None:
        super().__init__()
        self.attn = attn
        self.mlp = MLP(stage.embed_dim, int(stage.embed_dim * config.mlp_ratio))
        self.drop_path = DropPath(config.drop_path)

    def forward(self, x: Tensor, norm1: nn.Module, norm2: nn.Module) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        return self.maybe_recompute(lambda x: self.add_mlp(self.add_attention(x, norm1), norm2), x)

    def add_attention(self, x: Tensor, norm1: nn.Module) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        return x + self.drop_path(self.attn(norm1(x)))

    def add_mlp(self, x: Tensor, norm2: nn.Module) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        return x + self.drop_path(self.mlp(norm2(x)))


class LocalBlock(Block):
    """The first block: it embeds the image itself, one chunk of tokens after another.

    The variants of all tokens, (B, N, T, D), are by far the largest tensor of the network. Without gradients, and in
    training with `recompute`, only one chunk of them exists at a time; otherwise training keeps all for the backward.
    """

    def __init__(self, config: ModelConfig, stage: StageConfig) -> None:
        super().__init__(config, stage, LocalAttention(stage))
        self.chunk_bytes: int | None = CHUNK_BYTES

    def forward(self, images: Tensor, embed: ShiftEmbedding, norm1: nn.Module, norm2: nn.Module) -> Tensor:  # type: ignore[override]
        """(B, C, height, width) -> (B, N, D)."""
        if torch.compiler.is_exporting():
            variants = embed(images)
            return self.add_mlp(variants[:, :, 0] + self.attn(norm1(variants)), norm2)
        matrices, shifted = embed.kernel_matrices(), embed.shift(images)  # once, not for each chunk
        branch_scale = self.drop_path(images.new_ones(images.shape[0], 1, 1))  # stochastic depth, once for all chunks

        pos: Tensor = embed.pos
        gpu = on_gpu(images)
        apart = torch.is_grad_enabled() and (gpu or torch.is_autocast_enabled("cpu"))

        def attend(branch_scale: Tensor, shifted: Tensor, pos: Tensor) -> Tensor:
            if not apart:
                variants = embed.embed_rows(shifted, pos, matrices)
                return torch.addcmul(variants[:, :, 0], branch_scale, self.attn(norm1(variants)))
            # Embedding the unshifted ones again gives them a type of their own, and saves gradients as large as all.
            own = embed.embed_rows(shifted[:1], residual(pos[:, :1]), (matrices[0][:1], matrices[1][:1]))[:, :, 0]
            variants = norm_as_is(norm1, embed.embed_rows(shifted, in_autocast_dtype(pos), matrices))  # type: ignore[arg-type]
            return torch.addcmul(own, branch_scale.to(own.dtype), self.attn(variants, norm1(own)))

        # A compiler fuses one graph for any batch. Training that keeps everything anyway saves the trouble.
        if self.chunk_bytes is None or torch.compiler.is_compiling() or (apart and not self.recompute):
            x = self.maybe_recompute(attend, branch_scale, shifted, pos)
        else:
            num_bytes = self.chunk_bytes * (GPU_CHUNK_FACTOR if gpu else 1)
            num_images, num_rows = embed.chunk_size(images.shape[0], num_bytes // images.element_size())
            # Split once, not per image: the gradient of a slice is as large as the whole.
            positions = pos.split(num_rows * math.isqrt(len(pos)))
            parts = []
            for scale, copies in zip(branch_scale.split(num_images), shifted.split(num_images, dim=1), strict=True):
                rows = zip(embed.split_rows(copies, num_rows), positions, strict=True)
                parts.append(torch.cat([self.maybe_recompute(attend, scale, *row) for row in rows], dim=1))
            x = torch.cat(parts)
        return self.maybe_recompute(lambda x: self.add_mlp(x, norm2), x)


def residual(x: Tensor) -> Tensor:
    """`x` in the type of the sums of residuals: under autocast fp32 on a GPU, the type of products on a CPU."""
    return in_autocast_dtype(x) if x.device.type == "cpu" else x


def in_autocast_dtype(x: Tensor) -> Tensor:
    """`x` in the type that autocast gives to matrix products; unchanged outside of autocast."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


def norm_as_is(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """`norm` in the type of `x`, which autocast would make fp32; its statistics are fp32 all the same."""
    with torch.autocast(x.device.type, enabled=False):
        return F.layer_norm(x, norm.normalized_shape, norm.weight.to(x.dtype), norm.bias.to(x.dtype), norm.eps)


def init_weights(module: nn.Module) -> None:
    """Fill a linear layer or convolution: weights from a truncated normal, biases zero. The paper does not say how."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
