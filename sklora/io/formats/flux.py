"""FLUX in the names of its makers: XLabs' attention processors, and BFL's control adapters.

Scale: XLabs 1, since its alpha is not saved (`x-flux/src/flux/modules/layers.py`); BFL's control
adapters are applied with a scale that the user states (`flux/src/flux/modules/lora.py`).
"""

from __future__ import annotations

from sklora.io._build import has_suffix, plan_by_suffix, stated_scale
from sklora.io._plan import AdapterPlan, Format, ReadOptions, Scale, Source

_BLOCKS = ("double_blocks.", "single_blocks.")


def _in_blocks(source: Source) -> bool:
    return any(name.removeprefix("diffusion_model.").startswith(_BLOCKS) for name in source.tensors)


def _matches_xlabs(source: Source, options: ReadOptions) -> bool:
    processors = any(".processor." in name for name in source.tensors)
    return processors and _in_blocks(source) and has_suffix(source, ".down.weight")


def _plan_xlabs(source: Source, options: ReadOptions) -> AdapterPlan:
    suffixes = {"down.weight": "down", "up.weight": "up"}
    return plan_by_suffix(source, options, "xlabs", suffixes, lambda *_: Scale(1.0))


def _matches_bfl(source: Source, options: ReadOptions) -> bool:
    bare = any(name.startswith(_BLOCKS) for name in source.tensors)
    return bare and has_suffix(source, ".lora_A.weight")


def _plan_bfl(source: Source, options: ReadOptions) -> AdapterPlan:
    suffixes = {"lora_A.weight": "down", "lora_B.weight": "up"}
    value = stated_scale(options, "BFL's adapters do not say their scale (flux's default is 1);")
    return plan_by_suffix(source, options, "bfl", suffixes, lambda *_: Scale(value))


XLABS = Format(_matches_xlabs, _plan_xlabs)
BFL = Format(_matches_bfl, _plan_bfl)
