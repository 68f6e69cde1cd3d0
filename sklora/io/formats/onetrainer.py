"""OneTrainer: kohya's keys with the prefix ``lora_transformer_`` or ``lora_prior_``.

Scale: alpha/r (`modules/module/LoRAModule.py`).
"""

from __future__ import annotations

from sklora.io._build import alpha_over_rank, by_module, left_out_of, make_plan
from sklora.io._plan import AdapterPlan, Format, ReadOptions, Source
from sklora.io.formats.lycoris import SUFFIXES

_PREFIXES = ("lora_transformer_", "lora_prior_unet_")


def _matches(source: Source, options: ReadOptions) -> bool:
    return any(name.startswith(_PREFIXES) for name in source.tensors)


def _plan(source: Source, options: ReadOptions) -> AdapterPlan:
    modules, rest = by_module(source.tensors, SUFFIXES)
    left_out = left_out_of(rest)
    return make_plan(source, options, "onetrainer", modules, alpha_over_rank, left_out=left_out)


FORMAT = Format("onetrainer", _matches, _plan)
