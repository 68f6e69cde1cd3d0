import pkgutil
from importlib import import_module

import pytest

import sklora


def test_submodules_are_imported_when_they_are_named(monkeypatch):
    for name in sklora._SUBMODULES:
        module = import_module(f"sklora.{name}")
        monkeypatch.delattr(sklora, name)
        assert name in dir(sklora)
        assert getattr(sklora, name) is module


def test_they_are_all_public_ones():
    names = {one.name for one in pkgutil.iter_modules(sklora.__path__)}
    names = {name for name in names if not name.startswith("_")}
    # Their names are in the package itself, or are those of commands.
    assert names - {"architectures", "cli", "collection"} == set(sklora._SUBMODULES)


def test_other_names():
    with pytest.raises(AttributeError, match="module 'sklora' has no attribute 'SVD'"):
        sklora.SVD  # noqa: B018
