"""The recipes of `examples/zoos` as modules, and models from their configurations, tiny and random.

Nothing is imported from Hugging Face before a test runs: that takes seconds.
"""

import csv
import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

ZOOS = Path(__file__).parents[2] / "examples" / "zoos"


@pytest.fixture(scope="session")
def recipe() -> Iterator[Callable[[str], ModuleType]]:
    """Import a recipe by its name; nothing is fetched."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.syspath_prepend(ZOOS)
        for package in ("accelerate", "diffusers", "peft", "transformers"):
            pytest.importorskip(package)
        yield importlib.import_module


@pytest.fixture(scope="session")
def read_labels() -> Callable[[Path], dict[str, dict[str, str]]]:
    """Give the rows of a zoo's labels by their paths."""

    def read(zoo: Path) -> dict[str, dict[str, str]]:
        with open(zoo / "labels.csv", newline="", encoding="utf-8") as file:
            return {row["path"]: row for row in csv.DictReader(file)}

    return read
