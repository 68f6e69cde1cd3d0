"""Match module names against the patterns of PEFT, in time that no pattern can blow up.

The keys of `rank_pattern` and `alpha_pattern` are regular expressions from a file that anyone may
have written, so Python's backtracking engine must not run them. Here a pattern becomes a small
program, and all places that the program can be at advance together over the name [1]_.

References
----------
.. [1] K. Thompson, "Regular expression search algorithm", Communications of the ACM 11(6), 1968.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from functools import lru_cache
from typing import Any, TypeAlias

from sklora._untrusted import Refusal, shown

MAX_LENGTH = 1000
MAX_DEPTH = 20
MAX_REPEAT = 100
MAX_STEPS = 1000
# Of patterns that are no plain names: compiling takes some 10 microseconds a letter.
MAX_PATTERNS = 2**10
MAX_LETTERS = 2**16

_SUPPORTED = (
    r"supported are literals, ., \d \D \w \W \s \S, escaped punctuation, [...] of ASCII, (...), "
    f"(?:...), (?P<name>...), |, *, +, ?, {{m,n}} up to {MAX_REPEAT}, their lazy forms, ^ and $"
)

# A step takes one character, or none if it is an anchor; a tuple jumps to all of its relative
# places at once. Nothing in a program is absolute, so repeating one is multiplying a list.
_Step: TypeAlias = re.Pattern[str] | tuple[int, ...]
_Program: TypeAlias = list[_Step]

# diffusers puts the anchor before the whole name of a module.
_PLAIN = re.compile(r"\^?[\w.-]*")
# As `re.escape` writes a name, which Unsloth anchors as well; adapters of mixed ranks have one such
# pattern for each module.
_LITERAL = re.compile(r"\^?(?:[\w-]|\\[^a-zA-Z0-9\n])*")
_OPEN = re.compile(r"\((?:\?:|\?P<\w+>|(?!\?))")
_QUANTIFIER = re.compile(r"(?:([*+?])|\{(?=,?[0-9])([0-9]*)(,?)([0-9]*)\})\??")
_ESCAPE = r"\\[dDwWsS]|\\[^a-zA-Z0-9]"
# Python warns of [[, --, &&, ~~ and || in a class: it may give them a meaning one day. And it takes
# 10 ms to compile a range beyond ASCII.
_MEMBER = rf"(?!\\?+[^\x00-\x7f])(?:{_ESCAPE}|(?!--|&&|~~|\|\|)[^\\\[\]])"
_ONE = re.compile(rf"{_ESCAPE}|\[\^?+(?:\]|{_MEMBER}){_MEMBER}*+\]|[^\\\[(){{*+?|]")


def matches_module(pattern: str, module: str) -> bool:
    r"""Say whether PEFT would apply the setting under `pattern` to `module`.

    The answer is that of ``re.match(rf"(.*\.)?({pattern})$", module)``. It takes at most time
    proportional to the length of `module` times the size of `pattern` with repeats written out.

    Parameters
    ----------
    pattern : str
        A key of `rank_pattern` or `alpha_pattern`.
    module : str
        The module's full name.

    Returns
    -------
    bool

    Raises
    ------
    Refusal
        If `pattern` is no string, is invalid, too large, or has syntax that is not supported.

    Examples
    --------
    >>> matches_module("q_proj", "model.layers.0.self_attn.q_proj")
    True
    >>> matches_module(r"layers\.(0|1)\.mlp", "model.layers.2.mlp")
    False
    """
    if not isinstance(pattern, str):
        raise Refusal(f"the pattern {shown(pattern)} is no string; write it as one.")
    if len(pattern) > MAX_LENGTH:
        raise _refusal(pattern, f"has more than {MAX_LENGTH} characters")
    if _PLAIN.fullmatch(pattern) and "\n" not in module:
        name = pattern.removeprefix("^")
        rest = len(module) - len(name)
        begins = rest == 0 or (rest > 0 and name == pattern and module[rest - 1] == ".")
        return begins and all(
            wanted in (".", given) for wanted, given in zip(name, module[rest:], strict=True)
        )
    literal = _literal(pattern)
    if literal is not None and "\n" not in module:
        if pattern.startswith("^"):
            return module == literal
        return f".{module}".endswith(f".{literal}")
    return _run(_compiled(pattern), module)


def matches_whole(pattern: str, module: str) -> bool:
    r"""Say whether PEFT would adapt `module` where its ``target_modules`` are `pattern`.

    The answer is that of ``re.fullmatch(pattern, module)``, in the time of `matches_module`.

    Raises
    ------
    Refusal
        As `matches_module`.

    Examples
    --------
    >>> matches_whole(r".*\.q_proj", "model.layers.0.q_proj")
    True
    >>> matches_whole("q_proj", "model.layers.0.q_proj")
    False
    """
    return _run(_whole(pattern), module)


def first_match(patterns: Iterable[str], module: str) -> str | None:
    """Give the first of some patterns under which PEFT would apply a setting to `module`.

    Parameters
    ----------
    patterns : iterable of str
    module : str

    Returns
    -------
    str or None
        None when no pattern matches.

    Raises
    ------
    Refusal
        As `matches_module`, for the patterns up to the first that matches.

    Examples
    --------
    >>> first_match(["k_proj", "layers.[0-4].q_proj", "q_proj"], "model.layers.0.q_proj")
    'layers.[0-4].q_proj'
    """
    # Adapters of mixed ranks have a pattern for each module: nearly all pairs differ in the ending.
    name = f".{module}".removesuffix("\n")
    patterns = tuple(patterns)
    for pattern, ending in zip(patterns, _endings(patterns), strict=True):
        if name.endswith(ending) and matches_module(pattern, module):
            return pattern
    return None


def matching_work(patterns: Iterable[str], modules: Collection[str], n_more: int = 0) -> int:
    """Bound the steps that matching all patterns with all modules may take; some 10^6 a second.

    Parameters
    ----------
    patterns : iterable of str
    modules : collection of str
    n_more : int, default=0
        How many letters more than these the names may have.

    Returns
    -------
    int

    Raises
    ------
    Refusal
        As `matches_module`, and when compiling the patterns alone takes too long.
    """
    given: list[Any] = list(patterns)
    others = [one for one in given if isinstance(one, str) and not _is_name(one)]
    n_letters = sum(map(len, others))
    if len(others) > MAX_PATTERNS or n_letters > MAX_LETTERS:
        raise Refusal(
            f"its configuration has {len(others)} patterns of {n_letters} letters in all, of at "
            f"most {MAX_PATTERNS} and {MAX_LETTERS}, that are no plain names; write fewer."
        )
    letters = sum(map(len, modules)) + (1 + n_more) * len(modules)
    return sum(_work(pattern, len(modules), letters) for pattern in given)


def _work(pattern: str, n_modules: int, letters: int) -> int:
    matches_module(pattern, "")  # refuses what is no pattern
    return n_modules if _is_name(pattern) else len(_compiled(pattern)) * letters


def _is_name(pattern: str) -> bool:
    return bool(_PLAIN.fullmatch(pattern)) or _literal(pattern) is not None


@lru_cache(maxsize=2**12)
def _literal(pattern: str) -> str | None:
    """Give the one text that a pattern matches, if there is one."""
    name = pattern.removeprefix("^")
    return re.sub(r"\\(.)", r"\1", name) if _LITERAL.fullmatch(pattern) else None


@lru_cache(maxsize=8)
def _endings(patterns: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(map(_ending, patterns))


def _ending(pattern: str) -> str:
    """Give what a name, with a dot before it, has to end in to match."""
    if len(pattern) > MAX_LENGTH:
        return ""
    literal = _literal(pattern)
    if literal is not None:
        return f".{literal}"
    return pattern.removeprefix("^").rpartition(".")[2] if _PLAIN.fullmatch(pattern) else ""


def _run(program: _Program, module: str) -> bool:
    later = [0]
    for position in range(len(module) + 1):
        here, later, seen = later, [], set()
        while here:
            place = here.pop()
            if place in seen:
                continue
            seen.add(place)
            if place == len(program):
                return True
            step = program[place]
            if isinstance(step, tuple):
                here.extend(place + jump for jump in step)
            elif found := step.match(module, position):
                (here if found.end() == position else later).append(place + 1)
    return False


# As many as a file may have, so that none is compiled again for every module.
@lru_cache(maxsize=MAX_PATTERNS)
def _compiled(pattern: str) -> _Program:
    try:
        key = _Parser(pattern).parse()
        # Compiling runs nothing, and knows what else is invalid: {2,1}, ^*, a name used twice.
        re.compile(pattern)
    except re.error as error:
        reason = f"is no valid regular expression ({shown(error.msg)})"
        raise _refusal(pattern, reason) from None
    return [*_Parser(r"(.*\.)?").parse(), *key, re.compile("$")]


@lru_cache(maxsize=8)
def _whole(pattern: str) -> _Program:
    matches_module(pattern, "")  # refuses what is no pattern
    return [*_Parser(pattern).parse(), re.compile(r"\Z")]


def _refusal(pattern: str, reason: str) -> Refusal:
    return Refusal(f"the pattern {shown(pattern)} {reason}; {_SUPPORTED}.")


class _Parser:
    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        self.at = 0

    def parse(self) -> _Program:
        program = self._alternatives(depth=0)
        if self.at < len(self.pattern):
            raise _refusal(self.pattern, f"closes a parenthesis too many at {self.at}")
        return program

    def _take(self, token: re.Pattern[str]) -> re.Match[str] | None:
        found = token.match(self.pattern, self.at)
        if found:
            self.at = found.end()
        return found

    def _next(self) -> str:
        return self.pattern[self.at : self.at + 1]

    def _checked(self, program: _Program) -> _Program:
        if len(program) > MAX_STEPS:
            raise _refusal(self.pattern, f"needs more than {MAX_STEPS} steps, repeats written out")
        return program

    def _alternatives(self, depth: int) -> _Program:
        if depth > MAX_DEPTH:
            raise _refusal(self.pattern, f"nests more than {MAX_DEPTH} groups")
        branches = [self._sequence(depth)]
        while self._next() == "|":
            self.at += 1
            branches.append(self._sequence(depth))
        if len(branches) == 1:
            return branches[0]
        starts = [1]
        for branch in branches:
            starts.append(starts[-1] + len(branch) + 1)
        end = starts.pop()
        program: _Program = [tuple(starts)]
        for branch in branches:
            program += branch
            program.append((end - len(program),))
        return self._checked(program)

    def _sequence(self, depth: int) -> _Program:
        program: _Program = []
        while self._next() not in ("", "|", ")"):
            program += self._repeated(self._item(depth))
            self._checked(program)
        return program

    def _item(self, depth: int) -> _Program:
        if self._take(_OPEN):
            program = self._alternatives(depth + 1)
            if self._next() != ")":
                raise _refusal(self.pattern, "leaves a parenthesis open")
            self.at += 1
            return program
        if one := self._take(_ONE):
            return [re.compile(one[0])]
        raise _refusal(self.pattern, f"has syntax at {self.at} that is not supported")

    def _repeated(self, body: _Program) -> _Program:
        found = self._take(_QUANTIFIER)
        if found is None:
            return body
        sign, least, comma, most = found.groups()
        low = int(sign == "+") if sign else int(least or 0)
        if sign:
            high = 1 if sign == "?" else None
        else:
            high = int(most) if most else None if comma else low
        if max(low, high or 0) > MAX_REPEAT:
            raise _refusal(self.pattern, f"repeats more than {MAX_REPEAT} times")
        size = len(body)
        if high is None:
            tail: _Program = [(1, size + 2), *body, (-size - 1,)]
        else:
            tail = [(1, size + 1), *body] * (high - low)
        return self._checked(body * low + tail)
