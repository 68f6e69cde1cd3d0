r"""PEFT: ``adapter_model.safetensors`` beside ``adapter_config.json``.

Scale: alpha/r, or alpha/sqrt(r) with ``use_rslora`` (`peft/tuners/lora/layer.py`,
``update_layer``); AdaLoRA alpha/(r + 1e-5), with the r before pruning
(`peft/tuners/adalora/layer.py`, ``get_delta_weight``); LoHa and LoKr alpha/r
(`peft/tuners/loha/layer.py`, `peft/tuners/lokr/layer.py`). ``alpha_pattern`` wins over
``lora_alpha``; its keys are matched as ``(.*\.)?(KEY)$``, the first hit wins
(`peft/utils/other.py`), with the module's name or, of experts, the parameter's
(`peft/tuners/tuners_utils.py`, ``_inject_parameters``). r is that of the tensors. An ``.alpha`` of
a module, which other trainers write, has to agree with a configuration, which PEFT follows.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

from sklora._untrusted import Refusal, counted, shown
from sklora.io._build import (
    PRODUCT_ROLES,
    Modules,
    ScaleRule,
    add_role,
    alpha_over_rank,
    base_model_label,
    experts_of,
    has_suffix,
    left_out_of,
    make_plan,
    number,
    stated_scale,
    with_modules,
)
from sklora.io._pattern import first_match, matching_work
from sklora.io._plan import (
    AdapterPlan,
    Format,
    LeftOut,
    ModulePlan,
    ReadOptions,
    Scale,
    Source,
)
from sklora.io.formats._loaded import (
    MAX_MATCHING,
    SAVED_WHOLE,
    check_dora,
    check_methods,
    check_targets,
    is_of_pipeline,
    saved_whole,
)
from sklora.io.names import PREFIX, WRAPPERS, unwrapped

# Where diffusers keeps a configuration of PEFT for each component.
METADATA = "lora_adapter_metadata"
_ROLES = {
    "lora_A": "down",
    "lora_B": "up",
    "lora_embedding_A": "down",
    "lora_embedding_B": "up",
    "lora_E": "diagonal",
    "lora_magnitude_vector": "magnitude_out",
    **PRODUCT_ROLES,
}
_ROLE = re.compile(rf"(.+)\.({'|'.join(_ROLES)})(?:\.(?!bias$)[^.]+|\.[^.]+\.weight)?")
_TYPES = ("LORA", "ADALORA", "LOHA", "LOKR")
# These leave the base model as it is, so that B A is the whole update.
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica", "true", "false")
_CONV1D = 3
# Where configurations name modules.
_NAMES = ("target_modules", "exclude_modules", "rank_pattern", "alpha_pattern")
# Where the output projection of a MultiheadAttention is, whose settings are those of the whole.
ATTENTION_OUT = ".base_layer.out_proj"
_OF_A_PIPELINE = "diffusers, which looks at no adapter_config.json,"
# MoRA is a fork of PEFT.
_OTHER_BASES = ("use_qalora", "kasa_config", "use_bdlora", "use_mora")


def _matches(source: Source, options: ReadOptions) -> bool:
    # Other trainers' files may tell their scale themselves, whatever lies beside them.
    told = METADATA in source.metadata or has_suffix(source, ".alpha")
    stated = config_of(source) is not None and not told
    return any(
        (stated or name.startswith(PREFIX)) and _role_of(name) is not None
        for name in source.tensors
    )


def _matches_loosely(source: Source, options: ReadOptions) -> bool:
    return config_of(source) is not None or any(_role_of(name) for name in source.tensors)


def config_of(source: Source) -> Mapping[str, Any] | None:
    """Give the configuration beside a file, if it is PEFT's."""
    config = source.config
    return config if config is not None and "peft_type" in config else None


def _plan(source: Source, options: ReadOptions) -> AdapterPlan:
    config = config_of(source)
    modules: Modules = {}
    rest = []
    for name in source.tensors:
        found = _role_of(name)
        if found is None:
            rest.append(name)
        else:
            add_role(modules, found[0], found[1], name)
    left_out = left_out_of(_without_alphas(modules, rest)) + _pruned(source, modules)
    if config is None:
        rule = _rule_without_config(modules, options)
        plan = make_plan(source, options, "peft", modules, rule, left_out=left_out)
        check_lokr(source, plan)
        return plan
    check_config(config)
    for path in saved_whole(config, modules):
        left_out += [LeftOut(name, SAVED_WHOLE) for name in modules.pop(path).values()]
    targets = _targets(config)
    longest = max(map(len, targets), default=0)
    check_patterns(config, modules, max(len(targets), 1), longest)
    wrapped = _names_wrappers(config)

    def scale(path: str, tensors: Mapping[str, str], dimension: int | None) -> Scale:
        check_dora(path, tensors, bool(config.get("use_dora")))
        value = scale_of_config(config, _owner(path, wrapped), dimension)
        if "alpha" in tensors:
            # PEFT and transformers pass by a tensor that is called alpha.
            return alpha_over_rank(path, tensors, dimension)._replace(rival=value)
        if is_of_pipeline(path) and value != 1:
            why = f"{_OF_A_PIPELINE} takes 1 for module {shown(path)}, and PEFT {value:g};"
            return Scale(stated_scale(options, why))
        return Scale(value)

    label = base_model_label(config.get("base_model_name_or_path"))
    plan = make_plan(source, options, "peft", modules, scale, left_out=left_out, base_model=label)
    check_lokr(source, plan)
    check_methods(config, plan)
    check_targets(config, (_owner(module.path, wrapped) for module in plan.modules))
    return _with_experts(plan, config, targets)


FORMAT = Format(_matches, _plan)
# Names without the prefix, or of other methods: if no other format knows them.
BARE = Format(_matches_loosely, _plan)


def _role_of(name: str) -> tuple[str, str] | None:
    """Give module and role: ``<module>.<role>``, then the adapter's name and "weight" or not."""
    found = _ROLE.fullmatch(name)
    return None if found is None else (found[1], _ROLES[found[2]])


def _owner(path: str, wrapped: bool) -> str:
    """Give the module that a configuration means by its name."""
    name = path if wrapped else unwrapped(path)
    return name.removeprefix(PREFIX).removesuffix(ATTENTION_OUT)


def _names_wrappers(config: Mapping[str, Any]) -> bool:
    """Say whether a configuration is of a model in its wrappers, such as torch.compile's."""
    names: list[object] = []
    for value in map(config.get, _NAMES):
        names += value if isinstance(value, (list, Mapping)) else [value]
    texts = [name for name in names if isinstance(name, str)]
    return any(wrapper in text for text in texts for wrapper in WRAPPERS)


def _without_alphas(modules: Modules, rest: list[str]) -> list[str]:
    """Give each module its ``.alpha``, which PEFT does not write but others do, and the rest."""
    others = []
    for name in rest:
        path = name.removesuffix(".alpha")
        if path != name and path in modules:
            add_role(modules, path, "alpha", name)
        else:
            others.append(name)
    return others


def _pruned(source: Source, modules: Modules) -> list[LeftOut]:
    """Take out the modules of which AdaLoRA kept no rank, so that their update is zero."""
    empty = [
        path
        for path, tensors in modules.items()
        if "diagonal" in tensors and not any(source.tensors[name].size for name in tensors.values())
    ]
    reason = "AdaLoRA pruned its module, whose update is zero"
    return [LeftOut(name, reason) for path in empty for name in modules.pop(path).values()]


def _rule_without_config(modules: Modules, options: ReadOptions) -> ScaleRule:
    """Give the scales of a file that has no configuration beside it."""
    if all("alpha" in tensors for tensors in modules.values()):
        return alpha_over_rank
    value = stated_scale(
        options,
        "it has the keys of PEFT, but no adapter_config.json with a peft_type beside it, so "
        "its scale is not known; put that file there, or",
    )

    def scale(path: str, tensors: Mapping[str, str], dimension: int | None) -> Scale:
        return alpha_over_rank(path, tensors, dimension) if "alpha" in tensors else Scale(value)

    return scale


def check_lokr(source: Source, plan: AdapterPlan) -> None:
    """Refuse LoKr of a Conv1d: PEFT's `make_kron` adds the axis to w1 in front, not at the end."""
    for module in plan.modules:
        full = module.tensors.get("lokr_w2")
        if module.method == "lokr" and full and len(source.tensors[full].shape) == _CONV1D:
            raise Refusal(
                f"module {shown(module.path)} has lokr_w2 of shape {source.tensors[full].shape}: "
                "of a one-dimensional convolution PEFT's update is no Kronecker product, and not "
                "of low rank; read it with lokr='kronecker'."
            )


def check_config(config: Mapping[str, Any]) -> None:
    """Check that a configuration is of a method that is read, whose tensors are the whole update.

    Raises
    ------
    Refusal
        When it is of another, or the method changes the base model too.
    """
    kind = config["peft_type"]
    if kind not in _TYPES:
        detail = _DETAILS.get(kind, "") if isinstance(kind, str) else ""
        raise Refusal(
            f"peft_type {shown(kind)} is no low-rank update that sklora reads{detail}; it reads "
            f"{', '.join(_TYPES)}."
        )
    init = config.get("init_lora_weights")
    known = init.lower() if isinstance(init, str) else init
    if known not in _PLAIN_INITS:
        raise Refusal(
            f"init_lora_weights is {shown(init)}: that method changes the base model too, so B A "
            "is not the whole update. Convert the adapter to plain LoRA with save_pretrained(..., "
            "path_initial_model_for_weight_conversion=...) of PEFT."
        )
    for key in _OTHER_BASES:
        # To PEFT even an empty configuration is one.
        if config.get(key) not in (None, False):
            raise Refusal(f"{key} is set: its update is not B A times a scale, as sklora reads it.")
    if config.get("layer_replication"):
        raise Refusal(
            "layer_replication is set: it is an adapter of a model in which layers are repeated, "
            "and its names are not those of the base model."
        )


_DETAILS = {
    "VERA": " (the file does not tell the input width of each module)",
    "IA3": " (it multiplies activations)",
    "OFT": " (it rotates the weight)",
    "BOFT": " (it rotates the weight)",
    "FOURIERFT": " (its update has full rank)",
}


def scale_of_config(config: Mapping[str, Any], module: str, dimension: int | None) -> float:
    """Give the scale of one module by the rule of its ``peft_type``.

    Parameters
    ----------
    config : mapping
        Of PEFT, with a ``peft_type``.
    module : str
        Without PEFT's prefix.
    dimension : int or None
        The rank that the tensors tell.

    Returns
    -------
    float
    """
    kind = config["peft_type"]
    key = "lora_alpha" if kind in ("LORA", "ADALORA") else "alpha"
    if kind == "ADALORA":
        rank = _unpruned(config, module, _rank(dimension))
        alpha = number(config, key)
        return (alpha if alpha > 0 else rank) / (rank + 1e-5)
    if dimension is None:
        # LoKr of two full matrices: the tensors do not tell r.
        dimension = int(pattern_value(config, "rank_pattern", "r", module))
    return _alpha_by_rank(config, module, dimension, key)


def _unpruned(config: Mapping[str, Any], module: str, rank: int) -> int:
    """Give the rank before AdaLoRA pruned it, by which PEFT still divides.

    Its `rank_pattern` says of every singular value whether it was kept.
    """
    table = config.get("rank_pattern")
    kept = table.get(f"{module}.lora_E") if isinstance(table, Mapping) else None
    if isinstance(kept, list) and all(isinstance(one, bool) for one in kept):
        return len(kept) if sum(kept) == rank else rank
    return rank


def _alpha_by_rank(
    config: Mapping[str, Any], module: str, rank: int | None, key: str = "lora_alpha"
) -> float:
    """Give alpha/r of one module, or alpha/sqrt(r) with ``use_rslora``."""
    alpha = pattern_value(config, "alpha_pattern", key, module)
    # Configurations of LoHa and LoKr have no use_rslora, and PEFT ignores one.
    by_root = config.get("use_rslora") and key == "lora_alpha"
    return alpha / (math.sqrt(_rank(rank)) if by_root else _rank(rank))


def _rank(rank: int | None) -> int:
    if not rank or rank < 1:
        raise Refusal(f"a module has rank {rank}; a rank is at least 1.")
    return rank


def check_patterns(
    config: Mapping[str, Any], modules: Collection[str], n_repeats: int = 1, n_more: int = 0
) -> None:
    """Check that matching the patterns of a configuration with all modules takes seconds at most.

    Parameters
    ----------
    config : mapping
    modules : collection of str
    n_repeats : int, default=1
        How often all of that may happen: there are many target parameters, or configurations.
    n_more : int, default=0
        How many letters the names of target parameters may add to a module's.

    Raises
    ------
    Refusal
        When it may take longer, or a pattern cannot be matched.
    """
    tables = [config.get(name) for name in ("rank_pattern", "alpha_pattern")]
    patterns = [key for table in tables if isinstance(table, Mapping) for key in table]
    # Looking up the settings of a module takes longer than a step.
    work = n_repeats * (matching_work(patterns, modules, n_more) + 20 * len(modules))
    if work > MAX_MATCHING:
        raise Refusal(
            f"its {len(patterns)} patterns of ranks and alphas and {len(modules)} modules take "
            f"{work:.1e} steps to match, of at most {MAX_MATCHING:.0e}; write shorter patterns, or "
            "fewer and shorter target parameters or components."
        )


def pattern_value(config: Mapping[str, Any], patterns: str, default: str, module: str) -> float:
    """Give the number of the first pattern that a module's name matches, or is, or the default."""
    table = config.get(patterns) or {}
    if not isinstance(table, Mapping):
        raise Refusal(f"{patterns} is {shown(table)} in its configuration; it must be a mapping.")
    pattern = first_match(table, module)
    # `get_pattern_key` of PEFT then looks up the name itself: "a+b" does not match as a pattern.
    if pattern is None and module in table:
        pattern = module
    return number(config, default) if pattern is None else number(table, pattern)


def _targets(config: Mapping[str, Any]) -> list[str]:
    """Give the ``target_parameters``: stacked experts, of which a module may have several."""
    targets = config.get("target_parameters") or ()
    if not isinstance(targets, (list, tuple)):
        raise Refusal(f"target_parameters is {shown(targets)}; it must be a list of names.")
    return [target for target in targets if isinstance(target, str)]


def _with_experts(
    plan: AdapterPlan, config: Mapping[str, Any], targets: Sequence[str]
) -> AdapterPlan:
    """Split the updates of stacked experts, which share their tensors."""
    if not targets:
        return plan
    parameters: dict[str, set[str]] = {}
    for target in targets:
        parent, _, parameter = target.rpartition(".")
        parameters.setdefault(parent, set()).add(parameter)
    columns: dict[str, list[int]] = {}
    for module in plan.modules:
        columns.setdefault(_wrapped(module.path), []).append(module.rank)
    experts = (_experts(each, parameters, config, columns) for each in plan.modules)
    return with_modules(plan, chain.from_iterable(experts))


def _wrapped(path: str) -> str:
    """Give the module of a parameter; further ones of it are wrapped inside each other."""
    owner = path.removeprefix(PREFIX)
    while owner.endswith(".base_layer"):
        owner = owner.removesuffix(".base_layer")
    return owner


def _experts(
    module: ModulePlan,
    parameters: Mapping[str, set[str]],
    config: Mapping[str, Any],
    columns: Mapping[str, Sequence[int]],
) -> Iterator[ModulePlan]:
    path, owner = module.path.removeprefix(PREFIX), _wrapped(module.path)
    parts = owner.split(".")
    ends = (".".join(parts[start:]) for start in range(len(parts)))
    named = set[str]().union(*(parameters.get(end, ()) for end in ends))
    # A target without a module is a parameter of any: where the rank is that of several experts.
    loose = parameters.get("", ())
    if not named and (
        not loose or module.rank == int(pattern_value(config, "rank_pattern", "r", owner))
    ):
        yield module
        return
    rank, value = _settings_of_experts(
        config, owner, sorted(named.union(loose)), module.rank, columns[owner]
    )
    if rank < 1 or module.rank % rank or module.method != "lora":
        raise Refusal(
            f"module {shown(path)} has factors of {counted(module.rank, 'column')}, no whole "
            f"number of experts of rank r={shown(rank)}."
        )
    if 1 < rank < module.rank:
        _check_packing(path, config)
    yield from experts_of(module, rank, module.rank // rank, Scale(value))


def _check_packing(path: str, config: Mapping[str, Any]) -> None:
    """Refuse experts of which Unsloth stored the columns of lora_B in another order than PEFT.

    Until 2026.9.5 it did, for most models, and did not say so (`unsloth_zoo`,
    `temporary_patches/moe_utils.py`, ``saved_lora_b_layouts``).
    """
    # PEFT keeps auto_mapping alone when it saves the adapter again.
    told = [each for each in (config, config.get("auto_mapping")) if isinstance(each, Mapping)]
    details = [each.get("unsloth_fused_expert_lora") for each in told]
    told += [each for each in details if isinstance(each, Mapping)]
    layouts = [each["lora_B_layout"] for each in told if "lora_B_layout" in each]
    of_unsloth = any("unsloth_fixed" in each for each in told) or any(details)
    if any(layout != "rank_major" for layout in layouts) or (of_unsloth and not layouts):
        raise Refusal(
            f"module {shown(path)} has experts whose columns Unsloth may have stored in another "
            "order than PEFT's, by which PEFT would mix them; load the adapter with unsloth_zoo "
            "2026.9.6 or later and save it. Where they are in PEFT's order, lora_B_layout is "
            f"'rank_major' in its configuration, and not {shown(layouts)[1:-1] or 'missing'}."
        )


def _settings_of_experts(
    config: Mapping[str, Any],
    owner: str,
    parameters: Sequence[str],
    width: int,
    columns: Sequence[int],
) -> tuple[int, float]:
    """Give the rank of one expert, and the scale, of the factors of `width` columns."""
    settings = set()
    for parameter in parameters:
        name = f"{owner}.{parameter}"
        rank = int(pattern_value(config, "rank_pattern", "r", name))
        settings.add((rank, _alpha_by_rank(config, name, max(rank, 1))))
    if len(settings) > 1:
        # All parameters of a module have as many experts: PEFT gives "gate_up_proj" twice the rank.
        ranks = [rank for rank, _ in settings if rank > 0]
        counts = ({each // rank for rank in ranks if each % rank == 0} for each in columns)
        shared = set.intersection(*counts)
        settings = {setting for setting in settings if any(setting[0] * n == width for n in shared)}
    if len(settings) != 1:
        raise Refusal(
            f"its patterns of ranks and alphas tell the parameters {shown(parameters)[1:-1]} of "
            f"module {shown(owner)} apart, but its tensors do not."
        )
    return settings.pop()
