"""Table 6, I: timm's Swin block in the place of the local one. Apart from the other ablations, as it imports timm."""

from timm.models.swin_transformer import SwinTransformerBlock
from torch import Tensor, nn

from lsag.config import SWIN_WINDOW, ModelConfig, StageConfig
from lsag.model.blocks import Recomputable


class SwinBlock(Recomputable, SwinTransformerBlock):
    """A first block that attends within windows, which are not shifted; it has norms of its own."""

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
        # Saved in files too: a model that is loaded from one is built without values.
        self.attn.register_buffer("relative_position_index", self.attn.relative_position_index)  # type: ignore[arg-type]

    def forward(self, x: Tensor, norm1: nn.Module, norm2: nn.Module) -> Tensor:  # type: ignore[override]
        """(B, N, D) -> (B, N, D); the stage's norms are not used."""
        return self.maybe_recompute(super().forward, x.unflatten(1, (self.side, self.side))).flatten(1, 2)
