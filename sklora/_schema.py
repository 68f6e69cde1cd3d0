"""What a skops file says of its objects: checked before skops builds anything of it."""

from __future__ import annotations

from typing import Any

from sklora._untrusted import Refusal, parse_json, shown

# How skops builds the parts of a pipeline of `make_architecture`. Other ways unpack archives within
# the file, or take an object from elsewhere.
_LOADERS = frozenset(
    f"{kind}Node" for kind in ("Dict", "Json", "List", "NdArray", "Object", "Tuple", "Type")
)


def check_schema(text: bytes | bytearray, what: str) -> None:
    """Check that what skops makes of a schema is no more than what stands in it.

    Of several nodes with one id, skops builds the first, but audits that for each: of 50 lists,
    each of them twice in the next, 2^50 would be audited. So they have to be the same but for ids.
    And skops reads an array for every node that names its file, unless their ids are the same.

    Parameters
    ----------
    text : bytes or bytearray
        JSON.
    what : str
        What it is, for messages.

    Raises
    ------
    Refusal
        When it is no JSON, nested too deeply, or not as skops stores a pipeline of sklora.
    """
    schema = parse_json(bytes(text), what, len(text))
    try:
        _Shapes(what).of(schema)
    except RecursionError:
        raise Refusal(f"{what} is nested too deeply.") from None


class _Shapes:
    """Numbers for all different values in a schema, which tell whether two are the same."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._numbers: dict[Any, int] = {}
        self._of_id: dict[Any, int] = {}
        self._id_of_file: dict[str, Any] = {}

    def of(self, value: Any) -> int:
        """Give the number of a value, which is that of no other value but for ids."""
        if isinstance(value, list):
            key: Any = (list, *map(self.of, value))
        elif isinstance(value, dict):
            return self._of_node(value)
        else:
            key = type(value), value
        return self._numbers.setdefault(key, len(self._numbers))

    def _of_node(self, node: dict[str, Any]) -> int:
        id, loader, file = (node.get(name) for name in ("__id__", "__loader__", "file"))
        if not isinstance(id, (int, float, str)):
            id = None
        if isinstance(loader, str) and loader not in _LOADERS:
            raise Refusal(f"{self._what} has a {shown(loader)}, which no model of sklora needs.")
        if isinstance(file, str) and (not id or self._id_of_file.setdefault(file, id) != id):
            raise Refusal(f"{self._what} names {shown(file)} more than once.")
        key = (dict, *((name, self.of(part)) for name, part in node.items() if name != "__id__"))
        number = self._numbers.setdefault(key, len(self._numbers))
        if id is not None and self._of_id.setdefault(id, number) != number:
            raise Refusal(f"{self._what} has two objects of the id {shown(id)}.")
        return number
