import json

import pytest

from sklora._untrusted import Refusal, few, parse_json, shown


def test_parse_json_is_bounded():
    assert parse_json(b'{"a": [1]}', "it") == {"a": [1]}
    for text, message in (("[" * 10**5, "nested"), ("{", "no JSON"), (b"\xff", "no JSON")):
        with pytest.raises(Refusal, match=message):
            parse_json(text, "it")
    with pytest.raises(Refusal, match="it has 11 characters; at most 10"):
        parse_json("1" * 11, "it", 10)


@pytest.mark.parametrize("text", ["[" + "{}," * 9 + "1]", b"[" + b"[]," * 9 + b"1]"])
def test_parse_json_counts_values(text):
    assert len(parse_json(text, "it", max_values=20)) == 10
    with pytest.raises(Refusal, match="it holds some 19 values; at most 18"):
        parse_json(text, "it", max_values=18)


def test_parse_json_refuses_a_number_of_too_many_digits():
    with pytest.raises(Refusal, match="no JSON"):
        parse_json("1" * 10_000, "it")


@pytest.mark.parametrize("text", ['{"a": 1, "a": 1}', '[{"b": {"a": 1, "c": 2, "a": 3}}]'])
def test_parse_json_refuses_what_is_named_twice(text):
    with pytest.raises(Refusal, match=r"^it names 'a' twice\.$"):
        parse_json(text, "it", unique=True)
    assert parse_json(text, "it") == json.loads(text)


def test_shown_is_short_and_escaped():
    assert shown("é\x1b[2J") == r"'\xe9\x1b[2J'"
    assert shown("x" * 1000, 20) == f"'{'x' * 16}..."
    assert len(shown([["x" * 1000] * 1000] * 1000)) <= 80


def test_few():
    assert few("abc") == "a, b, c"
    assert few("abcd") == "a, b, c and 1 more"
