"""What every format does once it knows its keys: from tensors by role to a plan that holds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import chain, islice
from typing import Any, TypeGuard

import numpy as np

from sklora._untrusted import Refusal, shown
from sklora.io._plan import (
    AdapterPlan,
    LeftOut,
    ModulePlan,
    ReadOptions,
    Scale,
    SideTensor,
    Source,
)
from sklora.io._tensors import FLOAT_DTYPES, TensorInfo
from sklora.io.lowrank import METHODS, Shapes, dimension, method_of
from sklora.io.names import canonical_name

Modules = dict[str, dict[str, str]]
ScaleRule = Callable[[str, Mapping[str, str], int | None], Scale]

# Products (LoHa, LoKr) can imply far more numbers than a file holds. So many times the file's own
# are as many as their honest uses need; LoKr beyond can be read as lokr="kronecker".
MAX_EXPANSION = 128
MIN_NUMBERS = 2**20
# The largest models that are known have some 50,000 stacked matrices.
MAX_EXPERTS = 100_000
# Names of repositories have at most 96, those of files 255.
MAX_LABEL = 255

# LyCORIS and PEFT give the parts of LoHa and LoKr the same names, which are their roles.
PRODUCT_ROLES = {
    role: role
    for role in (
        *("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
        *("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
    )
}
MAGNITUDES = ("magnitude", "magnitude_out")
_SIDE_ROLES = ("alpha", *MAGNITUDES)


def by_module(
    tensors: Iterable[str], suffixes: Mapping[str, str], strip: Iterable[str] = ()
) -> tuple[Modules, tuple[str, ...]]:
    """Sort tensors by module and role.

    Parameters
    ----------
    tensors : iterable of str
    suffixes : mapping of str to str
        From the end of a name, of one or two components such as "lora_up.weight", or three such as
        "lora_A.default.weight", to the role.
    strip : iterable of str, default=()
        What else a module's name may end in, before a factor, and is not to.

    Returns
    -------
    modules : dict
        For every module its tensors by role.
    rest : tuple of str
        Tensors with no such suffix.
    """
    modules: Modules = {}
    rest = []
    for tensor in tensors:
        head, _, last = tensor.rpartition(".")
        path, _, middle = head.rpartition(".")
        if middle == "default":
            path, _, before = path.rpartition(".")
            middle = f"{before}.default"
        role = suffixes.get(f"{middle}.{last}")
        if role is None or not path:
            path, role = head, suffixes.get(last)
        if role is None or not path:
            rest.append(tensor)
            continue
        for ending in () if role in _SIDE_ROLES else strip:
            path = path.removesuffix(ending)
        add_role(modules, path, role, tensor)
    return modules, tuple(rest)


def add_role(modules: Modules, path: str, role: str, tensor: str) -> None:
    """Note a tensor of a module, which may have one for every role."""
    known = modules.setdefault(path, {})
    if role in known:
        raise Refusal(
            f"tensors {shown(known[role])} and {shown(tensor)} are both the {role} of module "
            f"{shown(path)}; the file holds two adapters, or mixes two formats: split it."
        )
    known[role] = tensor


def left_out_of(rest: Iterable[str]) -> list[LeftOut]:
    """Say why tensors that are no part of an update are left out."""
    return [LeftOut(name, _why_left_out(name)) for name in rest]


def _why_left_out(name: str) -> str:
    lower = f"{name.lower()}."
    for mark, reason in _MARKS:
        if mark in lower:
            return reason
    return "it is no part of a low-rank update"


_MARKS = (
    (".modules_to_save.", "a module that was saved whole"),
    (".original_module.", "the original of a module that was saved whole"),
    (".base_layer.", "a weight of the base model"),
    (".lora_velora_embed.", "what VeLoRA computes gradients with, which is no part of the update"),
    (".diff.", "a dense difference, which is no low-rank update"),
    (".diff_b.", "a dense difference, which is no low-rank update"),
    ("_norm", "a parameter of a normalisation layer"),
    ("norm.", "a parameter of a normalisation layer"),
    (".bias", "a bias"),
    ("emb", "an embedding that was saved whole"),
)


def has_suffix(source: Source, *suffixes: str) -> bool:
    """Tell whether any tensor's name ends so."""
    return any(name.endswith(suffixes) for name in source.tensors)


def make_plan(
    source: Source,
    options: ReadOptions,
    format: str,
    modules: Modules,
    scale: ScaleRule,
    *,
    left_out: Iterable[LeftOut] = (),
    base_model: str | None = None,
) -> AdapterPlan:
    """Check the tensors of every module, and give the plan.

    Parameters
    ----------
    source : Source
    options : ReadOptions
    format : str
        What the format is called.
    modules : dict
        As from `by_module`, with the roles of `sklora.io.lowrank` and "alpha", "magnitude" (whose
        axis its shape tells) and "magnitude_out".
    scale : callable
        ``scale(path, tensors, dimension)`` gives the scale of one module.
    left_out : iterable of LeftOut
    base_model : str or None

    Returns
    -------
    AdapterPlan

    Raises
    ------
    Refusal
        When a factor is missing, shapes do not fit, a rank is 0, two modules have one name, or the
        factors would be far larger than the file.
    """
    plans: list[ModulePlan] = []
    side: list[SideTensor] = []
    skipped = list(left_out)
    for path, tensors in modules.items():
        factors = {role: name for role, name in tensors.items() if role not in _SIDE_ROLES}
        if not factors:
            reason = "there is no update of this module"
            skipped += [LeftOut(name, reason) for name in tensors.values()]
            continue
        plan = _plan_module(source, options, path, tensors, factors, scale)
        plans.append(plan)
        for role in tensors.keys() & MAGNITUDES:
            known = _magnitude(source, plan, role, tensors[role])
            if isinstance(known, SideTensor):
                side.append(known)
            else:
                skipped.append(known)
    if not plans:
        raise Refusal(f"it has no LoRA factors, though its tensors look like {format}.")
    _check_names(plans)
    _check_expansion(source, plans)
    return AdapterPlan(
        format,
        tuple(sorted(plans, key=lambda plan: plan.name)),
        tuple(sorted(side)),
        tuple(skipped),
        base_model,
    )


def plan_by_suffix(
    source: Source,
    options: ReadOptions,
    format: str,
    suffixes: Mapping[str, str],
    scale: ScaleRule,
) -> AdapterPlan:
    """Plan a file in which names end in roles, as `by_module` sorts them and `make_plan` checks."""
    modules, rest = by_module(source.tensors, suffixes)
    return make_plan(source, options, format, modules, scale, left_out=left_out_of(rest))


def _plan_module(
    source: Source,
    options: ReadOptions,
    path: str,
    tensors: Mapping[str, str],
    factors: dict[str, str],
    scale: ScaleRule,
) -> ModulePlan:
    method = method_of(factors)
    if method is None:
        raise Refusal(
            f"module {shown(path)} has {', '.join(sorted(factors))} and no more, which make no "
            "update; the file is incomplete, or of a method that sklora does not know."
        )
    for name in tensors.values():
        _check_floats(name, source.tensors[name])
    if method == "lokr" and options.lokr == "kronecker":
        method = "lokr-kronecker"
    shapes = source.shapes(factors)
    try:
        n, m, rank = METHODS[method].size(shapes)
    except Refusal as error:
        raise Refusal(f"module {shown(path)}: {error}") from None
    if not n or not m or not rank:
        raise Refusal(
            f"module {shown(path)} has an update of shape ({n}, {m}) and rank {rank}; leave the "
            "module out of the file to say that its update is zero."
        )
    if "alpha" in tensors and source.tensors[tensors["alpha"]].size != 1:
        shape = source.tensors[tensors["alpha"]].shape
        raise Refusal(f"{shown(tensors['alpha'])} has shape {shape}, but alpha is one number.")
    _check_ranks(path, tensors, shapes)
    found = scale(path, tensors, dimension(shapes))
    if not math.isfinite(found.value):
        raise Refusal(f"module {shown(path)} has the scale {found.value}; it must be finite.")
    name = canonical_name(path) if options.names == "canonical" else path
    return ModulePlan(path, name, method, factors, n, m, rank, found)


def _check_ranks(path: str, tensors: Mapping[str, str], shapes: Shapes) -> None:
    """Refuse LoKr of two ranks: some loaders divide alpha by the one, some by the other."""
    ranks = [shapes[role][0] for role in ("lokr_w1_b", "lokr_w2_b") if role in shapes]
    if "alpha" in tensors and len(set(ranks)) > 1:
        raise Refusal(
            f"module {shown(path)} has parts of the ranks {ranks[0]} and {ranks[1]}: ComfyUI "
            "divides alpha by the latter, InvokeAI by the former; multiply a factor by the scale "
            "that is meant, and take alpha out of the file."
        )


def _check_floats(name: str, info: TensorInfo) -> None:
    """Check that a tensor holds floats; alpha may be an integer."""
    if info.dtype not in FLOAT_DTYPES and info.size != 1:
        raise Refusal(
            f"tensor {shown(name)} holds {info.dtype}, which are no weights; an adapter holds "
            f"{', '.join(FLOAT_DTYPES)}: dequantise it first."
        )


def _magnitude(source: Source, plan: ModulePlan, role: str, tensor: str) -> SideTensor | LeftOut:
    """Find the axis of a magnitude of DoRA.

    It is that of the output side, as in PEFT, or told by the shape: (out,), (out, 1, ...) or
    (1, in, ...).
    """
    shape = source.tensors[tensor].shape
    size = source.tensors[tensor].size
    if size == plan.n and (shape[:1] == (plan.n,) or role == "magnitude_out"):
        return SideTensor(f"{plan.name}:magnitude_out", tensor, size)
    across = len(shape) > 1 and shape[:2] == (1, size) and size and plan.m % size == 0
    if across and role == "magnitude":
        return SideTensor(f"{plan.name}:magnitude_in", tensor, size)
    return LeftOut(tensor, f"a magnitude of shape {shape} does not fit ({plan.n}, {plan.m})")


def _check_names(plans: Iterable[ModulePlan]) -> None:
    """Check that no two modules have one name."""
    known: dict[str, ModulePlan] = {}
    for plan in plans:
        other = known.setdefault(plan.name, plan)
        if other is not plan:
            # An expert may have the very name of another module.
            remedy = "split the file" if other.path == plan.path else "pass names='raw'"
            raise Refusal(
                f"modules {shown(other.path)} and {shown(plan.path)} are both called "
                f"{shown(plan.name)}; {remedy}."
            )


def mark_stacks(source: Source, modules: Modules, a: str, b: str) -> None:
    """Give the factors of stacked experts, which have more axes, roles of their own."""
    for tensors in modules.values():
        shapes = [source.tensors[tensors[role]].shape for role in (a, b) if role in tensors]
        if len(shapes) == 2 and max(map(len, shapes)) > 2:
            tensors["stack_a"], tensors["stack_b"] = tensors.pop(a), tensors.pop(b)


def split_stacks(source: Source, plan: AdapterPlan) -> AdapterPlan:
    """Make a module of every expert of the stacks that `mark_stacks` found."""

    def experts(module: ModulePlan) -> Iterator[ModulePlan]:
        if module.method != "lora-stack":
            yield module
            return
        count = source.tensors[module.tensors["stack_b"]].shape[0]
        yield from experts_of(module, module.rank // count, count, module.scale)

    return with_modules(plan, chain.from_iterable(map(experts, plan.modules)))


def experts_of(module: ModulePlan, rank: int, count: int, scale: Scale) -> Iterator[ModulePlan]:
    """Give the updates of stacked experts, which share their tensors."""
    for place in range(count):
        yield module._replace(
            path=f"{module.path}.{place}",
            name=f"{module.name}.{place}",
            rank=rank,
            scale=scale,
            part=(place, count),
        )


def with_modules(plan: AdapterPlan, modules: Iterable[ModulePlan]) -> AdapterPlan:
    """Put experts in place of their stacks, if no model has as many."""
    taken = tuple(islice(modules, MAX_EXPERTS + 1))
    if len(taken) > MAX_EXPERTS:
        raise Refusal(f"it has over {MAX_EXPERTS} experts, more than any model.")
    _check_names(taken)
    return replace(plan, modules=taken)


def _check_expansion(source: Source, plans: Iterable[ModulePlan]) -> None:
    # Archives may hold numbers in less than a byte: those of zeros, or of one storage many times.
    stored = min(sum(info.size for info in source.tensors.values()), source.size)
    needed = sum((plan.n + plan.m) * plan.rank for plan in plans)
    if needed > max(MAX_EXPANSION * stored, MIN_NUMBERS):
        largest = max(plans, key=lambda plan: (plan.n + plan.m) * plan.rank)
        remedy = _REMEDIES.get(largest.method, "leave the adapter out")
        raise Refusal(
            f"its exact factors have {needed:.2e} numbers, but the file holds at most {stored}; "
            f"module {shown(largest.path)} alone is an update ({largest.n}, {largest.m}) of rank "
            f"{largest.rank}; {remedy}."
        )


_REMEDIES = {
    "lokr": "read it with lokr='kronecker'",
    "loha": "extract a plain LoRA of a lower rank from it",
}


def alpha_over_rank(path: str, tensors: Mapping[str, str], dimension: int | None) -> Scale:
    """Scale as kohya's trainer and LyCORIS have it: alpha/r, 1 without alpha or without a rank."""
    if "alpha" not in tensors or dimension is None:
        return Scale(1.0)
    return Scale(1.0 / max(dimension, 1), tensors["alpha"])


def alpha_rule(source: Source, options: ReadOptions) -> ScaleRule:
    """Scale by alpha/r, unless an alpha in the metadata is all that a file tells.

    It may be meant, as in files of MiniMax-H3, where diffusers heeds it, or not, as in others.
    """
    said = source.metadata.get("alpha")
    alpha = None if said is None or has_suffix(source, ".alpha") else _parsed(said)
    if alpha is None:
        return alpha_over_rank

    def scale(path: str, tensors: Mapping[str, str], dimension: int | None) -> Scale:
        if alpha == dimension:
            return Scale(1.0)
        why = f"its metadata name the alpha {shown(said)}, which loaders heed for some models only;"
        return Scale(stated_scale(options, why))

    return scale


def _parsed(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def stated_scale(options: ReadOptions, why: str) -> float:
    """Give the scale that the caller stated, for files that do not tell it themselves."""
    if options.scale is None:
        raise Refusal(f"{why} pass scale=, the factor s of the update s B A.")
    return float(options.scale)


def number(settings: Mapping[str, Any], key: str) -> float:
    """Give a finite number from a configuration."""
    value = settings.get(key)
    if not is_finite(value):
        raise Refusal(f"{key} is {shown(value)} in its configuration; it must be a number.")
    return float(value)


def is_finite(value: object) -> TypeGuard[float]:
    """Tell whether a value is a finite number, of Python or of NumPy."""
    if not isinstance(value, (float, int, np.floating, np.integer)) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def base_model_label(value: object) -> str | None:
    """Shorten what a configuration calls its base model to a label.

    A folder of the Hugging Face cache becomes the repository's name, another absolute path its last
    component; nothing is ever opened.

    Raises
    ------
    Refusal
        When it is longer than names are, so that a table would be as wide in every line.
    """
    label = _base_model_label(value)
    if label is not None and len(label) > MAX_LABEL:
        raise Refusal(
            f"the name of its base model {shown(label)} has {len(label)} characters, of at most "
            f"{MAX_LABEL}; shorten it."
        )
    return label


def _base_model_label(value: object) -> str | None:
    if not isinstance(value, str) or not value.strip():
        return None
    parts = value.replace("\\", "/").rstrip("/").split("/")
    for part in parts:
        if part.startswith("models--"):
            return part.removeprefix("models--").replace("--", "/")
    is_path = parts[0] in ("", ".", "..", "~") or parts[0].endswith(":") or len(parts) > 2
    return parts[-1] if is_path else "/".join(parts)
