"""Faults in convert, revert, fold and the readers of old files."""

from __future__ import annotations

from mutants import Mutant

TORCH, KERAS, EXCHANGE = "torch/convert.py", "keras/convert.py", "class_swap.py"
TORCH_FOLD, KERAS_FOLD, WEIGHTS, LEGACY = (
    "torch/fold.py",
    "keras/fold.py",
    "keras/weights.py",
    "keras/legacy.py",
)
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
    Mutant("switched-off statistics are updated", "torch/module.py", "mean is not None and self.training and self.track_running_stats:", "mean is not None and self.training:",
           TORCH_TESTS, "switched_off"),
    Mutant("ranks of the example are not asked", TORCH, "implied = classes.pop() if len(classes) == 1 else None", "implied = nn.BatchNorm2d", TORCH_TESTS, "made_as_ours"),
    Mutant("build stays Keras's", "keras/_private.py", "cell.cell_contents = MethodType(cls.build, layer)", "pass", KERAS_TESTS, "every_kind and deferred"),
    Mutant("traces stay", KERAS, "part.train_function = part.test_function = part.predict_function = None", "pass", KERAS_TESTS, "trains_on"),
    Mutant("renorm's first statistics are the initial ones", KERAS, "    layer.renorm_stddev.assign(ops.copy(stddev))\n", "", KERAS_TESTS, "renorm_starts"),
    Mutant("what Keras's build noted is lost", KERAS, 'attributes["_reduction_axes"] =', "_ =", KERAS_TESTS, "every_kind and deferred"),
    Mutant("shapes are not compared", WEIGHTS, "if missing or unused or other:", "if missing or unused:", LEGACY_TESTS, "do_not_fit"),
    Mutant("a failed load stays", WEIGHTS, "                model.load_weights(own)\n", "", LEGACY_TESTS, "undone"),
    Mutant("one key for another is not taken", WEIGHTS, "container.move(key, KEY + match[2])", "pass", LEGACY_TESTS, "any_batch_norm"),
    Mutant("safe mode is off", LEGACY, "SafeModeScope(True)", "SafeModeScope(False)", LEGACY_TESTS, "does_not_run"),
    Mutant("several axes are dropped", LEGACY, '"axis": config["axes"]})', '"axis": -1})', LEGACY_TESTS, "computes and several_axes and h5"),
    Mutant("a module path in old pickles is forgotten", "_moved.py", '    "syncbn.conversion.torch": "syncbn.torch.convert",\n', "",
           "torch/test_files_before.py", "pickled"),
    Mutant("a private name that vanished is None", "keras/_private.py", 'return Missing(f"{module}.{name}")', "return None",
           "keras/test_private_keras.py", "vanished"),
    Mutant("functional models have no class without its name", "keras/_private.py", "if isinstance(found, type):", "if True:",
           "keras/test_private_keras.py", "without_its_name"),
    Mutant("peer memory cannot be switched off", "settings.py", '"SYNCBN_PEER_MEMORY", "1") != "0"', '"SYNCBN_PEER_MEMORY", "1") != ""',
           "test_settings.py", "each_value"),
    Mutant("an error without a mend", "validation.py", "        raise TypeError(f\"The input must be of a float dtype. Received: {dtype}. Cast it first, for example to float32.\")",
           "        raise TypeError(f\"The input must be of a float dtype. Received: {dtype}.\")", "test_errors.py", "the_mend"),
    Mutant("fold forgets the bias", TORCH_FOLD, "layer.bias.double() - mean", "-mean", TORCH_EXPORT, "computes_the_same and Linear"),
    Mutant("fold forgets other uses", TORCH_FOLD, "or len(before.users) != 1", "", TORCH_EXPORT, "others_use"),
    Mutant("fold forgets hooks", TORCH_FOLD, "return not any(hooks) and", "return", TORCH_EXPORT, "others_use"),
    Mutant("fold forgets epsilon", KERAS_FOLD, "wide(norm.moving_variance) + norm.epsilon", "wide(norm.moving_variance)", KERAS_EXPORT, "computes_the_same and Dense"),
    Mutant("fold forgets other consumers", KERAS_FOLD, "if consumers[id(x)] == 1 and id(x) not in outputs:", "if True:", KERAS_EXPORT, "others_use"),
]  # fmt: skip
