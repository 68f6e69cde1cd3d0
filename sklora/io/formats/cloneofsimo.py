"""cloneofsimo/lora: ``unet:0:up``, ``unet:0:down``, or a ``.pt`` list of up, down, up, down, ...

Scale: 1 (`lora_diffusion/lora.py`; the scale is an argument of whoever loads it). Modules have no
names; they are numbered in the order in which the trainer met them.
"""

from __future__ import annotations

from sklora._untrusted import Refusal
from sklora.io._build import Modules, add_role, make_plan
from sklora.io._plan import AdapterPlan, Format, LeftOut, ReadOptions, Scale, Source

_ENDINGS = (":up", ":down")


def _is_list(source: Source) -> bool:
    return list(source.tensors) == [str(place) for place in range(len(source.tensors))]


def _matches(source: Source, options: ReadOptions) -> bool:
    pickled = source.container == "torch-zip" and bool(source.tensors) and _is_list(source)
    return pickled or any(name.endswith(_ENDINGS) for name in source.tensors)


def _plan(source: Source, options: ReadOptions) -> AdapterPlan:
    modules: Modules = {}
    left_out = []
    if _is_list(source):
        if len(source.tensors) % 2:
            raise Refusal(
                f"it lists an odd number of tensors, {len(source.tensors)} in all, so no pairs up, "
                "down."
            )
        for place, name in enumerate(source.tensors):
            add_role(modules, str(place // 2), ("up", "down")[place % 2], name)
    else:
        for name in source.tensors:
            path, _, role = name.rpartition(":")
            if role in ("up", "down") and path:
                add_role(modules, path, role, name)
            else:
                left_out.append(LeftOut(name, "an embedding of textual inversion"))
    return make_plan(
        source, options, "cloneofsimo", modules, lambda *_: Scale(1.0), left_out=left_out
    )


FORMAT = Format(_matches, _plan)
