"""Progress bars and log messages: who sees them, and who does not."""

import functools
import io
import logging
import multiprocessing
import subprocess
import sys
from types import SimpleNamespace

import joblib
import numpy as np
import pytest
import sklearn
import tqdm as tqdm_module

from sklora import (
    DenseProduct,
    GLEquivariantProjection,
    GLNetClassifier,
    MLPNetRegressor,
    OAlign,
    SVDSpectrum,
    UpdateKernel,
    make_architecture,
)
from sklora.__main__ import main
from sklora._progress import progress, track, write
from sklora.datasets import make_digits_loras
from sklora.io import SkippedAdapterWarning, read_adapters, scan_adapters, write_adapter


class Stream(io.StringIO):
    def __init__(self, is_terminal):
        super().__init__()
        self.is_terminal = is_terminal

    def isatty(self):
        return self.is_terminal


def replace_stderr(monkeypatch, stream):
    # Not in `sys` itself, where pytest puts its own back before the test.
    monkeypatch.setattr("sklora._progress.sys", SimpleNamespace(stderr=stream))
    return stream


@pytest.fixture
def terminal(monkeypatch):
    """A terminal in place of standard error, and bars that are drawn at every step."""
    every_step = functools.partialmethod(tqdm_module.tqdm.__init__, mininterval=0, miniters=1)
    monkeypatch.setattr(tqdm_module.tqdm, "__init__", every_step)
    return replace_stderr(monkeypatch, Stream(is_terminal=True))


@pytest.fixture
def X(random_loras, rng):
    return random_loras(rng, n_adapters=12)


@pytest.fixture
def folder(X, tmp_path):
    for row in range(3):
        write_adapter(tmp_path / f"a{row}", X[row])
    return tmp_path


@pytest.fixture(autouse=True)
def _brief_base_training(monkeypatch):
    monkeypatch.setattr("sklora.datasets._digits.N_BASE_STEPS", 20)


y = np.arange(12) % 2

# What takes long, by the name before its bar and the count at its end.
WORK = {
    "read": ("headers", "3/3", lambda X, folder, v: read_adapters(folder, verbose=v)),
    "scan": ("headers", "3/3", lambda X, folder, v: scan_adapters(folder, verbose=v)),
    **{
        type(featurizer).__name__ + getattr(featurizer, "method", ""): (
            what or type(featurizer).__name__,
            count,
            lambda X, folder, v, featurizer=featurizer: featurizer.set_params(
                verbose=v
            ).fit_transform(X),
        )
        for featurizer, what, count in (
            (SVDSpectrum(), None, "12/12"),
            (OAlign(), None, "12/12"),
            (DenseProduct(), None, "12/12"),
            (DenseProduct("sketch", 2), None, "12/12"),
            (DenseProduct("gram"), "inner products", "12/12"),
            (UpdateKernel(), "inner products", "12/12"),
            (GLEquivariantProjection(3), None, "12/12"),
            (GLEquivariantProjection(3, "hosvd"), "higher-order SVD", "1/1"),
        )
    },
    "classifier": (
        "training",
        "2/2",
        lambda X, folder, v: GLNetClassifier(max_epochs=2, verbose=v).fit(X, y),
    ),
    "regressor": (
        "training",
        "2/2",
        lambda X, folder, v: MLPNetRegressor(max_epochs=2, verbose=v).fit(X, y),
    ),
    "zoo": (
        "adapters",
        "3/3",
        lambda X, folder, v: make_digits_loras(
            3, rank=2, dim=8, depth=1, random_state=0, verbose=v
        ),
    ),
}
all_work = pytest.mark.parametrize("work", WORK)


class TestBars:
    @all_work
    def test_a_terminal_shows_them(self, work, X, folder, terminal):
        what, count, run = WORK[work]
        run(X, folder, 1)
        last_drawn = [text for text in terminal.getvalue().split("\r") if f"{what}:" in text][-1]
        assert count in last_drawn

    @all_work
    def test_at_zero_a_terminal_shows_nothing(self, work, X, folder, terminal, capfd):
        WORK[work][2](X, folder, 0)
        assert terminal.getvalue() == ""
        assert capfd.readouterr() == ("", "")

    @all_work
    def test_what_is_no_terminal_shows_nothing(self, work, X, folder, monkeypatch, capfd):
        stream = replace_stderr(monkeypatch, Stream(is_terminal=False))
        WORK[work][2](X, folder, 1)
        assert stream.getvalue() == ""
        assert capfd.readouterr() == ("", "")

    def test_count_and_numbers(self, terminal):
        with progress(5, "work", "unit") as advance:
            advance(2)
            advance(3, loss=0.25)
        drawn = terminal.getvalue()
        assert "work:  40%" in drawn
        assert "5/5" in drawn
        assert "loss=0.25" in drawn
        assert drawn.split("\r")[-2].strip() == ""  # it is wiped

    def test_inspect_shows_them(self, folder, terminal):
        assert main(["inspect", str(folder)]) == 0
        assert "headers:" in terminal.getvalue()

    def test_losses_are_shown(self, X, terminal):
        MLPNetRegressor(max_epochs=1, verbose=1).fit(X, y)
        assert "train_loss=" in terminal.getvalue()

    def test_items_pass_through(self, terminal):
        items = track("abc", "letters", "letter")
        assert next(items) == "a"
        assert "1/3" not in terminal.getvalue()  # which is being worked on
        assert list(items) == ["b", "c"]
        assert "3/3" in terminal.getvalue()

    def test_an_error_wipes_it(self, terminal):
        with pytest.raises(ValueError, match="bad"), progress(5, "work", "unit"):
            raise ValueError("bad")
        assert terminal.getvalue().split("\r")[-2].strip() == ""

    def test_at_zero_there_is_no_tqdm(self, terminal, monkeypatch):
        monkeypatch.setattr(tqdm_module, "tqdm", None)
        assert list(track("abc", "letters", "letter", 0)) == ["a", "b", "c"]
        with pytest.raises(TypeError):
            list(track("abc", "letters", "letter", 1))

    @pytest.mark.parametrize("kind", ["none", "closed", "write alone"])
    def test_no_standard_error_to_speak_of(self, kind, monkeypatch):
        closed = io.StringIO()
        closed.close()
        streams = {"none": None, "closed": closed, "write alone": SimpleNamespace(write=print)}
        replace_stderr(monkeypatch, streams[kind])
        assert list(track("abc", "letters", "letter")) == ["a", "b", "c"]

    def test_workers_leave_them_to_their_parent(self, terminal, monkeypatch):
        monkeypatch.setattr(multiprocessing, "parent_process", multiprocessing.current_process)
        assert list(track("abc", "letters", "letter")) == ["a", "b", "c"]
        assert terminal.getvalue() == ""

    @pytest.mark.parametrize("backend", ["loky", "threading", "sequential"])
    def test_they_move_as_blocks_come_back(self, backend, X, terminal):
        featurizer = SVDSpectrum(device="cpu", verbose=1)
        with joblib.parallel_config(backend, n_jobs=2), sklearn.config_context(working_memory=1e-6):
            featurizer.fit_transform(X)
        for done in range(13):
            assert f" {done}/12 " in terminal.getvalue()

    def test_lines_are_written_past_them(self, terminal, capsys):
        with progress(1, "work", "unit"):
            write("a line")
        assert capsys.readouterr().out == "a line\n"


def test_make_architecture_passes_verbose_to_both_steps():
    steps = make_architecture("svd", verbose=2).named_steps
    assert (steps["features"].verbose, steps["model"].verbose) == (2, 2)


@pytest.mark.parametrize("featurizer", [SVDSpectrum(verbose=-1), UpdateKernel(verbose="much")])
def test_verbose_is_checked(featurizer, X):
    with pytest.raises(ValueError, match="'verbose' parameter"):
        featurizer.fit(X)


WEIGHTS = "adapter_model.safetensors"


def damage(path):
    path.write_bytes(path.read_bytes()[:-8])


class TestLogging:
    def test_files_that_are_left_out(self, folder, caplog):
        damage(folder / "a1" / WEIGHTS)
        with (
            caplog.at_level(logging.DEBUG, "sklora.io"),
            pytest.warns(SkippedAdapterWarning),
        ):
            read_adapters(folder, on_error="skip")
        left_out, summary = caplog.records
        assert (left_out.name, left_out.levelname) == ("sklora.io", "WARNING")
        assert "a1/adapter_model.safetensors" in left_out.getMessage()
        assert summary.getMessage() == "read the headers of 2 files, 1 left out"

    def test_a_name_cannot_forge_a_line(self, folder, caplog):
        (folder / "a1").rename(folder / "a1\nroot logged in")
        damage(folder / "a1\nroot logged in" / WEIGHTS)
        with caplog.at_level(logging.WARNING, "sklora.io"), pytest.warns(SkippedAdapterWarning):
            read_adapters(folder, on_error="skip")
        [record] = caplog.records
        assert "\n" not in record.getMessage()

    def test_blocks_and_device(self, X, caplog):
        with caplog.at_level(logging.DEBUG, "sklora.transform"):
            SVDSpectrum(device="cpu", n_jobs=3).fit_transform(X)
        assert [record.getMessage() for record in caplog.records] == [
            "SVDSpectrum: 12 adapters in 3 blocks on cpu"
        ]

    def test_training(self, random_loras, rng, caplog):
        X = random_loras(rng, n_adapters=60)
        settings = {"early_stopping": True, "patience": 1, "lr": 0.1, "max_epochs": 50}
        model = MLPNetRegressor(**settings, device="cpu", random_state=0)
        with caplog.at_level(logging.INFO, "sklora.estimators"):
            model.fit(X, rng.normal(size=60))
        stopped, trained = (record.getMessage() for record in caplog.records)
        best = np.argmin([epoch["valid_loss"] for epoch in model.history_]) + 1
        assert model.n_iter_ < 50
        assert stopped == f"stopped early after epoch {model.n_iter_}, best epoch {best}"
        assert trained == f"trained {model.n_iter_} epochs on cpu, 50 adapters"

    def test_nobody_who_did_not_ask_sees_them(self, folder):
        damage(folder / "a1" / WEIGHTS)
        script = (
            "from sklora.io import read_adapters\n"
            f"print(len(read_adapters({str(folder)!r}, on_error='skip', verbose=1)))"
        )
        command = [sys.executable, "-W", "ignore", "-c", script]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert (done.stdout, done.stderr) == ("2\n", "")
