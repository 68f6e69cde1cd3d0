"""Work on zoos that stay in their file."""

import pickle
import subprocess
import sys

import numpy as np
import pytest
import sklearn
from sklearn.base import clone
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline

from sklora._stores import ArrayStore, MemmapStore
from sklora.collection import LoRACollection, LoRALayout
from sklora.estimators import GLNetClassifier, MLPNetClassifier
from sklora.transform import DenseProduct, GLEquivariantProjection, OAlign, SVDSpectrum


@pytest.fixture
def path(tmp_path):
    return tmp_path / "zoo.safetensors"


def small_memory(X, n_rows):
    """A working memory that holds so many rows, of three copies each."""
    return sklearn.config_context(working_memory=3.5 * n_rows * X.nbytes / len(X) / 2**20)


@pytest.fixture
def loras(random_loras, rng):
    """Forty adapters of mixed ranks, of which the first has the largest."""
    ranks = rng.integers(0, 4, size=(40, 3))
    ranks[0] = 3
    return random_loras(rng, 40, rank=ranks, dtype=np.float32)


@pytest.fixture
def opened(loras, path):
    loras.save(path)
    return LoRACollection.open(path)


class TestStreaming:
    @pytest.mark.parametrize(
        "featurizer",
        [
            SVDSpectrum(),
            OAlign(template=0),
            DenseProduct(),
            GLEquivariantProjection(3, random_state=0),
            GLEquivariantProjection(3, method="hosvd"),
        ],
        ids=str,
    )
    def test_featurizers(self, loras, opened, featurizer):
        with small_memory(loras, 60):
            assert len(list(opened.iter_blocks(24 * loras.layout.width))) > 1
            featurizer = clone(featurizer).set_params(device="cpu")
            found = np.asarray(featurizer.fit_transform(opened))
            np.testing.assert_array_equal(found, featurizer.fit_transform(loras))
        # Other blocks are other batches of the same products: to the rounding of float32.
        expected = np.asarray(featurizer.fit_transform(loras))
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("network", [GLNetClassifier, MLPNetClassifier])
    def test_training_is_the_same_to_the_bit(self, loras, opened, network):
        y = np.arange(40) % 2
        models = [
            network(max_epochs=3, random_state=0, device="cpu").fit(X, y) for X in (loras, opened)
        ]
        for name, weights in models[0].weights_.items():
            assert weights.tobytes() == models[1].weights_[name].tobytes()
        np.testing.assert_array_equal(
            models[0].predict_proba(loras), models[1].predict_proba(opened)
        )

    @pytest.mark.parametrize("network", [GLNetClassifier, MLPNetClassifier])
    def test_training_reads_batches_and_blocks_alone(self, loras, opened, network, monkeypatch):
        sizes, read = [], MemmapStore.read

        def counting(store, rows, *, copy=True):
            flat = read(store, rows)
            sizes.append(len(flat))
            return flat

        monkeypatch.setattr(MemmapStore, "read", counting)
        model = network(max_epochs=2, batch_size=8, random_state=0, device="cpu")
        with small_memory(loras, 8):
            model.fit(opened, np.arange(40) % 2).predict(opened)
        assert max(sizes) <= 10

    def test_a_pickle_holds_the_path_and_not_the_weights(self, path):
        rows = np.random.default_rng(0).normal(size=(1000, 40))
        LoRACollection.from_array(rows, LoRALayout.rows(40)).save(path)
        X = LoRACollection.open(path)
        assert len(pickle.dumps(X)) < 10_000 < rows.nbytes
        assert len(pickle.dumps(X[:10])) < 2_000
        np.testing.assert_array_equal(pickle.loads(pickle.dumps(X[::2])).read(), rows[::2])

    def test_processes_of_a_search_map_the_file(self, loras, opened):
        y = np.arange(40) % 2
        model = make_pipeline(
            SVDSpectrum(), MLPNetClassifier(max_epochs=2, random_state=0, device="cpu")
        )
        scores = [
            cross_val_score(model, X, y, cv=2, n_jobs=n) for X, n in ((opened, 2), (loras, 1))
        ]
        np.testing.assert_array_equal(*scores)


LARGE = """
import sys
from sklora import GLEquivariantProjection, LoRACollection, SVDSpectrum

X = LoRACollection.open(sys.argv[1])
assert X.nbytes > 3e9
SVDSpectrum(device="cpu").fit_transform(X)
GLEquivariantProjection(4, device="cpu").fit_transform(X)
with open("/proc/self/status") as status:
    print(dict(line.split(":", 1) for line in status)["VmHWM"].split()[0])
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads what Linux says of a process")
def test_memory_stays_within_the_promise(path):
    layout = LoRALayout([("q", 2**14, 2**14, 4)])
    n_adapters = 3 * 10**9 // layout.width // 4 + 1

    class Store(ArrayStore):
        def read(self, rows, *, copy=True):
            return super().read(np.zeros(len(self.ids[rows]), np.intp))

    rows = np.random.default_rng(0).normal(size=(1, layout.width)).astype(np.float32)
    ranks = np.broadcast_to(np.array(layout.ranks), (n_adapters, 1))
    X = LoRACollection(Store(rows, layout, ranks, np.arange(n_adapters)))
    X.save(path)
    done = subprocess.run(
        [sys.executable, "-c", LARGE, str(path)], check=True, stdout=subprocess.PIPE
    )
    assert 1024 * int(done.stdout) < 1.5e9
