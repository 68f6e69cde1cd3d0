"""mlx-lm: ``lora_a (in, r)`` and ``lora_b (r, out)``, beside ``adapter_config.json``.

Of stacked experts they are (experts, r, in), or (experts r, in) once, and (experts, out, r).

Scale: ``lora_parameters.scale`` as it stands, whatever alpha says (`mlx_lm/tuner/utils.py`,
``linear_to_lora_layers``, which refuses configurations without one). Until 0.14.1 alpha/rank
multiplied it (`mlx_lm/tuner/lora.py`): so it does where the trainer's settings lack ``use_dora``,
which came with 0.13.1; those of 0.13.1 to 0.14.1 look like later ones. The old ``adapters.npz`` has
no configuration, so its scale is not known. DoRA keeps its magnitude in ``.m``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from sklora._untrusted import Refusal, shown
from sklora.io._build import (
    Modules,
    base_model_label,
    by_module,
    has_suffix,
    left_out_of,
    make_plan,
    mark_stacks,
    number,
    split_stacks,
    stated_scale,
)
from sklora.io._plan import AdapterPlan, Format, ReadOptions, Scale, Source
from sklora.io.formats._loaded import check_dora, check_names_work

# What mlx-lm's trainer has always stored of its settings, and what it stores since 0.13.1 or later.
_ALWAYS = {"iters", "lora_layers", "val_batches"}
_SINCE = {"use_dora", "fine_tune_type", "num_layers"}
_SUFFIXES = {"lora_a": "a", "lora_b": "b", "m": "magnitude"}


def _matches(source: Source, options: ReadOptions) -> bool:
    return has_suffix(source, ".lora_a", ".lora_b")


def _plan(source: Source, options: ReadOptions) -> AdapterPlan:
    config = source.config or {}
    scale = Scale(_scale(config, options))
    label = base_model_label(config.get("model"))
    modules, rest = by_module(source.tensors, _SUFFIXES)
    _check_loaded(config, modules)
    _check_scales(config, modules, scale.value)
    mark_stacks(source, modules, "a", "b")
    left_out = left_out_of(rest)
    plan = make_plan(
        source, options, "mlx", modules, lambda *_: scale, left_out=left_out, base_model=label
    )
    return split_stacks(source, plan)


FORMAT = Format(_matches, _plan)


def _check_loaded(config: Mapping[str, object], modules: Modules) -> None:
    """Refuse what mlx-lm would leave out in silence, or make up (`load_adapters`)."""
    kind = config.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora"):
        raise Refusal(
            f"fine_tune_type is {shown(kind)}, with which mlx-lm loads no low-rank updates; mend "
            "the configuration."
        )
    # 0.13.1 to 0.18 called it use_dora.
    dora = kind == "dora" if "fine_tune_type" in config else config.get("use_dora")
    for path, tensors in modules.items():
        check_dora(path, tensors, dora, "mlx-lm")
    check_names_work(modules)
    parameters = config.get("lora_parameters")
    keys = parameters.get("keys") if isinstance(parameters, Mapping) else None
    if not isinstance(keys, list | None):
        # To mlx-lm "v_proj" has the key "v".
        raise Refusal(f"keys is {shown(keys)} in its lora_parameters; it must be a list of names.")
    known = None if keys is None else {key for key in keys if isinstance(key, str)}
    layers: dict[str, dict[int, str]] = {}
    for path in modules:
        if known and path in known:
            continue
        place = _layer(path, known)
        if place is not None:
            layers.setdefault(place[0], {})[place[1]] = path
        elif known is not None:
            raise Refusal(
                f"module {shown(path)} is none of the keys of lora_parameters, {shown(keys)}, in a "
                "layer or as a whole, so that mlx-lm leaves it out; take it out of the file, or "
                "mend the configuration."
            )
    _check_layers(config, layers)


def _check_scales(config: Mapping[str, object], modules: Modules, scale: float) -> None:
    """Refuse scales of single modules, which Unsloth writes and heeds, and mlx-lm does not."""
    scales = config.get("unsloth_mlx_lora_module_scales")
    if not isinstance(scales, Mapping):
        return
    for path in modules:
        if scales.get(path, scale) != scale:
            raise Refusal(
                f"module {shown(path)} has the scale {shown(scales[path])} for Unsloth, and "
                f"{scale:g} for mlx-lm; convert it with export_peft_adapter of unsloth_zoo."
            )


def _layer(path: str, keys: Collection[str] | None) -> tuple[str, int] | None:
    """Find the layer that a module is in: a number, before a key if there are keys."""
    parts = path.split(".")
    for place, part in enumerate(parts[:-1]):
        rest = ".".join(parts[place + 1 :])
        if part.isascii() and part.isdigit() and (keys is None or rest in keys):
            return ".".join(parts[:place]), int(part)
    return None


def _check_layers(config: Mapping[str, object], layers: Mapping[str, Mapping[int, str]]) -> None:
    """Refuse modules of other layers than the last of one stack, which alone are adapted."""
    name = "num_layers" if "num_layers" in config else "lora_layers"
    if len(layers) > 1 and name in config:
        one, other = (shown(next(iter(found.values()))) for found in list(layers.values())[:2])
        raise Refusal(
            f"modules {one} and {other} are not among the layers of one model, so that mlx-lm "
            "leaves one of them out; take it out of the file."
        )
    count = config.get(name)
    if not isinstance(count, int) or count < 1:  # all of them
        return
    for found in layers.values():
        first, last = min(found), max(found)
        if last - first >= count:
            raise Refusal(
                f"{name} is {count}, but modules {shown(found[first])} and "
                f"{shown(found[last])} lie further apart, so that mlx-lm leaves out the first; "
                "take it out of the file, or mend the configuration."
            )


def _scale(config: Mapping[str, object], options: ReadOptions) -> float:
    parameters = config.get("lora_parameters")
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
    scale = number(parameters, "scale")
    old = config.keys() >= _ALWAYS and not config.keys() & _SINCE
    if not old or not parameters.keys() >= {"alpha", "rank"}:
        return scale
    rank = number(parameters, "rank")
    if rank < 1:
        raise Refusal(f"rank is {shown(rank)} in its lora_parameters; a rank is at least 1.")
    return scale * number(parameters, "alpha") / rank
