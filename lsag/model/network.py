"""The LSAG network of "Locally Shifted Attention With Early Global Integration", section 3 from top to bottom.

Its parts, and the legend of the shapes, are in `lsag.model.blocks`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lsag.config import ModelConfig, StageConfig
from lsag.model.ablations import ConvBlock
from lsag.model.blocks import NORM_EPS, Block, GlobalAttention, LocalBlock, ShiftEmbedding, init_weights, residual
from lsag.model.cpu import Linear
from lsag.model.timm_methods import TimmMethods


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
        maps = self.norm(maps.permute(0, 2, 3, 1))
        if torch.compiler.is_exporting():
            return _max_pool(_max_pool(maps, 1), 2).flatten(1, 2)
        return F.max_pool2d(maps.permute(0, 3, 1, 2), 3, stride=2, padding=1).flatten(2).transpose(1, 2)


def _max_pool(x: Tensor, dim: int) -> Tensor:
    """`max_pool` along one dimension (window 3, stride 2, padding 1), as maxima of slices.

    onnxruntime has no CUDA kernel for MaxPool since opset 22 (docs/inference.md).
    """
    even = x[(slice(None),) * dim + (slice(0, None, 2),)]
    odd = x[(slice(None),) * dim + (slice(1, None, 2),)]
    length = even.shape[dim]
    before = torch.cat([even.narrow(dim, 0, 1), odd.narrow(dim, 0, length - 1)], dim)
    after = odd if odd.shape[dim] == length else torch.cat([odd, even.narrow(dim, length - 1, 1)], dim)
    return torch.maximum(torch.maximum(even, after), before)


class Stage(nn.Module):
    """One level of the pyramid. The first begins with the local block, later ones with downsampling and positions.

    An ablation has another first block, which takes tokens like all others.
    """

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        stage = config.stages[index]
        if index:
            self.down = Downsample(config.stages[index - 1].embed_dim, stage.embed_dim, config.grid_sizes[index - 1])
            self.pos = nn.Parameter(torch.zeros(config.grid_sizes[index] ** 2, stage.embed_dim))
        self.norm1 = nn.LayerNorm(stage.embed_dim, eps=NORM_EPS)
        self.norm2 = nn.LayerNorm(stage.embed_dim, eps=NORM_EPS)
        below = sum(stage.depth for stage in config.stages[:index])
        rates = [config.drop_path_at(below + depth) for depth in range(stage.depth)]
        configs = [config.model_copy(update={"drop_path": rate}) for rate in rates]
        self.blocks = nn.ModuleList(
            Block(own, stage, GlobalAttention(stage)) if index or depth else _first_block(own, stage)
            for depth, own in enumerate(configs)
        )

    def forward(self, x: Tensor, embed: ShiftEmbedding | None = None) -> Tensor:
        """Tokens (B, N, D) of the stage before, or for the first stage images (B, C, height, width) -> (B, N', D')."""
        if embed is None:
            x = residual(self.down(x)) + residual(self.pos)
        elif not isinstance(self.blocks[0], LocalBlock):
            x = embed(x)[:, :, 0]  # the unshifted variant
        for block in self.blocks:
            inputs = (x, embed) if isinstance(block, LocalBlock) else (x,)
            x = block(*inputs, self.norm1, self.norm2)
        return x


def _first_block(config: ModelConfig, stage: StageConfig) -> nn.Module:
    match config.local:
        case "shift":
            return LocalBlock(config, stage)
        case "none":
            return Block(config, stage, GlobalAttention(stage))
        case "cvt":
            return ConvBlock(config, stage)
        case "swin":
            from lsag.model.swin import SwinBlock  # imports timm

            return SwinBlock(config, stage)


class LSAG(TimmMethods):
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
        self.apply(init_weights)
        for name, parameter in self.named_parameters():
            if name.endswith("pos"):
                nn.init.trunc_normal_(parameter, std=0.02)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised (B, C, image_size, image_size) -> (B, num_classes) logits. ValueError for another image shape."""
        return self.forward_head(self.forward_features(images))

    def forward_features(self, images: Tensor) -> Tensor:
        """(B, C, image_size, image_size) -> (B, N, D) tokens of the last stage, after its norm."""
        x = self.stages[0](images, self.embed)
        for stage in self.stages[1:]:
            x = stage(x)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, N, D) -> (B, num_classes) logits, or with `pre_logits` the pooled features (B, D)."""
        x = x.mean(dim=1)
        return x if pre_logits else self.head(x)
