"""diffusers: ``pytorch_lora_weights.safetensors``, in three generations of keys.

``.processor.to_q_lora.down``, ``.to_q.lora.down`` and ``.to_q.lora_A``; ``.lora_linear_layer.`` in
text encoders. Scale: that of the metadata entry ``lora_adapter_metadata`` (a configuration of PEFT
for each component), else alpha/r of an ``.alpha`` tensor, else 1
(`diffusers/loaders/lora_base.py`, `diffusers/utils/state_dict_utils.py`). Of LoHa and LoKr with
that entry (`diffusers/loaders/peft.py`, ``save_lora_adapter``) keys and scale are those of PEFT.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sklora._untrusted import Refusal, parse_json
from sklora.io._build import (
    PRODUCT_ROLES,
    alpha_rule,
    by_module,
    has_suffix,
    left_out_of,
    make_plan,
)
from sklora.io._plan import AdapterPlan, Format, ReadOptions, Scale, Source
from sklora.io.formats.peft import (
    METADATA,
    check_config,
    check_lokr,
    check_patterns,
    scale_of_config,
)

_SUFFIXES = {
    "down.weight": "down",
    "up.weight": "up",
    "lora_A.weight": "down",
    "lora_B.weight": "up",
    "alpha": "alpha",
    "lora_magnitude_vector": "magnitude_out",
    "lora_magnitude_vector.weight": "magnitude_out",
    "dora_scale": "magnitude",
}
_COMPONENTS = (
    *("unet.", "text_encoder.", "text_encoder_2.", "text_encoder_3.", "prior.", "controlnet."),
    *("transformer.", "transformer_2.", "diffusion_model."),
    *("down_blocks.", "mid_block.", "up_blocks.", "transformer_blocks."),
    "single_transformer_blocks.",
)
# Language models have names in which "transformer" is no component of a pipeline.
_OTHERS = ("transformer.h.", "transformer.encoder.")


def _matches(source: Source, options: ReadOptions) -> bool:
    if has_suffix(source, "_lora.down.weight", ".lora.down.weight", "_layer.down.weight"):
        return True
    if METADATA in source.metadata and has_suffix(source, *PRODUCT_ROLES):
        return True
    new = has_suffix(source, ".lora_A.weight")
    named = any(
        name.startswith(_COMPONENTS) and not name.startswith(_OTHERS) for name in source.tensors
    )
    return new and (named or METADATA in source.metadata)


def _plan(source: Source, options: ReadOptions) -> AdapterPlan:
    # Without a configuration they are LyCORIS's.
    suffixes = _SUFFIXES | PRODUCT_ROLES if METADATA in source.metadata else _SUFFIXES
    modules, rest = by_module(source.tensors, suffixes, strip=(".lora", ".lora_linear_layer"))
    settings = _settings(source.metadata)
    for config in settings.values():
        check_config(config)
        check_patterns(config, list(modules), len(settings))

    otherwise = alpha_rule(source, options)

    def scale(path: str, tensors: Mapping[str, str], dimension: int | None) -> Scale:
        for component, config in settings.items():
            if path.startswith(f"{component}.") or (len(settings) == 1 and not component):
                module = path.removeprefix(f"{component}.")
                return Scale(scale_of_config(config, module, dimension))
        return otherwise(path, tensors, dimension)

    plan = make_plan(source, options, "diffusers", modules, scale, left_out=left_out_of(rest))
    check_lokr(source, plan)
    return plan


FORMAT = Format(_matches, _plan)


def _settings(metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Sort ``{"unet.lora_alpha": 8, ...}`` by component; one without components is named ""."""
    if METADATA not in metadata:
        return {}
    flat = parse_json(metadata[METADATA], f"the metadata entry {METADATA}")
    if not isinstance(flat, Mapping):
        raise Refusal(f"the metadata entry {METADATA} is no mapping.")
    settings: dict[str, dict[str, Any]] = {}
    for key, value in flat.items():
        component, _, name = key.rpartition(".")
        settings.setdefault(component, {})[name] = value
    return {
        name: {"peft_type": "LORA", **config}
        for name, config in settings.items()
        if config.keys() & {"lora_alpha", "alpha"}
    }
