"""diffusers converts the files of other trainers to the updates that are read from them."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sklora.io import read_adapters


@pytest.fixture(scope="module", autouse=True)
def diffusers():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        pytest.importorskip("peft")
        yield pytest.importorskip("diffusers")


def factors(names, separator, prefix="", rank=3):
    """Factors of linear modules, in the keys of kohya or others."""
    torch.manual_seed(1)
    down, up, alpha = separator
    tensors = {}
    for name, (n, m) in names.items():
        name = prefix + (name.replace(".", "_") if prefix.endswith("_") else name)
        tensors[name + down], tensors[name + up] = torch.randn(rank, m), torch.randn(n, rank)
        if alpha:
            tensors[name + alpha] = torch.tensor(2.0)
    return tensors


def kronecker(names, prefix, rank=3):
    """LoKr of them, every other one with a full second matrix, of which alpha means nothing."""
    torch.manual_seed(1)
    tensors = {}
    for place, (name, (n, m)) in enumerate(names.items()):
        name = prefix + (name.replace(".", "_") if prefix.endswith("_") else name)
        tensors[f"{name}.lokr_w1"], tensors[f"{name}.alpha"] = torch.randn(2, 2), torch.tensor(2.0)
        if place % 2:
            tensors[f"{name}.lokr_w2"] = torch.randn(n // 2, m // 2)
        else:
            tensors[f"{name}.lokr_w2_a"] = torch.randn(n // 2, rank)
            tensors[f"{name}.lokr_w2_b"] = torch.randn(rank, m // 2)
    return tensors


KOHYA = ".lora_down.weight", ".lora_up.weight", ".alpha"
DOTS = ".lora.down.weight", ".lora.up.weight", ".alpha"
XLABS = ".down.weight", ".up.weight", None
PEFT = ".lora_A.weight", ".lora_B.weight", None
ALPHA = ".lora_A.weight", ".lora_B.weight", ".alpha"
FLAT, DENOISER = "lora_unet_", "diffusion_model."

FLUX = {
    "double_blocks.0.img_attn.qkv": (24, 8),
    "double_blocks.0.txt_attn.proj": (8, 8),
    "double_blocks.0.img_mlp.0": (32, 8),
    "single_blocks.0.linear2": (8, 40),
}
PROCESSORS = {
    "double_blocks.0.processor.qkv_lora1": (24, 8),
    "double_blocks.0.processor.proj_lora2": (8, 8),
    "single_blocks.0.processor.proj_lora": (8, 40),
}
FLUX2 = FLUX | {"single_blocks.0.linear1": (72, 8), "txt_in": (8, 6), "final_layer.linear": (4, 8)}
PARTS = {
    "transformer_blocks.0.attn.to_add_out": (8, 8),
    "transformer_blocks.0.ff_context.linear_in": (32, 8),
    "single_transformer_blocks.0.attn.to_qkv_mlp_proj": (72, 8),
}
WAN = {f"blocks.0.{kind}_attn.{part}": (8, 8) for kind in ("self", "cross") for part in "qkvo"}
WAN |= {"blocks.0.ffn.0": (9, 8), "blocks.0.ffn.2": (8, 9)}
QWEN = {
    "transformer_blocks.0.attn.to_q": (8, 8),
    "transformer_blocks.0.attn.add_k_proj": (8, 8),
    "transformer_blocks.0.attn.to_out.0": (8, 8),
    "transformer_blocks.0.img_mlp.net.0.proj": (32, 8),
    "transformer_blocks.0.img_mod.1": (48, 8),
    "time_text_embed.timestep_embedder.linear_1": (8, 6),
}
Z_IMAGE = {
    "layers.0.attention.to_q": (8, 8),
    "layers.0.attention.to_out.0": (8, 8),
    "layers.0.feed_forward.w1": (10, 8),
    "layers.0.adaLN_modulation.0": (32, 8),
    "noise_refiner.0.attention.to_k": (8, 8),
    "context_refiner.0.feed_forward.w2": (8, 10),
    "cap_embedder.1": (8, 6),
}
FUSED = {"layers.0.attention.qkv": (24, 8), "layers.0.attention.out": (8, 8)}
LTX = {"transformer_blocks.0.attn1.to_q": (8, 8), "proj_in": (8, 6)}
LTX2 = LTX | {"patchify_proj": (8, 6), "transformer_blocks.0.audio_attn1.to_k": (8, 8)}
del LTX2["proj_in"]
HIDREAM = {
    "double_stream_blocks.0.block.attn1.to_q": (8, 8),
    "single_stream_blocks.0.block.ff_i.experts.1.w2": (8, 9),
}
HUNYUAN = {
    "double_blocks.0.img_attn_qkv": (24, 8),
    "double_blocks.0.img_mlp.fc1": (32, 8),
    "double_blocks.0.txt_attn_proj": (8, 8),
    "single_blocks.0.linear2": (8, 40),
    "txt_in.individual_token_refiner.blocks.0.self_attn_proj": (8, 8),
}
LUMINA = {
    "context_refiner.0.attention.qkv": (2304 + 2 * 768, 4),
    "context_refiner.0.attention.out": (8, 8),
} | {f"context_refiner.0.feed_forward.w{place}": (8, 9) for place in (1, 2, 3)}
ANIMA = {
    "blocks.0.self_attn.q_proj": (8, 8),
    "blocks.0.cross_attn.output_proj": (8, 8),
    "blocks.0.adaln_modulation_mlp.1": (9, 8),
    "llm_adapter.blocks.0.self_attn.q_proj": (8, 8),
}
FLUX3 = {"single_blocks.0.q_proj": (8, 8), "content_mode_blocks.0.mlp_in": (16, 8)}
IDEOGRAM = {"layers.0.attention.qkv": (24, 8), "layers.0.attention.o": (8, 8)}
KREA = {
    "blocks.0.attn.wq": (8, 8),
    "blocks.0.mlp.gate": (16, 8),
    "txtfusion.refiner_blocks.0.attn.wo": (8, 8),
    "last.linear": (4, 8),
}
MINIMAX = {
    "blocks.0.attn.qkv_proj": (24, 8),
    "blocks.0.attn.out_proj": (8, 8),
    "blocks.0.mlp.fc2": (8, 16),
    "token_refiner.blocks.0.attn.out_proj": (8, 8),
    "final_layer.video_out": (4, 8),
}
CASES = [
    ("Flux", factors(FLUX, KOHYA, FLAT)),
    ("Flux", factors(PROCESSORS, XLABS)),
    ("Flux2", factors(FLUX2, KOHYA, FLAT)),
    ("Flux2", factors(FLUX2, PEFT, DENOISER)),
    ("Flux2", kronecker(FLUX2, DENOISER)),
    ("Flux3", factors(FLUX3, PEFT, DENOISER)),
    ("Wan", factors(WAN, KOHYA, FLAT)),
    ("Wan", factors(WAN, KOHYA, DENOISER)),
    ("Wan", factors(WAN, PEFT, DENOISER)),
    ("Wan", factors(WAN, ALPHA, DENOISER)),
    ("HunyuanVideo", factors(HUNYUAN, PEFT, DENOISER)),
    ("HunyuanVideo", factors(HUNYUAN, PEFT, "transformer.")),
    ("Lumina2", factors(LUMINA, PEFT, DENOISER)),
    ("LTX2", factors(LTX2, PEFT, DENOISER)),
    ("ZImage", factors(FUSED, KOHYA, FLAT)),
    ("ZImage", factors(FUSED, DOTS, FLAT)),
    ("Anima", factors(ANIMA, PEFT, DENOISER)),
    ("Ideogram4", factors(IDEOGRAM, KOHYA)),
    ("Ideogram4", factors(IDEOGRAM, ALPHA, DENOISER)),
    ("Krea2", factors(KREA, PEFT, DENOISER)),
    ("MiniMaxH3", factors(MINIMAX, KOHYA, FLAT)),
    ("MiniMaxH3", factors(MINIMAX, ALPHA, DENOISER)),
]
# Whose makers have the names of diffusers.
SAME = [
    ("Flux2", kronecker(PARTS, "lycoris_")),
    ("HiDreamImage", factors(HIDREAM, PEFT, DENOISER)),
    ("LTXVideo", factors(LTX, PEFT, DENOISER)),
    ("QwenImage", factors(QWEN, KOHYA, FLAT)),
    ("QwenImage", factors(QWEN, KOHYA, DENOISER)),
    ("QwenImage", factors(QWEN, ALPHA, DENOISER)),
    ("QwenImage", factors(QWEN, ALPHA)),
    ("ZImage", factors(Z_IMAGE, KOHYA, FLAT)),
    ("ZImage", factors(Z_IMAGE, PEFT, DENOISER)),
    ("ZImage", factors(Z_IMAGE, DOTS, DENOISER)),
    ("ZImage", kronecker(Z_IMAGE, DENOISER)),
]


def converted(loader, tensors, folder):
    """Give the updates of a file as diffusers loads it, whose keys tell no scale any more."""
    from diffusers.loaders import lora_pipeline

    save_file(tensors, folder / "x.safetensors")
    convert = getattr(lora_pipeline, f"{loader}LoraLoaderMixin").lora_state_dict
    x = convert(str(folder), weight_name="x.safetensors")
    x = {name: tensor.double().numpy() for name, tensor in x.items()}
    updates = {}
    for key in x:
        name, _, role = key.removesuffix(".weight").rpartition(".")
        if role == "lora_A":
            updates[name] = x[f"{name}.lora_B.weight"] @ x[key]
        elif role == "lokr_w1":
            full = x.get(f"{name}.lokr_w2")
            second = x[f"{name}.lokr_w2_a"] @ x[f"{name}.lokr_w2_b"] if full is None else full
            updates[name] = np.kron(x[key], second)
    assert not [key for key in x if not key.startswith(tuple(f"{name}." for name in updates))]
    return updates


def updates_read(folder):
    [adapter] = read_adapters(folder / "x.safetensors")
    return {name: U.astype(np.float64) @ V.T.astype(np.float64) for name, (U, V) in adapter.items()}


@pytest.mark.parametrize(("loader", "tensors"), CASES)
def test_updates_are_those_that_diffusers_converts(tmp_path, loader, tensors):
    """Rows of queries, keys and values, which some have in one module, are apart in diffusers."""
    theirs = converted(loader, tensors, tmp_path)
    ours = updates_read(tmp_path).values()
    assert sum(map(len, ours)) == sum(map(len, theirs.values()))
    for name, update in theirs.items():
        rows = [
            whole[start : start + len(update)]
            for whole in ours
            for start in range(0, len(whole), len(update))
        ]
        assert any(
            np.allclose(update, part, atol=1e-5) for part in rows if part.shape == update.shape
        ), name


@pytest.mark.parametrize(("loader", "tensors"), SAME)
def test_updates_and_names_are_those_of_diffusers(tmp_path, loader, tensors):
    theirs = converted(loader, tensors, tmp_path)
    ours = updates_read(tmp_path)
    assert set(ours) == set(theirs)
    for name, update in theirs.items():
        np.testing.assert_allclose(ours[name], update, rtol=0, atol=1e-5)


def test_diffusers_and_kohya_of_stable_diffusion_have_one_name(tmp_path):
    from diffusers import StableDiffusionXLPipeline

    names = {
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q": (8, 8),
        "lora_unet_middle_block_1_proj_in": (8, 8),
        "lora_unet_output_blocks_5_1_transformer_blocks_1_ff_net_0_proj": (64, 8),
        "lora_te1_text_model_encoder_layers_0_self_attn_q_proj": (8, 8),
        "lora_te2_text_model_encoder_layers_1_mlp_fc1": (12, 8),
    }
    save_file(factors(names, KOHYA), tmp_path / "x.safetensors")
    theirs, alphas = StableDiffusionXLPipeline.lora_state_dict(
        str(tmp_path),
        weight_name="x.safetensors",
        unet_config=SimpleNamespace(layers_per_block=2),
    )
    assert set(alphas.values()) == {2}
    save_file({name: x.clone() for name, x in theirs.items()}, tmp_path / "y.safetensors")
    ours, converted = (
        read_adapters(tmp_path / file)[0] for file in ("x.safetensors", "y.safetensors")
    )
    assert set(ours) == set(converted)
    for name, (U, V) in converted.items():
        np.testing.assert_allclose(ours[name][0] @ ours[name][1].T, U @ V.T * 2 / 3, atol=1e-5)
