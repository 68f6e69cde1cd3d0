"""Every example runs as a script, without a display, and leaves nothing behind."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("plot_*.py"))
# Its chart is what it is for: `make demo` shows it.
ARGUMENTS = {"plot_compare_architectures.py": ["--output", os.devnull]}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_a_page_of_the_gallery(path):
    text = path.read_text(encoding="utf-8")
    title, underline, *_ = ast.get_docstring(ast.parse(text)).splitlines()
    assert underline == "=" * len(title)
    assert re.search(r"^# %%$", text, re.MULTILINE)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_says_that_it_needs_pandas(path):
    text = path.read_text(encoding="utf-8")
    says = "Needs pandas: ``pip install -c constraints.txt pandas``" in ast.get_docstring(
        ast.parse(text)
    )
    assert says == bool(re.search(r"^import pandas|transform=\"pandas\"", text, re.MULTILINE))


# `make docs` runs them all too.
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
