"""The rows of the paper's tables as data: which model each row is, and the paper's figures for it."""

from dataclasses import dataclass, field
from typing import Any, Literal

from lsag.config import Preset
from lsag.presets import ABLATED, load_preset

Scale = Literal["nano", "full"]
NANO = "cifar-nano"
"""The preset that gives the small scale its size and recipe."""


@dataclass(frozen=True)
class Row:
    """A line of a table: the network of `preset`, or the timm model `timm` (NAME[,KEY=VALUE...]) under its recipe.

    `nano` replaces it at the small scale: a preset for one of ours, a timm model for a baseline; None where there is
    nothing. The other figures are the paper's for a baseline, while our presets contain them; `top1` is in percent, by
    dataset.
    """

    name: str
    preset: str
    timm: str | None = None
    nano: str | None = None
    params_m: float | None = None
    images_per_second: float | None = None
    top1: dict[str, float] = field(default_factory=dict)
    image_size: int | None = None
    """Image size of a baseline, where it is not the preset's."""

    def at(self, scale: Scale, *, dataset: str | None, overrides: dict[str, Any]) -> Preset | None:
        """The model and its training at that scale; None where there is none."""
        small = scale == "nano"
        if small and self.nano is None:
            return None
        if not self.timm:
            return load_preset(self.nano if small and self.nano else self.preset, overrides, dataset=dataset)
        preset, timm = (NANO, self.nano) if small else (self.preset, self.timm)
        own: dict[str, Any] = {"name": f"{preset}-{self.name.lower()}"}
        own |= {"model.image_size": self.image_size} if self.image_size else {}
        return load_preset(preset, own | overrides, dataset=dataset, timm=timm)

    def printed(self) -> tuple[float | None, float | None, dict[str, float]]:
        """The paper's figures: parameters in millions, images per second, top-1 in percent by dataset."""
        if self.timm:
            return self.params_m, self.images_per_second, self.top1
        paper = load_preset(self.preset).paper
        return (paper.params_m, paper.images_per_second, paper.top1) if paper else (None, None, {})


def _ablation(name: str) -> Row:
    return Row(name, f"{ABLATED}-{name.lower()}", nano=f"{NANO}-{name.lower()}")


def _cifar(
    name: str, timm: str, params_m: float, speed: float, c10: float, c100: float, nano: str | None = None
) -> Row:
    return Row(name, "cifar-tiny", timm, nano, params_m, speed, {"cifar10": c10, "cifar100": c100})


def _imagenet(
    name: str, timm: str, params_m: float, speed: float | None, top1: float, image_size: int | None = None
) -> Row:
    return Row(name, "in1k-tiny", timm, None, params_m, speed, {"imagenet": top1}, image_size)


def _nest(dim: int) -> str:
    """NesT for CIFAR: single pixels as patches, four levels of three blocks, all of width `dim`."""
    heads = dim // 64
    dims, num_heads, depths = (str([number] * 4).replace(" ", "") for number in (dim, heads, 3))
    return f"Nest,patch_size=1,num_levels=4,embed_dims={dims},num_heads={num_heads},depths={depths}"


# The small baselines have about as many parameters as Full at that size, and patches of 2 pixels like it; DeiT's are of
# 4 pixels, because attention over all 256 tokens in every block would be slow (docs/baselines.md).
_NANO_DEIT = "deit_tiny_patch16_224,patch_size=4,embed_dim=96,depth=8,num_heads=3"
_NANO_SWIN = "swin_tiny_patch4_window7_224,patch_size=2,window_size=4,embed_dim=32,depths=[2,2,4],num_heads=[2,2,4]"
_NANO_NEST = "Nest,patch_size=2,num_levels=3,embed_dims=[32,64,128],num_heads=[2,2,4],depths=[2,2,3]"
_SWIN = "swin_{}_patch4_window7_224,patch_size=1,window_size=4"

_NEST_T = _cifar("NesT-T", _nest(192), 6.2, 627.9, 96.04, 78.69, _NANO_NEST)
_FULL = Row("Full", "cifar-tiny", nano=f"{NANO}-full")

TABLES: dict[int, tuple[Row, ...]] = {
    2: tuple(Row(name, name) for name in ("cifar-tiny", "cifar-small", "cifar-base", "in1k-tiny", "in1k-small")),
    3: (
        _cifar("DeiT-T", "deit_tiny_patch16_224,patch_size=2", 5.3, 1905.3, 88.39, 67.52, _NANO_DEIT),
        _cifar("DeiT-S", "deit_small_patch16_224,patch_size=2", 21.3, 734.7, 92.44, 69.78),
        _cifar("DeiT-B", "deit_base_patch16_224,patch_size=2", 85.1, 233.7, 92.41, 70.49),
        _cifar("PVT-T", "pvt_v2_b1", 12.8, 1478.1, 90.51, 69.62),
        _cifar("PVT-S", "pvt_v2_b2", 24.1, 707.2, 92.34, 69.79),
        _cifar("PVT-B", "pvt_v2_b4", 60.9, 315.1, 85.05, 43.78),
        _cifar("Swin-T", _SWIN.format("tiny"), 27.5, 1372.5, 94.46, 78.07, _NANO_SWIN),
        _cifar("Swin-S", _SWIN.format("small"), 48.8, 2399.2, 94.17, 77.01),
        _cifar("Swin-B", _SWIN.format("base"), 86.7, 868.3, 94.55, 78.45),
        _NEST_T,
        _cifar("NesT-S", _nest(384), 23.4, 1616.9, 96.97, 81.70),
        _cifar("NesT-B", _nest(768), 90.1, 189.8, 97.20, 82.56),
        Row("Our-B", "cifar-base"),
        Row("Our-S", "cifar-small"),
        Row("Our-T", "cifar-tiny", nano=f"{NANO}-full"),
    ),
    4: (
        _imagenet("ResNet-50", "resnet50", 25, 1226.1, 76.2),
        _imagenet("ResNet-101", "resnet101", 45, 753.6, 77.4),
        _imagenet("RegNetY-4GF", "regnety_040", 21, 1156.7, 80.0),
        _imagenet("RegNetY-8GF", "regnety_080", 39, 591.6, 81.7),
        _imagenet("DeiT-T", "deit_tiny_patch16_224", 5.7, 2536.5, 72.2),
        _imagenet("DeiT-S", "deit_small_patch16_224", 22.0, 940.4, 79.8),
        _imagenet("PVT-T", "pvt_v2_b1", 13.2, None, 75.1),
        _imagenet("PVT-S", "pvt_v2_b2", 24.5, None, 79.8),
        _imagenet("Swin-T", "swin_tiny_patch4_window7_224", 29.0, 755.2, 81.3),
        _imagenet("NesT-T", "nest_tiny", 17.0, 633.9, 81.5),
        _imagenet("CrossViT-S", "crossvit_small_240", 26.7, None, 81.0, 240),
        _imagenet("TNT-S", "tnt_s_patch16_224", 23.8, None, 81.3),
        Row("Our-S", "in1k-small"),
        Row("Our-T", "in1k-tiny"),
    ),
    5: (_NEST_T, *map(_ablation, "ABCDE"), _FULL),
    6: (*map(_ablation, ("I", "II")), _FULL),
}
"""The rows that lsag and timm can train; docs/baselines.md says which are missing, and what differs.

The other rows are compared with the last one.
"""
