"""The address that the display of an estimator links to."""

from __future__ import annotations

import importlib.metadata
import inspect
import re
from email.message import Message
from pathlib import Path

import pytest
from sklearn.base import BaseEstimator
from sklearn.pipeline import make_pipeline

import sklora
from sklora import MLPNetClassifier, SVDSpectrum
from sklora._repr import documentation_address

REFERENCE = Path(__file__).parents[1] / "docs" / "api.md"
PUBLIC = [
    value
    for value in map(vars(sklora).get, sklora.__all__)
    if inspect.isclass(value) and issubclass(value, BaseEstimator)
]


@pytest.fixture
def declare(monkeypatch):
    """Declare addresses in the metadata of the package, or take its metadata away with None."""

    def metadata(urls, name):
        assert name == "sklora"
        if urls is None:
            raise importlib.metadata.PackageNotFoundError(name)
        message = Message()
        for url in urls:
            message["Project-URL"] = url
        return message

    def change(*urls):
        given = None if urls == (None,) else urls
        monkeypatch.setattr(importlib.metadata, "metadata", lambda name: metadata(given, name))
        documentation_address.cache_clear()

    documentation_address.cache_clear()
    yield change
    documentation_address.cache_clear()


@pytest.mark.parametrize(
    "url",
    [
        "Documentation, https://docs.example/sklora/",
        "documentation,https://docs.example/sklora",
    ],
)
@pytest.mark.parametrize("estimator", PUBLIC)
def test_links_lead_to_the_page_of_the_reference(estimator, url, declare):
    declare("Source, https://code.example/sklora", url)
    expected = f"https://docs.example/sklora/generated/sklora.{estimator.__name__}.html"
    assert estimator()._get_doc_link() == expected
    assert f'href="{expected}"' in estimator()._repr_html_()


@pytest.mark.parametrize("urls", [(), ("Source, https://code.example/sklora",), (None,)])
def test_no_link_without_an_address(urls, declare):
    declare(*urls)
    assert documentation_address() == ""
    assert SVDSpectrum()._get_doc_link() == ""
    assert "href=" not in re.sub(r"<style>.*?</style>", "", SVDSpectrum()._repr_html_(), flags=re.S)


def test_steps_of_a_pipeline_have_their_own_links(declare):
    declare("Documentation, https://docs.example")
    page = make_pipeline(SVDSpectrum(), MLPNetClassifier())._repr_html_()
    assert "https://docs.example/generated/sklora.SVDSpectrum.html" in page
    assert "https://docs.example/generated/sklora.MLPNetClassifier.html" in page
    assert "https://docs.example/generated/sklora.Pipeline.html" not in page


def test_estimators_of_others_that_inherit_have_no_link(declare):
    declare("Documentation, https://docs.example")

    class Own(SVDSpectrum):
        """Of another package, with no page in the reference."""

    assert Own()._get_doc_link() == ""


@pytest.mark.parametrize("estimator", PUBLIC)
def test_the_reference_has_such_a_page(estimator):
    # Sphinx's autosummary names a page by the module that stands above its list.
    module, pages = "", set()
    for line in REFERENCE.read_text(encoding="utf-8").splitlines():
        if line.startswith(".. currentmodule:: "):
            module = line.split()[-1]
        elif re.fullmatch(r"   [A-Za-z_]\w*", line):
            pages.add(f"{module}.{line.strip()}")
    assert f"sklora.{estimator.__name__}" in pages
