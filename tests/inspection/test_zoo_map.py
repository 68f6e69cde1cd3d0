import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_hex
from scipy.spatial.distance import pdist
from sklearn import config_context
from sklearn.decomposition import PCA, KernelPCA
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import Ridge
from sklearn.pipeline import make_pipeline

from sklora import LoRACollection, SVDSpectrum, UpdateKernel
from sklora.inspection import ZooMapDisplay
from sklora.inspection._plotting import MARKERS, PALETTE
from sklora.testing import apply_gauge


def points(n_points):
    return np.random.default_rng(0).normal(size=(n_points, 2))


def legend(display):
    return [text.get_text() for text in display.legend_.get_texts()]


class TestFromLoras:
    def test_principal_components_of_normalised_updates(self, rng, random_loras):
        X = random_loras(rng, 20)
        updates = np.array([np.concatenate([(U @ V.T).ravel() for U, V in x.values()]) for x in X])
        updates /= np.linalg.norm(updates, axis=1, keepdims=True)
        pca = PCA(2).fit(updates)
        display = ZooMapDisplay.from_loras(X)
        np.testing.assert_allclose(np.abs(display.points), np.abs(pca.transform(updates)))
        np.testing.assert_allclose(display.shares, pca.explained_variance_ratio_)
        for axis, number in ((display.ax_.xaxis, 0), (display.ax_.yaxis, 1)):
            text = f"component {number + 1} ({display.shares[number]:.0%} of variance)"
            assert axis.get_label_text() == text
        assert display.ax_.get_aspect() == 1
        assert display.ax_.get_xticks().size == display.ax_.get_yticks().size == 0

    @pytest.mark.parametrize(
        ("dtype", "condition", "atol"), [(np.float64, 1e4, 1e-6), (np.float32, 1e3, 1e-3)]
    )
    def test_gauge_does_not_show(self, rng, random_loras, dtype, condition, atol):
        X = random_loras(rng, 20, dtype=dtype)
        same = apply_gauge(X, condition=condition, random_state=0)
        one, other = (ZooMapDisplay.from_loras(zoo).points for zoo in (X, same))
        np.testing.assert_allclose(pdist(one), pdist(other), atol=atol)

    def test_families_lie_together(self, rng, random_loras):
        families = np.repeat([0, 1, 2], 6)
        flat = random_loras(rng, 3).read(families)
        flat += 0.05 * rng.normal(size=flat.shape)
        display = ZooMapDisplay.from_loras(
            LoRACollection.from_array(flat, random_loras(rng, 1).layout), families
        )
        centres = np.array([display.points[families == n].mean(axis=0) for n in range(3)])
        within = np.linalg.norm(display.points - centres[families], axis=1).max()
        assert within < pdist(centres).min() / 5

    def test_output_of_transformers_may_be_frames(self, rng, random_loras):
        X = random_loras(rng, 5)
        with config_context(transform_output="pandas"):
            display = ZooMapDisplay.from_loras(X, list("aabbb"))
        np.testing.assert_array_equal(display.points, ZooMapDisplay.from_loras(X).points)

    def test_one_direction(self):
        X = LoRACollection.from_factors(
            [{"q": (sign * np.ones((2, 1)), np.ones((2, 1)))} for sign in (1, -1, 2)]
        )
        display = ZooMapDisplay.from_loras(X)
        np.testing.assert_allclose(display.shares, [1, 0], atol=1e-12)
        np.testing.assert_allclose(display.points[0], display.points[2], atol=1e-6)

    def test_equal_adapters(self):
        X = LoRACollection.from_factors([{"q": (np.ones((2, 1)), np.ones((2, 1)))}] * 4)
        display = ZooMapDisplay.from_loras(X)
        np.testing.assert_allclose(display.points, 0, atol=1e-6)
        display.figure_.draw_without_rendering()

    def test_refused(self, rng, random_loras):
        X = random_loras(rng, 4)
        with pytest.raises(ValueError, match="inconsistent"):
            ZooMapDisplay.from_loras(X, [1, 2])
        with pytest.raises(ValueError, match="2 adapters make no map"):
            ZooMapDisplay.from_loras(X[:2])
        with pytest.raises(ValueError, match="device='abacus'"):
            ZooMapDisplay.from_loras(X, device="abacus")


@pytest.mark.parametrize("estimator", [None, SVDSpectrum(2)])
def test_what_is_passed_on(rng, random_loras, estimator):
    X, (_, ax) = random_loras(rng, 5), plt.subplots()
    options = {"label_name": "kind", "ax": ax, "scatter_kw": {"s": 77}}
    if estimator is None:
        display = ZooMapDisplay.from_loras(X, list("aabbb"), **options)
    else:
        display = ZooMapDisplay.from_estimator(estimator.fit(X), X, list("aabbb"), **options)
    assert display.ax_ is ax
    assert legend(display) == ["a (2)", "b (3)"]
    assert display.legend_.get_title().get_text() == "kind"
    assert [scatter.get_sizes().tolist() for scatter in display.scatters_] == [[77], [77]]


class TestFromEstimator:
    def test_new_adapters_on_the_map_of_a_zoo(self, rng, random_loras):
        X, new = random_loras(rng, 12), random_loras(rng, 5)
        model = make_pipeline(UpdateKernel("cosine"), KernelPCA(3, kernel="precomputed")).fit(X)
        display = ZooMapDisplay.from_estimator(model, new, list("aabbb"), label_name="kind")
        np.testing.assert_allclose(display.points, model.transform(new)[:, :2])
        assert display.shares is None
        assert display.ax_.get_xlabel() == "component 1"
        assert display.legend_.get_title().get_text() == "kind"

    def test_refused(self, rng, random_loras):
        X = random_loras(rng, 4, shapes=[(3, 3)], rank=1)
        with pytest.raises(NotFittedError):
            ZooMapDisplay.from_estimator(SVDSpectrum(), X)
        with pytest.raises(ValueError, match=r"shape \(4, 1\); a map needs two"):
            ZooMapDisplay.from_estimator(SVDSpectrum().fit(X), X)
        assert ZooMapDisplay.from_estimator(SVDSpectrum(2).fit(X), X).points.shape == (4, 2)
        with pytest.raises(AttributeError, match="transform"):
            ZooMapDisplay.from_estimator(Ridge().fit(X.read(), np.arange(4)), X)


class TestLabels:
    def test_categories_have_colours_and_markers(self):
        labels = np.array(["dog", "cat", "dog", "$x_$", "cat", "dog"])
        display = ZooMapDisplay(points=points(6), labels=labels).plot()
        assert legend(display) == ["$x_$ (1)", "cat (2)", "dog (3)"]
        colors = [to_hex(scatter.get_facecolor()[0]) for scatter in display.scatters_]
        assert colors == [color.lower() for color in PALETTE[:3]]
        shapes = {str(scatter.get_paths()[0].vertices) for scatter in display.scatters_}
        assert len(shapes) == 3
        np.testing.assert_allclose(display.scatters_[2].get_offsets(), points(6)[labels == "dog"])
        assert display.colorbar_ is None
        display.figure_.draw_without_rendering()

    @pytest.mark.parametrize("labels", [[0, 1, 1] * 4, [True, False, True], ["a", "b", "b"]])
    def test_few_values_are_categories(self, labels):
        display = ZooMapDisplay(points=points(len(labels)), labels=labels).plot()
        assert len(display.scatters_) == 2
        assert display.legend_ is not None

    @pytest.mark.parametrize(("n_labels", "numeric"), [(8, False), (9, True)])
    def test_more_than_eight_integers_are_numbers(self, n_labels, numeric):
        labels = np.arange(n_labels)
        display = ZooMapDisplay(points=points(n_labels), labels=labels, label_name="$n_$").plot()
        assert (display.colorbar_ is not None) == numeric
        assert (display.legend_ is None) == numeric
        if not numeric:
            assert legend(display) == [f"{n} (1)" for n in range(8)]
            assert display.legend_.get_title().get_text() == "$n_$"
            display.figure_.draw_without_rendering()

    @pytest.mark.parametrize(
        "labels", [np.arange(20, dtype=np.uint8), np.linspace(0, 1, 20), [0.0, 1.0] * 10]
    )
    def test_numbers_have_a_colour_bar(self, labels):
        display = ZooMapDisplay(points=points(20), labels=labels, label_name="$n_$").plot()
        [scatter] = display.scatters_
        np.testing.assert_array_equal(scatter.get_array(), labels)
        assert display.colorbar_.ax.get_ylabel() == "$n_$"
        assert display.legend_ is None
        display.figure_.draw_without_rendering()

    def test_unknown_numbers_are_shown_without_a_colour(self):
        labels = np.array([1.0, np.nan, 2.0])
        display = ZooMapDisplay(points=points(3), labels=labels).plot()
        known, unknown = display.scatters_
        np.testing.assert_array_equal(known.get_array(), [1, 2])
        np.testing.assert_allclose(unknown.get_offsets(), points(3)[1:2])
        assert to_hex(unknown.get_facecolor()[0]) == "#ffffff"
        assert unknown.get_zorder() < known.get_zorder()
        infinite = ZooMapDisplay(points=points(3), labels=[1.0, np.inf, 2.0]).plot()
        np.testing.assert_array_equal(infinite.scatters_[0].get_array(), [1, 2])

    def test_the_rarest_of_many_categories_are_others(self):
        labels = [letter for n, letter in enumerate("klmnopqrst") for _ in range(n + 1)]
        display = ZooMapDisplay(points=points(55), labels=labels).plot()
        assert legend(display) == [f"{c} ({n})" for n, c in enumerate("nopqrst", 4)] + [
            "others (6)"
        ]
        assert len(display.scatters_) == len(MARKERS)

    @pytest.mark.parametrize("labels", [[1.5, None, 2.0], np.array([1.5, 2.0, None], object)])
    def test_unknown_numbers_may_be_none(self, labels):
        display = ZooMapDisplay(points=points(3), labels=labels).plot()
        np.testing.assert_array_equal(display.scatters_[0].get_array(), [1.5, 2])
        assert len(display.scatters_[1].get_offsets()) == 1

    @pytest.mark.parametrize(
        ("labels", "expected"),
        [
            ([1, None, 0], ["0 (1)", "1 (1)", "None (1)"]),
            (["a", None, 1.5], ["1.5 (1)", "None (1)", "a (1)"]),
            ([True, None, False], ["False (1)", "None (1)", "True (1)"]),
            ([16, 4, 8], ["4 (1)", "8 (1)", "16 (1)"]),
            (np.uint8([16, 4, 8]), ["4 (1)", "8 (1)", "16 (1)"]),
            ([None, None, None], ["None (3)"]),
        ],
    )
    def test_categories_in_order(self, labels, expected):
        assert legend(ZooMapDisplay(points=points(3), labels=labels).plot()) == expected

    def test_long_names_leave_room_for_the_map(self):
        labels = ["begin" + 90 * "x" + end for end in "abc"]
        display = ZooMapDisplay(points=points(3), labels=labels).plot()
        display.figure_.draw_without_rendering()
        assert display.ax_.get_position().width > 0.3
        assert [text[-5:] for text in legend(display)] == ["a (1)", "b (1)", "c (1)"]

    def test_a_marker_for_all(self):
        display = ZooMapDisplay(points=points(4), labels=list("aabb"))
        one, other = display.plot(scatter_kw={"marker": "s"}).scatters_
        np.testing.assert_array_equal(one.get_paths()[0].vertices, other.get_paths()[0].vertices)

    def test_none(self):
        display = ZooMapDisplay(points=points(4)).plot(scatter_kw={"s": 3})
        assert display.scatters_[0].get_sizes() == [3]
        assert display.legend_ is display.colorbar_ is None

    @pytest.mark.parametrize("labels", [None, list("aabb"), [0.5, 1.5, 2.5, 3.5]])
    @pytest.mark.parametrize("name", ["edgecolor", "edgecolors", "ec"])
    def test_styles_by_any_name(self, labels, name):
        display = ZooMapDisplay(points=points(4), labels=labels).plot(
            scatter_kw={name: "red", "lw": 3}
        )
        for scatter in display.scatters_:
            assert to_hex(scatter.get_edgecolor()[0]) == "#ff0000"
            assert scatter.get_linewidth() == [3]

    @pytest.mark.parametrize("labels", [None, list("aabb")])
    @pytest.mark.parametrize("name", ["c", "color"])
    def test_one_colour_for_all(self, labels, name):
        display = ZooMapDisplay(points=points(4), labels=labels).plot(scatter_kw={name: "red"})
        for scatter in display.scatters_:
            assert to_hex(scatter.get_facecolor()[0]) == "#ff0000"

    def test_another_colour_map(self):
        display = ZooMapDisplay(points=points(3), labels=[0.5, 1.5, 2.5])
        assert display.plot(scatter_kw={"cmap": "magma"}).scatters_[0].get_cmap().name == "magma"

    @pytest.mark.parametrize("labels", [None, list("aabb"), [0.5, 1.5, 2.5, 3.5]])
    def test_markers_without_an_edge(self, labels):
        display = ZooMapDisplay(points=points(4), labels=labels).plot(scatter_kw={"marker": "x"})
        display.figure_.draw_without_rendering()

    def test_refused(self):
        with pytest.raises(ValueError, match=r"points of shape \(3, 3\)"):
            ZooMapDisplay(points=np.eye(3)).plot()
        with pytest.raises(ValueError, match=r"points of shape \(3,\)"):
            ZooMapDisplay(points=np.ones(3)).plot()
        with pytest.raises(ValueError, match="inconsistent"):
            ZooMapDisplay(points=np.eye(2), labels=[1]).plot()
        with pytest.raises(ValueError, match=r"labels of shape \(2, 2\) are not one for each"):
            ZooMapDisplay(points=np.eye(2), labels=np.eye(2)).plot()
        assert not plt.get_fignums()

    def test_lists(self):
        display = ZooMapDisplay(points=[[1, 2], [3, 4]], labels=["a", "b"]).plot()
        assert [len(one.get_offsets()) for one in display.scatters_] == [1, 1]
