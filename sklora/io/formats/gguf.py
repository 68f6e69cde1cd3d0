"""GGUF adapters of llama.cpp: ``<tensor>.weight.lora_a`` and ``.lora_b``.

Scale: ``adapter.lora.alpha``/r; an alpha of 0 means a scale of 1 (`src/llama-adapter.h`,
``get_scale``). Of token embeddings ``lora_a`` is (vocabulary, r) (`src/llama-adapter.cpp`). Of
stacked experts it is (experts, r, in), and ``lora_b`` (experts, out, r) (`src/llama-graph.cpp`,
``build_lora_mm_id``).
"""

from __future__ import annotations

from collections.abc import Mapping

from sklora._untrusted import Refusal, shown
from sklora.io._build import (
    base_model_label,
    by_module,
    left_out_of,
    make_plan,
    mark_stacks,
    split_stacks,
)
from sklora.io._plan import AdapterPlan, Format, ReadOptions, Scale, Source

_ALPHA = "adapter.lora.alpha"
_EMBEDDING = "token_embd"  # or Gemma's "per_layer_token_embd"


def _matches(source: Source, options: ReadOptions) -> bool:
    return source.container == "gguf"


def _plan(source: Source, options: ReadOptions) -> AdapterPlan:
    kind, method = (source.metadata.get(key) for key in ("general.type", "adapter.type"))
    if kind != "adapter" or method not in (None, "lora"):
        raise Refusal(
            f"it is GGUF with general.type {shown(kind)} and adapter.type {shown(method)}; a LoRA "
            "has 'adapter' and 'lora'. A whole model is no adapter."
        )
    try:
        alpha = float(source.metadata[_ALPHA])
    except (KeyError, ValueError):
        raise Refusal(f"it has no number {_ALPHA}; convert the adapter again.") from None

    def scale(path: str, tensors: Mapping[str, str], dimension: int | None) -> Scale:
        return Scale(alpha / max(dimension or 1, 1) if alpha else 1.0)

    suffixes = {"lora_a": "down", "lora_b": "up"}
    modules, rest = by_module(source.tensors, suffixes, strip=(".weight",))
    for path, factors in modules.items():
        if path.endswith(_EMBEDDING) and "down" in factors:
            factors["table"] = factors.pop("down")
    mark_stacks(source, modules, "down", "up")
    url = source.metadata.get("general.base_model.0.repo_url", "")
    label = base_model_label(url.removeprefix("https://huggingface.co/"))
    plan = make_plan(
        source, options, "gguf", modules, scale, left_out=left_out_of(rest), base_model=label
    )
    return split_stacks(source, plan)


FORMAT = Format(_matches, _plan)
