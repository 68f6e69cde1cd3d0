"""The one door to progress bars."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any, TextIO, TypeVar

T = TypeVar("T")

Advance = Callable[..., None]


@contextmanager
def progress(total: int, what: str, unit: str, verbose: int = 1) -> Iterator[Advance]:
    """Show how far some work is, on standard error and for as long as it lasts.

    Parameters
    ----------
    total : int
        How many units there are.
    what : str
        Stands before the bar.
    unit : str
        What is counted, in the singular.
    verbose : int, default=1
        At 0 there is no bar. Nor is there one where standard error is no terminal, or in a process
        that works for another.

    Yields
    ------
    callable
        ``advance(n, **numbers)`` moves the bar by `n` units and shows the numbers behind it.
    """
    if not (verbose and _has_terminal()):
        yield _nothing
        return
    from tqdm import tqdm

    with tqdm(total=total, desc=what, unit=unit, file=sys.stderr, leave=False) as bar:

        def advance(n: int = 1, **numbers: Any) -> None:
            if numbers:
                bar.set_postfix(numbers, refresh=False)
            bar.update(n)

        yield advance


def track(items: Collection[T], what: str, unit: str, verbose: int = 1) -> Iterator[T]:
    """Go through items with a progress bar.

    Parameters
    ----------
    items : collection
    what, unit, verbose
        As for `progress`.

    Yields
    ------
    item
    """
    with progress(len(items), what, unit, verbose) as advance:
        for item in items:
            yield item
            advance()


def write(text: str, stream: TextIO | None = None, end: str = "\n") -> None:
    """Write a line to a stream, by default standard output, past any progress bar."""
    from tqdm import tqdm

    tqdm.write(text, stream, end)


def _has_terminal() -> bool:
    # Worker processes share the terminal of their parent, whose bar it is.
    is_worker = multiprocessing.parent_process() is not None
    # Services put a stream that has `write` alone there, or close it.
    is_closed, isatty = getattr(sys.stderr, "closed", False), getattr(sys.stderr, "isatty", None)
    return not is_worker and not is_closed and isatty is not None and bool(isatty())


def _nothing(n: int = 1, **numbers: Any) -> None:
    pass
