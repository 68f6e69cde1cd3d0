import matplotlib.pyplot as plt
import numpy as np
import pytest
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import Ridge
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline

from sklora import GLNetRegressor, MLPNetRegressor, SVDSpectrum
from sklora.inspection import TrainingCurveDisplay


@pytest.fixture
def zoo(rng, random_loras):
    return random_loras(rng, 40), rng.normal(size=40)


class TestFromEstimator:
    def test_history(self, zoo):
        net = GLNetRegressor(max_epochs=6, early_stopping=True, random_state=0).fit(*zoo)
        display = TrainingCurveDisplay.from_estimator(net, line_kw={"linewidth": 3})
        for line, key in zip(display.lines_, ("train_loss", "valid_loss"), strict=True):
            np.testing.assert_array_equal(line.get_ydata(), [row[key] for row in net.history_])
            np.testing.assert_array_equal(line.get_xdata(), range(1, net.n_iter_ + 1))
            assert line.get_linewidth() == 3
        assert display.lines_[0].get_linestyle() != display.lines_[1].get_linestyle()

    def test_pipeline_and_search(self, zoo):
        model = make_pipeline(SVDSpectrum(), MLPNetRegressor(max_epochs=3, random_state=0))
        search = GridSearchCV(model, {"mlpnetregressor__lr": [1e-3]}, cv=2).fit(*zoo)
        expected = [row["train_loss"] for row in search.best_estimator_[-1].history_]
        for estimator in (search, search.best_estimator_):
            display = TrainingCurveDisplay.from_estimator(estimator)
            np.testing.assert_array_equal(display.train_losses, expected)

    def test_without_validation(self, zoo):
        net = MLPNetRegressor(max_epochs=3, early_stopping=False, random_state=0).fit(*zoo)
        display = TrainingCurveDisplay.from_estimator(net)
        assert display.valid_losses is display.best_epoch_ is display.best_ is None
        assert len(display.lines_) == 1

    def test_epochs_of_partial_fit_have_no_validation(self, zoo):
        net = MLPNetRegressor(max_epochs=3, early_stopping=True, random_state=0)
        net.fit(*zoo).partial_fit(*zoo)
        display = TrainingCurveDisplay.from_estimator(net)
        assert np.isnan(display.valid_losses).tolist() == [False] * 3 + [True]
        assert display.best_epoch_ <= 3

    def test_refused(self, zoo):
        with pytest.raises(NotFittedError):
            TrainingCurveDisplay.from_estimator(MLPNetRegressor())
        with pytest.raises(NotFittedError):
            TrainingCurveDisplay.from_estimator(make_pipeline(SVDSpectrum(), MLPNetRegressor()))
        for model in (Ridge(), make_pipeline(SVDSpectrum(), Ridge())):
            with pytest.raises(ValueError, match="Ridge has no history"):
                TrainingCurveDisplay.from_estimator(model.fit(zoo[0].read(), zoo[1]))


def test_best_epoch():
    display = TrainingCurveDisplay(
        train_losses=[3, 2, 1, 0, 0], valid_losses=[4, 2.5, np.nan, 3, 2.5]
    )
    display.plot()
    assert display.best_epoch_ == 2
    assert (*display.best_.get_xdata(), *display.best_.get_ydata()) == (2, 2.5)
    assert "epoch 2, loss 2.5" in display.best_.get_label()
    assert display.best_.get_label() in [t.get_text() for t in display.ax_.get_legend().get_texts()]


def test_styles_by_any_name():
    style = {"c": "red", "ls": ":", "lw": 3}
    display = TrainingCurveDisplay(train_losses=[2, 1], valid_losses=[2, 1]).plot(line_kw=style)
    for line in display.lines_:
        assert (line.get_color(), line.get_linestyle(), line.get_linewidth()) == ("red", ":", 3)


def test_one_epoch():
    display = TrainingCurveDisplay(train_losses=[1.0]).plot()
    display.figure_.draw_without_rendering()
    assert display.best_epoch_ is None
    assert display.lines_[0].get_marker() == "o"  # else there is nothing to see
    assert [tick for tick in display.ax_.get_xticks() if tick % 1] == []


def test_unknown_validation_losses_are_none():
    display = TrainingCurveDisplay(train_losses=[2, 1], valid_losses=[np.nan, np.nan]).plot()
    assert len(display.lines_) == 1
    assert display.best_epoch_ is None


@pytest.mark.parametrize(
    ("train", "valid", "message"),
    [
        ([], None, r"train_losses of shape \(0,\) are not one for each epoch"),
        ([[2, 1]], None, r"train_losses of shape \(1, 2\) are not"),
        ([2, 1], [3, 2, 1], r"valid_losses of shape \(3,\) .* 2 epochs of train_losses"),
        ([2, 1], [], r"valid_losses of shape \(0,\)"),
    ],
)
def test_losses_are_one_for_each_epoch(train, valid, message):
    plt.close("all")
    with pytest.raises(ValueError, match=message):
        TrainingCurveDisplay(train_losses=train, valid_losses=valid).plot()
    assert not plt.get_fignums()
