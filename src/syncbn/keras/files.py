"""Kinds of model files, told by their content, and the errors that reading them ends in."""

from __future__ import annotations

import contextlib
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py

# What a file is.
KERAS_2_MODEL, KERAS_2_WEIGHTS = "an HDF5 file of a whole model", "an HDF5 file of weights alone"
KERAS_3_WEIGHTS, ARCHIVE = "a `.weights.h5` file, of weights alone", "a `.keras` file"
TORCH = "a file of PyTorch"
SAVED_MODEL, CHECKPOINT = "a SavedModel", "a TensorFlow checkpoint, of weights alone"


class UnreadableError(ValueError):
    """What a reader finds wrong with a file, in a few words: `reading` makes a whole error of it."""


class FileError(ValueError):
    """A file that is refused. Users see a ValueError."""


@contextlib.contextmanager
def reading(refuse: Callable[[str], FileError]) -> Iterator[None]:
    """Whatever a library raises over a broken file becomes one error, made by `refuse`."""
    try:
        yield
    except FileError:
        raise
    except Exception as error:
        message = " ".join(str(error).split())[:300]
        # Our readers say what is wrong; of other libraries' errors the class says as much.
        said = message if isinstance(error, UnreadableError) else f"{type(error).__name__}: {message}"
        raise refuse(f"which cannot be read ({said})") from error


def identify(path: Path, refuse: Callable[[str], FileError]) -> tuple[str | None, Path]:
    """The kind of what lies at a path, None where unknown; and where to read it: a checkpoint's prefix.

    Raises FileNotFoundError where there is nothing, FileError where it is broken.
    """
    if path.is_file():
        with reading(refuse):
            if kind := _kind_of_file(path):
                return kind, path
    folder = path if path.is_dir() else path.parent
    if path.is_dir() and (path / "saved_model.pb").is_file():
        return SAVED_MODEL, path
    if (path.is_dir() or path.name == "checkpoint") and (folder / "checkpoint").is_file():
        return CHECKPOINT, _latest(folder / "checkpoint")
    prefix = Path(re.sub(r"\.(index|data-\d+-of-\d+)$", "", str(path)))
    if Path(f"{prefix}.index").is_file():
        return CHECKPOINT, prefix
    if not path.exists():
        raise FileNotFoundError(path)
    return None, path


def variables(folder: Path) -> Path:
    """The checkpoint in a SavedModel."""
    return folder / "variables" / "variables"


def _latest(state: Path) -> Path:
    """The checkpoint that a file `checkpoint` names, in the same folder: folders get moved, and a name must not lead out."""
    found = re.search(r'^model_checkpoint_path: "(.*)"', state.read_text(errors="replace"), re.M)
    return state.parent / Path(found[1]).name if found else state


def _kind_of_file(path: Path) -> str | None:
    with path.open("rb") as file:
        start = file.read(9)
    if start.startswith(b"PK\x03\x04"):
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
        return TORCH if any(name.endswith("/data.pkl") for name in names) else ARCHIVE
    # torch.save before version 1.6 pickled; safetensors begin with the length of their header, which is JSON.
    if start.startswith(b"\x80\x02") or (start[8:] == b"{" and int.from_bytes(start[:8], "little") < path.stat().st_size):
        return TORCH
    if not h5py.is_hdf5(path):
        return None
    with h5py.File(path, "r") as file:
        attributes, groups = set(file.attrs), set(file)
    if "model_config" in attributes or "model_weights" in groups:
        return KERAS_2_MODEL
    if attributes & {"layer_names", "layer_names0"}:
        return KERAS_2_WEIGHTS
    return KERAS_3_WEIGHTS if groups & {"vars", "layers", "_layer_checkpoint_dependencies"} else None


def no_tensorflow(path: Any, kind: str) -> ImportError:
    """What only TensorFlow reads."""
    return ImportError(
        f"TensorFlow reads checkpoints and SavedModels. Received: {path}, {kind}, but `tensorflow` is not installed. Run "
        'pip install "syncbn[tensorflow]", or write a `.h5` where TensorFlow is installed.'
    )


def of_torch(function: str, path: Any) -> FileError:
    """What torch.save, or safetensors, wrote."""
    return FileError(
        f"{function} reads files of Keras and TensorFlow. Received: {path}, a file of PyTorch, whose layouts are others. "
        "Load it into the torch module with load_state_dict. For a Keras model write its arrays with layer.set_weights."
    )
