import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sklora._untrusted import Refusal
from sklora.io.lowrank import METHODS, dimension, method_of

SIZES = st.integers(1, 4)
KERNELS = st.lists(SIZES, max_size=3).map(tuple)

HADA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
LOKR_FIRST = (("lokr_w1",), ("lokr_w1_a", "lokr_w1_b"))
LOKR_SECOND = (("lokr_w2",), ("lokr_w2_a", "lokr_w2_b"), ("lokr_w2_a", "lokr_w2_b", "lokr_t2"))
LOKR = tuple(first + second for first in LOKR_FIRST for second in LOKR_SECOND)
ROLES = {
    "lora": (("down", "up"),),
    "lora-right": (("a", "b"),),
    "lora-table": (("table", "up"),),
    "lora-stack": (("stack_a", "stack_b"),),
    "adalora": (("down", "up", "diagonal"),),
    "locon-tucker": (("down", "mid", "up"),),
    "loha": (HADA, (*HADA, "hada_t1", "hada_t2")),
    "lokr": LOKR,
    "lokr-kronecker": LOKR,
}


def ones(kernel):
    return (1,) * len(kernel)


@st.composite
def adapters(draw, method):
    """Arrays by role that fit together, and the size (n, m) of their update."""
    n, m, r, s = (draw(SIZES) for _ in range(4))
    kernel = draw(KERNELS)
    roles = draw(st.sampled_from(ROLES[method]))
    shapes, size = _shapes(draw, method, roles, (n, m, r, s), kernel)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return {role: rng.normal(size=shapes[role]) for role in roles}, size


def _shapes(draw, method, roles, sizes, kernel):
    n, m, r, s = sizes
    area = int(np.prod(kernel, dtype=int))
    if method in ("lora", "adalora"):
        diagonal = draw(st.sampled_from([(r,), (r, 1)]))
        shapes = {"down": (r, m, *kernel), "up": (n, r, *ones(kernel)), "diagonal": diagonal}
        return shapes, (n, m * area)
    if method == "lora-right":
        return {"a": (m, r), "b": (r, n)}, (n, m)
    if method == "lora-table":
        return {"table": (m, r), "up": (n, r)}, (n, m)
    if method == "lora-stack":
        stack = draw(st.sampled_from([(s, r, m), (s * r, m)]))
        return {"stack_a": stack, "stack_b": (s, n, r)}, (n, m)
    kernel = kernel or (1,)
    area = int(np.prod(kernel))
    if method == "locon-tucker":
        shapes = {"down": (s, m, *ones(kernel)), "mid": (r, s, *kernel), "up": (n, r)}
        return shapes, (n, m * area)
    if method == "loha":
        if "hada_t1" not in roles:
            parts = {"w1_a": (n, r), "w1_b": (r, m), "w2_a": (n, s), "w2_b": (s, m)}
            return {f"hada_{role}": shape for role, shape in parts.items()}, (n, m)
        parts = {"w1_a": (r, n), "w1_b": (r, m), "w2_a": (s, n), "w2_b": (s, m)}
        parts |= {"t1": (r, r, *kernel), "t2": (s, s, *kernel)}
        return {f"hada_{role}": shape for role, shape in parts.items()}, (n, m * area)
    a, b, c, d = n, m, draw(SIZES), draw(SIZES)
    shapes = {"lokr_w1": (a, b), "lokr_w1_a": (a, r), "lokr_w1_b": (r, b)}
    if "lokr_t2" in roles:
        shapes |= {"lokr_w2_a": (s, c), "lokr_w2_b": (s, d), "lokr_t2": (s, s, *kernel)}
    else:
        w2_b = draw(st.sampled_from([(s, d * area), (s, d, *kernel)]))
        shapes |= {"lokr_w2": (c, d, *kernel), "lokr_w2_a": (c, s), "lokr_w2_b": w2_b}
    if method == "lokr":
        return shapes, (a * c, b * d * area)
    return shapes, (a * b, c * d * area)


def flat(array):
    return array.reshape(len(array), -1)


def kernel_of(core, a, b):
    return flat(np.einsum("ij...,ip,jr->pr...", core, a, b))


def part(arrays, full, a, b, core):
    """One factor of an elementwise or Kronecker product, as its trainer rebuilds it."""
    if full in arrays:
        return flat(arrays[full])
    if core in arrays:
        return kernel_of(arrays[core], arrays[a], arrays[b])
    return arrays[a] @ flat(arrays[b])


def dense(method, x):
    """The update, by the formulas of the trainers, as a matrix."""
    if method == "lora":
        return flat(x["up"]) @ flat(x["down"])
    if method == "lora-right":
        return (x["a"] @ x["b"]).T
    if method == "lora-table":
        return x["up"] @ x["table"].T
    if method == "lora-stack":
        b = x["stack_b"]
        return np.vstack(b @ x["stack_a"].reshape(len(b), b.shape[2], -1))
    if method == "adalora":
        return flat(x["up"]) @ np.diag(x["diagonal"].ravel()) @ flat(x["down"])
    if method == "locon-tucker":
        return kernel_of(x["mid"], flat(x["up"]).T, flat(x["down"]))
    if method == "loha":
        first = part(x, None, "hada_w1_a", "hada_w1_b", "hada_t1")
        return first * part(x, None, "hada_w2_a", "hada_w2_b", "hada_t2")
    w1 = part(x, "lokr_w1", "lokr_w1_a", "lokr_w1_b", None)
    w2 = part(x, "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
    return np.kron(w1, w2) if method == "lokr" else np.outer(w1, w2)


@pytest.mark.parametrize("method", METHODS)
@given(data=st.data())
def test_factors_give_the_update_of_the_trainer(method, data):
    arrays, (n, m) = data.draw(adapters(method))
    shapes = {role: array.shape for role, array in arrays.items()}
    U, V = METHODS[method].factors(arrays)
    assert METHODS[method].size(shapes) == (n, m, U.shape[1])
    assert (U.shape[0], V.shape) == (n, (m, U.shape[1]))
    expected = dense(method, arrays)
    if method == "lora-stack":  # whose experts' columns are told apart later
        count = len(arrays["stack_b"])
        U, V = U.reshape(n, -1, count), V.reshape(m, count, -1)
        update = np.einsum("nre,mer->enm", U, V).reshape(-1, m)
    else:
        update = U @ V.T
    np.testing.assert_allclose(update, expected, rtol=0, atol=1e-12 * np.linalg.norm(expected))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@settings(max_examples=20)
@given(data=st.data())
def test_factors_keep_the_dtype(method, dtype, data):
    arrays, _ = data.draw(adapters(method))
    factors = METHODS[method].factors({role: x.astype(dtype) for role, x in arrays.items()})
    assert {factor.dtype for factor in factors} == {np.dtype(dtype)}


@pytest.mark.parametrize("method", METHODS)
@given(data=st.data())
def test_any_shapes_are_refused_or_give_what_was_said(method, data):
    roles = data.draw(st.sampled_from(ROLES[method]))
    shape = st.lists(st.integers(0, 3), max_size=4).map(tuple)
    shapes = {role: data.draw(shape, role) for role in roles}
    try:
        n, m, rank = METHODS[method].size(shapes)
    except Refusal:
        return
    # A plan refuses updates without size.
    assume(n and m and rank)
    U, V = METHODS[method].factors({role: np.ones(shape) for role, shape in shapes.items()})
    assert (U.shape, V.shape) == ((n, rank), (m, rank))
    assert dimension(shapes) is None or dimension(shapes) >= 0


@given(arrays=adapters("lokr-kronecker"))
def test_outer_product_is_the_rearranged_kronecker_product(arrays):
    x, _ = arrays
    w1 = part(x, "lokr_w1", "lokr_w1_a", "lokr_w1_b", None)
    w2 = part(x, "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
    (a, b), (c, d) = w1.shape, w2.shape
    # Van Loan and Pitsianis: a row for every block, a column for every place in a block.
    rearranged = np.kron(w1, w2).reshape(a, c, b, d).transpose(0, 2, 1, 3).reshape(a * b, c * d)
    U, V = METHODS["lokr-kronecker"].factors(x)
    assert U.shape[1] == V.shape[1] == 1
    np.testing.assert_allclose(U @ V.T, rearranged, rtol=1e-10, atol=1e-12)


def test_lokr_of_full_matrices_has_the_rank_that_such_matrices_have():
    rng = np.random.default_rng(0)
    x = {"lokr_w1": rng.normal(size=(2, 5)), "lokr_w2": rng.normal(size=(7, 3))}
    U, V = METHODS["lokr"].factors(x)
    assert U.shape[1] == np.linalg.matrix_rank(U @ V.T) == 2 * 3


@pytest.mark.parametrize("method", METHODS)
def test_method_is_told_by_roles_alone(method):
    for roles in ROLES[method]:
        assert method_of(roles) == ("lokr" if method == "lokr-kronecker" else method)
        assert method_of(reversed(roles)) == method_of(roles)
        assert method_of((*roles, "other")) is None
        for role in roles:
            rest = set(roles) - {role}
            assert method_of(rest) in (None, "lora", "loha", "lokr")
            assert method_of(rest) is None or role in ("diagonal", "mid", "lokr_t2")


@pytest.mark.parametrize("method", METHODS)
def test_refusal_tells_shapes_and_what_is_expected(method):
    roles = ROLES[method][0]
    with pytest.raises(Refusal, match=r"expected|must be") as error:
        METHODS[method].size(dict.fromkeys(roles, (2,)))
    assert f"{min(roles)} (2,)" in str(error.value)


FITTING = {
    "lora": {"down": (2, 3), "up": (4, 2)},
    "lora-right": {"a": (3, 2), "b": (2, 4)},
    "lora-table": {"table": (5, 2), "up": (4, 2)},
    "adalora": {"down": (2, 3), "up": (4, 2), "diagonal": (2, 1)},
    "locon-tucker": {"down": (3, 4), "mid": (2, 3, 5), "up": (6, 2)},
    "loha": {"hada_w1_a": (4, 2), "hada_w1_b": (2, 3), "hada_w2_a": (4, 3), "hada_w2_b": (3, 3)},
    "loha with cores": {
        "hada_w1_a": (2, 4),
        "hada_w1_b": (2, 3),
        "hada_w2_a": (2, 4),
        "hada_w2_b": (2, 3),
        "hada_t1": (2, 2, 5),
        "hada_t2": (2, 2, 5),
    },
    "lokr": {"lokr_w1": (2, 3), "lokr_w2_a": (4, 2), "lokr_w2_b": (2, 5)},
    "lokr with a core": {
        "lokr_w1_a": (3, 2),
        "lokr_w1_b": (2, 2),
        "lokr_w2_a": (2, 4),
        "lokr_w2_b": (3, 5),
        "lokr_t2": (2, 3, 6),
    },
}
# One tensor is changed, so that only one condition does not hold.
NOT_FITTING = {
    "lora": {"down": [(2,)], "up": [(4,), (4, 3), (4, 2, 2), (4, 2, 1, 2)]},
    "lora-right": {"a": [(3,), (3, 2, 1), (3, 3)], "b": [(2,), (2, 4, 1)]},
    "lora-table": {"table": [(5,), (5, 2, 1), (5, 3)], "up": [(4,), (4, 2, 1)]},
    "adalora": {"diagonal": [(3,), (1, 2), (2, 2), (2, 1, 1)], "up": [(4, 3)]},
    "locon-tucker": {
        "down": [(3,), (2, 4), (3, 4, 2)],
        "mid": [(2, 3), (3, 3, 5)],
        "up": [(6,), (6, 3), (6, 2, 2)],
    },
    "loha": {
        "hada_w1_a": [(4,), (4, 2, 2), (4, 3), (5, 2)],
        "hada_w1_b": [(2,), (2, 4)],
        "hada_w2_a": [(4,), (4, 3, 2), (4, 2), (5, 3)],
        "hada_w2_b": [(3,), (3, 4)],
    },
    "loha with cores": {
        "hada_w1_a": [(2,), (2, 4, 1), (3, 4), (2, 5)],
        "hada_w1_b": [(2,), (2, 3, 1), (3, 3), (2, 4)],
        "hada_w2_a": [(2, 4, 1), (2, 5)],
        "hada_t1": [(2, 2), (2, 2, 6)],
        "hada_t2": [(2, 2, 6)],
    },
    "lokr": {"lokr_w1": [(6,)], "lokr_w2_a": [(4,), (4, 3)], "lokr_w2_b": [(2,)]},
    "lokr with a core": {"lokr_w1_b": [(3, 2)], "lokr_t2": [(2, 3), (3, 2, 6)]},
}


@pytest.mark.parametrize("case", FITTING)
def test_every_condition_on_the_shapes_is_checked(case):
    shapes = FITTING[case]
    size = METHODS[case.split()[0]].size
    n, m, rank = size(shapes)
    U, V = METHODS[case.split()[0]].factors({role: np.ones(x) for role, x in shapes.items()})
    assert (U.shape, V.shape) == ((n, rank), (m, rank))
    for role, others in NOT_FITTING[case].items():
        for shape in others:
            with pytest.raises(Refusal, match="do not fit together"):
                size(shapes | {role: shape})


@pytest.mark.parametrize(
    ("case", "change", "expected"),
    [
        ("lokr", {"lokr_w1": (6,)}, "lokr_w1 must be a matrix or a convolution"),
        ("lokr", {"lokr_w2_b": (2,)}, "lokr_w2_a (rows, r) and lokr_w2_b (r, columns) are"),
        ("lokr with a core", {"lokr_t2": (2, 3)}, "lokr_w2_a (r, rows), lokr_w2_b (r, columns)"),
        ("loha", {"hada_w1_a": (5, 2)}, "both parts must give updates of one shape"),
    ],
)
def test_refusal_names_the_tensors_of_the_part(case, change, expected):
    shapes = FITTING[case] | change
    with pytest.raises(Refusal) as error:
        METHODS[case.split()[0]].size(shapes)
    given = ", ".join(f"{role} {shapes[role]}" for role in sorted(shapes))
    assert str(error.value).startswith(f"shapes {given} do not fit together; {expected}")


@pytest.mark.parametrize("method", ["lokr", "lokr-kronecker"])
@pytest.mark.parametrize("part", ["lokr_w1", "lokr_w2"])
def test_product_with_a_part_of_rank_0_has_rank_0(method, part):
    shapes = {"lokr_w1_a": (4, 2), "lokr_w1_b": (2, 3), "lokr_w2_a": (5, 2), "lokr_w2_b": (2, 6)}
    shapes |= {f"{part}_a": (4, 0), f"{part}_b": (0, 3)}
    assert METHODS[method].size(shapes)[2] == 0


def test_no_roles_are_no_method():
    assert method_of(()) is None


@pytest.mark.parametrize(
    ("shapes", "r"),
    [
        ({"down": (3, 4), "up": (5, 3)}, 3),
        ({"down": (3, 4, 3, 3), "up": (5, 3, 1, 1)}, 3),
        ({"a": (4, 3), "b": (3, 5)}, 3),
        ({"table": (4, 3), "up": (5, 3)}, 3),
        ({"hada_w1_a": (5, 2), "hada_w1_b": (2, 4)}, 2),
        ({"hada_w1_a": (2, 5), "hada_w1_b": (2, 4), "hada_t1": (2, 2, 3, 3)}, 2),
        ({"lokr_w1": (2, 3), "lokr_w2_a": (4, 6), "lokr_w2_b": (6, 5)}, 6),
        ({"lokr_w1_a": (2, 6), "lokr_w1_b": (6, 3), "lokr_w2": (4, 5)}, 6),
        ({"lokr_w1": (2, 3), "lokr_w2_a": (6, 4), "lokr_w2_b": (6, 5)}, 6),
        ({"lokr_w1": (2, 3), "lokr_w2": (4, 5)}, None),
        # Of two ranks that of loaders: ComfyUI, AUTOMATIC1111, InvokeAI.
        ({"down": (2, 4, 1, 1), "mid": (3, 2, 3, 3), "up": (5, 3, 1, 1)}, 2),
        ({"hada_w1_b": (2, 4), "hada_w2_b": (3, 4)}, 2),
    ],
)
def test_rank_by_which_alpha_is_divided(shapes, r):
    assert dimension(shapes) == r
