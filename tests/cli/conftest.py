"""A zoo of PEFT adapters on disk, models fitted on it, and commands that run in this process."""

import csv
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from sklora import make_architecture
from sklora.__main__ import main
from sklora.cli import _scoring
from sklora.io import write_adapter

N_ADAPTERS = 40
SHAPES = {"layers.0.q_proj": (6, 4), "layers.0.v_proj": (5, 4)}


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Outcome]


def random_factors(rng, size=1.0, shapes=SHAPES, rank=2):
    return {
        name: (size * rng.normal(size=(n, rank)), rng.normal(size=(m, rank)))
        for name, (n, m) in shapes.items()
    }


def save_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
    return str(path)


def make_zoo(folder: Path, n_adapters: int = N_ADAPTERS) -> Path:
    """Adapters a00, a01, ..., whose size is their label, in all the forms that labels have."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(n_adapters):
        kind = number % 2
        write_adapter(
            folder / f"a{number:02}", random_factors(rng, 0.2 + 3 * kind), base_model="tiny/llama"
        )
        size = f"{0.2 + 3 * kind + rng.normal(scale=0.01):.3f}"
        rows.append((f"a{number:02}", ("small", "large")[kind], kind, 1 - kind, size, number // 4))
    save_csv(folder / "labels.csv", ("path", "style", "big", "tiny", "loss", "run"), rows)
    return folder


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be written to."""
    return make_zoo(tmp_path_factory.mktemp("zoo"))


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory, zoo: Path) -> Mapping[str, str]:
    """A model for every kind of target: style, labels, loss."""
    folder = tmp_path_factory.mktemp("models")
    targets = {"style": ["style"], "labels": ["big", "tiny"], "loss": ["loss"]}
    for name, columns in targets.items():
        options = [option for column in columns for option in ("--target", column)]
        command = ["fit", zoo, "--labels", zoo / "labels.csv", *options, "--folds", "0"]
        command += ["--architecture", "svd", "-o", folder / f"{name}.skops"]
        assert main(list(map(str, command))) == 0
    return {name: str(folder / f"{name}.skops") for name in targets}


@pytest.fixture
def few_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Train for so short a time that nothing is learnt."""

    def make(*arguments, **options):
        return make_architecture(*arguments, **options).set_params(model__max_epochs=2)

    monkeypatch.setattr(_scoring, "make_architecture", make)


@pytest.fixture
def factors(rng: np.random.Generator) -> Callable[..., dict[str, tuple[np.ndarray, np.ndarray]]]:
    """Draw one adapter: a function of the size, shapes and rank."""
    return functools.partial(random_factors, rng)


@pytest.fixture
def write_csv() -> Callable[..., str]:
    """Write a labels file: a function of path, header and rows."""
    return save_csv


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command in this process."""

    def run(*arguments: object) -> Outcome:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return Outcome(code, out, err)

    return run
