"""safetensors: a JSON header, then the numbers.

The header is parsed here, since the safetensors library takes a name twice, and headers that do not
start with a brace.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache, partial
from typing import Any, NamedTuple, NoReturn

from numpy.typing import NDArray

from sklora._untrusted import Refusal, shown, without_repeats
from sklora.io._tensors import DTYPES, MAX_BYTES, TensorFile, TensorInfo, check_count, check_tensor
from sklora.io.containers._arrays import as_array

LENGTH_BYTES = 8
# As in the safetensors library.
MAX_HEADER = 100_000_000
# A short text can hold many values, and in Python each takes some 60 bytes. So many are enough for
# the most tensors that are allowed, and for metadata of a million words.
MAX_VALUES = 4_000_000
# Longer headers are parsed each time, so that the cache stays small.
MAX_CACHED = 2**20

_DAMAGED = "the file is damaged or was tampered with: download it again"


class SafetensorsFile(TensorFile):
    """An open safetensors file; see `TensorFile`."""

    container = "safetensors"

    def _read_header(self) -> None:
        raw = self._take_header()
        self._begin = self._file.tell()
        if len(raw) <= MAX_CACHED:
            # Adapters of one trainer differ in their metadata alone, and the same file is read
            # again and again.
            metadata, self.header = _split(raw)
            self.tensors, self.metadata, self._spans, n_bytes = _parsed_again(self.header)
            if metadata is not None:
                self.metadata = metadata
        else:
            self.tensors, self.metadata, self._spans, n_bytes = _parsed(raw)
        left = self.size - self._begin
        if n_bytes != left:
            raise Refusal(
                f"its tensors take {n_bytes} bytes, but {left} bytes follow the header; it is "
                "cut off or damaged: download it again."
            )

    def _take_header(self) -> bytes:
        self._file.seek(0)
        length = int.from_bytes(self._take(LENGTH_BYTES, "the length of the header"), "little")
        if length > MAX_HEADER:
            raise Refusal(f"its header is said to take {length} bytes, of at most {MAX_HEADER}.")
        raw = self._take(length, "the header")
        if not raw.startswith(b"{"):
            raise Refusal(f"its header starts with {shown(raw[:8])}, not with '{{'; {_DAMAGED}.")
        n_values = sum(raw.count(mark) for mark in (b",", b":", b"[", b"{"))
        if n_values > MAX_VALUES:
            raise Refusal(f"its header holds some {n_values} values, of at most {MAX_VALUES}.")
        return raw

    def read(self, name: str) -> NDArray[Any]:
        """Read one tensor; see `TensorFile.read`."""
        begin, end = self._spans[name]
        self._file.seek(self._begin + begin)
        return as_array(self._take(end - begin, f"tensor {shown(name)}"), self.tensors[name])


class _Header(NamedTuple):
    """What a header says; shared by files, and never altered."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    spans: dict[str, tuple[int, int]]
    n_bytes: int


def _parsed(raw: bytes) -> _Header:
    try:
        header: dict[str, Any] = _decoder.decode(raw.decode())
    except Refusal:
        raise
    except (ValueError, RecursionError) as error:
        raise Refusal(f"its header is no JSON, {shown(str(error))}; {_DAMAGED}.") from error
    metadata = _checked_metadata(header.pop("__metadata__", None))
    check_count(len(header))
    tensors, spans = {}, {}
    for name, entry in header.items():
        tensors[name], spans[name] = _checked_entry(name, entry)
    return _Header(tensors, metadata, spans, _checked_end(spans))


def _checked_end(spans: Mapping[str, tuple[int, int]]) -> int:
    """Check that the tensors lie end to end, from the header on, and give where they end."""
    position = 0
    for name, (begin, end) in sorted(spans.items(), key=lambda item: item[1]):
        if begin != position:
            kind = "overlaps the tensor before it" if begin < position else "follows a hole"
            raise Refusal(
                f"tensor {shown(name)} at bytes {begin} to {end} {kind}, which ends at "
                f"{position}; {_DAMAGED}."
            )
        position = end
    return position


def _refuse_constant(constant: str) -> NoReturn:
    raise Refusal(f"its header holds {constant}, which is no JSON; {_DAMAGED}.")


_parsed_again = lru_cache(maxsize=8)(_parsed)
_METADATA = b'{"__metadata__":'
_decoder = json.JSONDecoder(
    object_pairs_hook=partial(without_repeats, what="its header", more=f"; {_DAMAGED}"),
    parse_constant=_refuse_constant,
)


def _split(raw: bytes) -> tuple[dict[str, str] | None, bytes]:
    """Take the metadata off a header that begins with it, as the safetensors library writes it."""
    if not raw.startswith(_METADATA):
        return None, raw
    try:
        text = raw.decode()
        metadata, end = _decoder.raw_decode(text, len(_METADATA))
    except Refusal:
        raise
    except (ValueError, RecursionError):
        return None, raw
    rest = b"{" + text[end + 1 :].encode()
    # Where the name may stand once more, written so or with escapes, all is parsed at once.
    if text[end : end + 2] != ',"' or _METADATA[1:-1] in rest or b"\\" in rest:
        return None, raw
    return _checked_metadata(metadata), rest


def _checked_metadata(metadata: object) -> dict[str, str]:
    # MLX writes null where it has nothing to say, and the safetensors library takes that.
    if metadata is None:
        return {}
    if not isinstance(metadata, dict) or not all(
        isinstance(value, str) for value in metadata.values()
    ):
        raise Refusal("__metadata__ must map texts to texts; save the file without it.")
    try:
        "".join((*metadata, *metadata.values())).encode()
    except UnicodeEncodeError as error:
        raise Refusal(f"__metadata__ is no Unicode text: {shown(str(error))}.") from error
    return metadata


def _are_integers(values: object) -> bool:
    return isinstance(values, list) and all(type(value) is int for value in values)


def _checked_entry(name: str, entry: object) -> tuple[TensorInfo, tuple[int, int]]:
    """Give what the header says of one tensor, and where it lies after the header."""
    # No value but a text or a list of integers is shown: the repr of lists in lists recurses.
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise Refusal(
            f"tensor {shown(name)} must have a dtype, shape and data_offsets; {_DAMAGED}."
        )
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or not _are_integers(shape) or not _are_integers(offsets):
        raise Refusal(
            f"tensor {shown(name)} must have a text as its dtype and lists of integers as its "
            f"shape and data_offsets; {_DAMAGED}."
        )
    if dtype not in DTYPES:
        raise Refusal(
            f"tensor {shown(name)} has the dtype {shown(dtype)}, which is not read; save it as "
            f"one of {', '.join(DTYPES)}."
        )
    info = TensorInfo(dtype, check_tensor(name, shape))
    if len(offsets) != 2 or not 0 <= offsets[0] <= offsets[1] <= MAX_BYTES:
        raise Refusal(
            f"tensor {shown(name)} must have data_offsets [begin, end] with 0 <= begin <= end "
            f"<= {MAX_BYTES}, got {shown(offsets)}."
        )
    begin, end = offsets
    if end - begin != info.nbytes:
        raise Refusal(
            f"tensor {shown(name)} of {dtype} and shape {info.shape} takes {info.nbytes} bytes, "
            f"but data_offsets {shown(offsets)} are {shown(end - begin)} bytes; {_DAMAGED}."
        )
    return info, (begin, end)
