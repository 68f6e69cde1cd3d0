import sys
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import pytest
from sklearn.dummy import DummyClassifier, DummyRegressor
from sklearn.exceptions import NotFittedError
from sklearn.experimental import enable_halving_search_cv  # noqa: F401
from sklearn.linear_model import Ridge
from sklearn.metrics import accuracy_score, r2_score
from sklearn.model_selection import GridSearchCV, HalvingGridSearchCV, cross_validate
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from sklora import (
    ARCHITECTURES,
    DenseProduct,
    OAlign,
    SVDSpectrum,
    UpdateKernel,
    architecture_grid,
    make_architecture,
)
from sklora.inspection import ArchitectureComparisonDisplay
from sklora.inspection._architectures import architecture_name


@pytest.fixture
def zoo(rng, random_loras):
    return random_loras(rng, 24), rng.normal(size=24)


@pytest.fixture
def search(zoo):
    """Over two settings of every architecture, trained for an epoch or two."""
    grid = architecture_grid("regression", random_state=0)
    for entry in grid[:-1]:
        entry["model__max_epochs"] = [1, 2]
    return GridSearchCV(make_architecture("svd", "regression"), grid, cv=3).fit(*zoo)


def rows(axes):
    return [label.get_text() for label in axes.get_yticklabels()]


def numbers(axes):
    axes.figure.draw_without_rendering()
    [secondary] = axes.child_axes
    return [label.get_text() for label in secondary.get_yticklabels()]


class TestFromEstimator:
    def test_best_candidate_of_each(self, search):
        display = ArchitectureComparisonDisplay.from_estimator(search)
        scores, times = display.scores["regression"], display.fit_times["regression"]
        assert list(scores) == [*ARCHITECTURES, "dense (kernel)"]
        results = search.cv_results_
        for place, name in enumerate(ARCHITECTURES):
            two = [2 * place, 2 * place + 1]
            best = max(two, key=lambda n: results["mean_test_score"][n])
            expected = [results[f"split{fold}_test_score"][best] for fold in range(3)]
            np.testing.assert_array_equal(scores[name], expected)
            assert times[name] == results["mean_fit_time"][best]
        best = results["mean_test_score"][10:].max()
        assert scores["dense (kernel)"].mean() == pytest.approx(best)
        assert display.ax_.get_xlabel() == "R2"
        assert display.ax_.get_title() == "regression"

    def test_is_drawn(self, search, overlapping):
        display = ArchitectureComparisonDisplay.from_estimator(search)
        assert rows(display.ax_) == [*ARCHITECTURES, "dense (kernel)"]
        np.testing.assert_allclose(display.figure_.get_size_inches(), (6.5, 1.2 + 0.4 * 6))
        assert overlapping(display.figure_) == []

    def test_one_architecture(self, zoo):
        model = make_architecture("mlp", "regression").set_params(model__max_epochs=1)
        search = GridSearchCV(model, {"model__lr": [1e-3, 1e-2]}, cv=2).fit(*zoo)
        _, ax = plt.subplots()
        display = ArchitectureComparisonDisplay.from_estimator(
            search,
            score_name="share",
            ax=ax,
            errorbar_kw={"ms": 9},
            fold_kw={"marker": "x"},
        )
        assert display.ax_ is ax
        assert display.folds_[0].get_marker() == "x"
        assert display.errorbars_[0][0].get_markersize() == 9
        assert rows(display.ax_) == ["mlp"]
        assert display.ax_.get_xlabel() == "share"

    @pytest.mark.parametrize(
        ("scoring", "refit", "name"),
        [
            ("neg_mean_squared_error", True, "neg mean squared error"),
            (["r2", "neg_mean_squared_error"], "r2", "R2"),
            (lambda model, X, y: 1.0, True, "score"),
        ],
    )
    def test_score_name(self, zoo, scoring, refit, name):
        model = make_pipeline(SVDSpectrum(), Ridge())
        search = GridSearchCV(model, {"ridge__alpha": [1]}, scoring=scoring, refit=refit, cv=2)
        display = ArchitectureComparisonDisplay.from_estimator(search.fit(*zoo))
        assert display.ax_.get_xlabel() == name
        assert rows(display.ax_) == ["SVDSpectrum + Ridge"]

    def test_first_of_equal_candidates(self, zoo):
        model = Pipeline([("features", SVDSpectrum()), ("model", Ridge())])
        equal = {"model": [DummyRegressor()], "model__quantile": [0.2, 0.8]}  # of no effect
        search = GridSearchCV(model, [{"model": [Ridge()]}, equal], cv=2, refit=lambda results: 0)
        display = ArchitectureComparisonDisplay.from_estimator(search.fit(*zoo))
        times = display.fit_times["regression"]
        first = search.cv_results_["mean_fit_time"][1]
        assert times["SVDSpectrum + DummyRegressor"] == first

    def test_classification(self, zoo):
        search = GridSearchCV(DummyClassifier(), {"strategy": ["prior"]}, cv=2)
        display = ArchitectureComparisonDisplay.from_estimator(
            search.fit(zoo[0], np.arange(24) % 2)
        )
        assert display.ax_.get_xlabel() == "accuracy"
        assert list(display.scores) == ["classification"]
        assert rows(display.ax_) == ["DummyClassifier"]

    @pytest.mark.filterwarnings("ignore::sklearn.exceptions.FitFailedWarning", "ignore:One or more")
    def test_failed_candidates_are_left_out(self, zoo):
        model = Pipeline([("features", SVDSpectrum()), ("model", Ridge())])
        grid = [{"model": [Ridge(alpha=-1.0)]}, {"model": [DummyRegressor()]}]
        search = GridSearchCV(model, grid, cv=2)
        search.fit(*zoo)
        display = ArchitectureComparisonDisplay.from_estimator(search)
        assert rows(display.ax_) == ["SVDSpectrum + DummyRegressor"]
        search.cv_results_["mean_test_score"][:] = np.nan
        with pytest.raises(ValueError, match="no candidate"):
            ArchitectureComparisonDisplay.from_estimator(search)

    def test_what_refit_chose_stands_for_its_architecture(self, zoo):
        model = make_pipeline(SVDSpectrum(), Ridge())
        grid = {"ridge__alpha": [1e-9, 1.0, 1e9]}
        means = GridSearchCV(model, grid, cv=2).fit(*zoo).cv_results_["mean_test_score"]
        worst = int(np.argmin(means))
        search = GridSearchCV(model, grid, cv=2, refit=lambda results: worst).fit(*zoo)
        display = ArchitectureComparisonDisplay.from_estimator(search)
        [scores] = display.scores["regression"].values()
        assert scores.mean() == pytest.approx(means[worst])

    def test_halving_counts_as_far_as_it_went(self, zoo):
        model = Pipeline([("features", SVDSpectrum()), ("model", Ridge())])
        grid = {"features": [SVDSpectrum(), OAlign(0), DenseProduct(), "passthrough"]}
        search = HalvingGridSearchCV(model, grid, cv=2, min_resources=12, factor=2).fit(*zoo)
        results = search.cv_results_
        assert results["iter"].tolist() == [0, 0, 0, 0, 1, 1]
        results["mean_test_score"][:4] = 1.0  # by luck, of few adapters
        display = ArchitectureComparisonDisplay.from_estimator(search)
        for place in (4, 5):
            name = architecture_name(model, results["params"][place])
            expected = [results[f"split{fold}_test_score"][place] for fold in range(2)]
            np.testing.assert_array_equal(display.scores["regression"][name], expected)

    def test_long_numbers_do_not_overlap(self, overlapping):
        name = "SVDSpectrum + LogisticRegression"
        scores = {name: np.array([-0.63619, -0.63684, -0.6376, -0.63653, -0.6354])}
        display = ArchitectureComparisonDisplay(
            scores={"loss": scores}, fit_times={"loss": {name: 1}}
        )
        assert overlapping(display.plot().figure_) == []

    def test_long_names_leave_room_for_the_scores(self, overlapping):
        name = "SVDSpectrum + StandardScaler + PCA + LogisticRegression"
        scores = {name: np.array([0.6, 0.7]), 3 * name: np.array([0.5, 0.6]), "svd": np.ones(2)}
        display = ArchitectureComparisonDisplay(scores={"size": scores}).plot()
        assert overlapping(display.figure_) == []
        assert display.ax_.get_position().width > 0.3
        assert rows(display.ax_)[0].split() == name.split()

    def test_refused(self, zoo):
        search = GridSearchCV(
            DummyRegressor(), {}, scoring=["r2", "neg_max_error"], refit=False, cv=2
        )
        with pytest.raises(NotFittedError):
            ArchitectureComparisonDisplay.from_estimator(search)
        with pytest.raises(ValueError, match="set refit to the name of one"):
            ArchitectureComparisonDisplay.from_estimator(search.fit(*zoo))
        model = make_pipeline(SVDSpectrum(), Ridge()).fit(*zoo)
        with pytest.raises(TypeError, match=r"Pipeline, which is no search; .* from_cv_results"):
            ArchitectureComparisonDisplay.from_estimator(model)


class TestFromCVResults:
    @pytest.fixture
    def results(self, zoo):
        return {
            name: cross_validate(make_pipeline(SVDSpectrum(), model), *zoo, cv=3)
            for name, model in {"ridge": Ridge(), "mean": DummyRegressor()}.items()
        }

    def test_values(self, results):
        display = ArchitectureComparisonDisplay.from_cv_results({"loss": results}, score_name="R2")
        for name in ("ridge", "mean"):
            np.testing.assert_array_equal(display.scores["loss"][name], results[name]["test_score"])
            assert display.fit_times["loss"][name] == results[name]["fit_time"].mean()
        [bars] = display.errorbars_
        means = [results[name]["test_score"].mean() for name in ("ridge", "mean")]
        np.testing.assert_allclose(bars[0].get_xdata(), means)
        spreads = [np.ptp(segment[:, 0]) / 2 for segment in bars[2][0].get_segments()]
        np.testing.assert_allclose(
            spreads, [results[name]["test_score"].std(ddof=1) for name in ("ridge", "mean")]
        )
        [folds] = display.folds_
        scores = [results[name]["test_score"] for name in ("ridge", "mean")]
        np.testing.assert_array_equal(folds.get_xdata(), np.concatenate(scores))
        assert folds.get_ydata().tolist() == [0, 0, 0, 1, 1, 1]
        assert display.ax_.yaxis_inverted()

    def test_tasks(self, results, monkeypatch):
        display = ArchitectureComparisonDisplay.from_cv_results(
            {"loss": results, "$size_$": {"ridge": results["ridge"]}},
            score_name={"loss": "R2", "$size_$": "$error_$"},
            baseline={"loss": 0.0},
        )
        assert [axes.get_title() for axes in display.axes_] == ["loss", "$size_$"]
        assert [axes.get_xlabel() for axes in display.axes_] == ["R2", "$error_$"]
        assert [[text.get_text() for text in axes.texts] for axes in display.axes_] == [
            ["constant"],
            [],
        ]
        [text] = display.ax_.texts
        assert text.xy[0] == 0.0
        assert [len(axes.lines) for axes in display.axes_] == [5, 4]
        assert display.figure_.get_size_inches().tolist() == [12, 2]
        display.figure_.draw_without_rendering()
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        with pytest.raises(ImportError, match=r"^ArchitectureComparisonDisplay\.plot requires"):
            display.plot()
        with pytest.raises(ImportError, match=r"^ArchitectureComparisonDisplay\.from_cv_results "):
            ArchitectureComparisonDisplay.from_cv_results(results)

    def test_axes(self, results):
        _, axes = plt.subplots(1, 2)
        both = {"a": results, "b": results}
        display = ArchitectureComparisonDisplay.from_cv_results(both, ax=axes)
        assert list(display.axes_) == list(axes)
        with pytest.raises(ValueError, match=r"2 tasks, 'a', 'b', but 1 axes"):
            display.plot(axes[0])
        with pytest.raises(ValueError, match="1 tasks"):
            ArchitectureComparisonDisplay.from_cv_results({"a": results}, ax=axes)

    @pytest.mark.parametrize("shape", [(2, 2), (1, 4), (4, 1)])
    def test_axes_of_a_grid(self, results, shape):
        _, axes = plt.subplots(*shape, squeeze=False)
        four = dict.fromkeys("abcd", results)
        display = ArchitectureComparisonDisplay.from_cv_results(four, ax=axes)
        assert list(display.axes_) == list(axes.flat)
        display = ArchitectureComparisonDisplay.from_cv_results({"a": results}, ax=axes[:1, :1])
        assert display.ax_ is axes[0, 0]

    def test_styles(self, results):
        display = ArchitectureComparisonDisplay.from_cv_results(
            {"loss": results}, errorbar_kw={"capsize": 9}, fold_kw={"marker": "x"}
        )
        assert display.folds_[0].get_marker() == "x"
        assert display.errorbars_[0][1][0].get_markersize() == 18

    def test_styles_by_any_name(self, results):
        display = ArchitectureComparisonDisplay.from_cv_results(
            {"loss": results}, errorbar_kw={"c": "red", "ms": 9}, fold_kw={"c": "red", "mfc": "red"}
        )
        assert display.folds_[0].get_color() == display.folds_[0].get_markerfacecolor() == "red"
        assert display.errorbars_[0][0].get_color() == "red"
        assert display.errorbars_[0][0].get_markersize() == 9

    def test_refused(self, results):
        with pytest.raises(ValueError, match="'ridge' for 'loss' has no 'test_score'"):
            ArchitectureComparisonDisplay.from_cv_results({"loss": {"ridge": {"test_r2": [1]}}})
        search = GridSearchCV(Ridge(), {})
        for others in ({"mean_test_score": np.ones(2)}, results, search):
            with pytest.raises(ValueError, match=r"no 'test_score'; .* to from_estimator"):
                ArchitectureComparisonDisplay.from_cv_results(others)
        for nothing in ({}, {"loss": {}}):
            with pytest.raises(ValueError, match="no scores"):
                ArchitectureComparisonDisplay.from_cv_results(nothing)


def test_numbers_beside_the_rows():
    display = ArchitectureComparisonDisplay(
        scores={"t": {"a": np.array([-0.5, -0.7]), "b": np.array([0.5])}},
        fit_times={"t": {"a": 0.123, "b": 12.3}},
    ).plot()
    assert numbers(display.ax_) == ["−0.600 ± 0.141  0.12 s", " 0.500            12 s"]


@pytest.mark.parametrize(
    ("score", "seconds", "expected"),
    [
        (0.01, 0.994, "0.010   0.99 s"),
        (0.00999, 1.0, "9.99e−03   1.0 s"),
        (9999.4, 9.94, "9999.400   9.9 s"),
        (1e4, 10.0, "1.00e+04   10 s"),
    ],
)
def test_how_many_digits_there_are(score, seconds, expected):
    display = ArchitectureComparisonDisplay(
        scores={"t": {"a": np.array([score])}}, fit_times={"t": {"a": seconds}}
    ).plot()
    assert numbers(display.ax_) == [expected]


def test_numbers_of_any_size_say_something(overlapping):
    scores = {"svd": np.array([-1e-6, -3e-6]), "mlp": np.array([-4e-5]), "zero": np.array([0.0])}
    for size, expected in [(1, "−2.00e−06 ± 1.41e−06"), (1e14, "−2.00e+08 ± 1.41e+08")]:
        of_size = {name: size * folds for name, folds in scores.items()}
        display = ArchitectureComparisonDisplay(scores={"t": of_size}).plot()
        assert numbers(display.ax_)[0] == expected
        assert overlapping(display.figure_) == []
    failed = {"svd": np.array([np.nan]), "mlp": np.array([0.0])}
    display = ArchitectureComparisonDisplay(scores={"t": failed}).plot()
    assert numbers(display.ax_) == ["  nan", "0.000"]


class TestFromPredictions:
    def test_values(self):
        display = ArchitectureComparisonDisplay.from_predictions(
            [0, 1, 1, 1], {"a": [0, 1, 1, 0], "b": [1, 1, 1, 1]}, metric=accuracy_score
        )
        assert {name: float(*s) for name, s in display.scores["predictions"].items()} == {
            "a": 0.75,
            "b": 0.75,
        }
        assert display.ax_.get_xlabel() == "accuracy score"
        assert numbers(display.ax_) == ["0.750", "0.750"]

    def test_styles_and_axes(self):
        _, ax = plt.subplots()
        display = ArchitectureComparisonDisplay.from_predictions(
            [0.0, 1.0, 2.0],
            {"a": [0.0, 1.0, 5.0]},
            metric=r2_score,
            ax=ax,
            errorbar_kw={"ms": 9},
            fold_kw={"marker": "x"},
        )
        assert display.ax_ is ax
        assert display.folds_[0].get_xdata() == [r2_score([0, 1, 2], [0, 1, 5])]
        assert display.folds_[0].get_marker() == "x"
        assert display.errorbars_[0][0].get_markersize() == 9

    def test_metric_without_a_name(self):
        metric = partial(accuracy_score, normalize=False)
        display = ArchitectureComparisonDisplay.from_predictions([0], {"a": [0]}, metric=metric)
        assert display.ax_.get_xlabel() == "score"

    def test_lengths(self):
        with pytest.raises(ValueError, match="inconsistent"):
            ArchitectureComparisonDisplay.from_predictions(
                [0], {"a": [0, 1]}, metric=accuracy_score
            )


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_names_of_the_grid(task):
    grid = architecture_grid(task)
    estimator = make_architecture("svd", task)
    names = [architecture_name(estimator, {k: v for k, [v, *_] in e.items()}) for e in grid]
    assert names == [*ARCHITECTURES, "dense (kernel)"]


def test_name_of_other_steps():
    model = make_architecture("mlp", "regression")
    assert architecture_name(model, {"features": Pipeline([("s", SVDSpectrum())])}) == "svd"
    scaled = architecture_name(model, {"features": StandardScaler()})
    assert scaled == "StandardScaler + MLPNetRegressor"
    two = make_pipeline(SVDSpectrum(), Ridge())
    assert architecture_name(model, {"features": two}) == "SVDSpectrum + Ridge + MLPNetRegressor"
    gl_net = make_architecture("gl-net", "regression")
    assert architecture_name(gl_net, {"features": None}) == "gl-net"
    assert architecture_name(gl_net, {"features": OAlign()}) == "OAlign + GLNetRegressor"
    kernel = make_pipeline(UpdateKernel(), StandardScaler(), Ridge())
    assert architecture_name(kernel, {}) == "dense (kernel)"
