"""What may be said of, and made of, text from a file that nobody vouches for."""

from __future__ import annotations

import json
import reprlib
from collections import Counter
from functools import partial
from typing import Any


class Refusal(ValueError):
    """Why something is refused, from code that does not know the file's name.

    Whoever opened the file turns it into an error that names it, such as an `AdapterError`.
    """


def shown(value: object, length: int = 80) -> str:
    """Give a value from a file as it may stand in a message: escaped, and short."""
    if isinstance(value, (str, bytes)):
        text = ascii(value[: length + 1])
    else:
        # Abbreviates what is long or nested deeply before it is written out.
        text = reprlib.repr(value).encode("ascii", "backslashreplace").decode()
    return text if len(text) <= length else f"{text[: length - 3]}..."


def parse_json(
    text: str | bytes, what: str, max_bytes: int = 2**20, *, unique: bool = False
) -> Any:
    """Parse JSON from a file: size and depth are bounded.

    Parameters
    ----------
    text : str or bytes
    what : str
        What it is, for messages.
    max_bytes : int
    unique : bool, default=False
        Whether to refuse an entry that is named twice. Else the last counts, as for `json.loads`.

    Returns
    -------
    object

    Raises
    ------
    Refusal
        When it is too large, nested too deeply, no JSON, or names an entry twice that it must not.
    """
    if len(text) > max_bytes:
        raise Refusal(f"{what} has {len(text)} characters; at most {max_bytes} are read.")
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
