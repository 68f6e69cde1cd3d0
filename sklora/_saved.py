"""A fitted model in a file: skops, which runs no code of it, and a card that says what it is."""

from __future__ import annotations

import io
import json
import math
import os
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, BinaryIO

from numpy.lib import format as npy
from sklearn.pipeline import Pipeline

import sklora
from sklora._base import warn_of_version
from sklora._files import replacing
from sklora._modules import side_slices
from sklora._pipelines import TRUSTED_TYPES, fits, rebuilt
from sklora._schema import check_schema
from sklora._untrusted import Refusal, few, parse_json, shown
from sklora.architectures import ARCHITECTURES
from sklora.collection import LoRACollection, LoRALayout
from sklora.io._plan import ReadOptions
from sklora.io._read import read_options
from sklora.io.containers import MODEL as SCHEMA
from sklora.io.containers._zip import STORED, ZipArchive

CARD = "sklora.json"
_FORMAT = "sklora model"
_VERSION = 1
_MAX_CARD = 2**26
# NumPy reads no longer header of an array.
_MAX_HEADER = 2**15
_READ_HEADER = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
_FEW_ITEMS = 2**16
_NO_SKOPS = "models are stored with skops, which is missing: pip install 'sklora[secure]'."


@dataclass(frozen=True)
class ModelCard:
    """What a model in a file is, readable without loading it.

    Attributes
    ----------
    task : {"classification", "regression"}
    targets : tuple of str
        What is predicted; several for multilabel classification and multi-output regression.
    classes : tuple of str or int, or None
        Of single-label classification.
    architecture : str
        One of `ARCHITECTURES`.
    layout : LoRALayout
        What the model was fitted on.
    probabilities : bool
        Whether it gives that of every class, or label.
    optional : tuple of str
        Modules and side features that some of the training adapters lacked.
    reading : ReadOptions
        How adapters are to be read for it.
    n_adapters : int
        How many it was fitted on.
    scores : mapping or None
        Of cross-validation: "metric", "folds", "grouped", and for every architecture its "scores".
    sklora : str
        The version that wrote the file.
    """

    task: str
    targets: tuple[str, ...]
    classes: tuple[str | int, ...] | None
    architecture: str
    layout: LoRALayout
    probabilities: bool
    optional: tuple[str, ...]
    reading: ReadOptions
    n_adapters: int
    scores: Mapping[str, Any] | None = None
    sklora: str = field(default_factory=lambda: sklora.__version__)

    def to_json(self) -> bytes:
        """Write the card as the member `CARD` of a model file."""
        card = {
            "format": _FORMAT,
            "version": _VERSION,
            **{name: getattr(self, name) for name in _PLAIN},
            "layout": {
                "modules": self.layout.modules,
                "side": self.layout.side,
                "base_model": self.layout.base_model,
            },
            "reading": asdict(self.reading),
        }
        text = json.dumps(card, indent=1, allow_nan=False).encode()
        if len(text) > _MAX_CARD:
            raise ValueError(f"the model's card has {len(text)} bytes, more than {_MAX_CARD}.")
        return text

    @classmethod
    def from_json(cls, text: bytes | bytearray) -> ModelCard:
        """Read a card; nothing that it says is taken on trust.

        Raises
        ------
        ValueError
            When it is no card, or of another version of the format.
        """
        card = parse_json(bytes(text), CARD, _MAX_CARD)
        if not isinstance(card, dict) or card.get("format") != _FORMAT:
            raise Refusal(f"{CARD} is no card of a sklora model.")
        if card.get("version") != _VERSION:
            raise Refusal(
                f"it is of format version {shown(card.get('version'))}, and this sklora reads "
                f"version {_VERSION}; upgrade sklora, or fit again."
            )
        for name, is_right in _PLAIN.items():
            if name not in card or not is_right(card[name]):
                raise Refusal(f"{CARD} has {name} {shown(card.get(name))}.")
        layout, reading = card.get("layout"), card.get("reading")
        if not isinstance(layout, dict) or not isinstance(reading, dict):
            raise Refusal(f"{CARD} has no layout, or does not say how adapters are read.")
        plain = {name: _frozen(card[name]) for name in _PLAIN}
        try:
            columns_of(plain["targets"], plain["classes"], plain["probabilities"])
        except ValueError as error:
            raise Refusal(f"{CARD} has columns of one name: {shown(str(error), 200)}") from None
        return cls(**plain, layout=_layout(layout), reading=_reading(reading))


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(type(name) is str for name in value)


def _is_classes(value: Any) -> bool:
    kinds = {type(name) for name in value} if isinstance(value, list) else set()
    return value is None or kinds in ({str}, {int})


# The entries that are stored as they are, each with what it has to be.
_PLAIN: dict[str, Callable[[Any], bool]] = {
    "sklora": lambda value: type(value) is str,
    "task": lambda value: value in ("classification", "regression"),
    "targets": lambda value: _is_names(value) and len(value) > 0,
    "classes": _is_classes,
    "architecture": lambda value: value in ARCHITECTURES,
    "probabilities": lambda value: type(value) is bool,
    "optional": _is_names,
    "n_adapters": lambda value: type(value) is int and value > 0,
    "scores": lambda value: value is None or isinstance(value, dict),
}


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _layout(state: Mapping[str, Any]) -> LoRALayout:
    base_model = state.get("base_model")
    if base_model is not None and not isinstance(base_model, str):
        raise Refusal(f"{CARD} has the base model {shown(base_model)}.")
    try:
        return LoRALayout(state["modules"], side=state["side"], base_model=base_model)
    except (KeyError, TypeError, ValueError) as error:
        raise Refusal(f"{CARD} has no layout: {shown(str(error), 200)}") from None


def _reading(state: Mapping[str, Any]) -> ReadOptions:
    try:
        options = {**state, "keys": _frozen(state["keys"])}
        if type(options["allow_torch_zip"]) is not bool:
            raise TypeError("allow_torch_zip is neither true nor false.")
        return read_options(**options)
    except (KeyError, TypeError, ValueError) as error:
        raise Refusal(
            f"{CARD} does not say how adapters are read: {shown(str(error), 200)}"
        ) from None


def check_skops() -> None:
    """Check that models can be stored.

    Raises
    ------
    ModuleNotFoundError
        When skops is missing; the message says how to get it.
    """
    try:
        import skops.io  # noqa: F401
    except ModuleNotFoundError:
        raise ModuleNotFoundError(_NO_SKOPS) from None


def optional_parts(loras: LoRACollection) -> tuple[str, ...]:
    """Name the modules and side features that some of the adapters lack."""
    layout = loras.layout
    lacking = (loras.ranks == 0).any(axis=0)
    names = [name for name, lacks in zip(layout.names, lacking, strict=True) if lacks]
    sides = side_slices(layout.side, layout.side_slice.start)
    names += [name for name, place in sides.items() if not loras[:, place].any(axis=1).all()]
    return tuple(names)


def columns_of(
    targets: Sequence[str], classes: Sequence[str | int] | None, probabilities: bool
) -> list[str]:
    """Name the columns of the predictions of a model.

    Raises
    ------
    ValueError
        When two of them have one name.
    """
    shares = [f"{name}:probability" for name in classes or targets] if probabilities else []
    if classes is not None:
        inner = ["prediction", *shares]
    elif probabilities:
        inner = [column for pair in zip(targets, shares, strict=True) for column in pair]
    else:
        inner = [*targets]
    columns = ["path", *inner, "error"]
    twice = sorted(column for column, count in Counter(columns).items() if count > 1)
    if twice:
        raise ValueError(
            f"predict would write two columns {few(map(repr, twice))}; rename that target, or give "
            "it once."
        )
    return columns


def write_model(
    path: str | os.PathLike[str], model: Pipeline, card: ModelCard, *, check: bool = False
) -> None:
    """Write a fitted pipeline and its card.

    The file appears under its name when it is complete. It is a skops file with one more member,
    so ``skops.io.load(path, trusted=sklora.TRUSTED_TYPES)`` gives the pipeline. Whether it can be
    written is for `check_skops` and `check_place` to say, before the fit.

    Parameters
    ----------
    path : str or path-like
    model : Pipeline
        From `make_architecture`, fitted.
    card : ModelCard
    check : bool, default=False
        Whether to read the file before it gets its name: the model may be from elsewhere.

    Raises
    ------
    ValueError
        When the card is too large, or, a `Refusal`, when the file could not be read.
    OSError
        When the file cannot be written.
    """
    import skops.io

    text = card.to_json()
    buffer = io.BytesIO()
    skops.io.dump(model, buffer)
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.writestr(CARD, text)
    if check:
        if types := _untrusted_types(buffer):
            raise _foreign(types)
        _read_pipeline(buffer, _read_card(buffer))
    with replacing(os.path.realpath(path)) as file:
        file.write(buffer.getbuffer())


def read_model(path: str | os.PathLike[str]) -> tuple[Pipeline, ModelCard]:
    """Read a file of `write_model`, and its card; see `sklora.deployment.load_model`."""
    check_skops()
    with open(path, "rb") as file:
        try:
            card = _read_card(file)
            warn_of_version(os.fspath(path), card.sklora)
            return _read_pipeline(file, card), card
        except Refusal as error:
            raise ValueError(
                f"{os.fspath(path)} is damaged, or no model that sklora stored: {error}"
            ) from None


def _read_card(file: BinaryIO) -> ModelCard:
    if not file.seekable():
        raise Refusal("it is a pipe; name a file.")
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    if not file.read(4).startswith(b"PK"):
        raise Refusal("it is no zip file.")
    # Sizes are checked here, for what skops reads too.
    archive = ZipArchive(file, size)
    for name in (CARD, SCHEMA):
        if name not in archive.members:
            raise Refusal(f"it has no {name}.")
    for name, one in archive.members.items():
        if one.method != STORED:
            raise Refusal(f"{shown(name)} is compressed, as sklora stores nothing; unpack it.")
    schema, member = archive.members[SCHEMA], archive.members[CARD]
    check_schema(archive.unpack(schema, schema.size), schema.name)
    for name, one in archive.members.items():
        if name not in (CARD, SCHEMA):
            _check_array(name, archive.unpack(one, min(one.size, _MAX_HEADER)), one.size)
    if member.size > _MAX_CARD:
        raise Refusal(f"{CARD} has {member.size} bytes, more than {_MAX_CARD}.")
    return ModelCard.from_json(archive.unpack(member, member.size))


def _check_array(name: str, head: bytes | bytearray, size: int) -> None:
    """Check that an array has not many items without bytes: what is made of them may have some."""
    file = io.BytesIO(head)
    try:
        shape, _, _ = _READ_HEADER[npy.read_magic(file)](file)
        n_items = math.prod(length for length in shape if length)
    except Exception as error:  # of a forged one, NumPy may raise anything
        raise Refusal(f"{shown(name)} is no array ({shown(repr(error), 200)}).") from None
    if n_items > max(size, _FEW_ITEMS):
        raise Refusal(f"{shown(name)} of {size} bytes has the shape {shown(str(shape), 100)}.")


def _read_pipeline(file: BinaryIO, card: ModelCard) -> Pipeline:
    import skops.io
    from skops.io.exceptions import UntrustedTypesFoundException

    file.seek(0)
    try:
        model = skops.io.load(file, trusted=list(TRUSTED_TYPES))
    except UntrustedTypesFoundException:
        raise _foreign(_untrusted_types(file)) from None
    except Exception as error:  # the file may make skops and our own types raise anything
        reason = f"{type(error).__name__}: {shown(str(error), 200)}"
        raise Refusal(f"skops cannot load it ({reason}).") from None
    try:
        is_right = fits(model, card)
    except Exception:  # parts of a forged model may be of any type
        is_right = False
    if not is_right:
        raise Refusal(f"its pipeline is not what {CARD} says.")
    return rebuilt(model)


def _foreign(types: Sequence[str]) -> Refusal:
    return Refusal(f"it holds types that are not sklora's: {', '.join(map(shown, types))}.")


def _untrusted_types(file: BinaryIO) -> list[str]:
    import skops.io

    file.seek(0)
    types = skops.io.get_untrusted_types(data=file.read())
    return [name for name in types if name not in TRUSTED_TYPES]
