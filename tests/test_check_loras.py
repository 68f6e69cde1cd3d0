from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import sklearn
from sklearn.base import BaseEstimator

from sklora._stores import ArrayStore
from sklora.collection import LoRACollection, LoRALayout, check_loras, check_numbers

LAYOUT = LoRALayout([("q", 3, 2, 2), ("v", 2, 2, 1)])
ROWS = np.arange(1.0, 5 * LAYOUT.width + 1).reshape(5, -1)
LORAS = LoRACollection.from_array(ROWS, LAYOUT, ids=list("abcde"))


class Estimator(BaseEstimator):
    def __init__(self, layout=None):
        self.layout = layout

    def fit(self, X, y=None):
        self.loras = check_loras(self, X, reset=True)
        return self

    def check(self, X, rank="any"):
        return check_loras(self, X, reset=False, rank=rank)


def with_ranks(*ranks):
    layout = LAYOUT.with_ranks(ranks)
    return LoRACollection.from_array(np.ones((4, layout.width)), layout)


class TestCollections:
    def test_fit_learns_the_layout(self):
        estimator = Estimator().fit(LORAS)
        assert estimator.layout_ == LAYOUT
        assert estimator.n_features_in_ == LAYOUT.width
        assert estimator.loras._store is LORAS._store

    def test_a_declared_layout_makes_room(self):
        wide = LAYOUT.with_ranks([4, 4])
        estimator = Estimator(wide).fit(LORAS)
        assert estimator.layout_ == estimator.loras.layout == wide
        assert estimator.n_features_in_ == wide.width
        assert estimator.check(with_ranks(4, 3), rank="fitted").layout == wide

    def test_any_rank_keeps_its_layout(self):
        X = with_ranks(5, 1)
        assert Estimator().fit(LORAS).check(X).layout == X.layout

    def test_fitted_rank_is_laid_out_as_fitted(self):
        loras = Estimator().fit(LORAS).check(with_ranks(1, 1), rank="fitted")
        assert loras.layout == LAYOUT
        assert loras.ranks.tolist() == [[1, 1]] * 4

    def test_padding_does_not_count_as_rank(self):
        X = LORAS.with_layout(LAYOUT.with_ranks([8, 8]))
        np.testing.assert_array_equal(Estimator().fit(LORAS).check(X, rank="fitted").read(), ROWS)

    def test_what_a_store_checks_is_not_read_again(self):
        class Checked(ArrayStore):
            is_checked = True

            def read(self, rows, *, copy=True):
                raise AssertionError("nothing has to be read")

        X = LoRACollection(Checked(ROWS, LAYOUT, LORAS.ranks, LORAS.ids))
        estimator = Estimator().fit(X)
        assert estimator.check(X[1:], rank="fitted").shape == (4, LAYOUT.width)

    def test_stale_feature_names_go(self):
        estimator = Estimator().fit(pd.DataFrame({"a": [1.0], "b": [2.0]}))
        assert list(estimator.feature_names_in_) == ["a", "b"]
        estimator.fit(LORAS)
        assert not hasattr(estimator, "feature_names_in_")


class TestArrays:
    def test_plain_rows(self):
        estimator = Estimator().fit([[1, 2, 3]])
        assert estimator.layout_ == LoRALayout.rows(3)
        assert estimator.n_features_in_ == 3
        assert estimator.loras.dtype == np.float64

    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    def test_floats_are_kept_and_not_copied(self, dtype):
        X = ROWS.astype(dtype)
        assert np.asarray(Estimator(LAYOUT).fit(X).loras) is X

    def test_the_layout_of_the_estimator(self):
        estimator = Estimator(LAYOUT).fit(ROWS)
        assert estimator.layout_ == LAYOUT
        assert estimator.loras.ranks.tolist() == [[2, 1]] * 5
        assert estimator.check(LORAS).layout == LAYOUT
        assert estimator.check(ROWS[:2], rank="fitted").layout == LAYOUT

    def test_data_frames(self):
        frame = pd.DataFrame(ROWS, columns=[f"w{i}" for i in range(ROWS.shape[1])])
        estimator = Estimator(LAYOUT).fit(frame)
        np.testing.assert_array_equal(estimator.feature_names_in_, frame.columns)
        np.testing.assert_array_equal(estimator.check(frame).read(), ROWS)
        with pytest.raises(ValueError, match="feature names should match"):
            estimator.check(frame.rename(columns={"w0": "other"}))

    def test_rows_are_read_in_the_fitted_layout(self):
        loras = Estimator().fit(LORAS).check(ROWS)
        assert loras.layout == LAYOUT
        np.testing.assert_array_equal(loras.read(), ROWS)


class TestRefused:
    def test_no_adapters(self):
        with pytest.raises(ValueError, match=r"0 adapters .* minimum of 1 .* Estimator"):
            Estimator().fit(LORAS[:0])
        with pytest.raises(ValueError, match=r"0 sample\(s\)"):
            Estimator().fit(ROWS[:0])
        with pytest.raises(ValueError, match="2D array"):
            Estimator().fit([])

    @pytest.mark.parametrize("fitted", [False, True])
    def test_sparse(self, fitted):
        estimator = Estimator().fit(ROWS) if fitted else Estimator()
        message = r"sparse.* LoRACollection\.from_factors .* X\.toarray\(\)"
        with pytest.raises(ValueError, match=message):
            (estimator.check if fitted else estimator.fit)(scipy.sparse.csr_array(ROWS))

    @pytest.mark.parametrize("X", [list(LORAS), tuple(LORAS), LORAS[0], [{"q": ()}]])
    def test_mappings(self, X):
        message = r"mappings .* LoRACollection\.from_factors.* X\[\[0\]\]"
        with pytest.raises(ValueError, match=message):
            Estimator().fit(X)

    @pytest.mark.parametrize("wrap", [np.array, pd.Series])
    def test_mappings_in_an_array(self, wrap):
        X = wrap([{"q": (np.ones((3, 1)), np.ones((2, 1)))}] * 4, dtype=object)[1:]
        with pytest.raises(ValueError, match=r"mappings .* LoRACollection\.from_factors"):
            Estimator().fit(X)

    @pytest.mark.parametrize(
        "X",
        [
            "zoo/a",
            Path("zoo/a"),
            ["zoo/a", "b"],
            [Path("zoo/a")],
            np.array(["zoo/a", "b"]),
            pd.Series(["zoo/a", "b"])[:1],
        ],
    )
    def test_paths(self, X):
        with pytest.raises(ValueError, match=r"paths, .* 'zoo/a'; .* sklora\.io\.read_adapters"):
            Estimator().fit(ROWS).check(X)

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    @pytest.mark.parametrize("fitted", [False, True])
    def test_numbers_that_are_not_finite(self, value, fitted):
        rows = ROWS.copy()
        rows[3, 12] = rows[4, 0] = value
        X = LoRACollection.from_array(rows, LAYOUT, ids=LORAS.ids)[1:]
        estimator = Estimator().fit(LORAS) if fitted else Estimator()
        with (
            sklearn.config_context(working_memory=2 * 8 * LAYOUT.width / 2**20),
            pytest.raises(ValueError, match="adapter 'd' has NaN or infinity in module 'v'"),
        ):
            (estimator.check if fitted else estimator.fit)(X)
        with pytest.raises(ValueError, match=r"NaN|infinity"):
            Estimator(LAYOUT).fit(rows)

    def test_columns_beyond_the_given_ranks(self):
        ranks = [[2, 1]] * 3 + [[2, 0], [1, 1]]
        X = LoRACollection.from_array(ROWS, LAYOUT, ranks=ranks)
        with pytest.raises(ValueError, match=r"adapter 3 is said to have rank 0 in module 'v'"):
            Estimator().fit(X)
        assert Estimator().fit(X[:3]).layout_ == LAYOUT

    def test_ranks_above_the_fitted_ones(self):
        estimator = Estimator().fit(LORAS)
        message = (
            r"module 'q' of adapter 0 has rank 3, with U \(3, 3\) and V \(2, 3\), but rank 2 .* "
            r"\(svd, dense, gl-net\)"
        )
        with pytest.raises(ValueError, match=message):
            estimator.check(with_ranks(3, 1), rank="fitted")

    def test_ranks_above_the_declared_ones(self):
        message = r"module 'v' of adapter 0 has rank 2, .* the estimator's layout"
        with pytest.raises(ValueError, match=message):
            Estimator(LAYOUT).fit(with_ranks(1, 2))

    @pytest.mark.parametrize("declared", [False, True])
    def test_other_modules(self, declared):
        X = LoRACollection.from_array(np.ones((2, 10)), LoRALayout([("q", 3, 2, 2)]))
        estimator = Estimator(LAYOUT) if declared else Estimator().fit(LORAS)
        with pytest.raises(ValueError, match=r"module 'v' of shape \(2, 2\) is missing"):
            (estimator.fit if declared else estimator.check)(X)

    def test_collections_where_plain_rows_were_fitted(self):
        with pytest.raises(ValueError, match=r"but plain rows of 14 features .*layout=X\.layout"):
            Estimator().fit(ROWS).check(LORAS)

    def test_columns_in_another_order(self):
        names = LAYOUT.feature_names()
        frame = pd.DataFrame(ROWS, columns=names)
        for moved in (frame[names[::-1]], frame[[*names[1:], names[0]]]):
            with pytest.raises(ValueError, match="columns of the layout in another order"):
                Estimator(LAYOUT).fit(moved)
        # Other names say nothing of the order.
        named = frame.rename(columns={names[0]: "first"})
        assert Estimator(LAYOUT).fit(named).feature_names_in_[0] == "first"

    def test_arrays_of_another_width(self):
        message = r"X has 13 columns, but the layout, of 2 modules, .*name='q'.*, takes 14"
        with pytest.raises(ValueError, match=message):
            Estimator(LAYOUT).fit(ROWS[:, 1:])
        with pytest.raises(ValueError, match="X has 13 features, but Estimator is expecting 14"):
            Estimator().fit(LORAS).check(ROWS[:, 1:])


def test_the_ranks_of_other_rows_are_not_copied(monkeypatch):
    view, counts, ranks = LORAS[[3, 1, 0]], [], LoRACollection.ranks
    monkeypatch.setattr(
        LoRACollection, "ranks", property(lambda X: counts.append(len(X)) or ranks.fget(X))
    )
    check_numbers(view, slice(1, 2), view.read(slice(1, 2)))
    assert counts == [1]
