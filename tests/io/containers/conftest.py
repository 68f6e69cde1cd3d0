"""Containers from bytes in memory, and bytes that are damaged."""

import io
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import strategies as st

from sklora._untrusted import Refusal
from sklora.io._tensors import DTYPES, TensorFile

Opened = Callable[[type[TensorFile], bytes], TensorFile]


@pytest.fixture(scope="session")
def opened() -> Opened:
    """Open bytes as a container."""
    return lambda kind, raw: kind(io.BytesIO(raw), len(raw))


@pytest.fixture(scope="session")
def read_all(opened) -> Callable[[type[TensorFile], bytes], dict[str, np.ndarray]]:
    """Read every tensor of a container."""

    def read(kind, raw):
        with opened(kind, raw) as file:
            return {name: file.read(name) for name in file.tensors}

    return read


@pytest.fixture(scope="session")
def assert_refused_or_read(opened) -> Callable[[type[TensorFile], bytes], None]:
    """Bytes are refused, or read as the header says; there is no third way."""

    def check(kind, raw):
        try:
            with opened(kind, raw) as file:
                for name, info in file.tensors.items():
                    array = file.read(name)
                    assert (array.shape, array.dtype) == (info.shape, DTYPES[info.dtype])
        except Refusal:
            return

    return check


@pytest.fixture(scope="session")
def little_memory() -> Callable[..., object]:
    """A context in which Python may take so many bytes and no more."""

    @contextmanager
    def limited(n_bytes: int) -> Iterator[None]:
        tracemalloc.start()
        try:
            yield
            assert tracemalloc.get_traced_memory()[1] < n_bytes
        finally:
            tracemalloc.stop()

    return limited


@pytest.fixture(scope="session")
def damage() -> Callable[[bytes], st.SearchStrategy[bytes]]:
    """Bytes with some replaced, cut out, cut off, put in or doubled."""

    def apply(raw, edits):
        for position, length, new in edits:
            begin = position % (len(raw) + 1)
            raw = raw[:begin] + new + raw[begin + length :]
        return raw

    def damaged(raw):
        position = st.integers(0, len(raw))
        replacement = st.binary(max_size=9)
        replaced = replacement.flatmap(
            lambda new: st.tuples(position, st.just(len(new)), st.just(new))
        )
        moved = st.tuples(position, st.integers(0, 40), replacement)
        cut = st.tuples(position, st.just(len(raw)), st.just(b""))
        doubled = st.tuples(position, position).map(
            lambda ends: (ends[1], 0, raw[slice(*sorted(ends))])
        )
        edits = st.lists(replaced | moved | cut | doubled, min_size=1, max_size=4)
        return edits.map(lambda edits: apply(raw, edits))

    return damaged
