"""mlx-lm: ``lora_a (in, r)`` and ``lora_b (r, out)``, beside ``adapter_config.json``.

Scale: ``lora_parameters.scale`` as it stands, whatever alpha says (`mlx_lm/tuner/utils.py`,
``linear_to_lora_layers``, which refuses configurations without one). The old ``adapters.npz`` has
no configuration, so its scale is not known. DoRA keeps its magnitude in ``.m``.
"""

from __future__ import annotations

from collections.abc import Mapping

from sklora._untrusted import Refusal, shown
from sklora.io._build import (
    base_model_label,
    has_suffix,
    number,
    plan_by_suffix,
    stated_scale,
)
from sklora.io._plan import AdapterPlan, Format, ReadOptions, Scale, Source

_SUFFIXES = {"lora_a": "a", "lora_b": "b", "m": "magnitude"}


def _matches(source: Source, options: ReadOptions) -> bool:
    return source.container != "gguf" and has_suffix(source, ".lora_a", ".lora_b")


def _plan(source: Source, options: ReadOptions) -> AdapterPlan:
    config = source.config
    value = _scale(config, options)
    label = base_model_label(config.get("model")) if config else None
    return plan_by_suffix(
        source, options, "mlx", _SUFFIXES, lambda *_: Scale(value), base_model=label
    )


FORMAT = Format("mlx", _matches, _plan)


def _scale(config: Mapping[str, object] | None, options: ReadOptions) -> float:
    parameters = config.get("lora_parameters") if config else None
    if parameters is None:
        return stated_scale(
            options,
            "it has the keys of mlx-lm, but no adapter_config.json with lora_parameters beside it, "
            "so its scale is not known; put that file there, or",
        )
    if not isinstance(parameters, Mapping):
        raise Refusal(f"lora_parameters is {shown(parameters)}; it must be a mapping.")
    if "scale" not in parameters:
        return stated_scale(
            options, "its lora_parameters have no scale, without which mlx-lm does not load it;"
        )
    return number(parameters, "scale")
