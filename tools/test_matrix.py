#!/usr/bin/env python
"""Run the tests with every Python and scikit-learn of a matrix that this machine can give.

    python tools/test_matrix.py
    python tools/test_matrix.py --python 3.13 --scikit-learn 1.9.1 --folder matrix -- tests/nets

Each pair gets a virtual environment with the versions of constraints.txt, but for scikit-learn and
what has to be of its time. The table at the end says what ran, and what was not to be had. The exit
status is 1 if a test failed or nothing ran. Arguments after ``--`` go to pytest.
"""
# ruff: noqa: T201  (a script prints)

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ["3.11", "3.12", "3.13"]
SCIKIT_LEARNS = ["1.6.1", "1.9.1"]
# What older releases need: array-api-compat, which later ones bring with them; polars whose
# interchange protocol warns of nothing; SciPy without a deprecation warning in logistic regression.
OF_ITS_TIME = {
    "1.6": ["array-api-compat", "polars<1.40", "scipy<1.16"],
    "1.7": ["polars<1.40"],
    "1.8": ["polars<1.40"],
}
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "SCIPY_ARRAY_API": "1"}


class Run(NamedTuple):
    """One line of the table."""

    python: str
    scikit_learn: str
    versions: str
    result: str
    passed: bool | None


def find_python(version: str) -> str | None:
    """Give a command that runs this version: one on the path, or one that pyenv keeps."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    kept = sorted(pyenv.glob(f"{version}.*/bin/python"), reverse=True)
    for candidate in (shutil.which(f"python{version}"), *map(str, kept)):
        # A command may be there and start nothing, as pyenv's do for versions not switched on.
        if candidate and output_of(candidate, "-c", "print(0)") == "0":
            return candidate
    return None


def output_of(*command: str | Path) -> str | None:
    """Give what a command prints, or None when it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def build(command: str, scikit_learn: str, folder: Path) -> Path | None:
    """Make an environment in a folder and give its Python; None when something is not to be had."""
    special = [f"scikit-learn=={scikit_learn}"]
    special += OF_ITS_TIME.get(scikit_learn.rpartition(".")[0], [])
    names = {re.split("[<=]", requirement)[0] for requirement in special}
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    constraints = folder.with_suffix(".txt")
    kept = [line for line in lines if line.partition("==")[0] not in names]
    constraints.write_text("\n".join(kept), encoding="utf-8")
    python = folder / "bin" / "python"
    install = [python, "-m", "pip", "install", "-c", constraints, *special, "-e", f"{ROOT}[test]"]
    with open(folder.with_suffix(".install.log"), "w", encoding="utf-8") as log:
        for step in ([command, "-m", "venv", folder], install):
            if subprocess.run(step, stdout=log, stderr=log, check=False).returncode:
                return None
    return python


def versions_of(python: Path) -> str:
    """Give the versions that decide most."""
    names = ["numpy", "scipy", "pandas", "polars", "torch"]
    script = "import sys, importlib.metadata as m; print(*map(m.version, sys.argv[1:]))"
    found = output_of(python, "-c", script, *names)
    return ", ".join(map(" ".join, zip(names, found.split(), strict=True))) if found else "?"


def run(version: str, scikit_learn: str, folder: Path, arguments: list[str]) -> Run:
    """Build one environment and run the tests in it."""
    command = find_python(version)
    if command is None:
        return Run(version, scikit_learn, "", "not available: no such Python", None)
    python = build(command, scikit_learn, folder)
    if python is None:
        log = folder.with_suffix(".install.log")
        return Run(version, scikit_learn, "", f"not available: see {log}", None)
    start = time.monotonic()
    done = subprocess.run(
        [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments],
        cwd=ROOT,
        env=os.environ | ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    folder.with_suffix(".tests.log").write_text(done.stdout, encoding="utf-8")
    ends = re.findall(r"^(?:=+ )?(\d+ (?:passed|failed|error).*?) in ", done.stdout, re.MULTILINE)
    if done.returncode:
        print(done.stdout[-10_000:], flush=True)
    result = f"{ends[-1] if ends else 'no tests'}, {time.monotonic() - start:.0f} s"
    return Run(version, scikit_learn, versions_of(python), result, done.returncode == 0)


def main() -> int:
    """Run the matrix and print its table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--python", nargs="+", default=PYTHONS, metavar="VERSION")
    parser.add_argument("--scikit-learn", nargs="+", default=SCIKIT_LEARNS, metavar="VERSION")
    parser.add_argument("--folder", type=Path, help="where to keep environments and logs")
    parser.add_argument("pytest", nargs="*", help="arguments of pytest, after --")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        runs = []
        for version in options.python:
            for scikit_learn in options.scikit_learn:
                name = f"python{version}-scikit-learn{scikit_learn}".replace(".", "_")
                runs.append(run(version, scikit_learn, folder / name, options.pytest))
                print(*runs[-1][:4], sep=" | ", flush=True)
    print("\n| Python | scikit-learn | with | result |\n|---|---|---|---|")
    for line in runs:
        print("|", " | ".join(line[:4]), "|")
    ran = [line.passed for line in runs if line.passed is not None]
    return 0 if ran and all(ran) else 1


if __name__ == "__main__":
    sys.exit(main())
