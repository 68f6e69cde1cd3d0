"""The way through the blocks: what is read, checked and sent to other processes."""

import subprocess
import sys
import threading

import joblib
import numpy as np
import pytest
import sklearn
import torch
from sklearn.base import clone
from sklearn.pipeline import make_pipeline

from sklora import GLEquivariantProjection, LoRACollection, LoRALayout, OAlign, SVDSpectrum
from sklora._stores import ArrayStore
from sklora.testing import assert_gauge_invariant
from sklora.transform import DenseProduct, UpdateKernel, _blocks
from sklora.transform._blocks import are_sent, factor_views, map_blocks, plan_blocks, stacks

BY_BLOCKS = [
    OAlign(template=0),
    SVDSpectrum(),
    DenseProduct(),
    GLEquivariantProjection(3, random_state=0),
    GLEquivariantProjection(3, method="hosvd"),
]
BY_PAIRS = [DenseProduct("gram"), UpdateKernel("rbf")]
by_blocks = pytest.mark.parametrize("featurizer", BY_BLOCKS, ids=str)


class CountingStore(ArrayStore):
    """Remembers how often each row has been read."""

    def read(self, rows, *, copy=True):
        self.counts = getattr(self, "counts", np.zeros(len(self.ids), int))
        self.counts[rows] += 1
        return super().read(rows, copy=copy)


@pytest.fixture
def counted(X):
    """Give a collection, and the store that counts."""
    store = CountingStore(np.asarray(X), X.layout, X.ranks, X.ids)
    return LoRACollection(store), store


@by_blocks
def test_every_weight_is_read_once(featurizer, counted):
    X, store = counted
    featurizer = clone(featurizer)
    once = getattr(featurizer, "method", None) != "hosvd"
    featurizer.fit_transform(X)
    # The template is read by itself; what spans the training updates is found before they move.
    expected = 1 + (np.arange(9) == 0) * isinstance(featurizer, OAlign) if once else 2
    np.testing.assert_array_equal(store.counts, expected)
    store.counts[:] = 0
    featurizer.transform(X[2:])
    np.testing.assert_array_equal(store.counts, np.arange(9) >= 2)
    store.counts[:] = 0
    featurizer.fit(X)
    np.testing.assert_array_equal(store.counts, expected if once else 1)


@by_blocks
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["first U", "last V", "side"])
def test_fit_transform_finds_what_is_not_finite_by_its_results(featurizer, with_side, value, where):
    layout = with_side.layout
    column = {
        "first U": layout.factor_slices[0][0].stop - 1,
        "last V": layout.factor_slices[-1][1].start,
        "side": layout.width - 1,
    }[where]
    flat = np.array(with_side)
    flat[4, column] = value
    bad = LoRACollection.from_array(flat, layout, ids=[f"a{i}" for i in range(9)])
    featurizer = clone(featurizer)
    with pytest.raises(ValueError, match=r"'a4' has NaN or infinity in (module|side feature)"):
        featurizer.fit_transform(bad)
    assert not hasattr(featurizer, "layout_")
    good = bad[[0, 1, 2, 3, 5, 6, 7, 8]]
    featurizer.fit(good)
    with sklearn.config_context(working_memory=1e-6), pytest.raises(ValueError, match="'a4'"):
        featurizer.transform(bad)


@by_blocks
def test_numbers_beyond_the_rank_are_found(featurizer, X):
    flat, ranks = np.array(X), np.array(X.ranks)
    ranks[5, 2] = 2
    bad = LoRACollection.from_array(flat, X.layout, ranks=ranks)
    with pytest.raises(ValueError, match="adapter 5 is said to have rank 2 in module 'm2'"):
        clone(featurizer).fit_transform(bad)


@pytest.mark.parametrize("featurizer", [DenseProduct(), SVDSpectrum()], ids=str)
def test_finite_numbers_whose_products_overflow_are_named(featurizer):
    rows = np.array([[1], [1e30], [1]], np.float32).repeat(4, axis=1)
    X = LoRACollection.from_array(rows, LoRALayout([("q", 2, 2, 1)]), ids=["a", "b", "c"])
    with pytest.raises(ValueError, match=r"of adapter 'b' are finite, but .* overflows"):
        featurizer.fit_transform(X)


def test_finite_numbers_whose_products_cancel_infinitely_are_named():
    rows = np.array([[1.0, 1.0, 1.0, 1.0], [1e30, -1e30, 1e30, 1e30]], np.float32)
    X = LoRACollection.from_array(rows, LoRALayout([("q", 1, 1, 2)]), ids=["a", "b"])
    featurizer = DenseProduct(device="cpu").fit(X)
    with pytest.raises(ValueError, match=r"of adapter 'b' are finite, but .* overflows"):
        featurizer.transform(X[1:])


@pytest.mark.parametrize("featurizer", [SVDSpectrum(), OAlign()], ids=str)
def test_finite_numbers_that_cannot_be_decomposed_are_named(featurizer, X):
    huge = LoRACollection.from_array(np.asarray(X, np.float64) * 1e300, X.layout)
    with pytest.raises(ValueError, match=r"adapters 0 to 8 are finite, but .* overflows"):
        featurizer.fit_transform(huge)


@pytest.mark.parametrize("scale", [1e80, 1e160, 1e300])
@pytest.mark.parametrize("featurizer", BY_PAIRS, ids=str)
def test_pairs_whose_products_overflow_are_named(featurizer, X, scale):
    flat = np.array(X)
    flat[4] *= scale
    huge = LoRACollection.from_array(flat, X.layout, ids=X.ids)
    for method in ("fit", "fit_transform"):
        with pytest.raises(ValueError, match=r"of adapter 'adapter-4' are finite, but .* overflow"):
            getattr(clone(featurizer), method)(huge)


def test_coordinates_that_overflow_are_named(X):
    flat = np.asarray(X, np.float32)
    fitted = DenseProduct("gram").fit(LoRACollection.from_array(flat, X.layout))
    flat = np.concatenate([flat[:4], np.float32(1e20) * flat[4:]])
    huge = LoRACollection.from_array(flat, X.layout, ids=X.ids)
    for of in (fitted.transform, DenseProduct("gram").fit_transform):
        with pytest.raises(ValueError, match=r"of adapter 'adapter-4' are finite, but .* overflow"):
            of(huge)


def test_a_sum_that_overflows_is_no_error():
    rows = np.full((3, 4), 3e38, np.float32)
    X = LoRACollection.from_array(rows, LoRALayout.rows(4))
    np.testing.assert_array_equal(DenseProduct().fit_transform(X), rows)


@pytest.mark.parametrize("featurizer", [BY_BLOCKS[0], BY_PAIRS[0]], ids=str)
@pytest.mark.parametrize("backend", ["loky", "multiprocessing", "threading", "sequential"])
def test_every_backend_of_joblib_gives_the_same(featurizer, mixed, tmp_path, backend):
    mixed.save(tmp_path / "zoo.safetensors")
    X = LoRACollection.open(tmp_path / "zoo.safetensors")
    featurizer = clone(featurizer).set_params(device="cpu")
    expected = np.asarray(featurizer.fit_transform(X))
    for collection in (X, mixed):
        with joblib.parallel_config(backend, n_jobs=2), sklearn.config_context(working_memory=1e-6):
            found = clone(featurizer).fit_transform(collection)
        np.testing.assert_allclose(np.asarray(found), expected, atol=1e-12)


@pytest.mark.parametrize("featurizer", [BY_BLOCKS[0], BY_PAIRS[0]], ids=str)
@pytest.mark.parametrize("n_jobs", [None, 2])
def test_one_block_needs_no_joblib(featurizer, X, n_jobs, monkeypatch):
    featurizer = clone(featurizer).set_params(device="cpu", n_jobs=n_jobs).fit(X[:1])
    expected = np.asarray(featurizer.transform(X))[:1]
    monkeypatch.setattr(_blocks, "Parallel", None)
    np.testing.assert_allclose(np.asarray(featurizer.transform(X[:1])), expected, atol=1e-12)


def test_errors_of_other_processes_name_the_adapter(X):
    flat = np.array(X)
    flat[7, 0] = np.nan
    bad = LoRACollection.from_array(flat, X.layout, ids=X.ids)
    featurizer = SVDSpectrum().fit(X)
    with joblib.parallel_config("loky", n_jobs=2), pytest.raises(ValueError, match="'adapter-7'"):
        featurizer.transform(bad)


def test_plans_cover_all_within_the_working_memory():
    X = LoRACollection.from_array(np.zeros((100, 1000), np.float32), LoRALayout.rows(1000))
    shuffled = X[np.random.default_rng(0).permutation(100)]
    with sklearn.config_context(working_memory=1):
        for collection, sent, n_copies in (
            *((X, False, 0), (X[10:], False, 0), (shuffled, False, 2)),
            *((X, True, 2), (X[10:], True, 2), (shuffled, True, 4)),
        ):
            blocks = plan_blocks(collection, n_columns=500, n_parallel=2, sent=sent)
            rows = [row for rows in blocks for row in range(len(collection))[rows]]
            assert rows == list(range(len(collection)))
            # Result and copies in float32, and the module in stacks and in float64.
            per_adapter = 4 * (500 + 1000 * n_copies) + 32 * 1001
            assert blocks[0].stop == 2**20 // (2 * per_adapter)


def test_plans_count_the_largest_module_and_rows_that_are_laid_out_anew():
    layout = LoRALayout([("small", 3, 2, 1), ("large", 40, 50, 4)])
    flat = np.zeros((1000, layout.width), np.float32)
    wider = layout.with_ranks([2, 5])
    with sklearn.config_context(working_memory=1):
        for X, largest, copied in (
            (LoRACollection.from_array(flat, layout), 90 * 4, 0),
            (LoRACollection.from_array(flat.astype(np.float16), layout), 90 * 4, layout.width),
            (LoRACollection.from_array(flat, layout).with_layout(wider), 90 * 5, wider.width),
            # Of twice the bytes.
            (
                LoRACollection.from_array(flat.astype(float), layout).with_layout(wider),
                *(90 * 5, 2 * wider.width),
            ),
        ):
            assert plan_blocks(X)[0].stop == 2**20 // (32 * largest + 4 * 2 * copied)


def test_plans_leave_room_for_stacks_where_blocks_are_sent(monkeypatch):
    layout = LoRALayout([(f"m{i}", 40, 50, 4) for i in range(10)])
    X = LoRACollection.from_array(np.zeros((1000, layout.width), np.float32), layout)
    with sklearn.config_context(working_memory=1):
        assert plan_blocks(X, stacked=True)[0].stop == 2**20 // (32 * 90 * 4)
        per_adapter = 32 * 90 * 4 + 4 * 2 * layout.width
        assert plan_blocks(X, sent=True)[0].stop == 2**20 // per_adapter
        for limit, at_work in ((10**6, layout.width), (1000, 1000), (100, 90 * 4)):
            monkeypatch.setattr(_blocks, "_STACK_WEIGHTS_ON_GPU", limit)
            per_adapter = 32 * at_work + 4 * 2 * layout.width
            assert plan_blocks(X, sent=True, stacked=True)[0].stop == 2**20 // per_adapter


@pytest.mark.parametrize("n_parallel", [1, 4, 9, 20])
@pytest.mark.parametrize("n_least", [1, 2])
def test_there_is_a_block_for_each_that_works(X, n_parallel, n_least):
    at_once = n_parallel * (5 if n_least == 2 else 9)
    with sklearn.config_context(working_memory=at_once * 32 * 30 / 2**20):
        blocks = plan_blocks(X, n_parallel=n_parallel)
    assert len(blocks) == min(max(n_parallel, n_least), 9)
    assert [row for rows in blocks for row in range(9)[rows]] == [*range(9)]


@pytest.mark.parametrize(
    ("n_jobs", "sent", "stacked"),
    [(1, False, False), (2, False, False), (1, True, False), (1, True, True)],
)
def test_what_works_at_once_fits_in_the_working_memory(X, n_jobs, sent, stacked, monkeypatch):
    def note_size(block, out):
        out[:] = len(out)

    monkeypatch.setattr(_blocks, "are_sent", lambda device: sent)
    at_work = X.layout.width if stacked else 30
    per_adapter = 8 * (100 + 2 * X.layout.width * sent) + 32 * at_work
    with sklearn.config_context(working_memory=n_jobs * 2 * per_adapter / 2**20):
        found = map_blocks(note_size, X, 100, device="cpu", n_jobs=n_jobs, stacked=stacked)
    assert found[:, 0].tolist() == [2] * 8 + [1]


def test_jobs_work_at_the_same_time(X):
    both = threading.Barrier(2, timeout=30)

    def meet(block, out):
        both.wait()
        out[:] = len(out)

    np.testing.assert_array_equal(
        map_blocks(meet, X, 1, device="cpu", n_jobs=2)[:, 0], [5] * 5 + [4] * 4
    )


def test_other_errors_of_torch_are_passed_on(X):
    def fail(block, out):
        raise RuntimeError("not enough memory")

    with pytest.raises(RuntimeError, match="not enough memory"):
        map_blocks(fail, X, 1, device="cpu", n_jobs=1)


def test_adapters_are_sent_to_other_processes_and_not_to_threads():
    assert not are_sent("cpu")
    with joblib.parallel_config("threading", n_jobs=2):
        assert not are_sent("cpu")
    with joblib.parallel_config("loky", n_jobs=2):
        assert are_sent("cpu")
        assert are_sent("cuda:7")  # a device of theirs, not of this process


class TestStacks:
    """Small factors of one shape are worked on together."""

    @pytest.fixture
    def factors(self):
        """Of 12 modules of two shapes in turn, of two adapters."""
        shapes = [((2, 5, 3), (2, 4, 3)), ((2, 4, 3), (2, 4, 3))] * 6
        return [(torch.randn(left), torch.randn(right)) for left, right in shapes]

    # Bytes of U and V: 216 and 192.
    @pytest.mark.parametrize(
        ("small", "together", "sizes"),
        [(1000, 10**6, {6}), (1000, 600, {2, 3}), (200, 10**6, {1, 6}), (100, 10**6, {1})],
    )
    def test_each_module_comes_once(self, factors, small, together, sizes, monkeypatch):
        monkeypatch.setattr(_blocks, "_SMALL_BYTES", small)
        monkeypatch.setattr(_blocks, "_STACK_BYTES", together)
        found = [*stacks(iter(factors))]
        assert {len(positions) for positions, *_ in found} == sizes
        assert sorted(p for positions, *_ in found for p in positions) == [*range(12)]
        for positions, *stacked in found:
            for stack, expected in zip(
                stacked, zip(*(factors[p] for p in positions), strict=True), strict=True
            ):
                torch.testing.assert_close(stack, torch.stack(expected), rtol=0, atol=0)

    def test_shapes_of_either_side_part_them(self):
        sizes = [(5, 4), (5, 6), (6, 4)]
        found = [*stacks((torch.ones(2, n, 3), torch.ones(2, m, 3)) for n, m in sizes)]
        assert [positions for positions, *_ in found] == [[0], [1], [2]]

    def test_large_ones_are_views_in_their_order(self, factors):
        found = [*stacks(factors, small=False)]
        assert [positions for positions, *_ in found] == [[p] for p in range(12)]
        for (_, *stacked), pair in zip(found, factors, strict=True):
            for stack, factor in zip(stacked, pair, strict=True):
                assert stack.data_ptr() == factor.data_ptr()

    @pytest.mark.parametrize("small", [0, 2**20], ids=["alone", "stacked"])
    def test_features_and_ranks_are_those_of_every_module(self, mixed, small, monkeypatch):
        monkeypatch.setattr(_blocks, "_SMALL_BYTES", small)
        spectra = SVDSpectrum(device="cpu").fit(mixed)
        wider = mixed.with_layout(mixed.layout.with_ranks([5] * mixed.layout.n_modules))
        for X in (mixed, wider):
            found, start = spectra.transform(X), 0
            for U, V in factor_views(torch.from_numpy(np.array(X)), X.layout):
                values = torch.linalg.svdvals(U @ V.mT)[:, :3]
                columns = found[:, start : start + 3]
                np.testing.assert_allclose(columns, values, atol=1e-12)
                start += 3

    @pytest.mark.parametrize(
        "ranks",
        [[(2, 2, 2)] * 6, [(2, 2, 2), *[(1, 2, 0)] * 5], [(2, 1, 1), *[(2, 1, 0)] * 5]],
        ids=["one rank", "of the adapters", "of the templates"],
    )
    def test_aligned_factors_are_those_of_every_module(self, ranks, random_loras, rng, monkeypatch):
        X = random_loras(rng, 6, ((6, 4),) * 3, ranks)
        X = X.with_layout(X.layout.with_ranks([2] * 3))
        found = np.asarray(OAlign(template=0, device="cpu").fit_transform(X))
        monkeypatch.setattr(_blocks, "_SMALL_BYTES", 0)
        expected = np.asarray(OAlign(template=0, device="cpu").fit_transform(X))
        np.testing.assert_allclose(found, expected, atol=1e-12)


@by_blocks
def test_read_only_weights(featurizer, X):
    flat = np.array(X)
    flat.flags.writeable = False
    frozen = LoRACollection.from_array(flat, X.layout, ids=X.ids)
    np.testing.assert_array_equal(
        np.asarray(clone(featurizer).fit_transform(frozen)),
        np.asarray(clone(featurizer).fit_transform(X)),
    )


@by_blocks
@pytest.mark.parametrize("lay", ["backwards", "among others"])
def test_rows_that_torch_cannot_share(featurizer, X, lay):
    flat = np.array(X)[::-1]
    if lay == "among others":
        records = np.empty(len(X), dtype=[("flat", flat.dtype, flat.shape[1:]), ("tag", "S3")])
        records["flat"] = flat
        flat = records["flat"]
    expected = np.asarray(clone(featurizer).fit(X).transform(X[::-1]))
    # NumPy takes a block of one row for contiguous, whatever its stride.
    with sklearn.config_context(working_memory=0):
        same = LoRACollection.from_array(flat, X.layout)
        found = np.asarray(clone(featurizer).fit(X).transform(same))
    np.testing.assert_allclose(found, expected)


@pytest.mark.parametrize("featurizer", [*BY_BLOCKS, *BY_PAIRS], ids=str)
def test_what_torch_is_set_to_does_not_matter(featurizer, X):
    X = LoRACollection.from_array(np.asarray(X, np.float32), X.layout)
    expected = np.asarray(clone(featurizer).fit_transform(X))
    for setting in (torch.device("meta"), torch.autocast("cpu", torch.bfloat16)):
        with setting:
            found = np.asarray(clone(featurizer).fit_transform(X))
        np.testing.assert_array_equal(found, expected)


@by_blocks
def test_input_is_left_alone(featurizer, with_side):
    before = np.array(with_side)
    clone(featurizer).fit_transform(with_side)
    np.testing.assert_array_equal(np.asarray(with_side), before)


@pytest.mark.gpu
class TestCuda:
    """Blocks that go to a GPU, one after another and two at once."""

    featurizer = pytest.mark.parametrize("featurizer", [*BY_BLOCKS, *BY_PAIRS], ids=str)
    n_jobs = pytest.mark.parametrize("n_jobs", [1, 2])

    @pytest.fixture
    def in_file(self, mixed, tmp_path):
        mixed.save(tmp_path / "zoo.safetensors")
        return LoRACollection.open(tmp_path / "zoo.safetensors")

    @featurizer
    @n_jobs
    @pytest.mark.parametrize(
        ("working_memory", "stack_weights"), [(1e-6, 2**20), (1024, 2**20), (1024, 40)]
    )
    def test_gives_what_the_cpu_gives(
        self, featurizer, n_jobs, working_memory, stack_weights, mixed, in_file, cuda, monkeypatch
    ):
        monkeypatch.setattr(_blocks, "_STACK_WEIGHTS_ON_GPU", stack_weights)
        expected = np.asarray(clone(featurizer).set_params(device="cpu").fit_transform(mixed))
        on_cuda = clone(featurizer).set_params(device=cuda, n_jobs=n_jobs)
        with sklearn.config_context(working_memory=working_memory):
            for X in (mixed, in_file, mixed[[*range(len(mixed))]]):
                found = on_cuda.fit_transform(X)
                np.testing.assert_allclose(np.asarray(found), expected, atol=1e-10)

    @pytest.mark.parametrize("featurizer", [SVDSpectrum(), UpdateKernel("rbf")], ids=str)
    def test_in_other_processes(self, featurizer, mixed, in_file, cuda):
        expected = np.asarray(clone(featurizer).set_params(device="cpu").fit_transform(mixed))
        on_cuda = clone(featurizer).set_params(device=cuda)
        with joblib.parallel_config("loky", n_jobs=2), sklearn.config_context(working_memory=1e-6):
            found = on_cuda.fit_transform(in_file)
        np.testing.assert_allclose(np.asarray(found), expected, atol=1e-10)

    # Not those of which one adapter's dense updates, or what is kept of one module's updates, are
    # more than the memory here.
    @pytest.mark.parametrize("featurizer", [*BY_BLOCKS[:2], BY_BLOCKS[3], *BY_PAIRS], ids=str)
    @n_jobs
    def test_takes_no_more_of_its_memory_than_the_working_memory(self, featurizer, n_jobs, cuda):
        layout = LoRALayout([(f"m{i}", 2048, 2048, 8) for i in range(8)])
        flat = np.random.default_rng(0).standard_normal((128, layout.width), np.float32)
        X = LoRACollection.from_array(flat, layout)
        on_cuda = clone(featurizer).set_params(device=cuda, n_jobs=n_jobs)
        with sklearn.config_context(working_memory=32):
            on_cuda.fit_transform(X)  # what libraries take for themselves stays
            before, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
            torch.cuda.reset_peak_memory_stats()
            for _ in range(3):
                on_cuda.fit_transform(X)
        assert torch.cuda.max_memory_allocated() - before <= 32 * 2**20
        assert torch.cuda.memory_reserved() <= reserved + 16 * 2**20

    @pytest.mark.usefixtures("cuda")
    def test_threads_may_be_the_first_to_use_it(self):
        """Torch itself fails where two threads want its linear algebra for CUDA at once."""
        script = (
            "import numpy as np\n"
            "from concurrent.futures import ThreadPoolExecutor\n"
            "from sklora import LoRACollection, LoRALayout, SVDSpectrum\n"
            "flat = np.random.default_rng(0).standard_normal((8, 40))\n"
            "X = LoRACollection.from_array(flat, LoRALayout([('q', 6, 4, 4)]))\n"
            "with ThreadPoolExecutor(8) as pool:\n"
            "    found = [*pool.map(lambda n: SVDSpectrum(n_jobs=4).fit_transform(X), range(16))]\n"
            "assert all((A == found[0]).all() for A in found)"
        )
        subprocess.run([sys.executable, "-c", script], check=True)

    @featurizer
    def test_no_gauge_changes_them(self, featurizer, X, cuda):
        on_cuda = clone(featurizer).set_params(device=cuda)
        if isinstance(featurizer, GLEquivariantProjection):
            on_cuda = make_pipeline(on_cuda, DenseProduct(device=cuda))
        group = "O" if isinstance(featurizer, OAlign) else "GL"
        assert_gauge_invariant(on_cuda.fit(X), X, group=group, atol=1e-9, random_state=0)

    @featurizer
    def test_bad_numbers_are_named(self, featurizer, X, cuda):
        flat = np.array(X)
        flat[7, 0] = np.nan
        bad = LoRACollection.from_array(flat, X.layout, ids=X.ids)
        with pytest.raises(ValueError, match="'adapter-7'"):
            clone(featurizer).set_params(device=cuda).fit_transform(bad)
