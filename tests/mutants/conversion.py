"""Faults in moving in and moving out."""

from __future__ import annotations

from mutants import Mutant

TORCH, KERAS, EXCHANGE = "torch/convert.py", "keras/convert.py", "class_swap.py"
TORCH_FOLD, KERAS_FOLD = "torch/fold.py", "keras/fold.py"
CONFIG, MATCHING, CHECKPOINTS, INDEX = (
    "keras/legacy_config.py",
    "keras/matching.py",
    "keras/checkpoints.py",
    "keras/checkpoint_index.py",
)
OLD_WEIGHTS, NEW_WEIGHTS, HDF5 = "keras/keras2_hdf5.py", "keras/keras3_weights.py", "keras/hdf5.py"
OLD_TESTS, MATCHING_TESTS, HOSTILE_TESTS = "keras/test_old_files.py", "keras/test_matching.py", "keras/test_hostile_files.py"
TORCH_TESTS, KERAS_TESTS, LEGACY_TESTS = "torch/test_convert_torch.py", "keras/test_convert_keras.py", "keras/test_legacy.py"
TORCH_EXPORT, KERAS_EXPORT = "torch/test_export_torch.py", "keras/test_export_keras.py"

MUTANTS = [
    Mutant("overrides are not looked at", EXCHANGE, "return ancestor if ancestor is not None and not overridden(cls, ancestor) else None",
           "return ancestor", TORCH_TESTS, "unknown_ones"),
    Mutant("a forward of the object's own is overlooked", TORCH, '"forward" in vars(module) or ', "", TORCH_TESTS, "unknown_ones"),
    Mutant("replicas keep statistics of their own", KERAS, "statistic.assign(ops.mean(ops.stack(values), 0))", "pass", KERAS_TESTS, "agree_after"),
    Mutant("renorm's statistics outside of the scope", KERAS, "if _replicas(layer.moving_mean) else", "if False else", KERAS_TESTS, "agree_after"),
    Mutant("always back to 2d", TORCH, "            targets[module] = before\n", "            targets[module] = nn.BatchNorm2d\n", TORCH_TESTS, "each_class"),
    Mutant("renorm starts from the variance", TORCH, "stddev = torch.sqrt(variance + module.eps)", "stddev = variance + module.eps", TORCH_TESTS, "renorm_starts"),
    Mutant("renorm buffers stay", TORCH, "module._buffers.pop(name, None)", "pass", TORCH_TESTS, "renorm_starts"),
    Mutant("timm's activation is lost", TORCH, "y = getattr(self, name)(y)", "pass", TORCH_TESTS, "timm_keeps"),
    Mutant("wrapped models pass", TORCH, '"DistributedDataParallel": ("torch.nn.parallel", "wrapped"),', "", TORCH_TESTS, "wrapped_and_sharded"),
    Mutant("compiled modules pass", TORCH, '"compiled" if module._compiled_call_impl is not None else states[cls]', "states[cls]", TORCH_TESTS, "wrong_state"),
    Mutant("switched-off statistics move", "torch/module.py", "self.running_mean is not None and self.track_running_stats and", "self.running_mean is not None and",
           TORCH_TESTS, "switched_off"),
    Mutant("ranks of the example are not asked", TORCH, "implied = classes.pop() if len(classes) == 1 else None", "implied = nn.BatchNorm2d", TORCH_TESTS, "made_as_ours"),
    Mutant("build stays theirs", KERAS, "cell.cell_contents = MethodType(cls.build, layer)", "pass", KERAS_TESTS, "every_kind and deferred"),
    Mutant("traces stay", KERAS, "part.train_function = part.test_function = part.predict_function = None", "pass", KERAS_TESTS, "trains_on"),
    Mutant("renorm's first statistics are the initial ones", KERAS, "    layer.renorm_stddev.assign(ops.copy(stddev))\n", "", KERAS_TESTS, "renorm_starts"),
    Mutant("what Keras's build noted is lost", KERAS, 'attributes["_reduction_axes"] =', "_ =", KERAS_TESTS, "every_kind and deferred"),
    Mutant("a failed load stays", NEW_WEIGHTS, "for held, values in before:", "for held, values in []:", LEGACY_TESTS, "undone"),
    Mutant("one key for another is not taken", NEW_WEIGHTS, "return kind in (PLAIN, OURS) and", "return False and", LEGACY_TESTS, "any_batch_norm"),
    Mutant("shapes are not compared", MATCHING, "if missing or unused or other:", "if missing or unused:", MATCHING_TESTS, "does_not_fit"),
    Mutant("shapes of the new layout are not compared", NEW_WEIGHTS, "if missing or unused or other:", "if missing or unused:", LEGACY_TESTS, "do_not_fit"),
    Mutant("gaps in numbers count", NEW_WEIGHTS, ".index((kind, place))", ".index((kind, place)) and place", OLD_TESTS, "in_code and tf2.12"),
    Mutant("a list of one axis is another shape", MATCHING, "return batch_norm and len(short) == 1 and", "return False and", LEGACY_TESTS, "list_of_one_axis"),
    Mutant("order before chosen names", MATCHING, "if same and all(name in chosen for name in crossed):", "if False:", MATCHING_TESTS, "somebody_chose"),
    Mutant("contradictions pass", MATCHING, "        raise order_of_names(crossed)\n", "        pass\n", MATCHING_TESTS, "somebody_chose"),
    Mutant("a copy of the weights is forgotten", MATCHING, "layer.finalize_state()", "pass", MATCHING_TESTS, "normalization"),
    Mutant("frozen layers change places", OLD_WEIGHTS, "        raise two_ways(sorted({parts[-2] for parts in own}))\n", "        fitting.reverse()\n", MATCHING_TESTS, "frozen"),
    Mutant("frozen layers are taken by order", OLD_WEIGHTS, "_order(_places_and_weights(own), _places_and_weights(given)), in_order", "in_order,", OLD_TESTS, "in_code and nested"),
    Mutant("a model's own weights are forgotten", OLD_WEIGHTS, "if TOP in root:", "if False:", MATCHING_TESTS, "itself"),
    Mutant("the first of two models", CHECKPOINTS, "if len(whole) > 1:", "if False:", MATCHING_TESTS, "two_models"),
    Mutant("models below the root are not found", CHECKPOINTS, "return matches[whole[0]] if whole else", "return at_root if whole else", OLD_TESTS, "training_loads and functional"),
    Mutant("what a checkpoint has beside is no error", CHECKPOINTS, "if s.name not in used}", "if False}", MATCHING_TESTS, "does_not_fit"),
    Mutant("layers in order of their names as text", CHECKPOINTS, "key=lambda name: int(name.removeprefix(WITH_WEIGHTS))", "reverse=True", OLD_TESTS, "in_code and page and ckpt"),
    Mutant("a moved folder is not found", "keras/files.py", "Path(found[1]).name", "found[1]", OLD_TESTS, "moved"),
    Mutant("only the index's name is a checkpoint's", "keras/files.py", r"\.(index|data-\d+-of-\d+)$", r"\.(index)$", OLD_TESTS, "any_name"),
    Mutant("the name tells the kind", "keras/files.py", "if not h5py.is_hdf5(path):", 'if path.suffix != ".h5":', OLD_TESTS, "content_tells"),
    Mutant("TensorFlow's absence is not told", CHECKPOINTS, "raise no_tensorflow(path, kind) from error", "pass", OLD_TESTS, "without_tensorflow"),
    Mutant("a batch's size is kept", CONFIG, "shape = [None, *self.value(config[\"build_input_shape\"])[1:]]", 'shape = self.value(config["build_input_shape"])', OLD_TESTS, "any_batch"),
    Mutant("slashes stay", MATCHING, 'return name.replace("/", "_")', "return name", OLD_TESTS, "become_ours"),
    Mutant("calls are counted from 0", CONFIG, "first[name] = min(first[name], call)", "first[name] = 0", OLD_TESTS, "computes and nested"),
    Mutant("several axes are dropped", CONFIG, '{**rest, "axis": config["axes"]} if "axes" in config else rest', "rest", OLD_TESTS, "computes and other_axes"),
    Mutant("one axis stays a list", CONFIG, "axis = axis[0] if isinstance(axis, list) and len(axis) == 1 else axis", "pass", OLD_TESTS, "two_axes"),
    Mutant("two axes become ours unsaid", CONFIG, 'self.warnings.append(several_axes(config.get("name", ""), axis))', "pass", OLD_TESTS, "two_axes"),
    Mutant("hard_sigmoid is Keras 3's", CONFIG, 'if value.get(key) == "hard_sigmoid":', "if False:", OLD_TESTS, "keep_their_meaning"),
    Mutant("safe mode is off", CONFIG, "SafeModeScope(True)", "SafeModeScope(False)", HOSTILE_TESTS, "nothing_in_a_file_runs"),
    Mutant("layers that read other files", CONFIG, 'FOREIGN = ("TFSMLayer", "TorchModuleWrapper", "JaxLayer", "FlaxLayer")', "FOREIGN = ()", HOSTILE_TESTS, "nothing_in_a_file_runs"),
    Mutant("variables made of values fail", CONFIG, 'if "while in a stateless scope" not in str(error):', "if True:", OLD_TESTS, "unknown_layers"),
    Mutant("memory before the check", CONFIG, "StatelessScope(initialize_variables=False)", "StatelessScope()", HOSTILE_TESTS, "takes_no_memory"),
    Mutant("refused variables are made later", CONFIG, 'global_state.set_global_attribute("uninitialized_variables", [])', "pass", HOSTILE_TESTS, "takes_no_memory"),
    Mutant("links are followed", HDF5, " or not isinstance(parent.get(part, getlink=True), h5py.HardLink)", "", HOSTILE_TESTS, "other_files"),
    Mutant("linked groups are followed", HDF5, "if isinstance(group.get(key, getlink=True), h5py.HardLink)", "if key in group", HOSTILE_TESTS, "elsewhere"),
    Mutant("other files are read", HDF5, " or dataset.external or dataset.is_virtual", "", HOSTILE_TESTS, "other_files"),
    Mutant("claimed sizes are believed", HDF5, "if claimed > MOST_COMPRESSED * held:", "if False:", HOSTILE_TESTS, "lie"),
    Mutant("groups inside of themselves", NEW_WEIGHTS, "if address in seen:", "if False:", HOSTILE_TESTS, "in_itself"),
    Mutant("a string's length is believed", INDEX, "if at + 4 + length != entry.size:", "if False:", HOSTILE_TESTS, "string_that_lies"),
    Mutant("a tensor's shape is believed", INDEX, "count * ITEM_SIZES[dtype] != size:", "False:", HOSTILE_TESTS, "index_that_lies"),
    Mutant("blocks are believed", INDEX, "if offset + size + 1 > len(table) - FOOTER or size < 4 or table[offset + size] != 0:", "if size < 4:", HOSTILE_TESTS, "index_that_lies"),
    Mutant("data that is missing is not missed", INDEX, "if entry.offset + entry.size > sizes[entry.file]:", "if False:", HOSTILE_TESTS, "index_that_lies"),
    Mutant("errors of libraries pass", "keras/files.py", "    except Exception as error:\n        message", "    except KeyError as error:\n        message", HOSTILE_TESTS, "broken_hdf5"),
    Mutant("text is read as numbers", MATCHING, 'if value.dtype.kind not in "fiub" and value.dtype.name != "bfloat16":', "if False:", HOSTILE_TESTS, "no_numbers"),
    Mutant("fold forgets the bias", TORCH_FOLD, "layer.bias.double() - mean", "-mean", TORCH_EXPORT, "computes_the_same and Linear"),
    Mutant("fold forgets other uses", TORCH_FOLD, "or len(before.users) != 1", "", TORCH_EXPORT, "others_use"),
    Mutant("fold forgets hooks", TORCH_FOLD, "return not any(hooks) and", "return", TORCH_EXPORT, "others_use"),
    Mutant("fold forgets epsilon", KERAS_FOLD, "wide(norm.moving_variance) + norm.epsilon", "wide(norm.moving_variance)", KERAS_EXPORT, "computes_the_same and Dense"),
    Mutant("fold forgets other consumers", KERAS_FOLD, "if consumers[id(x)] == 1 and id(x) not in outputs:", "if True:", KERAS_EXPORT, "others_use"),
]  # fmt: skip
