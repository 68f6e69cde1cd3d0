import itertools
import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sklora.io.names import canonical_name

ADAPTERS = Path(__file__).parents[2].parent / "shared" / "adapters"

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "norm1": "in_layers.0",
    "norm2": "out_layers.0",
    "time_emb_proj": "emb_layers.1",
}


def attention_modules(depth):
    yield from ("norm", "proj_in", "proj_out")
    for block in range(depth):
        for attention, layer in itertools.product(("attn1", "attn2"), ATTENTION):
            yield f"transformer_blocks.{block}.{attention}.{layer}"
        for layer in ("ff.net.0.proj", "ff.net.2"):
            yield f"transformer_blocks.{block}.{layer}"


def unet_modules(depths, middle, added):
    """Modules of a Stable Diffusion UNet: its authors' names against those of diffusers.

    Both lists are walked in the order in which the network runs, so that the authors' numbers are
    counted, not calculated.

    Parameters
    ----------
    depths : tuple of int
        Transformer blocks of an attention on each level of the way down, 0 for no attention.
    middle : int
        Those in the middle.
    added : bool
        Whether sizes are embedded too, as in SDXL.
    """
    modules = {
        "input_blocks.0.0": "conv_in",
        "time_embed.0": "time_embedding.linear_1",
        "time_embed.2": "time_embedding.linear_2",
        "out.0": "conv_norm_out",
        "out.2": "conv_out",
    }
    if added:
        modules["label_emb.0.0"] = "add_embedding.linear_1"
        modules["label_emb.0.2"] = "add_embedding.linear_2"

    def add_resnet(theirs, ours, *, shortcut):
        modules.update({f"{theirs}.{old}": f"{ours}.{new}" for new, old in RESNET.items()})
        if shortcut:
            modules[f"{theirs}.skip_connection"] = f"{ours}.conv_shortcut"

    def add_attention(theirs, ours, depth):
        modules.update({f"{theirs}.{name}": f"{ours}.{name}" for name in attention_modules(depth)})

    number = itertools.count(1)
    for level, depth in enumerate(depths):
        for layer in range(2):
            theirs, ours = f"input_blocks.{next(number)}", f"down_blocks.{level}"
            add_resnet(f"{theirs}.0", f"{ours}.resnets.{layer}", shortcut=layer == 0 < level < 3)
            if depth:
                add_attention(f"{theirs}.1", f"{ours}.attentions.{layer}", depth)
        if level < len(depths) - 1:
            modules[f"input_blocks.{next(number)}.0.op"] = f"{ours}.downsamplers.0.conv"
    add_resnet("middle_block.0", "mid_block.resnets.0", shortcut=False)
    add_attention("middle_block.1", "mid_block.attentions.0", middle)
    add_resnet("middle_block.2", "mid_block.resnets.1", shortcut=False)
    number = itertools.count()
    for level, depth in enumerate(reversed(depths)):
        for layer in range(3):
            theirs, ours = f"output_blocks.{next(number)}", f"up_blocks.{level}"
            add_resnet(f"{theirs}.0", f"{ours}.resnets.{layer}", shortcut=True)
            if depth:
                add_attention(f"{theirs}.1", f"{ours}.attentions.{layer}", depth)
        if level < len(depths) - 1:
            modules[f"{theirs}.{2 if depth else 1}.conv"] = f"{ours}.upsamplers.0.conv"
    return modules


UNETS = {
    "SD 1.5": unet_modules((1, 1, 1, 0), 1, added=False),
    "SDXL": unet_modules((0, 2, 10), 10, added=True),
}
CLIP = [
    f"text_model.encoder.layers.{layer}.{module}"
    for layer in (0, 1, 11)
    for module in (*(f"self_attn.{x}_proj" for x in ("q", "k", "v", "out")), "mlp.fc1", "mlp.fc2")
]
FLUX = [
    *(
        f"transformer_blocks.{block}.{module}"
        for block in (0, 18)
        for module in (
            *(f"attn.{layer}" for layer in ATTENTION),
            *(f"attn.add_{x}_proj" for x in "qkv"),
            "attn.to_add_out",
            "ff.net.0.proj",
            "ff.net.2",
            "ff_context.net.0.proj",
            "ff_context.net.2",
            "norm1.linear",
            "norm1_context.linear",
        )
    ),
    *(
        f"single_transformer_blocks.{block}.{module}"
        for block in (0, 37)
        for module in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp", "proj_out", "norm.linear")
    ),
    "x_embedder",
    "context_embedder",
    *(
        f"time_text_embed.{embedder}_embedder.linear_{number}"
        for embedder in ("timestep", "guidance", "text")
        for number in (1, 2)
    ),
]
# Not certain without a component, as other models have parts of these names.
FLUX_ENDS = ["norm_out.linear", "proj_out"]
FLUX_BFL = [
    *(
        f"double_blocks.{block}.{stream}_{module}"
        for block in (0, 18)
        for stream in ("img", "txt")
        for module in ("attn.qkv", "attn.proj", "mlp.0", "mlp.2", "mod.lin")
    ),
    *(
        f"single_blocks.{block}.{module}"
        for block in (0, 37)
        for module in ("linear1", "linear2", "modulation.lin")
    ),
    *("img_in", "txt_in", "final_layer.linear", "final_layer.adaLN_modulation.1"),
    *(
        f"{embedder}_in.{layer}_layer"
        for embedder in ("time", "vector", "guidance")
        for layer in ("in", "out")
    ),
]
OTHER_TRANSFORMERS = [
    # Anima
    *(
        f"blocks.27.{attention}.{layer}_proj"
        for attention in ("self_attn", "cross_attn")
        for layer in ("q", "k", "v", "output")
    ),
    "blocks.0.mlp.layer1",
    "blocks.0.mlp.layer2",
    "blocks.0.adaln_modulation_self_attn.1",
    "blocks.0.adaln_modulation_cross_attn.2",
    "blocks.0.adaln_modulation_mlp.1",
    "llm_adapter.blocks.0.cross_attn.q_proj",
    "t_embedder.1.linear_1",
    # Qwen-Image
    "transformer_blocks.0.img_mlp.net.0.proj",
    "transformer_blocks.0.txt_mlp.net.2",
    "transformer_blocks.0.img_mod.1",
    # Krea 2
    "blocks.0.attn.wq",
    "blocks.0.attn.gate",
    "blocks.0.mlp.down",
    "txtfusion.layerwise_blocks.0.attn.wk",
    "txtfusion.refiner_blocks.1.mlp.up",
    "txtfusion.projector",
    "last.linear",
    "first",
    # Stable Diffusion 3
    "joint_blocks.0.context_block.attn.qkv",
    "joint_blocks.0.x_block.adaLN_modulation.1",
    # Wan
    "blocks.0.cross_attn.k_img",
    "blocks.0.ffn.2",
    "time_embedding.0",
    "head.head",
]


def flat(path):
    return path.replace(".", "_")


def listings():
    """Yield the module names of every listing of keys beside the repository."""
    suffix = re.compile(
        r"\.(lora_(A|B|down|up|mid)\.(weight|bias)|(lokr|hada|oft|[bw]_norm)[^.]*|alpha|dora_scale|scale)$"
    )
    for path in sorted(ADAPTERS.glob("keysets_*/*.json")):
        if path.name != "MANIFEST.json":
            yield path.stem, sorted({suffix.sub("", key) for key in json.loads(path.read_text())})


@pytest.mark.parametrize("unet", UNETS)
@pytest.mark.parametrize("prefix", ["unet.", "", "base_model.model.", "unet.base_model.model."])
def test_the_unet_in_the_names_of_diffusers(unet, prefix):
    names = set(UNETS[unet].values())
    assert {canonical_name(prefix + name) for name in names} == {f"unet.{name}" for name in names}


@pytest.mark.parametrize("unet", UNETS)
@pytest.mark.parametrize("prefix", ["lora_unet_", "lycoris_"])
def test_the_unet_in_the_names_of_kohya(unet, prefix):
    for name in set(UNETS[unet].values()):
        assert canonical_name(prefix + flat(name)) == f"unet.{name}"


@pytest.mark.parametrize("unet", UNETS)
def test_the_unet_in_its_authors_names(unet):
    """Of SDXL kohya's trainer writes these."""
    for theirs, ours in UNETS[unet].items():
        for path in (
            f"lora_unet_{flat(theirs)}",
            f"model.diffusion_model.{theirs}",
            f"diffusion_model.{theirs}",
            f"unet.{theirs}",
        ):
            assert canonical_name(path) == f"unet.{ours}"


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("unet.input_blocks.0.0.op", "unet.input_blocks.0.0.op"),
        ("unet.input_blocks.1.2", "unet.input_blocks.1.2"),
        ("unet.input_blocks.12.0.in_layers.2", "unet.input_blocks.12.0.in_layers.2"),
        ("unet.input_blocks.01.0.in_layers.2", "unet.input_blocks.01.0.in_layers.2"),
        ("unet.input_blocks.3.0.in_layers.2", "unet.input_blocks.3.0.in_layers.2"),
        ("unet.input_blocks.3.0.op.weight", "unet.input_blocks.3.0.op.weight"),
        ("unet.output_blocks.12.1.proj_in", "unet.output_blocks.12.1.proj_in"),
        ("unet.middle_block.3.conv", "unet.middle_block.3.conv"),
        ("unet.middle_block.0.in_layers.7", "unet.mid_block.resnets.0.in_layers.7"),
    ],
)
def test_a_unet_of_another_build_keeps_what_is_not_known(path, name):
    assert canonical_name(path) == name


@pytest.mark.parametrize("name", CLIP)
def test_the_text_encoder(name):
    for path in (
        name,
        f"base_model.model.{name}",
        f"text_encoder.{name}",
        f"lora_te_{flat(name)}",
        f"lora_te1_{flat(name)}",
        f"lycoris_{flat(name)}",
    ):
        assert canonical_name(path) == f"text_encoder.{name}"
    for number in (2, 3):
        for path in (f"text_encoder_{number}.{name}", f"lora_te{number}_{flat(name)}"):
            assert canonical_name(path) == f"text_encoder_{number}.{name}"


def test_text_encoders_of_other_kinds():
    assert (
        canonical_name("lora_te_layers_27_self_attn_o_proj")
        == "text_encoder.layers.27.self_attn.o_proj"
    )
    assert (
        canonical_name("lora_te3_encoder_block_0_layer_1_DenseReluDense_wi_0")
        == "text_encoder_3.encoder.block.0.layer.1.DenseReluDense.wi_0"
    )


@pytest.mark.parametrize("name", FLUX + FLUX_BFL)
def test_transformers_without_a_component(name):
    for path in (name, f"base_model.model.{name}", f"lycoris_{flat(name)}"):
        assert canonical_name(path) == f"transformer.{name}"


@pytest.mark.parametrize("name", FLUX + FLUX_ENDS + FLUX_BFL + OTHER_TRANSFORMERS)
def test_transformers_with_a_component(name):
    for path in (
        f"transformer.{name}",
        f"transformer.base_model.model.{name}",
        f"diffusion_model.{name}",
        f"lora_unet_{flat(name)}",
        f"lora_transformer_{flat(name)}",
        f"lora_transformer_{name}",
    ):
        assert canonical_name(path) == f"transformer.{name}"


@pytest.mark.parametrize(
    ("path", "name"),
    [
        (
            f"{prefix}down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.{old}_lora",
            f"unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.{new}",
        )
        for prefix in ("", "unet.")
        for old, new in zip(("to_q", "to_k", "to_v", "to_out"), ATTENTION, strict=True)
    ]
    + [
        (
            f"text_encoder.text_model.encoder.layers.0.self_attn.to_{x}_lora",
            f"text_encoder.text_model.encoder.layers.0.self_attn.{x}_proj",
        )
        for x in ("q", "k", "v", "out")
    ]
    + [
        (
            f"double_blocks.3.processor.{layer}_lora{number}",
            f"transformer.double_blocks.3.{stream}_attn.{layer}",
        )
        for layer in ("qkv", "proj")
        for number, stream in ((1, "img"), (2, "txt"))
    ]
    + [
        ("single_blocks.3.processor.proj_lora", "transformer.single_blocks.3.linear2"),
        ("single_blocks.3.processor.qkv_lora", "transformer.single_blocks.3.processor.qkv_lora"),
    ],
)
def test_attention_processors(path, name):
    assert canonical_name(path) == name


@pytest.mark.parametrize(
    "path",
    [
        "model.layers.0.self_attn.q_proj",
        "transformer.h.0.attn.attention.q_proj",
        "roberta.encoder.layer.0.attention.self.query",
        "vision_model.encoder.layers.0.self_attn.q_proj",
    ],
)
def test_models_of_transformers_lose_only_the_prefix_of_peft(path):
    assert canonical_name(path) == path
    assert canonical_name(f"base_model.model.{path}") == path


@pytest.mark.parametrize(
    "path",
    [
        "base_model.model._orig_mod.model.layers.0.self_attn.q_proj",
        "_orig_mod.base_model.model.model.layers.0.self_attn.q_proj",
        "base_model.model.model.layers.0._fsdp_wrapped_module.self_attn.q_proj",
        "model.layers.0._fsdp_wrapped_module._checkpoint_wrapped_module.self_attn.q_proj",
    ],
)
def test_wrappers_are_no_part_of_a_name(path):
    assert canonical_name(path) == "model.layers.0.self_attn.q_proj"


def test_underscore_too_many_of_videox_fun():
    name = "transformer.blocks.0.cross_attn.k"
    assert canonical_name("lora_unet__blocks_0_cross_attn_k") == name
    assert canonical_name("lora_unet_blocks_0_cross_attn_k") == name


def test_wrappers_of_denoisers():
    name = "transformer.double_blocks.0.img_attn.proj"
    assert canonical_name("lora_unet__orig_mod_double_blocks_0_img_attn_proj") == name
    assert canonical_name("diffusion_model._orig_mod.double_blocks.0.img_attn.proj") == name


@pytest.mark.parametrize(
    "path",
    [
        "_orig_mod",
        "w_a_000",
        "unet:0",
        "<s1>",
        "blk.0.attn_q",
        "prior.down_blocks.0.x",
        "encoder.down_blocks.0.resnets.0.conv1",
        "decoder.blocks.0.attn.to_out",
        "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_out",
        "proj_out",
        "out.2",
        "first_stage.to_q",
        "",
        ".",
        "base_model.model.",
        "lora_unet_",
        "lycoris_",
        "unet.",
    ],
)
def test_other_names_are_left(path):
    assert canonical_name(path) == path


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("encoder.layers.0.self_attn.q_proj", "text_model.encoder.layers.0.self_attn.q_proj"),
        ("encoder.layers.3.mlp.fc1", "text_model.encoder.layers.3.mlp.fc1"),
        ("embeddings.token_embedding", "text_model.embeddings.token_embedding"),
        ("encoder.block.0.layer.0.SelfAttention.q", "encoder.block.0.layer.0.SelfAttention.q"),
        ("encoder.layers.0.self_attention.dense", "encoder.layers.0.self_attention.dense"),
    ],
)
@pytest.mark.parametrize("component", ["text_encoder", "text_encoder_2"])
def test_clip_of_transformers_5_has_the_names_of_older_ones(component, path, name):
    assert canonical_name(f"{component}.{path}") == f"{component}.{name}"


@pytest.mark.parametrize(
    "path",
    [
        "transformer_blocks.0.ff_context.linear_in",
        "single_transformer_blocks.3.attn.to_qkv_mlp_proj",
        "double_stream_modulation_img.linear",
        "joint_transformer_blocks.1.ff.linear_1",
        "distilled_guidance_layer.layers.0.linear_1",
        "condition_embedder.time_embedder.linear_1",
        "img_emb.proj.1",
    ],
)
def test_words_of_newer_transformers(path):
    flattened = path.replace(".", "_")
    assert canonical_name(f"lora_transformer_{flattened}") == f"transformer.{path}"


def test_unknown_words_stay_joined():
    assert canonical_name("lora_unet_blocks_0_my_new_part") == "transformer.blocks.0.my_new_part"
    assert canonical_name("lycoris_some_module_0_to_q") == "some_module.0.to_q"
    assert canonical_name("lycoris_some.to_q") == "lycoris_some.to_q"  # not of LyCORIS: it has dots


# Pieces that the rules look at, so that random names meet them.
PIECES = """
    base_model model lora_unet lora_te lora_transformer lycoris diffusion_model unet transformer
    text_encoder text_model encoder self_attn processor to_q_lora to_out_lora qkv_lora1 input_blocks
    output_blocks middle_block down_blocks double_blocks conv op in_layers conv_in time_embed out
    _orig_mod 0 1 2 3 01 ² x # base_model.model. lycoris_ lora_unet_ . _
"""
PIECE = st.sampled_from(PIECES.split()) | st.text(max_size=3)
PATHS = st.lists(st.tuples(PIECE, st.sampled_from(["", ".", "_"]))).map(
    lambda pieces: "".join(itertools.chain(*pieces))
)


@given(PATHS)
def test_a_canonical_name_is_its_own(path):
    name = canonical_name(path)
    assert canonical_name(name) == name


@given(PATHS.filter(lambda path: "." not in path and path and "_orig_mod" not in path))
def test_dots_are_all_that_changes_in_the_names_of_kohya(rest):
    """So two modules of one file cannot get one name."""
    assert flat(canonical_name(f"lora_transformer_{rest}")) == f"transformer_{rest}"


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "piece",
    ["base_model.model.", "lycoris_", "lora_unet_", "a", ".", "_", "9", "0_", "to_", "0.", "unet."],
)
@pytest.mark.parametrize("start", ["", "lora_unet_", "lycoris_", "unet.input_blocks.", "unet."])
def test_time_is_linear(start, piece):
    path = start + piece * 100_000
    assert len(canonical_name(path)) <= len(path) + len("transformer.")


def test_files_beside_the_repository():
    """One listing is of many files, where a module of a UNet and of CLIP has two names."""
    theirs = ("unet_input_blocks", "unet_middle_block", "unet_output_blocks", "lora_te1")
    ours = ("unet_down_blocks", "unet_mid_block", "unet_up_blocks", "lora_te_")
    for stem, paths in listings():
        for left_out in (theirs, ours):
            kept = [path for path in paths if not any(word in path for word in left_out)]
            assert len({canonical_name(path) for path in kept}) == len(kept), stem
