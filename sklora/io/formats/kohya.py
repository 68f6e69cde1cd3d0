"""kohya's sd-scripts: ``lora_unet_...``, ``lora_te_...``, with dots written as underscores.

Scale: alpha/r; a missing alpha means r, and so does an alpha of 0 (`networks/lora.py`; ComfyUI
reads 0 as 0). Metadata such as ``ss_network_alpha`` is often wrong and is not used. FLUX files
trained with ``split_qkv`` have 3 or 4 times the rank with alpha unchanged; they are scaled as
loaders scale them, by the rank of the tensors.
"""

from __future__ import annotations

from sklora.io._build import alpha_rule, has_suffix, plan_by_suffix
from sklora.io._plan import AdapterPlan, Format, ReadOptions, Source

SUFFIXES = {
    "lora_down.weight": "down",
    "lora_up.weight": "up",
    "alpha": "alpha",
    "dora_scale": "magnitude",
}


def _matches(source: Source, options: ReadOptions) -> bool:
    return has_suffix(source, ".lora_down.weight", ".lora_up.weight")


def _plan(source: Source, options: ReadOptions) -> AdapterPlan:
    return plan_by_suffix(source, options, "kohya", SUFFIXES, alpha_rule(source, options))


FORMAT = Format(_matches, _plan)
