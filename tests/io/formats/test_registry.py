import pytest
import torch

from sklora import LoRACollection
from sklora.io.formats import FORMATS

LORA = {"lora_unet_x.lora_down.weight": (3, 4), "lora_unet_x.lora_up.weight": (5, 3)}

REFUSED = {
    "lora_unet_x.oft_diag": "OFT rotates",
    "lora_te_x.oft_blocks": "OFT rotates",
    "base_model.model.q.oft_r.default": "OFT rotates",
    "base_model.model.q.oft_R.weight": "OFT rotates",
    "lora_unet_x.boft_blocks": "BOFT rotates",
    "base_model.model.q.boft_R": "BOFT rotates",
    "base_model.model.q.ia3_l": "IA3 multiplies",
    "lora_unet_x.on_input": "IA3 multiplies",
    "base_model.model.q.hira_A": "HiRA multiplies",
    "base_model.model.q.vera_lambda_b": "input width of each module",
    "base_model.model.q.fourierft_spectrum": "full rank",
    "lora_unet_x.lambda_layer": "T-LoRA's update is a difference",
    "lora_unet_x.bias_indices": "a sparse part belongs to the update",
    "lora_unet_x.a1.weight": "GLoRA multiplies",
    "lora_controlnet": "a control LoRA is a network of its own",
    "unet.lora_controlnet": "a control LoRA is a network of its own",
    "layers.0.attn.q_proj.lora_a.weight": "after its export to PEFT",
}


@pytest.mark.parametrize(("name", "reason"), REFUSED.items())
@pytest.mark.parametrize("beside", [{}, LORA], ids=["alone", "beside LoRA"])
def test_other_methods_are_refused_by_name(normal, save, refusal, name, reason, beside):
    tensors = {key: normal(*shape) for key, shape in beside.items()}
    why = refusal(save(tensors | {name: normal(2, 3)}))
    assert why.startswith(f"tensor {name!r}: ")
    assert reason in why


@pytest.mark.parametrize(
    "names", [["a", "b"], ["model.weight"], ["x" * 900], ["q.lora_C.weight"], ["lora_A.weight"]]
)
def test_unknown_keys_are_refused_with_some_of_them_and_the_remedy(normal, save, refusal, names):
    why = refusal(save({name: normal(2, 3) for name in names}))
    tensors = f"{len(names)} tensor{'s' if len(names) > 1 else ''}"
    assert f"no adapter that sklora knows has its {tensors}, such as " in why
    assert names[0][:20] in why
    assert "pass keys=" in why
    assert len(why) < 500


def test_dense_differences_alone_are_refused_by_name(normal, save, refusal):
    why = refusal(save({"lycoris_x.diff_b": normal(2), "lycoris_x.diff": normal(2, 3)}))
    assert "'lycoris_x.diff' is a dense difference" in why
    for name in ("model.diffusion_model.out.weight", "blocks.0.diff_b", "my_diff"):
        assert "dense" not in refusal(save({name: normal(2, 3)}))


MIXED = {
    "diffusers": ("unet.x.lora_A.weight", "unet.x.lora_B.weight"),
    "kohya": ("lora_te_x.lora_down.weight", "lora_te_x.lora_up.weight"),
    "cloneofsimo": ("unet:0:down", "unet:0:up"),
    "onetrainer": ("lora_transformer_x.lora_down.weight", "lora_transformer_x.lora_up.weight"),
    "old diffusers": ("unet.y.to_q_lora.down.weight", "unet.y.to_q_lora.up.weight"),
    "mlx": ("model.x.lora_a", "model.x.lora_b"),
    "lokr": ("unet.w.lokr_w1", "unet.w.lokr_w2"),
    "named": ("unet.z.lora_A.default.weight", "unet.z.lora_B.default.weight"),
}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("diffusers", "kohya"),
        ("kohya", "old diffusers"),
        ("cloneofsimo", "kohya"),
        ("onetrainer", "diffusers"),
        ("diffusers", "cloneofsimo"),
        ("kohya", "mlx"),
        ("diffusers", "named"),
        ("diffusers", "lokr"),
    ],
)
def test_file_of_two_formats_is_refused(save, refusal, one, other):
    """There are loaders that apply both, and what is read would be a part of the update."""
    tensors = {}
    for down, up in (MIXED[one], MIXED[other]):
        tensors |= {down: torch.ones(3, 3), up: torch.ones(3, 3)}
    why = refusal(save(tensors))
    assert "mixes two formats: split it" in why
    assert any(repr(name) in why for name in MIXED[one] + MIXED[other])


def test_flux_in_the_names_of_its_makers_and_of_diffusers_is_refused(save, refusal):
    """Both are one module here, and ComfyUI applies the second alone."""
    modules = (
        "lora_unet_double_blocks_0_img_attn_proj",
        "lora_transformer_transformer_blocks_0_attn_to_out_0",
    )
    names = [f"{module}.lora_{role}.weight" for module in modules for role in ("down", "up")]
    why = refusal(save({name: torch.ones(3, 3) for name in names}))
    assert "'transformer.double_blocks.0.img_attn.proj' and 'transformer.transformer_blocks" in why
    assert "split the file" in why


CLONEOFSIMO = {name: torch.ones(3, 3) for name in MIXED["cloneofsimo"]}


@pytest.mark.parametrize(
    "factor",
    [
        *(f"x.lora_{role}.weight" for role in ("down", "up", "mid", "A", "B")),
        *("lora_A", "x.lora_B.default.weight", "x.lora_a", "x.lora_b", "x.lora_E"),
        *("x.lora_embedding_A", "x.lora_embedding_B.default"),
        *("x.hada_w1", "x.hada_w2_a", "x.hada_w1_b", "x.hada_t1"),
        *("x.lokr_w1", "x.lokr_w2_a", "x.lokr_w1_b", "x.lokr_t2"),
        *("x.lora.down.weight", "x.to_q_lora.up.weight", "x.qkv_lora1.down.weight"),
        *("x.lora_linear_layer.up.weight", ":up", ":down"),
        *("x.default_lora_latent_mapping.weight", "x_lora_latent_mapping.weight"),
    ],
)
def test_factor_of_any_trainer_is_told(save, refusal, factor):
    why = refusal(save(CLONEOFSIMO | {factor: torch.ones(3, 3)}))
    assert why.startswith(f"tensor {factor!r} is a factor of an update")


@pytest.mark.parametrize(
    "name",
    [
        *("x.lora_C.weight", "x.my_lora_A", "x.hada_w1_c", "x.lokr_w", "x.lora_A.a.b.weight"),
        *("x.lora_B.bias", "x.lora_A.alpha", "x.down.weight", "x.lora.down.weights", "x:upper"),
    ],
)
def test_other_names_are_those_of_no_factor(save, scan, name):
    report = scan(save(CLONEOFSIMO | {name: torch.ones(3, 3)}))
    assert [tensor for tensor, _ in report.left_out] == [name]


KOHYA = ("x.lora_down.weight", "x.lora_up.weight")
DIFFUSERS = ("unet.x.lora_A.weight", "unet.x.lora_B.weight")
FLAT = ("lora_te_x.lora_down.weight", "lora_te_x.lora_up.weight")
HADA = tuple(f"lora_te_x.q.hada_w{place}" for place in ("1_a", "1_b", "2_a", "2_b"))
NEWER = ("unet.x.lora.down.weight", "unet.x.lora.up.weight")
OLD = ("unet.x.processor.to_q_lora.down.weight", "unet.x.processor.to_q_lora.up.weight")
XLABS = tuple(f"double_blocks.0.processor.qkv_lora1.{role}.weight" for role in ("down", "up"))
HCP = ("unet.x.___.layer.lora_down.weight", "unet.x.___.layer.lora_up.weight")


@pytest.mark.parametrize(
    ("factors", "scale"),
    [
        (HCP, "unet.x.___.alpha"),
        (HCP, "unet.x.___.scale"),
        (KOHYA, "x.scale"),
        (KOHYA, "x.lora_alpha"),
        (KOHYA, "x.lora_down.alpha"),
        (DIFFUSERS, "unet.x.scaling"),
        (DIFFUSERS, "unet.x.scalar"),
        (DIFFUSERS, "unet.x.lora_scale"),
        (DIFFUSERS, "unet.x.lora_alpha"),
        (DIFFUSERS, "unet.x.network_alpha"),
        (DIFFUSERS, "unet.x.lora_A.alpha"),
        (DIFFUSERS, "unet.x.alpha.default"),
        (DIFFUSERS, "unet.x.lora.alpha"),
        (NEWER, "unet.x.lora.alpha"),
        (FLAT, "lora_te_x.alpha_2"),
        (FLAT, "lora_te_x.alpha.2"),
        (FLAT, "lora_te_x.my_alpha"),
        (FLAT, "lora_te_x.lora_down_2"),
        (FLAT, "lora_te_x.lora_down.bias"),
        (FLAT, "lora_te_x.hada_1"),
        (FLAT, "lora_te_x.lokr_1"),
        (HADA, "lora_te_x_q.alpha"),
        (HADA, "lora_te.x_q.alpha"),
        (OLD, "unet.x.processor.to_q.alpha"),
        (OLD, "unet.x.to_q.alpha"),
        (XLABS, "double_blocks.0.img_attn.qkv.alpha"),
    ],
)
def test_scale_in_another_place_is_refused(save, refusal, factors, scale):
    """Without it the update would be read at another size.

    sd-scripts takes any tensor of a module with "alpha" in its name for alpha, and the length of
    any with "lora_down" for its rank. OneTrainer once wrote alphas of LoHa under another name, and
    ComfyUI looks for those of old files of diffusers there.
    """
    tensors = {name: torch.ones(3, 3) for name in factors} | {"a.bias": torch.ones(3)}
    why = refusal(save(tensors | {scale: torch.tensor(0.5)}))
    assert why.startswith(f"tensor {scale!r} may be the scale")
    assert "pass keys= and scale=" in why


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("lora_te_x.diff", (3, 3)),
        ("lora_te_x.set_weight", (3, 3)),
        ("lora_te_x.w_norm", (3,)),
        ("lora_te_x.bias", (3, 3)),
        ("text_encoder.x.diff", (3, 3)),
    ],
)
def test_whole_weight_of_a_module_with_factors_is_refused(save, refusal, name, shape):
    """ComfyUI takes it in place of the factors, and AUTOMATIC1111 adds such a bias to them."""
    tensors = {factor: torch.ones(3, 3) for factor in FLAT} | {"a.bias": torch.ones(3)}
    why = refusal(save(tensors | {name: torch.ones(shape)}))
    assert why.startswith(f"tensor {name!r} is dense, but module 'lora_te_x' has factors as well")
    assert "take one of them out" in why


@pytest.mark.parametrize("name", ["unet.x.to_q.diff", "unet.x.processor.to_q.set_weight"])
def test_whole_weight_beside_attention_processors_is_refused(save, refusal, name):
    tensors = {factor: torch.ones(3, 3) for factor in (*OLD, name)}
    why = refusal(save(tensors))
    assert why.startswith(f"tensor {name!r} is dense, but module 'unet.x.processor.to_q_lora' has")


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("lora_te_x.bias", (3,)),
        ("lora_te_x.diff_b", (3,)),
        ("lora_te_y.diff", (3, 3)),
        ("lora_te_y.bias", (3, 3)),
        ("diff", (3, 3)),
    ],
)
def test_bias_and_dense_differences_of_other_modules_are_left_out(save, scan, name, shape):
    tensors = {factor: torch.ones(3, 3) for factor in FLAT}
    report = scan(save(tensors | {name: torch.ones(shape)}))
    assert [tensor for tensor, _ in report.left_out] == [name]


def test_bias_of_a_module_with_one_input_is_left_out(save, scan):
    """It has as many numbers as the whole weight."""
    tensors = {name: torch.ones(3, 1) for name in (FLAT[1], "lora_te_x.bias")}
    report = scan(save(tensors | {FLAT[0]: torch.ones(1, 1)}))
    assert [tensor for tensor, _ in report.left_out] == ["lora_te_x.bias"]


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        *(("visual.logit_scale", ()), ("unet.scale", ()), ("unet.x.norm.scale", (3,))),
        *(("y.alpha", ()), ("unet.y.alpha", ())),
        *(("unet.x.my_scale", ()), ("unet.x.scale.other", ())),
    ],
)
def test_other_numbers_are_left_out(save, scan, name, shape):
    tensors = {
        name: torch.ones(3, 3) for name in (*DIFFUSERS, *(x.replace("x", "z") for x in DIFFUSERS))
    }
    report = scan(save(tensors | {name: torch.ones(shape)}))
    assert [tensor for tensor, _ in report.left_out] == [name]


def test_packed_zoo_is_refused_by_name(rng, tmp_path, refusal):
    adapter = {"q": (rng.normal(size=(3, 2)), rng.normal(size=(4, 2)))}
    LoRACollection.from_factors([adapter]).save(tmp_path / "zoo.safetensors")
    assert "LoRACollection.open" in refusal(tmp_path / "zoo.safetensors")


def test_file_without_tensors_is_refused(save, refusal):
    for config in (None, {"peft_type": "LORA"}):
        assert refusal(save({}, config)).startswith("it holds no tensors")


@pytest.mark.parametrize(
    ("names", "format"),
    [
        (["lora_unet_x.lora_down.weight", "lora_unet_x.lora_up.weight"], "kohya"),
        (["x.lora_down.weight", "x.lora_up.weight"], "kohya"),
        (["lora_prior_unet_x.lora_down.weight", "lora_prior_unet_x.lora_up.weight"], "onetrainer"),
        (["lycoris_x.lora_down.weight", "lycoris_x.lora_up.weight"], "kohya"),
        (["unet.x.lora.down.weight", "unet.x.lora.up.weight"], "diffusers"),
        (["diffusion_model.x.lora_A.weight", "diffusion_model.x.lora_B.weight"], "diffusers"),
        (["unet:0:down", "unet:0:up"], "cloneofsimo"),
        (["double_blocks.0.x.lora_down.weight", "double_blocks.0.x.lora_up.weight"], "kohya"),
        (["double_blocks.0.x.lora.down.weight", "double_blocks.0.x.lora.up.weight"], "diffusers"),
        (
            ["single_blocks.0.processor.x.down.weight", "single_blocks.0.processor.x.up.weight"],
            "xlabs",
        ),
        (["single_blocks.0.x.lora_A.weight", "single_blocks.0.x.lora_B.weight"], "bfl"),
    ],
)
def test_format_is_told_by_keys_whatever_lies_beside_them(save, scan, names, format):
    down, up = names
    path = save({down: torch.ones(3, 4), up: torch.ones(5, 3), "other.bias": torch.ones(5)})
    report = scan(path, scale=1 if format == "bfl" else None)
    assert (report.format, [name for name, _ in report.left_out]) == (format, ["other.bias"])


@pytest.mark.parametrize(
    "marker",
    ["lora_down.weight", "lora_up.weight", "hada_w1_a", "lora_a", "lora_b", "lora_A.weight"],
)
def test_format_without_a_complete_module_is_refused(normal, save, refusal, marker):
    assert "and no more" in refusal(save({f"lora_unet_x.{marker}": normal(2, 3)}), scale=1)


def test_every_format_states_its_scale_and_source():
    modules = {format.plan.__module__ for format in FORMATS}
    assert len(modules) == 10
    for name in modules:
        doc = __import__(name, fromlist=["__doc__"]).__doc__
        assert "Scale" in doc
        assert "`" in doc or name.endswith("custom")


@pytest.mark.parametrize(
    ("component", "new", "refused"),
    [
        ("unet", "conv_in", True),  # before mid_block, so that diffusers looks at this name
        ("unet", "up_blocks.0.resnets.0.conv1", False),
        ("text_encoder", "encoder.layers.0.mlp.fc1", False),
    ],
)
def test_older_keys_of_diffusers_behind_newer_ones_are_refused(
    pair, save, scan, refusal, component, new, refused
):
    """diffusers converts all of a denoiser, or none: `load_lora_adapter` looks at the first key."""
    A, B = pair
    old = f"{component}.mid_block.attentions.0.transformer_blocks.0.attn1.to_k.lora"
    new = f"{component}.{new}"
    path = save(
        {
            f"{old}.down.weight": A,
            f"{old}.up.weight": B,
            f"{new}.lora_A.weight": A,
            f"{new}.lora_B.weight": B,
        }
    )
    if refused:
        assert "so that diffusers leaves out the former" in refusal(path)
    else:
        assert len(scan(path).modules) == 2
