import os
import pickle
import tempfile
from pathlib import Path

import joblib
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sklora import _stores
from sklora._stores import ArrayStore, FileSpan, MemmapStore, compute_dtype
from sklora.collection import LoRACollection, LoRALayout

LAYOUT = LoRALayout([("q", 3, 2, 2), ("v", 2, 2, 1)])
ROWS = np.arange(1.0, 7 * LAYOUT.width + 1, dtype=np.float32).reshape(7, -1)
N_SPARSE = 200_000


@pytest.fixture(scope="module")
def npy(tmp_path_factory):
    path = tmp_path_factory.mktemp("maps") / "loras.npy"
    np.save(path, ROWS)
    return path


@pytest.fixture
def mapped(npy):
    return LoRACollection.from_array(np.load(npy, mmap_mode="r"), LAYOUT)


@pytest.fixture
def sparse(tmp_path, monkeypatch):
    """A file of 49 GiB, of which the disk holds one row; to read it all would fill the memory."""
    monkeypatch.setattr(_stores, "available_memory", lambda: 2**30)
    layout = LoRALayout([("q", 2**15, 2**15, 1)])
    shape = (N_SPARSE, layout.width)
    array = np.memmap(tmp_path / "sparse", np.float32, "w+", shape=shape)
    array[-1] = 1
    ranks = np.broadcast_to(1, (N_SPARSE, 1))
    return LoRACollection.from_array(array, layout, ranks=ranks)


class TestComputeDtype:
    @pytest.mark.parametrize(
        ("stored", "read"),
        [
            (np.float16, np.float32),
            (ml_dtypes.bfloat16, np.float32),
            (np.float32, np.float32),
            (">f4", np.float32),
            (np.float64, np.float64),
            (np.int32, np.float64),
        ],
    )
    def test_reals(self, stored, read):
        assert compute_dtype(stored) == read

    @pytest.mark.parametrize("dtype", [complex, object, "U3", np.longdouble, "datetime64[s]"])
    def test_others(self, dtype):
        with pytest.raises(ValueError, match="real numbers of at most 64 bits, got dtype"):
            compute_dtype(dtype)


class TestMemmaps:
    def test_a_map_stays_on_disk(self, mapped):
        assert isinstance(mapped._store, MemmapStore)
        np.testing.assert_array_equal(mapped.read(), ROWS)
        np.testing.assert_array_equal(mapped.ranks, [[2, 1]] * 7)

    @pytest.mark.parametrize(("layout", "n_copied"), [(LAYOUT, 1), (LoRALayout.rows(14), 0)])
    def test_ranks_are_found_in_copies_of_the_rows(self, npy, layout, n_copied, monkeypatch):
        """Whose pages are given back; those of plain rows are known."""
        copied, copy = [], _stores.MappedRows.copy

        def counting(mapped, rows, dtype):
            copied.append(rows)
            return copy(mapped, rows, dtype)

        monkeypatch.setattr(_stores.MappedRows, "copy", counting)
        LoRACollection.from_array(np.load(npy, mmap_mode="r"), layout)
        assert len(copied) == n_copied

    def test_arrays_over_a_map_are_found(self, npy):
        X = LoRACollection.from_array(np.asarray(np.load(npy, mmap_mode="r")), LAYOUT)
        assert isinstance(X._store, MemmapStore)

    @given(
        rows=st.tuples(st.slices(7), st.slices(7)),
        picked=st.lists(st.integers(0, 6), max_size=4),
        order=st.sampled_from("CF"),
    )
    def test_pickles_of_views_read_the_same_rows(self, tmp_path_factory, rows, picked, order):
        path = tmp_path_factory.mktemp("maps") / "rows"
        file = np.memmap(path, np.float32, "w+", offset=3, shape=ROWS.shape, order=order)
        file[:] = ROWS
        array, expected = file[rows[0]][rows[1]], ROWS[rows[0]][rows[1]]
        X = LoRACollection.from_array(array, LAYOUT)
        assert isinstance(X._store, MemmapStore)
        key = [row for row in picked if row < len(X)]
        views = {X: expected, X[key]: expected[key], X[key][::-1]: expected[key][::-1]}
        for view, values in views.items():
            twin = pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(view))))
            np.testing.assert_array_equal(twin.read(), values)
            np.testing.assert_array_equal(twin.read(slice(1, None)), values[1:])
            np.testing.assert_array_equal(twin.ids, view.ids)
            np.testing.assert_array_equal(twin.ranks, view.ranks)
            assert twin.ranks.dtype == view.ranks.dtype
            np.testing.assert_array_equal(twin[::2].read(), values[::2])

    @pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
    def test_low_precision(self, tmp_path, dtype):
        array = np.memmap(tmp_path / "rows", dtype, "w+", shape=ROWS.shape)
        array[:] = ROWS
        X = pickle.loads(pickle.dumps(LoRACollection.from_array(array, LAYOUT)))
        assert X.dtype == X.read().dtype == np.float32
        np.testing.assert_array_equal(X.read(), ROWS.astype(dtype))

    def test_reading_gives_arrays_in_memory(self, mapped):
        for rows in (slice(2), [0, 1]):
            flat = mapped.read(rows)
            assert type(flat) is np.ndarray
            assert flat.flags.writeable
            assert FileSpan.of(flat) is None

    def test_mixed_ranks_survive(self, npy):
        ranks = np.arange(14).reshape(7, 2) % 2
        X = LoRACollection.from_array(np.load(npy, mmap_mode="r"), LAYOUT, ranks=ranks)
        np.testing.assert_array_equal(pickle.loads(pickle.dumps(X[::2])).ranks, ranks[::2])

    def test_a_map_of_a_file_without_a_name(self):
        with tempfile.TemporaryFile() as file:
            array = np.memmap(file, np.float32, "w+", shape=ROWS.shape)
        array[:] = ROWS
        X = LoRACollection.from_array(array, LAYOUT)
        np.testing.assert_array_equal(pickle.loads(pickle.dumps(X)).read(), ROWS)

    def test_copy_on_write_maps_pickle_what_has_been_written(self, npy):
        array = np.load(npy, mmap_mode="c")
        array[0] = 0
        X = LoRACollection.from_array(array, LAYOUT)
        assert isinstance(X._store, ArrayStore)
        assert not pickle.loads(pickle.dumps(X)).read([0]).any()

    def test_a_file_that_has_gone(self, tmp_path):
        array = np.memmap(tmp_path / "rows", np.float32, "w+", shape=ROWS.shape)
        X = LoRACollection.from_array(array, LAYOUT)
        pickled = pickle.dumps(X)
        os.remove(tmp_path / "rows")
        with pytest.raises(FileNotFoundError):
            pickle.loads(pickled)
        with pytest.raises(ValueError, match=r"rows is gone, .* make it again from a file that"):
            pickle.dumps(X)

    def test_a_file_that_had_gone_before_another_took_its_name(self, tmp_path):
        array = np.memmap(tmp_path / "rows", np.float32, "w+", shape=ROWS.shape)
        os.remove(tmp_path / "rows")
        X = LoRACollection.from_array(array, LAYOUT)
        (tmp_path / "rows").write_bytes(bytes(array.nbytes))
        with pytest.raises(ValueError, match="rows is another file"):
            pickle.dumps(X)

    @pytest.mark.parametrize("offset", [0, 8])
    @pytest.mark.parametrize("left", [b"", b"1234"])
    def test_a_file_that_has_become_shorter(self, tmp_path, offset, left):
        array = np.memmap(tmp_path / "rows", np.float32, "w+", offset, ROWS.shape)
        pickled = pickle.dumps(LoRACollection.from_array(array, LAYOUT))
        (tmp_path / "rows").write_bytes(left)
        message = rf"rows has {len(left)} bytes.* shape \(7, 14\) .* make it again"
        with pytest.raises(ValueError, match=message):
            pickle.loads(pickled)

    def test_changed_files_have_other_hashes(self, tmp_path):
        array = np.memmap(tmp_path / "rows", np.float32, "w+", shape=ROWS.shape)
        X = LoRACollection.from_array(array, LAYOUT)
        before = joblib.hash(X)
        assert joblib.hash(pickle.loads(pickle.dumps(X))) == before
        os.utime(tmp_path / "rows", ns=(0, 1))
        assert joblib.hash(X) != before


class TestLargerThanMemory:
    def test_views_read_their_rows_alone(self, sparse):
        tail = sparse[N_SPARSE // 2 :][::-1]
        assert tail[:1].read().all()
        assert not tail[[5, 1000]].read().any()
        assert sparse[-1]["q"][0].all()
        assert sparse[-1:, :2].all()
        with pytest.raises(MemoryError, match=r"100000 adapters .* takes 24\.4 GiB .* 1\.0 GiB"):
            np.asarray(tail)

    def test_batches_are_bounded(self, sparse):
        batch = next(sparse.iter_batches())
        assert (batch.stop - batch.start) * sparse.layout.width * 4 <= 2**30

    def test_pickles_are_small(self, sparse):
        assert len(pickle.dumps(sparse[:1000:10])) < 5000
        assert pickle.loads(pickle.dumps(sparse[-2:])).read()[1].all()


def block_sum(X):
    return os.getpid(), float(X.read().sum(dtype=float))


class TestWorkers:
    @pytest.mark.parametrize("backing", ["map", "array"])
    def test_loky_workers_read_their_rows(self, npy, backing):
        array = np.load(npy, mmap_mode="r" if backing == "map" else None)
        X = LoRACollection.from_array(array, LAYOUT)
        views = [X[:3], X[[6, 3]], X[5:3:-1]]
        with joblib.parallel_config("loky", inner_max_num_threads=1):
            results = joblib.Parallel(n_jobs=2)(joblib.delayed(block_sum)(view) for view in views)
        assert os.getpid() not in {pid for pid, _ in results}
        expected = [ROWS[:3].sum(), ROWS[[6, 3]].sum(), ROWS[4:6].sum()]
        assert [total for _, total in results] == expected

    def test_arrays_that_joblib_maps_for_the_workers(self, rng):
        rows = rng.normal(size=(50, 40))
        X = LoRACollection.from_array(rows, LoRALayout.rows(40))
        with joblib.parallel_config("loky", inner_max_num_threads=1):
            parallel = joblib.Parallel(n_jobs=2, max_nbytes=100)
            results = parallel(joblib.delayed(block_sum)(view) for view in (X[:25], X[25:], X))
        np.testing.assert_allclose(
            [total for _, total in results], [rows[:25].sum(), rows[25:].sum(), rows.sum()]
        )


def test_for_a_few_bytes_nobody_looks_how_much_memory_there_is(monkeypatch):
    monkeypatch.setattr(_stores, "available_memory", lambda: 0)
    _stores.check_memory(2**20, 4, np.dtype(np.float32))
    with pytest.raises(MemoryError, match=r"1048577 adapters x 4 columns .* 0\.0 GiB are free"):
        _stores.check_memory(2**20 + 1, 4, np.dtype(np.float32))


class TestAvailableMemory:
    def test_is_a_number_of_bytes_where_known(self):
        available = _stores.available_memory()
        assert available is None or available > 2**20

    @pytest.mark.parametrize("text", ["", "MemFree: 1 kB\n", "no numbers\n"])
    def test_is_unknown_elsewhere(self, monkeypatch, tmp_path, text):
        (tmp_path / "meminfo").write_text(text)
        monkeypatch.setattr(
            _stores, "open", lambda path: (tmp_path / "meminfo").open(), raising=False
        )
        assert _stores.available_memory() is None

    @pytest.mark.parametrize(
        ("limit", "expected"), [("max\n", 2048), ("1000\n", 1000), ("9000\n", 2048), (None, 2048)]
    )
    def test_a_container_has_no_more_than_its_limit(self, monkeypatch, tmp_path, limit, expected):
        (tmp_path / "meminfo").write_text("MemAvailable: 2 kB\n")
        if limit is not None:
            (tmp_path / "memory.max").write_text(limit)
        monkeypatch.setattr(
            _stores, "open", lambda path: (tmp_path / Path(path).name).open(), raising=False
        )
        assert _stores.available_memory() == expected
