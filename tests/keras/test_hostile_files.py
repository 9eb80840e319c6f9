"""Files made to do harm, and broken ones: an error of ours, nothing run, nothing read elsewhere, nothing half loaded."""

from __future__ import annotations

import base64
import marshal
import random
import resource
import shutil
import struct
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest
import rebuilt_models
from old_files import DATA, PACKED, Computed, near, place
from test_old_files import edited, needs_tensorflow, values

import syncbn
from syncbn.keras import checkpoint_index

OLD = DATA / "tf2.2"
MODEL, WEIGHTS, NEW_WEIGHTS = OLD / "sequential.h5", OLD / "sequential.weights.h5", DATA / "tf2.15" / "nested.weights.h5"
MEMORY = 1 << 30


def refused(path, model=None, match=""):
    """Both functions raise an error of ours, and the model stays as it was."""
    model = model or rebuilt_models.sequential()
    before = values(model)
    with pytest.raises(ValueError, match=match) as told:
        syncbn.load_weights(model, path)
    assert type(told.value).__name__ == "FileError"
    for a, b in zip(values(model), before, strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(ValueError) as told:
        syncbn.load_legacy(path)
    assert type(told.value).__name__ == "FileError"


# ------------------------------------------------------------------------------------------------ code and foreign names


def written(folder):
    """What hostile code would write, and such code: as Keras 2 writes a Lambda's, as a command, as arguments."""
    target = folder / "it ran"
    code = compile(f"lambda x: (open({str(target)!r}, 'w'), x)[1]", "file", "eval").co_consts[0]
    return target, [base64.b64encode(marshal.dumps(code)).decode(), None, None], f"touch '{target}'"


def layer(config):
    return config["config"]["layers"][2]


HOSTILE = {
    "Lambda": lambda config, code, command: layer(config).update(
        class_name="Lambda", config={"name": "l", "function": code, "function_type": "lambda", "arguments": {}}),
    "Lambda in a wrapper": lambda config, code, command: layer(config).update(
        class_name="TimeDistributed", config={"name": "t", "layer": {"class_name": "Lambda", "config": {"name": "l", "function": code}}}),
    "a lambda as Keras 3 notes it": lambda config, code, command: layer(config).update(
        class_name="Lambda", config={"name": "l", "function": {"class_name": "__lambda__", "config": {"code": code[0], "defaults": None, "closure": None}}}),
    "a registered name": lambda config, code, command: layer(config).update(class_name="os>system", config={"name": "s", "command": command}),
    "a lambda as an activation": lambda config, code, command: layer(config).update(
        class_name="Activation", config={"name": "a", "activation": {"class_name": "__lambda__", "config": {"value": code[0]}}}),
    "a module": lambda config, code, command: layer(config).update(
        module="os", class_name="system", registered_name="os>system", config={"name": "s", "command": command}),
    "a module in an initializer": lambda config, code, command: layer(config).update(
        class_name="Dense", config={"name": "d", "units": 6, "kernel_initializer": {"module": "os", "class_name": "system", "config": command, "registered_name": None}}),
    "an activation": lambda config, code, command: layer(config).update(
        class_name="Activation", config={"name": "a", "activation": {"module": "os", "class_name": "function", "config": "system", "registered_name": "system"}}),
    "a function of Keras's": lambda config, code, command: layer(config).update(
        class_name="deserialize", config={"name": "d", "config": {"module": "os", "class_name": "system", "config": command}}),
    "a passive object": lambda config, code, command: layer(config)["config"].update(
        threshold={"class_name": "deserialize", "__passive_serialization__": True, "config": {"config": {"module": "os", "class_name": "system", "config": command}}}),
    "a graph in another file": lambda config, code, command: layer(config).update(
        class_name="TFSMLayer", config={"name": "t", "filepath": "elsewhere", "call_endpoint": "serve"}),
    "pickled torch": lambda config, code, command: layer(config).update(class_name="TorchModuleWrapper", config={"name": "t", "module": code[0]}),
}  # fmt: skip


@pytest.mark.parametrize("what", HOSTILE)
def test_nothing_in_a_file_runs(what, tmp_path):
    target, code, command = written(tmp_path)
    path = edited(MODEL, tmp_path / "model.h5", lambda config: HOSTILE[what](config, code, command))
    ours = what in ("a function of Keras's", "a graph in another file", "pickled torch")
    with pytest.raises(ValueError, match="a layer of the class" if ours else "") as told:
        syncbn.load_legacy(path)
    assert type(told.value).__name__ == "FileError"
    assert not target.exists()
    # The weights in it are weights.
    syncbn.load_weights(rebuilt_models.sequential(), path)


def test_the_hostile_code_would_run(tmp_path):
    """Else the tests above would prove nothing."""
    target, code, _ = written(tmp_path)
    layer = keras.layers.Lambda.from_config(
        {"name": "l", "function": {"class_name": "__lambda__", "config": {"code": code[0], "defaults": None, "closure": None}}},
        safe_mode=False,
    )
    layer.function(1)
    assert target.exists()


# ------------------------------------------------------------------------------------------------------- other files


def linked(source, target, change):
    """A copy of weights, in which something is elsewhere: in `elsewhere.h5`."""
    shutil.copy(source, target.with_name("elsewhere.h5"))
    shutil.copy(source, target)
    with h5py.File(target, "a") as file:
        change(file)
    return target


def replaced(path, new):
    def change(file):
        dataset = file[path]
        shape, dtype = dataset.shape, dataset.dtype
        del dataset, file[path]
        new(file, path, shape, dtype)

    return change


def raw_file(file, path, shape, dtype):
    Path(file.filename).with_name("raw").write_bytes(b"secret!!" * 100)
    file.create_dataset(path, shape, dtype, external=[("raw", 0, h5py.h5f.UNLIMITED)])


def virtual(file, path, shape, dtype):
    layout = h5py.VirtualLayout(shape, dtype)
    layout[...] = h5py.VirtualSource("elsewhere.h5", path, shape)
    file.create_virtual_dataset(path, layout)


def link(kind):
    def change(file, path, shape, dtype):
        file[path] = kind(path)

    return change


ELSEWHERE = {
    "an external link": link(lambda path: h5py.ExternalLink("elsewhere.h5", path)),
    "a soft link": link(lambda path: h5py.SoftLink("/dense_2/dense_2/kernel:0")),
    "a raw file": raw_file,
    "a virtual dataset": virtual,
}


@pytest.mark.parametrize("how", ELSEWHERE)
def test_other_files_are_not_read(how, tmp_path):
    why = "or a link|of other shapes" if "link" in how else "takes its values from another file"
    refused(linked(WEIGHTS, tmp_path / "w.h5", replaced("dense_1/dense_1/kernel:0", ELSEWHERE[how])), match=why)
    whole = "model_weights/dense_1/dense_1/kernel:0"
    refused(linked(MODEL, tmp_path / "m.h5", replaced(whole, ELSEWHERE[how])), match=why)
    new = "layers/dense/vars/0"
    refused(linked(NEW_WEIGHTS, tmp_path / "w3.h5", replaced(new, ELSEWHERE[how])), rebuilt_models.nested(), why)


@pytest.mark.parametrize("path", ["dense_1", "layers", "layers/dense", "layers/dense/vars"])
def test_groups_elsewhere_are_not_read(path, tmp_path):
    def change(file):
        del file[path]
        file[path] = h5py.ExternalLink("elsewhere.h5", path)

    source, model = (WEIGHTS, None) if path == "dense_1" else (NEW_WEIGHTS, rebuilt_models.nested())
    refused(linked(source, tmp_path / "w.h5", change), model)


def test_a_group_in_itself_ends(tmp_path):
    def change(file):
        file["layers/dense/again"] = file["layers"]

    refused(linked(NEW_WEIGHTS, tmp_path / "w.h5", change), rebuilt_models.nested(), "more than once")


# ------------------------------------------------------------------------------------------------- sizes that lie


def huge(file, path, shape, dtype):
    file.create_dataset(path, (1 << 20, 1 << 22), dtype, chunks=(1, 1 << 10))


def never_written(file, path, shape, dtype):
    file.create_dataset(path, shape, dtype)


@pytest.mark.parametrize("lie", [huge, never_written])
def test_datasets_that_lie(lie, tmp_path):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(linked(WEIGHTS, tmp_path / "w.h5", replaced("dense_1/dense_1/kernel:0", lie)))
    refused(linked(MODEL, tmp_path / "m.h5", replaced("model_weights/dense_1/dense_1/kernel:0", lie)))
    refused(linked(NEW_WEIGHTS, tmp_path / "w3.h5", replaced("layers/dense/vars/0", lie)), rebuilt_models.nested())
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MEMORY


def test_a_configuration_that_lies_takes_no_memory(tmp_path):
    """Of a layer with a million million units, whose weights the file claims to hold."""

    def change(config):
        config["config"]["layers"][0]["config"]["units"] = 10**12

    path = edited(MODEL, tmp_path / "m.h5", change)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=r"of other shapes: .*kernel:0 \[5, 6\] for .*kernel \[5, 1000000000000\]"):
        syncbn.load_legacy(path)
    with h5py.File(path, "a") as file:
        for weight, shape in {"kernel:0": (5, 10**12), "bias:0": (10**12,)}.items():
            replaced(
                f"model_weights/dense_1/dense_1/{weight}",
                lambda f, p, s, d, shape=shape: f.create_dataset(p, shape, d, chunks=True),
            )(file)
        for name in ("gamma", "beta", "moving_mean", "moving_variance"):
            where = f"model_weights/sync_batch_normalization_1/sync_batch_normalization_1/{name}:0"
            replaced(where, lambda f, p, s, d: f.create_dataset(p, (10**12,), d, chunks=True))(file)
        replaced("model_weights/dense_2/dense_2/kernel:0", lambda f, p, s, d: f.create_dataset(p, (10**12, 3), d, chunks=True))(
            file
        )
    with pytest.raises(ValueError, match=r"claims \d+ bytes, and has 0"):
        syncbn.load_legacy(path)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MEMORY
    # What was never made is forgotten: another model is made as ever.
    model = syncbn.load_legacy(MODEL)
    near(model(Computed("tf2.2", "sequential").x), Computed("tf2.2", "sequential").arrays["y"], 1e-5)


def test_an_attribute_that_lies(tmp_path):
    data = bytearray(WEIGHTS.read_bytes())
    at = data.index(struct.pack("<Q", 5), data.index(b"layer_names\0"))
    for place_of_size in (at, at + 8):
        data[place_of_size : place_of_size + 8] = struct.pack("<Q", 1 << 40)
    (tmp_path / "w.h5").write_bytes(data)
    refused(tmp_path / "w.h5")


def crc32c(data):
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def varint(value):
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def checkpoint(folder, index=None, data=None):
    """A copy of a checkpoint, changed."""
    for ending, change in ((".index", index), (".data-00000-of-00001", data)):
        held = bytearray((OLD / f"sequential.ckpt{ending}").read_bytes())
        (folder / f"c.ckpt{ending}").write_bytes(change(held) if change else held)
    return folder / "c.ckpt"


@needs_tensorflow
def test_a_string_that_lies(tmp_path):
    """Its length has the right checksum: TensorFlow itself believes it, and ends the process."""
    start = checkpoint_index.read_index(OLD / "sequential.ckpt")["_CHECKPOINTABLE_OBJECT_GRAPH"].offset

    def change(data):
        crc = crc32c(struct.pack("<Q", 1 << 40))
        forged = varint(1 << 40) + struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)
        data[start : start + len(forged)] = forged
        return data

    refused(checkpoint(tmp_path, data=change), match="claims 1099511627776 bytes")


def shape_that_lies(data):
    return data.replace(b"\x12\x02\x08\x05\x12", b"\x12\x02\x08\x7f\x12")  # the dimensions of a kernel, 5 and 6


def block_that_lies(data):
    """The footer has two places, each of an offset and a size; the second is where the index of the blocks is."""
    data[-48:-8] = (b"\0\0" + varint(1 << 60) + varint(1 << 60)).ljust(40, b"\0")
    return data


@needs_tensorflow
@pytest.mark.parametrize("lie", [shape_that_lies, block_that_lies])
def test_an_index_that_lies(lie, tmp_path):
    assert lie(bytearray((OLD / "sequential.ckpt.index").read_bytes())) != (OLD / "sequential.ckpt.index").read_bytes()
    refused(checkpoint(tmp_path, index=lie), match="has 120 bytes|lies outside")
    refused(checkpoint(tmp_path, data=lambda data: data[:40]), match="past the end")


# ------------------------------------------------------------------------------------------------------- broken files


def broken(data, seed):
    """Cut short, or with some bytes of other values, or with a piece missing."""
    rng, data = random.Random(seed), bytearray(data)
    if seed % 3 == 0:
        return data[: rng.randrange(len(data))]
    if seed % 3 == 1:
        for _ in range(rng.choice([1, 2, 8])):
            data[rng.randrange(len(data))] = rng.choice([0, 255, rng.randrange(256)])
        return data
    at = rng.randrange(len(data))
    return data[:at] + data[at + rng.randrange(1, 64) :]


def tried(path, model):
    """How many of the two functions refuse; where load_weights does, the model is as it was."""
    before = values(model)
    errors = [error_of(lambda: syncbn.load_weights(model, path)), error_of(lambda: syncbn.load_legacy(path))]
    assert {type(error).__name__ for error in errors} <= {"FileError", "FileNotFoundError", "NoneType"}
    if errors[0]:
        for a, b in zip(values(model), before, strict=True):
            np.testing.assert_array_equal(a, b)
    return sum(error is not None for error in errors)


def error_of(call):
    try:
        call()
    except Exception as error:
        return error


@pytest.mark.parametrize("source", [MODEL, WEIGHTS, NEW_WEIGHTS], ids=lambda path: path.name)
def test_broken_hdf5(source, tmp_path):
    model = rebuilt_models.nested() if source == NEW_WEIGHTS else rebuilt_models.sequential()
    found = 0
    for seed in range(18):
        (tmp_path / "w.h5").write_bytes(broken(source.read_bytes(), seed))
        found += tried(tmp_path / "w.h5", model)
    assert found >= 18


@needs_tensorflow
@pytest.mark.parametrize("part", ["index", "data"])
def test_broken_checkpoints(part, tmp_path):
    model, found = rebuilt_models.sequential(), 0
    for seed in range(18):
        found += tried(checkpoint(tmp_path, **{part: lambda data, seed=seed: broken(data, seed)}), model)
    assert found >= 18


@needs_tensorflow
@pytest.mark.parametrize("part", ["saved_model.pb", "keras_metadata.pb", "variables/variables.index"])
def test_broken_saved_models(part, tmp_path):
    folder = place("tf2.2" if part == "saved_model.pb" else "tf2.6", "nested", PACKED, tmp_path)
    held, model, found = (folder / part).read_bytes(), rebuilt_models.nested(), 0
    for seed in range(12):
        (folder / part).write_bytes(broken(held, seed))
        found += tried(folder, model)
    assert found >= 4


@needs_tensorflow
def test_missing_parts(tmp_path):
    path = checkpoint(tmp_path)
    Path(f"{path}.data-00000-of-00001").unlink()
    refused(path, match="cannot be read")
    (tmp_path / "empty").mkdir()
    (tmp_path / "garbage").write_bytes(b"no model at all")
    for name in ("empty", "garbage"):
        refused(tmp_path / name, match="of another kind")
    for call in (syncbn.load_legacy, lambda path: syncbn.load_weights(rebuilt_models.page(), path)):
        with pytest.raises(FileNotFoundError):
            call(tmp_path / "nothing")


def test_values_that_are_no_numbers(tmp_path):
    def text(file, path, shape, dtype):
        file[path] = np.full(shape, b"text")

    refused(linked(WEIGHTS, tmp_path / "w.h5", replaced("dense_1/dense_1/kernel:0", text)), match="no numbers")


def test_a_deep_configuration_ends(tmp_path):
    shutil.copy(MODEL, tmp_path / "m.h5")
    with h5py.File(tmp_path / "m.h5", "a") as file:
        file.attrs["model_config"] = '{"class_name": "Sequential", "config": ' + "[" * 20000 + "]" * 20000 + "}"
    with pytest.raises(ValueError, match="RecursionError"):
        syncbn.load_legacy(tmp_path / "m.h5")
