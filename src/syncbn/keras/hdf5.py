"""HDF5 read without surprises: no link, no other file, no size that the file cannot hold."""

from __future__ import annotations

import math
from typing import Any

import h5py
import ml_dtypes

from syncbn.keras.files import UnreadableError
from syncbn.keras.matching import Stored

# Bytes that one byte of a compressed file can stand for, at most.
MOST_COMPRESSED = 1100


def inside(group: Any) -> dict[str, Any]:
    """What stands in a group itself, by its key: links may lead to other files."""
    return {key: group[key] for key in group if isinstance(group.get(key, getlink=True), h5py.HardLink)}


def child(parent: Any, path: str, cls: type) -> Any:
    """The group or dataset at a path, which passes through no link."""
    for part in path.split("/"):
        if not isinstance(parent, h5py.Group) or not isinstance(parent.get(part, getlink=True), h5py.HardLink):
            raise UnreadableError(f"{path} is missing, or a link")
        parent = parent[part]
    if not isinstance(parent, cls):
        raise UnreadableError(f"{path} is no {cls.__name__.lower()}")
    return parent


def stored(name: str, dataset: Any) -> Stored:
    """A dataset as a value that is read later."""
    if not isinstance(dataset, h5py.Dataset) or dataset.external or dataset.is_virtual:
        raise UnreadableError(f"{name} is no dataset, or takes its values from another file")
    claimed, held = math.prod(dataset.shape) * dataset.dtype.itemsize, dataset.id.get_storage_size()
    if claimed > MOST_COMPRESSED * held:
        raise UnreadableError(f"{name} claims {claimed} bytes, and has {held}")

    def read() -> Any:
        value = dataset[()]
        # Keras writes two bytes that HDF5 has no type for.
        return value.view(ml_dtypes.bfloat16) if value.dtype.kind == "V" and value.dtype.itemsize == 2 else value

    return Stored(name, tuple(dataset.shape), read)


def names(group: Any, name: str) -> list[str]:
    """An attribute that lists names; a long one is written in pieces, numbered from 0."""
    pieces = [name] if name in group.attrs else []
    while not pieces or pieces[-1] != name:
        piece = f"{name}{len(pieces)}"
        if piece not in group.attrs:
            break
        pieces.append(piece)
    return [text.decode() if isinstance(text, bytes) else str(text) for piece in pieces for text in group.attrs[piece]]
