"""``sklora predict``: what a stored model says of adapters."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import sklearn
from sklearn.pipeline import Pipeline

from sklora._pipelines import NETS
from sklora._progress import track
from sklora._saved import ModelCard, read_model
from sklora.architectures import set_all
from sklora.cli._output import FAILED, OK, CommandError, say, with_options
from sklora.cli._predictions import Prediction, csv_writer, end_json, json_writer
from sklora.cli._reading import OneByOne, check_device, reading_options
from sklora.collection import LoRACollection, LoRALayout
from sklora.io import AdapterError
from sklora.io._find import Found, find_each

_MOST_PER_BLOCK = 256
# What predicting for some adapters may raise. Where memory runs out, torch has but the last.
_CANNOT = (ValueError, MemoryError, RuntimeError)


def run(args: argparse.Namespace) -> int:
    """Run the command; 1 if there is no prediction for any file."""
    check_device(args.device)
    model, card = _load(args.model, args.device)
    reader = OneByOne(
        card.layout,
        card.optional,
        reading_options(args, card.reading),
        any_modules=args.allow_other_modules,
        any_base_model=args.allow_other_base_model,
    )
    findings = list(find_each(args.paths))
    write = json_writer(card) if args.json else csv_writer(card)
    code = OK
    for block in _predictions(model, reader, track(findings, "predictions", "file")):
        for one in block:
            if one.error is not None:
                say(f"{one.path}: {one.error}")
                code = FAILED
        write(block)
    if args.json:
        end_json()
    return code


def _load(path: str, device: str) -> tuple[Pipeline, ModelCard]:
    try:
        model, card = read_model(path)
    except OSError as error:
        raise CommandError(f"{path}: {error.strerror}.") from None
    except (ValueError, ModuleNotFoundError) as error:
        raise CommandError(str(error)) from None
    set_all(model, device=device)
    return model, card


def _predictions(
    model: Pipeline, reader: OneByOne, findings: Iterable[Found | AdapterError]
) -> Iterator[list[Prediction]]:
    """Predict in blocks that are bounded in memory, in order."""
    block = _Block()
    for finding in findings:
        try:
            if isinstance(finding, AdapterError):
                raise finding
            adapter = reader.read(finding)
        except (AdapterError, MemoryError) as error:
            block.add_error(finding.path, error)
            continue
        if not block.has_room_for(adapter):
            yield block.predictions(model)
            block = _Block()
        block.add(adapter)
    yield block.predictions(model)


class _Block:
    """Adapters that are predicted together, and errors among them."""

    def __init__(self) -> None:
        self._adapters: list[LoRACollection] = []
        self._layout: LoRALayout | None = None
        # In order: the error of a file, or None for the next adapter.
        self._order: list[Prediction | None] = []

    def add_error(self, path: str, error: Exception) -> None:
        """Add a file that cannot be read."""
        self._order.append(_failed(path, error))

    def add(self, adapter: LoRACollection) -> None:
        """Add an adapter."""
        self._layout = self._widened(adapter)
        self._adapters.append(adapter)
        self._order.append(None)

    def has_room_for(self, adapter: LoRACollection) -> bool:
        """Tell whether an adapter can come along."""
        if not self._adapters:
            return True
        n_adapters = len(self._adapters) + 1
        if n_adapters > _MOST_PER_BLOCK or adapter.dtype != self._adapters[0].dtype:
            return False
        needed = n_adapters * self._widened(adapter).width * adapter.dtype.itemsize
        # The rows of single adapters, those of the block, and what predicting makes of them.
        return bool(4 * needed <= sklearn.get_config()["working_memory"] * 2**20)

    def predictions(self, model: Pipeline) -> list[Prediction]:
        """Predict for all adapters, and give them in order with the errors."""
        predicted = iter(self._predicted(model))
        return [next(predicted) if one is None else one for one in self._order]

    def _predicted(self, model: Pipeline) -> list[Prediction]:
        if not self._adapters or self._layout is None:
            return []
        layout = self._layout
        try:
            together = LoRACollection.from_array(
                np.concatenate(
                    [one.with_layout(layout).read(copy=False) for one in self._adapters]
                ),
                layout,
                ranks=np.concatenate([one.ranks for one in self._adapters]),
                ids=np.concatenate([one.ids for one in self._adapters]),
            )
            return predict(model, together)
        except _CANNOT:
            # Some adapter is one that this architecture cannot take.
            return [_predict_one(model, one) for one in self._adapters]

    def _widened(self, adapter: LoRACollection) -> LoRALayout:
        if self._layout is None or self._layout == adapter.layout:
            return adapter.layout
        ranks = zip(self._layout.ranks, adapter.layout.ranks, strict=True)
        return self._layout.with_ranks(map(max, ranks))


def _predict_one(model: Pipeline, adapter: LoRACollection) -> Prediction:
    try:
        [prediction] = predict(model, adapter)
    except _CANNOT as error:
        return _failed(str(adapter.ids[0]), error)
    return prediction


def _failed(path: str, error: Exception) -> Prediction:
    # Below its first line, scikit-learn advises those who write the code.
    reason = error.reason if isinstance(error, AdapterError) else str(error).partition("\n")[0]
    return Prediction(path, with_options(reason or type(error).__name__))


def predict(model: Pipeline, loras: LoRACollection) -> list[Prediction]:
    """Predict for adapters.

    Raises
    ------
    ValueError
        When the model does not take one of them.
    """
    features = model[:-1].transform(loras)
    estimator: Any = model[-1]
    probabilities: Sequence[Sequence[float]] = [[]] * len(loras)
    if isinstance(estimator, NETS):
        # Once through the network for both, which is most of the work.
        outputs = estimator._outputs(features)
        values = estimator._predictions(outputs)
        if hasattr(estimator, "predict_proba"):
            probabilities = estimator._probabilities(outputs).tolist()
    else:
        values = estimator.predict(features)
    rows = values.reshape(len(loras), -1).tolist()
    return [
        Prediction(str(path), None, tuple(row), tuple(shares))
        for path, row, shares in zip(loras.ids.tolist(), rows, probabilities, strict=True)
    ]
