"""LyCORIS: LoCon with a Tucker core, LoHa and LoKr, beside plain modules in kohya's keys.

Scale: alpha/r, with r the inner size of the stored factors; exactly 1 for LoKr of two full
matrices, which has none (`lycoris/modules/locon.py`, `loha.py`, `lokr.py`, ``__init__``). A missing
alpha, and an alpha of 0, means r. LyCORIS has one r; of two, loaders take that of ``hada_w1_b`` and
of ``lora_down`` (`comfy/weight_adapter/`). Its own `merge_to` applies the scale of LoHa and LoKr
twice, and its networks once, as others do.
"""

from __future__ import annotations

from sklora.io._build import PRODUCT_ROLES, alpha_over_rank, has_suffix, plan_by_suffix
from sklora.io._plan import AdapterPlan, Format, ReadOptions, Source
from sklora.io.formats.kohya import SUFFIXES as KOHYA

_OWN = {"lora_mid.weight": "mid", **PRODUCT_ROLES}
SUFFIXES = {**KOHYA, **_OWN}
_ENDINGS = tuple(f".{suffix}" for suffix in _OWN)


def _matches(source: Source, options: ReadOptions) -> bool:
    return has_suffix(source, *_ENDINGS)


def _plan(source: Source, options: ReadOptions) -> AdapterPlan:
    return plan_by_suffix(source, options, "lycoris", SUFFIXES, alpha_over_rank)


FORMAT = Format(_matches, _plan)
