"""What skops is to build: each object and each array once. Whole files are in test_saved.py."""

import json

import pytest

from sklora._schema import check_schema
from sklora._untrusted import Refusal


def node(loader="ListNode", **state):
    return {"__class__": "list", "__module__": "builtins", "__loader__": loader, **state}


def check(schema):
    check_schema(json.dumps(schema).encode(), "schema.json")


def array(id):
    return node("NdArrayNode", type="numpy", file="a.npy", __id__=id)


@pytest.mark.parametrize(
    "parts",
    [
        [],
        [node(content=[1], __id__=1), node(content=[1], __id__=1)],
        [node(content=[1], __id__=1), node(content=[2], __id__=2)],
        [node(content=[1]), node(content=[1])],
        [node(content=[node(__id__=2)], __id__=1), node(content=[node(__id__=3)], __id__=1)],
        [array(1), array(1)],
    ],
)
def test_objects_that_are_what_their_ids_say(parts):
    check(node(content=parts))


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ([node(content=[1], __id__=1), node(content=[2], __id__=1)], "two objects of the id 1"),
        ([node(content=[1], __id__=1), node(content=[True], __id__=1)], "two objects of the id 1"),
        ([node(content=[], __id__=1), {"__id__": 1}], "two objects of the id 1"),
        (
            [node(content=[node(content=[n])], __id__=1) for n in (1, 2)],
            "two objects of the id 1",
        ),
        ([array(1), array(2)], "names 'a.npy' more than once"),
        ([array(1), array(None)], "names 'a.npy' more than once"),
        ([array([1])], "names 'a.npy' more than once"),
        ([node("MethodNode")], "has a 'MethodNode'"),
    ],
)
def test_others_are_refused(parts, reason):
    with pytest.raises(Refusal, match=reason):
        check(node(content=parts))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"", "no JSON"),
        (b"{", "no JSON"),
        (b"[" * 100_000 + b"]" * 100_000, "nested too deeply"),
        (b'{"":' * 400 + b"1" + b"}" * 400, "nested too deeply"),  # not for the parser
    ],
)
def test_what_is_no_json_or_nested_too_deeply_is_refused(text, reason):
    with pytest.raises(Refusal, match=reason):
        check_schema(text, "schema.json")
