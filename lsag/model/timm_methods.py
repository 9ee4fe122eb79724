"""The methods by which timm's scripts and libraries on top of it use a model; not needed to read the network."""

from typing import Any

from torch import Tensor, nn

from lsag.config import ModelConfig
from lsag.model.blocks import Recomputable, ShiftEmbedding, init_weights
from lsag.model.cpu import Linear


class TimmMethods(nn.Module):
    """What `LSAG` has of timm's conventions: features of stages, another head, groups of parameters."""

    config: ModelConfig
    embed: ShiftEmbedding
    stages: nn.ModuleList
    norm: nn.Module
    head: nn.Module
    num_classes: int
    num_features: int

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The outputs of stages, (B, C, image_size, image_size) -> (B, D, side, side) each.

        `indices` selects stages, a number the last ones; by default all. `norm` normalises the output of the last
        stage, `output_fmt` "NLC" gives tokens (B, N, D), `stop_early` skips the stages after the last selected one.
        Without `intermediates_only` the result of `forward_features` comes first. ValueError for another `output_fmt`.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt {output_fmt!r} is neither 'NCHW' nor 'NLC'")
        selected, last = self._select(indices)
        outputs = []
        for index, stage in enumerate(self.stages):
            x = stage(x) if index else stage(x, self.embed)
            if index in selected:
                output = self.norm(x) if norm and stage is self.stages[-1] else x
                if output_fmt == "NCHW":
                    side = self.config.grid_sizes[index]
                    output = output.transpose(1, 2).unflatten(2, (side, side)).contiguous()
                outputs.append(output)
            if stop_early and index == last:
                break
        return outputs if intermediates_only else (self.norm(x) if stage is self.stages[-1] else x, outputs)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the stages after the last selected one, and norm and head as asked; gives the selected indices."""
        selected, last = self._select(indices)
        self.stages = self.stages[: last + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0)
        return selected

    def _select(self, indices: int | list[int] | None) -> tuple[list[int], int]:
        """The selected stages, and the last of them."""
        from timm.models._features import feature_take_indices

        return feature_take_indices(len(self.stages), indices)

    def set_grad_checkpointing(self, enable: bool = True, *, local_only: bool = False) -> None:
        """Recompute the activations of blocks in the backward instead of keeping them; the gradients are the same.

        `local_only` does so for the first block only, whose T variants of every patch are the largest tensor.
        """
        first = self.stages[0].blocks[0]  # type: ignore[index]
        for module in self.modules():
            if isinstance(module, Recomputable):
                module.recompute = enable and (module is first or not local_only)

    def get_classifier(self) -> nn.Module:
        """The linear layer that computes the logits, or Identity when it was removed."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a new one for `num_classes` classes; 0 removes it, so that the model gives (B, D).

        ValueError for a `global_pool` other than "avg", the only one there is.
        """
        if global_pool not in (None, "avg"):
            raise ValueError(f"global_pool {global_pool!r} is not 'avg'")
        self.num_classes = num_classes
        old = next(self.parameters())
        self.head = Linear(self.num_features, num_classes).to(old) if num_classes else nn.Identity()
        self.head.apply(init_weights)
        if num_classes:
            self.config = self.config.model_copy(update={"num_classes": num_classes})

    def no_weight_decay(self) -> set[str]:
        """Names of the position embeddings, Swin's table of relative ones included: they are not decayed."""
        positions = ("pos", "relative_position_bias_table")
        return {name for name, _ in self.named_parameters() if name.endswith(positions)}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns of the parameters that form a layer, for a learning rate by depth: each block, or each stage.

        What a stage has beside its blocks belongs to the first of them.
        """
        blocks = [(r"^stages\.(\d+)\.blocks\.(\d+)", None), (r"^stages\.(\d+)", (0,)), (r"^norm", (99999,))]
        return {"stem": r"^embed", "blocks": r"^stages\.(\d+)" if coarse else blocks}
