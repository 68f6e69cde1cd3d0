import mmap
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sklora import _pages
from sklora._pages import MappedRows, owner_of_map

ROWS = np.arange(1.0, 36).reshape(7, 5)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("maps") / "rows"
    ROWS.tofile(path)
    return path


def mapped(file, mode="r"):
    return np.memmap(file, ROWS.dtype, mode, shape=ROWS.shape)


def resident():
    """MiB of files that are mapped into this process and present."""
    with open("/proc/self/status") as status:
        lines = dict(line.split(":", 1) for line in status)
    return int(lines["RssFile"].split()[0]) / 1024


class TestCopies:
    @pytest.mark.parametrize("piece", [1, 100, 2**25])
    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    @given(
        rows=st.one_of(st.slices(7), st.lists(st.integers(-7, 6)).map(lambda r: np.array(r, int)))
    )
    def test_pieces_make_the_rows(self, file, piece, dtype, rows):
        array = mapped(file)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_pages, "_MAPPED_BYTES", piece)
            patch.setattr(_pages, "_HUGE_PAGE", 10)
            for source in (array, ROWS, array[::-1], array[:, ::2]):
                copied = MappedRows(source).copy(rows, dtype)
                assert copied.dtype == dtype
                assert type(copied) is np.ndarray
                assert copied.flags.c_contiguous
                assert not np.may_share_memory(copied, source)
                np.testing.assert_array_equal(copied, np.asarray(source)[rows])

    def test_rows_that_are_not_there(self, file):
        with pytest.raises(IndexError):
            MappedRows(mapped(file)).copy(np.array([7]), np.float64)


class TestReleasing:
    def test_only_what_can_be_read_again(self, file):
        assert MappedRows(mapped(file))._map is not None
        assert MappedRows(np.asarray(mapped(file))[::2, 1:])._map is not None
        for other in (ROWS, mapped(file, "c"), mapped(file, "r+")):
            assert MappedRows(other)._map is None

    def test_systems_that_cannot_release(self, file, monkeypatch):
        monkeypatch.delattr(mmap, "MADV_DONTNEED")
        reader = MappedRows(mapped(file))
        np.testing.assert_array_equal(reader.copy(slice(None), np.float64), ROWS)
        assert reader._map is None

    @pytest.mark.skipif(sys.platform != "linux", reason="reads what Linux says of a process")
    @pytest.mark.parametrize("picked", [False, True])
    def test_a_file_that_was_read_is_not_resident(self, tmp_path, picked):
        shape = (2**8, 2**18)
        rows = np.memmap(tmp_path / "rows", np.float32, "w+", shape=shape)
        rows[:] = 1
        rows.flush()
        del rows
        rows = np.memmap(tmp_path / "rows", np.float32, "r", shape=shape)
        reader, before = MappedRows(rows), resident()
        for start in range(0, 2**8, 32):
            part = np.arange(start, start + 32) if picked else slice(start, start + 32)
            assert reader.copy(part, np.float32).all()
            assert resident() - before < 40
        assert rows.all()
        assert resident() - before > 200


class TestOwner:
    def test_of_views(self, file):
        array = mapped(file)
        for view in (array, array[1:], np.asarray(array).T, array.view(np.uint8)):
            assert owner_of_map(view) is array

    def test_of_others(self):
        assert owner_of_map(ROWS) is None
        assert owner_of_map(np.frombuffer(b"12345678")) is None
