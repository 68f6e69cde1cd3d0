"""diffusers: ``pytorch_lora_weights.safetensors``, in three generations of keys.

``.processor.to_q_lora.down``, ``.to_q.lora.down`` and ``.to_q.lora_A``; ``.lora_linear_layer.`` in
text encoders. DiffSynth-Studio keeps PEFT's name of the adapter: ``.to_q.lora_A.default``. Scale:
that of the metadata entry ``lora_adapter_metadata`` (a configuration of PEFT for each component),
else alpha/r of an ``.alpha`` tensor, else 1 (`diffusers/loaders/lora_base.py`,
`diffusers/utils/state_dict_utils.py`). Of LoHa and LoKr with that entry
(`diffusers/loaders/peft.py`, ``save_lora_adapter``) keys and scale are those of PEFT.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sklora._untrusted import Refusal, parse_json, shown
from sklora.io._build import (
    PRODUCT_ROLES,
    Modules,
    alpha_over_rank,
    alpha_rule,
    by_module,
    has_suffix,
    left_out_of,
    make_plan,
    stated_scale,
)
from sklora.io._plan import AdapterPlan, Format, ReadOptions, Scale, Source
from sklora.io.formats._loaded import BARE, check_dora, check_targets, is_of_pipeline
from sklora.io.formats.peft import (
    METADATA,
    check_config,
    check_lokr,
    check_patterns,
    config_of,
    scale_of_config,
)

_SUFFIXES = {
    "down.weight": "down",
    "up.weight": "up",
    "lora_A.weight": "down",
    "lora_B.weight": "up",
    "lora_embedding_A": "down",
    "lora_embedding_B": "up",
    "alpha": "alpha",
    "lora_magnitude_vector": "magnitude_out",
    "lora_magnitude_vector.weight": "magnitude_out",
    "dora_scale": "magnitude",
    "magnitude": "magnitude_out",  # of ai-toolkit
}
_NAMED = {"lora_A.default.weight": "down", "lora_B.default.weight": "up"}
# Others diffusers renames to one of these, if it takes them at all.
_COMPONENTS = (
    *("unet.", "transformer.", "transformer_2.", "transformer_ref.", "connectors.", "prior."),
    *("controlnet.", "text_encoder.", "text_encoder_2.", "text_encoder_3.", "text_conditioner."),
)
_TEXT_ENCODERS = {"text_encoder", "text_encoder_2", "text_encoder_3"}
_OF_FLUX = ("transformer.", "text_encoder.")
# By which a component of the metadata is a configuration of LoRA.
_TOLD = {"r", "target_modules", "rank_pattern", "alpha_pattern", "use_rslora"}
_ALPHAS = {"lora_alpha", "alpha"}


def _matches(source: Source, options: ReadOptions) -> bool:
    if has_suffix(source, "_lora.down.weight", ".lora.down.weight", "_layer.down.weight"):
        return True
    if METADATA in source.metadata and has_suffix(source, *PRODUCT_ROLES):
        return True
    new = has_suffix(source, ".lora_A.weight", ".lora_A.default.weight")
    named = any(map(is_of_pipeline, source.tensors))
    return new and (named or METADATA in source.metadata)


def _plan(source: Source, options: ReadOptions) -> AdapterPlan:
    # Without a configuration they are LyCORIS's.
    suffixes = _SUFFIXES | PRODUCT_ROLES if METADATA in source.metadata else _SUFFIXES
    if not has_suffix(source, ".lora_A.weight"):  # else there are loaders that take those alone
        suffixes = suffixes | _NAMED
    modules, rest = by_module(source.tensors, suffixes, strip=(".lora", ".lora_linear_layer"))
    settings = _settings(source.metadata)
    for config in settings.values():
        check_config(config)
        check_patterns(config, modules, len(settings))
    beside = None if all(map(is_of_pipeline, modules)) else config_of(source)
    if beside is not None:
        check_config(beside)
        check_patterns(beside, modules)
    otherwise = alpha_rule(source, options)
    known = (*_COMPONENTS, *(f"{component}." for component in settings))

    def scale(path: str, tensors: Mapping[str, str], dimension: int | None) -> Scale:
        _check_component(path, "alpha" in tensors, settings, known)
        if path.endswith("_lora") and "alpha" in tensors:
            raise Refusal(
                f"tensor {shown(tensors['alpha'])} looks like an alpha, but loaders of these keys "
                "look at none of this name; take it out of the file."
            )
        for component, config in settings.items():
            if not component or path.startswith(f"{component}."):
                module = path.removeprefix(f"{component}.")
                check_dora(path, tensors, bool(config.get("use_dora")))
                value = scale_of_config(config, module, dimension)
                if beside is not None and not is_of_pipeline(path):
                    rival = scale_of_config(beside, path, dimension)
                    value = value if value == rival else _disputed(options, path, value, rival)
                # ComfyUI follows an alpha instead.
                found = alpha_over_rank(path, tensors, dimension)
                return Scale(value) if found.alpha is None else found._replace(rival=value)
        return otherwise(path, tensors, dimension)

    plan = make_plan(source, options, "diffusers", modules, scale, left_out=left_out_of(rest))
    check_lokr(source, plan)
    _check_bare(plan)
    _check_generations(plan)
    _check_alphas(plan, modules)
    _check_text_encoders(plan, settings)
    return plan


FORMAT = Format(_matches, _plan)


def _check_alphas(plan: AdapterPlan, modules: Modules) -> None:
    """Refuse an alpha of no module: for FLUX, diffusers takes it for all modules that have none."""
    bare = {
        module.path.partition(".")[0]: module.path
        for module in plan.modules
        if module.path.startswith(_OF_FLUX) and "alpha" not in modules[module.path]
    }
    for name, _ in plan.left_out:
        other = bare.get(name.partition(".")[0])
        if other and "alpha" in name:
            raise Refusal(
                f"tensor {shown(name)} is the alpha of no module; diffusers takes one for modules "
                f"that have none, such as {shown(other)}: take it out of the file."
            )


def _check_bare(plan: AdapterPlan) -> None:
    """Refuse names without a component beside others: diffusers leaves them out in silence."""
    paths = [module.path for module in plan.modules]
    bare = next((path for path in paths if path.startswith(BARE)), None)
    full = next((path for path in paths if path.startswith(_COMPONENTS)), None)
    if bare and full:
        raise Refusal(
            f"module {shown(bare)} has no component before its name, as {shown(full)} has, so that "
            "diffusers leaves it out; take it out, or write its component."
        )


def _check_generations(plan: AdapterPlan) -> None:
    """Refuse older keys of a denoiser behind newer ones: diffusers then leaves out the older.

    It converts all keys if the first is an older one (`diffusers/loaders/peft.py`,
    ``load_lora_adapter``).
    """
    first: dict[str, str] = {}
    downs = (module.tensors.get("down", "") for module in plan.modules)
    for name in sorted(name for name in downs if name.startswith(_COMPONENTS)):
        component = name.partition(".")[0]
        if component in _TEXT_ENCODERS:
            continue
        new = first.setdefault(component, name)
        if ".lora_A" in new and name.endswith("down.weight"):
            raise Refusal(
                f"tensor {shown(name)} is named as older versions of diffusers name it, and "
                f"{shown(new)} as newer ones, so that diffusers leaves out the former; write "
                "lora_A and lora_B everywhere."
            )


def _check_component(
    path: str, has_alpha: bool, settings: Mapping[str, Any], known: tuple[str, ...]
) -> None:
    """Refuse settings that diffusers follows for a module under another name, or not at all."""
    renamed = path.startswith("diffusion_model.")
    # SimpleTuner writes both for ComfyUI; diffusers loads no such file.
    if renamed and has_alpha and settings.keys() == {""}:
        return
    if settings and (renamed or path.startswith(known) == ("" in settings)):
        raise Refusal(
            f"its metadata entry {METADATA} has settings of {shown(next(iter(settings)))}, but "
            f"module {shown(path)} is of no such component; there are loaders that follow them, "
            "and others that do not: take the entry out of the file."
        )


def _check_text_encoders(plan: AdapterPlan, settings: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse modules that settings do not target: of denoisers the tensors alone tell targets."""
    paths = [module.path for module in plan.modules]
    # These alone are loaded; of others there could be so many that comparing them takes hours.
    for component in sorted(_TEXT_ENCODERS & settings.keys()):
        start = f"{component}."
        own = (path.removeprefix(start) for path in paths if path.startswith(start))
        check_targets(settings[component], own)


def _disputed(options: ReadOptions, path: str, value: float, rival: float) -> float:
    """Ask for the scale of a module that PEFT and transformers load by adapter_config.json."""
    why = f"module {shown(path)} has the scale {value:g} by its metadata, but {rival:g} by the"
    return stated_scale(options, f"{why} adapter_config.json beside it;")


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
        settings.setdefault(component, {"peft_type": "LORA"})[name] = value
    for component, config in settings.items():
        if config.keys() & _TOLD and not config.keys() & _ALPHAS:
            raise Refusal(
                f"the metadata entry {METADATA} has settings of {shown(component)} without "
                "lora_alpha, for which PEFT takes 8; write it there."
            )
    return {name: config for name, config in settings.items() if config.keys() & _ALPHAS}
