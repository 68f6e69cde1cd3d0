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
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

from sklora import _files, _zoofile
from sklora._stores import ArrayStore, MemmapStore
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


def edited(path, edit):
    """Rewrite the header of a zoo; `edit` changes the decoded one in place."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    text = edit(header) or json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])


def with_layout(**changes):
    def edit(header):
        layout = json.loads(header["__metadata__"]["layout"])
        header["__metadata__"]["layout"] = json.dumps({**layout, **changes})

    return edit


def with_metadata(**changes):
    return lambda header: header["__metadata__"].update(changes)


def swapped(name, **changes):
    return lambda header: header[name].update(changes)


class TestHostileFiles:
    @pytest.fixture
    def zoo(self, path):
        adapters().save(path)
        return path

    @pytest.mark.parametrize("size", [0, 5, 8, 100, -1, -200])
    def test_cut_off(self, zoo, size):
        zoo.write_bytes(zoo.read_bytes()[:size])
        with pytest.raises(ValueError, match=r"zoo.safetensors is damaged.*io\.read_adapters"):
            LoRACollection.open(zoo)

    def test_a_single_adapter(self, path):
        save_file({"q.lora_A.weight": np.ones((2, 3))}, path, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=r"no zoo .* single adapter.* sklora\.io\.read_ad"):
            LoRACollection.open(path)
        save_file({"q.lora_A.weight": np.ones((2, 3))}, path)
        with pytest.raises(ValueError, match="no zoo"):
            LoRACollection.open(path)

    def test_headers_of_very_many_texts_are_not_parsed(self, zoo, monkeypatch):
        def with_texts(header):
            header["__metadata__"] |= {f"{number}\\": "" for number in range(40)}

        edited(zoo, with_texts)
        monkeypatch.setattr(_zoofile, "_MAX_QUOTES", 100)
        monkeypatch.setattr(_zoofile, "safe_open", None)
        monkeypatch.setattr(_zoofile, "parse_json", None)
        with pytest.raises(ValueError, match="its header has 164 quotes, of at most 100"):
            LoRACollection.open(zoo)

    def test_another_version(self, zoo):
        edited(zoo, with_metadata(version="2"))
        with pytest.raises(ValueError, match=r"version '2', .* reads version 1; upgrade sklora"):
            LoRACollection.open(zoo)

    @pytest.mark.parametrize(
        ("edit", "message"),
        [
            (with_metadata(layout="{"), "Expecting property name"),
            (with_metadata(layout="[" * 100_000), "nested too deeply"),
            (with_metadata(layout="[]"), r"the layout in its metadata is '\[\]'"),
            (with_metadata(layout=""), "Expecting value"),
            (with_metadata(layout='{"modules": [], "side": []}'), "the layout in its metadata is"),
            (with_metadata(layout='{"a": 1, "a": 2}'), "names .a. twice"),
            (with_layout(base_model=3), r"base_model is 3, which is no string\. Copy"),
            (with_layout(modules=[]), "at least one module"),
            (with_layout(modules=3), "not iterable"),
            (with_layout(modules=[["q", 3, 2]]), "described by"),
            (with_layout(modules=[["q", 3, 2, -2]]), "at least 1, got -2"),
            (with_layout(modules=[["q", 3, 2, 1.0]]), "must be an integer"),
            (with_layout(side=[["scale", 10**30]]), "weights has dtype F32"),
            (with_layout(side=[]), r"weights .* shape \(7, 17\), but .*\(7, 14\) are expected"),
            (with_layout(has_plain_rows=True), "which is no plain row"),
            (
                with_layout(modules=[["q", 17, 1, 1]], side=[], has_plain_rows=True),
                "which is no plain row",
            ),
            (swapped("weights", dtype="I32"), "weights has dtype I32"),
            (swapped("weights", shape=[17, 7]), r"weights has dtype F32 and shape \(17, 7\)"),
            (swapped("weights", shape=[119]), r"shape \(119,\)"),
            (swapped("weights", shape=[]), "damaged"),
            (swapped("weights", data_offsets=[0, 10**9]), "damaged"),
            (swapped("weights", data_offsets=[8, 484]), "damaged"),
            (swapped("ranks", dtype="F32"), "ranks has dtype F32"),
            (swapped("ranks", shape=[2, 7]), r"ranks has dtype I32 and shape \(2, 7\)"),
            (swapped("ids", dtype="I8"), "ids has dtype I8"),
            (swapped("ids", shape=[1, 21]), r"ids has dtype U8 and shape \(1, 21\)"),
            (lambda header: header.update(more=header.pop("ids")), "it has the tensors"),
            (lambda header: b'{"a": 1, "a": 1}', "damaged"),
            (lambda header: b"[]", "damaged"),
            (lambda header: json.dumps(header).encode().replace(b'"ids"', b'"ranks"'), "damaged"),
        ],
    )
    def test_headers(self, zoo, edit, message):
        edited(zoo, edit)
        with pytest.raises(ValueError, match=rf"(?s)zoo.safetensors .*{message}"):
            LoRACollection.open(zoo)

    def test_a_plain_row_with_a_base_model(self, path):
        LoRACollection.from_array(np.ones((3, 4)), LoRALayout.rows(4)).save(path)
        edited(path, with_layout(base_model="sd"))
        with pytest.raises(ValueError, match="which is no plain row"):
            LoRACollection.open(path)

    @pytest.mark.parametrize("ranks", [[3, 1], [-1, 1]])
    def test_ranks_beyond_the_layout(self, zoo, ranks):
        data = zoo.read_bytes()
        old, new = (np.array(pair, "<i4").tobytes() for pair in ([2, 1], ranks))
        zoo.write_bytes(data.replace(old, new, 1))
        with pytest.raises(ValueError, match=r"adapter 0 is said to have rank .* in module 'q'"):
            LoRACollection.open(zoo)

    @pytest.mark.parametrize(
        ("ids", "message"),
        [
            ("[0, 1, 2, 3, 4, 5]   ", "no list of 7"),
            ('{"a": [1, 2, 3, 4]}  ', "no list of 7"),
            ('"abcdefg"            ', "no list of 7"),
            ("[{},[],2,3,4,5,6]    ", "no list of 7, or neither"),
            ('[{"":[]},2,3,4,5,6,1]', "no list of 7, or neither"),
            ("[0, 1, 2, 3, 4, 5, 1.", "Expecting"),
            ("[0,1,2,3, 4, 5,  6.5]", "neither all integers nor all strings"),
            ('[0,1,2,3,4,5,   "6" ]', "neither all integers nor all strings"),
            ("[[0],1,2,3,4, 5, 600]", "neither all integers nor all strings"),
            ("[0,1,2,3,4,5,3E100  ]", "neither all integers nor all strings"),
        ],
    )
    def test_ids(self, zoo, ids, message):
        zoo.write_bytes(zoo.read_bytes().replace(b"[0, 1, 2, 3, 4, 5, 6]", ids.encode()))
        with pytest.raises(ValueError, match=message):
            LoRACollection.open(zoo)

    def test_ids_with_brackets_and_quotes(self, zoo):
        ids = ['a["', "{b}", "[]", '\\"{', "", ",", "é]"]
        adapters(ids=ids).save(zoo)
        assert LoRACollection.open(zoo).ids.tolist() == ids

    @pytest.mark.timeout(30)
    @pytest.mark.parametrize("value", ["{}", "[]", '{"":0}'])
    def test_ids_that_are_no_ids_are_not_parsed(self, value):
        """They would take 20 to 30 times their bytes."""
        text = f"[{','.join([value] * 10**6)}]".encode()
        tracemalloc.start()
        try:
            with pytest.raises(ValueError, match="no list of 7"):
                _zoofile._ids_from_json(text, 7)
            assert tracemalloc.get_traced_memory()[1] < len(text)
        finally:
            tracemalloc.stop()

    @pytest.mark.parametrize("sizes", [(8, 6, 0), (8, 6)])
    def test_long_names_are_not_repeated_whole(self, zoo, sizes):
        module = ["q" * 10**5, *sizes]
        edited(zoo, with_layout(modules=[module]))
        with pytest.raises(ValueError, match="qqq") as error:
            LoRACollection.open(zoo)
        assert len(str(error.value)) < 1000

    def test_id_that_is_far_longer_than_the_others(self, zoo, monkeypatch):
        """Three megabytes of empty texts and one long one would take a gigabyte."""
        ids = ["a" * 1000, *"bcdefg"]
        adapters(ids=ids).save(zoo)
        assert LoRACollection.open(zoo).ids.tolist() == ids
        monkeypatch.setattr(_zoofile, "_ANY_ID_BYTES", 1000)
        monkeypatch.setattr(_zoofile, "_ID_BYTES_PER_LETTER", 8)
        with pytest.raises(ValueError, match="one is far longer than the others"):
            LoRACollection.open(zoo)
        with pytest.raises(ValueError, match="make the collection with other ids="):
            adapters(ids=ids).save(zoo)

    def test_ids_that_would_fill_the_memory(self, zoo, monkeypatch):
        adapters(ids=["a" * 100, *"bcdefg"]).save(zoo)
        monkeypatch.setattr(_zoofile, "_MAX_ID_BYTES", 1000)
        with pytest.raises(ValueError, match="ids are too long"):
            LoRACollection.open(zoo)

    @given(
        st.lists(st.tuples(st.integers(0, 700), st.integers(0, 255)), min_size=1, max_size=4),
    )
    def test_damaged_bytes(self, tmp_path_factory, changes):
        path = tmp_path_factory.mktemp("zoos") / "zoo"
        adapters().save(path)
        data = bytearray(path.read_bytes())
        for place, value in changes:
            data[place % len(data)] = value
        path.write_bytes(data)
        try:
            X = LoRACollection.open(path)
        except ValueError:
            return
        assert X.read().shape == X.shape == (7, LAYOUT.width)
        assert (X.ranks <= LAYOUT.ranks).all()
        assert len(X.ids) == 7
