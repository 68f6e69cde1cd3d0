"""The formats, told apart by content; the first that matches reads the file."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping

from sklora._untrusted import Refusal, counted, shown
from sklora.io._plan import AdapterPlan, Format, ModulePlan, ReadOptions, Source
from sklora.io.formats import (
    cloneofsimo,
    custom,
    diffusers,
    flux,
    gguf,
    kohya,
    lycoris,
    mlx,
    onetrainer,
    peft,
)
from sklora.io.formats._loaded import SAVED_WHOLE
from sklora.io.names import canonical_name

__all__ = ["FORMATS", "plan_adapter"]

# The more particular first: LyCORIS writes kohya's keys too, XLabs those of diffusers, and PEFT
# some of LyCORIS's.
FORMATS: tuple[Format, ...] = (
    custom.FORMAT,
    gguf.FORMAT,
    peft.FORMAT,
    cloneofsimo.FORMAT,
    flux.XLABS,
    flux.BFL,
    diffusers.FORMAT,
    onetrainer.FORMAT,
    lycoris.FORMAT,
    kohya.FORMAT,
    mlx.FORMAT,
    peft.BARE,
)

_PACKED = {"weights", "ranks", "ids"}
_OFT = "OFT rotates the weight, which is no low-rank update"
# What any trainer calls the factors of an update.
_FACTOR = re.compile(
    r"(?:^|\.)(?:lora_(?:down|up|mid|[ABEab]|embedding_[AB])|hada_[wt]\d(?:_[ab])?"
    r"|lokr_[wt]\d(?:_[ab])?)(?:\.(?!alpha$|bias$)[^.]+){0,2}$"
    r"|lora(?:\d|_linear_layer)?\.(?:down|up)\.weight$|:(?:down|up)$"
    r"|lora_latent_mapping\.weight$"  # of LoRA-XS, between A and B, which it does not train
)
# Numbers by which some trainers multiply an update.
_SCALE = re.compile(r"\.(?:(?:lora_|network_)?alpha|(?:lora_)?scal(?:e|ar|ing))(?:\.default)?$")
# Whole weights, which ComfyUI takes in place of the factors of a module, and AUTOMATIC1111 adds.
_DENSE = {"diff", "set_weight", "w_norm", "bias"}
# By which sd-scripts finds alpha and rank of a module, wherever they stand in a name behind it.
_MARKS = re.compile("alpha|lora_down|hada_|lokr_")
# How modules of FLUX begin in the names of its makers, and in those of diffusers.
_FLUX = (
    ("transformer.double_blocks.", "transformer.single_blocks."),
    ("transformer.transformer_blocks.", "transformer.single_transformer_blocks."),
)
# By how a component of a tensor's name begins.
_REFUSED = {
    **dict.fromkeys(("oft_diag", "oft_blocks", "oft_r", "oft_R"), _OFT),
    "boft_": "BOFT rotates the weight, which is no low-rank update",
    **dict.fromkeys(("ia3_l", "on_input"), "IA3 multiplies activations: no low-rank update"),
    "hira_": "HiRA multiplies the weight, which is no low-rank update",
    "vera_lambda_": "VeRA's update needs the input width of each module, which no file tells",
    "ranknum": "PEFT's AdaLoRA divides its scale by it, which no trainer stores",
    "fourierft_": "the update of FourierFT has full rank",
    "lambda_layer": "T-LoRA's update is a difference to its initial factors, which no file holds",
    "bias_indices": "a sparse part belongs to the update, which is then not of low rank",
    "a1.weight": "GLoRA multiplies the weight, which is no low-rank update",
    "lora_controlnet": "a control LoRA is a network of its own, which diffusers scales otherwise",
    "lora_a.weight": "torchtune's checkpoints are read after its export to PEFT",
}


def plan_adapter(source: Source, options: ReadOptions) -> AdapterPlan:
    """Find the format of a file, and how it is read.

    Parameters
    ----------
    source : Source
    options : ReadOptions

    Returns
    -------
    AdapterPlan

    Raises
    ------
    Refusal
        When no format matches, the one that does refuses the file, or some of the file is of a
        method that is not read, or of another format: leaving that out would give a part of the
        update for the whole.
    """
    if not source.tensors:
        raise Refusal("it holds no tensors; download it again, or save it again with its weights.")
    for format in FORMATS:
        if format.matches(source, options):
            plan = format.plan(source, options)
            if format is not custom.FORMAT:
                named = {canonical_name(module.path): module for module in plan.modules}
                _refuse_settings(source, plan)
                _refuse_two_namings(named)
                _refuse_left_out(source, plan, named)
            return plan
    _refuse_methods(source.tensors)
    if source.tensors.keys() == _PACKED:
        raise Refusal("it is a zoo that LoRACollection.save wrote; use LoRACollection.open.")
    if dense := [name for name in source.tensors if name.endswith(".diff")]:
        raise Refusal(
            f"tensor {shown(dense[0])} is a dense difference, which is no low-rank update, and the "
            "file has no other; extract a LoRA from it."
        )
    some = ", ".join(shown(name, 60) for name in list(source.tensors)[:3])
    raise Refusal(
        f"no adapter that sklora knows has its {counted(len(source.tensors), 'tensor')}, such as "
        f"{some}. If it is a LoRA with keys of its own, pass keys=('...{{module}}...', ...)."
    )


def _refuse_left_out(source: Source, plan: AdapterPlan, named: Mapping[str, ModulePlan]) -> None:
    """Refuse a file of which what is left out may be a part of the update."""
    left_out = {name: why for name, why in plan.left_out if source.tensors[name].size}
    if left_out:
        _refuse_methods(left_out)
        _refuse_factors(left_out, plan.format)
        _refuse_scales(source, left_out, plan, named)
        _refuse_dense(source, left_out, named)


def _refuse_methods(tensors: Iterable[str]) -> None:
    """Refuse tensors of methods whose updates are not read."""
    for name in tensors:
        for mark, why in _REFUSED.items():
            if f".{mark}" in f".{name}":
                raise Refusal(f"tensor {shown(name)}: {why}.")


def _refuse_factors(tensors: Mapping[str, str], format: str) -> None:
    """Refuse factors that the format of the file does not know."""
    for name, why in tensors.items():
        if why != SAVED_WHOLE and _FACTOR.search(name):
            raise Refusal(
                f"tensor {shown(name)} is a factor of an update, but no adapter of the format "
                f"{format} has it; the file mixes two formats: split it, or is of a method that "
                "sklora does not read."
            )


def _refuse_settings(source: Source, plan: AdapterPlan) -> None:
    """Refuse settings of diffusers beside others' keys, which it loads by these settings."""
    if peft.METADATA in source.metadata and plan.format != "diffusers":
        raise Refusal(
            f"its metadata entry {peft.METADATA} is that of diffusers, which scales by it, but its "
            f"keys are of the format {plan.format}, whose loaders do not; take the entry out."
        )


def _refuse_two_namings(names: Collection[str]) -> None:
    """Refuse FLUX in two namings: of two updates of one module ComfyUI applies the last alone."""
    one, other = (next((name for name in names if name.startswith(kind)), "") for kind in _FLUX)
    if one and other:
        raise Refusal(
            f"modules {shown(one)} and {shown(other)} are named as FLUX's makers and as diffusers "
            "name them, so that two may be one, of which loaders apply one update; split the file."
        )


def _refuse_scales(
    source: Source, tensors: Iterable[str], plan: AdapterPlan, named: Mapping[str, ModulePlan]
) -> None:
    """Refuse numbers that may be scales of modules, where the format of the file has none."""
    paths = {module.path for module in plan.modules}
    # As in HCP-Diffusion: "x.alpha" beside "x.layer.lora_up.weight".
    wrappers = Counter(path.rpartition(".")[0] for path in paths)
    # As OneTrainer once wrote LoHa: "x_q.alpha" beside "x.q.hada_w1_a".
    flat = {path.replace(".", "_") for path in paths}
    for name in tensors:
        first, _, rest = name.partition(".")
        found = _SCALE.search(name)
        if first in paths and _MARKS.search(rest):
            owner = first
        elif found and source.tensors[name].size == 1:
            owner = name[: found.start()]
        else:
            continue
        # For ComfyUI "x.to_q.alpha" belongs to "x.to_q_lora.up.weight".
        around = paths & {owner.rpartition(".")[0], f"{owner}_lora"}
        called = owner.replace(".", "_") in flat or canonical_name(owner) in named
        if around or called or wrappers[owner] == 1:
            raise Refusal(
                f"tensor {shown(name)} may be the scale of a module, but no adapter of the format "
                f"{plan.format} has it there; multiply a factor by what it means, and take it out "
                "of the file, or pass keys= and scale=."
            )


def _refuse_dense(source: Source, tensors: Iterable[str], named: Mapping[str, ModulePlan]) -> None:
    """Refuse whole weights of modules that have factors, too: loaders take one of them, or both."""
    for name in tensors:
        owner, _, role = name.rpartition(".")
        if role not in _DENSE:
            continue
        # For ComfyUI "x.to_q.diff" belongs to "x.to_q_lora.up.weight".
        same = map(canonical_name, (owner, f"{owner}_lora"))
        module = next((named[name] for name in same if name in named), None)
        if module is None:
            continue
        # A bias that is one has but a number for every row.
        if role != "bias" or source.tensors[name].size == module.n * module.m > module.n:
            raise Refusal(
                f"tensor {shown(name)} is dense, but module {shown(module.path)} has factors as "
                "well: some loaders take the one, some the others, or both; take one of them out."
            )
