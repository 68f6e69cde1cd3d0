import sys

import matplotlib.pyplot as plt
import numpy as np
import pytest
from sklearn.linear_model import RidgeCV
from sklearn.pipeline import make_pipeline

from sklora import LoRACollection, SVDSpectrum
from sklora.inspection import ModuleImportanceDisplay, _importance, module_importance
from sklora.inspection._importance import _spread_out


def labels(display):
    return [label.get_text() for label in display.ax_.get_yticklabels()]


def test_from_estimator(rng, random_loras):
    X, y = random_loras(rng, 30), rng.normal(size=30)
    model = make_pipeline(SVDSpectrum(), RidgeCV()).fit(X, y)
    options = {"n_repeats": 3, "random_state": 0, "scoring": "neg_mean_absolute_error"}
    display = ModuleImportanceDisplay.from_estimator(
        model, X, y, by="module", bar_kw={"height": 0.5}, **options
    )
    expected = module_importance(model, X, y, **options)
    np.testing.assert_array_equal(display.importances, expected.importances)
    assert display.names == expected.names
    widths = [bar.get_width() for bar in display.bars_]
    np.testing.assert_allclose(widths, expected.importances_mean)
    assert {bar.get_height() for bar in display.bars_} == {0.5}
    assert labels(display) == ["m0", "m1", "m2"]
    assert {label.get_size() for label in display.ax_.get_yticklabels()} == {9}
    assert display.ax_.yaxis_inverted()
    assert display.ax_.get_ylabel() == ""


def test_blocks_jobs_and_axes(rng, monkeypatch):
    names = ["layers.0.q", "layers.0.v", "layers.1.q", "layers.1.v"]
    X = LoRACollection.from_factors(
        {name: (rng.normal(size=(6, 2)), rng.normal(size=(5, 2))) for name in names}
        for _ in range(30)
    )
    y = rng.normal(size=30)
    model = make_pipeline(SVDSpectrum(), RidgeCV()).fit(X, y)
    given = []

    def in_one_job(*args, n_jobs, **kwargs):
        given.append(n_jobs)
        return module_importance(*args, **kwargs)

    monkeypatch.setattr(_importance, "module_importance", in_one_job)
    _, ax = plt.subplots()
    display = ModuleImportanceDisplay.from_estimator(
        model, X, y, by="depth", n_repeats=1, n_jobs=2, ax=ax
    )
    assert display.ax_ is ax
    assert display.names == ("layers.0", "layers.1")
    assert given == [2]


def test_error_bars_are_standard_deviations(rng):
    importances = rng.normal(size=(4, 6))
    display = ModuleImportanceDisplay(importances=importances, names=list("abcd")).plot()
    segments = display.bars_.errorbar[2][0].get_segments()
    spreads = [np.ptp(segment[:, 0]) / 2 for segment in segments]
    np.testing.assert_allclose(spreads, importances.std(axis=1))
    assert [line.get_xdata() for line in display.ax_.lines] == [[0, 0]]
    assert display.ax_.get_xlabel() == "decrease of the score"


@pytest.mark.parametrize("n_modules", [1, 12, 40, 700])
def test_the_most_important_modules_have_labels_that_fit(n_modules, rng, overlapping):
    names = [f"model.layers.{n // 7}.mlp.part_{n % 7}" for n in range(n_modules)]
    importances = rng.normal(size=(n_modules, 2))
    display = ModuleImportanceDisplay(importances=importances, names=names).plot()
    assert overlapping(display.figure_) == []
    assert display.figure_.get_figheight() <= 8
    assert names[importances.mean(axis=1).argmax()].endswith(
        tuple(label for label in labels(display))
    )
    assert len(labels(display)) >= min(n_modules, 15)


@pytest.mark.parametrize(
    ("values", "room", "expected"), [([0, -9, 1, 5, 4], 3, [0, 3]), ([4, 0, 3, 1], 2, [0, 2])]
)
def test_largest_values_have_labels_that_are_no_closer_than_there_is_room(values, room, expected):
    assert _spread_out(np.array(values), room) == expected


def test_every_label_is_at_its_bar(rng):
    names = [f"part_{n}" for n in range(300)]
    display = ModuleImportanceDisplay(importances=rng.normal(size=(300, 2)), names=names).plot()
    assert labels(display) == [f"part_{place}" for place in display.ax_.get_yticks()]


def test_names_are_no_mathematics():
    names = ["$a_$.q", "$a_$.v"]
    display = ModuleImportanceDisplay(importances=np.ones((2, 2)), names=names).plot()
    display.figure_.draw_without_rendering()
    assert display.ax_.get_ylabel() == "$a_$.*"
    np.testing.assert_allclose(display.figure_.get_size_inches(), (6.5, 2))
    many = ModuleImportanceDisplay(importances=np.ones((16, 2)), names=list("abcdefghijklmnop"))
    np.testing.assert_allclose(many.plot().figure_.get_size_inches(), (6.5, 5.2))


def test_lists():
    display = ModuleImportanceDisplay(importances=[[1.0, 3.0]], names=["a"])
    [bar] = display.plot(bar_kw={"color": "red"}).bars_
    assert (bar.get_width(), bar.get_facecolor()) == (2, (1, 0, 0, 1))


def test_without_matplotlib_nothing_is_computed(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"^ModuleImportanceDisplay\.from_estimator requires"):
        ModuleImportanceDisplay.from_estimator(None, None, None)


def test_refused():
    with pytest.raises(ValueError, match="need 2 names, got 1"):
        ModuleImportanceDisplay(importances=np.ones((2, 3)), names=["a"]).plot()
    for importances, names in ((np.ones(2), ["a", "b"]), (np.ones((1, 0)), ["a"]), ([], [])):
        with pytest.raises(ValueError, match=r"are not of \(n_groups, n_repeats\)"):
            ModuleImportanceDisplay(importances=importances, names=names).plot()
