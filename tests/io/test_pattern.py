import itertools
import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sklora._untrusted import Refusal
from sklora.io import _pattern
from sklora.io._pattern import first_match, matches_module, matches_whole, matching_work

LETTERS = "ab0._-"


def peft(pattern, module):
    return re.match(rf"(.*\.)?({pattern})$", module) is not None


def repeated(pattern, signs=("*", "+", "?", "{2}", "{1,2}", "{0}", "{,2}", "{1,}")):
    return st.builds("{}{}{}".format, pattern, st.sampled_from(signs), st.sampled_from(["", "?"]))


def sequences(pattern, max_size):
    return st.lists(pattern, max_size=max_size).map("".join)


def groups(branch):
    branches = st.lists(branch, min_size=1, max_size=2, unique=True).map("|".join)
    return st.builds("({}{})".format, st.sampled_from(["", "?:"]), branches)


# Python's engine is the reference, so the patterns must not be hard for it: a repeated group holds
# no unbounded repeat. test_nested_repeats has those.
MEMBERS = st.sampled_from(["a", "b", "0-9", "a-z", "_", r"\d", r"\.", ".", r"\]", r"\W"])
ONE = st.sampled_from([*LETTERS, r"\.", r"\-", r"\d", r"\D", r"\w", r"\W", r"\s", r"\S", "é"])
ONE |= st.builds(
    "[{}{}{}]".format,
    st.sampled_from(["", "^"]),
    st.lists(MEMBERS, min_size=1, max_size=3).map("".join),
    st.sampled_from(["", "-"]),
)
INNER = groups(sequences(ONE, 2))
ITEM = ONE | repeated(ONE) | INNER | repeated(INNER) | st.sampled_from(["^", "$"])
OUTER = groups(sequences(ITEM, 2))
OUTER |= repeated(OUTER, ["?", "{2}", "{0,2}"])
PATTERNS = st.lists(sequences(ITEM | OUTER, 3), min_size=1, max_size=2).map("|".join)
NAMES = st.text(alphabet=LETTERS + "é", max_size=6) | st.text(alphabet="ab.\n", max_size=6)


@given(PATTERNS, NAMES)
def test_same_answer_as_peft(pattern, module):
    assert matches_module(pattern, module) == peft(pattern, module)


@pytest.mark.parametrize(
    "pattern",
    ["((a*)*b?)*", "(?:(a|)*?b)+", "(|a)+b", "(?:a?){2,}?b", "((a|b*)+a)*", "(^a|b$)*", "(.|)*a"],
)
def test_nested_repeats(pattern):
    for length in range(5):
        for letters in itertools.product("ab.", repeat=length):
            module = "".join(letters)
            assert matches_module(pattern, module) == peft(pattern, module)


@given(st.from_regex(r"\^?[ab.\-]{0,4}", fullmatch=True), st.text(alphabet="ab.-\n", max_size=8))
def test_same_answer_as_peft_for_plain_keys(pattern, module):
    assert matches_module(pattern, module) == peft(pattern, module)


@given(
    st.lists(
        st.text("ab.-", max_size=3).flatmap(
            lambda t: st.sampled_from([t, re.escape(t), f"^{t}", f"^{re.escape(t)}"])
        )
    ),
    NAMES,
)
@example(["a", "b"], "a.b\n")
def test_the_first_match_of_plain_and_escaped_keys(patterns, module):
    expected = next((pattern for pattern in patterns if peft(pattern, module)), None)
    assert first_match(patterns, module) == expected


def test_a_pattern_too_long_is_refused_before_a_match():
    with pytest.raises(Refusal, match="more than 1000 characters"):
        first_match(["a" * 1001, "b"], "b")


@given(st.text(alphabet=r"ab.09,-^$|()[]{}*+?\dP<>=!:&~", max_size=10), NAMES)
def test_any_text_is_answered_as_peft_does_or_refused(pattern, module):
    try:
        answer = matches_module(pattern, module)
    except Refusal:
        return
    assert answer == peft(pattern, module)


@pytest.mark.parametrize(
    ("pattern", "module", "expected"),
    [
        ("q_proj", "model.layers.0.self_attn.q_proj", True),
        ("q_proj", "q_proj", True),
        ("q_proj", "model.seq_proj", False),
        ("attn.q", "model.attn_q", True),
        ("layers.1.q", "model.layers.11.q", False),
        (r"model.layers.\d+.self_attn.q_proj", "model.layers.12.self_attn.q_proj", True),
        (r"model.layers.\d+.self_attn.q_proj", "base.model.layers.12.self_attn.q_proj", True),
        (r"model.layers.\d+.self_attn.q_proj", "model.layers.x.self_attn.q_proj", False),
        (
            "^model.decoder.layers.0.encoder_attn.k_proj",
            "model.decoder.layers.0.encoder_attn.k_proj",
            True,
        ),
        (
            "^model.decoder.layers.0.encoder_attn.k_proj",
            "base.model.decoder.layers.0.encoder_attn.k_proj",
            False,
        ),
        ("layers.(0|1|2).mlp", "model.layers.1.mlp", True),
        ("layers.(0|1|2).mlp", "model.layers.3.mlp", False),
        (".*attn.*", "model.layers.0.self_attn.k_proj", True),
        (".*attn.*", "model.layers.0.mlp", False),
        ("a|b", "x.b", True),
        ("a|b", "xb", False),
        ("^a|b", "x.b", True),
        ("^a|b", "x.a", False),
        ("(?P<part>q|k)_proj$", "attn.k_proj", True),
        (r"[]\-^]", "x.]", True),
    ],
)
def test_examples(pattern, module, expected):
    assert matches_module(pattern, module) is expected
    assert peft(pattern, module) is expected


@pytest.mark.parametrize(
    "pattern", ["(a+)+", "(a*)*", "(a|a)*", "(a|aa)+$", "(.*.*.*)*a", "(a?){100}"]
)
def test_catastrophic_patterns_end(pattern):
    assert not matches_module(pattern, "a" * 5000 + "b")


@pytest.mark.parametrize(
    "pattern",
    [
        "(?=a)b", "(?!a)b", "(?<=a)b", "(?<!a)b", "(?>a)", "(?#a)b", "(?i)a", "(?i:a)",
        r"(a)\1", "(?P<x>a)(?P=x)", "(a)?(?(1)b)", r"\bq", r"a\Z", r"\x61", r"\n", r"\q",
        "a*+", "a{2}+", "a{", "a{}", "a{,}", "a{b}", "[[a]", "[a--b]", "[a&&b]", "[a||b]", "[a~~b]",
        "[\u0100-\uffff]", "[a\xe9]", r"[\–-\—]",
    ],
)  # fmt: skip
def test_other_syntax_is_refused(pattern):
    with pytest.raises(Refusal, match="not supported; supported are literals") as refusal:
        matches_module(pattern, "a")
    assert ascii(pattern) in str(refusal.value)


@pytest.mark.parametrize(
    "pattern",
    [
        "(", ")", "(a", "a)", "a)(b", "((a)", "[", "[]", "[^]", "[a", "[b-a]", r"[\d-a]", "*",
        "a|*", "(+)", "a**", "a{2}{2}", "a{2,1}", "^*", "$?", "\\", "a\\", "(?P<x>a)(?P<x>b)",
        "(?P<1>a)",
    ],
)  # fmt: skip
def test_invalid_patterns_are_refused(pattern):
    with pytest.raises(re.error):
        re.compile(pattern)
    with pytest.raises(Refusal, match="the pattern"):
        matches_module(pattern, "a")


@pytest.mark.parametrize("pattern", [None, 3, b"q_proj", ["q_proj"], {}])
def test_a_pattern_that_is_no_string_is_refused(pattern):
    with pytest.raises(Refusal, match="is no string; write it as one"):
        matches_module(pattern, "q_proj")


def test_caps():
    length, depth, repeat = _pattern.MAX_LENGTH, _pattern.MAX_DEPTH, _pattern.MAX_REPEAT
    for fits, too_much, reason, module in [
        ("a" * length, "a" * (length + 1), "characters", "a" * length),
        (r"\d" * (length // 2), r"\d" * length, "characters", "1" * (length // 2)),
        ("(" * depth + "a" + ")" * depth, "(" * 499 + "a" + ")" * 499, "nests", "a"),
        (f"a{{{repeat}}}", f"a{{{repeat + 1}}}", "repeats", "a" * repeat),
        (f"a{{0,{repeat}}}", "a{1," + "9" * 900 + "}", "repeats", "a"),
        ("(a{100}){10}", "(a{100}){100}", "steps", "a" * 1000),
        ("((((a{9}){9}){9}))", "((((a{99}){99}){99}){99}){99}", "steps", "a" * 729),
        ("a{90}|b{90}", "|".join(["(b{90})"] * 40), "steps", "b" * 90),
    ]:
        assert matches_module(fits, module)
        with pytest.raises(Refusal, match=reason):
            matches_module(too_much, module)


@pytest.mark.parametrize("pattern", ["\x1b[31m(?=" + "a" * 900 + ")", "[\x1b-\n]" + "a" * 900])
def test_a_message_shows_a_hostile_pattern_escaped_and_short(pattern):
    with pytest.raises(Refusal) as refusal:
        matches_module(pattern, "a")
    assert str(refusal.value).isprintable()
    assert len(str(refusal.value)) < 500


def test_work_of_plain_keys_is_one_step_a_module():
    # Anchored as diffusers and Unsloth write them.
    keys = ["q_proj", r"layers\.0\.q_proj", "^layers.0.q_proj", r"^layers\.0\.q_proj"]
    assert matching_work(keys, ["a.q_proj", "b", "c"]) == 12


def test_work_grows_with_repeats_and_letters():
    once = matching_work(["(a|b)"], ["x" * 10])
    assert matching_work(["(a|b){50}"], ["x" * 10]) > 10 * once
    assert matching_work(["(a|b)"], ["x" * 1000]) > 40 * once


@pytest.mark.parametrize("patterns", [["[xy]" * 200] * 90, [f"a{{{n}}}b*" for n in range(99)] * 11])
def test_patterns_that_take_long_to_compile_are_refused(patterns):
    with pytest.raises(Refusal, match="in all, of at most 1024 and 65536"):
        matching_work(patterns, ["q"])


def test_no_pattern_is_compiled_for_every_module(monkeypatch):
    patterns = [f"[xy]{n}" for n in range(500)]
    matching_work(patterns, ["q"])
    assert matches_whole("[xy]q", "xq")
    monkeypatch.delattr(_pattern, "_Parser")
    assert first_match(patterns, "model.x499") == patterns[499]
    assert matches_whole("[xy]q", "yq")


def test_work_of_what_is_no_pattern_is_refused():
    with pytest.raises(Refusal, match="no string"):
        matching_work([3], ["q"])
