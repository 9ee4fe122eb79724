"""The LSAG network of "Locally Shifted Attention With Early Global Integration", section 3 from top to bottom.

Shapes: B images of a batch, T shift variants, N tokens (patches), D width, H heads, d = D / H width of a head,
K key/value heads (K = H for plain multi-head attention, K = 1 for multi-query), G = H / K query heads for each of them.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from timm.models._features import feature_take_indices
from timm.models.swin_transformer import SwinTransformerBlock
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import Conv2dNormActivation, StochasticDepth

from lsag.config import SWIN_WINDOW, ModelConfig, StageConfig
from lsag.onednn import Linear, attention, linear, mlp, serves

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


class ConvAttention(GlobalAttention):
    """Table 6, II: CvT's attention. A depthwise convolution and BatchNorm before each projection; M = N / 4 keys."""

    def __init__(self, stage: StageConfig, side: int) -> None:
        super().__init__(stage)
        self.side, dim = side, stage.embed_dim
        self.convs = nn.ModuleList(
            Conv2dNormActivation(dim, dim, 3, stride, groups=dim, activation_layer=None) for stride in (1, 2, 2)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        maps = x.transpose(1, 2).unflatten(2, (self.side, self.side))
        query, *keys_values = (conv(maps).flatten(2).transpose(1, 2) for conv in self.convs)
        projected = (
            linear(tokens, weight, bias).unflatten(2, (self.num_kv_heads, self.head_dim)).transpose(1, 2)
            for tokens, weight, bias in zip(keys_values, self.kv.weight.chunk(2), self.kv.bias.chunk(2), strict=True)
        )
        return self.attend(self.q(query), *projected)


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


class ConvBlock(Block):
    """Table 6, II: a first block with CvT's attention."""

    def __init__(self, config: ModelConfig, stage: StageConfig) -> None:
        super().__init__(config, stage, ConvAttention(stage, config.grid_sizes[0]))

    def forward(self, x: Tensor, norm1: nn.Module, norm2: nn.Module) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        # The attention never runs twice: BatchNorm would count its batch twice.
        return self.remember(lambda x: self.feed(x, norm2), x + self.drop_path(self.attn(norm1(x))))


class SwinBlock(Recomputed, SwinTransformerBlock):
    """Table 6, I: timm's block of Swin as the first one, with windows that are not shifted. Its norms are its own."""

    def __init__(self, config: ModelConfig, stage: StageConfig) -> None:
        self.side = config.grid_sizes[0]
        super().__init__(
            stage.embed_dim,
            (self.side, self.side),
            stage.num_heads,
            window_size=SWIN_WINDOW,
            mlp_ratio=config.mlp_ratio,
            drop_path=config.drop_path,
        )
        # Kept in files: the model that a file is read into is built without values.
        self.attn.register_buffer("relative_position_index", self.attn.relative_position_index)  # type: ignore[arg-type]

    def forward(self, x: Tensor, norm1: nn.Module, norm2: nn.Module) -> Tensor:  # type: ignore[override]
        """(B, N, D) -> (B, N, D); the stage's norms are not used."""
        return self.remember(super().forward, x.unflatten(1, (self.side, self.side))).flatten(1, 2)


class Downsample(nn.Module):
    """Section 3.2, pyramidal structure: 3 x 3 convolution to the next width, LayerNorm over channels, max-pool."""

    def __init__(self, dim_in: int, dim_out: int, side: int) -> None:
        super().__init__()
        self.side = side
        self.conv = nn.Conv2d(dim_in, dim_out, 3, padding=1)
        self.norm = nn.LayerNorm(dim_out, eps=NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, about N / 4, D')."""
        maps = self.conv(x.transpose(1, 2).unflatten(2, (self.side, self.side)))
        maps = self.norm(maps.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return F.max_pool2d(maps, 3, stride=2, padding=1).flatten(2).transpose(1, 2)


class Stage(nn.Module):
    """One level of the pyramid. The first begins with the local block; later ones with downsampling and positions.

    An ablation has another first block, which is given tokens as all the others are.
    """

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        stage = config.stages[index]
        if index:
            self.down = Downsample(config.stages[index - 1].embed_dim, stage.embed_dim, config.grid_sizes[index - 1])
            self.pos = nn.Parameter(torch.zeros(config.grid_sizes[index] ** 2, stage.embed_dim))
        self.norm1 = nn.LayerNorm(stage.embed_dim, eps=NORM_EPS)
        self.norm2 = nn.LayerNorm(stage.embed_dim, eps=NORM_EPS)
        self.blocks = nn.ModuleList(
            Block(config, stage, GlobalAttention(stage)) if index or depth else _first_block(config, stage)
            for depth in range(stage.depth)
        )

    def forward(self, x: Tensor, embed: ShiftEmbedding | None = None) -> Tensor:
        """(B, N, D) of the stage before, or for the first stage (B, C, height, width) -> (B, N', D')."""
        if embed is None:
            x = self.down(x) + self.pos
        elif not isinstance(self.blocks[0], LocalBlock):
            x = embed.tokens(x)
        for block in self.blocks:
            x = (
                block(x, embed, self.norm1, self.norm2)
                if isinstance(block, LocalBlock)
                else block(x, self.norm1, self.norm2)
            )
        return x


def _first_block(config: ModelConfig, stage: StageConfig) -> nn.Module:
    if config.local == "none":
        return Block(config, stage, GlobalAttention(stage))
    return {"shift": LocalBlock, "swin": SwinBlock, "cvt": ConvBlock}[config.local](config, stage)


class LSAG(nn.Module):
    """The image classifier: shift embedding, stages, LayerNorm, mean over tokens, linear (paper, Table 2)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.num_classes = config.num_classes
        self.num_features = config.stages[-1].embed_dim
        self.embed = ShiftEmbedding(config)
        self.stages = nn.ModuleList(Stage(config, index) for index in range(len(config.stages)))
        self.norm = nn.LayerNorm(self.num_features, eps=NORM_EPS)
        self.head = Linear(self.num_features, config.num_classes)
        self.apply(_init_weights)
        for name, parameter in self.named_parameters():
            if name.endswith("pos"):
                nn.init.trunc_normal_(parameter, std=0.02)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, image_size, image_size), normalised -> (B, num_classes) logits. ValueError for another image shape."""
        return self.forward_head(self.forward_features(images))

    def forward_features(self, images: Tensor) -> Tensor:
        """(B, C, image_size, image_size) -> (B, N, D) tokens of the last stage, after its norm."""
        expected = (self.config.in_channels, self.config.image_size, self.config.image_size)
        if images.dim() != 4 or tuple(images.shape[1:]) != expected:
            raise ValueError(
                f"expected images of shape (batch, {', '.join(map(str, expected))}), got {tuple(images.shape)}"
            )
        x = self.stages[0](images, self.embed)
        for stage in self.stages[1:]:
            x = stage(x)
        return self.norm(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The outputs of stages, as timm's models give them: (B, C, image_size, image_size) -> (B, D, side, side) each.

        `indices` are the stages, or how many of the last ones; by default all. `norm` normalises the last stage's,
        `output_fmt` "NLC" leaves tokens (B, N, D), `stop_early` runs no stage after the last wanted one. Without
        `intermediates_only` the result of `forward_features` comes first. ValueError for another `output_fmt`.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt {output_fmt!r} is neither 'NCHW' nor 'NLC'")
        wanted, last = feature_take_indices(len(self.stages), indices)
        found = []
        for index, stage in enumerate(self.stages):
            x = stage(x) if index else stage(x, self.embed)
            if index in wanted:
                tokens = self.norm(x) if norm and stage is self.stages[-1] else x
                side = self.config.grid_sizes[index]
                found.append(
                    tokens if output_fmt == "NLC" else tokens.transpose(1, 2).unflatten(2, (side, side)).contiguous()
                )
            if stop_early and index == last:
                break
        return found if intermediates_only else (self.norm(x) if stage is self.stages[-1] else x, found)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages after the last wanted one, and what they feed, as timm's models do; gives the indices."""
        wanted, last = feature_take_indices(len(self.stages), indices)
        self.stages = self.stages[: last + 1]
        if prune_norm:
            self.norm = nn.Identity()  # type: ignore[assignment]
        if prune_head:
            self.reset_classifier(0)
        return wanted

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, N, D) -> (B, num_classes) logits, or the pooled (B, D) features if `pre_logits`."""
        x = x.mean(dim=1)
        return x if pre_logits else self.head(x)

    def set_grad_checkpointing(self, enable: bool = True, *, local_only: bool = False) -> None:
        """Compute blocks once more in the backward instead of keeping what they computed; the gradients are the same.

        `local_only` does so for the first block alone, whose T variants of every patch are the largest tensor.
        """
        first = self.stages[0].blocks[0]  # type: ignore[index]
        for module in self.modules():
            if isinstance(module, Recomputed):
                module.recompute = enable and (module is first or not local_only)

    def get_classifier(self) -> nn.Module:
        """The linear layer that gives the logits, or Identity when it was removed."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Give the model a new head for `num_classes` classes; 0 removes it, so that it returns (B, D) features.

        ValueError for a `global_pool` other than "avg", the only one there is.
        """
        if global_pool not in (None, "avg"):
            raise ValueError(f"global_pool {global_pool!r} is not 'avg'")
        self.num_classes = num_classes
        old = next(self.parameters())
        self.head = Linear(self.num_features, num_classes).to(old) if num_classes else nn.Identity()  # type: ignore[assignment]
        self.head.apply(_init_weights)
        if num_classes:
            self.config = self.config.model_copy(update={"num_classes": num_classes})

    def no_weight_decay(self) -> set[str]:
        """Names of the position embeddings, which are not decayed (timm's convention); Swin's table is one."""
        positions = ("pos", "relative_position_bias_table")
        return {name for name, _ in self.named_parameters() if name.endswith(positions)}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Which parameters are one layer for a learning rate by depth (timm's convention): each block, or each stage.

        What a stage has beside its blocks goes with the first of them.
        """
        blocks = [(r"^stages\.(\d+)\.blocks\.(\d+)", None), (r"^stages\.(\d+)", (0,)), (r"^norm", (99999,))]
        return {"stem": r"^embed", "blocks": r"^stages\.(\d+)" if coarse else blocks}


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
