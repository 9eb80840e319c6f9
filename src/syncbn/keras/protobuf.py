"""Protocol buffers of TensorFlow, read without their schema: only what model files need."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from syncbn.keras.files import UnreadableError

# In saved_model.pb: meta graph, object graph, its first node, the user object, its metadata.
ROOT_METADATA = (2, 7, 1, 4, 3)


class Node(NamedTuple):
    """An object that a checkpoint tracks: its children's numbers by name, and its value's full name and key, where it has one."""

    children: dict[str, int]
    full_name: str
    key: str


def model_config(folder: Path) -> Any:
    """The JSON of the root object of a SavedModel; None where it has none. TensorFlow 2.5 moved it to a file of its own."""
    metadata = folder / "keras_metadata.pb"
    if not metadata.exists():
        text = _first((folder / "saved_model.pb").read_bytes(), ROOT_METADATA)
        return json.loads(text) if text else None
    for number, node in fields(metadata.read_bytes()):
        if number == 1 and _text(node, 3) == "root":
            return json.loads(_text(node, 5))
    return None


def object_graph(message: bytes) -> list[Node]:
    """The nodes of a checkpoint's object graph; the first is the root."""
    return [_node(node) for number, node in fields(message) if number == 1 and isinstance(node, bytes)]


def _node(message: bytes) -> Node:
    children: dict[str, int] = {}
    full_name = key = ""
    for number, value in fields(message):
        if number == 1:
            parts = dict(fields(_bytes(value)))
            # A number that is 0 is not written.
            children[_bytes(parts[2]).decode()] = int(parts.get(1, 0))
        elif number == 2 and _text(value, 1) == "VARIABLE_VALUE":
            full_name, key = _text(value, 2), _text(value, 3)
    return Node(children, full_name, key)


def _first(message: Any, path: tuple[int, ...]) -> Any:
    """The value that is found by taking the first field of each number; None where one is missing."""
    for wanted in path:
        message = next((value for number, value in fields(_bytes(message)) if number == wanted), None)
        if message is None:
            return None
    return message


def _text(message: Any, wanted: int) -> str:
    return (_first(message, (wanted,)) or b"").decode()


def _bytes(value: Any) -> bytes:
    if not isinstance(value, bytes):
        raise UnreadableError("a number stands where a message should")
    return value


def fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Field numbers with their values: numbers, and bytes for what has a length."""
    at = 0
    while at < len(message):
        tag, at = varint(message, at)
        if tag & 7 == 0:
            value, at = varint(message, at)
            yield tag >> 3, value
            continue
        if tag & 7 == 2:
            size, at = varint(message, at)
        elif tag & 7 in (1, 5):
            size = 8 if tag & 7 == 1 else 4
        else:
            raise UnreadableError(f"wire type {tag & 7}")
        if at + size > len(message):
            raise UnreadableError("a length points past the end")
        yield tag >> 3, message[at : at + size]
        at += size


def varint(message: bytes, at: int) -> tuple[int, int]:
    """A number of up to 10 bytes, and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        if at == len(message):
            raise UnreadableError("a number has no end")
        byte = message[at]
        value |= (byte & 127) << shift
        at += 1
        if byte < 128:
            return value, at
    raise UnreadableError("a number of more than 10 bytes")
