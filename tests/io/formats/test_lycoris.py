import itertools
import tracemalloc

import numpy as np
import pytest
import torch

from sklora.io import read_adapters

MODULE = "lora_unet_down_blocks_0_resnets_0_conv1"
NAME = "unet.down_blocks.0.resnets.0.conv1"
ALPHA = 6.0
# What is added to the weight is (a c, b d) or (a c, b d, k, l), of these sizes; cores have rank R.
A, B, C, D, R, K, L = 2, 3, 4, 5, 2, 3, 2


def module(alpha=ALPHA, **tensors):
    named = {f"{MODULE}.{role.replace('__', '.')}": tensor for role, tensor in tensors.items()}
    if alpha is not None:
        named[f"{MODULE}.alpha"] = torch.tensor(alpha)
    return named


def rebuilt(core, a, b):
    """A kernel of two matrices, stored (r, rows) and (r, columns), and a core (r, r, ...)."""
    kernel = torch.einsum("ij...,ip,jr->pr...", core.double(), a.double(), b.double())
    return kernel.contiguous()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kernel", [(K, L), (K,), (2, 2, 2)])
def test_locon_with_a_tucker_core(normal, save, assert_updates, scan, dtype, kernel):
    ones = (1 for _ in kernel)
    down, mid, up = (
        normal(*shape, dtype=dtype) for shape in ((3, 4, *ones), (3, 3, *kernel), (5, 3))
    )
    path = save(module(lora_down__weight=down, lora_mid__weight=mid, lora_up__weight=up))
    update = rebuilt(mid, up.T, down.flatten(1)) * ALPHA / 3
    assert_updates(path, {MODULE: update})
    report = scan(path)
    assert (report.format, report.scales, report.ranks) == ("lycoris", (2,), (3,))


def test_locon_s_core_is_not_symmetric_in_its_ranks(normal, save, assert_updates):
    """Such as AUTOMATIC1111 alone loads: alpha is divided by the rank of `lora_down`."""
    down, mid, up = normal(2, 4, 1, 1), normal(3, 2, K, L), normal(5, 3, 1, 1)
    path = save(module(lora_down__weight=down, lora_mid__weight=mid, lora_up__weight=up))
    assert_updates(path, {MODULE: rebuilt(mid, up.flatten(1).T, down.flatten(1)) * ALPHA / 2})


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("alpha", [ALPHA, -1.0, 0.0, None])
def test_loha(normal, save, assert_updates, scan, dtype, alpha):
    a1, a2 = (normal(5, 3, dtype=dtype) for _ in range(2))
    b1, b2 = (normal(3, 4, dtype=dtype) for _ in range(2))
    path = save(module(alpha, hada_w1_a=a1, hada_w1_b=b1, hada_w2_a=a2, hada_w2_b=b2))
    update = (a1.double() @ b1.double()) * (a2.double() @ b2.double())
    assert_updates(path, {MODULE: update * (alpha / 3 if alpha else 1)})
    assert scan(path).ranks == (9,)


def test_loha_of_two_ranks_divides_by_the_first(normal, save, assert_updates):
    a1, b1, a2, b2 = normal(5, 3), normal(3, 4), normal(5, 2), normal(2, 4)
    path = save(module(hada_w1_a=a1, hada_w1_b=b1, hada_w2_a=a2, hada_w2_b=b2))
    update = (a1.double() @ b1.double()) * (a2.double() @ b2.double())
    assert_updates(path, {MODULE: update * ALPHA / 3})


@pytest.mark.parametrize("kernel", [(K, L), (K,)])
def test_loha_with_tucker_cores(normal, save, assert_updates, kernel):
    a1, a2, b1, b2 = normal(3, 5), normal(3, 5), normal(3, 4), normal(3, 4)
    t1, t2 = normal(3, 3, *kernel), normal(3, 3, *kernel)
    roles = {"hada_w1_a": a1, "hada_w1_b": b1, "hada_w2_a": a2, "hada_w2_b": b2}
    path = save(module(**roles, hada_t1=t1, hada_t2=t2))
    update = rebuilt(t1, a1, b1) * rebuilt(t2, a2, b2)
    assert_updates(path, {MODULE: update * ALPHA / 3})


FIRST = {
    "full": {"lokr_w1": (A, B)},
    "factors": {"lokr_w1_a": (A, R), "lokr_w1_b": (R, B)},
}
SECOND = {
    ("full", "linear"): {"lokr_w2": (C, D)},
    ("full", "conv"): {"lokr_w2": (C, D, K, L)},
    ("factors", "linear"): {"lokr_w2_a": (C, R), "lokr_w2_b": (R, D)},
    ("factors", "conv"): {"lokr_w2_a": (C, R), "lokr_w2_b": (R, D * K * L)},
    ("core", "conv"): {"lokr_w2_a": (R, C), "lokr_w2_b": (R, D), "lokr_t2": (R, R, K, L)},
}
LOKR = list(itertools.product(FIRST, SECOND))


def lokr(normal, first, second, dtype=torch.float32):
    """Tensors of LoKr, and its w1 and w2 as LyCORIS rebuilds them."""
    shapes = FIRST[first] | SECOND[second]
    x = {role: normal(*shape, dtype=dtype) for role, shape in shapes.items()}
    d = {role: tensor.double() for role, tensor in x.items()}
    w1 = d["lokr_w1"] if first == "full" else d["lokr_w1_a"] @ d["lokr_w1_b"]
    match second:
        case "full", _:
            w2 = d["lokr_w2"]
        case "factors", "linear":
            w2 = d["lokr_w2_a"] @ d["lokr_w2_b"]
        case "factors", "conv":
            w2 = (d["lokr_w2_a"] @ d["lokr_w2_b"]).reshape(C, D, K, L)
        case _:
            w2 = rebuilt(d["lokr_t2"], d["lokr_w2_a"], d["lokr_w2_b"])
    return x, w1, w2


def scale_of(first, second):
    """1 where both are full, whatever alpha says."""
    return 1 if first == second[0] == "full" else ALPHA / R


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("first", "second"), LOKR)
def test_lokr(normal, save, assert_updates, scan, first, second, dtype):
    x, w1, w2 = lokr(normal, first, second, dtype)
    kron = torch.kron(w1[..., None, None] if w2.ndim == 4 else w1, w2)
    assert kron.shape[:2] == (A * C, B * D)
    path = save(module(**x))
    scale = scale_of(first, second)
    assert_updates(path, {MODULE: kron * scale})
    assert scan(path).scales == (scale,)


def test_lokr_of_two_ranks_is_refused_beside_an_alpha(normal, save, assert_updates, refusal):
    """ComfyUI, AUTOMATIC1111 and diffusers divide it by the second rank, InvokeAI by the first."""
    w1_a, w1_b, w2_a, w2_b = normal(2, 4), normal(4, 2), normal(6, 1), normal(1, 5)
    roles = {"lokr_w1_a": w1_a, "lokr_w1_b": w1_b, "lokr_w2_a": w2_a, "lokr_w2_b": w2_b}
    for options in ({}, {"lokr": "kronecker"}):
        why = refusal(save(module(**roles)), **options)
        assert why.startswith(f"module {MODULE!r} has parts of the ranks 4 and 1: ComfyUI")
    kron = torch.kron((w1_a @ w1_b).double(), (w2_a @ w2_b).double())
    assert_updates(save(module(None, **roles)), {MODULE: kron})


@pytest.mark.parametrize("alpha", [0.0, None])
def test_lokr_without_alpha_has_scale_1(normal, save, assert_updates, alpha):
    x, w1, w2 = lokr(normal, "full", ("factors", "linear"))
    assert_updates(save(module(alpha, **x)), {MODULE: torch.kron(w1, w2)})


def rearranged(kron):
    """Van Loan and Pitsianis: rows for the blocks, columns for what is in a block."""
    blocks = kron.reshape(A, C, B, -1).permute(0, 2, 1, 3)
    return blocks.reshape(A * B, -1)


@pytest.mark.parametrize(("first", "second"), LOKR)
def test_lokr_as_an_outer_product(normal, save, assert_updates, scan, first, second):
    x, w1, w2 = lokr(normal, first, second)
    scale = scale_of(first, second)
    outer = torch.outer(w1.flatten(), w2.flatten())
    kron = torch.kron(w1, w2.flatten(1))
    np.testing.assert_allclose(rearranged(kron), outer, rtol=1e-12)
    path = save(module(**x))
    assert_updates(path, {MODULE: outer * scale}, lokr="kronecker")
    report = scan(path, lokr="kronecker")
    assert report.ranks == (1,)
    assert report.modules[0].method == "lokr-kronecker"


def test_plain_modules_may_lie_beside_others(normal, save, assert_updates):
    x, w1, w2 = lokr(normal, "factors", ("full", "linear"))
    down, up = normal(3, 4), normal(5, 3)
    plain = {"lora_te_x.lora_down.weight": down, "lora_te_x.lora_up.weight": up}
    expected = {
        MODULE: torch.kron(w1, w2) * ALPHA / R,
        "lora_te_x": up.double() @ down.double(),
    }
    assert_updates(save(module(**x) | plain), expected)
    # The choice is of LoKr alone.
    expected[MODULE] = torch.outer(w1.flatten(), w2.flatten()) * ALPHA / R
    assert_updates(save(module(**x) | plain), expected, lokr="kronecker")


def test_what_is_dense_is_left_out_with_a_reason(normal, save, scan):
    x, _, _ = lokr(normal, "full", ("full", "linear"))
    reasons = {
        "lora_unet_conv_out.diff": "dense difference",
        "lora_unet_conv_out.diff_b": "dense difference",
        "lora_unet_time_emb_proj.diff": "dense difference",
        "lora_unet_norm1.w_norm": "normalisation",
        "lora_unet_norm1.b_norm": "normalisation",
    }
    report = scan(save(module(**x) | {name: normal(4) for name in reasons}))
    assert len(report.modules) == 1
    assert {name for name, _ in report.left_out} == set(reasons)
    for name, reason in report.left_out:
        assert reasons[name] in reason


@pytest.mark.parametrize(("shape", "axis"), [((A * C, 1), "out"), ((1, B * D), "in")])
def test_magnitude_of_dora(normal, save, scan, shape, axis):
    x, _, _ = lokr(normal, "full", ("factors", "linear"))
    report = scan(save(module(**x, dora_scale=normal(*shape))))
    assert report.side == ((f"{NAME}:magnitude_{axis}", max(shape)),)


@pytest.mark.parametrize(
    "change",
    [
        {"hada_w1_b": (2, 5)},
        {"hada_w2_a": (5, 3)},
        {"hada_w1_a": (5,)},
        {"hada_t1": (2, 2, 3, 3), "hada_t2": (2, 2, 3, 3)},
    ],
)
def test_parts_of_loha_that_do_not_fit_are_refused(normal, save, refusal, change):
    shapes = {"hada_w1_a": (5, 2), "hada_w1_b": (2, 4), "hada_w2_a": (5, 2), "hada_w2_b": (2, 4)}
    tensors = {role: normal(*shape) for role, shape in (shapes | change).items()}
    assert "do not fit together" in refusal(save(module(**tensors)))


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"lokr_w1": (2, 3)}, "lokr_w1 and no more"),
        ({"lokr_w1": (2, 3), "lokr_w2_a": (4, 2)}, "lokr_w1, lokr_w2_a and no more"),
        ({"lokr_w1": (6,), "lokr_w2": (4, 5)}, "must be a matrix"),
        (
            {"lokr_w1": (2, 3), "lokr_w2": (4, 5), "lora_down__weight": (2, 4)},
            "down, lokr_w1, lokr_w2",
        ),
        ({"hada_w1_a": (5, 2), "hada_w1_b": (2, 4)}, "and no more"),
        ({"hada_w1_a": (5, 2), "hada_w1_b": (2, 4), "hada_t1": (2, 2, 3, 3)}, "and no more"),
    ],
)
def test_incomplete_module_is_refused(normal, save, refusal, shapes, message):
    tensors = {role: normal(*shape) for role, shape in shapes.items()}
    why = refusal(save(module(**tensors)))
    assert why.startswith(f"module {MODULE!r}")
    assert message in why


class TestExpansion:
    """Files whose exact factors would be far larger than they are."""

    @staticmethod
    def within(n_bytes, call):
        tracemalloc.start()
        try:
            result = call()
            assert tracemalloc.get_traced_memory()[1] < n_bytes
        finally:
            tracemalloc.stop()
        return result

    def test_lokr_is_refused_from_the_header_with_the_remedy(self, save, refusal):
        # The update is (160_000, 160_000) of full rank.
        w = torch.zeros(400, 400)
        w[3, 5] = 2
        path = save(module(lokr_w1=w, lokr_w2=w))
        why = self.within(5e6, lambda: refusal(path))
        assert "its exact factors have 5.12e+10 numbers, but the file holds at most 320001" in why
        assert "lokr='kronecker'" in why
        U, V = read_adapters(path, lokr="kronecker")[0][NAME]
        [place] = np.flatnonzero(w)
        assert (np.flatnonzero(U), np.flatnonzero(V)) == ([place], [place])
        np.testing.assert_allclose(U[place] * V[place], 4)

    def test_loha_is_refused_from_the_header(self, normal, save, refusal):
        a, b = normal(1000, 300), normal(300, 1000)
        roles = {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": a, "hada_w2_b": b}
        path = save(module(**roles))
        why = self.within(5e6, lambda: refusal(path))
        assert "an update (1000, 1000) of rank 90000" in why
        assert "plain LoRA of a lower rank" in why

    def test_outer_product_of_long_thin_parts_is_refused_too(self, normal, save, refusal):
        roles = {
            "lokr_w1_a": normal(10_000, 1),
            "lokr_w1_b": normal(1, 10_000),
            "lokr_w2": normal(1, 1),
        }
        path = save(module(**roles))
        assert "leave the adapter out" in self.within(5e6, lambda: refusal(path, lokr="kronecker"))
        # Its exact factors are as small as the file.
        U, V = read_adapters(path)[0][NAME]
        assert (U.shape, V.shape) == ((10_000, 1), (10_000, 1))

    def test_rank_1_update_of_any_size_costs_what_the_file_costs(self, normal, save, scan):
        size = 200_000
        tensors = module(lora_down__weight=normal(1, size), lora_up__weight=normal(size, 1))
        path = save(tensors)
        X = self.within(5 * 4 * 2 * size, lambda: read_adapters(path))
        assert self.within(6 * 4 * 2 * size, X.read).shape == (1, 2 * size)
