"""Collections from factors, and the factors that are refused."""

import ml_dtypes
import numpy as np
import pytest
import torch

from sklora.collection import LoRACollection, LoRALayout

LAYOUT = LoRALayout([("q", 3, 2, 2), ("v", 2, 2, 1)], side=[("scale", 1)])


def pair(n=3, m=2, rank=2, fill=1.0):
    return np.full((n, rank), fill), np.full((m, rank), fill)


class TestFromFactors:
    def test_missing_modules_are_zero_updates_of_rank_zero(self):
        X = LoRACollection.from_factors(
            [{"q": pair(rank=2)}, {"v": pair(rank=1), "q": pair(rank=1)}]
        )
        assert X.layout == LoRALayout([("q", 3, 2, 2), ("v", 3, 2, 1)])
        assert X.ranks.tolist() == [[2, 0], [1, 1]]
        assert list(X[0]) == ["q"]
        np.testing.assert_array_equal(X.read(), [[1] * 10 + [0] * 5, [1, 0] * 5 + [1] * 5])

    def test_adapters_make_the_collection_they_came_from(self, random_loras, rng):
        X = random_loras(rng, 3, rank=[[1, 2, 0], [2, 2, 1], [1, 0, 3]])
        twin = LoRACollection.from_factors(X, layout=X.layout)
        np.testing.assert_array_equal(twin.read(), X.read())
        np.testing.assert_array_equal(twin.ranks, X.ranks)

    def test_adapters_bring_their_side_features(self):
        X = LoRACollection.from_factors(
            [{"q": pair()}, {"v": pair()}], side=[{"a": [1.0, 2.0]}, {"a": [3.0, 4.0]}]
        )
        twin = LoRACollection.from_factors([*X])
        assert twin.layout == X.layout
        np.testing.assert_array_equal(twin.read(), X.read())
        assert not LoRACollection.from_factors(map(dict, X)).layout.side
        other = LoRACollection.from_factors(X, side=[{"b": 1.0}, {"b": 2.0}])
        assert other.layout.side == (("b", 1),)
        with pytest.raises(ValueError, match=r"adapter 1 has side features \{\}, but \{'a': 2\}"):
            LoRACollection.from_factors([X[0], dict(X[1])])

    def test_plain_rows_are_whole_updates(self):
        factors = [{"row": (np.array([[1.0], [2.0]]), np.array([[3.0]]))}]
        for base_model in (None, "sd"):
            X = LoRACollection.from_factors(
                factors, layout=LoRALayout.rows(2), base_model=base_model
            )
            np.testing.assert_array_equal(X.read(), [[3, 6]])
        half = [{"row": [factor.astype(np.float16) * 200 for factor in factors[0]["row"]]}]
        X = LoRACollection.from_factors(half, layout=LoRALayout.rows(2), dtype=np.float32)
        np.testing.assert_array_equal(X.read(), [[120_000, 240_000]])

    def test_a_base_model_completes_a_declared_layout(self):
        layout = LoRALayout([("q", 3, 2, 2)], side=[("a", 1)])
        X = LoRACollection.from_factors(
            [{"q": pair()}], layout=layout, side=[{"a": 1.0}], base_model="sd"
        )
        assert X.layout == LoRALayout(layout.modules, side=layout.side, base_model="sd")

    def test_a_declared_layout_orders_and_makes_room(self):
        layout = LoRALayout([("v", 3, 2, 3), ("q", 3, 2, 3)])
        X = LoRACollection.from_factors([{"q": pair(rank=1)}], layout=layout)
        assert X.layout == layout
        assert X.ranks.tolist() == [[0, 1]]
        assert not X.ranks.flags.writeable

    def test_a_declared_layout_allows_for_no_adapters(self):
        X = LoRACollection.from_factors([], layout=LAYOUT)
        assert X.shape == (0, LAYOUT.width)
        assert list(X) == []
        nothing = LoRACollection.from_factors([{}], layout=LoRALayout(LAYOUT.modules))
        assert nothing.dtype == np.float32
        np.testing.assert_array_equal(nothing.read(), 0)

    def test_ids_base_model_and_side(self):
        X = LoRACollection.from_factors(
            [{"q": pair()}, {"q": pair()}],
            ids=["cat", "dog"],
            side=[{"a": [1.0, 2.0], "b": 3.0}, {"b": [6.0], "a": [4.0, 5.0]}],
            base_model="sd",
        )
        assert X.ids.tolist() == ["cat", "dog"]
        assert X.layout.base_model == "sd"
        assert X.layout.side == (("a", 2), ("b", 1))
        np.testing.assert_array_equal(X[:, X.layout.side_slice], [[1, 2, 3], [4, 5, 6]])
        assert X[1].id == "dog"
        np.testing.assert_array_equal(X[1].side["a"], [4, 5])
        np.testing.assert_array_equal(X[1].side["b"], [6])

    @pytest.mark.parametrize(
        ("dtype", "stored", "read"),
        [
            (np.float16, np.float16, np.float32),
            (ml_dtypes.bfloat16, ml_dtypes.bfloat16, np.float32),
            (np.float32, np.float32, np.float32),
            (np.float64, np.float64, np.float64),
            (np.int64, np.float64, np.float64),
        ],
    )
    def test_dtypes(self, dtype, stored, read):
        factors = [{"q": tuple(factor.astype(dtype) for factor in pair(fill=3))}]
        X = LoRACollection.from_factors(factors)
        assert X._store.array.dtype == stored
        for values in (X.read(), np.asarray(X), X[0]["q"][0], X[:, 0]):
            assert values.dtype == X.dtype == read
            assert (values == 3).all()
        assert X.nbytes == np.asarray(X).nbytes

    def test_mixed_dtypes_are_stored_in_their_common_one(self):
        U, V = pair()
        X = LoRACollection.from_factors([{"q": (U.astype(np.float16), V.astype(np.float32))}])
        assert X._store.array.dtype == np.float32
        X = LoRACollection.from_factors([X[0]], side=[{"a": np.ones(1)}])
        assert X._store.array.dtype == np.float64

    @pytest.mark.parametrize("other", [np.float16, np.int8, np.int64, np.float64])
    def test_every_dtype_mixes_with_bfloat16(self, other):
        """Of most of them NumPy knows no common type."""
        brain = tuple(factor.astype(ml_dtypes.bfloat16) for factor in pair(fill=3))
        factors = [{"q": brain}, {"q": tuple(factor.astype(other) for factor in pair(fill=5))}]
        X = LoRACollection.from_factors(factors)
        wide = other in (np.int64, np.float64)
        assert X._store.array.dtype == (np.float64 if wide else np.float32)
        assert [adapter["q"][0][0, 0] for adapter in X] == [3, 5]

    def test_the_dtype_can_be_chosen(self):
        X = LoRACollection.from_factors([{"q": pair()}], dtype=np.float16)
        assert X._store.array.dtype == np.float16


class TestRefusedFactors:
    @pytest.mark.parametrize(
        ("factors", "message"),
        [
            (
                {"q": (np.ones((3, 2)), np.ones((2, 3)))},
                r"module 'q' of adapter 1 has U \(3, 2\) and V \(2, 3\), of inner ranks 2 and 3.*"
                "transpose",
            ),
            ({"q": pair(rank=0)}, r"U \(3, 0\) and V \(2, 0\), of rank 0; leave a module out"),
            ({"q": pair(fill=np.nan)}, r"module 'q' of adapter 1 with U \(3, 2\).* has NaN or inf"),
            ({"q": pair(fill=np.inf)}, "NaN or infinity; leave the adapter out"),
            ({"q": pair(n=4)}, r"'q' has updates of shape \(3, 2\) in adapter 0 and .* \(4, 2\)"),
            ({"q": pair(m=3)}, r"\(3, 2\) in adapter 0 and .* \(3, 3\) in adapter 1"),
            ({"q": (np.ones((3, 2)), np.full((2, 2), np.nan))}, "NaN or infinity"),
            ({"q": (np.full((3, 2), np.nan), np.ones((2, 2)))}, "NaN or infinity"),
            ({"q": (np.ones((3, 2)), np.ones(2))}, r"has U \(3, 2\) and V \(2,\); factors are"),
            ({"q": (np.ones(2), np.ones((3, 2)))}, r"has U \(2,\) and V \(3, 2\); factors are"),
            ({"q": (np.ones(3), np.ones(2))}, r"has U \(3,\) and V \(2,\); factors are matrices"),
            ({"q": np.ones((3, 2))}, r"module 'q' of adapter 1 is no pair of factors"),
            ({"q": 3.0}, r"module 'q' of adapter 1 is no pair of factors"),
            ({"q": pair(fill=1j)}, "real numbers of at most 64 bits, got dtype complex128"),
        ],
    )
    def test_factors(self, factors, message):
        with pytest.raises(ValueError, match=message):
            LoRACollection.from_factors([{"q": pair()}, factors])

    @pytest.mark.parametrize(
        ("factor", "reason"),
        [
            (torch.ones(3, 2, dtype=torch.bfloat16), "BFloat16"),
            (torch.ones(3, 2, requires_grad=True), r"requires grad.* instead\. Pass NumPy arrays"),
            ([[1.0, 2.0], [3.0], [4.0]], "inhomogeneous"),
        ],
    )
    def test_what_numpy_does_not_take(self, factor, reason):
        message = rf"a factor of module 'q' of adapter 0 is given as a .*{reason}.*\.float\(\)"
        with pytest.raises(ValueError, match=message):
            LoRACollection.from_factors([{"q": (factor, np.ones((2, 2)))}])

    def test_what_is_no_mapping(self):
        with pytest.raises(TypeError, match=r"adapter 0 is a ndarray; .*from_array"):
            LoRACollection.from_factors(np.ones((3, 4)))

    @pytest.mark.parametrize(
        ("factors", "message"),
        [
            ([], "no adapters are given; an empty collection needs layout="),
            ([{}, {}], "no adapter has a module; pass layout="),
        ],
    )
    def test_nothing_to_infer_a_layout_from(self, factors, message):
        with pytest.raises(ValueError, match=message):
            LoRACollection.from_factors(factors)

    @pytest.mark.parametrize(
        ("factors", "message"),
        [
            ({"k": pair()}, r"module 'k' of adapter 0, with U \(3, 2\) and V \(2, 2\), is not in"),
            ({"q": pair(n=4)}, r"has U \(4, 2\) and V \(2, 2\), but .* U \(3, 2\) and V \(2, 2\)"),
            ({"q": pair(m=3)}, r"has U \(3, 2\) and V \(3, 2\), but .* and V \(2, 2\)"),
            ({"q": pair(rank=3)}, r"has U \(3, 3\).* raise its ranks with layout\.with_ranks"),
        ],
    )
    def test_what_the_layout_does_not_take(self, factors, message):
        layout = LoRALayout([("q", 3, 2, 2)])
        with pytest.raises(ValueError, match=message):
            LoRACollection.from_factors([factors], layout=layout)

    def test_side_features_have_to_be_complete(self):
        factors = [{"q": pair()}, {"q": pair()}]
        for side in ([{"a": [1.0]}], [], [{"a": [1.0]}] * 3):
            with pytest.raises(ValueError, match=f"2 adapters have side features of {len(side)}"):
                LoRACollection.from_factors(factors, side=side)
        with pytest.raises(ValueError, match=r"adapter 1 has side features \{\}, but \{'a': 1\}"):
            LoRACollection.from_factors(factors, side=[{"a": [1.0]}, {}])
        with pytest.raises(
            ValueError, match=r"adapter 0 has side features \{'a': 2\}, but \{'a': 1"
        ):
            LoRACollection.from_factors(factors, side=[{"a": [1.0, 2.0]}, {"a": [1.0]}])
        with pytest.raises(ValueError, match="side feature 'a' of adapter 1 has NaN or inf"):
            LoRACollection.from_factors(factors, side=[{"a": [1.0]}, {"a": [np.nan]}])

    @pytest.mark.parametrize(
        ("side", "error", "message"),
        [
            ({"a": [1.0]}, TypeError, r"side features of adapter 0 are a str; .*\{name: vector\}"),
            ([[1.0]], TypeError, "side features of adapter 0 are a list"),
            (
                [{"a": torch.ones(2, dtype=torch.bfloat16)}],
                ValueError,
                r"side feature 'a' of adapter 0 is given as a .*BFloat16.*\.float\(\)",
            ),
        ],
    )
    def test_what_are_no_side_features(self, side, error, message):
        with pytest.raises(error, match=message):
            LoRACollection.from_factors([{"q": pair()}], side=side)

    def test_the_first_adapter_that_has_a_module_sets_its_shape(self):
        with pytest.raises(ValueError, match=r"in adapter 1 and .* in adapter 2"):
            LoRACollection.from_factors([{}, {"q": pair()}, {"q": pair(n=4)}])

    def test_complex_numbers_for_a_real_dtype(self):
        for fill, side in ((1j, 1.0), (1.0, 1j)):
            with pytest.raises(ValueError, match="real numbers"):
                LoRACollection.from_factors(
                    [{"q": pair(fill=fill)}], side=[{"a": side}], dtype=np.float64
                )

    def test_two_base_models(self):
        layout = LoRALayout([("q", 3, 2, 2)], base_model="a")
        with pytest.raises(ValueError, match=r"base_model='b', but the layout is of 'a'"):
            LoRACollection.from_factors([{"q": pair()}], layout=layout, base_model="b")

    def test_ids_of_other_length(self):
        with pytest.raises(ValueError, match=r"ids of shape \(2,\) do not name 1 adapters"):
            LoRACollection.from_factors([{"q": pair()}], ids=["a", "b"])

    def test_numbers_beyond_the_dtype(self):
        with pytest.raises(ValueError, match="module 'q' that float16 cannot hold; pass another"):
            LoRACollection.from_factors([{"p": pair(), "q": pair(fill=1e6)}], dtype=np.float16)

    @pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int64, bool])
    def test_a_dtype_that_rounds(self, dtype):
        with pytest.raises(ValueError, match=f"dtype={np.dtype(dtype)} .* floating-point"):
            LoRACollection.from_factors([{"q": pair(fill=1.5)}], dtype=dtype)

    def test_a_dtype_of_complex_numbers(self):
        with pytest.raises(
            ValueError, match="real numbers of at most 64 bits, got dtype complex64"
        ):
            LoRACollection.from_factors([{"q": pair()}], dtype=np.complex64)
