"""What messages say, and what may be made of text from a file that nobody vouches for."""

from __future__ import annotations

import json
import reprlib
from collections import Counter
from collections.abc import Iterable
from functools import partial
from typing import Any

# Enough for layouts of 100,000 modules, and for what skops says of a model of so many. The shortest
# values, such as empty dictionaries, take 30 times their bytes of text.
MAX_VALUES = 2**24


class Refusal(ValueError):
    """Why something is refused, from code that does not know the file's name.

    Whoever opened the file turns it into an error that names it, such as an `AdapterError`.
    """


def shown(value: object, length: int = 80) -> str:
    """Give a value from a file as it may stand in a message: escaped, and short."""
    if isinstance(value, (str, bytes)):
        text = ascii(value[:length])
    else:
        # Abbreviates what is long or nested deeply before it is written out.
        text = reprlib.repr(value).encode("ascii", "backslashreplace").decode()
    return text if len(text) <= length else f"{text[: length - 3]}..."


def printable(name: str) -> str:
    """Give the name of a file as it may stand in a message: it may attack a terminal or log."""
    return name if name.isprintable() else ascii(name)


def counted(number: int, noun: str) -> str:
    """Give a number with its noun: 1 tensor, 2 tensors."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def few(names: Iterable[str]) -> str:
    """Name the first of many."""
    every = list(names)
    more = f" and {len(every) - 3} more" if len(every) > 3 else ""
    return ", ".join(every[:3]) + more


def parse_json(
    text: str | bytes,
    what: str,
    max_bytes: int = 2**20,
    *,
    max_values: int = MAX_VALUES,
    unique: bool = False,
) -> Any:
    """Parse JSON from a file: size, depth and the number of values are bounded.

    Parameters
    ----------
    text : str or bytes
    what : str
        What it is, for messages.
    max_bytes, max_values : int
    unique : bool, default=False
        Whether to refuse an entry that is named twice. Else the last counts, as for `json.loads`.

    Returns
    -------
    object

    Raises
    ------
    Refusal
        When it is too large, nested too deeply, no JSON, holds more values than that, or
        names an entry twice that it must not.
    """
    if len(text) > max_bytes:
        raise Refusal(f"{what} has {len(text)} characters; at most {max_bytes} are read.")
    if len(text) > max_values:
        n_values = sum(_count(text, mark) for mark in ",:[{")
        if n_values > max_values:
            raise Refusal(f"{what} holds some {n_values} values; at most {max_values} are read.")
    try:
        return json.loads(
            text, object_pairs_hook=partial(without_repeats, what=what) if unique else None
        )
    except Refusal:
        raise
    except RecursionError:
        raise Refusal(f"{what} is nested too deeply.") from None
    except ValueError as error:
        raise Refusal(f"{what} is no JSON: {error}.") from None


def _count(text: str | bytes, mark: str) -> int:
    return text.count(mark) if isinstance(text, str) else text.count(mark.encode())


def without_repeats(pairs: list[tuple[str, Any]], what: str, more: str = "") -> dict[str, Any]:
    """Refuse an entry that is named twice, of which two readers may take different ones.

    Parameters
    ----------
    pairs : list of (str, object)
        What `json` hands to its `object_pairs_hook`.
    what, more : str
        What names them, and what else there is to say, for the message.

    Returns
    -------
    dict

    Raises
    ------
    Refusal
        When a name stands twice.
    """
    entries = dict(pairs)
    if len(entries) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise Refusal(f"{what} names {shown(twice)} twice{more}.")
    return entries
