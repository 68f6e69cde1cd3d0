"""Zip archives of unknown origin: the directory, and members that cannot grow beyond a bound.

`zipfile` makes some 700 bytes of objects from an entry of 46 bytes before anyone can count them,
and takes members that overlap, so the little that is needed of the format is read here.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import BinaryIO, NamedTuple

from sklora._untrusted import Refusal, shown
from sklora.io._tensors import MAX_TENSORS

STORED = 0
DEFLATED = 8
# A zip of zeros can claim 1,000 times its size. Weights hardly shrink when they are deflated; only
# those of adapters that were never trained, whose B is zero, do, and those files are small.
MAX_EXPANSION = 16
ALWAYS_ALLOWED = 64 * 2**20
MAX_DIRECTORY = 64 * 2**20

_END = struct.Struct("<4s4H2LH")
_END_64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR = struct.Struct("<4sLQL")
_LOCATOR_MAGIC = b"PK\x06\x07"
_ENTRY = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_MAX_COMMENT = 2**16 - 1
# In these, the number stands in a record of 64 bits.
_ELSEWHERE = (2**16 - 1, 2**32 - 1)
_CHUNK = 2**16
# Bits of the flags: encryption, patches, strong encryption, a masked directory; and Unicode names.
_UNREADABLE = 0x1 | 0x20 | 0x40 | 0x2000
_UNICODE = 0x800
# The extra fields of 64-bit numbers, and of a name in Unicode.
_WIDE_FIELD = 1
_NAME_FIELD = 0x7075
# Entries have a few. Those of 4 bytes each in a large directory would take 20 s to go through.
_MAX_FIELDS = 16

_DAMAGED = "the zip file is cut off or damaged: download it again"


class Member(NamedTuple):
    """One file of an archive, as the directory describes it.

    Attributes
    ----------
    name : str
    method : int
        STORED or DEFLATED.
    crc : int
    packed, size : int
        Bytes in the archive, and when unpacked.
    offset : int
        Where its own header begins.
    """

    name: str
    method: int
    crc: int
    packed: int
    size: int
    offset: int


class ZipArchive:
    """An open zip archive whose directory is validated; nothing else has been read.

    Parameters
    ----------
    file : binary file
    size : int
        How many bytes the file has.

    Attributes
    ----------
    members : dict of str to Member
        In the order of the directory.

    Raises
    ------
    Refusal
        When the directory is damaged, members overlap, are encrypted, use a rare compression, or
        would unpack to more than `MAX_EXPANSION` times the size of the file.
    """

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file = file
        self._size = size
        count, length, begin = self._find_directory()
        if count > MAX_TENSORS:
            raise Refusal(f"it holds {count} files; an adapter has at most {MAX_TENSORS} tensors.")
        if length > MAX_DIRECTORY:
            raise Refusal(f"its directory takes {length} bytes, of at most {MAX_DIRECTORY}.")
        self.members = _parse_directory(self._at(begin, length, "its directory"), count)
        self._limits = _limits(self.members, begin)
        check_expansion(sum(member.size for member in self.members.values()), size)

    def stored(self, member: Member, offset: int, n_bytes: int) -> bytes:
        """Read some bytes of a member that is not compressed."""
        if member.method != STORED:
            raise Refusal(
                f"{shown(member.name)} is compressed, as PyTorch never does; ask for a safetensors "
                "file."
            )
        if offset + n_bytes > member.size:
            raise Refusal(
                f"{shown(member.name)} holds {member.size} bytes, but {offset + n_bytes} are "
                f"expected; {_DAMAGED}."
            )
        return self._at(self._begin(member) + offset, n_bytes, shown(member.name))

    def unpack(self, member: Member, n_bytes: int) -> bytes | bytearray:
        """Unpack the first bytes of a member; the checksum is compared if these are all."""
        if member.method == STORED:
            unpacked: bytes | bytearray = self.stored(member, 0, n_bytes)
        else:
            unpacked = self._inflate(member, n_bytes)
        if n_bytes == member.size and zlib.crc32(unpacked) != member.crc:
            raise Refusal(f"{shown(member.name)} does not have its checksum; {_DAMAGED}.")
        return unpacked

    def _inflate(self, member: Member, n_bytes: int) -> bytearray:
        unpacked = bytearray()
        inflater = zlib.decompressobj(-zlib.MAX_WBITS)
        position = self._begin(member)
        end = position + member.packed
        while len(unpacked) < n_bytes:
            data = inflater.unconsumed_tail
            if not data:
                data = self._at(position, min(_CHUNK, end - position), shown(member.name))
                position += len(data)
            try:
                more = inflater.decompress(data, n_bytes - len(unpacked))
            except zlib.error as error:
                raise Refusal(f"{shown(member.name)}: {error}; {_DAMAGED}.") from error
            if not more and (inflater.eof or not data):
                raise Refusal(
                    f"{shown(member.name)} unpacks to {len(unpacked)} bytes, not to the "
                    f"{member.size} that are announced; {_DAMAGED}."
                )
            unpacked += more
        return unpacked

    def _begin(self, member: Member) -> int:
        """Find where the bytes of a member begin: after its own header, whose size varies."""
        header = self._at(member.offset, _LOCAL.size, shown(member.name))
        magic, _, flags, method, *_, name_length, extra_length = _LOCAL.unpack(header)
        begin: int = member.offset + _LOCAL.size + name_length + extra_length
        if magic != b"PK\x03\x04" or method != member.method or flags & _UNREADABLE:
            raise Refusal(f"{shown(member.name)} is not as the directory says; {_DAMAGED}.")
        if begin + member.packed > self._limits[member.name]:
            raise Refusal(f"{shown(member.name)} overlaps what follows it; {_DAMAGED}.")
        return begin

    def _find_directory(self) -> tuple[int, int, int]:
        """Give how many members there are, how many bytes their directory has, and where."""
        n_tail = min(self._size, _LOCATOR.size + _END.size + _MAX_COMMENT)
        tail = self._at(self._size - n_tail, n_tail, "the end of the zip file")
        found = tail.rfind(b"PK\x05\x06")
        if found < 0 or len(tail) - found < _END.size:
            raise Refusal(f"it is a zip file without a directory; {_DAMAGED}.")
        *_, count, length, begin, comment = _END.unpack_from(tail, found)
        end = self._size - n_tail + found
        if end + _END.size + comment != self._size:
            raise Refusal(f"the end of its directory is not the end of the file; {_DAMAGED}.")
        # Other readers take the record of 64 bits wherever there is one.
        is_wide = tail[max(found - _LOCATOR.size, 0) : found].startswith(_LOCATOR_MAGIC)
        if is_wide or count == _ELSEWHERE[0] or _ELSEWHERE[1] in (length, begin):
            count, length, begin, end = self._find_directory_64(end)
        # Where there is room behind the directory, `zipfile` takes another one, nearer to the end.
        if begin + length != end or count * _ENTRY.size > length:
            raise Refusal(
                f"its directory of {count} files cannot be at byte {begin}, {length} bytes long; "
                f"{_DAMAGED}."
            )
        return count, length, begin

    def _find_directory_64(self, end: int) -> tuple[int, int, int, int]:
        what = "the 64-bit end of the directory"
        locator = self._at(end - _LOCATOR.size, _LOCATOR.size, what)
        magic, _, position, _ = _LOCATOR.unpack(locator)
        record = _END_64.unpack(self._at(position, _END_64.size, what))
        beside = position + _END_64.size + _LOCATOR.size == end
        if (magic, record[0]) != (_LOCATOR_MAGIC, b"PK\x06\x06") or not beside:
            raise Refusal(f"it lacks {what}; {_DAMAGED}.")
        count, length, begin = record[-3:]
        return count, length, begin, position

    def _at(self, position: int, n_bytes: int, what: str) -> bytes:
        if not 0 <= position <= position + n_bytes <= self._size:
            raise Refusal(f"{what} is not within the file; {_DAMAGED}.")
        self._file.seek(position)
        taken = self._file.read(n_bytes)
        if len(taken) < n_bytes:
            raise Refusal(f"the file became shorter while {what} was read; read it again.")
        return taken


def check_expansion(n_bytes: int, file_size: int) -> None:
    """Check how many bytes of tensors a file of some size may imply."""
    allowed = max(MAX_EXPANSION * file_size, ALWAYS_ALLOWED)
    if n_bytes > allowed:
        raise Refusal(
            f"its tensors would take {n_bytes} bytes, though the file has {file_size}; at most "
            f"{allowed} are read. If you trust it, save it as safetensors."
        )


def _parse_directory(raw: bytes, count: int) -> dict[str, Member]:
    members: dict[str, Member] = {}
    position = 0
    for _ in range(count):
        try:
            fields = _ENTRY.unpack_from(raw, position)
        except struct.error as error:
            raise Refusal(f"its directory ends within an entry; {_DAMAGED}.") from error
        begin = position + _ENTRY.size
        name_end = begin + fields[10]
        extra_end = name_end + fields[11]
        position = extra_end + fields[12]
        if fields[0] != b"PK\x01\x02" or position > len(raw):
            raise Refusal(f"an entry of its directory is damaged; {_DAMAGED}.")
        member = _member(fields, raw[begin:name_end], raw[name_end:extra_end])
        if member.name in members:
            raise Refusal(f"it holds {shown(member.name)} twice; {_DAMAGED}.")
        members[member.name] = member
    if position < len(raw):
        raise Refusal(f"its directory has more than the {count} files it announces; {_DAMAGED}.")
    return members


def _member(fields: tuple[int, ...], raw_name: bytes, extra: bytes) -> Member:
    flags, method, crc = fields[3], fields[4], fields[7]
    try:
        name = raw_name.decode("utf-8" if flags & _UNICODE else "cp437")
    except UnicodeDecodeError as error:
        raise Refusal(f"the name {shown(raw_name)} is no text; {_DAMAGED}.") from error
    if flags & _UNREADABLE:
        raise Refusal(f"{shown(name)} is encrypted or patched; save the file without that.")
    extra_fields = list(islice(_extra_fields(extra), _MAX_FIELDS + 1))
    if len(extra_fields) > _MAX_FIELDS:
        raise Refusal(f"{shown(name)} has over {_MAX_FIELDS} extra fields; {_DAMAGED}.")
    # `zipfile` cuts names at NUL, and from Python 3.12 on takes the other name.
    if "\0" in name or any(kind == _NAME_FIELD for kind, _ in extra_fields):
        raise Refusal(
            f"{shown(name)} has another name for other readers; save it anew with what made it."
        )
    if method not in (STORED, DEFLATED):
        raise Refusal(
            f"{shown(name)} is compressed with method {method}; only deflate ({DEFLATED}) and no "
            f"compression ({STORED}) are read: save it with one of these."
        )
    size, packed, offset = _sizes(fields[9], fields[8], fields[16], extra_fields)
    if method == STORED and size != packed:
        raise Refusal(
            f"{shown(name)} is not compressed, yet {packed} are {size} bytes; {_DAMAGED}."
        )
    return Member(name, method, crc, packed, size, offset)


def _extra_fields(extra: bytes) -> Iterator[tuple[int, bytes]]:
    """Give kind and content of the extra fields of an entry."""
    position = 0
    while position + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, position)
        position += 4
        if length > len(extra) - position:
            return
        yield kind, extra[position : position + length]
        position += length


def _sizes(
    size: int, packed: int, offset: int, extra_fields: Iterable[tuple[int, bytes]]
) -> list[int]:
    """Look up those of the numbers that need 64 bits, which stand in one of the extra fields."""
    numbers = [size, packed, offset]
    wide = [index for index, number in enumerate(numbers) if number == _ELSEWHERE[1]]
    for kind, content in extra_fields:
        if kind == _WIDE_FIELD and 8 * len(wide) <= len(content):
            for place, index in enumerate(wide):
                (numbers[index],) = struct.unpack_from("<Q", content, 8 * place)
            break
    return numbers


def _limits(members: dict[str, Member], end: int) -> dict[str, int]:
    """Give for every member where the next begins, and check that none reaches into the next."""
    limits: dict[str, int] = {}
    for member in sorted(members.values(), key=lambda member: member.offset, reverse=True):
        if member.offset + _LOCAL.size + member.packed > end:
            raise Refusal(f"{shown(member.name)} overlaps what follows it; {_DAMAGED}.")
        limits[member.name] = end
        end = member.offset
    return limits
