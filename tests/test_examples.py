"""Every example runs as a script, without a display, and leaves nothing behind."""

import ast
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from sklearn.utils import Bunch

from sklora import datasets
from sklora.datasets import load_digits_loras

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("plot_*.py"))
# Its chart is what it is for: `make demo` shows it.
ARGUMENTS = {"plot_compare_architectures.py": ["--output", os.devnull]}
# Those that do with few adapters, in one process, within seconds.
QUICK = (
    "plot_custom_estimator",
    "plot_dataset_size",
    "plot_training_data_attributes",
    "plot_triage_folder",
    "plot_unseen_ranks",
)


def some_loras(*, return_X_y=False):
    """Give every eighth adapter of the bundled zoo."""
    zoo = load_digits_loras()
    rows = slice(None, None, 8)
    some = {name: value if name == "target_names" else value[rows] for name, value in zoo.items()}
    return (some["data"], some["target"]) if return_X_y else Bunch(**some)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_a_page_of_the_gallery(path):
    text = path.read_text(encoding="utf-8")
    title, underline, *_ = ast.get_docstring(ast.parse(text)).splitlines()
    assert underline == "=" * len(title)
    assert re.search(r"^# %%$", text, re.MULTILINE)


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs_and_leaves_nothing_behind(path, tmp_path):
    if "distributed" in path.stem:
        pytest.importorskip("distributed")
    folders = {name: tmp_path / name for name in ("here", "temporary")}
    for folder in folders.values():
        folder.mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "DISPLAY"}
    environment |= {"TMPDIR": str(folders["temporary"]), "PYTHONWARNINGS": "error"}
    # Folders that torch and dask make for themselves, once for all programs, empty as they may be.
    environment["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path / "torch")
    environment["DASK_TEMPORARY_DIRECTORY"] = str(tmp_path / "dask")
    subprocess.run(
        [sys.executable, path, *ARGUMENTS.get(path.name, [])],
        cwd=folders["here"],
        env=environment,
        check=True,
        timeout=300,
    )
    assert [child for folder in folders.values() for child in folder.iterdir()] == []


@pytest.mark.parametrize("name", QUICK)
def test_an_example_runs_on_some_of_the_adapters(name, tmp_path, monkeypatch):
    """All but the numbers: an example that no longer fits the API fails here, in seconds."""
    plt = pytest.importorskip("matplotlib.pyplot")
    monkeypatch.setattr(datasets, "load_digits_loras", some_loras)
    monkeypatch.setattr(sys, "argv", [name])
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
    assert plt.get_fignums()
    plt.close("all")
