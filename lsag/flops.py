"""Parameters and multiply-accumulates (MACs) per stage, in closed form: no torch, no model is built.

Counted as the paper counts: matrix products and convolutions, per image; norms, activations, softmax and biases not.
"""

from dataclasses import dataclass

from lsag.config import ModelConfig


@dataclass(frozen=True)
class Count:
    """`macs` is the plain formulation, with keys and values of all variants; `macs_run` is what lsag executes.

    FLOPs are two for each MAC.
    """

    name: str
    params: int
    macs: int
    macs_run: int

    @property
    def flops(self) -> int:
        """Floating-point operations of the plain formulation: a multiplication and an addition for each MAC."""
        return 2 * self.macs


def count_stages(config: ModelConfig) -> list[Count]:
    """The embedding, each stage with the downsampling before it, and the head."""
    variants, first = config.num_variants, config.stages[0].embed_dim
    tokens = [side**2 for side in config.grid_sizes]
    patch = config.in_channels * config.patch_kernel**2
    embed_macs = variants * tokens[0] * patch * first
    counts = [Count("embedding", variants * (patch + 1 + tokens[0]) * first, embed_macs, embed_macs)]
    for index, stage in enumerate(config.stages):
        dim, n = stage.embed_dim, tokens[index]
        kv_dim = 2 * stage.num_kv_heads * dim // stage.num_heads
        hidden = int(dim * config.mlp_ratio)
        block_params = 2 * (dim + 1) * dim + (dim + 1) * kv_dim + (dim + 1) * hidden + (hidden + 1) * dim
        mlp_macs = 2 * n * dim * hidden
        global_macs = n * (2 * dim * dim + dim * kv_dim) + 2 * n * n * dim + mlp_macs
        params, macs = stage.depth * block_params + 4 * dim, stage.depth * global_macs
        macs_run = macs
        if index == 0:
            local = n * (2 * dim * dim + variants * dim * kv_dim) + 2 * variants * n * dim + mlp_macs
            absorbed = n * 4 * dim * dim + 2 * variants * stage.num_heads * n * dim + mlp_macs
            macs, macs_run = macs + local - global_macs, macs_run + absorbed - global_macs
        else:
            before = config.stages[index - 1].embed_dim
            down_macs = tokens[index - 1] * 9 * before * dim
            params += (9 * before + 1) * dim + 2 * dim + n * dim
            macs, macs_run = macs + down_macs, macs_run + down_macs
        counts.append(Count(f"stage {index + 1}", params, macs, macs_run))
    last = config.stages[-1].embed_dim
    head_macs = last * config.num_classes
    counts.append(Count("head", 2 * last + (last + 1) * config.num_classes, head_macs, head_macs))
    return counts


def count(config: ModelConfig) -> Count:
    """The whole model."""
    stages = count_stages(config)
    return Count("total", *(sum(getattr(stage, key) for stage in stages) for key in ("params", "macs", "macs_run")))
