import copy
import pickle
import tracemalloc
from collections.abc import Mapping

import ml_dtypes
import numpy as np
import pandas as pd
import polars as pl
import pytest
import sklearn
from hypothesis import given
from hypothesis import strategies as st

import sklora._stores
from sklora.collection import LoRACollection, LoRALayout, check_loras
from sklora.transform import SVDSpectrum

LAYOUT = LoRALayout([("q", 3, 2, 2), ("v", 2, 2, 1)], side=[("scale", 1)])
ROWS = np.arange(1.0, 5 * LAYOUT.width + 1).reshape(5, -1)
LORAS = LoRACollection.from_array(ROWS, LAYOUT, ids=list("abcde"))

keys = st.one_of(
    st.slices(5),
    st.lists(st.integers(-5, 4), max_size=8),
    st.lists(st.integers(-5, 4), max_size=8).map(lambda rows: np.array(rows, dtype=np.int32)),
    st.lists(st.booleans(), min_size=5, max_size=5).map(np.array),
    st.lists(st.booleans(), min_size=5, max_size=5),
)


class TestFromArray:
    def test_ranks_are_inferred_in_blocks(self, random_loras, rng):
        X = random_loras(rng, 6, rank=rng.integers(0, 4, size=(6, 3)))
        with sklearn.config_context(working_memory=2 * X.nbytes / 6 / 2**20):
            assert len(list(X.iter_batches())) == 3
            twin = LoRACollection.from_array(X.read(), X.layout)
        np.testing.assert_array_equal(twin.ranks, X.ranks)

    def test_given_ranks_and_ids(self):
        ids = np.arange(10, 15)
        X = LoRACollection.from_array(ROWS, LAYOUT, ranks=np.ones((5, 2), np.int8), ids=ids)
        assert X.ranks.tolist() == [[1, 1]] * 5
        assert X.ranks.dtype == np.intp
        assert not X.ranks.flags.writeable
        assert X[2].id == 12
        assert ids.flags.writeable

    @pytest.mark.parametrize("dtype", [bool, np.int8, np.int64, np.float16, np.float32])
    def test_other_numbers(self, dtype):
        X = LoRACollection.from_array((ROWS % 2).astype(dtype), LAYOUT)
        assert X.dtype == (np.float64 if dtype is np.int64 else np.float32)
        assert np.asarray(X).dtype == X.dtype
        np.testing.assert_array_equal(np.asarray(X), ROWS % 2)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"X": ROWS[:, 1:]}, r"2 modules, has rows of width 15, got .* \(5, 14\)"),
            ({"X": ROWS[0]}, r"got an array of shape \(15,\)"),
            ({"X": ROWS.astype(complex)}, "real numbers"),
            ({"X": ROWS.astype(object)}, "real numbers"),
            ({"ids": [1, 2]}, r"ids of shape \(2,\) do not name 5 adapters"),
            ({"ranks": [[1, 1]]}, r"ranks must be integers of shape \(5, 2\).* got shape \(1, 2\)"),
            ({"ranks": np.ones((5, 2))}, "dtype float64"),
            ({"ranks": np.ones((5, 2), bool)}, "dtype bool"),
            ({"X": ROWS[:, 1:], "ranks": np.ones((5, 2), int)}, "2 modules, has rows of width 15"),
            (
                {"ranks": [[1, 1]] * 4 + [[1, 2]]},
                r"adapter 4 is said to have rank 2 in module 'v', .* U \(2, 1\) and V \(2, 1\)",
            ),
            ({"ranks": [[3, 1]] * 5}, r"'q', .* U \(3, 2\) and V \(2, 2\); .* lacks, to 2\."),
            ({"ranks": [[-1, 1]] * 5}, "adapter 0 is said to have rank -1 in module 'q'"),
        ],
    )
    def test_refused(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            LoRACollection.from_array(**{"X": ROWS, "layout": LAYOUT, **arguments})

    @pytest.mark.parametrize("frame", [pd.DataFrame, pl.DataFrame])
    def test_columns_of_a_frame_in_another_order(self, frame):
        named = frame(dict(zip(LAYOUT.feature_names(), ROWS.T, strict=True)))
        np.testing.assert_array_equal(LoRACollection.from_array(named, LAYOUT).read(), ROWS)
        with pytest.raises(ValueError, match="columns of the layout in another order"):
            LoRACollection.from_array(named[LAYOUT.feature_names()[::-1]], LAYOUT)

    def test_columns_of_a_frame_that_may_have_any_names(self):
        other = pd.DataFrame(ROWS, columns=LAYOUT.feature_names()).add_prefix("my ")
        np.testing.assert_array_equal(LoRACollection.from_array(other, LAYOUT).read(), ROWS)
        plain = LoRALayout.rows(15)
        backwards = pd.DataFrame(ROWS, columns=plain.feature_names()[::-1])
        np.testing.assert_array_equal(LoRACollection.from_array(backwards, plain).read(), ROWS)


class TestArrayLike:
    def test_attributes(self):
        assert LORAS.shape == (5, 15)
        assert LORAS.ndim == 2
        assert len(LORAS) == 5
        assert LORAS.dtype == np.float64
        assert LORAS.nbytes == ROWS.nbytes
        assert LORAS.layout is LAYOUT
        assert repr(LORAS) == "LoRACollection(n_adapters=5, n_modules=2, width=15, dtype=float64)"

    def test_ids_and_ranks_cannot_be_written_to(self):
        for values in (LORAS.ids, LORAS.ranks):
            with pytest.raises(ValueError, match="read-only"):
                values[0] = values[1]

    def test_a_full_array_is_not_copied(self):
        assert np.asarray(LORAS) is np.asarray(LORAS[:]) is np.asarray(LORAS[0:5, ...]) is ROWS
        assert np.asarray(LORAS[:1]) is not ROWS
        copied = np.array(LORAS)
        assert not np.shares_memory(copied, ROWS)
        np.testing.assert_array_equal(copied, ROWS)

    def test_copies_can_be_forbidden(self):
        assert np.asarray(LORAS, copy=False) is ROWS
        with pytest.raises(ValueError, match="takes a copy"):
            np.asarray(LORAS[:2], copy=False)

    def test_another_dtype(self):
        for X in (LORAS, LORAS[1:]):
            assert X.__array__(np.float32).dtype == np.float32

    @pytest.mark.parametrize("available", [100, None])
    def test_what_does_not_fit_in_memory_is_refused_with_its_size(self, monkeypatch, available):
        monkeypatch.setattr("sklora._stores._CERTAIN_BYTES", 0)
        monkeypatch.setattr(sklora._stores, "available_memory", lambda: available)
        if available is None:
            assert np.asarray(LORAS[1:]).shape == (4, 15)
        else:
            message = r"4 adapters x 15 columns takes 0\.0 GiB as float64, .* SVDSpectrum"
            with pytest.raises(MemoryError, match=message):
                np.asarray(LORAS[1:])

    def test_read_gives_arrays_of_ones_own(self):
        for rows in (None, slice(2), [0, 1]):
            flat = LORAS.read(rows)
            flat[:] = 0
        np.testing.assert_array_equal(LORAS.read([0]), ROWS[:1])
        assert np.shares_memory(LORAS[1:3].read(copy=False), ROWS)

    def test_picked_rows_are_copied_once(self):
        X = LoRACollection.from_array(np.ones((10, 2**15)), LoRALayout.rows(2**15))
        tracemalloc.start()
        try:
            picked = X.read([5, 1, 7, 3])
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < 1.5 * picked.nbytes

    def test_factors(self):
        for (U, V), (all_U, all_V) in zip(LORAS.factors([3, 1]), LAYOUT.unpack(ROWS), strict=True):
            np.testing.assert_array_equal(U, all_U[[3, 1]])
            np.testing.assert_array_equal(V, all_V[[3, 1]])

    def test_batches_fit_in_working_memory(self):
        with sklearn.config_context(working_memory=2 * 8 * 15 / 2**20):
            batches = list(LORAS.iter_batches())
            assert batches == [slice(0, 2), slice(2, 4), slice(4, 5)]
            # At least one adapter, however large.
            assert len(list(LORAS.iter_batches(bytes_per_adapter=1e9))) == 5
        assert list(LORAS.iter_batches()) == [slice(0, 5)]
        assert list(LORAS[:0].iter_batches()) == []


class TestBlocks:
    @pytest.mark.parametrize("key", [slice(None), slice(3, 0, -1), [4, 4, 0]])
    def test_blocks_are_the_rows_in_order(self, key):
        X = LORAS[key].with_layout(LAYOUT.with_ranks([2, 3]))
        with sklearn.config_context(working_memory=1.9 * 8 * (2 * X.shape[1] + 15) / 2**20):
            rows, flats = zip(*X.iter_blocks(), strict=True)
        assert [len(flat) for flat in flats] == [1] * len(X)
        assert rows == tuple(slice(row, row + 1) for row in range(len(X)))
        np.testing.assert_array_equal(np.concatenate(flats), X.read())
        assert all(flat.flags.writeable for flat in flats)

    def test_the_work_counts(self):
        with sklearn.config_context(working_memory=2 * 1000 / 2**20):
            assert [rows for rows, _ in LORAS.iter_blocks(1000)] == list(LORAS.iter_batches(1000))
        assert list(LORAS[:0].iter_blocks()) == []

    @pytest.mark.parametrize("stored", [np.float16, np.float64])
    @pytest.mark.parametrize("use", ["blocks", "columns", "check", "ranks"])
    def test_memory_stays_within_the_working_memory(self, tmp_path, stored, use):
        layout = LoRALayout([("q", 500, 500, 2)])
        array = np.memmap(tmp_path / "rows", stored, "w+", shape=(4000, layout.width))
        array = np.memmap(tmp_path / "rows", stored, "r", shape=array.shape)
        ranks = None if use == "ranks" else np.ones((4000, 1), int)
        with sklearn.config_context(working_memory=8):
            tracemalloc.start()
            try:
                X = LoRACollection.from_array(array, layout, ranks=ranks)
                if use == "blocks":
                    for _, flat in X.with_layout(layout.with_ranks([3])).iter_blocks():
                        assert not flat.any()
                elif use == "columns":
                    assert not X[:, :10].any()
                elif use == "check":
                    check_loras(SVDSpectrum(), X, reset=True)
                _, peak = tracemalloc.get_traced_memory()
            finally:
                tracemalloc.stop()
        assert peak < 9 * 2**20


class TestViews:
    @given(keys)
    def test_rows_are_those_of_the_flat_array(self, key):
        rows = np.array(key, dtype=int) if isinstance(key, list) and not key else key
        expected = ROWS[rows]
        for view in (LORAS[key], LORAS[key, ...], LORAS[(key,)]):
            np.testing.assert_array_equal(np.asarray(view), expected)
            np.testing.assert_array_equal(view.read(), expected)
            np.testing.assert_array_equal(view.ids, LORAS.ids[rows])
            np.testing.assert_array_equal(view.ranks, LORAS.ranks[rows])
            assert view.shape == expected.shape
            assert view._store is LORAS._store
        np.testing.assert_array_equal(LORAS.read(key), expected)

    @given(keys, st.data())
    def test_views_of_views(self, key, data):
        view = LORAS[key]
        second = data.draw(st.lists(st.integers(0, len(view) - 1)) if len(view) else st.just([]))
        expected = np.asarray(view)[np.array(second, dtype=int)]
        np.testing.assert_array_equal(np.asarray(view[second]), expected)
        np.testing.assert_array_equal(view.read(second), expected)
        np.testing.assert_array_equal(np.asarray(view[::-1]), np.asarray(view)[::-1])

    @given(
        st.one_of(st.slices(5), st.integers(-5, 4)),
        st.one_of(
            st.slices(15),
            st.integers(-15, 14),
            st.lists(st.integers(-15, 14), min_size=1),
            st.lists(st.booleans(), min_size=15, max_size=15).map(np.array),
        ),
    )
    def test_columns_are_those_of_the_flat_array(self, rows, columns):
        with sklearn.config_context(working_memory=2 * 8 * 15 / 2**20):
            found = LORAS[rows, columns]
        np.testing.assert_array_equal(found, ROWS[rows, columns])

    def test_rows_of_a_store_counted_from_its_end(self):
        view = LoRACollection(LORAS._store, np.array([-2, -1]))
        np.testing.assert_array_equal(view.read(), ROWS[-2:])

    def test_columns_of_picked_rows(self):
        np.testing.assert_array_equal(LORAS[[2, 0], 3:5], ROWS[[2, 0], 3:5])
        np.testing.assert_array_equal(LORAS[[2, 0], 3], ROWS[[2, 0], 3])
        np.testing.assert_array_equal(LORAS[..., [1, 2]], ROWS[:, [1, 2]])
        assert LORAS[...] is LORAS

    @pytest.mark.parametrize(
        "key", [5, -6, [0, 5], [True] * 4, [[0]], "a", [0.5], None, np.array(["a"]), True]
    )
    def test_keys_that_pick_no_rows(self, key):
        with pytest.raises(IndexError):
            LORAS[key]

    @pytest.mark.parametrize("rows", [[[0]], [0.5], "a"])
    def test_rows_that_are_none(self, rows):
        for X in (LORAS, LORAS[1:]):
            with pytest.raises(IndexError, match=r"adapters are .* as np.isin\(X.ids, ids\)"):
                X.read(rows)

    def test_keys_of_too_many_dimensions(self):
        with pytest.raises(IndexError, match="2 dimensions, but 3"):
            LORAS[0, 0, 0]
        with pytest.raises(IndexError, match=r"X\[rows\]\[:, columns\]"):
            LORAS[[0, 1], [0, 1]]


class TestAdapters:
    def test_one_adapter_is_a_mapping_at_its_true_rank(self):
        one, two = ((np.ones((3, rank)), np.ones((2, rank))) for rank in (1, 2))
        X = LoRACollection.from_factors([{"q": two}, {"q": one, "v": two}])
        adapter = X[0]
        assert isinstance(adapter, Mapping)
        assert len(adapter) == 1
        assert repr(adapter) == "LoRAAdapter(id=0, n_modules=1)"
        with pytest.raises(KeyError):
            adapter["v"]
        U, V = X[1]["q"]
        assert U.shape == (3, 1)
        assert V.shape == (2, 1)

    @pytest.mark.parametrize("position", [1, -4, np.int64(1)])
    def test_integers(self, position):
        assert LORAS[position].id == "b"
        U, V = LORAS[position, ...]["q"]
        np.testing.assert_array_equal(U.ravel(), ROWS[1, :6])
        np.testing.assert_array_equal(V.ravel(), ROWS[1, 6:10])
        np.testing.assert_array_equal(LORAS[position].side["scale"], ROWS[1, -1:])

    def test_adapters_of_views(self):
        view = LORAS[[3, 1]]
        assert [adapter.id for adapter in view] == ["d", "b"]
        assert view[-2].id == "d"
        np.testing.assert_array_equal(view[-1]["v"][0].ravel(), ROWS[1, 10:12])

    def test_plain_rows(self):
        X = LoRACollection.from_array(ROWS, LoRALayout.rows(15))
        U, V = X[0]["row"]
        np.testing.assert_array_equal(U[:, 0], ROWS[0])
        np.testing.assert_array_equal(V, [[1.0]])

    def test_writing_to_an_adapter_leaves_the_collection(self):
        LORAS[0]["q"][0][:] = 0
        assert ROWS[0, 0] == 1


class TestWithLayout:
    @given(keys)
    def test_more_room_is_padding(self, key):
        wide = LORAS.layout.with_ranks([3, 2])
        view = LORAS[key].with_layout(wide)
        assert view.shape == (len(view), wide.width)
        assert view._store is LORAS._store
        for narrow, padded in zip(LORAS[key], view, strict=True):
            assert padded.id == narrow.id
            for name in ("q", "v"):
                np.testing.assert_array_equal(padded[name][0], narrow[name][0])
                np.testing.assert_array_equal(padded[name][1], narrow[name][1])
        np.testing.assert_array_equal(view.with_layout(LAYOUT).read(), LORAS[key].read())
        np.testing.assert_array_equal(np.asarray(view[::-1]), np.asarray(view)[::-1])

    def test_padding_alone_may_be_dropped(self, random_loras, rng):
        X = random_loras(rng, rank=2, dtype=np.float32)
        wide = X.with_layout(X.layout.with_ranks([5, 2, 3]))
        assert wide.read().dtype == np.float32
        np.testing.assert_array_equal(np.asarray(wide), wide.read())
        assert wide.nbytes == wide.read().nbytes
        narrow = wide.with_layout(X.layout)
        np.testing.assert_array_equal(narrow.read(), X.read())
        stored = LoRACollection.from_array(wide.read(), wide.layout)
        np.testing.assert_array_equal(stored.with_layout(X.layout).read(), X.read())

    def test_side_features_stay(self, random_loras, rng):
        X = random_loras(rng, 2, side=[{"s": [1.0, 2.0]}, {"s": [3.0, 4.0]}])
        wide = X.with_layout(X.layout.with_ranks([5, 2, 3]))
        np.testing.assert_array_equal(wide.read()[:, wide.layout.side_slice], [[1, 2], [3, 4]])

    def test_truncation_is_refused(self):
        message = (
            r"module 'q' of adapter 'a' has rank 2, with U \(3, 2\) and V \(2, 2\), but rank 1"
        )
        with pytest.raises(ValueError, match=message):
            LORAS.with_layout(LAYOUT.with_ranks([1, 1]))

    def test_other_modules_are_refused(self):
        with pytest.raises(ValueError, match="module 'q' has updates of shape"):
            LORAS.with_layout(LAYOUT.with_shapes([(4, 2, 2), (2, 2, 1)]))


class TestCopies:
    @given(keys)
    def test_pickles_and_copies(self, key):
        view = LORAS[key].with_layout(LAYOUT.with_ranks([2, 3]))
        for twin in (pickle.loads(pickle.dumps(view)), copy.deepcopy(view), copy.copy(view)):
            np.testing.assert_array_equal(twin.read(), view.read())
            np.testing.assert_array_equal(twin.ids, view.ids)
            np.testing.assert_array_equal(twin.ranks, view.ranks)
            assert twin.layout == view.layout

    def test_a_view_pickles_without_the_rows_it_leaves_out(self):
        X = LoRACollection.from_array(np.ones((1000, 40)), LoRALayout.rows(40))
        assert len(pickle.dumps(X[:10])) < len(pickle.dumps(X)) / 50

    @pytest.mark.parametrize("array", [ROWS, ROWS * np.nan, np.asfortranarray(ROWS)])
    def test_a_view_pickles_the_same_array_every_time(self, array):
        view = LoRACollection.from_array(array, LAYOUT, ranks=LORAS.ranks)[[3, 1]]
        first, second = (view.__reduce__()[1][0] for _ in range(2))
        assert first is second

    @pytest.mark.parametrize("rows", [slice(2, None), [3, 0]], ids=["slice", "some"])
    @pytest.mark.parametrize("compared", [1, 2**20])
    def test_a_view_pickles_what_was_written_since(self, rows, compared, monkeypatch):
        monkeypatch.setattr(sklora._stores, "_COMPARED_BYTES", compared)
        array = np.ones((5, 40))
        view = LoRACollection.from_array(array, LoRALayout.rows(40))[rows]
        pickle.dumps(view)
        array[3] = 7.0
        np.testing.assert_array_equal(pickle.loads(pickle.dumps(view)).read(), view.read())

    def test_low_precision_stays_low_in_pickles(self):
        X = LoRACollection.from_array(np.ones((100, 40), ml_dtypes.bfloat16), LoRALayout.rows(40))
        assert len(pickle.dumps(X)) < 100 * 40 * 3
        assert pickle.loads(pickle.dumps(X[3:])).read().dtype == np.float32
