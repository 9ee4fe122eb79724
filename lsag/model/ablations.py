"""First blocks of the paper's Table 6 that replace the local one: CvT's here, Swin's in `lsag.model.swin`."""

from torch import Tensor, nn

from lsag.config import ModelConfig, StageConfig
from lsag.model.blocks import Block, GlobalAttention
from lsag.model.cpu import linear


class ConvAttention(GlobalAttention):
    """Table 6, II: CvT's attention. A depthwise convolution and BatchNorm before each projection; M = N / 4 keys."""

    def __init__(self, stage: StageConfig, side: int) -> None:
        from torchvision.ops import Conv2dNormActivation  # takes seconds to import

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
        # The attention is never recomputed: its BatchNorm would count each batch twice.
        return self.maybe_recompute(lambda x: self.add_mlp(x, norm2), self.add_attention(x, norm1))
