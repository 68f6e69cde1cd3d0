"""Damaged files, made from real ones, are refused by name or read as they announce.

There is no third way: no other exception, no crash, and no memory beyond what the file is large.
"""

import json
import re
import tracemalloc
from pathlib import Path
from typing import NamedTuple

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from sklora.io import AdapterError, read_adapters, scan_adapters

SHARED = Path(__file__).parents[3] / "shared" / "adapters"
CONFIG = "adapter_config.json"
PEFT = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 3,
    "use_rslora": True,
    "rank_pattern": {"q": 2},
    "alpha_pattern": {r"layers\.(0|1)\.q": 4},
    "base_model_name_or_path": "org/base",
    "init_lora_weights": True,
    "target_parameters": None,
}
# Sizes that have broken readers: of signs, of 32 and 64 bits, and of what NumPy and JSON hold.
NUMBERS = [
    0,
    1,
    -1,
    2,
    7,
    255,
    65536,
    2**31 - 1,
    2**31,
    2**32,
    2**40,
    2**53,
    2**62,
    2**63,
    2**64,
    10**30,
]
JSON_VALUES = [
    "null",
    "true",
    "[]",
    "{}",
    '""',
    '"q"',
    "1e999",
    "-1e999",
    "NaN",
    "0",
    "-1",
    "1.5",
    '{"q": 1}',
    "[[1]]",
]
OPTIONS = {"allow_torch_zip": True, "scale": 1.0, "on_base_model": "ignore"}


class Sample(NamedTuple):
    name: str
    content: bytes
    config: bytes | None = None
    options: dict = OPTIONS


def arrays(**shapes):
    rng = np.random.default_rng(0)
    return {
        name.replace("__", "."): rng.normal(size=shape).astype(np.float16)
        for name, shape in shapes.items()
    }


def made():
    """Make a small file of every format and container."""
    peft = {
        f"base_model.model.{name}": array
        for name, array in arrays(
            layers__0__q__lora_A__weight=(2, 3),
            layers__0__q__lora_B__weight=(4, 2),
            conv__lora_A__weight=(2, 3, 3, 3),
            conv__lora_B__weight=(4, 2, 1, 1),
            emb__lora_embedding_A=(2, 7),
            emb__lora_embedding_B=(3, 2),
            q__lora_magnitude_vector=(4,),
            classifier__bias=(4,),
        ).items()
    }
    config = json.dumps(PEFT).encode()
    yield Sample("peft", save(peft, {"format": "pt"}), config)
    experts = arrays(mlp__lora_A__weight=(6, 3), mlp__lora_B__weight=(4, 6))
    moe = {**PEFT, "rank_pattern": {}, "target_parameters": ["mlp.gate_up"]}
    yield Sample("experts", save(experts), json.dumps(moe).encode())
    lycoris = arrays(
        a__lora_down__weight=(2, 3, 1, 1),
        a__lora_mid__weight=(2, 2, 3, 3),
        a__lora_up__weight=(4, 2, 1, 1),
        a__alpha=(),
        b__hada_w1_a=(4, 2),
        b__hada_w1_b=(2, 3),
        b__hada_w2_a=(4, 2),
        b__hada_w2_b=(2, 3),
        b__dora_scale=(1, 3),
        c__lokr_w1=(2, 2),
        c__lokr_w2_a=(3, 1),
        c__lokr_w2_b=(1, 2),
        c__alpha=(),
    )
    yield Sample("lycoris", save(lycoris))
    yield Sample("lokr", save(lycoris), None, OPTIONS | {"lokr": "kronecker"})
    kohya = arrays(
        lora_unet_mid_block_attentions_0_proj_in__lora_down__weight=(2, 3),
        lora_unet_mid_block_attentions_0_proj_in__lora_up__weight=(4, 2),
        lora_unet_mid_block_attentions_0_proj_in__alpha=(),
    )
    yield Sample("kohya", save(kohya, {"ss_network_dim": "2"}))
    diffusers = arrays(
        unet__mid__to_q__lora_A__weight=(2, 3), unet__mid__to_q__lora_B__weight=(4, 2)
    )
    settings = json.dumps(
        {"unet.lora_alpha": 8, "unet.r": 2, "unet.alpha_pattern": {"mid.to_q": 4}}
    )
    yield Sample("diffusers", save(diffusers, {"lora_adapter_metadata": settings}))
    mlx = arrays(layers__0__q__lora_a=(3, 2), layers__0__q__lora_b=(2, 4))
    mlx_config = json.dumps({"model": "org/base", "lora_parameters": {"scale": 20.0, "rank": 2}})
    yield Sample("mlx", save(mlx), mlx_config.encode())
    named = {"unet:0:up": np.ones((4, 2)), "unet:0:down": np.ones((2, 3)), "<s1>": np.ones(3)}
    yield Sample("cloneofsimo", save(named))
    keys = {"keys": ("w_a_{module}", "w_b_{module}")}
    yield Sample("custom", save(arrays(w_a_0=(2, 3), w_b_0=(4, 2))), None, OPTIONS | keys)


def made_in_other_containers(folder):
    np.savez(folder / "npz", **arrays(q__lora_a=(3, 2), q__lora_b=(2, 4)))
    yield Sample("npz", (folder / "npz.npz").read_bytes())
    np.savez_compressed(folder / "packed", **arrays(q__lora_a=(3, 2), q__lora_b=(2, 4)))
    yield Sample("packed", (folder / "packed.npz").read_bytes())
    pair = [torch.ones(4, 2), torch.ones(2, 3, dtype=torch.bfloat16)]
    torch.save(pair, folder / "list")
    yield Sample("torch-list", (folder / "list").read_bytes())
    torch.save({"q.lora_up.weight": pair[0], "q.lora_down.weight": pair[1]}, folder / "dict")
    yield Sample("torch-dict", (folder / "dict").read_bytes())
    writer = gguf.GGUFWriter(folder / "gguf", "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 4.0)
    writer.add_tensor("blk.0.attn_q.weight.lora_a", np.ones((2, 32), np.float32))
    writer.add_tensor("blk.0.attn_q.weight.lora_b", np.ones((32, 2), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    yield Sample("gguf", (folder / "gguf").read_bytes())


def from_the_wild():
    keys = {"keys": ("w_a_{module}", "w_b_{module}")}
    for path in sorted(SHARED.glob("*/*")):
        if path.suffix not in (".safetensors", ".bin", ".pt"):
            continue
        config = path.parent / CONFIG
        yield Sample(
            f"{path.parent.name}/{path.name}",
            path.read_bytes(),
            config.read_bytes() if config.exists() else None,
            OPTIONS | keys if "sam_lora" in path.parts else OPTIONS,
        )


SMALL = [sample.name for sample in made()] + ["npz", "packed", "torch-list", "torch-dict", "gguf"]
WILD = [sample.name for sample in from_the_wild()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module")
def samples(folder):
    everything = [*made(), *made_in_other_containers(folder), *from_the_wild()]
    return {sample.name: sample for sample in everything}


@st.composite
def damaged(draw, content, reach):
    """Give bytes with some flipped, replaced, put in or cut, most of them within reach."""
    for _ in range(draw(st.integers(1, 3))):
        last = len(content) if draw(st.integers(0, 3)) == 0 else min(reach, len(content))
        begin = draw(st.integers(0, last))
        change = draw(
            st.sampled_from(["flip", "replace", "insert", "cut", "end", "number", "swap"])
        )
        if change == "flip" and begin < len(content):
            flipped = content[begin] ^ (1 << draw(st.integers(0, 7)))
            content = content[:begin] + bytes([flipped]) + content[begin + 1 :]
        elif change == "replace":
            new = draw(st.binary(max_size=8))
            content = content[:begin] + new + content[begin + len(new) :]
        elif change == "insert":
            content = content[:begin] + draw(st.binary(max_size=8)) + content[begin:]
        elif change == "cut":
            content = content[:begin] + content[begin + draw(st.integers(1, 64)) :]
        elif change == "end":
            content = content[:begin]
        else:
            content = draw(with_other_numbers(content, reach, change))
    return content


@st.composite
def with_other_numbers(draw, content, reach, change):
    """Replace a number in a header by another or a random one; its length is mended."""
    text, rest = content[8:reach], content[reach:]
    found = [match.span() for match in re.finditer(rb"\d+", text)]
    if len(found) < 2:
        return content
    begin, end = draw(st.sampled_from(found))
    if change == "number":
        new = str(draw(st.sampled_from(NUMBERS))).encode()
    else:
        new = text[slice(*draw(st.sampled_from(found)))]
    text = text[:begin] + new + text[end:]
    return len(text).to_bytes(8, "little") + text + rest


@st.composite
def damaged_config(draw, config):
    """Give a configuration with other values, or other bytes."""
    if draw(st.booleans()):
        return draw(damaged(config, len(config)))
    settings = json.loads(config)
    for key in draw(st.lists(st.sampled_from([*settings, *PEFT]), min_size=1, max_size=3)):
        settings[key] = f"@{draw(st.sampled_from(JSON_VALUES + NUMBERS))}@"
    return re.sub(
        r'"@(.*?)@"', lambda match: match[1].replace('\\"', '"'), json.dumps(settings)
    ).encode()


def header_end(content):
    """Where the header of a safetensors file ends; other containers have it anywhere."""
    length = int.from_bytes(content[:8], "little")
    return 8 + length if content[8:9] == b"{" and length < len(content) else len(content)


def outcome(path, options):
    """Give the collection and its numbers, or the error; no other exception is caught."""
    try:
        X = read_adapters(path, **options)
        return X, X.read()
    except AdapterError as error:
        return error


def check(folder, content, config, options):
    path = folder / "adapter"
    path.write_bytes(content)
    (folder / CONFIG).unlink(missing_ok=True)
    if config is not None:
        (folder / CONFIG).write_bytes(config)
    tracemalloc.start()
    try:
        scan = {name: value for name, value in options.items() if name != "on_base_model"}
        [report] = scan_adapters(path, **scan)
        given = outcome(path, options)
        # Honest products have up to 128 times the numbers; small files may unpack to 64 MiB.
        assert tracemalloc.get_traced_memory()[1] < 2**27 + 20 * len(content)
    finally:
        tracemalloc.stop()
    json.dumps(report.to_dict(), allow_nan=False)
    if isinstance(given, AdapterError):
        assert given.path == str(path)
        assert given.reason.isprintable()
        assert len(given.reason) < 1000
        return
    X, flat = given
    assert report.error is None
    assert flat.shape == X.shape
    assert np.isfinite(flat).all()
    sizes = {module.name: (module.n, module.m, module.rank) for module in report.modules}
    assert sizes == {name: (n, m, rank) for name, n, m, rank in X.layout.modules}
    for name, (U, V) in X[0].items():
        n, m, rank = sizes[name]
        assert (U.shape, V.shape) == ((n, rank), (m, rank))


def fuzz(folder, sample, n_examples, strategy):
    @settings(
        max_examples=n_examples,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def run(given):
        check(folder, *given, sample.options)

    run()


def examples(n_examples, *names):
    """So many examples of each in a quick run, and 100 times as many in the long one."""
    return [
        pytest.param(name, factor * n_examples, marks=marks)
        for factor, marks in ((1, ()), (100, pytest.mark.slow))
        for name in names
    ]


@pytest.mark.parametrize("name", SMALL + WILD)
def test_what_is_whole_is_read_or_refused(folder, samples, name):
    check(folder, *samples[name][1:])


@pytest.mark.parametrize(("name", "n_examples"), examples(40, *SMALL) + examples(4, *WILD))
def test_damaged_files(folder, samples, name, n_examples):
    sample = samples[name]
    content = damaged(sample.content, header_end(sample.content))
    fuzz(folder, sample, n_examples, st.tuples(content, st.just(sample.config)))


@pytest.mark.parametrize(("name", "n_examples"), examples(60, "peft", "experts", "mlx"))
def test_damaged_configurations(folder, samples, name, n_examples):
    sample = samples[name]
    configs = damaged_config(sample.config)
    fuzz(folder, sample, n_examples, st.tuples(st.just(sample.content), configs))
