"""The presets as models of timm: `import lsag.timm_models`, then `timm.create_model("lsag_cifar_tiny")`.

They take timm's arguments `num_classes`, `in_chans`, `img_size`, `drop_path_rate` and `features_only`, and `pretrained`
where trained weights come with lsag.
"""

import sys
from typing import Any

from pydantic import ValidationError
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

from lsag.checkpoint import load_checkpoint
from lsag.config import ModelConfig, in_one_line
from lsag.errors import UsageError
from lsag.model.build import ARGUMENTS, resize_positions
from lsag.model.network import LSAG
from lsag.presets import load_preset, preset_names

PRESETS = {f"lsag_{name.replace('-', '_')}": name for name in preset_names()}
WITHOUT_EFFECT = {"drop_rate": 0.0, "global_pool": "avg"}
"""Arguments that timm's scripts always pass, and the only value of each that is accepted."""


def _preset_model(name: str) -> ModelConfig:
    model = load_preset(name).model
    assert isinstance(model, ModelConfig), "the presets of the package are LSAG's"
    return model


def _pretrained_cfg(name: str) -> dict[str, Any]:
    model, data = _preset_model(name), load_preset(name).data
    size = model.image_size
    return {
        "input_size": (model.in_channels, size, size),
        "num_classes": model.num_classes,
        "pool_size": (model.grid_sizes[-1],) * 2,
        "crop_pct": size / (data.eval_resize or size),
        "interpolation": data.interpolation,
        "fixed_input_size": True,
        "mean": data.mean,
        "std": data.std,
        "first_conv": "embed.conv",
        "classifier": "head",
    }


default_cfgs = generate_default_cfgs({variant: _pretrained_cfg(name) for variant, name in PRESETS.items()})


def _build(variant: str, **arguments: Any) -> LSAG:
    """A model with random weights. ValueError for arguments that LSAG does not have, or values that do not fit it."""
    changes = {}
    for key, value in arguments.items():
        if key in WITHOUT_EFFECT and value == WITHOUT_EFFECT[key]:
            continue
        if key not in ARGUMENTS:
            raise UsageError(f"{variant} does not accept {key}={value!r}", f"it accepts: {', '.join(ARGUMENTS)}")
        if key == "img_size" and isinstance(value, tuple | list):
            if len(set(value)) != 1:
                raise UsageError(f"{variant} takes square images, not {tuple(value)}", "give one number")
            value = value[0]
        changes[ARGUMENTS[key]] = value
    headless = changes.get("num_classes") == 0
    if headless:
        del changes["num_classes"]
    try:
        config = ModelConfig(**{**_preset_model(PRESETS[variant]).model_dump(), **changes})
    except ValidationError as error:
        raise UsageError(f"{variant}: {in_one_line(error)}", "pass another value") from error
    model = LSAG(config)
    model.in_chans = config.in_channels  # type: ignore[assignment]  # where timm's scripts look for it
    model.feature_info = [  # type: ignore[assignment]
        {"num_chs": stage.embed_dim, "reduction": config.patch_stride * 2**index, "module": f"stages.{index}"}
        for index, stage in enumerate(config.stages)
    ]
    if headless:
        model.reset_classifier(0)
    return model


def _register(variant: str) -> None:
    def fitting(weights: Any, model: LSAG) -> Any:
        resize_positions(weights, model.config)
        return weights

    def create(pretrained: bool = False, **arguments: Any) -> Any:
        if pretrained and not arguments.get("pretrained_cfg") and not arguments.get("pretrained_cfg_overlay"):
            weights = load_checkpoint(PRESETS[variant]).model.state_dict()
            arguments["pretrained_cfg_overlay"] = {"state_dict": weights}
        model: Any = build_model_with_cfg(
            lambda **arguments: _build(variant, **arguments),
            variant,
            pretrained,
            pretrained_filter_fn=fitting,
            feature_cfg={
                "out_indices": tuple(range(len(_preset_model(PRESETS[variant]).stages))),
                "feature_cls": "getter",
            },
            **arguments,
        )
        model.pretrained_cfg.pop("state_dict", None)  # timm keeps it, beside the weights
        return model

    create.__name__ = create.__qualname__ = variant
    create.__module__ = __name__
    create.__doc__ = f"The preset {PRESETS[variant]}."
    setattr(sys.modules[__name__], variant, register_model(create))


for _variant in PRESETS:
    _register(_variant)
