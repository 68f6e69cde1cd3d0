r"""How each method writes an update, and its exact factors ``U (n, r)`` and ``V (m, r)``.

Throughout, ``U`` is on the output side of the module and ``V`` on the input side, whichever way
round the base model stores its weight: for a Linear layer ``U V^T`` is added to the weight, for the
Conv1D of GPT-2 and for an Embedding to its transpose. A convolution ``(out, in, kh, kw)`` is the
matrix ``(out, in kh kw)``. No update is ever formed; scales are not applied here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sklora._untrusted import Refusal

Shapes = Mapping[str, tuple[int, ...]]
Arrays = Mapping[str, NDArray[Any]]
Factors = tuple[NDArray[Any], NDArray[Any]]


class Method(NamedTuple):
    """One way to write an update.

    Attributes
    ----------
    size : callable
        From the shapes of the tensors, by role, to ``(n, m, rank)``; raises `Refusal` when they do
        not fit.
    factors : callable
        From the tensors, by role, to ``(U, V)``.
    """

    size: Callable[[Shapes], tuple[int, int, int]]
    factors: Callable[[Arrays], Factors]


def _refuse(shapes: Shapes, expected: str) -> Refusal:
    given = ", ".join(f"{role} {shape}" for role, shape in sorted(shapes.items()))
    return Refusal(f"shapes {given} do not fit together; {expected}.")


def _columns(shape: tuple[int, ...]) -> int:
    return math.prod(shape[1:])


# LoRA: B A, with A (r, in) or (r, in, kh, kw), B (out, r) or (out, r, 1, 1).


def _lora_size(shapes: Shapes) -> tuple[int, int, int]:
    down, up = shapes["down"], shapes["up"]
    if len(down) < 2 or len(up) < 2 or up[1] != down[0] or _columns(up) != up[1]:
        raise _refuse(shapes, "down (r, in, ...) and up (out, r) are expected, of one rank r")
    return up[0], _columns(down), down[0]


def _lora(arrays: Arrays) -> Factors:
    down, up = arrays["down"], arrays["up"]
    return up.reshape(len(up), -1), down.reshape(len(down), -1).T


# The same, with factors transposed: a (in, r), b (r, out).


def _right_size(shapes: Shapes) -> tuple[int, int, int]:
    a, b = shapes["a"], shapes["b"]
    if len(a) != 2 or len(b) != 2 or a[1] != b[0]:
        raise _refuse(shapes, "a (in, r) and b (r, out) are expected, of one rank r")
    return b[1], a[0], a[1]


def _right(arrays: Arrays) -> Factors:
    return arrays["b"].T, arrays["a"]


# An embedding in llama.cpp, whose rows are looked up: table (vocabulary, r), up (out, r).


def _table_size(shapes: Shapes) -> tuple[int, int, int]:
    table, up = shapes["table"], shapes["up"]
    if len(table) != 2 or len(up) != 2 or table[1] != up[1]:
        raise _refuse(shapes, "table (vocabulary, r) and up (out, r) are expected, of one rank r")
    return up[0], table[0], up[1]


def _table(arrays: Arrays) -> Factors:
    return arrays["up"], arrays["table"]


# Stacked experts: a (experts, r, in) or (experts r, in), b (experts, out, r). Their columns lie in
# U as PEFT has them: the first of every expert, then the second of every expert.


def _stack_size(shapes: Shapes) -> tuple[int, int, int]:
    a, b = shapes["stack_a"], shapes["stack_b"]
    if len(b) != 3 or a[:-1] not in ((b[0], b[2]), (b[0] * b[2],)):
        expected = "stack_a (experts, r, in) and stack_b (experts, out, r)"
        raise _refuse(shapes, f"{expected} are expected, of one rank r")
    return b[1], a[-1], b[0] * b[2]


def _stack(arrays: Arrays) -> Factors:
    a, b = arrays["stack_a"], arrays["stack_b"]
    return b.transpose(1, 2, 0).reshape(b.shape[1], -1), a.reshape(-1, a.shape[-1]).T


# AdaLoRA: B diag(E) A, with E (r, 1).


def _adalora_size(shapes: Shapes) -> tuple[int, int, int]:
    n, m, rank = _lora_size(shapes)
    if shapes["diagonal"] not in ((rank,), (rank, 1)):
        raise _refuse(shapes, f"a diagonal ({rank}, 1) is expected")
    return n, m, rank


def _adalora(arrays: Arrays) -> Factors:
    U, V = _lora(arrays)
    return U, V * arrays["diagonal"].reshape(-1)


# LoCon with a Tucker core: sum_ab up[o, a] mid[a, b, ...] down[b, i], with the kernel for dots.


def _tucker_size(shapes: Shapes) -> tuple[int, int, int]:
    down, mid, up = shapes["down"], shapes["mid"], shapes["up"]
    fits = len(down) >= 2 and len(up) >= 2 and len(mid) > 2
    fits = fits and mid[:2] == (up[1], down[0]) and _columns(up) == up[1]
    if not fits or _columns(down) != down[1]:
        raise _refuse(shapes, "down (r, in), mid (r, r, kernel) and up (out, r) are expected")
    return up[0], down[1] * math.prod(mid[2:]), up[1]


def _tucker(arrays: Arrays) -> Factors:
    down, up = (arrays[role].reshape(arrays[role].shape[:2]) for role in ("down", "up"))
    return up, _with_core(arrays["mid"], down)


def _with_core(core: NDArray[Any], inner: NDArray[Any]) -> NDArray[Any]:
    """Contract a core (a, b, ...) with (b, in): the factor V (in ..., a)."""
    V: NDArray[Any] = np.tensordot(inner, np.moveaxis(core, 0, -1), (0, 0))
    return V.reshape(-1, len(core))


# One side of LoHa and LoKr: a full matrix, or a b, or a core between a^T and b.


class Part(NamedTuple):
    """The roles that one side of an elementwise or Kronecker product may have."""

    full: str
    a: str
    b: str
    core: str

    def size(self, shapes: Shapes) -> tuple[int, int, int]:
        """Give rows, columns (the kernel included) and rank."""
        if self.full in shapes:
            full = shapes[self.full]
            if len(full) < 2:
                raise _refuse(shapes, f"{self.full} must be a matrix or a convolution")
            return full[0], _columns(full), min(full[0], _columns(full))
        a, b, core = shapes[self.a], shapes[self.b], shapes.get(self.core)
        if core is None:
            # OneTrainer has a (rows, r, 1, 1) for convolutions.
            if len(a) < 2 or len(b) < 2 or not _columns(a) == a[1] == b[0]:
                raise _refuse(shapes, f"{self.a} (rows, r) and {self.b} (r, columns) are expected")
            return a[0], _columns(b), a[1]
        if len(a) != 2 or len(b) != 2 or len(core) < 3 or core[:2] != (a[0], b[0]):
            expected = f"{self.a} (r, rows), {self.b} (r, columns) and {self.core} (r, r, kernel)"
            raise _refuse(shapes, f"{expected} are expected")
        return a[1], b[1] * math.prod(core[2:]), a[0]

    def factors(self, arrays: Arrays) -> Factors:
        """Give exact factors, of a full matrix the smaller ones."""
        if self.full in arrays:
            full = arrays[self.full].reshape(len(arrays[self.full]), -1)
            if full.shape[0] <= full.shape[1]:
                return np.eye(full.shape[0], dtype=full.dtype), full.T
            return full, np.eye(full.shape[1], dtype=full.dtype)
        a, b = arrays[self.a], arrays[self.b]
        if self.core in arrays:
            return a.T, _with_core(arrays[self.core], b)
        return a.reshape(len(a), -1), b.reshape(len(b), -1).T


_HADA_1 = Part("hada_w1", "hada_w1_a", "hada_w1_b", "hada_t1")
_HADA_2 = Part("hada_w2", "hada_w2_a", "hada_w2_b", "hada_t2")
_LOKR_1 = Part("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_t1")
_LOKR_2 = Part("lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")


# LoHa: the elementwise product of two updates; its factors are products of rows (Khatri-Rao).


def _loha_size(shapes: Shapes) -> tuple[int, int, int]:
    n, m, first = _HADA_1.size(shapes)
    n_second, m_second, second = _HADA_2.size(shapes)
    if (n, m) != (n_second, m_second):
        raise _refuse(shapes, "both parts must give updates of one shape")
    return n, m, first * second


def _loha(arrays: Arrays) -> Factors:
    (U1, V1), (U2, V2) = _HADA_1.factors(arrays), _HADA_2.factors(arrays)
    return _khatri_rao(U1, U2), _khatri_rao(V1, V2)


def _khatri_rao(A: NDArray[Any], B: NDArray[Any]) -> NDArray[Any]:
    """Kronecker products of the rows of A (n, a) and B (n, b): (n, a b)."""
    products: NDArray[Any] = A[:, :, None] * B[:, None, :]
    return products.reshape(len(A), -1)


# LoKr: w1 (x) w2, and (U1 V1^T) (x) (U2 V2^T) = (U1 (x) U2) (V1 (x) V2)^T.


def _lokr_size(shapes: Shapes) -> tuple[int, int, int]:
    (a, b, first), (c, d, second) = _LOKR_1.size(shapes), _LOKR_2.size(shapes)
    return a * c, b * d, first * second


def _lokr(arrays: Arrays) -> Factors:
    (U1, V1), (U2, V2) = _LOKR_1.factors(arrays), _LOKR_2.factors(arrays)
    return np.kron(U1, U2), np.kron(V1, V2)


# LoKr as the outer product of flattened w1 and w2 (appendix E of the paper): the gauge is GL(1).


def _outer_size(shapes: Shapes) -> tuple[int, int, int]:
    (a, b, first), (c, d, second) = _LOKR_1.size(shapes), _LOKR_2.size(shapes)
    return a * b, c * d, min(first * second, 1)


def _outer(arrays: Arrays) -> Factors:
    return _column(_LOKR_1, arrays), _column(_LOKR_2, arrays)


def _column(part: Part, arrays: Arrays) -> NDArray[Any]:
    """Give the entries of one side as a column (entries, 1)."""
    if part.full in arrays:
        return arrays[part.full].reshape(-1, 1)
    U, V = part.factors(arrays)
    entries: NDArray[Any] = U @ V.T
    return entries.reshape(-1, 1)


METHODS: Mapping[str, Method] = {
    "lora": Method(_lora_size, _lora),
    "lora-right": Method(_right_size, _right),
    "lora-table": Method(_table_size, _table),
    "lora-stack": Method(_stack_size, _stack),
    "adalora": Method(_adalora_size, _adalora),
    "locon-tucker": Method(_tucker_size, _tucker),
    "loha": Method(_loha_size, _loha),
    "lokr": Method(_lokr_size, _lokr),
    "lokr-kronecker": Method(_outer_size, _outer),
}


def _role_sets() -> Iterator[tuple[frozenset[str], str]]:
    yield frozenset({"down", "up"}), "lora"
    yield frozenset({"a", "b"}), "lora-right"
    yield frozenset({"table", "up"}), "lora-table"
    yield frozenset({"stack_a", "stack_b"}), "lora-stack"
    yield frozenset({"down", "up", "diagonal"}), "adalora"
    yield frozenset({"down", "mid", "up"}), "locon-tucker"
    factored = frozenset({_HADA_1.a, _HADA_1.b, _HADA_2.a, _HADA_2.b})
    yield factored, "loha"
    yield factored | {_HADA_1.core, _HADA_2.core}, "loha"
    for first in ({_LOKR_1.full}, {_LOKR_1.a, _LOKR_1.b}):
        for second in (
            {_LOKR_2.full},
            {_LOKR_2.a, _LOKR_2.b},
            {_LOKR_2.a, _LOKR_2.b, _LOKR_2.core},
        ):
            yield frozenset(first | second), "lokr"


_METHOD_OF_ROLES = dict(_role_sets())


def method_of(roles: Iterable[str]) -> str | None:
    """Name the method that uses just the tensors of these roles; None when there is none."""
    return _METHOD_OF_ROLES.get(frozenset(roles))


def dimension(shapes: Shapes) -> int | None:
    """Give the rank by which trainers divide alpha; None for LoKr of two full matrices, of no rank.

    It is read off the tensors: the inner size of the factors as they are stored. Where there are
    two, loaders take that of `down`, and of the first part of LoHa.
    """
    for role, axis in (
        ("down", 0),
        ("up", 1),
        ("b", 0),
        ("stack_b", 2),
        (_HADA_1.b, 0),
        (_LOKR_1.b, 0),
        (_LOKR_2.b, 0),
    ):
        if role in shapes:
            return shapes[role][axis]
    return None
