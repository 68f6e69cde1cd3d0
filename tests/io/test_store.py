import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import joblib
import numpy as np
import pytest
from safetensors.numpy import save
from sklearn import config_context
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, cross_val_score, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from sklora import (
    DenseProduct,
    GLEquivariantProjection,
    GLNetClassifier,
    LoRACollection,
    MLPNetClassifier,
    OAlign,
    SVDSpectrum,
    architecture_grid,
    make_architecture,
)
from sklora.collection import Store
from sklora.io import AdapterError, _adapter, read_adapters, write_adapter
from sklora.io._find import read_config
from sklora.io._store import AdapterStore
from sklora.io.containers.safetensors import SafetensorsFile

N_ADAPTERS = 12
SHAPES = {"down.q": (7, 4), "up.q": (5, 6)}
QUICK = {"max_epochs": 2, "batch_size": 4, "random_state": 0, "device": "cpu"}


def write(path, rng, n_modules=2, rank=2, alpha=3.0):
    """Write a file with kohya's keys."""
    tensors = {}
    for name, (n, m) in list(SHAPES.items())[:n_modules]:
        tensors[f"{name}.lora_down.weight"] = rng.normal(size=(rank, m)).astype(np.float32)
        tensors[f"{name}.lora_up.weight"] = rng.normal(size=(n, rank)).astype(np.float32)
        tensors[f"{name}.alpha"] = np.array(alpha, np.float32)
    Path(path).write_bytes(save(tensors))


@pytest.fixture
def zoo(tmp_path, rng):
    """A folder of adapters of ranks 1 to 3, some of which lack a module."""
    for place in range(N_ADAPTERS):
        rank = 1 + place % 3
        write(tmp_path / f"{place:02}.safetensors", rng, n_modules=1 + (place % 4 > 0), rank=rank)
    return tmp_path


@pytest.fixture
def X(zoo):
    return read_adapters(zoo)


@pytest.fixture
def twin(X):
    """The same adapters, in memory."""
    return LoRACollection.from_array(X.read(), X.layout, ranks=X.ranks, ids=X.ids)


@pytest.fixture
def y():
    return np.arange(N_ADAPTERS) % 2


def test_it_is_a_store(X):
    store: Store = X._store
    assert isinstance(store, AdapterStore)
    assert store.is_checked
    assert store.layout == X.layout
    assert store.ranks.shape == (N_ADAPTERS, 2)
    assert store.ids.shape == (N_ADAPTERS,)
    assert store.dtype == np.float32


@pytest.mark.parametrize(
    "rows",
    [
        slice(None),
        slice(3, 9, 2),
        slice(5, 5),
        np.array([4, 4, 0]),
        np.array([-1]),
        np.array([], int),
    ],
)
def test_rows_are_read(X, twin, rows):
    read = X._store.read(rows)
    np.testing.assert_array_equal(read, twin.read()[rows], strict=True)
    assert read.flags.owndata
    assert read.flags.c_contiguous


def test_views_read_the_same_as_in_memory(X, twin):
    for key in (slice(2, 7), [3, 1], np.arange(N_ADAPTERS) % 3 == 0):
        np.testing.assert_array_equal(X[key].read(), twin[key].read(), strict=True)
        np.testing.assert_array_equal(np.asarray(X[key]), np.asarray(twin[key]), strict=True)
        np.testing.assert_array_equal(X[key].ids, twin[key].ids)
    np.testing.assert_array_equal(X[[5, 2]][1]["down.q"][0], twin[2]["down.q"][0])
    wider = X.layout.with_ranks([4, 5])
    np.testing.assert_array_equal(X.with_layout(wider).read(), twin.with_layout(wider).read())


def test_path_through_a_link_and_up_again(tmp_path, rng):
    """It leads up from where the link leads to, not from where the link is."""
    (tmp_path / "there" / "inner").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "there" / "inner")
    for folder in (tmp_path, tmp_path / "there"):
        write(folder / "a.safetensors", rng)
    X = read_adapters(f"{tmp_path}/link/../a.safetensors")
    expected = read_adapters(tmp_path / "there" / "a.safetensors")
    np.testing.assert_array_equal(X.read(), expected.read())


class TestPickle:
    def test_holds_paths_and_no_weights(self, tmp_path, rng):
        for place in range(50):
            write(tmp_path / f"{place}.safetensors", rng, rank=100)
        X = read_adapters(tmp_path)
        assert X.nbytes == 50 * 2200 * 4
        assert len(pickle.dumps(X)) < 50 * (2 * len(str(tmp_path)) + 100) + 1000
        assert len(pickle.dumps(X[:2])) < 2 * (2 * len(str(tmp_path)) + 100) + 1000

    def test_of_a_subset_holds_its_rows_alone(self, X, twin):
        subset = pickle.loads(pickle.dumps(X[[7, 2]]))
        assert subset.ids.tolist() == [X.ids[7], X.ids[2]]
        np.testing.assert_array_equal(subset.read(), twin.read([7, 2]))
        np.testing.assert_array_equal(subset.ranks, X.ranks[[7, 2]], strict=True)
        assert len(pickle.loads(pickle.dumps(X[:0]))) == 0

    def test_works_in_another_folder(self, zoo, monkeypatch, twin):
        monkeypatch.chdir(zoo.parent)
        X = read_adapters(zoo.name)
        monkeypatch.chdir("/")
        again = pickle.loads(pickle.dumps(X))
        assert again.ids[0] == f"{zoo.name}/00.safetensors"
        assert again.layout == X.layout
        for collection in (X, again):
            np.testing.assert_array_equal(collection.read(), twin.read(), strict=True)

    def test_keeps_options(self, tmp_path, rng):
        write(tmp_path / "a", rng)
        X = read_adapters(tmp_path / "a", names="raw")
        assert pickle.loads(pickle.dumps(X)).layout.names == X.layout.names
        np.testing.assert_array_equal(pickle.loads(pickle.dumps(X)).read(), X.read())


class TestChange:
    def changed(self, X, path, reason):
        again = pickle.loads(pickle.dumps(X))
        for collection in (X, again, again[:3]):
            with pytest.raises(AdapterError, match=reason) as error:
                collection.read()
            assert error.value.path == str(path)

    def test_of_the_size_is_refused(self, zoo, X, rng):
        write(zoo / "02.safetensors", rng, rank=1)
        self.changed(X, zoo / "02.safetensors", "it changed since its header was read; read")

    def test_of_the_time_is_refused(self, zoo, X):
        path = zoo / "01.safetensors"
        state = os.stat(path)
        os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns + 1))
        self.changed(X, path, "it changed since its header was read")

    def test_of_the_configuration_is_refused(self, zoo, X):
        (zoo / "adapter_config.json").write_text("{}")
        self.changed(X, zoo / "00.safetensors", "it changed since its header was read")
        X = read_adapters(zoo)
        (zoo / "adapter_config.json").write_text('{"a": 1}')
        self.changed(X, zoo / "00.safetensors", "it changed since its header was read")

    def test_that_keeps_size_and_time_is_seen_by_the_shapes(self, tmp_path, rng):
        path = tmp_path / "a.safetensors"
        sizes = {"down": (2, 4), "up": (7, 2)}, {"down": (2, 7), "up": (4, 2)}
        for place, shapes in enumerate(sizes):
            tensors = {f"q.lora_{role}.weight": np.ones(shape) for role, shape in shapes.items()}
            path.write_bytes(save(tensors))
            os.utime(path, (1, 1))
            if not place:
                X = read_adapters(path)
        self.changed(X, path, "it changed while it was read; read the adapters again")

    @pytest.mark.parametrize("is_read_before", [False, True])
    def test_while_it_is_opened_is_refused(self, tmp_path, monkeypatch, is_read_before):
        """Else the weights of one version have the scale that the configuration of another says."""
        for name, rank in (("old", 1), ("new", 4)):
            write_adapter(tmp_path / name, {"q": (np.ones((5, rank)), np.ones((4, rank)))})
        now = tmp_path / "now"
        now.symlink_to("old")
        path = now / "adapter_model.safetensors"
        read = read_adapters(path).read if is_read_before else partial(read_adapters, path)

        def read_late(found):
            (tmp_path / "next").symlink_to("new")
            (tmp_path / "next").replace(now)
            return read_config(found)

        monkeypatch.setattr(_adapter, "read_config", read_late)
        with pytest.raises(AdapterError, match="it changed while it was read; read the adapters"):
            read()

    def test_a_disk_that_fails_is_an_error_with_the_name(self, zoo, X, monkeypatch):
        def fail(self, name):
            raise OSError(5, "Input/output error")

        monkeypatch.setattr(SafetensorsFile, "read", fail)
        self.changed(X, zoo / "00.safetensors", "it cannot be read: Input/output error")

    def test_a_deleted_file_is_refused(self, zoo, X):
        (zoo / "00.safetensors").unlink()
        self.changed(X, zoo / "00.safetensors", "No such file")

    def test_other_rows_can_still_be_read(self, zoo, X, twin):
        (zoo / "00.safetensors").unlink()
        np.testing.assert_array_equal(X[1:].read(), twin[1:].read())


def test_caches_notice_a_changed_file(zoo, tmp_path_factory, rng, y):
    calls = tmp_path_factory.mktemp("calls") / "log"

    def logged(X):
        with open(calls, "a") as file:
            file.write("x")
        return X.read()

    cached = joblib.Memory(tmp_path_factory.mktemp("cache"), verbose=0).cache(logged)
    cached(read_adapters(zoo))
    cached(read_adapters(zoo))
    cached(read_adapters(zoo)[:])
    assert calls.read_text() == "x"
    write(zoo / "03.safetensors", rng)
    changed = cached(read_adapters(zoo))
    assert calls.read_text() == "xx"
    np.testing.assert_array_equal(changed, read_adapters(zoo).read())


def test_a_pipeline_with_a_cache_notices_a_changed_file(zoo, tmp_path_factory, rng, y):
    def fit(X, memory=None):
        pipeline = make_pipeline(SVDSpectrum(), LogisticRegression(), memory=memory)
        return pipeline.fit(X, y)[-1].coef_

    memory = joblib.Memory(tmp_path_factory.mktemp("cache"), verbose=0)
    before = fit(read_adapters(zoo), memory)
    np.testing.assert_array_equal(fit(read_adapters(zoo), memory), before)
    write(zoo / "03.safetensors", rng)
    after = fit(read_adapters(zoo), memory)
    assert not np.allclose(after, before)
    np.testing.assert_array_equal(after, fit(read_adapters(zoo)))


def test_threads_read_the_same(X, twin):
    rows = [np.random.default_rng(seed).integers(N_ADAPTERS, size=6) for seed in range(40)]
    with ThreadPoolExecutor(4) as pool:
        for picked, flat in zip(rows, pool.map(lambda key: X[key].read(), rows), strict=True):
            np.testing.assert_array_equal(flat, twin.read(picked))


@pytest.mark.parametrize(
    "transformer",
    [
        SVDSpectrum(device="cpu"),
        OAlign(random_state=0, device="cpu"),
        DenseProduct(device="cpu"),
        GLEquivariantProjection(n_components=2, random_state=0, device="cpu"),
        StandardScaler(),
    ],
    ids=lambda transformer: type(transformer).__name__,
)
def test_transformers_give_the_same_as_in_memory_in_blocks(X, twin, transformer):
    expected = np.asarray(transformer.fit_transform(twin))
    with config_context(working_memory=1e-3):
        blocks = list(X.iter_batches())
        assert len(blocks) > 2
        np.testing.assert_allclose(
            np.asarray(transformer.fit_transform(X)), expected, rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("network", [GLNetClassifier, MLPNetClassifier])
def test_networks_are_fitted_by_the_same_steps_as_in_memory(X, twin, y, network):
    from_files = network(**QUICK).fit(X, y)
    from_memory = network(**QUICK).fit(twin, y)
    assert from_files.weights_.keys() == from_memory.weights_.keys()
    for name, weight in from_files.weights_.items():
        np.testing.assert_array_equal(weight, from_memory.weights_[name])
    np.testing.assert_array_equal(from_files.predict_proba(X), from_memory.predict_proba(twin))


def test_networks_stream(X, y, monkeypatch):
    read = AdapterStore.read
    sizes = []

    def watched(self, rows, *, copy=True):
        flat = read(self, rows)
        sizes.append(len(flat))
        return flat

    monkeypatch.setattr(AdapterStore, "read", watched)
    with config_context(working_memory=1e-3):
        GLNetClassifier(**QUICK).fit(X, y)
    assert max(sizes) <= 4


@pytest.mark.parametrize("n_jobs", [None, 2])
def test_cross_validation_gives_the_same_as_in_memory(X, twin, y, n_jobs):
    pipeline = make_pipeline(SVDSpectrum(device="cpu"), LogisticRegression())
    scores = cross_val_score(pipeline, X, y, cv=3, n_jobs=n_jobs)
    np.testing.assert_array_equal(scores, cross_val_score(pipeline, twin, y, cv=3))


def test_a_search_over_the_architectures_gives_the_same_as_in_memory(X, twin, y):
    grid = architecture_grid(device="cpu", random_state=0)
    for entry in grid:
        entry |= {"model__alpha": [1.0]} if "model__alpha" in entry else {"model__max_epochs": [2]}
    pipeline = make_architecture("svd", device="cpu", random_state=0)
    first, second = (
        GridSearchCV(pipeline, grid, cv=2, error_score="raise").fit(given, y) for given in (X, twin)
    )
    assert len(first.cv_results_["params"]) == 6
    for name in ("mean_test_score", "split0_test_score"):
        np.testing.assert_array_equal(first.cv_results_[name], second.cv_results_[name])


def test_splits_are_views_with_their_ids(X, twin, y):
    train, test, y_train, y_test = train_test_split(X, y, random_state=0, stratify=y)
    assert train._store is X._store
    ids = X.ids.tolist()
    for part, labels in ((train, y_train), (test, y_test)):
        places = [ids.index(id) for id in part.ids]
        np.testing.assert_array_equal(labels, y[places])
        np.testing.assert_array_equal(part.read(), twin.read(places))


def whole(store, rows, *, copy=True):
    raise AssertionError("nothing has to be read whole")


@pytest.mark.parametrize(
    "transformer",
    [
        SVDSpectrum(device="cpu"),
        OAlign(template=2, device="cpu"),
        DenseProduct(device="cpu"),
        GLEquivariantProjection(n_components=2, random_state=0, device="cpu"),
    ],
    ids=lambda transformer: type(transformer).__name__,
)
def test_one_large_adapter_is_never_whole_in_memory(X, twin, transformer, monkeypatch):
    """It is read module by module, of which it may lack any."""
    transformer.fit(twin)
    expected = np.asarray(transformer.transform(twin))
    monkeypatch.setattr(AdapterStore, "read", whole)
    for row in range(N_ADAPTERS):
        found = np.asarray(transformer.transform(X[[row]]))
        np.testing.assert_allclose(found[0], expected[row], rtol=1e-5, atol=1e-6)


def test_results_that_overflow_are_no_reason_to_read_again(tmp_path, monkeypatch):
    tensors = {
        f"x.lora_{side}.weight": np.full((1, 1), 1e30, np.float32) for side in ("down", "up")
    }
    (tmp_path / "huge.safetensors").write_bytes(save(tensors))
    X = read_adapters(tmp_path)
    monkeypatch.setattr(AdapterStore, "read", whole)
    with pytest.raises(ValueError, match=r"of adapter '.*huge.safetensors' are finite, but"):
        DenseProduct(device="cpu").fit_transform(X)


def test_modules_and_side_features_one_by_one(X, twin):
    store = X._store
    for row, adapter in enumerate(twin):
        for module, (U, V) in zip(X.layout.modules, store.iter_factors(row), strict=True):
            zero = np.zeros((module.n, 0)), np.zeros((module.m, 0))
            for found, expected in zip((U, V), adapter.get(module.name, zero), strict=True):
                np.testing.assert_array_equal(found, expected)
        assert store.read_side(row).shape == (0,)


def test_an_adapter_that_changes_is_refused_module_by_module(X, zoo, rng):
    write(zoo / "03.safetensors", rng, rank=5)
    with pytest.raises(AdapterError, match=r"03\.safetensors.*changed"):
        SVDSpectrum().fit_transform(X[[3]])
