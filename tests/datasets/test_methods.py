"""Every method of finetuning: where it starts, its gauge, and what features see of it."""

import numpy as np
import pytest
import torch

from sklora import DenseProduct, GLNetClassifier, GLNetRegressor
from sklora.collection import LoRACollection
from sklora.datasets import _denoiser as denoiser
from sklora.datasets import _digits, fetch_digits_loras, make_digits_loras
from sklora.datasets._methods import METHODS
from sklora.datasets._zoos import of_full_rank
from sklora.testing import apply_gauge, assert_gauge_invariant, random_gauge

DIM, DEPTH, RANK, N = 8, 1, 2, 3
SHAPES = denoiser.module_shapes(DIM, DEPTH)
TOLERANCE = {torch.float32: 5e-3, torch.float64: 1e-9}


def base_network(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return {k: w.to(dtype) for k, w in denoiser.init_base(DIM, DEPTH, generator).items()}


def outputs(base, factors):
    generator = torch.Generator().manual_seed(1)
    noisy = torch.randn(N, 5, 64, generator=generator).to(base["head"])
    time = torch.rand(N, 5, generator=generator).to(base["head"])
    return denoiser.denoise(base, noisy, time, factors)


def start(method, base):
    generator = torch.Generator().manual_seed(2)
    parameters = METHODS[method].start(base, SHAPES, N, RANK, generator)
    dtype = base["head"].dtype
    return {name: tuple(t.to(dtype) for t in each) for name, each in parameters.items()}


def trained(method, base):
    """Give parameters that have moved from the start."""
    generator = torch.Generator().manual_seed(3)
    return {
        name: tuple(t + 0.3 * torch.randn(t.shape, generator=generator).to(t) for t in each)
        for name, each in start(method, base).items()
    }


def regauged(method, parameters):
    """Give other parameters of the same updates."""
    moved = {}
    for k, (name, (first, second, *rest)) in enumerate(parameters.items()):
        if method == "lokr":
            moved[name] = 100.0 * first, second / 100.0
        else:
            R = torch.from_numpy(random_gauge(RANK, condition=1e3, random_state=k)).to(first)
            moved[name] = first @ R, second @ torch.linalg.inv(R).mT, *rest
    return moved


def collection(method, base, parameters):
    chosen = METHODS[method]
    rows = chosen.rows(base, parameters).numpy()
    layout = chosen.layout(SHAPES, RANK)
    return of_full_rank(rows, layout)


@pytest.fixture(scope="module")
def zoo():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_digits, "N_BASE_STEPS", 20)
        patch.setattr(_digits, "FIXED", {**_digits.FIXED, "n_steps": 10})
        return {
            method: make_digits_loras(
                20, rank=RANK, dim=DIM, depth=DEPTH, method=method, random_state=0, verbose=0
            )
            for method in METHODS
        }


@pytest.mark.parametrize("method", METHODS)
class TestMethod:
    def test_starts_from_the_base_network(self, method):
        base = base_network()
        factors = METHODS[method].factors(base, start(method, base))
        torch.testing.assert_close(outputs(base, factors), outputs(base, None))

    def test_a_row_is_as_wide_as_its_layout(self, method):
        base = base_network()
        X = collection(method, base, trained(method, base))
        assert X.shape == (N, METHODS[method].layout(SHAPES, RANK).width)

    @pytest.mark.parametrize("dtype", TOLERANCE)
    def test_a_gauge_changes_neither_network_nor_features(self, method, dtype):
        base, chosen = base_network(dtype), METHODS[method]
        before = trained(method, base)
        after = regauged(method, before)
        found = outputs(base, chosen.factors(base, after))
        expected = outputs(base, chosen.factors(base, before))
        torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE[dtype])
        features = [
            DenseProduct().fit_transform(collection(method, base, parameters))
            for parameters in (after, before)
        ]
        np.testing.assert_allclose(*features, rtol=0, atol=TOLERANCE[dtype])

    def test_gl_net_on_a_trained_zoo_is_invariant(self, method, zoo):
        X, y = zoo[method].data, zoo[method].presence
        model = GLNetClassifier(max_epochs=2, random_state=0, device="cpu").fit(X, y)
        assert_gauge_invariant(model, X, condition=1e3, random_state=0)

    def test_training_moves_every_adapter(self, method, zoo):
        trained_zoo = zoo[method]
        base = {name: torch.from_numpy(w) for name, w in trained_zoo.base.items()}
        seeds = torch.Generator().manual_seed(0)
        started = METHODS[method].start(base, SHAPES, 20, RANK, seeds)
        rows = METHODS[method].rows(base, started).numpy()
        # V starts at random: it is U, or what takes its place, that has to have moved.
        at_U, _ = trained_zoo.data.layout.factor_slices[0]
        moved = np.abs(np.asarray(trained_zoo.data)[:, at_U] - rows[:, at_U]).max(axis=1)
        assert moved.min() > 1e-3


class TestDoRA:
    def test_the_product_is_not_all_there_is(self):
        """Its magnitudes change the network and leave every ``U V^T`` as it is."""
        base, chosen = base_network(), METHODS["dora"]
        before = trained("dora", base)
        after = {name: (U, V, 2 * magnitude) for name, (U, V, magnitude) in before.items()}
        assert not torch.allclose(
            outputs(base, chosen.factors(base, after)), outputs(base, chosen.factors(base, before))
        )
        X = [collection("dora", base, parameters) for parameters in (before, after)]
        n_products = sum(n * m for n, m in SHAPES.values())
        before, after = (DenseProduct().fit_transform(one) for one in X)
        np.testing.assert_allclose(after[:, :n_products], before[:, :n_products])
        assert not np.allclose(after[:, n_products:], before[:, n_products:])

    @pytest.mark.parametrize("spectrum", [False, True])
    def test_the_head_reads_magnitudes(self, spectrum, zoo):
        """Of adapters that have all factors in common, the magnitudes are all that can tell."""
        layout = zoo["dora"].data.layout
        rng = np.random.default_rng(0)
        flat = np.tile(np.asarray(zoo["dora"].data)[:1], (200, 1))
        flat[:, layout.side_slice] += rng.normal(size=(200, layout.n_side))
        y = flat[:, layout.side_slice.start]
        X = LoRACollection.from_array(flat, layout)
        model = GLNetRegressor(
            spectrum=spectrum, lr=1e-2, early_stopping=False, random_state=0, device="cpu"
        )
        assert model.fit(X[:150], y[:150]).score(X[150:], y[150:]) > 0.5


class TestPiSSA:
    def test_the_start_is_the_best_approximation(self):
        base = base_network()
        for name, (U, V) in start("pissa", base).items():
            left = torch.linalg.matrix_norm(base[name] - U[0] @ V[0].mT)
            singular_values = torch.linalg.svdvals(base[name])
            torch.testing.assert_close(left, singular_values[RANK:].norm())

    def test_adapters_share_a_gauge_at_the_start(self):
        """That is why mlp may do better on such zoos than on others."""
        for U, V in start("pissa", base_network()).values():
            assert torch.equal(U, U[:1].expand_as(U))
            assert torch.equal(V, V[:1].expand_as(V))


class TestLoRAPlus:
    def test_learning_rates_have_the_ratio_of_its_paper(self):
        of_U, of_V = METHODS["lora+"].rates
        assert of_U / of_V == 16


class TestLoKr:
    def test_the_update_is_a_kronecker_product(self):
        base = base_network()
        parameters = trained("lokr", base)
        for name, (U, V) in METHODS["lokr"].factors(base, parameters).items():
            A, B = (t[1] for t in parameters[name])
            torch.testing.assert_close((U @ V.mT)[1], torch.kron(A, B))


def test_a_method_that_does_not_exist():
    with pytest.raises(ValueError, match=r"method is 'vera'; choose one of 'lora'"):
        make_digits_loras(2, method="vera")


def test_a_rank_that_pissa_cannot_start_from(tmp_path):
    with pytest.raises(ValueError, match="rank is 9; weights have 8 singular directions"):
        make_digits_loras(2, rank=9, dim=8, method="pissa")
    with pytest.raises(ValueError, match="rank is 33; weights have 32 singular directions"):
        fetch_digits_loras(33, method="pissa", data_home=tmp_path)


def test_rank_one_changes_of_gauge_change_no_lokr_row_product(zoo):
    X = zoo["lokr"].data
    moved = apply_gauge(X, condition=1e3, random_state=0)
    np.testing.assert_allclose(
        DenseProduct().fit_transform(moved), DenseProduct().fit_transform(X), atol=1e-4
    )
    assert not np.allclose(np.asarray(moved), np.asarray(X))
