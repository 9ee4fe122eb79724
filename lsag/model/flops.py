"""Parameters and multiply-accumulates (MACs) per stage in closed form, without torch and without building a model.

As in the paper, only matrix products and convolutions count, per image; norms, activations, softmax and biases do not.
"""

import math
from dataclasses import dataclass

from lsag.config import SWIN_WINDOW, ModelConfig, StageConfig


@dataclass(frozen=True)
class Count:
    """`macs` is for the plain formulation, with keys and values of all variants; `macs_run` is what lsag executes."""

    name: str
    params: int
    macs: int
    macs_run: int

    @property
    def flops(self) -> int:
        """Floating-point operations of the plain formulation: a multiplication and an addition per MAC."""
        return 2 * self.macs


def count_stages(config: ModelConfig) -> list[Count]:
    """The embedding, each stage with the downsampling before it, and the head."""
    tokens = [side**2 for side in config.grid_sizes]
    counts = [_embedding(config)]
    for index, stage in enumerate(config.stages):
        dim, n = stage.embed_dim, tokens[index]
        block = _global_block(config, stage, n)
        first = block if index else _first_block(config)
        params, macs, macs_run = (one + (stage.depth - 1) * other for one, other in zip(first, block, strict=True))
        params += 4 * dim
        if index:
            before = config.stages[index - 1].embed_dim
            down_macs = tokens[index - 1] * 9 * before * dim
            params += (9 * before + 1) * dim + 2 * dim + n * dim
            macs, macs_run = macs + down_macs, macs_run + down_macs
        counts.append(Count(f"stage {index + 1}", params, macs, macs_run))
    last = config.stages[-1].embed_dim
    head_macs = last * config.num_classes
    counts.append(Count("head", 2 * last + (last + 1) * config.num_classes, head_macs, head_macs))
    return counts


def _embedding(config: ModelConfig) -> Count:
    variants, dim, n = config.num_variants, config.stages[0].embed_dim, config.grid_sizes[0] ** 2
    patch = config.in_channels * config.patch_kernel**2
    convolutions = 1 if config.variants == "translation" else variants
    positions = 1 if config.position == "shared" else variants
    norm = 2 if config.local == "cvt" else 0
    macs = variants * n * patch * dim
    return Count("embedding", (convolutions * (patch + 1) + positions * n + norm) * dim, macs, macs)


def _kv_dim(stage: StageConfig) -> int:
    """Width of a token's keys and values together."""
    return 2 * stage.num_kv_heads * stage.embed_dim // stage.num_heads


def _global_block(config: ModelConfig, stage: StageConfig, n: int) -> tuple[int, int, int]:
    """Parameters, MACs and executed MACs of a block over `n` tokens; its norms are counted with the stage."""
    dim, kv_dim, hidden = stage.embed_dim, _kv_dim(stage), int(stage.embed_dim * config.mlp_ratio)
    params = (dim + 1) * (2 * dim + kv_dim) + (dim + 1) * hidden + (hidden + 1) * dim
    macs = n * dim * (2 * dim + kv_dim) + 2 * n * n * dim + 2 * n * dim * hidden
    return params, macs, macs


def _first_block(config: ModelConfig) -> tuple[int, int, int]:
    """The same for the first block: the local one, or what an ablation replaces it with."""
    stage, variants, side = config.stages[0], config.num_variants, config.grid_sizes[0]
    dim, kv_dim, n = stage.embed_dim, _kv_dim(stage), side**2
    params, macs, _ = _global_block(config, stage, n)
    mlp = 2 * n * dim * int(dim * config.mlp_ratio)
    if config.local == "shift":
        macs = n * dim * (2 * dim + variants * kv_dim) + 2 * variants * n * dim + mlp
        absorbed = n * 4 * dim * dim + 2 * variants * stage.num_heads * n * dim + mlp
        return params, macs, absorbed
    if config.local == "swin":
        # As many keys as queries in each window, of a grid that is padded to whole windows; two norms; a bias per head
        # and distance within a window.
        window = min(side, SWIN_WINDOW)
        padded = (math.ceil(side / window) * window) ** 2
        params += 2 * (dim + 1) * dim - (dim + 1) * kv_dim + 4 * dim + (2 * window - 1) ** 2 * stage.num_heads
        macs = padded * (4 * dim * dim + 2 * window**2 * dim) + mlp
    if config.local == "cvt":
        # Depthwise 3 x 3 convolutions with BatchNorm for queries, keys and values, the latter two with stride 2.
        keys = math.ceil(side / 2) ** 2
        params += 3 * (9 + 2) * dim
        macs = 9 * (n + 2 * keys) * dim + dim * (2 * n * dim + keys * kv_dim) + 2 * n * keys * dim + mlp
    return params, macs, macs


def count(config: ModelConfig) -> Count:
    """The whole model."""
    stages = count_stages(config)
    return Count("total", *(sum(getattr(stage, key) for stage in stages) for key in ("params", "macs", "macs_run")))
