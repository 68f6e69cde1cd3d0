import io
import pickle
import zipfile
from collections import OrderedDict

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sklora._untrusted import Refusal
from sklora.io._tensors import TensorInfo
from sklora.io.containers import _pickle
from sklora.io.containers._pickle import Storage, Tensor, interpret
from sklora.io.containers.torch_zip import TorchZipFile, flatten


def saved(value, **options) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, **options)
    return file.getvalue()


def rewritten(raw: bytes, changes=(), method=zipfile.ZIP_STORED) -> bytes:
    """Write an archive anew, with some members replaced, or left out where they are None."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(raw)) as old, zipfile.ZipFile(file, "w", method) as new:
        members = {info.filename: old.read(info) for info in old.infolist()} | dict(changes)
        for name, content in members.items():
            if content is not None:
                new.writestr(name, content)
    return file.getvalue()


def with_pickle(program: bytes) -> bytes:
    return rewritten(SMALL, {"archive/data.pkl": program})


SMALL = saved({"up": torch.arange(6.0).reshape(2, 3), "alpha": torch.tensor(4)})
with zipfile.ZipFile(io.BytesIO(SMALL)) as _archive:
    PROGRAM = _archive.read("archive/data.pkl")
A_TENSOR = Tensor(Storage("0", "F32", 4), 0, (4,), (1,))


class TestRoundTrip:
    @pytest.mark.parametrize(
        ("dtype", "expected"),
        [
            (torch.float64, np.float64),
            (torch.float32, np.float32),
            (torch.float16, np.float16),
            (torch.bfloat16, ml_dtypes.bfloat16),
            (torch.int64, np.int64),
            (torch.int32, np.int32),
            (torch.int16, np.int16),
            (torch.int8, np.int8),
            (torch.uint8, np.uint8),
            (torch.bool, np.bool_),
        ],
    )
    @pytest.mark.parametrize("protocol", [2, 4])
    def test_dtypes(self, dtype, expected, protocol, read_all):
        tensor = torch.tensor([[0, 1, 1], [1, 0, 1]]).to(dtype)
        read = read_all(TorchZipFile, saved({"x": tensor}, pickle_protocol=protocol))["x"]
        assert read.dtype == expected
        np.testing.assert_array_equal(read.astype(float), tensor.double().numpy())

    @pytest.mark.parametrize(
        "tensor",
        [
            torch.tensor(3.0),
            torch.zeros(0, 3),
            torch.zeros(3, 0, 2)[1:],
            torch.arange(12.0).reshape(3, 4).T,
            torch.arange(12.0)[2:9],
            torch.arange(12.0).reshape(3, 4)[1:, ::2],
            torch.arange(24.0).reshape(2, 3, 4).permute(2, 0, 1),
            torch.arange(3.0).reshape(3, 1).expand(3, 1),
            torch.arange(8.0).as_strided((1, 4), (2**40, 2)),
        ],
    )
    def test_views(self, tensor, read_all):
        read = read_all(TorchZipFile, saved({"x": tensor}))["x"]
        assert read.shape == tensor.shape
        assert read.flags.c_contiguous
        np.testing.assert_array_equal(read, tensor.numpy())

    def test_tied_weights(self, read_all):
        weight = torch.arange(3.0)
        read = read_all(TorchZipFile, saved({"a": weight, "b": weight, "c": weight[1:]}))
        assert {name: array.tolist() for name, array in read.items()} == {
            "a": [0, 1, 2],
            "b": [0, 1, 2],
            "c": [1, 2],
        }

    def test_state_dict_of_a_module(self, read_all):
        module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
        read = read_all(TorchZipFile, saved(module.state_dict()))
        assert read.keys() == module.state_dict().keys()
        for name, tensor in module.state_dict().items():
            np.testing.assert_array_equal(read[name], tensor.numpy())

    def test_parameters(self, read_all):
        parameter = torch.nn.Parameter(torch.ones(2))
        assert read_all(TorchZipFile, saved({"x": parameter}))["x"].tolist() == [1, 1]

    def test_list(self, opened):
        file = opened(TorchZipFile, saved([torch.zeros(2), torch.zeros(3, dtype=torch.half)]))
        assert file.tensors == {"0": TensorInfo("F32", (2,)), "1": TensorInfo("F16", (3,))}

    def test_names_in_capitals(self, read_all):
        file = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(SMALL)) as old, zipfile.ZipFile(file, "w") as new:
            for info in old.infolist():
                new.writestr(info.filename.upper(), old.read(info))
        read = read_all(TorchZipFile, file.getvalue())
        file.seek(0)
        for name, expected in torch.load(file).items():
            np.testing.assert_array_equal(read[name], expected)

    def test_letters_beyond_a_to_z_have_their_case(self, opened):
        raw = rewritten(SMALL, {"archive/\u00c9": b"", "archive/\u00e9": b""})
        assert torch.load(io.BytesIO(raw)).keys() == opened(TorchZipFile, raw).tensors.keys()

    def test_header(self, opened):
        file = opened(TorchZipFile, SMALL)
        assert file.container == "torch-zip"
        assert file.tensors == {"up": TensorInfo("F32", (2, 3)), "alpha": TensorInfo("I64", ())}
        assert file.metadata == {}

    def test_beside_tensors(self, opened):
        value = {
            "state_dict": OrderedDict({"a.up": torch.ones(2), "b": {"c": [torch.ones(1)]}}),
            "epoch": 3,
            "loss": 0.5,
            "note": "x" * 1000,
            "large": -(2**40),
            "flags": [True, False, None],
            "betas": (0.9, 0.999),
        }
        file = opened(TorchZipFile, saved(value))
        assert list(file.tensors) == ["state_dict.a.up", "state_dict.b.c.0"]

    @pytest.mark.parametrize(
        "name",
        [
            "cloneofsimo_history/cd7e2b91_lora_kiriko.pt",
            "diffusers_old_procs/pytorch_lora_weights.bin",
            "misnamed_bin_smolvla/adapter_model.bin",
        ],
    )
    def test_as_pytorch_reads(self, shared_adapters, name, read_all):
        path = shared_adapters / name
        expected = torch.load(path, map_location="cpu", weights_only=True)
        if isinstance(expected, list):
            expected = {str(index): tensor for index, tensor in enumerate(expected)}
        read = read_all(TorchZipFile, path.read_bytes())
        assert list(read) == list(expected)
        for key, tensor in expected.items():
            np.testing.assert_array_equal(read[key], tensor.detach().numpy())


class Runs:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


NESTED_KEYS = (
    b"\x80\x02}(" + b")" + b"".join(b"q%ch%c\x86" % (i, i) for i in range(60)) + b"K\x01u."
)
SHARED = b"\x80\x02}q\x00" + b"".join(
    b"}q%c(X\x01\x00\x00\x00ah%cX\x01\x00\x00\x00bh%cu" % (i + 1, i, i) for i in range(60)
) + b"."  # fmt: skip
DEEP = b"\x80\x02" + b"}X\x01\x00\x00\x00a" * 5000 + b"N" + b"s" * 5000 + b"."
SELF = b"\x80\x02}q\x00X\x01\x00\x00\x00ah\x00s."

PROGRAMS = {
    "empty": (b"", "has no end"),
    "no stop": (b"\x80\x02}", "has no end"),
    "no value": (b"\x80\x02.", "nothing is on the stack"),
    "mark alone": (b"\x80\x02}(.", "nothing is on the stack"),
    "unmatched": (b"\x80\x02u.", "damaged"),
    "no memo": (b"\x80\x02h\x07.", "damaged"),
    "unknown byte": (b"\x80\x02\xff.", r"xff' is no instruction"),
    "number": (b"\x80\x02K\x01.", "holds one int"),
    "tuple": (b"\x80\x02).", "holds one tuple"),
    "system": (pickle.dumps(Runs("x"), 2), "which tensors do not need and which may run code"),
    "system 0": (b"cos\nsystem\n(S'id'\ntR.", "names 'os system'"),
    "system 4": (pickle.dumps(Runs("x"), 4), "names '_?io open'"),
    "builtins": (b"\x80\x02cbuiltins\neval\n.", "names 'builtins eval'"),
    "dotted": (b"\x80\x04\x8c\x05torch\x8c\x10_utils.os.system\x93.", "names 'torch _utils.os"),
    "backslash": (b"\x80\x02cos\\ x\nsystem\n.", "may run code"),
    "name cut off": (b"\x80\x02cos", "which tensors do not need"),
    "name of a number": (b"\x80\x04K\x01K\x01\x93.", "a name is expected"),
    "INST": (b"(S'id'\nios\nsystem\n.", "instruction STRING"),
    "INST first": (b"(ios\nsystem\n.", "instruction INST"),
    "OBJ": (b"(cos\nsystem\no.", "names 'os system'"),
    "NEWOBJ": (b"\x80\x02ccollections\nOrderedDict\n)\x81.", "instruction NEWOBJ"),
    "EXT1": (b"\x80\x02\x82\x01.", "instruction EXT1"),
    "BINUNICODE8": (b"\x80\x04\x8d" + b"\xff" * 7 + b"\x7f.", "instruction BINUNICODE8"),
    "BYTEARRAY8": (b"\x80\x05\x96" + b"\xff" * 7 + b"\x7f.", "instruction BYTEARRAY8"),
    "LONG4": (b"\x80\x02\x8b\xff\xff\xff\x7f1.", "instruction LONG4"),
    "LONG": (b"L" + b"9" * 9999 + b"L\n.", "instruction LONG"),
    "LONG1": (b"\x80\x02\x8a\xff" + b"\x7f" * 255 + b".", "integer of 2039 bits"),
    "BINUNICODE": (b"\x80\x02X\xff\xff\xff\xff1.", "damaged"),
    "FRAME": (b"\x80\x04\x95" + b"\xff" * 8 + b"N.", "holds one NoneType"),
    "text": (b"\x80\x02X\x01\x00\x00\x00\xff.", "damaged"),
    "call of a number": (b"\x80\x02K\x01)R.", "only names are called"),
    "call of a storage": (b"\x80\x02ctorch\nFloatStorage\n)R.", "calls torch FloatStorage as"),
    "call of a dictionary": (b"\x80\x02ccollections\nOrderedDict\n]\x85R.", "calls collections"),
    "call": (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.", "as PyTorch does not"),
    "parameter": (b"\x80\x02ctorch._utils\n_rebuild_parameter\n)R.", "as PyTorch does not"),
    "storage": (b"\x80\x02)Q.", "describes a storage"),
    "append": (b"\x80\x02}K\x01a.", "a list is expected"),
    "set": (b"\x80\x02]K\x01K\x01s.", "a dict is expected"),
    "build": (b"\x80\x02]}b.", "a dict is expected"),
    "odd": (b"\x80\x02}(K\x01u.", "lacks its value"),
    "key": (b"\x80\x02}K\x01K\x01s.", "a key of type int"),
    "key twice": (b"\x80\x02}X\x01\x00\x00\x00aNsX\x01\x00\x00\x00aNs.", "the key 'a' twice"),
    "key of nested tuples": (NESTED_KEYS, "a key of type tuple"),
    "shared": (SHARED, "one container twice"),
    "in itself": (SELF, "one container twice"),
    "deep": (DEEP, "longer than 1000"),
}  # fmt: skip


def a_tensor(offset=0, shape=(2, 3), strides=(3, 1), key="0", numel=6, storage="FloatStorage"):
    """A program for {"x": tensor}."""

    def constant(value):
        return pickle.dumps(value, 2)[2:-1]

    return b"".join(
        (
            b"\x80\x02}X\x01\x00\x00\x00xctorch._utils\n_rebuild_tensor_v2\n(",
            b"(X\x07\x00\x00\x00storagectorch\n" + storage.encode() + b"\n",
            constant(key) + constant("cpu") + constant(numel) + b"tQ",
            constant(offset) + constant(shape) + constant(strides),
            b"\x89ccollections\nOrderedDict\n)RtRs.",
        )
    )


def two_dtypes():
    """A program for {"t": tuple, "x": tensor} of one storage, of which PyTorch reads two as F16."""
    first, second = (a_tensor(storage=f"{name}Storage") for name in ("Half", "BFloat16"))
    key = b"X\x01\x00\x00\x00x"
    tensor = first.removeprefix(b"\x80\x02}" + key).removesuffix(b"s.")
    return b"\x80\x02}" + key.replace(b"x", b"t") + tensor + b"\x85s" + second[3:]


TENSORS = {
    "offset": (a_tensor(offset=1), "does not fit in its storage of 6 numbers"),
    "offset negative": (a_tensor(offset=-1), "the offset -1"),
    "offset huge": (a_tensor(offset=2**62), "offset 4611686018427387904"),
    "offset bool": (a_tensor(offset=True), "the offset True"),
    "strides": (a_tensor(strides=(3, 2)), "does not fit"),
    "strides negative": (a_tensor(strides=(-3, 1)), r"strides \(-3, 1\)"),
    "strides few": (a_tensor(strides=(1,)), r"strides \(1,\)"),
    "stride 0": (a_tensor(strides=(0, 1)), "save a contiguous copy"),
    "overlap": (a_tensor(shape=(3, 3), strides=(1, 1)), "save a contiguous copy"),
    "shape": (a_tensor(shape=(2**39, 1)), "does not fit"),
    "shape negative": (a_tensor(shape=(-2, 3)), r"the shape \(-2, 3\)"),
    "shape text": (a_tensor(shape=("2", 3)), "as PyTorch does not"),
    "dimensions": (a_tensor(shape=(1,) * 9, strides=(1,) * 9), "as PyTorch does not"),
    "numel": (a_tensor(numel=7), "said to hold 7 numbers F32 in 28 bytes, but there are 24"),
    "numel huge": (a_tensor(numel=2**50), "larger than any adapter"),
    "numel negative": (a_tensor(numel=-1), "describes a storage"),
    "dtype": (a_tensor(storage="DoubleStorage"), "in 48 bytes, but there are 24"),
    "storage": (a_tensor(storage="UntypedStorage"), "names 'torch UntypedStorage'"),
    "storage as a list": (
        a_tensor().replace(b"(X\x07", b"](X\x07").replace(b"tQ", b"eQ"),
        "describes a storage",
    ),
    "key": (a_tensor(key="9"), "which the file lacks"),
    "key above": (a_tensor(key="../data.pkl"), "describes a storage"),
    "key with NUL": (a_tensor(key="0\0"), "describes a storage"),
    "key in other letters": (a_tensor(key="\u0660"), "describes a storage"),
    "dtypes": (two_dtypes(), "the storage 0 that it holds F16 and BF16"),
}


class TestHostile:
    @pytest.mark.parametrize(("program", "message"), PROGRAMS.values(), ids=PROGRAMS.keys())
    def test_programs(self, program, message, opened):
        with pytest.raises(Refusal, match=message):
            opened(TorchZipFile, with_pickle(program))

    @pytest.mark.parametrize(("program", "message"), TENSORS.values(), ids=TENSORS.keys())
    def test_tensors(self, program, message, opened):
        with pytest.raises(Refusal, match=message):
            opened(TorchZipFile, with_pickle(program))

    def test_the_program_that_these_are_like(self, read_all):
        read = read_all(TorchZipFile, with_pickle(a_tensor()))["x"]
        assert read.tolist() == [[0, 1, 2], [3, 4, 5]]

    @pytest.mark.parametrize("protocol", range(6))
    def test_nothing_runs(self, protocol, tmp_path, opened):
        path = tmp_path / "ran"
        program = pickle.dumps({"x": Runs(path)}, protocol)
        with pytest.raises(Refusal):
            opened(TorchZipFile, with_pickle(program))
        assert not path.exists()
        pickle.loads(program)["x"].close()
        assert path.exists()

    def test_shapes_of_nested_tuples(self, opened):
        """Printing them would take 2^60 steps."""
        nested = b")" + b"".join(b"q%ch%c\x86" % (i, i) for i in range(60))
        program = a_tensor().replace(pickle.dumps((2, 3), 2)[2:-1], nested)
        with pytest.raises(Refusal, match="as PyTorch does not"):
            opened(TorchZipFile, with_pickle(program))

    ARCHIVES = {  # noqa: RUF012
        "no pickle": ({"archive/data.pkl": None}, "holds 0 files data.pkl"),
        "two pickles": ({"b/data.pkl": b"N."}, "holds 2 files data.pkl"),
        "large pickle": ({"archive/data.pkl": bytes(2**24 + 1)}, "16777217 bytes, of at most"),
        "no storage": ({"archive/data/0": None}, "'0', which the file lacks"),
        "short storage": ({"archive/data/0": bytes(23)}, "but there are 23"),
        "other case": ({"archive/DATA/0": bytes(24)}, "PyTorch does not tell apart"),
        "pickle of other case": ({"archive/DATA.PKL": b"N."}, "PyTorch does not tell apart"),
        "capitals": (
            {"archive/byteorder": None, "archive/BYTEORDER": b"big"},
            "byte order is b'big'",
        ),
        "big-endian": ({"archive/byteorder": b"big"}, "byte order is b'big'"),
    }

    @pytest.mark.parametrize(("changes", "message"), ARCHIVES.values(), ids=ARCHIVES.keys())
    def test_archives(self, changes, message, opened):
        with pytest.raises(Refusal, match=message):
            opened(TorchZipFile, rewritten(SMALL, changes))

    def test_compressed(self, opened):
        with pytest.raises(Refusal, match="is compressed, as PyTorch never does"):
            opened(TorchZipFile, rewritten(SMALL, method=zipfile.ZIP_DEFLATED))

    def test_compressed_storage(self, opened):
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("a/data.pkl", a_tensor())
            archive.writestr("a/data/0", bytes(24), zipfile.ZIP_DEFLATED)
        with pytest.raises(Refusal, match="is compressed, as PyTorch never does"):
            opened(TorchZipFile, file.getvalue())

    @pytest.mark.parametrize(
        "tensor",
        [torch._neg_view(torch.ones(2, 3)), torch.ones(2, 3, dtype=torch.complex64).conj().imag],
        ids=["view", "imag"],
    )
    def test_numbers_that_are_negated_when_they_are_loaded(self, tensor, opened):
        with pytest.raises(Refusal, match="PyTorch negates as it loads them; save a clone of it"):
            opened(TorchZipFile, saved({"up": tensor}))

    def test_dtype_that_needs_more_names(self, opened):
        raw = saved({"x": torch.ones(2).to(torch.float8_e5m2)})
        with pytest.raises(Refusal, match=r"names 'torch.*_rebuild_tensor_v3'"):
            opened(TorchZipFile, raw)

    def test_many_views_of_one_storage(self, opened):
        storage = torch.zeros(2**20)
        value = {str(index): storage[index:] for index in range(100)}
        with pytest.raises(Refusal, match="though the file has"):
            opened(TorchZipFile, saved(value))

    def test_terabytes_take_no_memory(self, opened, little_memory):
        raw = with_pickle(a_tensor(shape=(2**39,), strides=(1,), numel=2**39))
        with little_memory(2**20), pytest.raises(Refusal, match="but there are 24"):
            opened(TorchZipFile, raw)

    def test_number_of_instructions(self, monkeypatch, little_memory):
        monkeypatch.setattr(_pickle, "MAX_INSTRUCTIONS", 10_000)
        program = b"\x80\x02" + b"]" * 2**20
        with little_memory(2**20), pytest.raises(Refusal, match="more than 10000 instructions"):
            interpret(program)


class TestInterpret:
    @given(
        value=st.recursive(
            st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.text()
            | st.floats(allow_nan=False),
            lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
            | st.lists(inner).map(tuple),
        ),
        protocol=st.integers(2, 5),
    )  # fmt: skip
    def test_plain_values(self, value, protocol):
        assert interpret(pickle.dumps(value, protocol)) == value

    @given(
        program=st.lists(
            st.sampled_from(
                [
                    b"}", b"]", b")", b"(", b"N", b"K\x01", b"X\x01\x00\x00\x00a", b"t", b"\x85",
                    b"\x86", b"\x87", b"q\x00", b"q\x01", b"h\x00", b"h\x01", b"\x94", b"s", b"u",
                    b"a", b"e", b"R", b"Q", b"b", b"\x93", b"\x8a\x01\x01",
                    b"X\x07\x00\x00\x00storage", b"ctorch\nFloatStorage\n",
                    b"ccollections\nOrderedDict\n", b"ctorch._utils\n_rebuild_tensor_v2\n",
                    b"ctorch._utils\n_rebuild_parameter\n",
                ]
            ),
            max_size=30,
        )
    )  # fmt: skip
    def test_programs(self, program):
        try:
            flatten(interpret(b"\x80\x02" + b"".join(program) + b"."))
        except Refusal:
            return


class TestFlatten:
    def test_names(self):
        top = {"a": A_TENSOR, "b": {"c": A_TENSOR, "": [A_TENSOR, 3, A_TENSOR]}, "d": "text"}
        assert list(flatten(top)) == ["a", "b.c", "b..0", "b..2"]

    def test_one_name(self):
        with pytest.raises(Refusal, match=r"two tensors 'a.b'"):
            flatten({"a": {"b": A_TENSOR}, "a.b": A_TENSOR})

    def test_number_of_tensors(self):
        with pytest.raises(Refusal, match="200001 tensors"):
            flatten([A_TENSOR] * 200_001)

    def test_total_of_names(self):
        with pytest.raises(Refusal, match="take more than"):
            flatten({"a" * 990: [A_TENSOR] * 100_000})


class TestDamage:
    @given(data=st.data())
    def test_bytes(self, data, damage, assert_refused_or_read):
        assert_refused_or_read(TorchZipFile, data.draw(damage(SMALL)))

    @given(data=st.data())
    def test_program(self, data, damage, assert_refused_or_read):
        program = data.draw(damage(PROGRAM) | damage(a_tensor()))
        assert_refused_or_read(TorchZipFile, with_pickle(program))
