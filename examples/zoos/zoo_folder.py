"""A folder of adapters that is filled one by one: what the recipes beside this file share.

::

    zoo.json            the settings, so that a zoo is not continued with others
    labels.csv          a row for each adapter
    adapter-0000/       adapter_config.json, adapter_model.safetensors, labels.json
    adapter-0001/
"""

import argparse
import csv
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from tqdm import tqdm

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# What may differ when a zoo is continued.
FREE = ("output", "adapters", "device")


class LogUniform(argparse.Action):
    """Take LOW and HIGH of what is drawn log-uniformly; equal ones, which may be 0, fix it."""

    def __call__(self, parser, namespace, values, option_string=None):
        low, high = values
        if not (0 < low <= high or low == high == 0):
            parser.error(
                f"argument {option_string}: LOW and HIGH are {low:g} and {high:g}; what is drawn "
                "log-uniformly needs 0 < LOW <= HIGH, or both 0"
            )
        setattr(namespace, self.dest, values)


def log_uniform(rng, low: float, high: float) -> float:
    """Draw a number whose logarithm is uniform."""
    return low if low == high else float(np.exp(rng.uniform(*np.log([low, high]))))


def add_arguments(parser):
    """Add the arguments that all recipes have."""
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="the zoo")
    parser.add_argument("--rank", type=int, default=4, help="default: 4")
    parser.add_argument("--alpha", type=float, help="the update is B A alpha / rank; default: rank")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the base model")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def fill(folder: Path, settings: Mapping, n_adapters: int, make: Callable) -> None:
    """Train the adapters that are not there yet, and write the labels of all that are.

    `make(index)` gives a trained PEFT model and its labels. A folder gets its name when it is
    complete, so one that has it is never trained again.
    """
    _check_settings(folder, {k: v for k, v in settings.items() if k not in FREE})
    try:
        for index in tqdm(range(n_adapters), unit="adapter", desc=folder.name):
            path = folder / f"adapter-{index:04}"
            if path.exists():
                continue
            # Hidden, so that what an interrupted run leaves behind is not read as an adapter.
            partial = folder / f".{path.name}"
            shutil.rmtree(partial, ignore_errors=True)
            model, labels = make(index)
            _save(model, partial, labels)
            partial.rename(path)
            model.unload()
    finally:
        _write_labels(folder)


def _check_settings(folder: Path, settings: Mapping) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    path, text = folder / "zoo.json", json.dumps(settings, indent=2, default=str)
    # Before the first adapter is there, a mistake in the settings can be mended.
    if not (path.exists() and any(folder.glob("adapter-*"))):
        path.write_text(text)
    then, now = json.loads(path.read_text()), json.loads(text)
    changed = [name for name in {**then, **now} if then.get(name) != now.get(name)]
    if changed:
        raise SystemExit(f"{folder} was begun with another {', '.join(changed)}: see {path}.")


def _save(model: PeftModel, folder: Path, labels: Mapping) -> None:
    model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "labels.json").write_text(json.dumps(labels))


def _write_labels(folder: Path) -> None:
    records = sorted(folder.glob("adapter-*/labels.json"))
    rows = [{"path": r.parent.name, **json.loads(r.read_text())} for r in records]
    if not rows:
        return
    partial = folder / ".labels.csv"
    with open(partial, "w", newline="", encoding="utf-8") as file:
        # Another version of the recipe may have begun the zoo.
        writer = csv.DictWriter(file, dict.fromkeys(name for row in rows for name in row))
        writer.writeheader()
        writer.writerows(rows)
    partial.replace(folder / "labels.csv")
