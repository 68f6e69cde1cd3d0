"""In-house keys, by two patterns that the user gives: of ``A (r, in)`` and of ``B (out, r)``.

Scale: 1, or what the user states.
"""

from __future__ import annotations

from sklora._untrusted import Refusal, shown
from sklora.io._build import Modules, add_role, left_out_of, make_plan
from sklora.io._plan import AdapterPlan, Format, ReadOptions, Scale, Source

PLACEHOLDER = "{module}"


def check_keys(keys: object) -> None:
    """Check the argument `keys` of `sklora.io.read_adapters`."""
    ok = isinstance(keys, tuple) and len(keys) == 2 and all(isinstance(key, str) for key in keys)
    if not ok or any(key.count(PLACEHOLDER) != 1 for key in keys) or keys[0] == keys[1]:  # type: ignore[index,attr-defined]
        raise ValueError(
            f"keys is {keys!r}; pass two patterns, of A (r, in) and of B (out, r), that hold "
            f"{PLACEHOLDER!r} once, such as ('w_a_{{module}}', 'w_b_{{module}}')."
        )


def _matches(source: Source, options: ReadOptions) -> bool:
    return options.keys is not None


def _plan(source: Source, options: ReadOptions) -> AdapterPlan:
    modules: Modules = {}
    rest = []
    for name in source.tensors:
        for role, pattern in zip(("down", "up"), options.keys or (), strict=False):
            before, _, after = pattern.partition(PLACEHOLDER)
            middle = name[len(before) : len(name) - len(after)]
            if middle and name == f"{before}{middle}{after}":
                add_role(modules, middle, role, name)
                break
        else:
            rest.append(name)
    if not modules:
        some = ", ".join(shown(name, 60) for name in rest[:3])
        raise Refusal(f"no tensor has a name as keys={options.keys!r} say; the first are {some}.")
    value = 1.0 if options.scale is None else options.scale
    return make_plan(
        source, options, "custom", modules, lambda *_: Scale(value), left_out=left_out_of(rest)
    )


FORMAT = Format(_matches, _plan)
