"""What the displays share: axes, colours, markers, and labels that fit."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from numpy.typing import ArrayLike

from sklora._files import check_place, replacing

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

# For categories: the palette of Okabe and Ito, which colour-blind readers can tell apart. The first
# four differ in greyscale too; of further ones only the markers do. Yellow is faint on white: last.
BLUE, ORANGE, BLACK, VERMILLION = "#0072B2", "#E69F00", "#000000", "#D55E00"
SKY, GREEN, PURPLE, YELLOW = "#56B4E9", "#009E73", "#CC79A7", "#F0E442"
PALETTE = (BLUE, ORANGE, BLACK, VERMILLION, SKY, GREEN, PURPLE, YELLOW)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")

# For numbers: even steps of lightness, for everyone.
COLORMAP = "cividis"

_LONGEST_LABEL = 40


def check_matplotlib(caller: str) -> None:
    """Raise ImportError, with the remedy, where there is no matplotlib.

    Parameters
    ----------
    caller : str
        What needs it.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"{caller} requires matplotlib. You can install it with `pip install 'sklora[plot]'`."
        ) from error


def axes_of(display: object, ax: Axes | None, size: tuple[float, float]) -> Axes:
    """Give the axes to plot on: a new figure of `size` inches if there are none.

    Parameters
    ----------
    display : object
        Whose `plot` this is for.
    ax : matplotlib Axes or None
    size : (float, float)

    Returns
    -------
    matplotlib Axes
    """
    check_matplotlib(f"{type(display).__name__}.plot")
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    _, new = plt.subplots(figsize=size, layout="constrained")
    return new


def styled(
    style: Mapping[str, Any], given: Mapping[str, Any] | None, artist: type[Artist]
) -> dict[str, Any]:
    """Override a style by what the user gave, under any of its names: ``c`` is ``color``.

    Parameters
    ----------
    style : dict
        By the names that matplotlib documents first.
    given : dict or None
    artist : type
        What is drawn, which has the names.

    Returns
    -------
    dict
    """
    from matplotlib.cbook import normalize_kwargs

    return {**style, **normalize_kwargs(dict(given or {}), artist)}


def windowless_axes(caller: str, size: tuple[float, float] | None = None) -> Axes:
    """Give axes of a new figure that no window shows, so that nothing is left open.

    Parameters
    ----------
    caller : str
        What needs it.
    size : (float, float) or None, default=None
        Of the figure, in inches.

    Returns
    -------
    matplotlib Axes
    """
    check_matplotlib(caller)
    from matplotlib.figure import Figure

    return Figure(figsize=size, layout="constrained").subplots()


def ending_of(path: str | os.PathLike[str]) -> str:
    """Give the ending of a name, by which a figure's format is told: ``"png"``."""
    return os.path.splitext(path)[1].removeprefix(".").lower()


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure into a file, which appears under its name when it is complete."""
    check_place(path, f"path={os.fspath(path)!r}")
    with replacing(os.path.realpath(path)) as file:
        figure.savefig(file.name, format=ending_of(path) or "png", dpi=150)


def plain_labels(axis: Axis, positions: ArrayLike, labels: Iterable[str]) -> None:
    """Set tick labels that stand as they are: ``$`` and ``_`` are no mathematics in a name."""
    axis.set_ticks(positions, list(labels), parse_math=False)


def whole_numbers(axis: Axis) -> None:
    """Put ticks at integers alone."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def short_names(names: Sequence[str]) -> tuple[str, list[str]]:
    """Leave out the components that all dotted names begin with, and the middle of long ones.

    Parameters
    ----------
    names : sequence of str

    Returns
    -------
    prefix : str
        What was left out at the beginning, with its dot; empty if nothing was.
    short : list of str

    Examples
    --------
    >>> from sklora.inspection._plotting import short_names
    >>> short_names(["model.layers.0.q", "model.layers.1.q"])
    ('model.layers.', ['0.q', '1.q'])
    """
    parts = [name.split(".") for name in names]
    least = min(map(len, parts)) - 1
    common = 0
    while common < least and len({part[common] for part in parts}) == 1:
        common += 1
    prefix = "".join(f"{part}." for part in parts[0][:common])
    return prefix, [shortened(".".join(part[common:])) for part in parts]


def shortened(name: str) -> str:
    """Leave out the middle of a long name."""
    if len(name) <= _LONGEST_LABEL:
        return name
    half = (_LONGEST_LABEL - 1) // 2
    return f"{name[:half]}…{name[-half:]}"


def room_for_labels(axes: Axes, size: float) -> int:
    """How many lines of text of `size` points fit beside axes."""
    inches = axes.get_window_extent().height / axes.figure.dpi
    return max(2, int(inches * 72 / (1.25 * size)))
