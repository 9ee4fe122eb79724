"""The first blocks of the paper's Table 6, in the place of the local attention: Swin's and CvT's."""

from timm.models.swin_transformer import SwinTransformerBlock
from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation

from lsag.config import SWIN_WINDOW, ModelConfig, StageConfig
from lsag.model.blocks import Block, GlobalAttention, Recomputed
from lsag.model.cpu import linear


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
