"""What a service does to sklora: threads, forks, Ctrl-C, full disks, kills, and very many calls."""

import functools
import gc
import os
import shutil
import signal
import subprocess
import sys
import tracemalloc
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from sklearn.model_selection import GridSearchCV
from skorch.callbacks import Callback

from sklora import (
    DenseProduct,
    GLEquivariantProjection,
    GLNetClassifier,
    GLNetRegressor,
    MLPNetClassifier,
    MLPNetRegressor,
    OAlign,
    SVDSpectrum,
    UpdateKernel,
    make_architecture,
)
from sklora._files import replacing
from sklora.cli import _scoring
from sklora.estimators import TrainingInterruptedWarning
from sklora.io import read_adapters, write_adapter

linux = pytest.mark.skipif(sys.platform != "linux", reason="needs fork, /proc or Linux's limits")

FEATURIZERS = [
    SVDSpectrum(),
    OAlign(random_state=0),
    DenseProduct(),
    DenseProduct("gram"),
    DenseProduct("sketch", 2, random_state=0),
    GLEquivariantProjection(3, random_state=0),
    GLEquivariantProjection(3, method="hosvd"),
    UpdateKernel("rbf"),
]
NETS = [GLNetClassifier, GLNetRegressor, MLPNetClassifier, MLPNetRegressor]
ESTIMATORS = [*FEATURIZERS, *(net(max_epochs=2, random_state=0) for net in NETS)]
every_estimator = pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
y = np.arange(24) % 2


@pytest.fixture
def X(random_loras, rng):
    return random_loras(rng, n_adapters=24)


def results(estimator, X):
    """All that a fitted estimator says of adapters."""
    methods = ("transform", "predict", "predict_proba", "decision_function")
    calls = (getattr(estimator, name, None) for name in methods)
    return [np.asarray(call(X)) for call in calls if call is not None]


@pytest.fixture
def fitted(estimator, X):
    return estimator.fit(X, y)


@every_estimator
def test_threads_agree_with_serial_calls_to_the_bit(fitted, X):
    parts = [X[start : start + 6] for start in range(0, 24, 6)] * 4
    expected = [results(fitted, part) for part in parts]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(functools.partial(results, fitted), parts))
    for one, other in zip(found, expected, strict=True):
        for array, wanted in zip(one, other, strict=True):
            np.testing.assert_array_equal(array, wanted)


# What a process does that has computed in several threads, and then forks.
FORKS = """
import multiprocessing, os, signal, sys, warnings
import numpy as np
import torch
from sklearn.base import clone
from sklora import SVDSpectrum, GLNetClassifier, LoRACollection, UpdateKernel

torch.set_num_threads(4)  # a pool of threads, however few cores there are
# From Python 3.12 on, a fork warns where there are other threads, as there are here.
warnings.filterwarnings("ignore", ".*fork.*", DeprecationWarning)

rng = np.random.default_rng(0)
names = [f"m{i}" for i in range(4)]
factors = [{n: (rng.normal(size=(64, 4)), rng.normal(size=(64, 4))) for n in names}
           for _ in range(64)]
X, y = LoRACollection.from_factors(factors), np.arange(64) % 2
net = GLNetClassifier(max_epochs=1, random_state=0)
estimators = [SVDSpectrum(), UpdateKernel(), net]

def results():
    return [np.asarray(getattr(e, "predict_proba", getattr(e, "transform", None))(X))
            for e in estimators]

for estimator in estimators:
    estimator.fit(X, y)
torch.ones(2000, 2000).mul_(2).sum()  # surely in parallel
expected = results()

def child(send=None):
    # Sums may be split among threads otherwise, and then differ in the last bits.
    same = all(map(np.allclose, results(), expected))
    again = clone(net).fit(X, y)
    same = same and np.allclose(again.predict_proba(X), expected[-1], atol=1e-4)
    return same and torch.get_num_threads() == 1

def wait(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

pid = os.fork()
if not pid:
    signal.alarm(120)  # a child that waits forever is killed
    os._exit(0 if child() else 1)
assert wait(pid) == 0, "os.fork"
process = multiprocessing.get_context("fork").Process(target=lambda: sys.exit(not child()))
process.start()
process.join(120)
if process.exitcode is None:
    process.kill()
assert process.exitcode == 0, "multiprocessing"
"""


@linux
def test_a_fork_after_work_in_threads_computes_the_same():
    environment = {name: v for name, v in os.environ.items() if name != "OMP_NUM_THREADS"}
    environment["CUDA_VISIBLE_DEVICES"] = ""  # CUDA does not survive a fork
    command = [sys.executable, "-W", "error", "-c", FORKS]
    subprocess.run(command, env=environment, timeout=300, check=True)


class Interrupt(Callback):
    """Ctrl-C in some batch of an epoch, after some progress."""

    def __init__(self, epoch, batch=1):
        self.epoch = epoch
        self.batch = batch

    def on_epoch_begin(self, net, **kwargs):
        self.batches = 0

    def on_batch_end(self, net, training, **kwargs):
        self.batches += 1
        if len(net.history) == self.epoch and self.batches == self.batch:
            raise KeyboardInterrupt


def interrupted(model, X, y):
    with pytest.warns(TrainingInterruptedWarning, match="after 3 of 10 epochs"):
        return model.fit(X, y)


@pytest.mark.parametrize("net", NETS, ids=lambda net: net.__name__)
class TestInterruptedTraining:
    @pytest.fixture
    def long(self, net):
        options = {"max_epochs": 10, "random_state": 0, "early_stopping": False, "device": "cpu"}
        return functools.partial(net, **options)

    @pytest.mark.parametrize("batch", [1, 3])
    def test_the_last_complete_epoch_stays(self, long, X, batch):
        model = interrupted(long(callbacks=[Interrupt(4, batch)]), X, y)
        assert model.n_iter_ == len(model.history_) == 3
        assert all("train_loss" in epoch for epoch in model.history_)

        class Stop(Callback):
            def on_epoch_end(self, net, **kwargs):
                if len(net.history) == 3:
                    raise KeyboardInterrupt

        # A callback that ends training after an epoch is no Ctrl-C, and warns nobody.
        expected = long(callbacks=[Stop()]).fit(X, y)
        for name, weight in expected.weights_.items():
            np.testing.assert_array_equal(model.weights_[name], weight)
        np.testing.assert_array_equal(model.predict(X), expected.predict(X))

    def test_the_best_epoch_stays_where_there_are_validation_rows(self, long, random_loras, rng):
        X = random_loras(rng, n_adapters=60)
        y = rng.integers(2, size=60)
        options = {"early_stopping": True, "lr": 0.05}
        whole = long(**options, max_epochs=5, patience=5).fit(X, y)
        losses = [epoch["valid_loss"] for epoch in whole.history_]
        # The same epochs, but for the course of the learning rate.
        model = long(**options, callbacks=[Interrupt(4)])
        interrupted(model, X, y)
        losses = [epoch["valid_loss"] for epoch in model.history_]
        best = int(np.argmin(losses)) + 1
        expected = long(**options, callbacks=[Interrupt(best + 1)])
        with pytest.warns(TrainingInterruptedWarning):
            expected.fit(X, y)
        for name, weight in expected.weights_.items():
            np.testing.assert_array_equal(model.weights_[name], weight)

    def test_before_the_first_epoch_is_complete_it_goes_on(self, long, X):
        model = long().set_params(max_epochs=1).fit(X, y)
        before = vars(model).copy()
        model.set_params(callbacks=[Interrupt(1, 2)])
        with pytest.raises(KeyboardInterrupt):
            model.fit(X, 1 - y)
        assert model.weights_ is before["weights_"]
        assert model.history_ is before["history_"]

    def test_as_an_error_it_leaves_the_estimator_as_it_was(self, long, X):
        model = long(callbacks=[Interrupt(4)])
        before = vars(model).copy()
        with warnings.catch_warnings():
            warnings.simplefilter("error", TrainingInterruptedWarning)
            with pytest.raises(TrainingInterruptedWarning):
                model.fit(X, y)
        assert vars(model) == before


def test_a_search_can_be_made_to_end_at_an_interrupted_fit(X):
    model = MLPNetClassifier(max_epochs=5, callbacks=[Interrupt(3)])
    search = GridSearchCV(model, {"lr": [0.1, 0.01]}, cv=2, error_score="raise")
    with warnings.catch_warnings():
        warnings.simplefilter("error", TrainingInterruptedWarning)
        with pytest.raises(TrainingInterruptedWarning):
            search.fit(X, y)


def test_a_real_ctrl_c_ends_training_with_a_warning():
    class Press(Callback):
        def on_batch_end(self, net, **kwargs):
            if len(net.history) == 3:
                os.kill(os.getpid(), signal.SIGINT)

    X, y = np.random.default_rng(0).normal(size=(40, 6)), np.arange(40) % 2
    model = MLPNetClassifier(max_epochs=10**6, callbacks=[Press()], early_stopping=False)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.warns(TrainingInterruptedWarning) as seen:
            model.fit(X, y)
    except KeyboardInterrupt:  # which would end all tests
        pytest.fail("Ctrl-C was not caught")
    finally:
        signal.signal(signal.SIGINT, before)
    assert [warning.category for warning in seen] == [TrainingInterruptedWarning]
    assert seen[0].filename == __file__  # it points at the call of fit
    assert model.n_iter_ == 2
    assert len(model.predict(X)) == 40


@pytest.mark.parametrize("command", ["fit", "compare"])
def test_an_interrupted_command_stores_nothing(command, tmp_path, X, monkeypatch, capsys):
    from sklora.__main__ import main

    def make(*arguments, **options):
        model = make_architecture(*arguments, **options)
        return model.set_params(model__callbacks=[Interrupt(3)])

    monkeypatch.setattr(_scoring, "make_architecture", make)
    for row in range(len(X)):
        write_adapter(tmp_path / "zoo" / f"{row:02}", X[row])
    labels = tmp_path / "labels.csv"
    labels.write_text("path,kind\n" + "".join(f"{row:02},{'ab'[row % 2]}\n" for row in range(24)))
    output = tmp_path / "output.png"
    arguments = [command, str(tmp_path / "zoo"), "--labels", str(labels), "--target", "kind"]
    arguments += ["-o", str(output)] + ["--folds", "0", "--architecture", "mlp"] * (
        command == "fit"
    )
    assert main(arguments) == 128 + signal.SIGINT
    assert not output.exists()
    assert capsys.readouterr().out == ""


# What writes a file or a folder under a name, small and well, or large and not to the end. Forks do
# it, so that all is imported and trained but once.
SAVE = """
import os, resource, signal, sys
import numpy as np
import skops.io, skorch
from sklora import LoRACollection, make_architecture
from sklora._saved import ModelCard, write_model
from sklora.io import write_adapter
from sklora.io._plan import ReadOptions

def make(n):
    rng = np.random.default_rng(0)
    factors = {"q": (rng.normal(size=(n, 8)), rng.normal(size=(n, 8)))}
    X = LoRACollection.from_factors([factors] * 4)
    model = make_architecture("svd", device="cpu")
    model.set_params(model__max_epochs=1, model__hidden_dim=n)
    return factors, X, model.fit(X, np.arange(4) % 2)

SMALL, LARGE = make(8), make(500)

def save(how, kind, path):
    factors, X, model = SMALL if how == "well" else LARGE
    card = ModelCard(
        "classification", ("y",), ("0", "1"), "svd", X.layout, True, (), ReadOptions(), 4
    )
    if how == "full":  # a write beyond the limit fails, as one to a full disk does
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    if how == "killed":  # when all is written, and before the file has its name
        os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
    try:
        if kind == "zoo":
            X.save(path)
        elif kind == "adapter":
            write_adapter(path, factors)
        else:
            write_model(path, model, card)
    except OSError:
        os._exit(7)
    os._exit(0)

for line in sys.stdin:
    child = os.fork()
    if child == 0:
        save(*line.strip().split(" ", 2))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def contents(path):
    """Every file that is not hidden, and what is in it."""
    return {
        str(file.relative_to(path)): file.read_bytes()
        for file in path.rglob("*")
        if file.is_file() and not file.name.startswith(".")
    }


@pytest.fixture(scope="module")
def save():
    """Give a function that has a child of another process save, and gives how the child ended."""
    command = [sys.executable, "-c", SAVE]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:

        def order(how, kind, path):
            process.stdin.write(f"{how} {kind} {path}\n")
            process.stdin.flush()
            return int(process.stdout.readline())

        yield order


@linux
@pytest.mark.parametrize("kind", ["zoo", "adapter", "model"])
def test_what_is_not_complete_gets_no_name(kind, tmp_path, save):
    path = tmp_path / "saved"
    for before in ({}, None):
        if before is None:
            assert save("well", kind, path) == 0
            before = contents(tmp_path)
            assert before
        assert save("full", kind, path) == 7
        assert list(tmp_path.rglob("*.tmp")) == []
        assert save("killed", kind, path) == -signal.SIGKILL
        assert contents(tmp_path) == before
        for left in tmp_path.rglob("*.tmp"):
            shutil.rmtree(left) if left.is_dir() else left.unlink()


def test_what_a_killed_process_leaves_is_no_adapter(tmp_path, X):
    write_adapter(tmp_path / "a", X[0])
    weights = (tmp_path / "a" / "adapter_model.safetensors").read_bytes()
    with replacing(tmp_path / "a" / "b.safetensors") as file:
        file.write(weights)
        file.flush()
        assert len(read_adapters(tmp_path)) == 1
    assert len(read_adapters(tmp_path)) == 2


@linux
def test_scoring_files_one_by_one_keeps_no_memory(tmp_path, X):
    """In full: benchmarks/soak_scoring.py."""
    for row in range(20):
        write_adapter(tmp_path / f"{row:02}", X[row])
    zoo = read_adapters(tmp_path)
    models = [
        make_architecture(name, device="cpu", random_state=0).set_params(model__max_epochs=1)
        for name in ("svd", "dense", "o-align", "gl-net")
    ]
    for model in models:
        model.fit(zoo, y[:20])

    def score(n_rounds):
        for done in range(n_rounds):
            one = read_adapters([str(tmp_path / f"{done % 20:02}")], layout=zoo.layout)
            models[done % len(models)].predict(one)
        gc.collect()

    tracemalloc.start()
    try:
        score(40)  # every file is read twice, and by each model in turn
        open_files, held = len(os.listdir("/proc/self/fd")), tracemalloc.get_traced_memory()[0]
        score(100)
        growth = tracemalloc.get_traced_memory()[0] - held
    finally:
        tracemalloc.stop()
    # One object of 1 KiB left by each round would be more.
    assert growth < 100 * 1024
    assert len(os.listdir("/proc/self/fd")) == open_files
