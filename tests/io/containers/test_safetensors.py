import json

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save

from sklora._untrusted import Refusal
from sklora.io import _tensors
from sklora.io._tensors import DTYPES, TensorInfo
from sklora.io.containers.safetensors import SafetensorsFile

A = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
SMALL = save(
    {"up": np.arange(6, dtype=np.float32).reshape(2, 3), "alpha": np.array(4, np.float16)},
    metadata={"rank": "3"},
)


def written(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


class TestRoundTrip:
    @pytest.mark.parametrize("name", DTYPES)
    def test_dtypes(self, name, read_all):
        array = np.array([[1, 0, 1], [0, 1, 1]]).astype(DTYPES[name])
        entry = {"dtype": name, "shape": [2, 3], "data_offsets": [0, array.nbytes]}
        read = read_all(SafetensorsFile, written({"x": entry}, array.tobytes()))["x"]
        assert read.dtype == array.dtype
        np.testing.assert_array_equal(read, array)

    @pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.int64, np.bool_])
    def test_as_the_library_writes(self, dtype, rng, read_all):
        arrays = {
            "matrix": rng.normal(size=(3, 4)).astype(dtype),
            "scalar": np.array(1, dtype),
            "none": np.zeros((0, 4), dtype),
        }
        read = read_all(SafetensorsFile, save(arrays))
        assert read.keys() == arrays.keys()
        for name, array in arrays.items():
            assert read[name].dtype == array.dtype
            np.testing.assert_array_equal(read[name], array)

    def test_header(self, opened):
        file = opened(SafetensorsFile, SMALL)
        assert file.container == "safetensors"
        assert file.tensors == {"up": TensorInfo("F32", (2, 3)), "alpha": TensorInfo("F16", ())}
        assert file.metadata == {"rank": "3"}

    def test_null_metadata_of_mlx(self, opened):
        file = opened(SafetensorsFile, written({"__metadata__": None, "a": A}, bytes(8)))
        assert file.metadata == {}

    def test_any_byte_is_true_but_zero(self, read_all):
        entry = {"dtype": "BOOL", "shape": [3], "data_offsets": [0, 3]}
        read = read_all(SafetensorsFile, written({"x": entry}, b"\x00\x01\xff"))["x"]
        assert read.view(np.uint8).tolist() == [0, 1, 1]

    def test_files_of_the_wild(self, shared_adapters, opened):
        for path in shared_adapters.glob("*/*.safetensors"):
            if path.parent.name == "safetensors_attack":
                continue
            expected = load_file(path)
            file = opened(SafetensorsFile, path.read_bytes())
            assert file.tensors.keys() == expected.keys()
            for name, array in expected.items():
                np.testing.assert_array_equal(file.read(name), array)


NESTED = b"[" * 100_000 + b"]" * 100_000
HOSTILE = {
    "no length": (b"\x00\x00", "length of the header of 8 bytes runs past the end"),
    "length 0": (written(b""), "starts with b''"),
    "length past the end": ((2**20).to_bytes(8, "little") + b"{}", "runs past the end"),
    "length 2^63": ((2**63).to_bytes(8, "little") + b"{}", "of at most 100000000"),
    "space before": (written(b" {}"), "starts with b' {}'"),
    "list": (written(b"[]"), "starts with"),
    "no JSON": (written(b"{]"), "no JSON"),
    "trailing garbage": (written(b"{}x"), "no JSON"),
    "no UTF-8": (written(b'{"\xff": 1}'), "no JSON"),
    "nested": (written(b'{"a":' + NESTED + b"}"), "no JSON"),
    "nested less": (written(b'{"a":' + b"[" * 500 + b"]" * 500 + b"}"), "must have a dtype"),
    "nested shape": (
        written(
            b'{"a":{"dtype":"F32","data_offsets":[0,8],"shape":' + NESTED[99_500:100_500] + b"}}"
        ),
        "lists of integers",
    ),
    "many values": (written(b'{"a":[' + b"[]," * 3_000_000 + b"0]}"), "some 6000003 values"),
    "long integer": (written(b'{"a":' + b"9" * 5000 + b"}"), "no JSON"),
    "NaN": (written(b'{"a":NaN}'), "holds NaN"),
    "infinity": (written(b'{"a":-Infinity}'), "holds -Infinity"),
    "twice": (written(b'{"a":1,"b":1,"a":1}'), "names 'a' twice"),
    "field twice": (written(b'{"a":{"dtype":"F32","dtype":"F16"}}'), "names 'dtype' twice"),
    "metadata number": (written({"__metadata__": {"rank": 4}}), "__metadata__"),
    "metadata list": (written({"__metadata__": ["rank"]}), "__metadata__"),
    "metadata surrogate": (written({"__metadata__": {"a": "\ud800"}}), "no Unicode"),
    "entry": (written({"a": 3}), "must have a dtype, shape and data_offsets"),
    "field too few": (written({"a": {"dtype": "F32", "shape": []}}), "must have a dtype"),
    "field too many": (written({"a": {**A, "x": 0}}), "must have a dtype"),
    "dtype F4": (written({"a": {**A, "dtype": "F4"}}), "the dtype 'F4', which is not read"),
    "dtype list": (written({"a": {**A, "dtype": ["F32"]}}), "a text as its dtype"),
    "shape text": (written({"a": {**A, "shape": "2"}}), "lists of integers"),
    "shape float": (written({"a": {**A, "shape": [2.0]}}), "lists of integers"),
    "shape bool": (written({"a": {**A, "shape": [True]}}), "lists of integers"),
    "shape negative": (written({"a": {**A, "shape": [-2]}}), r"the shape \(-2,\)"),
    "shape huge": (written({"a": {**A, "shape": [2**62]}}), "sizes from 0"),
    "shape product": (written({"a": {**A, "shape": [2**20] * 3}}), "larger than any adapter"),
    "dimensions": (written({"a": {**A, "shape": [1] * 9}}), "up to 8 sizes"),
    "name control": (written({"a\0": A}, bytes(8)), "no printable text"),
    "name empty": (written({"": A}, bytes(8)), "no printable text"),
    "offsets one": (written({"a": {**A, "data_offsets": [0]}}), "must have data_offsets"),
    "offsets negative": (written({"a": {**A, "data_offsets": [-8, 0]}}), "0 <= begin <= end"),
    "offsets reversed": (written({"a": {**A, "data_offsets": [8, 0]}}), "0 <= begin <= end"),
    "offsets digits": (
        written({"a": {**A, "data_offsets": [10**4298, 10**4298 + 8]}}),
        "end <= 1099511627776",
    ),
    "offsets size": (
        written({"a": {**A, "data_offsets": [0, 4]}}, bytes(4)),
        r"takes 8 bytes, but data_offsets \[0, 4\] are 4 bytes",
    ),
    "past the end": (written({"a": A}, bytes(7)), "take 8 bytes, but 7 bytes follow"),
    "trailing bytes": (written({"a": A}, bytes(9)), "take 8 bytes, but 9 bytes follow"),
    "hole": (written({"a": {**A, "data_offsets": [1, 9]}}, bytes(9)), "follows a hole"),
    "overlap": (
        written({"a": A, "b": {**A, "data_offsets": [4, 12]}}, bytes(12)),
        "'b' at bytes 4 to 12 overlaps",
    ),
    "one range": (written({"a": A, "b": A}, bytes(8)), "'b' at bytes 0 to 8 overlaps"),
    "terabytes": (
        written({"a": {"dtype": "F64", "shape": [2**39], "data_offsets": [0, 2**42]}}),
        "0 <= begin <= end",
    ),
    "gigabytes": (
        written({"a": {"dtype": "F32", "shape": [2**32], "data_offsets": [0, 2**34]}}),
        "take 17179869184 bytes, but 0 bytes follow",
    ),
}


class TestHostile:
    @pytest.mark.parametrize(("raw", "message"), HOSTILE.values(), ids=HOSTILE.keys())
    def test_refused(self, raw, message, opened):
        with pytest.raises(Refusal, match=message):
            opened(SafetensorsFile, raw)

    def test_number_of_tensors(self, opened, monkeypatch):
        empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
        monkeypatch.setattr(_tensors, "MAX_TENSORS", 2)
        with pytest.raises(Refusal, match="announces 3 tensors"):
            opened(SafetensorsFile, written({"a": empty, "b": empty, "c": empty}))

    @pytest.mark.parametrize("case", ["length 2^63", "terabytes", "gigabytes", "past the end"])
    def test_takes_no_memory(self, case, opened, little_memory):
        with little_memory(2**20), pytest.raises(Refusal):
            opened(SafetensorsFile, HOSTILE[case][0])

    def test_sizes_of_no_array(self, read_all):
        entry = {"dtype": "F32", "shape": [0, 2**39, 2**39], "data_offsets": [0, 0]}
        with pytest.raises(Refusal, match=r"makes no array|larger than any adapter"):
            read_all(SafetensorsFile, written({"a": entry}))

    def test_shortened_after_opening(self, tmp_path):
        path = tmp_path / "a"
        path.write_bytes(SMALL)
        with SafetensorsFile(path.open("rb", buffering=0), len(SMALL)) as file:
            path.write_bytes(SMALL[:-20])
            with pytest.raises(Refusal, match="became shorter"):
                file.read("up")

    def test_attack_of_the_wild(self, shared_adapters, opened):
        (path,) = shared_adapters.glob("safetensors_attack/*.safetensors")
        with pytest.raises(Refusal, match="1000 bytes runs past the end"):
            opened(SafetensorsFile, path.read_bytes())


class TestDamage:
    @given(data=st.data())
    def test_bytes(self, data, damage, assert_refused_or_read):
        assert_refused_or_read(SafetensorsFile, data.draw(damage(SMALL)))

    @given(
        header=st.recursive(
            st.none()
            | st.booleans()
            | st.integers(-1, 9)
            | st.floats()
            | st.sampled_from([*A, "F32"]),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(st.sampled_from([*A, "__metadata__", "b"]), inner, max_size=4)
                | st.fixed_dictionaries(dict.fromkeys(A, inner))
            ),
        ),
        data=st.binary(max_size=16),
    )
    def test_json(self, header, data, assert_refused_or_read):
        assert_refused_or_read(SafetensorsFile, written({"a": header}, data))


@pytest.mark.parametrize(
    "again", ['"__metadata__": {}', '"__metadata\\u005f_": {}', '"a\\u0062": 1']
)
def test_metadata_that_stands_first_is_not_taken_twice(opened, again):
    entry = '{"dtype": "F32", "shape": [], "data_offsets": [0, 4]}'
    text = f'{{"__metadata__":{{"a": "b"}},"q": {entry}, {again}}}'.encode()
    with pytest.raises(Refusal, match=r"twice|must have"):
        opened(SafetensorsFile, len(text).to_bytes(8, "little") + text + bytes(4))


@pytest.mark.parametrize(
    "metadata", ["{}", "null", '{"a": "\\u00e9\\\\"}', '{"__metadata__": "x"}']
)
@pytest.mark.parametrize("space", ["", " "])
def test_metadata_that_stands_first_is_parsed(opened, metadata, space):
    entry = '{"dtype": "F32", "shape": [], "data_offsets": [0, 4]}'
    text = f'{{"__metadata__":{space}{metadata},"q": {entry}}}'.encode()
    for _ in range(2):
        with opened(SafetensorsFile, len(text).to_bytes(8, "little") + text + bytes(4)) as file:
            assert file.metadata == (json.loads(metadata) or {})
            assert list(file.tensors) == ["q"]
