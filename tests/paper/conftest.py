"""The scripts of `examples/paper` as modules, and runs of them that are brief."""

import importlib
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest

from sklora.datasets import _code, _digits, _varied, load_digits_loras

PAPER = Path(__file__).parents[2] / "examples" / "paper"


@pytest.fixture(scope="module")
def paper():
    """Give the scripts as modules; each tiny zoo is trained once, and briefly."""
    names = sorted(path.stem for path in PAPER.glob("*.py"))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(PAPER)
        modules = {name: importlib.import_module(name) for name in names}
        patch.setattr(_digits, "N_BASE_STEPS", 50)
        patch.setattr(_code, "BASE_STEPS_PER_DIM", 4)
        patch.setitem(_digits.FIXED, "n_steps", 20)
        patch.setitem(_varied.VARIED, "n_steps", (10, 20))
        patch.setitem(_code.VARIED, "n_epochs", (1,))
        patch.setitem(_code.VARIED, "batch_size", (32,))
        patch.setattr(modules["protocol"], "N_BOOTSTRAP", 5)
        patch.setattr(modules["dravid"], "N_EDITED", 4)
        tiny = modules["protocol"].TINY
        patch.setattr(modules["protocol"], "TINY", {name: cache(tiny[name]) for name in tiny})
        yield SimpleNamespace(**modules)
        for name in modules:
            del sys.modules[name]


@pytest.fixture
def quick(paper):
    """Give a run in quick mode."""
    return paper.protocol.Run(paper.protocol.parser("test").parse_args(["--quick"]))


@pytest.fixture
def briefly(paper, monkeypatch):
    """Try one candidate of every architecture, from one seed."""
    monkeypatch.setitem(paper.protocol.QUICK, "seeds", (0,))
    for key, one in paper.protocol.ARCHITECTURES.items():
        few = one._replace(candidates=one.candidates[:1])
        monkeypatch.setitem(paper.protocol.ARCHITECTURES, key, few)


@pytest.fixture
def some_loras():
    """Give the first adapters of the bundled zoo, their classes and losses."""
    zoo = load_digits_loras()
    return lambda n: (zoo.data[:n], zoo.presence[:n], zoo.loss[:n])
