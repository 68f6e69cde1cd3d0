import pickle
import threading

import joblib
import numpy as np
import pytest
import sklearn
from sklearn.base import BaseEstimator
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LinearRegression, LogisticRegression, RidgeCV
from sklearn.metrics import r2_score
from sklearn.pipeline import make_pipeline

from sklora import LoRACollection, LoRALayout, MLPNetRegressor, SVDSpectrum
from sklora.inspection import module_importance
from sklora.inspection._permutation import module_groups, permuted

NAMES = ("layers.0.q", "layers.0.v", "layers.1.q", "layers.1.v")
PLANTED = 2


def planted(rng, n_adapters=80, dtype=np.float64):
    """Adapters of which one module alone, in size, is the label."""
    y = rng.uniform(1, 2, size=n_adapters)
    factors = []
    for label in y:
        adapter = {
            name: tuple(np.linalg.qr(rng.normal(size=(size, 2)))[0] for size in (6, 5))
            for name in NAMES
        }
        U, V = adapter[NAMES[PLANTED]]
        factors.append(adapter | {NAMES[PLANTED]: (label * U, V)})
    return LoRACollection.from_factors(factors, dtype=dtype), y


@pytest.fixture
def zoo(rng):
    return planted(rng)


@pytest.fixture
def model(zoo):
    return make_pipeline(SVDSpectrum(), RidgeCV()).fit(*zoo)


@pytest.fixture
def mixed(rng):
    """Ranks that differ, modules that are missing, and side features of two modules."""
    ranks = [[2, 1, 0], [1, 0, 2], [2, 2, 1], [0, 1, 2], [1, 2, 2]]
    factors = [
        {
            f"m{m}": (rng.normal(size=(4, r)), rng.normal(size=(3, r)))
            for m, r in enumerate(row)
            if r
        }
        for row in ranks
    ]
    side = [
        {
            "m0:magnitude_out": rng.normal(size=4),
            "m10": rng.normal(size=1),
            "m1": rng.normal(size=2),
        }
        for _ in ranks
    ]
    return LoRACollection.from_factors(factors, side=side, ids=list("abcde"))


ORDER = np.array([3, 0, 4, 1, 2])


class TestPermuted:
    @pytest.mark.parametrize("positions", [[0], [1, 2]])
    def test_modules_move_whole(self, mixed, positions):
        moved = permuted(mixed, positions, ORDER)
        for row, donor in enumerate(ORDER):
            for position, name in enumerate(mixed.layout.names):
                source = mixed[int(donor) if position in positions else row]
                assert (name in moved[row]) == (name in source)
                if name in source:
                    for factor, expected in zip(moved[row][name], source[name], strict=True):
                        np.testing.assert_array_equal(factor, expected)
        np.testing.assert_array_equal(moved.layout.infer_ranks(moved.read()), moved.ranks)
        assert moved.ids.tolist() == list("abcde")

    def test_side_features_follow_their_module(self, mixed):
        for position, name in ((0, "m0:magnitude_out"), (1, "m1")):
            moved = permuted(mixed, [position], ORDER)
            for row, donor in enumerate(ORDER):
                for side in mixed[row].side:
                    expected = mixed[int(donor) if side == name else row].side[side]
                    np.testing.assert_array_equal(moved[row].side[side], expected)

    def test_names_may_hold_colons(self):
        U, V = np.ones((2, 1)), np.ones((3, 1))
        X = LoRACollection.from_factors(
            [{"a:b": (U, V)}] * 2, side=[{"a:b:n": [n]} for n in (1, 2)]
        )
        moved = permuted(X, [0], np.array([1, 0]))
        assert [adapter.side["a:b:n"].tolist() for adapter in moved] == [[2], [1]]

    def test_the_original_stays(self, mixed):
        before, ranks = mixed.read(), mixed.ranks.copy()
        permuted(mixed, [0, 1, 2], ORDER).read(copy=False)[:] = 0
        np.testing.assert_array_equal(mixed.read(), before)
        np.testing.assert_array_equal(mixed.ranks, ranks)

    def test_all_modules_are_whole_adapters(self, mixed):
        moved = permuted(mixed, [0, 1, 2], ORDER)
        side = mixed.layout.side_slice
        np.testing.assert_array_equal(
            moved.read()[:, : side.start], mixed.read(ORDER)[:, : side.start]
        )

    def test_views_and_layouts(self, mixed):
        view = mixed.with_layout(mixed.layout.with_ranks([3, 2, 2]))[[4, 2, 0]]
        moved = permuted(view, [0], np.array([1, 2, 0]))
        assert moved.layout == view.layout
        np.testing.assert_array_equal(moved[0]["m0"][0], mixed[2]["m0"][0])
        np.testing.assert_array_equal(moved[0]["m1"][0], mixed[4]["m1"][0])

    @pytest.mark.parametrize("rows", [slice(1, 4), [4, 0], np.array([True, False] * 2 + [True])])
    def test_rows_of_it(self, mixed, rows):
        moved = permuted(mixed, [1], ORDER)
        part = pickle.loads(pickle.dumps(moved[rows]))
        np.testing.assert_array_equal(part.read(), moved.read()[rows])
        np.testing.assert_array_equal(part.ranks, moved.ranks[rows])
        assert part.ids.tolist() == moved.ids[rows].tolist()

    def test_pickle_holds_what_it_needs(self, zoo):
        moved = permuted(zoo[0], [0], np.arange(80)[::-1])
        assert len(pickle.dumps(moved[:2])) < len(pickle.dumps(moved)) / 8

    def test_memory_map(self, mixed, tmp_path):
        mixed.save(tmp_path / "zoo.safetensors")
        mapped = permuted(LoRACollection.open(tmp_path / "zoo.safetensors"), [2], ORDER)
        np.testing.assert_array_equal(mapped.read(), permuted(mixed, [2], ORDER).read())

    def test_in_blocks(self, zoo, model):
        moved = permuted(zoo[0], [PLANTED], np.arange(80)[::-1])
        whole = model.predict(moved)
        with sklearn.config_context(working_memory=0.01):
            np.testing.assert_allclose(model.predict(moved), whole)


class TestGroups:
    def test_depth(self):
        names = (
            "unet.down_blocks.0.attn.to_q",
            "unet.up_blocks.0.attn.to_q",
            "unet.down_blocks.0.resnets.1.conv",
            "unet.conv_in",
            "head",
            "unet.up1.2.conv",
        )
        layout = LoRALayout([(name, 2, 2, 1) for name in names])
        assert module_groups(layout, "depth") == {
            "unet.down_blocks.0": [0, 2],
            "unet.up_blocks.0": [1],
            "unet.conv_in": [3],
            "head": [4],
            "unet.up1.2": [5],
        }
        assert list(module_groups(layout, "module")) == list(names)


class TestImportance:
    def test_finds_the_planted_module(self, zoo, model):
        result = module_importance(model, *zoo, random_state=0)
        assert result.names == NAMES
        assert result.importances.shape == (4, 5)
        others = np.delete(result.importances_mean, PLANTED)
        assert result.importances_mean[PLANTED] > 1
        assert np.abs(others).max() < 0.05
        np.testing.assert_allclose(result.importances_mean, result.importances.mean(axis=1))
        np.testing.assert_allclose(result.importances_std, result.importances.std(axis=1))

    def test_finds_the_planted_block(self, zoo, model):
        result = module_importance(model, *zoo, by="depth", random_state=0)
        assert result.names == ("layers.0", "layers.1")
        assert result.importances_mean[1] > 1 > 0.1 > abs(result.importances_mean[0])

    def test_agrees_with_permuted_features(self, zoo, model):
        X, y = zoo
        result = module_importance(model, X, y, n_repeats=2, random_state=3)
        rng = np.random.RandomState(3)
        features, ridge = model[0].transform(X), model[1]
        for repeat in range(2):
            order = rng.permutation(len(X))
            for module in range(4):
                moved = features.copy()
                columns = slice(2 * module, 2 * module + 2)
                moved[:, columns] = features[order, columns]
                expected = ridge.score(features, y) - ridge.score(moved, y)
                assert result.importances[module, repeat] == pytest.approx(expected)

    def test_redundant_modules_hide_each_other(self, rng):
        y = np.arange(60) % 2
        factors = [
            {name: ((1 + label) * np.eye(3, 1), np.eye(2, 1)) for name in ("h.0.q", "h.0.v")}
            for label in y
        ]
        X = LoRACollection.from_factors(factors)
        model = make_pipeline(SVDSpectrum(), LogisticRegression(C=100)).fit(X, y)
        alone, together = (
            module_importance(model, X, y, by=by, random_state=0).importances_mean
            for by in ("module", "depth")
        )
        assert together[0] == pytest.approx(0.5, abs=0.15)
        assert alone.max() < together[0]

    def test_flat_rows_for_plain_estimators(self, zoo):
        class Norms(BaseEstimator):
            """Reads the flat array, as a step of scikit-learn does."""

            def fit(self, X, y=None):
                self.fitted_ = True
                return self

            def transform(self, X):
                return np.asarray(X) ** 2

        model = make_pipeline(Norms(), LinearRegression()).fit(*zoo)
        result = module_importance(model, *zoo, n_repeats=2, random_state=0)
        assert result.importances_mean.argmax() == PLANTED

    def test_a_rule_that_is_never_fitted(self, zoo):
        class Rule(BaseEstimator):
            def fit(self, X, y=None):
                return self

            def predict(self, X):
                return np.array([np.linalg.norm(adapter[NAMES[PLANTED]][0], 2) for adapter in X])

        pair = zoo[0][:2], zoo[1][:2]
        result = module_importance(Rule(), *pair, scoring="r2", n_repeats=9, random_state=0)
        assert result.importances_mean[PLANTED] > 0
        assert not np.delete(result.importances, PLANTED, axis=0).any()

    def test_network(self, zoo):
        X, y = zoo
        net = MLPNetRegressor(max_epochs=2, random_state=0).fit(X, y)
        result = module_importance(net, X, y, n_repeats=1, random_state=0)
        assert np.isfinite(result.importances).all()

    def test_scoring(self, zoo, model):
        X, y = zoo
        options = {"n_repeats": 2, "random_state": 0}
        by_name = module_importance(model, X, y, scoring="r2", **options).importances
        default = module_importance(model, X, y, **options).importances

        def scorer(model, X, y):
            return 10 * r2_score(y, model.predict(X))

        tenfold = module_importance(model, X, y, scoring=scorer, **options).importances
        np.testing.assert_array_equal(by_name, default)
        np.testing.assert_allclose(tenfold, 10 * default)
        for score in (1, True, np.float32(1)):
            options["scoring"] = lambda *_, score=score: score
            assert not module_importance(model, X, y, **options).importances.any()

    def test_jobs_and_seeds(self, zoo, model):
        def importances(**options):
            return module_importance(model, *zoo, n_repeats=2, **options).importances

        first = importances(random_state=0)
        with joblib.parallel_config("threading"):
            np.testing.assert_array_equal(importances(random_state=0, n_jobs=2), first)
        assert (importances(random_state=1) != first).any()

    def test_jobs_compute_as_scikit_learn_is_configured(self, zoo):
        X, y = zoo
        threads = joblib.parallel_config("threading")
        with sklearn.config_context(transform_output="pandas", working_memory=0.25), threads:
            # Of names of columns that are not those of the fit, scikit-learn would warn.
            model = make_pipeline(SVDSpectrum(), RidgeCV()).fit(X, y)
            memory, workers = [], set()

            def scorer(*arguments):
                workers.add(threading.get_ident())
                memory.append(sklearn.get_config()["working_memory"])
                return r2_score(y, model.predict(arguments[1]))

            module_importance(model, X, y, scoring=scorer, n_repeats=1, n_jobs=2)
        assert set(memory) == {0.25}
        assert workers - {threading.get_ident()}

    def test_refused(self, zoo, model):
        X, y = zoo
        with pytest.raises(TypeError, match="of type ndarray"):
            module_importance(model, X.read(), y)
        with pytest.raises(ValueError, match="by is 'layer'"):
            module_importance(model, X, y, by="layer")
        with pytest.raises(ValueError, match="n_repeats"):
            module_importance(model, X, y, n_repeats=0)
        with pytest.raises(ValueError, match="one score"):
            module_importance(model, X, y, scoring=["r2"])
        for scores in ({"r2": 1.0}, [1.0], "1", None):
            with pytest.raises(ValueError, match=r"scoring gives .* one number"):
                module_importance(model, X, y, scoring=lambda *_, scores=scores: scores)
        with pytest.raises(ValueError, match="1 adapters cannot be permuted"):
            module_importance(model, X[:1], y[:1])
        with pytest.raises(ValueError, match="inconsistent"):
            module_importance(model, X, y[:1], scoring=lambda *_: 1.0)
        with pytest.raises(NotFittedError):
            module_importance(MLPNetRegressor(), X, y)
