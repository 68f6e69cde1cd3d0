"""How adapters are read, without a command around it."""

import argparse
from dataclasses import asdict, replace

import numpy as np
import pytest

from sklora.cli._output import FAILED, CommandError
from sklora.cli._reading import OneByOne, read_together, reading_options
from sklora.collection import LoRALayout
from sklora.io import AdapterError, read_adapters, write_adapter
from sklora.io._find import find_files
from sklora.io._plan import ReadOptions

Q, V, K = {"layers.0.q": (6, 4)}, {"layers.0.v": (5, 4)}, {"layers.0.k": (3, 4)}


@pytest.fixture
def write(tmp_path, factors):
    """Write an adapter of such shapes, and give the file."""

    def write(name, shapes=Q | V, rank=2, **options):
        write_adapter(tmp_path / name, factors(shapes=shapes, rank=rank), **options)
        [found] = find_files(tmp_path / name)
        return found

    return write


@pytest.fixture
def read(write):
    """Read an adapter for models of adapters of q and v, of base model "tiny"."""

    def read(found, *, optional=(), names="canonical", any_modules=False, any_base_model=False):
        like = read_adapters(write("like", base_model="tiny").path, names=names)
        reader = OneByOne(
            *(like.layout, optional, ReadOptions(names)),
            any_modules=any_modules,
            any_base_model=any_base_model,
        )
        return reader.read(found)

    return read


def test_options_that_are_left_out_are_those_of_the_model():
    def given(**options):
        return argparse.Namespace(**{**dict.fromkeys(asdict(ReadOptions())), **options})

    kept = ReadOptions("raw", ("{module}.a", "{module}.b"), 2.0, "kronecker", True)
    assert reading_options(given()) == ReadOptions()
    assert reading_options(given(), kept) == kept
    new = {"names": "canonical", "scale": 0.0}
    found = reading_options(given(**new, keys=["{module}.x", "{module}.y"]), kept)
    assert found == replace(kept, **new, keys=("{module}.x", "{module}.y"))


def test_adapter_is_as_it_is_in_its_file(read, write):
    found = write("a", rank=1)
    X = read(found)
    [adapter] = read_adapters(found.path)
    assert (X.ids.tolist(), X.ranks.tolist()) == ([found.path], [[1, 1]])
    for name, factors in adapter.items():
        for numbers, expected in zip(X[0][name], factors, strict=True):
            np.testing.assert_array_equal(numbers, expected)


@pytest.mark.parametrize(("names", "prefix"), [("canonical", ""), ("raw", "base_model.model.")])
def test_what_an_adapter_may_lack_is_no_more_than_that(read, write, names, prefix):
    options = {"names": names, "optional": [f"{prefix}layers.0.v"]}
    for shapes, rank in ((Q, 0), (Q | V, 2)):
        assert read(write("a", shapes), **options).ranks.tolist() == [[2, rank]]
    for shapes, name in ((V, "q"), (Q | V | K, "k")):
        with pytest.raises(AdapterError, match=f"it (lacks|has) '{prefix}layers.0.{name}'"):
            read(write("a", shapes), **options)
        assert read(write("a", shapes), **options, any_modules=True).ranks[0, 1] == 2
    other = write("a", Q, base_model="huge")
    with pytest.raises(AdapterError, match="its base model is 'huge'"):
        read(other, **options)
    assert len(read(other, **options, any_base_model=True)) == 1


def test_side_features_may_be_lacking_too(write):
    found, options = write("a"), {"any_modules": False, "any_base_model": False}
    side = {"layers.0.q:magnitude_out": 6}
    layout = LoRALayout(read_adapters(found.path).layout.modules, side=side.items())
    assert OneByOne(layout, side, ReadOptions(), **options).read(found).layout == layout
    with pytest.raises(AdapterError, match=r"it lacks .*q:magnitude_out"):
        OneByOne(layout, (), ReadOptions(), **options).read(found)


def test_adapters_of_other_modules_are_read_together(write):
    found = [write("a", Q), write("b", V)]
    X = read_together(found, ReadOptions("raw"), any_base_model=False)
    assert X.layout.names == ("base_model.model.layers.0.q", "base_model.model.layers.0.v")
    assert X.ranks.tolist() == [[2, 0], [0, 2]]


def test_adapters_of_other_base_models_are_not_unless_told_so(write):
    found = [write("a", base_model="tiny"), write("b", base_model="huge")]
    assert len(read_together(found, ReadOptions(), any_base_model=True)) == 2
    with pytest.raises(CommandError, match="--allow-other-base-model") as error:
        read_together(found, ReadOptions(), any_base_model=False)
    assert error.value.code == FAILED


def test_all_that_cannot_be_read_are_named(write, capsys):
    found = [write("a"), write("b", {"layers.0.q": (7, 4)}), write("c", {"layers.0.v": (7, 4)})]
    with pytest.raises(CommandError, match="2 adapters cannot be read; mend") as error:
        read_together(found, ReadOptions(), any_base_model=False)
    assert error.value.code == FAILED
    said = capsys.readouterr().err.splitlines()
    for line, adapter in zip(said, found[1:], strict=True):
        assert line.startswith(f"sklora: {adapter.path}: ")
