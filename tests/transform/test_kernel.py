import pickle
import threading
from functools import partial

import numpy as np
import pytest
import sklearn
import skops.io
import torch
from sklearn.base import clone
from sklearn.decomposition import KernelPCA
from sklearn.kernel_ridge import KernelRidge
from sklearn.metrics.pairwise import pairwise_kernels
from sklearn.model_selection import GridSearchCV, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.svm import SVC

from sklora import TRUSTED_TYPES, LoRACollection, LoRALayout
from sklora.linalg import squared_norm
from sklora.testing import apply_gauge, assert_gauge_invariant
from sklora.transform import DenseProduct, UpdateKernel, _pairs, pairwise_update_kernel

KERNELS = ("linear", "cosine", "rbf")


def reference(kernel, entries, new=None):
    """The kernel of scikit-learn on the entries of all updates, in float64."""
    entries = entries.astype(np.float64)
    gamma = 1 / (entries**2).sum(axis=1).mean()
    new = entries if new is None else new.astype(np.float64)
    return pairwise_kernels(new, entries, metric=kernel, filter_params=True, gamma=gamma)


@pytest.fixture
def new(random_loras, rng, X):
    """Adapters of another rank in the modules of X."""
    return random_loras(rng, 5, [module[1:3] for module in X.layout.modules], 2)


@pytest.mark.parametrize("kind", ["X", "mixed"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_equals_the_kernel_of_the_entries(kernel, kind, new, request):
    X = request.getfixturevalue(kind)
    entries, new_entries = (DenseProduct().fit_transform(A) for A in (X, new))
    update_kernel = UpdateKernel(kernel)
    expected = reference(kernel, entries)
    atol = 1e-13 * max(1, expected.max())
    np.testing.assert_allclose(update_kernel.fit_transform(X), expected, rtol=0, atol=atol)
    np.testing.assert_allclose(update_kernel.transform(X), expected, rtol=0, atol=atol)
    expected = reference(kernel, entries, new_entries)
    np.testing.assert_allclose(update_kernel.transform(new), expected, rtol=0, atol=atol)
    np.testing.assert_array_equal(
        pairwise_update_kernel(new, X, kernel), update_kernel.transform(new)
    )
    in_threads = pairwise_update_kernel(new, X, kernel, n_jobs=2)
    np.testing.assert_allclose(in_threads, expected, rtol=0, atol=atol)
    np.testing.assert_array_equal(
        pairwise_update_kernel(X, kernel=kernel), update_kernel.fit_transform(X)
    )


@pytest.mark.parametrize("kernel", KERNELS)
def test_single_precision_is_rounded_at_the_end(kernel, random_loras, rng):
    X = random_loras(rng, 9, rank=3, dtype=np.float32)
    double = LoRACollection.from_array(np.asarray(X).astype(np.float64), X.layout)
    found, expected = (UpdateKernel(kernel).fit_transform(A) for A in (X, double))
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, expected.astype(np.float32))


@pytest.mark.parametrize("stored", [np.float16, ">f2", ">f4", ">f8"], ids=str)
def test_numbers_as_they_are_stored(stored, X):
    flat = np.asarray(X).astype(np.float16)
    found, expected = (
        UpdateKernel().fit_transform(LoRACollection.from_array(flat.astype(dtype), X.layout))
        for dtype in (stored, np.float64)
    )
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "condition", "rtol"), [(np.float64, 1e4, 1e-7), (np.float32, 1e2, 1e-4)]
)
@pytest.mark.parametrize("kernel", KERNELS)
def test_is_invariant_to_gl(kernel, random_loras, rng, dtype, condition, rtol):
    X = random_loras(rng, 9, rank=3, dtype=dtype)
    # Lengths lose the square of the condition, as those of linalg do.
    model = UpdateKernel(kernel)
    assert_gauge_invariant(model, X, condition=condition, rtol=rtol, random_state=0)


def test_distances_to_oneself_are_zero_whatever_the_gauge(X):
    moved = apply_gauge(X, condition=1e7, random_state=0)
    np.testing.assert_array_equal(UpdateKernel("rbf").fit_transform(moved).diagonal(), 1.0)
    # Nor are any below zero.
    assert UpdateKernel("rbf").fit(X).transform(moved).max() <= 1


@pytest.mark.parametrize("kernel", ["cosine", "rbf"])
def test_the_size_of_all_updates_makes_no_difference(kernel, X, new):
    small, new_small = (LoRACollection.from_array(A.read() / 2**9, A.layout) for A in (X, new))
    expected, found = (UpdateKernel(kernel).fit(A) for A in (X, small))
    np.testing.assert_array_equal(found.transform(new_small), expected.transform(new))


def test_gamma(X):
    entries = DenseProduct().fit_transform(X)
    default = UpdateKernel("rbf").fit(X)
    np.testing.assert_allclose(default.gamma_, 1 / (entries**2).sum(axis=1).mean())
    given = UpdateKernel("rbf", gamma=0.01)
    expected = pairwise_kernels(entries, metric="rbf", gamma=0.01)
    np.testing.assert_allclose(given.fit_transform(X), expected, atol=1e-13)
    np.testing.assert_allclose(pairwise_update_kernel(X, None, "rbf", gamma=0.01), expected)
    assert given.gamma_ == 0.01
    np.testing.assert_array_equal(pairwise_update_kernel(X, None, "rbf", gamma=0), 1)


@pytest.mark.parametrize("kernel", KERNELS)
def test_zero_updates(kernel, X):
    zero = LoRACollection.from_array(np.zeros((2, X.layout.width)), X.layout)
    entries, nothing = DenseProduct().fit_transform(X), np.zeros((2, 24 + 20 + 24 + 24))
    expected = reference(kernel, entries, nothing)
    np.testing.assert_allclose(pairwise_update_kernel(zero, X, kernel), expected, atol=1e-13)
    among = pairwise_update_kernel(zero, kernel=kernel)
    np.testing.assert_array_equal(among, np.full((2, 2), float(kernel == "rbf")))


@pytest.mark.parametrize("seed", range(8))
def test_zero_updates_of_factors_that_are_not_zero(random_loras, rng, seed):
    """What cancels in U V^T leaves rounding of either sign, which no cosine may be made of."""
    X = random_loras(rng, 6, ((8, 7), (6, 5)), 3)
    flat = X.read()
    for U, V in (X.layout._factors_at(flat, position) for position in range(2)):
        U[:2, :, 1], V[:2, :, 1] = U[:2, :, 0], -V[:2, :, 0]
        U[:2, :, 2] = 0
    zero = LoRACollection.from_array(flat, X.layout, ranks=X.ranks)
    X = apply_gauge(zero, condition=1e4, random_state=seed)
    fitted = UpdateKernel("cosine").fit(X)
    for found in (fitted.transform(X), fitted.fit_transform(X)):
        np.testing.assert_array_equal(found[:2], 0)
        np.testing.assert_array_equal(found[:, :2], 0)
        np.testing.assert_allclose(found.diagonal()[2:], 1, atol=1e-6)
    np.testing.assert_array_equal(UpdateKernel("rbf").fit(X[:2]).gamma_, 1.0)


def test_gauges_that_scale_columns_leave_cosines_and_coordinates(random_loras, rng):
    X = random_loras(rng, 6, ((8, 7),), 3)
    moved = X.read()
    [(U, V)] = [X.layout._factors_at(moved, 0)]
    scale = np.array([1e4, 1.0, 1e-4])
    U *= scale
    V /= scale
    moved = LoRACollection.from_array(moved, X.layout)
    expected = pairwise_update_kernel(X, kernel="cosine")
    np.testing.assert_allclose(pairwise_update_kernel(moved, X, "cosine"), expected, atol=1e-12)
    assert DenseProduct("gram").fit_transform(moved).shape == (6, 6)


@pytest.mark.parametrize(
    "learner",
    [SVC(kernel="precomputed"), KernelRidge(kernel="precomputed"), KernelPCA(kernel="precomputed")],
    ids=lambda learner: type(learner).__name__,
)
@pytest.mark.parametrize("kernel", KERNELS)
def test_learners_see_what_they_would_of_the_entries(kernel, learner, random_loras, rng):
    """In cross-validation, where the kernel is between new adapters and those of the fold."""
    X, y = random_loras(rng, 30), np.arange(30) % 2
    entries = DenseProduct().fit_transform(X)
    method = "transform" if isinstance(learner, KernelPCA) else "predict"
    for train in (np.arange(20), np.arange(10, 30)):
        test = np.setdiff1d(np.arange(30), train)
        model = make_pipeline(UpdateKernel(kernel), learner).fit(X[train], y[train])
        found = np.abs(getattr(model, method)(X[test]))
        learner.fit(reference(kernel, entries[train]), y[train])
        K = reference(kernel, entries[train], entries[test])
        np.testing.assert_allclose(found, np.abs(getattr(learner, method)(K)), atol=1e-9)


def test_cross_validation_and_search(random_loras, rng):
    X = random_loras(rng, 60)
    y = DenseProduct().fit_transform(X)[:, :3].sum(axis=1) > 0
    model = make_pipeline(UpdateKernel("cosine"), SVC(kernel="precomputed", C=10))
    predicted = cross_val_predict(model, X, y, cv=3)
    entries = DenseProduct().fit_transform(X)
    unit = entries / np.linalg.norm(entries, axis=1, keepdims=True)
    np.testing.assert_array_equal(
        predicted, cross_val_predict(SVC(kernel="linear", C=10), unit, y, cv=3)
    )
    search = GridSearchCV(model, {"updatekernel__kernel": KERNELS}, cv=3, n_jobs=2)
    assert np.isfinite(search.fit(X, y).cv_results_["mean_test_score"]).all()


@pytest.mark.parametrize("kernel", KERNELS)
def test_files_and_their_folds_equal_memory(kernel, mixed, tmp_path):
    mixed.save(tmp_path / "zoo.safetensors")
    opened = LoRACollection.open(tmp_path / "zoo.safetensors")
    rows = [7, 1, 2, 5]
    expected = pairwise_update_kernel(mixed, mixed[rows], kernel)
    for working_memory in (1024, 0.01, 1e-6):
        with sklearn.config_context(working_memory=working_memory):
            found = pairwise_update_kernel(opened, opened[rows], kernel)
            among = pairwise_update_kernel(opened[rows], kernel=kernel)
        np.testing.assert_allclose(found, expected, atol=1e-12)
        # The default gamma is of the four adapters either way.
        np.testing.assert_allclose(among, expected[rows], atol=1e-12)


def test_blocks_fit_in_the_working_memory(random_loras, rng, monkeypatch, tmp_path):
    X = random_loras(rng, 40, ((64, 64),) * 10, 2)  # 20 KiB an adapter
    X.save(tmp_path / "zoo.safetensors")
    opened = LoRACollection.open(tmp_path / "zoo.safetensors")
    sizes = []
    read = LoRACollection.read

    def watched(self, *args, **options):
        flat = read(self, *args, **options)
        sizes.append(flat.nbytes)
        return flat

    monkeypatch.setattr(LoRACollection, "read", watched)
    with sklearn.config_context(working_memory=0.5):
        found = _pairs.inner_products(opened, device="cpu")
        assert 0 < max(sizes) < 2**18
        sizes.clear()
        norms = partial(_pairs.sum_over_modules, squared_norm)
        for compute in (_pairs.inner_products, norms):
            compute(opened, device="cpu", n_jobs=2)
            assert 0 < max(sizes) < 2**17
            sizes.clear()
        np.testing.assert_allclose(_pairs.inner_products(X[::-1], device="cpu"), found[::-1, ::-1])
        assert not sizes  # what is in memory is not copied whole


def test_rows_that_follow_each_other_are_not_copied(X):
    for loras in (X, X[2:5]):
        for factor in _pairs._reader(loras, torch.device("cpu"))(1):
            assert np.shares_memory(factor.numpy(), np.asarray(X))


@pytest.fixture
def n_pairs(monkeypatch):
    """How many columns of factors are multiplied with how many, call by call."""
    bmm, n_pairs = torch.bmm, []

    def watched(A, B):
        n_pairs.append(len(A) * A.shape[1] * B.shape[2])
        return bmm(A, B)

    monkeypatch.setattr(torch, "bmm", watched)
    return n_pairs


def test_a_large_rank_is_no_work_for_the_others(random_loras, rng, n_pairs, monkeypatch):
    small, large = (list(random_loras(rng, n, [(9, 8)], r)) for n, r in ((6, 1), (2, 8)))
    X = LoRACollection.from_factors([*small[:3], *large, *small[3:]])
    together = _pairs.inner_products(X, X, device="cpu")
    # So little work is done at once.
    assert n_pairs == 2 * [(8 * 8) ** 2]
    n_pairs.clear()
    monkeypatch.setattr(_pairs, "_WORTH_PARTS", 0)
    found = _pairs.inner_products(X, X, device="cpu")
    assert sum(n_pairs) == 2 * X.ranks.sum() ** 2
    np.testing.assert_allclose(found, together)
    np.testing.assert_allclose(found, _pairs.inner_products(X, device="cpu"))
    entries = DenseProduct().fit_transform(X)
    np.testing.assert_allclose(found, entries @ entries.T)


def test_norms_take_the_ranks_of_each_adapter(random_loras, rng, monkeypatch):
    monkeypatch.setattr(_pairs, "_WORTH_PARTS", 0)
    small, large = (list(random_loras(rng, n, [(9, 8)], r)) for n, r in ((6, 1), (2, 8)))
    X = LoRACollection.from_factors([*small[:3], {}, *large, *small[3:]])
    shapes = []

    def watched(U, V):
        shapes.append(tuple(U.shape))
        return squared_norm(U, V)

    found = _pairs.sum_over_modules(watched, X, device="cpu", n_jobs=None)
    assert sorted(shapes) == [(2, 9, 8), (6, 9, 1)]
    np.testing.assert_allclose(found, (DenseProduct().fit_transform(X) ** 2).sum(axis=1))


def test_a_collection_with_itself_is_less_work(X, n_pairs):
    """Of nine adapters, three strips of three that begin at the diagonal."""
    _pairs.inner_products(X, X, device="cpu")
    both = sum(n_pairs)
    n_pairs.clear()
    _pairs.inner_products(X, device="cpu")
    assert sum(n_pairs) == both * 2 / 3


def test_plans_count_what_is_read_and_sent(tmp_path, monkeypatch):
    layout = LoRALayout([("small", 3, 2, 1), ("large", 40, 50, 4)])
    wider = layout.with_ranks([2, 5])
    X = LoRACollection.from_array(np.zeros((1000, layout.width), np.float32), layout)
    X.save(tmp_path / "zoo.safetensors")
    opened = LoRACollection.open(tmp_path / "zoo.safetensors")
    for collection, sent, width in (
        *((X, False, 0), (X.with_layout(wider), False, 0), (X, True, 2 * layout.width)),
        (opened, False, layout.width),
        (opened.with_layout(wider), False, layout.width + wider.width),
    ):
        monkeypatch.setattr(_pairs, "are_sent", lambda device, sent=sent: sent)
        with sklearn.config_context(working_memory=1):
            [first, *_] = _pairs._blocks(collection, device="cpu", n_parallel=1)
        # One module as it is and in float64, twice: of the other collection, too.
        assert first.stop == 2**20 // (2 * (90 * 4 * (4 + 8) + 4 * width))


def test_jobs_work_at_the_same_time(X, monkeypatch):
    both = threading.Barrier(2, timeout=30)

    def meet(U, V):
        both.wait()
        return U.sum(dim=(-2, -1))

    gram = DenseProduct("gram", n_jobs=2, device="cpu").fit(X)
    monkeypatch.setattr(_pairs, "add_inner_products", lambda *given, **options: both.wait())
    _pairs.inner_products(X, X, device="cpu", n_jobs=2)
    _pairs.sum_over_modules(meet, X, device="cpu", n_jobs=2)
    gram.transform(X)
    pairwise_update_kernel(X, X, device="cpu", n_jobs=2)


@pytest.mark.parametrize("featurizer", [UpdateKernel(), DenseProduct("gram")], ids=str)
def test_a_matrix_that_does_not_fit_into_memory_is_refused(featurizer, X, monkeypatch):
    monkeypatch.setattr("sklora._stores._CERTAIN_BYTES", 0)
    monkeypatch.setattr("sklora._stores.available_memory", lambda: 8 * len(X) ** 2 - 1)
    with pytest.raises(MemoryError, match=r"inner products of 9 adapters x 9 .* Take fewer"):
        clone(featurizer).fit_transform(X)
    monkeypatch.setattr("sklora._stores.available_memory", lambda: 8 * len(X) ** 2)
    clone(featurizer).fit_transform(X)


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", KERNELS)
def test_agrees_across_devices(kernel, X, new, cuda):
    for one, other in ((X, None), (new, X)):
        found = pairwise_update_kernel(one, other, kernel, device=cuda)
        expected = pairwise_update_kernel(one, other, kernel, device="cpu")
        np.testing.assert_allclose(found, expected, atol=1e-12)


def test_columns_and_data_frames(X):
    update_kernel = UpdateKernel().set_output(transform="pandas")
    frame = update_kernel.fit_transform(X)
    assert frame.columns.tolist() == [f"updatekernel{position}" for position in range(9)]
    with sklearn.config_context(transform_output="pandas"):
        assert isinstance(pairwise_update_kernel(X), np.ndarray)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_stored_kernel_needs_no_files(kernel, mixed, tmp_path):
    path = tmp_path / "zoo.safetensors"
    mixed.save(path)
    wider = mixed.layout.with_ranks([5] * 4)
    model = UpdateKernel(kernel).fit(LoRACollection.open(path)[1:].with_layout(wider))
    expected = model.transform(mixed)
    trusted = [*TRUSTED_TYPES, "sklora.transform.kernel.UpdateKernel"]
    stored, stored_by_skops = pickle.dumps(model), skops.io.dumps(model)
    path.unlink()
    for other in (pickle.loads(stored), skops.io.loads(stored_by_skops, trusted=trusted)):
        np.testing.assert_allclose(other.transform(mixed), expected, atol=1e-13)


class TestBadInput:
    @pytest.mark.parametrize("fitted", [False, True])
    def test_what_overflows(self, X, fitted):
        flat = np.asarray(X, np.float32) * np.float32(1e12)
        large = LoRACollection.from_array(flat, X.layout, ids=X.ids)
        kernel = UpdateKernel("linear").fit(large) if fitted else UpdateKernel("linear")
        with pytest.raises(ValueError, match=rf"numbers of adapter '?{X.ids[0]}'? are finite, but"):
            kernel.transform(large) if fitted else kernel.fit_transform(large)
        assert hasattr(kernel, "layout_") == fitted
        assert np.isfinite(UpdateKernel("cosine").fit_transform(large)).all()

    def test_parameters(self, X):
        for name, value in (("kernel", "poly"), ("gamma", -1.0), ("device", "abacus")):
            with pytest.raises(ValueError, match=name):
                UpdateKernel(**{name: value}).fit(X)
        with pytest.raises(ValueError, match="kernel"):
            pairwise_update_kernel(X, kernel="poly")

    def test_other_modules(self, X, random_loras, rng):
        other = random_loras(rng, 4, ((6, 4), (5, 3)), 3)
        with pytest.raises(ValueError, match=r"'m1' has updates of shape \(5, 3\), but \(5, 4\)"):
            pairwise_update_kernel(other, X)

    @pytest.mark.parametrize("model", [UpdateKernel(), DenseProduct("gram")], ids=repr)
    @pytest.mark.parametrize("method", ["fit", "fit_transform", "transform"])
    def test_numbers_beyond_the_rank(self, model, method, X):
        model.fit(X)
        bad = LoRACollection.from_array(np.asarray(X), X.layout, ranks=np.full((9, 4), 2))
        with pytest.raises(ValueError, match="adapter 0 is said to have rank 2 in module 'm0'"):
            getattr(model, method)(bad)


def test_the_function_works_on_the_device_that_it_is_given(X):
    for given in ((X,), (X, X)):
        with pytest.raises(ValueError, match="device='abacus'"):
            pairwise_update_kernel(*given, device="abacus")


@pytest.mark.parametrize("kernel", KERNELS)
def test_new_adapters_give_their_own_dtype(kernel, X, new):
    model = UpdateKernel(kernel).fit(X)
    single = LoRACollection.from_array(np.asarray(new, np.float32), new.layout)
    assert model.transform(single).dtype == np.float32
    assert model.transform(new).dtype == np.float64


@pytest.mark.parametrize("kernel", KERNELS)
def test_ranks_that_are_made_larger_change_nothing(kernel, mixed):
    """Their columns lie in memory as they did."""
    wider = mixed.with_layout(mixed.layout.with_ranks([5, 3, 4, 7]))
    expected = pairwise_update_kernel(mixed, kernel=kernel)
    for given in ((wider,), (wider, mixed), (mixed, wider)):
        found = pairwise_update_kernel(*given, kernel=kernel)
        np.testing.assert_allclose(found, expected, atol=1e-12)
