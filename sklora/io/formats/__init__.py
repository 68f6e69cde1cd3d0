"""The formats, told apart by content; the first that matches reads the file."""

from __future__ import annotations

from sklora.io._errors import Refusal, shown
from sklora.io._plan import AdapterPlan, Format, ReadOptions, Source
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

__all__ = ["FORMATS", "plan_adapter"]

# The more particular first: LyCORIS writes kohya's keys too, and XLabs those of diffusers.
FORMATS: tuple[Format, ...] = (
    custom.FORMAT,
    gguf.FORMAT,
    cloneofsimo.FORMAT,
    flux.XLABS,
    flux.BFL,
    diffusers.FORMAT,
    onetrainer.FORMAT,
    lycoris.FORMAT,
    kohya.FORMAT,
    mlx.FORMAT,
    peft.FORMAT,
)

_REFUSED = {
    "oft_diag": "OFT rotates the weight",
    "oft_blocks": "OFT rotates the weight",
    "oft_r": "OFT rotates the weight",
    "boft": "BOFT rotates the weight",
    "ia3_l": "IA3 multiplies activations",
    "on_input": "IA3 multiplies activations",
    "vera_lambda": "VeRA's file does not tell the input width of each module",
    "fourierft": "the update of FourierFT has full rank",
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
        When no format matches, or the one that does refuses the file.
    """
    for format in FORMATS:
        if format.matches(source, options):
            return format.plan(source, options)
    for name in source.tensors:
        for mark, why in _REFUSED.items():
            if mark in name:
                raise Refusal(f"tensor {shown(name)}: {why}, which is no low-rank update.")
    some = ", ".join(shown(name, 60) for name in list(source.tensors)[:3]) or "none"
    raise Refusal(
        f"its {len(source.tensors)} tensors are those of no adapter that sklora knows; the first "
        f"are {some}. If it is a LoRA with keys of its own, pass keys=('...{{module}}...', ...)."
    )
