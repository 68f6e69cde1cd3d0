"""Pages' code runs from top to bottom, links lead somewhere, every public object is documented."""

import ast
import importlib
import inspect
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
# Code that is not run, because it takes long or needs what is not there, stands in ```py blocks.
CODE = re.compile(r"^```python\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)


def public_modules():
    """Name the package and what is public right below it, the command line excepted."""
    files = [*ROOT.glob("sklora/*.py"), *ROOT.glob("sklora/*/__init__.py")]
    names = {
        ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for file in files
    }
    return sorted(name for name in names if "._" not in name and name != "sklora.cli")


def text_of(page):
    return page.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "page", [page for page in PAGES if CODE.search(text_of(page))], ids=lambda page: page.name
)
def test_code_of_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text, namespace = text_of(page), {"__name__": page.name}
    for block in CODE.finditer(text):
        # Empty lines in front, so that a traceback shows the line of the page.
        before = "\n" * text.count("\n", 0, block.start(1))
        exec(compile(before + block[1], str(page), "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_page_lead_somewhere(page):
    text = text_of(page)
    for link in re.findall(r"\]\(([^)]+)\)", text):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.is_file(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", text_of(target), re.MULTILINE)
            slugs = [
                re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings
            ]
            assert anchor in slugs, link


def public_objects():
    """Give every public object once, with all names under which it is public."""
    names = {}
    for module_name in public_modules():
        module = importlib.import_module(module_name)
        for name in module.__all__:
            found = getattr(module, name)
            names.setdefault(id(found), (found, []))[1].append(f"{module_name}.{name}")
    return list(names.values())


PUBLIC = public_objects()


def documented_names():
    """Read the names that the API page lists."""
    module, names = None, []
    for line in text_of(ROOT / "docs" / "api.md").splitlines():
        if directive := re.fullmatch(r"\.\. currentmodule:: (\S+)", line):
            module = directive[1]
        elif entry := re.fullmatch(r"   (\w+)", line):
            names.append(f"{module}.{entry[1]}")
    return names


DEFAULT = re.compile(r"^(\w+) : .*, default=(.+)$", flags=re.MULTILINE)


def has_example(found):
    doc = inspect.getdoc(found) or ""
    _, _, examples = doc.partition("Examples\n--------\n")
    return ">>> " in examples


def test_api_page_lists_every_public_object_once():
    documented = documented_names()
    expected = {names[0]: set(names) for _, names in PUBLIC}
    for first, names in expected.items():
        assert len(names.intersection(documented)) == 1, first
    assert len(documented) == len(set(documented)) == len(expected)


@pytest.mark.parametrize(("found", "names"), PUBLIC, ids=[names[0] for _, names in PUBLIC])
def test_public_object_has_an_example(found, names):
    if callable(found):
        assert has_example(found)
    else:  # A constant has no docstring of its own: its example is on the API page.
        name = names[0].rpartition(".")[2]
        assert any(name in block[1] for block in CODE.finditer(text_of(ROOT / "docs" / "api.md")))


@pytest.mark.parametrize(
    "found", [pytest.param(found, id=names[0]) for found, names in PUBLIC if callable(found)]
)
def test_defaults_are_those_that_the_docstring_says(found):
    for name, said in DEFAULT.findall(inspect.getdoc(found)):
        try:
            expected = ast.literal_eval(said)
        except ValueError:  # in words, such as "None and 0"
            continue
        assert inspect.signature(found).parameters[name].default == expected, name
