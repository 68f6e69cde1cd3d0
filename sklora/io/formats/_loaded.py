"""Refuse what PEFT would leave out in silence, or make up, when it loads a file.

It builds the modules that the configuration tells, and passes by tensors that have no place there
(`peft/tuners/tuners_utils.py`, ``check_target_module_exists``; `peft/utils/save_and_load.py`).
What it leaves out is in no model, and must not be read as if it were.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from typing import Any

from sklora._untrusted import Refusal, shown
from sklora.io._build import MAGNITUDES
from sklora.io._pattern import matches_whole, matching_work
from sklora.io._plan import AdapterPlan
from sklora.io.names import PREFIX, unwrapped, without

MAX_MATCHING = 2 * 10**7
_MAX_LETTERS = 2 * 10**8
_METHODS = {
    "LORA": ("lora",),
    "ADALORA": ("adalora",),
    "LOHA": ("loha",),
    "LOKR": ("lokr", "lokr-kronecker"),
}
# How the names of modules begin in files of diffusers: those of a denoiser alone, and all.
BARE = (
    *("down_blocks.", "mid_block.", "up_blocks.", "transformer_blocks."),
    "single_transformer_blocks.",
)
_COMPONENTS = (
    *("unet.", "text_encoder.", "text_encoder_2.", "text_encoder_3.", "prior.", "controlnet."),
    *("transformer.", "transformer_2.", "diffusion_model.", *BARE),
)
# Language models have names in which "transformer" is no component of a pipeline.
_OTHERS = ("transformer.h.", "transformer.encoder.")
# PEFT takes what `layers_pattern` names for patterns.
_PLAIN = re.compile(r"[\w.-]+")
# PEFT has two copies of a module that it saves whole, and saves some for a task: until 0.10 no
# configuration names those.
_COPIES = re.compile(r"\.(?:modules_to_save|original_module)(?![^.])")
_HEADS = {
    "SEQ_CLS": {"classifier", "score"},
    "TOKEN_CLS": {"classifier", "score"},
    "QUESTION_ANS": {"qa_outputs"},
}
# By what names end in, PEFT finds its parameters, those of an adapter that is called "default".
_PARAMETERS = re.compile(r"\.(?:lora_[AB]|hada_\w+|lokr_\w+)(?:\.default)?$")
_MODULES = re.compile(
    r"\.(?:lora_[AB](?:\.default)?\.weight|lora_embedding_[AB](?:\.default)?"
    r"|lora_magnitude_vector(?:\.default)?(?:\.weight)?)$"
)
_ENDINGS = dict.fromkeys(_METHODS, _PARAMETERS) | {"LORA": _MODULES}
SAVED_WHOLE = "a factor in a module that was saved whole"


def is_of_pipeline(name: str) -> bool:
    """Tell whether a name is that of a module of a pipeline of diffusers."""
    return name.startswith(_COMPONENTS) and not name.startswith(_OTHERS)


def check_methods(config: Mapping[str, Any], plan: AdapterPlan) -> None:
    """Refuse modules with other tensors than those of the configuration's method.

    Parameters
    ----------
    config : mapping
        Of PEFT, with a ``peft_type`` that is read.
    plan : AdapterPlan

    Raises
    ------
    Refusal
        When PEFT would leave out a factor, or lack one and start from its own.
    """
    kind = config["peft_type"]
    for module in plan.modules:
        if module.method not in _METHODS[kind]:
            raise Refusal(
                f"module {shown(module.path)} has the tensors of {module.method}, but its "
                f"configuration the peft_type {shown(kind)}, with which PEFT loads others; mend "
                "one of the two."
            )
    _check_spelling(kind, plan)


def _check_spelling(kind: str, plan: AdapterPlan) -> None:
    """Refuse tensors that PEFT does not find by their names, in a file of which it loads others."""
    # Without its factors, AdaLoRA's diagonal between them is nobody's update.
    names = [
        name
        for module in plan.modules
        for role, name in module.tensors.items()
        if role != "diagonal"
    ]
    names += [name for _, name, _ in plan.side]
    found = [_ENDINGS[kind].search(name) is not None for name in names]
    if any(found) and not all(found):
        raise Refusal(
            f"tensor {shown(names[found.index(False)])} has a name that PEFT does not load as a "
            f"part of {shown(kind)}, unlike others of the file; take it out, or give all of them "
            "the names that save_pretrained gives."
        )
    starts: dict[str, str] = {}
    for module in plan.modules:
        name = unwrapped(module.path)
        starts.setdefault(name.removesuffix(without(name, PREFIX)), module.path)
    if len(starts) > 1:
        one, other = [*starts.values()][:2]
        raise Refusal(
            f"modules {shown(one)} and {shown(other)} do not begin with base_model.model. in the "
            "same way, so that PEFT loads one of them at most; take the other out."
        )


def check_dora(path: str, roles: Collection[str], dora: object, loader: str = "PEFT") -> None:
    """Refuse a magnitude that a loader leaves out, or has to make up, where settings say either."""
    has_magnitude = any(role in roles for role in MAGNITUDES)
    if has_magnitude and dora is not None and not dora:
        why = f"a magnitude of DoRA, but its settings are of none, so that {loader} leaves it out"
    elif dora and not has_magnitude:
        why = f"no magnitude, but its settings are of DoRA, so that {loader} takes the base model's"
    else:
        return
    raise Refusal(f"module {shown(path)} has {why}; mend the configuration, or the file.")


def saved_whole(config: Mapping[str, Any], modules: Collection[str]) -> set[str]:
    """Find the modules in others that were saved whole, as PEFT until 0.15 wrote them.

    Its `modules_to_save` and `target_modules` could name the same modules; it has left out such
    factors since.

    Parameters
    ----------
    config : mapping
        Of PEFT.
    modules : collection of str

    Returns
    -------
    set of str
    """
    copied = [_COPIES.split(module)[0] for module in modules if _COPIES.search(module)]
    if not copied:
        return set()
    check_names_work(modules)
    heads = _HEADS.get(str(config.get("task_type")), set())
    names = heads.union(_names(config, "modules_to_save") or ())
    holders = {holder for holder in copied if ends_in(holder, names)}
    return {module for module in modules if _begins_in(module, holders)}


def check_targets(config: Mapping[str, Any], modules: Iterable[str]) -> None:
    """Refuse modules that a configuration does not target, so that PEFT leaves them out.

    Targets that are not told, and patterns that are not supported, are not compared.

    Parameters
    ----------
    config : mapping
        Of PEFT.
    modules : iterable of str
        Without PEFT's prefix.

    Raises
    ------
    Refusal
        For the first such module.
    """
    if config.get("target_parameters") or config.get("ensure_weight_tying"):
        return
    targets, excluded = _names(config, "target_modules"), _names(config, "exclude_modules")
    saved = _names(config, "modules_to_save") or set()
    lengths = {name.count(".") + 1 for name in saved}
    modules = list(modules)
    check_names_work(modules, len(lengths))
    layers = _layers(config)
    pattern = _supported(config.get("target_modules"), modules)
    for module in modules:
        if pattern and not matches_whole(pattern, module):
            why = f"target_modules {shown(pattern)} do not match it"
        elif targets is not None and not ends_in(module, targets):
            why = f"target_modules {shown(sorted(targets))} do not name it"
        elif excluded and ends_in(module, excluded):
            why = f"exclude_modules {shown(sorted(excluded))} name it"
        elif _COPIES.search(module):
            why = "it is the copy of one that modules_to_save do not name"
        elif _holds(module, saved, lengths):
            why = f"modules_to_save {shown(sorted(saved))} hold it"
        elif layers and targets and module not in targets and not _is_in_layers(module, layers):
            why = f"layers_to_transform is {shown(config['layers_to_transform'])}"
        else:
            continue
        raise Refusal(
            f"module {shown(module)} is none that its configuration adapts, since {why}; PEFT "
            "leaves it out when it loads the file: take it out, or mend the configuration."
        )


def _supported(pattern: object, modules: list[str]) -> str | None:
    """Give a pattern of targets, if it can be matched, in seconds at most."""
    if not isinstance(pattern, str) or pattern.lower() == "all-linear":
        return None
    with suppress(Refusal):
        if matching_work([f"(?:{pattern})"], modules) <= MAX_MATCHING:
            return pattern
    return None


def _names(config: Mapping[str, Any], key: str) -> set[str] | None:
    names = config.get(key)
    if not isinstance(names, list):
        return None
    return {name for name in names if isinstance(name, str)}


def ends_in(module: str, names: Collection[str]) -> bool:
    """Say whether the last components of a module's name, or all, are one of some names."""
    parts = module.split(".")
    return any(".".join(parts[start:]) in names for start in range(len(parts)))


def _begins_in(module: str, names: Collection[str]) -> bool:
    """Say whether the first components of a module's name, or all, are one of some names."""
    parts = module.split(".")
    return any(".".join(parts[:end]) in names for end in range(1, len(parts) + 1))


def _holds(module: str, names: Collection[str], lengths: Iterable[int]) -> bool:
    """Say whether components of a module's name that follow each other are one of some names."""
    parts = module.split(".")
    return any(
        ".".join(parts[start : start + length]) in names
        for length in lengths
        for start in range(len(parts) - length + 1)
    )


def check_names_work(modules: Collection[str], n_lengths: int = 0) -> None:
    """Check that comparing names of modules with others, of so many lengths, takes seconds."""
    letters = sum(len(module) * (module.count(".") + 1) for module in modules) * (1 + n_lengths)
    if letters > _MAX_LETTERS:
        raise Refusal(
            f"its {len(modules)} modules have names of so many components, or its configuration so "
            "many names, that comparing them takes too long; leave the adapter out."
        )


def _layers(config: Mapping[str, Any]) -> tuple[set[str], tuple[str, ...]] | None:
    """Give the numbers of the layers that are adapted, and what may stand before them."""
    layers, before = config.get("layers_to_transform"), config.get("layers_pattern")
    if layers is None or layers == []:
        return None
    wanted = {str(layer) for layer in (layers if isinstance(layers, list) else [layers])}
    plain = {before} if isinstance(before, str) else _names(config, "layers_pattern") or set()
    return wanted, tuple(plain) if all(map(_PLAIN.fullmatch, plain)) and len(plain) < 10 else ()


def _is_in_layers(module: str, layers: tuple[set[str], tuple[str, ...]]) -> bool:
    """Say whether a number in a name is one of the layers; versions differ in which of them."""
    wanted, before = layers
    parts = module.split(".")
    return any(
        part in wanted and (not before or ".".join(parts[:place]).endswith(before))
        for place, part in enumerate(parts[:-1])
    )
