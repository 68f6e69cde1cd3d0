import errno
import json
import os
import pickle
import signal
import subprocess
import sys
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
import sklearn
import torch
from safetensors import safe_open
from safetensors.numpy import save_file

from sklora import _files
from sklora._stores import ArrayStore, MemmapStore
from sklora._zoofile import is_zoo
from sklora.collection import LoRACollection, LoRALayout
from sklora.transform import SVDSpectrum

LAYOUT = LoRALayout(
    [("q", 3, 2, 2), ("v", 2, 2, 1)], side=[("scale", 1), ("magnitude", 2)], base_model="sd"
)
RANKS = np.array([[2, 1], [1, 0], [0, 1], [2, 0], [1, 1], [0, 0], [2, 1]])
DTYPES = [np.float16, ml_dtypes.bfloat16, np.float32, np.float64]


def adapters(dtype=np.float32, ids=None):
    """Seven adapters of mixed ranks, with side features, of numbers that use every bit."""
    rng = np.random.default_rng(0)
    flat = rng.normal(size=(7, LAYOUT.width))
    for position in range(LAYOUT.n_modules):
        for factor in LAYOUT._factors_at(flat, position):
            factor[:] *= np.arange(factor.shape[-1]) < RANKS[:, position, None, None]
    return LoRACollection.from_array(flat.astype(dtype), LAYOUT, ranks=RANKS, ids=ids)


def assert_same(found, expected):
    assert found.layout == expected.layout
    assert found.read().tobytes() == expected.read().tobytes()
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found.ranks, expected.ranks)
    np.testing.assert_array_equal(found.ids, expected.ids)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "zoo.safetensors"


def small_memory(X, n_rows):
    """A working memory that holds so many rows, of three copies each."""
    return sklearn.config_context(working_memory=3.5 * n_rows * X.nbytes / len(X) / 2**20)


class TestRoundTrip:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("ids", [None, list("abcdefg"), ["é", "\ud800", '"', "", *"xyz"]])
    def test_same_bits_in_the_same_precision(self, path, dtype, ids):
        X = adapters(dtype, ids)
        with small_memory(X, 2):
            X.save(path)
        opened = LoRACollection.open(path)
        assert_same(opened, X)
        assert isinstance(opened._store, MemmapStore)
        assert opened._store.span.dtype == dtype
        assert not opened._store._array.flags.writeable
        assert path.stat().st_size < X._store.array.nbytes + 1000

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("key", [slice(1, 5), slice(None, None, -2), [3, 3, 0], slice(0, 0)])
    def test_views(self, path, dtype, key):
        X = adapters(dtype, list("abcdefg"))[key]
        X.save(path)
        if len(X):
            assert_same(LoRACollection.open(path), X)
        else:
            assert LoRACollection.open(path).shape == (0, LAYOUT.width)
        LoRACollection.open(str(path))[::-1].save(path)
        np.testing.assert_array_equal(LoRACollection.open(path).read(), X[::-1].read())
        if len(X):
            assert LoRACollection.open(path)._store.span.dtype == dtype

    def test_views_of_other_ranks(self, path):
        X = adapters(np.float16).with_layout(LAYOUT.with_ranks([4, 3]))[2:]
        X.save(path)
        assert_same(LoRACollection.open(path), X)

    @pytest.mark.parametrize("dtype", [np.float16, np.float64])
    def test_saving_stays_within_the_working_memory(self, path, dtype):
        layout = LoRALayout([("q", 100, 100, 2)])
        X = LoRACollection.from_array(np.ones((1000, layout.width), dtype), layout)
        wider = X.with_layout(layout.with_ranks([3]))
        with sklearn.config_context(working_memory=0.5):
            tracemalloc.start()
            try:
                wider.save(path)
                _, peak = tracemalloc.get_traced_memory()
            finally:
                tracemalloc.stop()
        assert peak < 0.6 * 2**20

    @pytest.mark.parametrize(
        ("stored", "written"),
        [(">f4", "<f4"), (">f2", "<f2"), (np.int8, "<f4"), (np.int64, "<f8"), (bool, "<f4")],
    )
    def test_other_numbers_become_what_they_are_read_as(self, path, stored, written):
        flat = np.arange(14).reshape(2, 7).astype(stored)
        X = LoRACollection.from_array(flat, LoRALayout([("q", 3, 4, 1)]))
        X.save(path)
        opened = LoRACollection.open(path)
        assert opened._store.span.dtype == written
        np.testing.assert_array_equal(opened.read(), flat)

    def test_plain_rows(self, path):
        X = LoRACollection.from_array(np.ones((3, 4)), LoRALayout.rows(4))
        X.save(path)
        assert LoRACollection.open(path).layout.has_plain_rows
        assert_same(LoRACollection.open(path), X)

    def test_numbers_that_are_not_finite_are_left_to_whoever_uses_them(self, path):
        flat = np.array([[np.nan, np.inf, -0.0]], np.float16)
        LoRACollection.from_array(flat, LoRALayout.rows(3)).save(path)
        X = LoRACollection.open(path)
        assert np.signbit(X.read()[0, 2])
        with pytest.raises(ValueError, match="NaN or infinity"):
            SVDSpectrum().fit(X)

    def test_a_signalling_nan_is_no_warning(self, path):
        flat = np.array([[0x7F81, 0x3F80]], np.uint16).view(ml_dtypes.bfloat16)
        LoRACollection.from_array(flat, LoRALayout.rows(2)).save(path)
        np.testing.assert_array_equal(LoRACollection.open(path).read(), [[np.nan, 1]])

    @pytest.mark.parametrize(
        "ids",
        [
            [-5, 2**40],
            np.array([1, 2**64 - 1], np.uint64),
            np.array([1, 2**63], np.uint64),
            np.array(["a", "b"], object),
            np.array([3, 4], np.int8),
        ],
    )
    def test_ids(self, path, ids):
        X = LoRACollection.from_array(np.ones((2, 3)), LoRALayout.rows(3), ids=ids)
        X.save(path)
        assert LoRACollection.open(path).ids.tolist() == list(ids)

    @pytest.mark.parametrize(
        "ids",
        [
            [0.5, 1.5],
            [True, False],
            np.array(["a", 1], object),
            np.array([2**70, 1], object),
            np.array(["a\0", "b"], object),
            np.array(["a", "b" * 2**29], object),
        ],
        ids=["floats", "booleans", "mixed", "huge", "NUL", "long"],
    )
    def test_other_ids_are_refused(self, tmp_path, path, ids):
        X = LoRACollection.from_array(np.ones((2, 3)), LoRALayout.rows(3), ids=ids)
        with pytest.raises(ValueError, match=r"ids .* make the collection with other ids="):
            X.save(path)
        assert not list(tmp_path.iterdir())

    def test_a_base_model_that_is_no_string(self, path):
        layout = LoRALayout([("q", 1, 1, 1)], base_model=7)
        with pytest.raises(ValueError, match="base_model is 7, which is no string"):
            LoRACollection.from_array(np.ones((2, 2)), layout).save(path)


class TestFormat:
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_other_readers_of_safetensors(self, path, dtype):
        X = adapters(dtype)
        X.save(path)
        with safe_open(path, framework="pt") as file:
            assert set(file.keys()) == {"weights", "ranks", "ids"}
            assert file.metadata()["format"] == "sklora zoo"
            assert file.metadata()["version"] == "1"
            weights = file.get_tensor("weights").to(getattr(torch, str(X.dtype)))
            np.testing.assert_array_equal(weights, X.read())
            np.testing.assert_array_equal(file.get_tensor("ranks"), RANKS)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_tensors_are_aligned(self, path, dtype):
        adapters(dtype).save(path)
        data = path.read_bytes()
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        assert size % 8 == 0
        for name, itemsize in (("weights", np.dtype(dtype).itemsize), ("ranks", 4)):
            assert header[name]["data_offsets"][0] % itemsize == 0

    def test_permissions_are_those_of_any_new_file(self, path, tmp_path):
        adapters().save(path)
        (tmp_path / "other").touch()
        assert path.stat().st_mode == (tmp_path / "other").stat().st_mode


def test_whether_a_file_is_a_zoo(tmp_path, path):
    assert not is_zoo(str(tmp_path))
    assert not is_zoo(str(path))
    save_file({"q": np.ones(2)}, path, metadata={"format": "pt"})
    assert not is_zoo(str(path))
    path.write_bytes(path.read_bytes()[:-1])
    assert not is_zoo(str(path))
    adapters().save(path)
    assert is_zoo(str(path))
    path.write_bytes(path.read_bytes()[:-1])  # what is wrong with it is for `open_zoo` to say
    assert is_zoo(str(path))


def test_a_zoo_that_says_so_elsewhere_is_one(path):
    adapters().save(path)
    path.write_bytes(path.read_bytes().replace(b'{"__metadata__":', b'{ "__metadata__":', 1))
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    path.write_bytes((size + 1).to_bytes(8, "little") + data[8:])
    assert is_zoo(str(path))
    assert_same(LoRACollection.open(path), adapters())


class FailingStore(ArrayStore):
    """Gives some blocks and then raises."""

    error: BaseException | None = None

    def read(self, rows, *, copy=True):
        if self.error is not None and rows.start >= 3:
            raise self.error
        return super().read(rows)


@pytest.fixture
def failing():
    X = adapters()
    return LoRACollection(FailingStore(X._store.array, LAYOUT, X.ranks, X.ids))


class TestInterrupted:
    @pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("gone"), MemoryError()])
    def test_what_was_there_stays(self, tmp_path, path, failing, error):
        failing[::-1].save(path)
        before = path.read_bytes()
        failing._store.error = error
        with small_memory(failing, 1), pytest.raises(type(error)):
            failing.save(path)
        assert path.read_bytes() == before
        assert list(tmp_path.iterdir()) == [path]

    def test_a_full_disk(self, tmp_path, path, monkeypatch):
        def full(file):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(_files.os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            adapters().save(path)
        assert not list(tmp_path.iterdir())

    @pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
    def test_a_disk_that_is_full_while_blocks_are_written(self, tmp_path, path, monkeypatch):
        def on_a_full_disk(name, mode):
            open(name, mode).close()
            return open("/dev/full", "wb", buffering=0)

        monkeypatch.setattr(_files, "open", on_a_full_disk, raising=False)
        with pytest.raises(OSError, match="No space left"):
            adapters().save(path)
        assert not list(tmp_path.iterdir())

    @pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs POSIX signals")
    def test_a_process_that_is_killed(self, tmp_path, path):
        script = f"""
import os, signal, sys
import numpy as np, sklearn
from sklora import LoRACollection, LoRALayout
from sklora._stores import ArrayStore

class Killed(ArrayStore):
    def read(self, rows, *, copy=True):
        if rows.start >= 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().read(rows)

X = LoRACollection.from_array(np.ones((7, 4)), LoRALayout.rows(4))
X = LoRACollection(Killed(X._store.array, X.layout, X.ranks, X.ids))
with sklearn.config_context(working_memory=1e-6):
    X.save({str(path)!r})
"""
        done = subprocess.run([sys.executable, "-c", script], check=False)
        assert done.returncode == -signal.SIGKILL
        assert not path.exists()
        [left] = tmp_path.iterdir()
        assert left.name.startswith(".zoo.safetensors.")
        assert left.suffix == ".tmp"

    def test_onto_the_file_that_it_is_mapped_from(self, tmp_path, path):
        X = adapters()
        X.save(path)
        opened = LoRACollection.open(path)
        opened[[6, 0]].save(path)
        assert_same(opened, X)
        assert_same(LoRACollection.open(path), LoRACollection.open(path)[:])
        np.testing.assert_array_equal(LoRACollection.open(path).read(), X.read([6, 0]))
        assert list(tmp_path.iterdir()) == [path]
        for view in (opened, opened[1:3]):
            with pytest.raises(ValueError, match=r"zoo.safetensors is another file .* make it ag"):
                pickle.dumps(view)

    def test_through_a_link(self, tmp_path, path):
        (tmp_path / "link").symlink_to(path)
        adapters().save(tmp_path / "link")
        assert (tmp_path / "link").is_symlink()
        assert_same(LoRACollection.open(path), adapters())

    @pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes")
    def test_a_pipe_is_not_waited_for(self, tmp_path):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(ValueError, match="is a device, pipe or socket; name a file that"):
            LoRACollection.open(tmp_path / "pipe")

    def test_folders(self, tmp_path):
        with pytest.raises(ValueError, match="is a folder; name a file in it"):
            adapters().save(tmp_path)
        with pytest.raises(ValueError, match=r"is a folder; name a file .*read_adapters"):
            LoRACollection.open(tmp_path)
        with pytest.raises(FileNotFoundError):
            adapters().save(tmp_path / "missing" / "zoo")
        with pytest.raises(FileNotFoundError):
            LoRACollection.open(tmp_path / "missing")
