"""One name for a module, whatever its trainer calls it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


PREFIX = "base_model.model."  # of PEFT
# What torch.compile, FSDP and checkpointing put around a module.
WRAPPERS = _words("_orig_mod _fsdp_wrapped_module _checkpoint_wrapped_module")

# In place of these prefixes, whose names have underscores for dots, stand dotted ones. "unet" is
# any denoiser here: `_component` tells which.
_FLAT_PREFIXES = {
    "lora_unet__blocks_": "diffusion_model.blocks.",  # of VideoX-Fun
    "lora_unet_": "diffusion_model.",
    "lora_transformer_": "transformer.",
    "lora_te_": "text_encoder.",
    "lora_te1_": "text_encoder.",
    "lora_te2_": "text_encoder_2.",
    "lora_te3_": "text_encoder_3.",
}

# The components of dotted names that can be told among underscores. Single words matter as much
# as compounds: they end the word before them.
_VOCABULARY = _words(
    """
    unet transformer text_encoder text_encoder_2 text_encoder_3 diffusion_model

    down_blocks up_blocks mid_block input_blocks middle_block output_blocks attentions resnets
    downsamplers upsamplers conv conv1 conv2 conv_in conv_out conv_norm_out conv_shortcut op
    in_layers emb_layers out_layers skip_connection time_embed label_emb time_emb_proj
    time_embedding add_embedding linear_1 linear_2

    transformer_blocks single_transformer_blocks attn attn1 attn2 to_q to_k to_v to_out
    add_q_proj add_k_proj add_v_proj to_add_out norm_q norm_k norm_added_q norm_added_k
    norm norm1 norm2 norm3 norm1_context norm2_context norm_out proj proj_in proj_out proj_mlp
    ff ff_context net time_text_embed timestep_embedder guidance_embedder text_embedder
    context_embedder x_embedder t_embedder

    double_blocks single_blocks joint_blocks context_block x_block img_attn txt_attn qkv img_mlp
    txt_mlp img_mod txt_mod img_in txt_in time_in vector_in guidance_in in_layer out_layer
    modulation lin linear linear1 linear2 final_layer adaLN_modulation query_norm key_norm

    to_qkv_mlp_proj to_qkv to_added_qkv linear_in linear_out time_guidance_embed
    double_stream_modulation_img double_stream_modulation_txt single_stream_modulation
    joint_transformer_blocks time_step_proj distilled_guidance_layer in_proj linear_3
    condition_embedder time_embedder time_proj image_embedder conv_inverted conv_depth conv_point

    blocks self_attn cross_attn output_proj ffn head adaln_modulation adaln_modulation_self_attn
    adaln_modulation_cross_attn adaln_modulation_mlp layer1 layer2 llm_adapter
    txtfusion layerwise_blocks refiner_blocks
    attention feed_forward noise_refiner context_refiner

    text_model encoder layers embeddings token_embedding position_embedding final_layer_norm
    layer_norm1 layer_norm2 text_projection q_proj k_proj v_proj o_proj out_proj mlp fc1 fc2
    gate_proj up_proj down_proj block layer SelfAttention DenseReluDense wi_0 wi_1
    """
)
_MOST_WORDS = max(word.count("_") for word in _VOCABULARY) + 1

_TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
_COMPONENTS = ("unet", "transformer", *_TEXT_ENCODERS)

# How the names begin that are a component's beyond doubt; # is a number. Whole names where there is
# but one part: "proj_out", say, is of FLUX, but of Whisper too.
_UNET = _words(
    """
    down_blocks.# up_blocks.# mid_block.attentions mid_block.resnets conv_in conv_norm_out conv_out
    time_embedding.linear_1 time_embedding.linear_2 add_embedding.linear_1 add_embedding.linear_2
    input_blocks.# middle_block.# output_blocks.#
    """
)
_TRANSFORMER = _words(
    """
    transformer_blocks.# single_transformer_blocks.# double_blocks.# single_blocks.# joint_blocks.#
    time_text_embed.timestep_embedder time_text_embed.guidance_embedder
    time_text_embed.text_embedder context_embedder x_embedder img_in txt_in
    time_in.in_layer time_in.out_layer vector_in.in_layer vector_in.out_layer
    guidance_in.in_layer guidance_in.out_layer final_layer.linear final_layer.adaLN_modulation
    """
)
_TEXT_ENCODER = _words("text_model.encoder text_model.embeddings text_model.final_layer_norm")
# And those that are only where it is known to be a denoiser.
_DENOISER_UNET = _UNET | {"time_embed.#", "label_emb.#", "out.#"}

# Parts of the UNet of Stable Diffusion as its authors named them, and as diffusers does.
_LDM_WHOLE = {
    ("input_blocks", "0", "0"): ["conv_in"],
    ("time_embed", "0"): ["time_embedding", "linear_1"],
    ("time_embed", "2"): ["time_embedding", "linear_2"],
    ("label_emb", "0", "0"): ["add_embedding", "linear_1"],
    ("label_emb", "0", "2"): ["add_embedding", "linear_2"],
    ("out", "0"): ["conv_norm_out"],
    ("out", "2"): ["conv_out"],
}
_LDM_RESNET = {
    ("in_layers", "0"): "norm1",
    ("in_layers", "2"): "conv1",
    ("emb_layers", "1"): "time_emb_proj",
    ("out_layers", "0"): "norm2",
    ("out_layers", "3"): "conv2",
    ("skip_connection",): "conv_shortcut",
}
_LDM_MIDDLE = {"0": ["resnets", "0"], "1": ["attentions", "0"], "2": ["resnets", "1"]}
_LDM_KINDS = {"0": "resnets", "1": "attentions"}
# Numbers of a block and of the layer in it. Both sides run in threes: on the way down two layers
# and a downsampler after the first convolution, on the way up three layers. Twelve are the most
# that a Stable Diffusion has.
_LDM_DOWN = {str(n): divmod(n - 1, 3) for n in range(1, 12)}
_LDM_UP = {str(n): divmod(n, 3) for n in range(12)}

# What old attention processors call the layers that they adapt. "to_out" is a list of a layer and
# a dropout in diffusers, and a layer in other models: only here is it known to be the former.
_PROCESSOR = {
    "to_q_lora": ["to_q"],
    "to_k_lora": ["to_k"],
    "to_v_lora": ["to_v"],
    "to_out_lora": ["to_out", "0"],
    "add_k_proj_lora": ["add_k_proj"],
    "add_v_proj_lora": ["add_v_proj"],
}
_TEXT_SELF_ATTENTION = {
    "to_q_lora": ["q_proj"],
    "to_k_lora": ["k_proj"],
    "to_v_lora": ["v_proj"],
    "to_out_lora": ["out_proj"],
}
# XLabs' processors of FLUX. The "qkv_lora" of single blocks is left: it adapts only those rows of
# "linear1" that give queries, keys and values.
_XLABS = {
    ("double_blocks", "qkv_lora1"): ["img_attn", "qkv"],
    ("double_blocks", "qkv_lora2"): ["txt_attn", "qkv"],
    ("double_blocks", "proj_lora1"): ["img_attn", "proj"],
    ("double_blocks", "proj_lora2"): ["txt_attn", "proj"],
    ("single_blocks", "proj_lora"): ["linear2"],
}


# Adapters of one zoo have the same modules.
@lru_cache(maxsize=2**14)
def canonical_name(path: str) -> str:
    """Name a module so that files of different trainers agree on it.

    Names become those of diffusers, with the component in front, for denoisers and text encoders,
    and those of transformers, without PEFT's prefix, for everything else; the fused layers of FLUX
    keep their authors' names. A name of no known style stays as it is. What the rules read is the
    name alone, so a part that models of several kinds have, such as a bare ``proj_out``, gets no
    component.

    Parameters
    ----------
    path : str
        What the file calls the module: a tensor's name without the suffix, such as
        ``.lora_A.weight`` or ``.lora_down.weight``, that tells the factor.

    Returns
    -------
    name : str
        Components joined by dots. A canonical name is its own canonical name.

    Examples
    --------
    >>> from sklora.io.names import canonical_name
    >>> canonical_name("base_model.model.model.layers.0.self_attn.q_proj")
    'model.layers.0.self_attn.q_proj'
    >>> canonical_name("lora_unet_mid_block_attentions_0_proj_in")
    'unet.mid_block.attentions.0.proj_in'
    >>> canonical_name("lora_unet_input_blocks_3_0_op")
    'unet.down_blocks.0.downsamplers.0.conv'
    """
    # llama.cpp's names, such as "blk.0.attn_q", stay too: its converter permutes the rows of
    # queries and keys in models of the llama type, so the update is another than PEFT's.
    bare = without(unwrapped(path), PREFIX)
    component, parts = _component(unwrapped(_unflattened(bare)))
    if component == "unet":
        parts = _from_ldm(parts)
    elif component in _TEXT_ENCODERS and _is_bare_clip(parts):
        parts = ["text_model", *parts]
    parts = _from_processors(component, parts)
    return ".".join(parts if component is None else [component, *parts])


def unwrapped(name: str) -> str:
    """Drop the components of wrappers, but never all."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS) or name


def without(name: str, prefix: str) -> str:
    """Drop a prefix as often as it is there, but never the whole name."""
    start = 0
    while name.startswith(prefix, start) and start + len(prefix) < len(name):
        start += len(prefix)
    return name[start:]


def _unflattened(name: str) -> str:
    """Give a name of kohya, LyCORIS or OneTrainer its dots back; leave any other."""
    bare = without(name, "lycoris_")
    for flat, dotted in _FLAT_PREFIXES.items():
        if bare.startswith(flat) and bare != flat:
            return dotted + _split(bare.removeprefix(flat))
    return name if bare == name or "." in name else _split(bare)


def _split(flat: str) -> str:
    """Put dots around numbers and the longest known components from the left on.

    Where there are dots, they are right already.
    """
    if "." in flat:
        return flat
    words = flat.split("_")
    parts: list[str] = []
    unknown: list[str] = []
    start = 0
    while start < len(words):
        taken = _longest_match(words, start)
        if taken == 0:
            unknown.append(words[start])
            start += 1
            continue
        if unknown:
            parts.append("_".join(unknown))
            unknown = []
        parts.append("_".join(words[start : start + taken]))
        start += taken
    if unknown:
        parts.append("_".join(unknown))
    return ".".join(parts)


def _longest_match(words: Sequence[str], start: int) -> int:
    """Count the words of the longest component that begins here, 0 if none does."""
    for n_words in range(min(_MOST_WORDS, len(words) - start), 0, -1):
        if "_".join(words[start : start + n_words]) in _VOCABULARY:
            return n_words
    return int(_is_number(words[start]))


def _is_number(part: str) -> bool:
    return part.isascii() and part.isdigit()


def _component(name: str) -> tuple[str | None, list[str]]:
    """Find the component of a pipeline that the module is in, and the module's parts in it."""
    for prefix in ("model.diffusion_model.", "diffusion_model."):
        if name.startswith(prefix):
            parts = without(name.removeprefix(prefix), PREFIX).split(".")
            return "unet" if _beginning(parts) in _DENOISER_UNET else "transformer", parts
    first, dot, rest = name.partition(".")
    if dot and first in _COMPONENTS:
        return first, without(rest, PREFIX).split(".")
    parts = name.split(".")
    beginning = _beginning(parts)
    if beginning in _UNET:
        return "unet", parts
    if beginning in _TRANSFORMER:
        return "transformer", parts
    if beginning in _TEXT_ENCODER:
        return "text_encoder", parts
    return None, parts


def _beginning(parts: Sequence[str]) -> str:
    return ".".join("#" if _is_number(part) else part for part in parts[:2])


def _is_bare_clip(parts: Sequence[str]) -> bool:
    """Tell the layers of CLIP's text model, which stand alone in transformers from version 5 on."""
    match parts:
        case ["encoder", "layers", n, "self_attn" | "mlp", _, *_]:
            return _is_number(n)
        case ["embeddings", "token_embedding" | "position_embedding"]:
            return True
    return False


def _from_ldm(parts: list[str]) -> list[str]:
    """Rename a module of the UNet from its authors' names to those of diffusers."""
    if (whole := _LDM_WHOLE.get(tuple(parts))) is not None:
        return whole
    match parts:
        case ["input_blocks", n, "0", "op"] if n in _LDM_DOWN and _LDM_DOWN[n][1] == 2:
            return ["down_blocks", str(_LDM_DOWN[n][0]), "downsamplers", "0", "conv"]
        case ["output_blocks", n, "1" | "2", "conv"] if n in _LDM_UP and _LDM_UP[n][1] == 2:
            return ["up_blocks", str(_LDM_UP[n][0]), "upsamplers", "0", "conv"]
        case ["input_blocks", n, k, *rest] if (
            n in _LDM_DOWN and _LDM_DOWN[n][1] < 2 and k in _LDM_KINDS
        ):
            block, layer = _LDM_DOWN[n]
            place = ["down_blocks", str(block), _LDM_KINDS[k], str(layer)]
        case ["output_blocks", n, k, *rest] if n in _LDM_UP and k in _LDM_KINDS:
            block, layer = _LDM_UP[n]
            place = ["up_blocks", str(block), _LDM_KINDS[k], str(layer)]
        case ["middle_block", k, *rest] if k in _LDM_MIDDLE:
            place = ["mid_block", *_LDM_MIDDLE[k]]
        case _:
            return parts
    if "resnets" in place and (layer_name := _LDM_RESNET.get(tuple(rest))) is not None:
        rest = [layer_name]
    return [*place, *rest]


def _from_processors(component: str | None, parts: list[str]) -> list[str]:
    """Rename what attention processors hold to the layers that it adapts."""
    match component, parts:
        case "transformer", [("double_blocks" | "single_blocks") as blocks, n, "processor", last]:
            return [blocks, n, *_XLABS.get((blocks, last), ["processor", last])]
        case _, [*owner, "processor", last] if last in _PROCESSOR:
            return [*owner, *_PROCESSOR[last]]
        case _, [*owner, "self_attn", last] if component in _TEXT_ENCODERS:
            return [*owner, "self_attn", *_TEXT_SELF_ATTENTION.get(last, [last])]
    return parts
