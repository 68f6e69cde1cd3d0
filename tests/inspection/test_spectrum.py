import matplotlib.pyplot as plt
import numpy as np
import pytest
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import Ridge
from sklearn.pipeline import make_pipeline

from sklora import GLEquivariantProjection, LoRACollection, SVDSpectrum
from sklora.inspection import SpectrumDisplay
from sklora.testing import apply_gauge

RANKS = [[2, 3, 0], [1, 3, 2], [2, 2, 2], [0, 3, 1]]


@pytest.fixture
def X(rng, random_loras):
    return random_loras(rng, 4, rank=RANKS)


def dense_spectrum(adapter, name, count):
    if name not in adapter:
        return np.zeros(count)
    U, V = adapter[name]
    return np.pad(np.linalg.svd(U @ V.T, compute_uv=False), (0, 9))[:count]


class TestValues:
    def test_those_of_the_updates(self, X):
        values = SpectrumDisplay.from_loras(X).values
        assert values.shape == (4, 3, 3)
        for row, adapter in zip(values, X, strict=True):
            for module, (name, count) in enumerate({"m0": 2, "m1": 3, "m2": 2}.items()):
                expected = dense_spectrum(adapter, name, count)
                np.testing.assert_allclose(row[module, :count], expected, atol=1e-12)
                assert np.isnan(row[module, count:]).all()

    def test_axes(self, X):
        _, ax = plt.subplots()
        assert SpectrumDisplay.from_loras(X, ax=ax).ax_ is ax

    def test_one_adapter(self, X):
        display = SpectrumDisplay.from_loras(X[1])
        np.testing.assert_allclose(display.values[0, 1], dense_spectrum(X[1], "m1", 3))
        assert list(display.module_names) == ["m0", "m1", "m2"]

    def test_fewer_values(self, X):
        everything = SpectrumDisplay.from_loras(X).values
        display = SpectrumDisplay.from_loras(X, n_values=1)
        np.testing.assert_array_equal(display.values, everything[:, :, :1])

    @pytest.mark.parametrize(
        ("dtype", "condition", "rtol"), [(np.float64, 1e6, 1e-7), (np.float32, 1e3, 1e-3)]
    )
    def test_gauge_does_not_show(self, rng, random_loras, dtype, condition, rtol):
        X = random_loras(rng, 6, dtype=dtype)
        same = apply_gauge(X, condition=condition, random_state=0)
        values = SpectrumDisplay.from_loras(X).values
        np.testing.assert_allclose(SpectrumDisplay.from_loras(same).values, values, rtol=rtol)
        assert np.abs(same.read() - X.read()).max() > 1

    def test_side_features_are_left_out(self, rng):
        factors = [{"q": (rng.normal(size=(4, 2)), rng.normal(size=(3, 2)))}]
        X = LoRACollection.from_factors(factors, side=[{"q:magnitude_out": np.full(4, 99.0)}])
        np.testing.assert_allclose(
            SpectrumDisplay.from_loras(X).values[0, 0], dense_spectrum(X[0], "q", 2)
        )


class TestFromEstimator:
    def test_what_the_estimator_sees(self, X):
        spectra = SVDSpectrum(2).fit(X)
        model = make_pipeline(SVDSpectrum(2), Ridge()).fit(X, np.arange(4))
        for estimator in (spectra, model, spectra.set_output(transform="pandas")):
            display = SpectrumDisplay.from_estimator(estimator, X)
            np.testing.assert_array_equal(
                display.values.reshape(4, -1), np.asarray(spectra.transform(X))
            )

    def test_steps_before(self, X):
        projection = GLEquivariantProjection(2, random_state=0)
        model = make_pipeline(projection, SVDSpectrum(), Ridge()).fit(X, np.arange(4))
        values = SpectrumDisplay.from_estimator(model, X).values
        np.testing.assert_array_equal(
            values[np.isfinite(values)].reshape(4, -1), model[:2].transform(X)
        )

    def test_refused(self, X):
        with pytest.raises(NotFittedError):
            SpectrumDisplay.from_estimator(SVDSpectrum(), X)
        with pytest.raises(NotFittedError):
            SpectrumDisplay.from_estimator(make_pipeline(SVDSpectrum(), Ridge()), X)
        for estimator in (Ridge(), make_pipeline(Ridge())):
            with pytest.raises(ValueError, match="computes no spectra"):
                SpectrumDisplay.from_estimator(estimator, X)
        with pytest.raises(TypeError, match="of type ndarray"):
            SpectrumDisplay.from_loras(X.read())
        with pytest.raises(ValueError, match="device='abacus'"):
            SpectrumDisplay.from_loras(X, device="abacus")


class TestPlot:
    def test_heatmap(self, X):
        display = SpectrumDisplay.from_loras(X)
        # The median of those adapters that have the module, at that rank.
        second = [dense_spectrum(adapter, "m0", 2)[1] for adapter in (X[0], X[2])]
        shown = display.image_.get_array()
        assert shown[0, 1] == pytest.approx(np.median(second))
        assert shown.mask.tolist() == [[False, False, True], [False] * 3, [False, False, True]]
        assert "median of 4 adapters" in display.colorbar_.ax.get_ylabel()
        assert display.lines_ is display.band_ is None
        assert display.ax_.yaxis_inverted()
        assert [text.get_text() for text in display.ax_.get_xticklabels()] == ["1", "2", "3"]
        assert display.ax_.get_xticks().tolist() == [0.5, 1.5, 2.5]
        assert display.ax_.get_yticks().tolist() == [0.5, 1.5, 2.5]
        assert display.ax_.get_ylabel() == "module"
        alone = SpectrumDisplay.from_loras(X[0])
        assert alone.colorbar_.ax.get_ylabel() == "singular value"

    def test_decay(self, X):
        display = SpectrumDisplay.from_loras(X, kind="decay", quantiles=(0.25, 0.75))
        assert len(display.lines_) == 3 + 1
        largest = [dense_spectrum(x, name, 1)[0] for x in X for name in x]
        assert display.lines_[-1].get_ydata()[0] == pytest.approx(np.median(largest))
        of_m1 = np.median([dense_spectrum(x, "m1", 1)[0] for x in X])
        assert display.lines_[1].get_xdata().tolist() == [1, 2, 3]
        assert display.lines_[1].get_ydata()[0] == pytest.approx(of_m1)
        second = [dense_spectrum(x, name, 2)[1] for x in X for name in x]
        median = np.median([value for value in second if value > 1e-9])
        assert display.lines_[-1].get_ydata()[1] == pytest.approx(median)
        ends = display.band_.get_paths()[0].vertices
        edge = ends[ends[:, 0] == 1][:, 1]
        assert edge.min() == pytest.approx(np.quantile(largest, 0.25))
        assert edge.max() == pytest.approx(np.quantile(largest, 0.75))
        texts = [text.get_text() for text in display.ax_.get_legend().get_texts()]
        assert texts == ["quantiles 0.25 to 0.75 of all", "median of all"]
        assert display.ax_.get_yscale() == "log"
        assert "median of 4 adapters" in display.ax_.get_ylabel()
        assert display.lines_[-1].get_xdata().tolist() == [1, 2, 3]
        shades = [sum(line.get_color()[:3]) for line in display.lines_[:-1]]
        assert shades == sorted(set(shades))  # lighter the deeper
        assert [text.get_text() for text in display.colorbar_.ax.get_yticklabels()] == [
            "first",
            "last",
        ]
        assert display.image_ is None

    @pytest.mark.parametrize("kind", ["heatmap", "decay"])
    def test_one_value(self, kind):
        display = SpectrumDisplay(values=np.full((1, 1, 1), 2.0), module_names=["q"])
        display.plot(kind=kind).figure_.draw_without_rendering()

    def test_values_below_the_scale_are_told(self):
        values = np.array([[[1.0, 1e-9]]])
        low = SpectrumDisplay(values=values, module_names=["a.q"]).plot()
        assert low.colorbar_.extend == "min"
        assert low.ax_.get_ylabel() == "module  a.*"
        assert low.ax_.patch.get_hatch() == "////"
        all_seen = SpectrumDisplay(values=values[..., :1], module_names=["a.q"]).plot()
        assert all_seen.colorbar_.extend == "neither"

    @pytest.mark.parametrize("kind", ["heatmap", "decay"])
    def test_rounding_errors_do_not_stretch_the_scale(self, kind):
        values = np.array([[[2.0, 0.5, 1e-17], [2.0, 0.2, 0.0]]])
        display = SpectrumDisplay(values=values, module_names=["a", "b"]).plot(kind=kind)
        low = display.ax_.get_ylim()[0] if kind == "decay" else display.image_.norm.vmin
        assert low == pytest.approx(2e-4)

    def test_modules_of_one_value_are_seen(self):
        values = np.array([[[3.0, np.nan], [3.0, 1.0]]])
        lone, line, _ = (
            SpectrumDisplay(values=values, module_names=["a", "b"]).plot(kind="decay").lines_
        )
        assert lone.get_marker() == "_"
        assert line.get_marker() == "None"

    def test_what_is_not_drawn_does_not_stretch_the_scale(self):
        values = np.ones((21, 1, 2))
        values[0] = 1e-9  # below all quantiles
        display = SpectrumDisplay(values=values, module_names=["a"]).plot(kind="decay")
        assert display.ax_.get_ylim()[0] > 0.01
        values[:3] = 1e-9  # below the median, not below the band
        display = SpectrumDisplay(values=values, module_names=["a"]).plot(kind="decay")
        assert display.ax_.get_ylim()[0] == pytest.approx(1e-4)
        values = np.ones((11, 2, 1))
        values[:, 1] = 1e-9  # the lower line alone, between the quantiles of all
        display = SpectrumDisplay(values=values, module_names=["a", "b"])
        display.plot(kind="decay", quantiles=(0.6, 0.9))
        assert display.ax_.get_ylim()[0] == pytest.approx(1e-4)

    @pytest.mark.parametrize("n_modules", [1, 5, 40, 700])
    def test_labels_do_not_overlap(self, n_modules, rng, overlapping):
        names = [f"model.layers.{n // 7}.mlp.part_{n % 7}" for n in range(n_modules)]
        display = SpectrumDisplay(
            values=rng.uniform(size=(2, n_modules, 40)), module_names=names
        ).plot()
        assert overlapping(display.figure_) == []
        labels = [label.get_text() for label in display.ax_.get_yticklabels()]
        assert len(labels) >= min(n_modules, 20)
        places = display.ax_.get_yticks().astype(int)
        assert all(names[n].endswith(label) for n, label in zip(places, labels, strict=True))
        numbers = [int(label.get_text()) for label in display.ax_.get_xticklabels()]
        assert numbers == (display.ax_.get_xticks() + 0.5).tolist()
        assert 10 < len(numbers) <= 16

    def test_refused(self, X):
        display = SpectrumDisplay.from_loras(X)
        with pytest.raises(ValueError, match="kind is 'bar'"):
            display.plot(kind="bar")
        display.plot(kind="decay", quantiles=(0, 1))
        plt.close("all")
        for quantiles in [(-1, 0), (0, 2), (0.1,), (0, 0.5, 1), (np.nan, 0.9), ("a", "b"), None]:
            with pytest.raises(ValueError, match=r"quantiles is .* two numbers from 0 to 1"):
                display.plot(kind="decay", quantiles=quantiles)
        assert not plt.get_fignums()
        with pytest.raises(ValueError, match="every update is zero"):
            SpectrumDisplay(values=np.zeros((1, 1, 1)), module_names=["q"]).plot()
        with pytest.raises(ValueError, match="of 1 module, with 2 names"):
            SpectrumDisplay(values=np.ones((1, 1, 1)), module_names=["q", "v"]).plot()
        with pytest.raises(ValueError, match=r"values of shape \(1, 2\) are not of"):
            SpectrumDisplay(values=np.ones((1, 2)), module_names=["q", "v"]).plot()
        assert not plt.get_fignums()

    def test_lists(self):
        display = SpectrumDisplay(values=[[[3.0, 1.0]]], module_names=["q"]).plot()
        assert display.image_.get_array().tolist() == [[3.0, 1.0]]
