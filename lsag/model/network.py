"""The LSAG network of "Locally Shifted Attention With Early Global Integration", section 3 from top to bottom.

Shapes: B images of a batch, T shift variants, N tokens (patches), D width, H heads, d = D / H width of a head,
K key/value heads (K = H for plain multi-head attention, K = 1 for multi-query), G = H / K query heads for each of them.
"""

from typing import Any

import torch
import torch.nn.functional as F
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from lsag.config import ModelConfig, StageConfig
from lsag.model.ablations import ConvBlock, SwinBlock
from lsag.model.blocks import NORM_EPS, Block, GlobalAttention, LocalBlock, Recomputed, ShiftEmbedding
from lsag.model.cpu import Linear


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
