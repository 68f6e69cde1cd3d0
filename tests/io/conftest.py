"""Adapters from the wild, which are not part of the repository."""

from pathlib import Path

import pytest

# Needs atheris, and is run by hand.
collect_ignore = ["fuzz_atheris.py"]
SHARED_ADAPTERS = Path(__file__).parents[3] / "shared" / "adapters"


def pytest_collection_modifyitems(config, items):
    """Leave out the tests that need the adapters where there are none."""
    if SHARED_ADAPTERS.is_dir():
        return
    needing = [item for item in items if "shared_adapters" in getattr(item, "fixturenames", ())]
    items[:] = [item for item in items if item not in needing]
    config.hook.pytest_deselected(items=needing)


@pytest.fixture(scope="session")
def shared_adapters() -> Path:
    """The folder of adapters next to the repository; tests that use it are left out without it."""
    return SHARED_ADAPTERS
