import re

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from sklora.io import read_adapters

VALUES = {
    "general.type": "adapter",
    "adapter.type": "lora",
    "adapter.lora.alpha": 6.0,
    "general.base_model.0.repo_url": "https://huggingface.co/org/model",
}


@pytest.fixture
def save_gguf(tmp_path):
    """Write an adapter as llama.cpp's converter does."""

    def save(tensors, **changes):
        path = tmp_path / "adapter.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        for key, value in (VALUES | changes).items():
            if isinstance(value, str):
                writer.add_string(key, value)
            elif value is not None:
                writer.add_float32(key, value)
        for name, (array, kind) in tensors.items():
            writer.add_tensor(name, array, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return save


def pair(A, B, name="blk.0.attn_q", kind=None):
    return {f"{name}.weight.lora_a": (A, kind), f"{name}.weight.lora_b": (B, kind)}


def product(A, B):
    return torch.from_numpy(B.astype(np.float64) @ A.astype(np.float64))


@pytest.fixture
def factors(rng):
    """A and B of an update (5, 4) of rank 3."""
    return rng.normal(size=(3, 4)).astype(np.float32), rng.normal(size=(5, 3)).astype(np.float32)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize(("alpha", "scale"), [(6.0, 2), (-1.5, -0.5), (0.0, 1)])
def test_scale_is_alpha_over_r_and_1_for_an_alpha_of_0(
    factors, save_gguf, assert_updates, scan, dtype, alpha, scale
):
    A, B = (factor.astype(dtype) for factor in factors)
    path = save_gguf(pair(A, B), **{"adapter.lora.alpha": alpha})
    assert_updates(path, {"blk.0.attn_q": scale * product(A, B)})
    report = scan(path)
    assert (report.format, report.container, report.scales) == ("gguf", "gguf", (scale,))
    assert report.base_model == "org/model"


def test_bfloat16(factors, save_gguf, assert_updates):
    tensors = [torch.from_numpy(factor).bfloat16() for factor in factors]
    A, B = (tensor.view(torch.uint16).numpy().view(np.uint8) for tensor in tensors)
    path = save_gguf(pair(A, B, kind=Kind.BF16))
    update = tensors[1].double() @ tensors[0].double()
    assert_updates(path, {"blk.0.attn_q": 2 * update})


def test_quantised(rng, save_gguf, assert_updates):
    A, B = rng.normal(size=(32, 64)), rng.normal(size=(5, 32))
    quantised = [gguf.quantize(factor.astype(np.float32), Kind.Q8_0) for factor in (A, B)]
    path = save_gguf(pair(*quantised, kind=Kind.Q8_0))
    down, up = (gguf.dequantize(factor, Kind.Q8_0) for factor in quantised)
    assert_updates(path, {"blk.0.attn_q": product(down, up) * 6 / 32})


@pytest.mark.parametrize("name", ["token_embd", "per_layer_token_embd"])
def test_rows_of_an_embedding_are_looked_up(rng, factors, save_gguf, assert_updates, name):
    # Its lora_a is (vocabulary, r): the row of a token is lora_b @ lora_a[token].
    table, up = rng.normal(size=(7, 3)), rng.normal(size=(4, 3))
    table, up = table.astype(np.float32), up.astype(np.float32)
    path = save_gguf(pair(table, up, name) | pair(*factors))
    rows = np.stack([up.astype(np.float64) @ row for row in table.astype(np.float64)])
    expected = {
        name: torch.from_numpy(2 * rows.T),
        "blk.0.attn_q": 2 * product(*factors),
    }
    assert_updates(path, expected)


def test_embedding_that_does_not_fit_is_refused(rng, save_gguf, refusal):
    A, B = rng.normal(size=(3, 7)).astype(np.float32), rng.normal(size=(4, 3)).astype(np.float32)
    assert "table (3, 7), up (4, 3) do not fit" in refusal(save_gguf(pair(A, B, "token_embd")))


@pytest.mark.parametrize("rank", [1, 2])
def test_every_expert_is_a_module(rng, factors, save_gguf, assert_updates, rank):
    """Of rank 1, with as many experts as outputs, they look like a convolution."""
    A, B = (rng.normal(size=shape).astype(np.float32) for shape in ((5, rank, 4), (5, 5, rank)))
    stack = pair(A, B, "blk.0.ffn_up_exps")
    expected = {f"blk.0.ffn_up_exps.{e}": 6 / rank * product(A[e], B[e]) for e in range(5)}
    path = save_gguf(stack | pair(*factors))
    assert_updates(path, expected | {"blk.0.attn_q": 2 * product(*factors)})


@pytest.mark.parametrize(
    ("a", "b"), [((2, 2, 4), (5, 2)), ((2, 4, 1, 1), (5, 2)), ((2, 4, 3, 3), (5, 2, 1, 1))]
)
def test_factors_of_a_convolution_are_refused(rng, save_gguf, refusal, a, b):
    """The product of matrices of llama.cpp is along the last axis."""
    A, B = (rng.normal(size=shape).astype(np.float32) for shape in (a, b))
    assert f"stack_a {a}, stack_b {b} do not fit" in refusal(save_gguf(pair(A, B)))


def test_others_are_left_out(rng, factors, save_gguf, scan):
    norm = {"blk.0.attn_norm.weight": (rng.normal(size=4).astype(np.float32), None)}
    [(name, reason)] = scan(save_gguf(pair(*factors) | norm)).left_out
    assert (name, reason) == ("blk.0.attn_norm.weight", "a parameter of a normalisation layer")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"general.type": "model"}, "general.type 'model'"),
        ({"general.type": None}, "general.type None"),
        ({"adapter.type": "other"}, "adapter.type 'other'"),
        ({"adapter.lora.alpha": None}, "no number adapter.lora.alpha"),
        ({"adapter.lora.alpha": "much"}, "no number adapter.lora.alpha"),
        ({"adapter.lora.alpha": float("inf")}, "scale inf"),
    ],
)
def test_other_files_are_refused(factors, save_gguf, refusal, changes, message):
    assert message in refusal(save_gguf(pair(*factors), **changes))


@pytest.mark.parametrize("name", ["blk.0.attn_q", "token_embd"])
@pytest.mark.parametrize(("lost", "left"), [("a", "up"), ("b", "down|table")])
def test_factor_without_its_other_is_refused(factors, save_gguf, refusal, name, lost, left):
    tensors = pair(*factors, name)
    del tensors[f"{name}.weight.lora_{lost}"]
    assert re.search(f"has ({left}) and no more", refusal(save_gguf(tensors)))


def test_configuration_of_peft_beside_it_is_not_its_own(factors, save_gguf):
    path = save_gguf(pair(*factors))
    (path.parent / "adapter_config.json").write_text('{"peft_type": "LORA", "lora_alpha": 100}')
    U, V = read_adapters(path)[0]["blk.0.attn_q"]
    np.testing.assert_allclose(U @ V.T, 2 * factors[1] @ factors[0], rtol=1e-5)
