import struct
import sys

import gguf
import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from hypothesis import given
from hypothesis import strategies as st

from sklora._untrusted import Refusal
from sklora.io._tensors import DTYPES, TensorInfo
from sklora.io.containers.gguf import GGUFFile

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Write tensors as the gguf package does: raw dtypes or quantised."""
    folder = tmp_path_factory.mktemp("gguf")

    def save(tensors, values=(), alignment=None) -> bytes:
        path = folder / "adapter.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        if alignment is not None:
            writer.add_custom_alignment(alignment)
        for add, key, value in values:
            getattr(writer, f"add_{add}")(key, value)
        for name, (array, kind) in tensors.items():
            writer.add_tensor(name, array, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path.read_bytes()

    return save


def text(value: str | bytes) -> bytes:
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(raw)) + raw


def tensor(name="x", shape=(2, 3), kind=0, offset=0) -> bytes:
    sizes = b"".join(struct.pack("<Q", size) for size in reversed(shape))
    return text(name) + struct.pack("<I", len(shape)) + sizes + struct.pack("<IQ", kind, offset)


def value(key="a", kind=4, content=bytes(4)) -> bytes:
    return text(key) + struct.pack("<I", kind) + content


def written(tensors=(), values=(), data=b"", version=3, n_tensors=None, n_values=None) -> bytes:
    n_tensors = len(tensors) if n_tensors is None else n_tensors
    n_values = len(values) if n_values is None else n_values
    head = b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_values)
    head += b"".join(values) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + data


ARRAYS = {"up": np.arange(6, dtype=np.float32).reshape(2, 3), "down": np.ones((3, 2), np.float16)}
VALUES = (
    ("string", "adapter.type", "lora"),
    ("float32", "adapter.lora.alpha", 16.0),
    ("bool", "flag", True),
    ("uint64", "large", 2**63),
    ("int8", "negative", -3),
    ("array", "tokens", ["a", "bc", ""]),
    ("array", "scores", [1.0, 2.0]),
)


@pytest.fixture(scope="module")
def small(saved):
    return saved({name: (array, None) for name, array in ARRAYS.items()}, VALUES)


class TestRoundTrip:
    @pytest.mark.parametrize("dtype", ["f8", "f4", "f2", "i8", "i4", "i2", "i1"])
    def test_dtypes(self, dtype, saved, read_all):
        array = np.array([[1, 0, 1], [0, 1, 1]], dtype)
        read = read_all(GGUFFile, saved({"x": (array, None)}))["x"]
        assert read.dtype == array.dtype
        np.testing.assert_array_equal(read, array)

    def test_bfloat16(self, saved, read_all):
        array = RNG.normal(size=(3, 32)).astype(ml_dtypes.bfloat16)
        read = read_all(GGUFFile, saved({"x": (array.view(np.uint8), Kind.BF16)}))["x"]
        assert read.dtype == DTYPES["BF16"]
        np.testing.assert_array_equal(read, array)

    @pytest.mark.parametrize("shape", [(5,), (3, 4), (2, 3, 4), (2, 3, 4, 5)])
    @pytest.mark.parametrize("alignment", [None, 8, 1024])
    def test_shapes(self, shape, alignment, saved, read_all):
        arrays = {name: RNG.normal(size=shape).astype(np.float32) for name in "abc"}
        raw = saved({name: (array, None) for name, array in arrays.items()}, alignment=alignment)
        for name, read in read_all(GGUFFile, raw).items():
            np.testing.assert_array_equal(read, arrays[name])

    @pytest.mark.parametrize("kind", [Kind.Q8_0, Kind.Q4_0, Kind.Q5_1])
    def test_quantised(self, kind, saved, opened):
        array = RNG.normal(size=(4, 2, 64)).astype(np.float32)
        packed = gguf.quants.quantize(array, kind)
        file = opened(GGUFFile, saved({"x": (packed, kind)}))
        assert file.tensors == {"x": TensorInfo("F32", (4, 2, 64))}
        read = file.read("x")
        assert read.dtype == np.float32
        np.testing.assert_array_equal(read, gguf.quants.dequantize(packed, kind))
        np.testing.assert_allclose(read, array, atol=0.5)

    def test_header(self, small, opened):
        file = opened(GGUFFile, small)
        assert file.container == "gguf"
        assert file.tensors == {"up": TensorInfo("F32", (2, 3)), "down": TensorInfo("F16", (3, 2))}
        assert file.metadata == {
            "general.architecture": "llama",
            "adapter.type": "lora",
            "adapter.lora.alpha": "16.0",
            "flag": "True",
            "large": str(2**63),
            "negative": "-3",
        }

    def test_by_hand(self, read_all):
        raw = written([tensor(), tensor("none", (0, 3), offset=32)], [value()], bytes(32))
        read = read_all(GGUFFile, raw)
        assert {name: array.shape for name, array in read.items()} == {"x": (2, 3), "none": (0, 3)}

    def test_empty_quantised(self, read_all):
        assert read_all(GGUFFile, written([tensor(shape=(0, 32), kind=8)]))["x"].shape == (0, 32)


HUGE = struct.pack("<Q", 2**60)
LIST = struct.pack("<IQ", 9, 2**60)
OK = [tensor()]
HOSTILE = {
    "magic": (b"GGML" + bytes(60), "does not start with GGUF"),
    "short": (b"GGUF\x03", "runs past the end"),
    "version 1": (written(version=1), "version of GGUF is 1;"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "version of GGUF is 50331648"),
    "tensors": (written(n_tensors=2**60), "1152921504606846976 tensors"),
    "tensors fewer": (written(n_tensors=200_000), "announces 200000 tensors, which take"),
    "values": (written(n_values=2**60), "1152921504606846976 values"),
    "values fewer": (written(n_values=99_999), "announces 99999 values, which take"),
    "key": (written(values=[HUGE + bytes(20)]), "a key is said to take 1152921504606846976"),
    "key past the end": (written(values=[struct.pack("<Q", 99) + b"12345"]), "99 bytes of a key"),
    "key bytes": (written(values=[value(b"\xff")]), "a key is no text"),
    "key twice": (written(values=[value(), value()]), "the key 'a' twice"),
    "list twice": (
        written(values=[value("a", 9, bytes(12)), value("a", 9, bytes(12))]),
        "the key 'a' twice",
    ),
    "value type": (written(values=[value(kind=99)]), "value of type 99"),
    "text": (written(values=[value(kind=8, content=HUGE)]), "the text of 'a' is said to take"),
    "text bytes": (written(values=[value(kind=8, content=text(b"\xff"))]), "is no text"),
    "list": (
        written(values=[value(kind=9, content=struct.pack("<IQ", 12, 2**60))]),
        "9223372036854775808 bytes of 'a'",
    ),
    "list of texts": (
        written(values=[value(kind=9, content=struct.pack("<IQ", 8, 2**60))]),
        "1152921504606846976 texts of 'a'",
    ),
    "text of a list": (
        written(values=[value(kind=9, content=struct.pack("<IQ", 8, 1) + HUGE)]),
        "1152921504606846976 bytes of 'a'",
    ),
    "list of lists": (written(values=[value(kind=9, content=LIST * 3)]), "values of type 9"),
    "list type": (
        written(values=[value(kind=9, content=struct.pack("<IQ", 77, 1))]),
        "list of values of type 77",
    ),
    "alignment 0": (
        written(values=[value("general.alignment", 4, bytes(4))]),
        "general.alignment is 0",
    ),
    "alignment 3": (
        written(values=[value("general.alignment", 4, struct.pack("<I", 3))]),
        "general.alignment is 3",
    ),
    "alignment huge": (
        written(values=[value("general.alignment", 10, HUGE)]),
        "general.alignment is 1152921504606846976",
    ),
    "alignment text": (
        written(values=[value("general.alignment", 8, text("32"))]),
        "general.alignment is '32'",
    ),
    "name": (written([tensor("\n")], data=bytes(24)), "no printable text"),
    "name length": (written([HUGE + bytes(30)]), "name of a tensor is said to take"),
    "name twice": (written([tensor(), tensor(offset=32)], data=bytes(56)), "tensor 'x' twice"),
    "dimensions": (
        written([text("x") + struct.pack("<I", 2**31) + bytes(30)]),
        "2147483648 sizes",
    ),
    "shape": (written([tensor(shape=(2**62,))]), "sizes from 0"),
    "shape product": (written([tensor(shape=(2**30, 2**30))]), "larger than any adapter"),
    "past the end": (written([tensor()], data=bytes(23)), "or the end of the file"),
    "gigabytes": (written([tensor(shape=(2**32,))]), "or the end of the file"),
    "offset": (written([tensor(offset=2**60)], data=bytes(24)), "offset 1152921504606846976"),
    "offset unaligned": (written([tensor(offset=4)], data=bytes(28)), "no multiple of 32"),
    "overlap": (
        written([tensor(shape=(9,)), tensor("y", offset=32)], data=bytes(60)),
        "tensor 'y' at bytes .* overlaps the one before",
    ),
    "one place": (written([tensor(), tensor("y")], data=bytes(24)), "overlaps the one before"),
    "type": (written([tensor(kind=999)]), "type 999, which the gguf package does not unpack"),
    "type removed": (written([tensor(kind=4)]), "type 4, which the gguf package"),
    "type without unpacking": (written([tensor(kind=Kind.Q8_1)]), "type 9, which the gguf package"),
    "blocks": (written([tensor(kind=Kind.Q8_0)]), "quantised in blocks of 32"),
    "blocks of nothing": (written([tensor(shape=(), kind=Kind.Q8_0)]), "quantised in blocks"),
}  # fmt: skip


class TestHostile:
    @pytest.mark.parametrize(("raw", "message"), HOSTILE.values(), ids=HOSTILE.keys())
    def test_refused(self, raw, message, opened, little_memory):
        with little_memory(2**20), pytest.raises(Refusal, match=message):
            opened(GGUFFile, raw)

    def test_long_header(self, opened):
        values = [
            value(f"{index}", 9, struct.pack("<IQ", 0, 2**24) + bytes(2**24)) for index in "abc"
        ]
        with pytest.raises(Refusal, match="that a header may take"):
            opened(GGUFFile, written(values=values))

    def test_many_texts(self, opened):
        content = struct.pack("<IQ", 8, 5_000_000)
        with pytest.raises(Refusal, match="5000000 texts of 'a'"):
            opened(GGUFFile, written(values=[value("a", 9, content + bytes(40_000_000))]))

    def test_without_the_package(self, monkeypatch, opened, read_all):
        for name in [name for name in sys.modules if name.split(".")[0] == "gguf"]:
            monkeypatch.setitem(sys.modules, name, None)
        raw = written([tensor(shape=(1, 32), kind=Kind.Q8_0)], data=bytes(34))
        with pytest.raises(Refusal, match=r"pip install 'sklora\[gguf\]'"):
            opened(GGUFFile, raw)
        assert read_all(GGUFFile, written(OK, data=bytes(24)))["x"].shape == (2, 3)

    @pytest.mark.parametrize("kind", [Kind.Q8_0, Kind.Q4_K, Kind.IQ2_XXS, Kind.TQ1_0, Kind.MXFP4])
    @given(data=st.data())
    def test_any_blocks(self, kind, data, read_all):
        block, n_bytes = gguf.GGML_QUANT_SIZES[kind]
        packed = data.draw(st.binary(min_size=2 * n_bytes, max_size=2 * n_bytes))
        read = read_all(GGUFFile, written([tensor(shape=(2, block), kind=kind)], data=packed))["x"]
        assert (read.shape, read.dtype) == ((2, block), np.float32)


class TestDamage:
    @given(data=st.data())
    def test_bytes(self, data, small, damage, assert_refused_or_read):
        assert_refused_or_read(GGUFFile, data.draw(damage(small)))
