"""The index of a TensorFlow checkpoint, checked before TensorFlow reads it: there a size that lies ends the process."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from syncbn.keras.files import UnreadableError
from syncbn.keras.protobuf import fields, varint

# A table of LevelDB: the last 48 bytes say where its index is, and end with this number.
MAGIC, FOOTER = 0xDB4775248B80FB57, 48
# TensorFlow's numbers of dtypes: bytes of one value, where all values have as many; and which are integers.
ITEM_SIZES = {1: 4, 2: 8, 3: 4, 4: 1, 5: 2, 6: 1, 9: 8, 10: 1, 14: 2, 17: 2, 19: 2, 22: 4, 23: 8}
INTEGERS = {3, 4, 5, 6, 9, 17, 22, 23}


class Entry(NamedTuple):
    """A tensor of a checkpoint, and where its bytes are."""

    dtype: int
    shape: tuple[int, ...]
    file: Path
    offset: int
    size: int


def read_index(prefix: Path) -> dict[str, Entry]:
    """The tensors of a checkpoint by their keys. ValueError where one is not inside its file, or its size is not its shape's."""
    table = Path(f"{prefix}.index").read_bytes()
    if len(table) < FOOTER or struct.unpack("<Q", table[-8:])[0] != MAGIC:
        raise UnreadableError("the index has another format")
    footer = table[-FOOTER:]
    _, at = varint(footer, 0)
    _, at = varint(footer, at)
    held = {key.decode(): value for _, handle in _block(table, footer[at:]) for key, value in _block(table, handle)}
    shards = int(dict(fields(held.pop(""))).get(1, 0))
    entries = {key: _entry(value, prefix, shards) for key, value in held.items()}
    sizes = {file: file.stat().st_size for file in {entry.file for entry in entries.values()}}
    for name, entry in entries.items():
        if entry.offset + entry.size > sizes[entry.file]:
            raise UnreadableError(f"{name} points past the end of its file")
    return entries


def read_string(entry: Entry) -> bytes:
    """A tensor that holds one string: its length, four bytes, the string."""
    with entry.file.open("rb") as file:
        file.seek(entry.offset)
        held = file.read(entry.size)
    length, at = varint(held, 0)
    if at + 4 + length != entry.size:
        raise UnreadableError(f"a string claims {length} bytes, of {entry.size}")
    return held[at + 4 :]


def _block(table: bytes, handle: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Keys and values of a block: of each key only what differs from the one before is written."""
    offset, at = varint(handle, 0)
    size, _ = varint(handle, at)
    if offset + size + 1 > len(table) - FOOTER or size < 4 or table[offset + size] != 0:
        raise UnreadableError("a block of the index lies outside of it, or is compressed")
    block = table[offset : offset + size]
    end = size - 4 - 4 * struct.unpack("<I", block[-4:])[0]
    key, at = b"", 0
    while at < end:
        shared, at = varint(block, at)
        own, at = varint(block, at)
        length, at = varint(block, at)
        if shared > len(key) or at + own + length > end:
            raise UnreadableError("an entry of the index lies outside of its block")
        key = key[:shared] + block[at : at + own]
        yield key, block[at + own : at + own + length]
        at += own + length


def _entry(message: bytes, prefix: Path, shards: int) -> Entry:
    found = {1: 0, 3: 0, 4: 0, 5: 0}
    shape: list[int] = []
    for number, value in fields(message):
        if number == 2 and isinstance(value, bytes):
            shape = [int(dict(fields(dim)).get(1, 0)) for at, dim in fields(value) if at == 2 and isinstance(dim, bytes)]
        elif number == 7:
            raise UnreadableError("it holds variables in parts")
        elif number in found and isinstance(value, int):
            found[number] = value
    dtype, size, count = found[1], found[5], math.prod(shape)
    if count > size if dtype not in ITEM_SIZES else count * ITEM_SIZES[dtype] != size:
        raise UnreadableError(f"a tensor of dtype {dtype} and shape {shape} has {size} bytes")
    return Entry(dtype, tuple(shape), Path(f"{prefix}.data-{found[3]:05d}-of-{shards:05d}"), found[4], size)
