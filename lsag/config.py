"""The schema: what a model is and how it is trained, as validated, frozen data.

Everything here is plain Python and pydantic. torch is not imported, so that the command line answers at once.
"""

import ast
import contextlib
import difflib
import math
import os
import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    InstanceOf,
    JsonValue,
    Strict,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)

from lsag.errors import UsageError

Precision = Literal["auto", "fp32", "tf32", "bf16", "fp16"]
Recompute = Literal["none", "local", "all"]
# Strict scalars: neither "10" nor true is a number, while a list may stand for a tuple.
Integer = Annotated[int, Strict()]
Real = Annotated[float, Strict()]
# The bounds are far above any use; they keep a typing error from using up all memory.
Positive = Annotated[Integer, Field(gt=0, le=10_000_000)]
Size = Annotated[Integer, Field(gt=0, le=16_384)]
NonNegativeInteger = Annotated[Integer, Field(ge=0, le=16_384)]
NonNegative = Annotated[Real, Field(ge=0)]
Flag = Annotated[bool, Strict()]
Probability = Annotated[Real, Field(ge=0, le=1)]
BelowOne = Annotated[Real, Field(ge=0, lt=1)]
PositiveReal = Annotated[Real, Field(gt=0)]
Shift = tuple[Integer, Integer]

MAX_BLOCKS = 1000
MAX_TOML_BYTES = 32_768
"""Above any preset. tomllib takes a time that grows with the square of the parts of a dotted key."""

SWIN_WINDOW = 8
"""Patches along a side of a window. Swin's own 7 divides none of the presets' grids. A smaller grid is one window."""
# timm's syntax: magnitude, its spread and limit, number of operations, probability, increasing severity.
RAND_AUGMENT = r"^rand(-((m|n|mmax|inc)\d{1,2}|(mstd|p)\d+(\.\d+)?))*$"
SHUFFLE = r"^(full|shards:[1-9]\d{0,6})$"


class DatasetInfo(NamedTuple):
    """What is known about a dataset before it is opened. `mean` and `std` are per channel, for pixels in 0..1."""

    num_classes: int
    train_images: int
    eval_images: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


# The paper's section 3.3 follows DeiT: ImageNet statistics as in timm, CIFAR's as in the authors' release.
DATASETS: dict[str, DatasetInfo] = {
    "digits": DatasetInfo(10, 1_437, 360, (0.3053,), (0.3763,)),
    "cifar10": DatasetInfo(10, 50_000, 10_000, (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)),
    "cifar100": DatasetInfo(100, 50_000, 10_000, (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "imagenet": DatasetInfo(1000, 1_281_167, 50_000, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


FORMATS: dict[str, tuple[str, ...]] = {
    "folder": (),
    "tar": ("val", "image", "label", "classes"),
    "list": ("val", "image", "label", "split"),
    "hf": ("train", "val", "image", "label"),
}
"""Where images of any classes may be, and the settings that may follow: docs/data.md."""


class DatasetSpec(NamedTuple):
    """The name of a dataset in its parts: FORMAT:WHAT,KEY=VALUE,... or one word."""

    format: str
    what: str
    settings: dict[str, str]


def parse_dataset(name: str) -> DatasetSpec:
    """The parts of the name of a dataset. UsageError if there is no such dataset, format or setting."""
    kind, colon, rest = name.partition(":")
    what, *pairs = re.split(r",(?=[a-z]+=)", rest)
    settings = dict(pair.split("=", 1) for pair in pairs)
    if not colon and kind in (*DATASETS, "folder"):
        return DatasetSpec(kind, "", {})
    if not colon or kind == "folder" or kind not in FORMATS:
        names = (*DATASETS, "folder")
        usable = (*names, *(f"{form}:..." for form in FORMATS if form != "folder"))
        raise UsageError(f"unknown dataset '{name}'{did_you_mean(kind, names)}", f"use one of: {', '.join(usable)}")
    if unknown := [key for key in settings if key not in FORMATS[kind]]:
        raise UsageError(
            f"{kind}: has no setting {unknown[0]}{did_you_mean(unknown[0], FORMATS[kind])}",
            f"its settings are {', '.join(FORMATS[kind])}",
        )
    return DatasetSpec(kind, what, settings)


def default_data_dir(dataset: str) -> Path:
    """Where a dataset is by default: in $LSAG_DATA, or else ./data, or the current folder if its name has a path."""
    return Path(os.environ.get("LSAG_DATA") or ("." if ":" in dataset else "data"))


Kind = TypeVar("Kind", bound=BaseModel)


class Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class StageConfig(Frozen):
    """One level of the pyramid: `depth` blocks at one resolution and width (paper, Table 2)."""

    embed_dim: Size
    depth: Annotated[Integer, Field(gt=0, le=MAX_BLOCKS)]
    num_heads: Size
    num_kv_heads: Size = Field(default_factory=lambda fields: fields.get("num_heads", 1))

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.embed_dim % self.num_heads:
            raise ValueError(f"embed_dim {self.embed_dim} is not a multiple of num_heads {self.num_heads}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")
        return self


class ModelConfig(Frozen):
    """The network (paper, section 3 and Table 2). Sizes in pixels; shifts as (px, py), px to the right and py down."""

    image_size: Size
    in_channels: Literal[1, 3] = 3
    num_classes: Positive
    shifts: tuple[Shift, ...] = Field(min_length=1)
    patch_kernel: Size
    patch_stride: Size
    patch_padding: NonNegativeInteger
    shift_mode: Literal["roll", "extend"] = "roll"
    variants: Literal["convolution", "translation"] = "convolution"
    """How a shift's variant is made: by its own convolution of the rolled image, or by one shared convolution of the
    image translated with reflected edges."""
    position: Literal["variant", "shared"] = "variant"
    """Whether a patch has a position embedding per variant, or one shared by all."""
    local: Literal["shift", "none", "swin", "cvt"] = "shift"
    """The first block: the paper's local one, a global one like the rest, Swin's, or CvT's with its embedding."""
    mlp_ratio: Annotated[Real, Field(ge=0.1, le=100)] = 4.0
    drop_path: BelowOne = 0.1
    drop_path_by_depth: Literal["constant", "linear"] = "constant"
    """Whether all blocks have that rate, as in the release, or it grows from 0 to that of the last one, as in DeiT."""
    stages: tuple[StageConfig, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if sum(stage.depth for stage in self.stages) > MAX_BLOCKS:
            raise ValueError(f"the stages have more than {MAX_BLOCKS} blocks")
        if self.shifts[0] != (0, 0):
            raise ValueError(f"the first shift must be [0, 0], the unshifted variant, not {list(self.shifts[0])}")
        if self.shift_mode == "extend" and min(min(shift) for shift in self.shifts) < 0:
            raise ValueError("shift_mode 'extend' does not allow negative shifts; use 'roll'")
        if max(abs(p) for shift in self.shifts for p in shift) >= self.image_size:
            raise ValueError(f"a shift must be smaller than image_size {self.image_size}")
        if self.image_size % self.patch_stride:
            below = self.image_size // self.patch_stride * self.patch_stride
            nearest = " or ".join(str(size) for size in (below, below + self.patch_stride) if size)
            raise ValueError(
                f"image_size {self.image_size} is not a multiple of patch_stride {self.patch_stride}; use {nearest}"
            )
        if self.patch_kernel > self.image_size + 2 * self.patch_padding:
            raise ValueError(f"patch_kernel {self.patch_kernel} is larger than the padded image")
        if self.patch_padding >= self.patch_kernel:
            raise ValueError(
                f"patch_padding {self.patch_padding} must be smaller than patch_kernel {self.patch_kernel}"
            )
        if self.variants == "translation" and self.shift_mode != "roll":
            raise ValueError("variants 'translation' reflects the edges of the image; set model.shift_mode=roll")
        if self.local != "shift" and self.num_variants > 1:
            raise ValueError(f"local '{self.local}' does not use shifted variants; set model.shifts=[[0,0]]")
        if self.local == "swin" and self.stages[0].depth < 2:
            raise ValueError("local 'swin' needs a second block in the first stage; set model.stages.0.depth=2")
        if self.local == "cvt" and self.patch_kernel <= self.patch_stride:
            raise ValueError(
                f"local 'cvt' embeds overlapping patches: patch_kernel {self.patch_kernel} must be larger than "
                f"patch_stride {self.patch_stride}"
            )
        return self

    @property
    def num_variants(self) -> int:
        """T, the number of shifted copies of the image."""
        return len(self.shifts)

    @property
    def grid_sizes(self) -> tuple[int, ...]:
        """Patches along one side of the image, per stage: each stage halves it, rounding up (section 3.2)."""
        sides = [(self.image_size + 2 * self.patch_padding - self.patch_kernel) // self.patch_stride + 1]
        for _ in self.stages[1:]:
            sides.append(math.ceil(sides[-1] / 2))
        return tuple(sides)

    def drop_path_at(self, index: int) -> float:
        """The drop-path rate of a block, counted from 0 over all stages."""
        if self.drop_path_by_depth == "constant":
            return self.drop_path
        return self.drop_path * index / max(sum(stage.depth for stage in self.stages) - 1, 1)


class TimmConfig(Frozen):
    """A timm classifier instead of LSAG: a baseline trained with the same recipe."""

    timm: Annotated[str, Field(min_length=1, max_length=500)]
    """Name of a timm model, or of a model class in timm.models."""
    arguments: dict[str, JsonValue] = {}
    """Further arguments of timm's model; the fields below set the rest."""
    image_size: Size
    in_channels: Literal[1, 3] = 3
    num_classes: Positive
    drop_path: BelowOne = 0.1

    @model_validator(mode="before")
    @classmethod
    def _splits_shorthand(cls, fields: Any) -> Any:
        """Accept `timm = "NAME,KEY=VALUE"`, as `--model` gives it and as older checkpoints have it."""
        if isinstance(fields, dict) and isinstance(fields.get("timm"), str):
            name, arguments = parse_spec(fields["timm"])
            more = fields.get("arguments", {})
            if arguments and isinstance(more, dict):
                return {**fields, "timm": name, "arguments": arguments | more}
        return fields


def _tag(model: Any) -> str:
    """Which of the two kinds a model section is: it is timm's if it names a timm model."""
    return "timm" if isinstance(model, TimmConfig) or (isinstance(model, dict) and "timm" in model) else "lsag"


class DataConfig(Frozen):
    """The dataset, and how an image becomes the input of the model."""

    dataset: Annotated[str, Field(max_length=10_000)]
    """digits, cifar10, cifar100, imagenet, folder, or FORMAT:WHAT,KEY=VALUE,... as in docs/data.md."""
    mean: tuple[Real, ...]
    std: tuple[PositiveReal, ...]
    train_crop: Literal["padded", "resized"]
    """'padded': random crop after padding by `crop_padding`; 'resized': random resized crop (DeiT)."""
    crop_padding: NonNegativeInteger = 4
    eval_resize: Size | None = None
    """Shorter side in pixels before the centre crop of evaluation; None: the image size."""
    interpolation: Literal["bicubic", "bilinear", "nearest"] = "bicubic"
    val_split: BelowOne = 0.0
    """Share of each class to hold out of the training images for evaluation, where no images are kept apart for it.
    train.seed chooses the images."""
    shuffle: Annotated[str, Field(pattern=SHUFFLE)] = "full"
    """How an epoch is shuffled. "full": all images. "shards:N": the tar shards, and then the images of N shards at a
    time, so that few files are being read."""
    balance: Probability = 0.0
    """How far classes are evened out in training: one of n images has a share of an epoch in proportion to
    n^(1 - balance). 0: each image once; 1: each class equally often."""

    @field_validator("dataset")
    @classmethod
    def _is_a_dataset(cls, name: str) -> str:
        try:
            parse_dataset(name)
        except UsageError as error:
            raise ValueError(f"{error.what}; {error.fix}") from None
        return name

    @property
    def shards_at_once(self) -> int:
        """N of the shuffle "shards:N"; 0 if all images are shuffled."""
        return int(self.shuffle.partition(":")[2] or 0)

    def check_shards(self, there: bool) -> None:
        """UsageError if shards are to be shuffled, and none are `there`."""
        if self.shards_at_once and not there:
            raise UsageError(
                f"shuffle {self.shuffle} is for tar shards, and {self.dataset} has none", "--set data.shuffle=full"
            )

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.val_split and self.dataset in DATASETS:
            raise ValueError(
                f"val_split is for images of your own, {self.dataset} has a split for evaluation; add --dataset folder"
            )
        if self.balance and self.shards_at_once:
            raise ValueError(
                f"balance {self.balance:g} draws from all images, shuffle {self.shuffle} from a few shards at a time; "
                "set data.balance=0 or data.shuffle=full"
            )
        return self


class AugmentConfig(Frozen):
    """Augmentation and regularisation of the targets: as in DeiT, without repeated augmentation (section 3.3)."""

    hflip: Probability = 0.5
    rand_augment: Annotated[str, Field(pattern=RAND_AUGMENT)] | None = "rand-m9-mstd0.5-inc1"
    """RandAugment in timm's syntax, or "none"."""
    random_erasing: Probability = 0.25
    mixup: NonNegative = 0.8
    cutmix: NonNegative = 1.0
    mixup_prob: Probability = 1.0
    mixup_switch_prob: Probability = 0.5
    label_smoothing: BelowOne = 0.1

    @model_validator(mode="before")
    @classmethod
    def _reads_none(cls, fields: Any) -> Any:
        if isinstance(fields, dict) and fields.get("rand_augment") in ("", "none"):
            return {**fields, "rand_augment": None}
        return fields

    @property
    def mixes(self) -> bool:
        """Whether the images of a batch are mixed, so that targets become distributions."""
        return self.mixup_prob > 0 and (self.mixup > 0 or self.cutmix > 0)


class TrainConfig(Frozen):
    """The optimisation: AdamW, linear warm-up, cosine (section 3.3)."""

    epochs: Positive = 300
    batch_size: Positive
    """Images per optimizer step, over all devices."""
    lr: PositiveReal = 5e-4
    """The peak of the learning rate for a batch of 512 images: it is multiplied by batch_size / 512."""
    warmup_lr: NonNegative = 1e-6
    """The learning rate of the first step, at most the peak."""
    min_lr: NonNegative = 1e-5
    """The learning rate after the last step, at most the peak."""
    lr_scaling: Literal["peak", "all"] = "peak"
    """Whether batch_size / 512 scales the peak alone, as in DeiT, or warmup_lr and min_lr too."""
    lr_schedule: Literal["step", "epoch"] = "step"
    """A rate for each step, and a cosine that begins where the warm-up ends; or, as in DeiT, a rate for each epoch, one
    epoch late, and a cosine that counts from the first epoch."""
    warmup_epochs: NonNegative = 5
    weight_decay: NonNegative = 0.05
    decay_positions: Flag = False
    """Decay position embeddings, and what else a network asks to spare, like any other matrix, as the release does."""
    clip_grad: NonNegative = 5.0
    """Norm to which larger gradients are scaled down; 0: they are left as they are."""
    ema_decay: BelowOne = 0.0
    """Decay of the moving average of the weights, which is then evaluated and saved as the model; 0 disables it."""
    freeze: NonNegativeInteger = 0
    """Number of stages, from the first, that keep their weights, and so does the embedding; 0 trains everything."""
    layer_decay: Annotated[Real, Field(gt=0, le=1)] = 1.0
    """Learning rate of each layer, as a factor of that of the layer above it; the head has the full one."""
    patience: NonNegativeInteger = 0
    """Epochs without a better top-1 after which the training ends; 0: it takes all its epochs."""
    class_weights: Literal["none", "inverse"] = "none"
    """What a class counts in the training loss; "inverse": in inverse proportion to the number of its images. The loss
    of an evaluation is never weighted."""
    seed: Annotated[Integer, Field(ge=0, lt=2**63)] = 0

    @property
    def learning_rates(self) -> tuple[float, float, float]:
        """The learning rates of the first step, at the peak and after the last step, for this batch size."""
        scale = self.batch_size / 512
        peak = self.lr * scale
        if self.lr_scaling == "all":
            return self.warmup_lr * scale, peak, self.min_lr * scale
        return min(self.warmup_lr, peak), peak, min(self.min_lr, peak)

    @model_validator(mode="before")
    @classmethod
    def _scales_as_when_it_was_written(cls, fields: Any) -> Any:
        """Runs and checkpoints list every setting. Those without `lr_scaling` are older and scaled all rates."""
        listed = {"epochs", "batch_size", "lr", "warmup_lr", "min_lr", "warmup_epochs", "weight_decay", "clip_grad"}
        if isinstance(fields, dict) and fields.keys() >= listed | {"seed"}:
            return {"lr_scaling": "all"} | fields
        return fields

    @model_validator(mode="after")
    def _warmup_fits(self) -> Self:
        if self.warmup_epochs > self.epochs:
            raise ValueError(
                f"warmup_epochs {self.warmup_epochs:g} is more than epochs {self.epochs}; "
                f"add --set train.warmup_epochs={self.epochs // 5}"
            )
        return self


class PaperFigures(Frozen):
    """The paper's figures for this model, for comparison only. Its "GFLOPs" are multiply-accumulates."""

    params_m: Real | None = None
    gmacs: Real | None = None
    images_per_second: Real | None = None
    top1: dict[str, Real] = {}


class Preset(Frozen):
    """A complete, reproducible description of a model and its training."""

    # Run folders are named after it: not a path, and not only dots.
    name: Annotated[str, Field(pattern=r"^[^/\\\x00-\x1f]*[^/\\\x00-\x1f.][^/\\\x00-\x1f]*$")]
    description: str = ""
    model: Annotated[Annotated[ModelConfig, Tag("lsag")] | Annotated[TimmConfig, Tag("timm")], Discriminator(_tag)]
    data: DataConfig
    augment: AugmentConfig = AugmentConfig()
    train: TrainConfig
    paper: PaperFigures | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        channels = self.model.in_channels
        if len(self.data.mean) != channels or len(self.data.std) != channels:
            raise ValueError(f"data.mean and data.std need {channels} values each, one per model.in_channels")
        if self.data.eval_resize is not None and self.data.eval_resize < self.model.image_size:
            raise ValueError(
                f"data.eval_resize {self.data.eval_resize} is below model.image_size {self.model.image_size}"
            )
        if self.augment.mixes and self.train.batch_size % 2:
            raise ValueError(f"train.batch_size {self.train.batch_size} must be even while mixup or cutmix is on")
        if self.augment.rand_augment and channels != 3:
            raise ValueError("augment.rand_augment needs colour images (model.in_channels = 3); set it to 'none'")
        if self.data.balance and self.train.class_weights != "none":
            raise ValueError(
                f"data.balance {self.data.balance:g} and train.class_weights '{self.train.class_weights}' both make up "
                "for rare classes; set data.balance=0 or train.class_weights=none"
            )
        if isinstance(self.model, ModelConfig) and self.train.freeze > len(self.model.stages):
            raise ValueError(f"train.freeze {self.train.freeze} is more than the {len(self.model.stages)} stages")
        return self

    @property
    def image_mode(self) -> Literal["L", "RGB"]:
        """Mode of the images in Pillow's terms."""
        return "L" if self.model.in_channels == 1 else "RGB"

    def slice_size(self, num_slices: int) -> int:
        """Images per slice when a batch is cut into equal slices, one for each rank and accumulation step.

        UsageError with the nearest possible batch sizes if it cannot be cut into equal slices.
        """
        batch, unit = self.train.batch_size, num_slices * (2 if self.augment.mixes else 1)
        if batch % unit:
            nearest = " or ".join(str(size) for size in (batch // unit * unit, -(-batch // unit) * unit) if size)
            even = " of even size, as mixup and cutmix need" if self.augment.mixes else ""
            raise UsageError(
                f"train.batch_size {batch} cannot be cut into {num_slices} equal slices{even}",
                f"--set train.batch_size={nearest}, or change the number of devices or --accum",
            )
        return batch // num_slices

    def with_classes(self, num_classes: int) -> "Preset":
        """This preset with `num_classes` classes. UsageError for one alone, which is nothing to tell apart."""
        if num_classes < 2:
            raise UsageError("all training images are of one class", "give images of two classes or more")
        values = self.model_dump()
        values["model"]["num_classes"] = num_classes
        return validate_preset(values, origin=f"preset {self.name}")


class Description(Frozen):
    """What a file says about the model in it."""

    preset: Preset
    classes: tuple[InstanceOf[str], ...]
    epoch: Annotated[Integer, Field(ge=0)] = 0
    metrics: dict[str, Real] = {}

    @model_validator(mode="after")
    def _names_each_class(self) -> Self:
        if len(self.classes) != self.preset.model.num_classes:
            raise ValueError(f"{len(self.classes)} class names for {self.preset.model.num_classes} classes")
        return self


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by the dotted keys that --set takes, such as `train.epochs` and `model.stages.0.depth`.

    Lists are kept whole, except lists of tables.
    """
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            value = {str(index): item for index, item in enumerate(value)}
        key = f"{prefix}{name}"
        flat |= flatten(value, f"{key}.") if isinstance(value, dict) and value else {key: value}
    return flat


def changed_keys(old: Preset | None, new: Preset) -> list[str]:
    """The dotted keys of the settings in which two presets differ, or all keys if there is no `old` preset.

    Names, descriptions and the paper's figures are not compared.
    """
    own = {"name", "description", "paper"}
    before, after = (flatten(preset.model_dump(mode="json", exclude=own)) if preset else {} for preset in (old, new))
    return [key for key in before | after if (key in before, before.get(key)) != (key in after, after.get(key))]


def parse_override(text: str) -> tuple[str, Any]:
    """Split 'a.b=value' into its key and its value; the value is read as TOML, or else taken as a string."""
    if len(text) > MAX_TOML_BYTES:
        raise UsageError(f"--set {text[:40]}... is too long for a setting", "give a shorter value")
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise UsageError(f"--set {text!r} is not of the form KEY=VALUE", "for example --set train.epochs=10")
    try:
        parsed = tomllib.loads(f"value = {value}")
        return key.strip(), parsed["value"] if len(parsed) == 1 else value
    except (ValueError, RecursionError):
        return key.strip(), value


def parse_overrides(texts: Iterable[str]) -> dict[str, Any]:
    """Settings 'a.b=value' by their dotted keys. UsageError if one is set twice."""
    overrides: dict[str, Any] = {}
    for key, value in map(parse_override, texts):
        if key in overrides:
            raise UsageError(f"{key} is set twice", "set it once")
        overrides[key] = value
    return overrides


def parse_spec(spec: str) -> tuple[str, dict[str, Any]]:
    """'NAME,KEY=VALUE,...' -> NAME and its settings by their keys, with values as in `parse_override`.

    What is not TOML may be a literal of Python, such as (1, 2) or True: older checkpoints have them.
    """
    name, *settings = re.split(r",(?=[\w.]+=)", spec)
    values = parse_overrides(settings)
    for key, value in values.items():
        with contextlib.suppress(ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            if isinstance(value, str):
                values[key] = ast.literal_eval(value.replace("(", "[").replace(")", "]"))
    return name, values


def validate_preset(values: Mapping[str, Any], *, origin: str) -> Preset:
    """A Preset from plain data, or one UsageError that begins with `origin` and lists everything that is wrong."""
    return validated(Preset, values, origin=origin)


def validated(kind: type[Kind], values: Any, *, origin: str) -> Kind:
    """A `kind` from plain data, or one UsageError that begins with `origin` and lists everything that is wrong."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        unknown = all(problem["type"] == "extra_forbidden" for problem in error.errors())
        fix = "lsag train --dry-run lists the keys" if unknown else "change it with --set KEY=VALUE or in the file"
        raise UsageError(f"{origin}: {in_one_line(error)}", fix) from error


def in_one_line(error: ValidationError) -> str:
    """Everything that is wrong, by its keys."""
    return "; ".join(_explain(problem) for problem in error.errors())


def _explain(problem: Any) -> str:
    path = problem["loc"]
    if path[:1] == ("preset",):  # of a Description
        path = path[1:]
    loc = path[:1] + path[2:] if path[:1] == ("model",) else path  # without the tag of the union
    where = ".".join(str(part) for part in loc)
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        return f"unknown key {where}{_suggestion(where, path)}"
    if problem["type"] == "missing":
        return f"{where} is missing"
    got = problem["input"]
    short = isinstance(got, str | float | None) or (isinstance(got, int) and abs(got) < 10**20)
    shown = f" (got {got!r})" if short else ""
    return f"{where}: {message}{shown}" if where else message


def _suggestion(where: str, loc: tuple[Any, ...]) -> str:
    """What may have been meant by the unknown key `where`: a key of the same section, or of another."""
    last = str(loc[-1])
    if close := difflib.get_close_matches(last, _fields_at(loc[:-1]), n=1):
        return f", did you mean '{where.removesuffix(last)}{close[0]}'?"
    elsewhere = [f"{section}.{last}" for section, model in _SECTIONS.items() if last in model.model_fields]
    if not elsewhere:
        return ""
    return f", did you mean '{elsewhere[0]}'?" if elsewhere[0] != where else ", which timm models do not have"


_SECTIONS: dict[str, type[BaseModel]] = {
    "model": ModelConfig,
    "model.stages.0": StageConfig,
    "data": DataConfig,
    "augment": AugmentConfig,
    "train": TrainConfig,
    "paper": PaperFigures,
}


def _fields_at(loc: tuple[Any, ...]) -> list[str]:
    names = [part for part in loc if isinstance(part, str)]
    if loc[:2] == ("model", "timm"):
        return list(TimmConfig.model_fields)
    section = _SECTIONS["model.stages.0" if "stages" in names else names[0]] if names else Preset
    return list(section.model_fields)


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """ ", did you mean '...'?" where one of `choices` is close to `word`, else nothing."""
    close = difflib.get_close_matches(word, list(choices), n=1)
    return f", did you mean '{close[0]}'?" if close else ""
