"""Adapters of which only the names and shapes of the tensors are known, at full shape."""

import json
import math
from collections import Counter
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
import pytest

from sklora._untrusted import Refusal
from sklora.collection import LoRALayout
from sklora.io import read_adapters, scan_adapters
from sklora.io._plan import ReadOptions, Source
from sklora.io._tensors import TensorInfo
from sklora.io.formats import plan_adapter

ADAPTERS = Path(__file__).parents[3] / "shared" / "adapters"
SHAPES = sorted((ADAPTERS / "keysets_invokeai").glob("*_format.json"))
NAMES = sorted(ADAPTERS.glob("keysets_lora_inspector/keys.json"))

pytestmark = pytest.mark.usefixtures("shared_adapters")
RNG = np.random.default_rng(0)
ALPHA = 2.0
UP = {
    ".lora_down.weight": ".lora_up.weight",
    ".lora_A.weight": ".lora_B.weight",
    ".down.weight": ".up.weight",
    ".lokr_w1": ".lokr_w2",
}
# What each listing is, and how its file has to be read.
LISTINGS = {
    "anima_lora_kohya": ("kohya", {}),
    "anima_lora_kohya_with_te": ("kohya", {}),
    "anima_lora_lokr": ("lycoris", {}),
    "anima_lora_peft": ("diffusers", {}),
    "flux_control_lora": ("bfl", {"scale": 0.5}),
    "flux_dora_onetrainer": ("onetrainer", {}),
    "flux_lokr_bfl": ("lycoris", {"lokr": "kronecker"}),
    "flux_lora_aitoolkit": ("diffusers", {}),
    "flux_lora_diffusers_base_model": ("peft", {"scale": 0.5}),
    "flux_lora_diffusers": ("diffusers", {}),
    "flux_lora_diffusers_no_proj_mlp": ("diffusers", {}),
    "flux_lora_kohya": ("kohya", {}),
    "flux_lora_kohya_with_te1": ("kohya", {}),
    "flux_lora_xlabs": ("xlabs", {}),
    "krea2_lora_kohya": ("kohya", {}),
    "qwen_image_lora_diffusers": ("diffusers", {}),
    "qwen_image_lora_kohya": ("lycoris", {"lokr": "kronecker"}),
}


def write_sparse(path, shapes, values, dtype):
    """Write zeros of these shapes, but for some values: the rest takes no room on the disk."""
    dtype = np.dtype(dtype)
    code = {"float16": "F16", "bfloat16": "BF16"}[dtype.name]
    header, begin = {}, 0
    for name, shape in shapes.items():
        end = begin + dtype.itemsize * math.prod(shape)
        header[name] = {"dtype": code, "shape": shape, "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        start = file.tell()
        for name, value in values.items():
            file.seek(start + header[name]["data_offsets"][0])
            file.write(value.astype(dtype).tobytes())
        file.truncate(start + begin)


def small_numbers(shape, dtype):
    """Random numbers that the dtype holds exactly."""
    return (RNG.standard_normal(shape) * 0.01).astype(dtype).astype(np.float64)


class Listing:
    """A file of the shapes of a listing: zeros, but for alphas and a few of the smaller modules."""

    def __init__(self, path, folder, dtype=np.float16):
        self.format, self.options = LISTINGS[path.name.removesuffix("_format.json")]
        self.shapes = {name: tuple(shape) for name, shape in json.loads(path.read_text()).items()}
        self.modules = {}
        for name in self.shapes:
            for down, up in UP.items():
                if name.endswith(down):
                    module = name.removesuffix(down)
                    self.modules[module] = name, module + up
        by_size = sorted(self.modules, key=lambda module: (math.prod(self.size(module)), module))
        self.filled = by_size[:: max(len(by_size) // 16, 1)][:4]
        self.tensors = {
            name: small_numbers(self.shapes[name], dtype)
            for module in self.filled
            for name in self.modules[module]
        }
        alphas = {name: np.array(ALPHA) for name in self.shapes if name.endswith(".alpha")}
        self.path = folder / "adapter.safetensors"
        write_sparse(self.path, self.shapes, self.tensors | alphas, dtype)

    def scale(self, module):
        """By the rule of each format."""
        if "scale" in self.options:
            return self.options["scale"]
        down = self.modules[module][0]
        if f"{module}.alpha" not in self.shapes or down.endswith("lokr_w1"):
            return 1.0
        return ALPHA / self.shapes[down][0]

    def method(self, module):
        if "lokr" not in self.modules[module][0]:
            return "lora"
        return "lokr-kronecker" if "lokr" in self.options else "lokr"

    def size(self, module):
        """Rows, columns and rank of the update."""
        (a, b), (c, d) = (self.shapes[name] for name in self.modules[module])
        match self.method(module):
            case "lora":
                return c, b, a
            case "lokr":
                return a * c, b * d, min(a, b) * min(c, d)
            case _:
                return a * b, c * d, 1

    def apply(self, module, x):
        """The update of a module times a vector."""
        first, second = (self.tensors[name] for name in self.modules[module])
        match self.method(module):
            case "lora":
                y = second @ (first @ x)
            case "lokr":
                y = (first @ x.reshape(first.shape[1], second.shape[1]) @ second.T).ravel()
            case _:
                y = first.ravel() * (second.ravel() @ x)
        return self.scale(module) * y


@pytest.fixture(params=SHAPES, ids=[path.name.removesuffix("_format.json") for path in SHAPES])
def listing(request, tmp_path):
    return Listing(request.param, tmp_path)


def test_scan_tells_what_the_names_and_shapes_tell(listing):
    [report] = scan_adapters(listing.path, names="raw", **listing.options)
    assert report.error is None
    assert report.format == listing.format
    assert report.dtypes == ("F16",)
    assert {module.path for module in report.modules} == set(listing.modules)
    for module in report.modules:
        assert (module.n, module.m, module.rank) == listing.size(module.path)
        assert module.method == listing.method(module.path)
        assert module.scale == listing.scale(module.path)
    used = {name for names in listing.modules.values() for name in names}
    alphas = {f"{module}.alpha" for module in listing.modules}
    assert {name for name, _ in report.left_out} == set(listing.shapes) - used - alphas


def test_modules_have_names_of_their_own(listing):
    [report] = scan_adapters(listing.path, **listing.options)
    names = Counter(module.name for module in report.modules)
    assert set(names.values()) == {1}
    components = {name.partition(".")[0] for name in names}
    if listing.path.name.startswith(("flux", "qwen")):
        assert components <= {"transformer", "text_encoder"}


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("path", SHAPES, ids=[path.stem for path in SHAPES])
def test_some_modules_are_read_at_full_shape(path, dtype, tmp_path):
    listing = Listing(path, tmp_path, dtype)
    layout = LoRALayout([(name, *listing.size(name)) for name in listing.filled])
    X = read_adapters(listing.path, names="raw", layout=layout, **listing.options)
    [adapter] = X
    rng = np.random.default_rng(1)
    for name in listing.filled:
        U, V = (factor.astype(np.float64) for factor in adapter[name])
        x = rng.standard_normal(len(V))
        expected = listing.apply(name, x)
        assert np.linalg.norm(expected)
        assert np.linalg.norm(U @ (V.T @ x) - expected) <= 1e-6 * np.linalg.norm(expected)


@pytest.mark.parametrize(
    "path", [path for path in SHAPES if LISTINGS[path.name.removesuffix("_format.json")][1]]
)
def test_option_that_a_file_needs_is_named(path, tmp_path):
    listing = Listing(path, tmp_path)
    [report] = scan_adapters(listing.path)
    remedy = "lokr='kronecker'" if "lokr" in listing.options else "pass scale="
    assert remedy in report.error


def flux_modules():
    """Modules of FLUX as one listing has them: name, and sizes (out, in)."""
    [path] = [path for path in SHAPES if path.name.startswith("flux_lora_diffusers_base_model")]
    shapes = json.loads(path.read_text())
    downs = [name for name in shapes if name.endswith(".lora_A.weight")]
    for down in downs:
        up = down.replace("lora_A", "lora_B")
        module = down.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        yield module, shapes[up][0], shapes[down][1]


def rslora(n, m):
    return {"lora_A.weight": (4, m), "lora_B.weight": (n, 4)}, 4


def adalora(n, m):
    return {"lora_A": (4, m), "lora_B": (n, 4), "lora_E": (4, 1)}, 4


def loha(n, m):
    return {
        "hada_w1_a": (n, 4),
        "hada_w1_b": (4, m),
        "hada_w2_a": (n, 4),
        "hada_w2_b": (4, m),
        "alpha": (),
    }, 16


def dora(n, m):
    return {"lora_down.weight": (4, m), "lora_up.weight": (n, 4), "dora_scale": (n, 1)}, 4


def lokr(n, m):
    return {"lokr_w1": (8, 8), "lokr_w2_a": (n // 8, 4), "lokr_w2_b": (4, m // 8), "alpha": ()}, 32


def convolution(n, m):
    return {"lora_down.weight": (4, m, 3, 3), "lora_up.weight": (n, 4, 1, 1), "alpha": ()}, 4


# Roles of a method, how modules are named, the configuration, and the scale.
MADE = {
    "rslora": (
        rslora,
        "base_model.model.{}",
        {"peft_type": "LORA", "lora_alpha": 8, "use_rslora": True},
        8 / 4**0.5,
    ),
    "adalora": (
        adalora,
        "base_model.model.{}",
        {"peft_type": "ADALORA", "lora_alpha": 8},
        8 / (4 + 1e-5),
    ),
    "loha": (loha, "lora_unet_{}", None, ALPHA / 4),
    "dora": (dora, "lora_unet_{}", None, 1),
    "lokr": (lokr, "lora_unet_{}", None, ALPHA / 4),
    "convolution": (convolution, "lora_unet_{}", None, ALPHA / 4),
}


def applied(kind, tensors, scale, x):
    """The update times a vector, by the formula of the method."""
    t = tensors
    match kind:
        case "rslora":
            return scale * (t["lora_B.weight"] @ (t["lora_A.weight"] @ x))
        case "adalora":
            return scale * (t["lora_B"] @ (t["lora_E"].ravel() * (t["lora_A"] @ x)))
        case "loha":
            first = t["hada_w1_a"] @ t["hada_w1_b"]
            return scale * ((first * (t["hada_w2_a"] @ t["hada_w2_b"])) @ x)
        case "lokr":
            inner = t["lokr_w2_a"] @ (t["lokr_w2_b"] @ x.reshape(8, -1).T)
            return scale * (t["lokr_w1"] @ inner.T).ravel()
        case _:
            down, up = (
                t[role].reshape(len(t[role]), -1) for role in ("lora_down.weight", "lora_up.weight")
            )
            return scale * (up @ (down @ x))


@pytest.mark.parametrize("kind", MADE if SHAPES else [])
def test_method_that_no_file_here_has_at_full_shape(kind, tmp_path):
    roles, pattern, config, scale = MADE[kind]
    shapes, sizes = {}, {}
    for module, n, m in flux_modules():
        name = pattern.format(module if config else module.replace(".", "_"))
        own, rank = roles(n, m)
        shapes |= {f"{name}.{role}": shape for role, shape in own.items()}
        sizes[name] = n, m * (9 if kind == "convolution" else 1), rank
    smallest = min(sizes, key=lambda name: math.prod(sizes[name]))
    values = {
        name: np.array(ALPHA) if name.endswith(".alpha") else small_numbers(shape, np.float16)
        for name, shape in shapes.items()
        if name.endswith(".alpha") or name.startswith(f"{smallest}.")
    }
    path = tmp_path / "adapter_model.safetensors"
    write_sparse(path, shapes, values, np.float16)
    if config is not None:
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    [report] = scan_adapters(path, names="raw")
    assert {module.path: (module.n, module.m, module.rank) for module in report.modules} == sizes
    assert report.scales == (pytest.approx(scale, rel=1e-12),)
    assert len(report.side) == (len(sizes) if kind == "dora" else 0)
    layout = LoRALayout([(smallest, *sizes[smallest])])
    U, V = read_adapters(path, names="raw", layout=layout)[0][smallest]
    x = RNG.standard_normal(len(V))
    tensors = {name.removeprefix(f"{smallest}."): values[name] for name in values}
    expected = applied(kind, tensors, scale, x)
    deviation = np.linalg.norm(U.astype(np.float64) @ (V.T.astype(np.float64) @ x) - expected)
    assert deviation <= 1e-6 * np.linalg.norm(expected)


@pytest.mark.parametrize("alpha", [ALPHA] if SHAPES else [])
def test_gguf_at_full_shape(alpha, tmp_path):
    path = tmp_path / "adapter.gguf"
    writer = gguf.GGUFWriter(path, "flux")
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    tensors = {}
    for module, n, m in flux_modules():
        tensors[module] = small_numbers((4, m), np.float16), small_numbers((n, 4), np.float16)
        for role, array in zip(("lora_a", "lora_b"), tensors[module], strict=True):
            writer.add_tensor(f"{module}.weight.{role}", array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    [report] = scan_adapters(path, names="raw")
    sizes = {module: (len(B), A.shape[1], 4) for module, (A, B) in tensors.items()}
    assert {module.path: (module.n, module.m, module.rank) for module in report.modules} == sizes
    assert (report.format, report.container, report.scales) == ("gguf", "gguf", (alpha / 4,))
    few = list(tensors)[:2]
    layout = LoRALayout([(module, *sizes[module]) for module in few])
    for module, (U, V) in read_adapters(path, names="raw", layout=layout)[0].items():
        A, B = (factor.astype(np.float64) for factor in tensors[module])
        x = RNG.standard_normal(len(V))
        deviation = np.linalg.norm(U @ (V.T @ x) - alpha / 4 * (B @ (A @ x)))
        assert deviation <= 1e-6 * np.linalg.norm(B @ (A @ x))


# Shapes that fit together, for tensors whose names alone are known.
BY_ROLE = {
    "lora_down.weight": (4, 32),
    "lora_up.weight": (64, 4),
    "alpha": (),
    "hada_w1_a": (64, 4),
    "hada_w1_b": (4, 32),
    "hada_w2_a": (64, 4),
    "hada_w2_b": (4, 32),
    "lokr_w1": (8, 4),
    "lokr_w2": (8, 8),
    "oft_diag": (4, 16, 16),
}
FAMILIES = {
    "lora": ("kohya", ("lora_down.weight", "lora_up.weight"), "lora"),
    "hada": ("lycoris", ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"), "loha"),
    "lokr": ("lycoris", ("lokr_w1", "lokr_w2"), "lokr"),
}


def planned(names):
    """Plan a file of these tensors from its header."""
    tensors = {name: TensorInfo("F16", BY_ROLE[name.partition(".")[2]]) for name in names}
    return plan_adapter(Source("safetensors", tensors), ReadOptions())


@pytest.fixture(params=NAMES, ids=lambda path: path.parent.name)
def names(request):
    """Names of tensors that several files of Stable Diffusion had."""
    return json.loads(request.param.read_text())


def test_every_name_is_known(names):
    assert {name.partition(".")[2] for name in names} <= BY_ROLE.keys()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_complete_module_has_a_method(names, family):
    format, roles, method = FAMILIES[family]
    own = [name for name in names if name.partition(".")[2] in roles]
    modules = {name.partition(".")[0] for name in own}
    assert len(own) == len(roles) * len(modules)
    alphas = [f"{module}.alpha" for module in modules if f"{module}.alpha" in names]
    plan = planned(own + alphas)
    assert plan.format == format
    assert {module.path for module in plan.modules} == modules
    assert {module.method for module in plan.modules} == {method}
    assert len({module.name for module in plan.modules}) == len(modules)
    assert plan.left_out == ()
    components = {module.name.partition(".")[0] for module in plan.modules}
    assert components <= {"unet", "text_encoder", "text_encoder_2"}


def test_oft_is_refused_by_name(names):
    own = [name for name in names if name.endswith(".oft_diag")]
    beside = [name for name in names if ".lora_" in name]
    for some in (own, own + beside):
        with pytest.raises(Refusal, match="OFT rotates the weight"):
            planned(some)


def test_all_in_one_file_are_refused(names):
    with pytest.raises(Refusal, match="and no more, which make no update"):
        planned(names)
