import io
import struct
import zipfile
import zlib

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sklora._untrusted import Refusal
from sklora.io._tensors import TensorInfo
from sklora.io.containers import _zip
from sklora.io.containers.npz import NpzFile


def saved(save=np.savez, **arrays) -> bytes:
    file = io.BytesIO()
    save(file, **arrays)
    return file.getvalue()


def zipped(members, method=zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


def npy(descr="'<f4'", fortran="False", shape="(2,)", data=bytes(8), version=b"\x01\x00") -> bytes:
    text = f"{{'descr': {descr}, 'fortran_order': {fortran}, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY" + version + struct.pack("<H", len(text)) + text + data


ARRAYS = {"up": np.arange(6, dtype=np.float32).reshape(2, 3), "alpha": np.array(4, np.float16)}
SMALL = {save.__name__: saved(save, **ARRAYS) for save in (np.savez, np.savez_compressed)}


class TestRoundTrip:
    @pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
    @pytest.mark.parametrize("order", ["<", ">"])
    @pytest.mark.parametrize("code", ["f8", "f4", "f2", "i8", "i4", "i2", "u8", "u4", "u2"])
    def test_dtypes(self, save, order, code, rng, read_all):
        array = rng.uniform(0, 99, size=(3, 4)).astype(order + code)
        read = read_all(NpzFile, saved(save, x=array))["x"]
        assert read.dtype == f"<{code}"
        np.testing.assert_array_equal(read, array)

    @pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.bool_])
    def test_bytes(self, dtype, read_all):
        array = np.array([0, 1, 1], dtype)
        read = read_all(NpzFile, saved(x=array))["x"]
        assert read.dtype == dtype
        np.testing.assert_array_equal(read, array)

    @pytest.mark.parametrize("shape", [(), (0,), (0, 3), (5,), (1, 1), (2, 3, 4, 5)])
    @pytest.mark.parametrize("order", ["C", "F"])
    def test_shapes(self, shape, order, rng, read_all):
        array = np.asarray(rng.normal(size=shape), order=order)
        read = read_all(NpzFile, saved(x=array))["x"]
        assert read.shape == shape
        np.testing.assert_array_equal(read, array)

    def test_header(self, opened):
        file = opened(NpzFile, SMALL["savez"])
        assert file.container == "npz"
        assert file.tensors == {"up": TensorInfo("F32", (2, 3)), "alpha": TensorInfo("F16", ())}
        assert file.metadata == {}

    def test_larger_than_a_chunk(self, rng, read_all):
        array = rng.normal(size=(100, 1000)).round(1)
        read = read_all(NpzFile, saved(np.savez_compressed, x=array, y=array.astype(np.float32)))
        np.testing.assert_array_equal(read["x"], array)

    def test_version_2(self, read_all):
        text = npy()[10:-8]
        member = b"\x93NUMPY\x02\x00" + struct.pack("<I", len(text)) + text + bytes(8)
        assert read_all(NpzFile, zipped({"x.npy": member}))["x"].tolist() == [0, 0]

    @pytest.mark.parametrize("limit", [zipfile.ZIP64_LIMIT, 40, 0])
    def test_comment_and_64_bits(self, limit, read_all, monkeypatch):
        monkeypatch.setattr(zipfile, "ZIP64_LIMIT", limit)
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            archive.comment = b"written by hand"
            with archive.open("x.npy", "w", force_zip64=True) as member:
                member.write(npy())
        assert read_all(NpzFile, file.getvalue())["x"].tolist() == [0, 0]


BFLOAT16 = saved(x=np.zeros(3, ml_dtypes.bfloat16))
OBJECTS = saved(x=np.array([{}, None], object))


def edited(raw: bytes, magic: bytes, offset: int, form: str, value: int) -> bytes:
    """Overwrite a number of the last record of a zip that starts with some bytes."""
    changed = bytearray(raw)
    struct.pack_into(form, changed, raw.rindex(magic) + offset, value)
    return bytes(changed)


def with_extra(extra: bytes) -> bytes:
    """Give a zip in which a member has extra fields."""
    member = zipfile.ZipInfo("x.npy")
    member.extra = extra
    return zipped({member: npy()})


def name_field(name: str, other: str) -> bytes:
    """Give the extra field that says another name in Unicode, behind the time of its change."""
    head = struct.pack("<2HBL", 0x7075, 5 + len(other), 1, zlib.crc32(name.encode()))
    return struct.pack("<2HBL", 0x5455, 5, 1, 0) + head + other.encode()


def with_size_in(field: bytes, place: int = 24) -> bytes:
    """Give a zip whose entry has a size in a field of 64-bit numbers, behind other numbers."""
    extra = struct.pack("<2H2Q", 0x9999, 16, 1, 1) + field
    return edited(with_extra(extra), ENTRY, place, "<L", 2**32 - 1)


ENTRY, LOCAL, END = b"PK\x01\x02", b"PK\x03\x04", b"PK\x05\x06"
STORED = zipped({"x.npy": npy()})
DEFLATED = zipped({"x.npy": npy()}, zipfile.ZIP_DEFLATED)


def with_64_bits(count: int, length: int, position: int | None = None) -> bytes:
    """Say in a record of 64 bits how many entries there are, and how long they are."""
    begin, end = STORED.index(ENTRY), STORED.index(END)
    record = struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, length, begin)
    locator = struct.pack("<4sLQL", b"PK\x06\x07", 0, end if position is None else position, 1)
    last = edited(STORED, END, 10, "<H", 2**16 - 1)[end:]
    return STORED[:end] + record + locator + last


HOSTILE = {
    "empty": (b"", "without a directory"),
    "magic alone": (b"PK\x03\x04", "without a directory"),
    "cut off": (STORED[:-1], "without a directory"),
    "trailing bytes": (STORED + b"x", "not the end of the file"),
    "directory past the end": (edited(STORED, END, 12, "<L", 2**31), "cannot be at byte"),
    "directory elsewhere": (edited(STORED, END, 16, "<L", 3), "cannot be at byte 3"),
    "no entry": (edited(STORED, ENTRY, 0, "<L", 0), "its directory is damaged"),
    "too many": (edited(STORED, END, 10, "<H", 500), "500 files cannot be"),
    "none, one there": (edited(STORED, END, 10, "<H", 0), "more than the 0 files"),
    "two, one there": (edited(STORED, END, 10, "<H", 2), "2 files cannot|ends within"),
    "one behind another": (STORED + zipped({"x.npy": npy(data=b"1" * 8)}), "cannot be at byte"),
    "no locator": (edited(STORED, END, 10, "<H", 2**16 - 1), "64-bit end .* not within"),
    "not an archive": (zipped({"word/document.xml": b"<x/>"}), "holds 'word/document.xml'"),
    "encrypted": (edited(STORED, ENTRY, 8, "<H", 1), "encrypted"),
    "encrypted inside": (edited(STORED, LOCAL, 6, "<H", 1), "not as the directory says"),
    "size cut off": (with_size_in(struct.pack("<2HQ", 1, 16, len(npy()))), "not compressed, yet"),
    "size too short": (with_size_in(struct.pack("<2HL", 1, 4, len(npy()))), "not compressed, yet"),
    "two names": (with_extra(name_field("x.npy", "y.npy")), "'x.npy' has another name"),
    "many extra fields": (with_extra(17 * b"UT\0\0"), "'x.npy' has over 16 extra fields"),
    "NUL": (zipped({"x.npy!": npy()}).replace(b"!", b"\0"), r"'x.npy\\x00' has another name"),
    "bzip2": (zipped({"x.npy": npy()}, zipfile.ZIP_BZIP2), "method 12"),
    "lzma": (zipped({"x.npy": npy()}, zipfile.ZIP_LZMA), "method 14"),
    "other method": (edited(STORED, ENTRY, 10, "<H", 8), "not as the directory says"),
    "stored sizes": (edited(STORED, ENTRY, 24, "<L", 9), "not compressed, yet"),
    "local magic": (edited(STORED, LOCAL, 0, "<L", 0), "not as the directory says"),
    "local name": (edited(STORED, LOCAL, 26, "<H", 9), "overlaps what follows"),
    "past the end": (edited(STORED, ENTRY, 42, "<L", 2**31), "overlaps what follows"),
    "size elsewhere": (edited(DEFLATED, ENTRY, 24, "<L", 2**32 - 1), "would take 4294967295 bytes"),
    "bomb": (edited(DEFLATED, ENTRY, 24, "<L", 2**27), "would take 134217728 bytes"),
    "said to be longer": (edited(DEFLATED, ENTRY, 24, "<L", 999), "unpacks to .* not to the 999"),
    "said to be shorter": (edited(DEFLATED, ENTRY, 24, "<L", 75), "checksum"),
    "no deflate": (
        DEFLATED.replace(DEFLATED[35:40], b"\xff" * 5),
        "invalid block type",
    ),
    "checksum": (STORED.replace(b"\n" + bytes(8), b"\n" + b"12345678"), "checksum"),
    "objects": (OBJECTS, "holds Python objects, which are never read"),
    "bfloat16": (BFLOAT16, "bfloat16 as safetensors"),
    "complex": (saved(x=np.zeros(2, complex)), "the dtype '<c16'"),
    "text": (saved(x=np.array(["a"])), "the dtype '<U1'"),
    "structured": (saved(x=np.zeros(2, "f4,f4")), "not as NumPy writes it"),
    "version 3": (zipped({"x.npy": npy(version=b"\x03\x00")}), r"x93NUMPY\\x03"),
    "no magic": (zipped({"x.npy": b"hello"}), "starts with b'hello'"),
    "no member": (zipped({"x.npy": b""}), "starts with b''"),
    "header past the end": (zipped({"x.npy": npy()[:9] + b"\xff"}), "not as NumPy writes it"),
    "long header": (zipped({"x.npy": npy(shape=f"(2,{' ' * 9000})")}), "not as NumPy writes it"),
    "expression": (zipped({"x.npy": npy(descr="__import__('os')")}), "not as NumPy writes it"),
    "sizes": (zipped({"x.npy": npy(shape="(2 2)")}), r"has the shape \('2 2'\)"),
    "commas": (zipped({"x.npy": npy(shape="(,,)")}), "has the shape"),
    "digits": (zipped({"x.npy": npy(shape=f"({'9' * 3000},)")}), "sizes from 0"),
    "size": (zipped({"x.npy": npy(shape="(3,)")}), "takes 12 bytes, but there are 8"),
    "huge": (zipped({"x.npy": npy(shape="(1099511627775,)")}), "takes 4398046511100 bytes"),
    "name": (zipped({"\n.npy": npy()}), "no printable text"),
    "no name": (zipped({".npy": npy()}), "no printable text"),
    "folder": (zipped({"x/": b""}), "holds 'x/'"),
}  # fmt: skip


class TestHostile:
    @pytest.mark.parametrize(("raw", "message"), HOSTILE.values(), ids=HOSTILE.keys())
    def test_refused(self, raw, message, read_all):
        with pytest.raises(Refusal, match=message):
            read_all(NpzFile, raw)

    def test_twice(self, opened):
        raw = zipped({"x.npy": npy(), "y.npy": npy()}).replace(b"y.npy", b"x.npy")
        with pytest.raises(Refusal, match=r"holds 'x.npy' twice"):
            opened(NpzFile, raw)

    def test_one_member_in_two_entries(self, opened):
        entry = STORED[STORED.index(ENTRY) : STORED.index(END)]
        other = entry.replace(b"x.npy", b"y.npy")
        begin = STORED.index(ENTRY)
        end = struct.pack("<4s4H2LH", END, 0, 0, 2, 2, 2 * len(entry), begin, 0)
        with pytest.raises(Refusal, match="overlaps what follows"):
            opened(NpzFile, STORED[:begin] + entry + other + end)

    @pytest.mark.parametrize("comment", [b"", b"x" * (2**16 - 1)])
    def test_64_bit_record_counts_where_the_other_has_numbers_too(self, comment, opened):
        raw = edited(with_64_bits(0, 51), END, 10, "<H", 1)
        raw = edited(raw, END, 20, "<H", len(comment)) + comment
        with pytest.raises(Refusal, match="more than the 0 files"):
            opened(NpzFile, raw)

    @pytest.mark.parametrize("place", [20, 24])
    @pytest.mark.parametrize("more", [b"", bytes(8)])
    @pytest.mark.parametrize("again", [b"", struct.pack("<2HQ", 1, 8, 9)])
    def test_64_bit_size(self, place, more, again, read_all):
        field = struct.pack("<2HQ", 1, 8 + len(more), len(npy())) + more
        assert read_all(NpzFile, with_size_in(field + again, place))["x"].tolist() == [0, 0]

    def test_64_bit_record_elsewhere(self, opened):
        with pytest.raises(Refusal, match="lacks the 64-bit end"):
            opened(NpzFile, with_64_bits(1, 51, position=0))

    def test_64_bit_record_is_beside_its_locator(self, read_all, opened):
        raw = with_64_bits(1, 51)
        assert read_all(NpzFile, raw)["x"].tolist() == [0, 0]
        with pytest.raises(Refusal, match="lacks the 64-bit end"):
            opened(NpzFile, raw.replace(b"PK\x06\x07", b" PK\x06\x07"))

    @pytest.mark.parametrize(
        ("count", "length", "message"),
        [
            (2**60, 2**60, "directory of 1152921504606846976 files cannot be"),
            (1, 2**60, "1152921504606846976 bytes long"),
            (2, 51, "2 files cannot be"),
        ],
    )
    def test_64_bit_record(self, count, length, message, opened):
        with pytest.raises(Refusal, match=message):
            opened(NpzFile, with_64_bits(count, length))

    def test_number_of_members(self, opened, monkeypatch):
        monkeypatch.setattr(_zip, "MAX_TENSORS", 1)
        with pytest.raises(Refusal, match="it holds 2 files"):
            opened(NpzFile, SMALL["savez"])

    def test_size_of_the_directory(self, opened, monkeypatch):
        monkeypatch.setattr(_zip, "MAX_DIRECTORY", 50)
        with pytest.raises(Refusal, match=r"its directory takes .* bytes, of at most 50"):
            opened(NpzFile, SMALL["savez"])

    def test_nothing_after_the_limit_of_a_member(self, opened):
        raw = edited(STORED, ENTRY, 20, "<L", 2**32 - 1)
        with pytest.raises(Refusal, match="not compressed, yet"):
            opened(NpzFile, raw)

    def test_bomb_takes_no_memory(self, opened, little_memory):
        bomb = saved(np.savez_compressed, x=np.zeros(10_000_000))
        assert len(bomb) < 100_000
        with little_memory(2**20), pytest.raises(Refusal, match="would take 80000"):
            opened(NpzFile, bomb)

    def test_opening_unpacks_headers_alone(self, opened, little_memory):
        raw = saved(np.savez_compressed, x=np.zeros(5_000_000))
        with little_memory(2**20):
            assert opened(NpzFile, raw).tensors["x"].nbytes == 40_000_000

    def test_untrained_adapters_are_no_bombs(self, read_all):
        raw = saved(np.savez_compressed, B=np.zeros((1000, 1000)))
        assert len(raw) * 100 < 8_000_000
        assert not read_all(NpzFile, raw)["B"].any()


class TestDamage:
    @pytest.mark.parametrize("save", SMALL)
    @given(data=st.data())
    def test_bytes(self, save, data, damage, assert_refused_or_read):
        assert_refused_or_read(NpzFile, data.draw(damage(SMALL[save])))

    @given(data=st.data())
    def test_header(self, data, damage, assert_refused_or_read):
        assert_refused_or_read(NpzFile, zipped({"x.npy": data.draw(damage(npy()))}))
