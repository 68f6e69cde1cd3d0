"""OneTrainer: kohya's keys with the prefix ``lora_transformer_`` or ``lora_prior_``.

Scale: alpha/r (`modules/module/LoRAModule.py`).
"""

from __future__ import annotations

from sklora.io._build import alpha_over_rank, plan_by_suffix
from sklora.io._plan import AdapterPlan, Format, ReadOptions, Source
from sklora.io.formats.lycoris import SUFFIXES

_PREFIXES = ("lora_transformer_", "lora_prior_unet_")


def _matches(source: Source, options: ReadOptions) -> bool:
    return any(name.startswith(_PREFIXES) for name in source.tensors)


def _plan(source: Source, options: ReadOptions) -> AdapterPlan:
    return plan_by_suffix(source, options, "onetrainer", SUFFIXES, alpha_over_rank)


FORMAT = Format(_matches, _plan)
