from __future__ import annotations

import numpy as np
import pytest
import torch

from sklora.collection import LoRACollection, LoRALayout
from sklora.estimators import GLNetClassifier, GLNetRegressor
from sklora.estimators.glnet import cut_factors, singular_values
from sklora.testing import apply_gauge, assert_gauge_invariant
from sklora.transform import SVDSpectrum
from tests.stored import assert_same_answers, by_joblib, by_skops

MIXED = [[2, 1, 0], [1, 2, 2], [0, 1, 1], [2, 2, 2]] * 15


@pytest.fixture
def mixed(random_loras, rng):
    """Adapters of mixed ranks, some of which lack a module."""
    return random_loras(rng, 60, rank=MIXED)


class TestCutFactors:
    @pytest.mark.parametrize(
        ("shapes", "ranks"),
        [
            ("aba", MIXED[:7]),
            ("aabbab", 2),
            ("aaaaa", [2, 2, 3, 3, 1]),
            ("baaaab", [1, 2, 2, 1, 1, 3]),
        ],
    )
    def test_is_the_collection_module_by_module(self, random_loras, rng, shapes, ranks):
        sizes = {"a": (5, 4), "b": (3, 4)}
        mixed = random_loras(rng, 7, [sizes[shape] for shape in shapes], rank=ranks)
        layout = mixed.layout
        factors, side = cut_factors(torch.from_numpy(np.asarray(mixed)), layout)
        assert side is None
        for group, pair in zip(layout.groups, factors, strict=True):
            for member, position in enumerate(group.index):
                for row, adapter in enumerate(mixed):
                    for factor, expected in zip(
                        pair, adapter.get(layout.names[position], ()), strict=False
                    ):
                        found = factor[member, :, row]
                        rank = expected.shape[1]
                        np.testing.assert_array_equal(found[:, :rank], expected)
                        assert torch.count_nonzero(found[:, rank:]) == 0

    def test_pads_modules_to_the_rank_of_their_group(self):
        layout = LoRALayout([("a", 3, 2, 1), ("b", 3, 2, 4)])
        [(U, V)], _ = cut_factors(torch.ones(5, layout.width), layout)
        assert U.shape == (2, 3, 5, 4)
        assert V.shape == (2, 2, 5, 4)
        assert torch.count_nonzero(U[0, ..., 1:]) == torch.count_nonzero(V[0, ..., 1:]) == 0

    def test_memory_is_used_again(self, mixed):
        rows, memory = torch.from_numpy(np.asarray(mixed)), []
        first, _ = cut_factors(rows.roll(1, 0), mixed.layout, memory)
        for part in (rows, rows[:7], rows[:7].flip(0)):
            factors, _ = cut_factors(part, mixed.layout, memory)
            expected, _ = cut_factors(part, mixed.layout)
            torch.testing.assert_close(factors, expected, rtol=0, atol=0)
            for pair, before in zip(factors, first, strict=True):
                assert [f.data_ptr() for f in pair] == [f.data_ptr() for f in before]
                assert all(f.is_contiguous() for f in pair)

    def test_memory_grows_with_the_batch(self, mixed):
        rows, memory = torch.from_numpy(np.asarray(mixed)), []
        cut_factors(rows[:2], mixed.layout, memory)
        found, expected = (cut_factors(rows, mixed.layout, m)[0] for m in (memory, None))
        torch.testing.assert_close(found, expected, rtol=0, atol=0)

    def test_a_graph_whose_factors_were_overwritten_says_so(self):
        layout, memory = LoRALayout([("a", 3, 2, 1)]), []
        [(U, _)], _ = cut_factors(torch.ones(2, layout.width), layout, memory)
        loss = (torch.ones(3, requires_grad=True)[:, None, None] * U).sum()
        cut_factors(torch.zeros(2, layout.width), layout, memory)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()

    @pytest.mark.parametrize(
        "layout",
        [LoRALayout([("a", 3, 2, 1), ("b", 3, 2, 4)], side=[("magnitude", 2)]), LoRALayout.rows(3)],
        ids=["modules", "rows"],
    )
    def test_in_another_dtype(self, layout):
        rows = torch.randn(5, layout.width)
        found, expected = (
            cut_factors(rows, layout, dtype=torch.float64),
            cut_factors(rows.double(), layout),
        )
        torch.testing.assert_close(found, expected, rtol=0, atol=0)

    def test_plain_rows(self):
        rows = torch.randn(5, 3)
        [(U, V)], side = cut_factors(rows, LoRALayout.rows(3))
        torch.testing.assert_close(torch.einsum("aibr,ajbr->bi", U, V), rows)
        assert side is None

    def test_side_features(self):
        layout = LoRALayout([("a", 3, 2, 1)], side=[("magnitude", 3)])
        rows = torch.randn(4, layout.width)
        torch.testing.assert_close(cut_factors(rows, layout)[1], rows[:, -3:])


with_and_without_spectrum = pytest.mark.parametrize(
    "spectrum", [False, True], ids=["products", "spectrum"]
)


@with_and_without_spectrum
@pytest.mark.parametrize("head", ["flatten", "mean"])
@pytest.mark.parametrize("nonlinearity", ["sigmoid", "silu", "sign_relu"])
@pytest.mark.parametrize(
    ("dtype", "condition", "rtol"), [(np.float64, 1e4, 1e-7), (np.float32, 1e2, 1e-3)]
)
def test_theorem_1_predictions_are_invariant(
    head, nonlinearity, dtype, condition, rtol, spectrum, random_loras, rng, quick
):
    X = random_loras(rng, 60, rank=MIXED, dtype=dtype)
    y = np.array([sum(np.linalg.norm(U @ V.T) for U, V in adapter.values()) for adapter in X])
    model = quick(
        GLNetRegressor, head=head, nonlinearity=nonlinearity, spectrum=spectrum, n_layers=3
    )
    assert_gauge_invariant(model.fit(X, y), X, condition=condition, rtol=rtol, random_state=0)


@with_and_without_spectrum
def test_training_is_invariant(spectrum, zoo, targets, quick):
    model = quick(GLNetClassifier, spectrum=spectrum, max_epochs=20)
    moved = apply_gauge(zoo, condition=10.0, random_state=0)
    expected = model.fit(zoo, targets["multilabel"]).predict_proba(zoo)
    found = model.fit(moved, targets["multilabel"]).predict_proba(zoo)
    np.testing.assert_allclose(found, expected, atol=1e-2)


@with_and_without_spectrum
def test_statistics_are_invariant(spectrum, zoo, traces, quick):
    moved = apply_gauge(zoo, condition=10.0, random_state=0)
    model = quick(GLNetRegressor, spectrum=spectrum)
    one, other = (model.fit(X, traces).weights_ for X in (zoo, moved))
    statistics = {name for name, _ in model.net_.named_buffers()}
    assert len(statistics) == 6 + 5 * spectrum
    for name in statistics:
        np.testing.assert_allclose(one[name], other[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("size", [1, 1e-3])
def test_module_scale_is_from_the_training_norms(size, zoo, traces, quick):
    zoo = LoRACollection.from_array(size * zoo.read(), zoo.layout)
    weights = np.linspace(0, 1, 60)
    model = quick(GLNetRegressor).fit(zoo, traces, sample_weight=weights)
    scales = dict(zip(["q", "v", "k"], model.weights_["module_scale"], strict=True))
    for name, scale in scales.items():
        updates = np.array([U @ V.T for U, V in (adapter[name] for adapter in zoo)])
        squares = (updates**2).mean(axis=(1, 2))
        assert scale == pytest.approx(np.average(squares, weights=weights) ** -0.25, rel=1e-5)


def test_standardises_by_weighted_moments(zoo, traces, quick):
    """Of the features at the initial weights, then of the norms of their rows."""
    weights = np.linspace(0, 1, 60)
    # A step of next to nothing leaves the equivariant layers where they started.
    model = quick(GLNetRegressor, lr=1e-9, max_epochs=1).fit(zoo, traces, sample_weight=weights)
    factors, _ = cut_factors(torch.from_numpy(np.asarray(zoo)), zoo.layout)
    with torch.no_grad():
        features = model.net_.features(factors).numpy()
    mean = np.average(features, axis=0, weights=weights)
    scale = np.sqrt(np.average((features - mean) ** 2, axis=0, weights=weights))
    np.testing.assert_allclose(model.weights_["standardize.mean"], mean, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(model.weights_["standardize.scale"], scale, rtol=1e-3)
    norms = np.linalg.norm((features - mean) / scale, axis=1)
    mean = np.average(norms, weights=weights)
    spread = np.sqrt(np.average((norms - mean) ** 2, weights=weights))
    np.testing.assert_allclose(model.weights_["row_norm.norm.mean"], [mean], rtol=1e-3)
    np.testing.assert_allclose(model.weights_["row_norm.norm.scale"], [spread], rtol=1e-3)


@with_and_without_spectrum
def test_size_of_the_updates_does_not_matter(spectrum, zoo, traces, quick):
    large = LoRACollection.from_array(np.asarray(zoo) * 1e3, zoo.layout)
    one, other = (
        quick(GLNetRegressor, spectrum=spectrum).fit(X, traces).predict(X) for X in (zoo, large)
    )
    np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-3)


@with_and_without_spectrum
def test_updates_that_overflow_in_float32_are_refused(spectrum, zoo, traces, quick):
    """Rather than a network that reads nothing of the module, because of one adapter."""
    flat = np.asarray(zoo).copy()
    for columns in zoo.layout.factor_slices[1]:
        flat[7, columns] *= 1e20
    bad = LoRACollection.from_array(flat, zoo.layout)
    with pytest.raises(ValueError, match=r"module 'k' overflow in float32.*leave out"):
        quick(GLNetRegressor, spectrum=spectrum).fit(bad, traces)


@with_and_without_spectrum
def test_a_module_without_updates(spectrum, random_loras, rng, quick):
    X = random_loras(rng, 60, rank=[[2, 0, 1]] * 60, layout=random_loras(rng, 1).layout)
    model = quick(GLNetRegressor, spectrum=spectrum).fit(X, rng.normal(size=60))
    assert all(np.isfinite(weight).all() for weight in model.weights_.values())
    assert np.isfinite(model.predict(X)).all()


@with_and_without_spectrum
def test_takes_any_rank_at_predict(spectrum, zoo, traces, quick):
    model = quick(GLNetRegressor, spectrum=spectrum).fit(zoo, traces)
    wide = zoo.with_layout(zoo.layout.with_ranks([4, 3, 2]))
    np.testing.assert_allclose(model.predict(wide), model.predict(zoo), rtol=1e-10)
    doubled = [
        {name: (np.hstack([U, U]), np.hstack([V, V]) / 2) for name, (U, V) in adapter.items()}
        for adapter in zoo
    ]
    X = LoRACollection.from_factors(doubled)
    assert X.layout.ranks == (4, 4, 4)
    np.testing.assert_allclose(model.predict(X), model.predict(zoo), rtol=1e-8)


@with_and_without_spectrum
def test_a_missing_module_is_the_zero_update(spectrum, zoo, traces, quick):
    model = quick(GLNetRegressor, spectrum=spectrum).fit(zoo, traces)
    lacking = [{name: pair for name, pair in zoo[i].items() if name != "v"} for i in range(5)]
    zeros = [{name: (U, V * (name != "v")) for name, (U, V) in zoo[i].items()} for i in range(5)]
    one, other = (
        model.predict(LoRACollection.from_factors(factors, layout=zoo.layout))
        for factors in (lacking, zeros)
    )
    np.testing.assert_allclose(one, other, rtol=1e-10)


def test_side_features_are_read(zoo, rng, quick):
    layout = LoRALayout(zoo.layout.modules, side=[("magnitude", 2)])
    side = rng.normal(size=(60, 2)) * 100 + 1e4
    X = LoRACollection.from_array(np.hstack([np.asarray(zoo), side]), layout)
    model = quick(GLNetRegressor, max_epochs=100, lr=0.02, early_stopping=False)
    assert model.fit(X, side[:, 0]).score(X, side[:, 0]) > 0.9


def test_side_features_are_standardised_by_weighted_moments(zoo, rng, traces, quick):
    layout = LoRALayout(zoo.layout.modules, side=[("magnitude", 2)])
    side, weights = rng.normal(size=(60, 2)) * [1, 100] + 5, np.linspace(0, 1, 60)
    X = LoRACollection.from_array(np.hstack([np.asarray(zoo), side]), layout)
    state = quick(GLNetRegressor).fit(X, traces, sample_weight=weights).weights_
    mean = np.average(side, axis=0, weights=weights)
    scale = np.sqrt(np.average((side - mean) ** 2, axis=0, weights=weights))
    np.testing.assert_allclose(state["side_path.standardize.mean"], mean, rtol=1e-5)
    np.testing.assert_allclose(state["side_path.standardize.scale"], scale, rtol=1e-5)


def test_the_wider_a_network_the_fewer_adapters_at_once(zoo, traces, quick, monkeypatch):
    """What it makes of them is to fit into the working memory, too."""
    iter_batches, sizes = LoRACollection.iter_batches, []

    def watched(X, bytes_per_adapter):
        sizes.append(bytes_per_adapter)
        return iter_batches(X, bytes_per_adapter)

    monkeypatch.setattr(LoRACollection, "iter_batches", watched)

    def needed(**parameters):
        model = quick(GLNetRegressor, max_epochs=1, **parameters).fit(zoo, traces)
        sizes.clear()
        model.predict(zoo)
        return sizes[-1] / 8 - zoo.layout.width

    factors, products = 3 * 2 * 64 * 2, 3 * 64**2  # of three modules of rank 2
    assert needed(hidden_dim=64) > factors + products
    assert factors < needed(hidden_dim=64, head="mean") < products
    assert needed(spectrum=True) > needed()


def test_one_module_of_a_high_rank_makes_all_of_its_shape_as_large(zoo, traces, quick, monkeypatch):
    """So blocks are smaller, and where one adapter takes more than the memory, that is said."""
    model = quick(GLNetRegressor, max_epochs=1, device="cpu").fit(zoo, traces)
    layout = zoo.layout.with_ranks([1000, *zoo.layout.ranks[1:]])
    [group] = [group for group in layout.groups if 0 in group.index]
    cut = len(group.index) * (group.n + group.m) * 1000
    high = {layout.names[0]: (np.ones((group.n, 1000)), np.ones((group.m, 1000)))}
    assert model._entries_per_adapter(layout) > layout.width + 2 * cut
    monkeypatch.setattr("sklora._stores._CERTAIN_BYTES", 0)
    monkeypatch.setattr("sklora._stores.available_memory", lambda: 8 * 2 * cut)
    model.predict(zoo)
    with pytest.raises(MemoryError, match=r"GLNetRegressor computes .* ranks are far above"):
        model.predict(LoRACollection.from_factors([{**zoo[0], **high}], layout=layout))


class TestSpectrum:
    @pytest.fixture
    def stretched(self, rng):
        """Updates of random directions, of unit norm, and the share of the first singular value."""
        shapes = {"q": (8, 6), "k": (7, 7), "v": (8, 6)}
        shares = rng.uniform(0.1, 0.9, size=240)
        factors = [
            {
                name: (
                    np.linalg.qr(rng.normal(size=(n, 2)))[0] * [share**0.5, (1 - share) ** 0.5],
                    np.linalg.qr(rng.normal(size=(m, 2)))[0],
                )
                for name, (n, m) in shapes.items()
            }
            for share in shares
        ]
        return LoRACollection.from_factors(factors), np.abs(shares - 0.5)

    def test_tells_what_the_products_hide(self, stretched, quick):
        X, y = stretched
        scores = [
            quick(GLNetRegressor, spectrum=spectrum, max_epochs=100, lr=0.01)
            .fit(X[:160], y[:160])
            .score(X[160:], y[160:])
            for spectrum in (False, True)
        ]
        assert scores[0] < 0.3
        assert scores[1] > 0.8

    def test_values_are_those_of_the_spectrum_at_the_ranks_of_the_layout(self, mixed):
        factors, _ = cut_factors(torch.from_numpy(np.asarray(mixed)), mixed.layout)
        found = singular_values(factors, mixed.layout)
        order = np.argsort([i for group in mixed.layout.groups for i in group.index])
        blocks = np.split(found.numpy(), np.cumsum(self.ranks_by_group(mixed.layout))[:-1], axis=1)
        expected = SVDSpectrum().fit_transform(mixed)
        np.testing.assert_allclose(np.hstack([blocks[i] for i in order]), expected, atol=1e-12)

    def ranks_by_group(self, layout):
        return [layout.ranks[i] for group in layout.groups for i in group.index]

    def test_other_ranks_are_cut_or_padded(self, rng):
        layout = LoRALayout([("a", 5, 4, 1), ("b", 5, 4, 3)])
        U, V = torch.randn(2, 5, 6, 4).double(), torch.randn(2, 4, 6, 4).double()
        values = torch.linalg.svdvals(torch.einsum("anbr,ambr->abnm", U, V))
        found = singular_values([(U, V)], layout)
        torch.testing.assert_close(found, torch.cat([values[0, :, :1], values[1, :, :3]], dim=1))
        values = torch.linalg.svdvals(torch.einsum("anbr,ambr->abnm", U[..., :2], V[..., :2]))
        found = singular_values([(U[..., :2], V[..., :2])], layout)
        expected = torch.cat([values[0, :, :1], values[1, :, :3]], dim=1)
        torch.testing.assert_close(found, expected)
        assert torch.count_nonzero(found[:, 3]) == 0

    def test_numbers_that_overflow_are_refused(self, zoo, traces, quick):
        large = LoRACollection.from_array(np.asarray(zoo) * 1e200, zoo.layout)
        model = quick(GLNetRegressor, spectrum=True)
        with pytest.raises(ValueError, match=r"module 'q'.* overflow .*spectrum=False"):
            model.fit(large, traces)
        model.fit(zoo, traces)
        with pytest.raises(ValueError, match=r"module 'q'.* overflow .*spectrum=False"):
            model.predict(large)
        flat = np.asarray(zoo).copy()
        for columns in zoo.layout.factor_slices[1]:
            flat[:, columns] *= 1e200
        with pytest.raises(ValueError, match=r"module 'k'.* overflow .*spectrum=False"):
            model.predict(LoRACollection.from_array(flat, zoo.layout))

    def test_moments_are_weighted(self, zoo, traces, quick):
        weights = np.linspace(0, 1, 60)
        model = quick(GLNetRegressor, spectrum=True).fit(zoo, traces, sample_weight=weights)
        values = SVDSpectrum().fit_transform(zoo)
        # The layout's order is q, k, v; q and v share a group.
        values = values[:, [0, 1, 4, 5, 2, 3]]
        mean = np.average(values, axis=0, weights=weights)
        scale = np.sqrt(np.average((values - mean) ** 2, axis=0, weights=weights))
        state = {k.removeprefix("spectrum_path."): v for k, v in model.weights_.items()}
        np.testing.assert_allclose(state["standardize.mean"], mean, rtol=1e-5)
        np.testing.assert_allclose(state["standardize.scale"], scale, rtol=1e-5)

    def test_is_found_once_a_fit(self, zoo, traces, quick, monkeypatch):
        calls = []

        def counted(*args):
            calls.append(1)
            return singular_values(*args)

        monkeypatch.setattr("sklora.estimators.glnet.singular_values", counted)
        counts = []
        for max_epochs in (1, 5):
            calls.clear()
            quick(GLNetRegressor, spectrum=True, max_epochs=max_epochs).fit(zoo, traces)
            counts.append(len(calls))
        assert counts == [1, 1]

    def test_training_and_prediction_read_the_same(self, zoo, traces, quick):
        """Trained on all rows at a rate of next to nothing, the loss is that of the predictions."""
        model = quick(
            GLNetRegressor, spectrum=True, lr=1e-9, max_epochs=1, early_stopping=False
        ).fit(zoo, traces)
        residual = (model.predict(zoo) - traces) / model.target_scale_
        assert model.history_[-1]["train_loss"] == pytest.approx(np.mean(residual**2), rel=1e-4)

    def test_one_adapter_is_predicted_as_among_many(self, zoo, traces, quick):
        model = quick(GLNetRegressor, spectrum=True).fit(zoo, traces)
        alone = np.concatenate([model.predict(zoo[[i]]) for i in range(len(zoo))])
        np.testing.assert_allclose(alone, model.predict(zoo), rtol=1e-12)

    def test_goes_on_from_the_last_fit(self, zoo, traces, quick):
        model = quick(GLNetRegressor, spectrum=True, warm_start=True).fit(zoo, traces)
        first = model.weights_["spectrum_path.mlp.0.weight"]
        moments = model.weights_["spectrum_path.standardize.mean"]
        for again in (model.fit, model.partial_fit):
            again(zoo[:40], traces[:40])
            assert np.any(model.weights_["spectrum_path.mlp.0.weight"] != first)
            np.testing.assert_array_equal(model.weights_["spectrum_path.standardize.mean"], moments)
        with pytest.raises(ValueError, match=r"spectrum is False, but .* fitted with True"):
            model.set_params(spectrum=False).fit(zoo, traces)

    def test_goes_on_with_adapters_of_other_ranks(self, zoo, traces, quick):
        wide = zoo.with_layout(zoo.layout.with_ranks([4, 3, 2]))
        one, other = (
            quick(GLNetRegressor, spectrum=True).fit(zoo, traces).partial_fit(X, traces)
            for X in (zoo, wide)
        )
        np.testing.assert_allclose(one.predict(zoo), other.predict(zoo), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("store", [by_joblib, by_skops])
    @pytest.mark.parametrize("estimator", [GLNetClassifier, GLNetRegressor])
    def test_is_stored(self, estimator, store, zoo, targets, quick):
        kind = "multiclass" if estimator is GLNetClassifier else "many"
        model = quick(estimator, spectrum=True).fit(zoo, targets[kind])
        assert_same_answers(store(model), model, zoo)

    def test_beside_side_features_and_on_plain_rows(self, zoo, rng, quick):
        layout = LoRALayout(zoo.layout.modules, side=[("magnitude", 2)])
        side = rng.normal(size=(60, 2))
        X = LoRACollection.from_array(np.hstack([np.asarray(zoo), side]), layout)
        model = quick(GLNetRegressor, spectrum=True, max_epochs=100, lr=0.02, early_stopping=False)
        assert model.fit(X, side[:, 0]).score(X, side[:, 0]) > 0.9
        rows = rng.normal(size=(60, 5))
        model.fit(rows, np.linalg.norm(rows, axis=1))
        np.testing.assert_allclose(
            model.weights_["spectrum_path.standardize.mean"],
            [np.linalg.norm(rows, axis=1).mean()],
            rtol=1e-5,
        )


@pytest.mark.parametrize(
    ("mlp_hidden", "shapes"),
    [(7, [(7, 1), (1, 7)]), ((5, 3), [(5, 1), (3, 5), (1, 3)]), ((), [(1, 1)])],
)
def test_mlp_hidden(mlp_hidden, shapes, zoo, traces, quick):
    model = quick(GLNetRegressor, mlp_hidden=mlp_hidden).fit(zoo, traces)
    weights = [w.shape for n, w in model.weights_.items() if n.startswith("mlp") and w.ndim == 2]
    # The norm of three modules of 4 x 4 products, and the products.
    assert model.weights_["invariant_map.blocks.0"].shape == (3, shapes[0][0], 16)
    assert weights == shapes


@pytest.mark.parametrize("mlp_hidden", [(0,), (4, "a"), (2.5,)])
def test_bad_widths(mlp_hidden, zoo, traces, quick):
    with pytest.raises(ValueError, match=r"mlp_hidden=.*integers of at least 1"):
        quick(GLNetRegressor, mlp_hidden=mlp_hidden).fit(zoo, traces)


@pytest.mark.parametrize(
    ("parameter", "value"),
    [("head", "max"), ("mlp_hidden", 0), ("n_layers", 0), ("spectrum", "yes")],
)
def test_parameters_are_checked(parameter, value, zoo, traces, quick):
    with pytest.raises(ValueError, match=f"'{parameter}' parameter"):
        quick(GLNetRegressor, **{parameter: value}).fit(zoo, traces)


def test_warm_start_names_spectrum_as_it_is_set(zoo, traces, quick):
    model = quick(GLNetRegressor, warm_start=True).fit(zoo, traces)
    with pytest.raises(ValueError, match=r"spectrum is True, but .* fitted with False\. Set it"):
        model.set_params(spectrum=True).fit(zoo, traces)


def test_docstring_shows_the_defaults():
    assert f"hidden_dim : int, default={GLNetClassifier().hidden_dim}" in GLNetClassifier.__doc__
    options = f'{{"adamw", "adam", "sgd"}}, default="{GLNetRegressor().optimizer}"'
    assert f"optimizer : {options}" in GLNetRegressor.__doc__
    assert "$" not in GLNetClassifier.__doc__ + GLNetRegressor.__doc__
    assert "class_weight" not in GLNetRegressor.__doc__


@pytest.mark.parametrize("options", [{"n_layers": 2}, {"head": "mean"}], ids=str)
def test_a_module_that_is_the_same_in_all_adapters_is_no_feature(options):
    rng = np.random.default_rng(0)
    same = [rng.normal(size=(size, 4)).astype(np.float32) for size in (40, 30)]
    y = rng.normal(size=60)
    adapters = [
        {
            "q": (
                (rng.normal(size=(10, 2)) + target).astype(np.float32),
                (rng.normal(size=(8, 2)) + 1).astype(np.float32),
            ),
            "k": same,
            "v": same,
        }
        for target in y
    ]
    X = LoRACollection.from_factors(adapters)
    for zoo in (X, apply_gauge(X, random_state=0)):
        model = GLNetRegressor(random_state=0, device="cpu", **options).fit(zoo, y)
        assert model.score(zoo, y) > 0.7
