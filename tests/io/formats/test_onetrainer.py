import pytest
import torch

MODULE = "lora_transformer_single_transformer_blocks_0_attn_to_k"
NAME = "transformer.single_transformer_blocks.0.attn.to_k"


@pytest.mark.parametrize("alpha", [1.0, -6.0, 0.0, None])
def test_scale_is_alpha_over_r(normal, save, assert_updates, scan, alpha):
    A, B = normal(3, 4), normal(5, 3)
    tensors = {f"{MODULE}.lora_down.weight": A, f"{MODULE}.lora_up.weight": B}
    if alpha is not None:
        tensors[f"{MODULE}.alpha"] = torch.tensor(alpha)
    path = save(tensors)
    scale = alpha / 3 if alpha else 1
    assert_updates(path, {NAME: B.double() @ A.double() * scale}, names="canonical")
    assert scan(path).format == "onetrainer"


def test_loha_and_dora(normal, save, assert_updates, scan):
    hada = {
        "hada_w1_a": normal(5, 2),
        "hada_w1_b": normal(2, 4),
        "hada_w2_a": normal(5, 2),
        "hada_w2_b": normal(2, 4),
    }
    tensors = {f"{MODULE}.{role}": tensor for role, tensor in hada.items()}
    tensors |= {f"{MODULE}.alpha": torch.tensor(1.0), f"{MODULE}.dora_scale": normal(1, 4)}
    a1, b1, a2, b2 = (tensor.double() for tensor in hada.values())
    path = save(tensors)
    assert_updates(path, {MODULE: (a1 @ b1) * (a2 @ b2) / 2})
    assert scan(path).side == ((f"{NAME}:magnitude_in", 4),)


@pytest.mark.parametrize("kernel", [(1, 1), (3, 3)])
def test_loha_of_a_convolution(normal, save, assert_updates, kernel):
    """Its factors are those of two convolutions, of which the second is (out, r, 1, 1)."""
    a1, a2 = (normal(5, 2, 1, 1) for _ in range(2))
    b1, b2 = (normal(2, 4, *kernel) for _ in range(2))
    roles = {"hada_w1_a": a1, "hada_w1_b": b1, "hada_w2_a": a2, "hada_w2_b": b2}
    path = save(
        {f"lora_unet_conv_in.{role}": tensor for role, tensor in roles.items()}
        | {"lora_unet_conv_in.alpha": torch.tensor(1.0)}
    )
    first, second = (a.double().flatten(1) @ b.double().flatten(1) for a, b in ((a1, b1), (a2, b2)))
    assert_updates(path, {"lora_unet_conv_in": first * second / 2})


def test_embeddings_that_it_bundles_are_left_out(normal, save, scan):
    tensors = {f"{MODULE}.lora_down.weight": normal(3, 4), f"{MODULE}.lora_up.weight": normal(5, 3)}
    tensors["bundle_emb.word.clip_l"] = normal(2, 8)
    report = scan(save(tensors))
    assert report.left_out == (("bundle_emb.word.clip_l", "an embedding that was saved whole"),)


@pytest.mark.parametrize("prefix", ["lora_transformer_", "lora_prior_unet_"])
def test_prefix_tells_it_from_kohya(normal, save, scan, prefix):
    tensors = {
        f"{prefix}x.lora_down.weight": normal(3, 4),
        f"{prefix}x.lora_up.weight": normal(5, 3),
    }
    assert scan(save(tensors)).format == "onetrainer"
