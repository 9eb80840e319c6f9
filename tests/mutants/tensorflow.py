"""Faults in the Keras layer, the algebra and what runs on TensorFlow."""

from __future__ import annotations

from mutants import Mutant

ENGINE, REPLICAS = "tensorflow/engine.py", "tensorflow/replicas.py"
KERNELS, LAYER, MATHS = "tensorflow/passes_cpu.py", "keras/layer.py", "maths.py"
ENGINE_TESTS, LAYER_TESTS, ALONE_TESTS = (
    "tensorflow/test_engine_tensorflow.py",
    "tensorflow/test_layer_tensorflow.py",
    "keras/test_layer_keras.py",
)


SUMS = "*maths.raw_sums(count, tf.cast(k, tf.float64), s, q)"
ROUND = "tf.cast(tf.cast({}, tf.float32), tf.float64)"
MUTANTS = [
    Mutant("no collective", REPLICAS, "        if self.replicas == 1:\n            return v\n", "        return v\n",
           ENGINE_TESTS, "concatenated and ragged and graph"),
    Mutant("mean of means", KERNELS, "return tf.concat([tf.reshape(count, [1]), *maths",
           "return 1 / tf.maximum(count, 1) * tf.concat([tf.reshape(count, [1]), *maths", ENGINE_TESTS, "concatenated and ragged and graph"),
    Mutant("E[x²] − E[x]² in float32", KERNELS, SUMS, f"*[{ROUND.format('v')} for v in maths.raw_sums(count, tf.cast(k, tf.float64), s, q)]",
           ENGINE_TESTS, "large_mean"),
    Mutant("mean rounded before the merge", KERNELS, SUMS,
           f"*maths.raw_sums(count, {ROUND.format('tf.cast(k, tf.float64) + s / tf.maximum(count, 1)')}, 0 * s, q - s * s / tf.maximum(count, 1))",
           ENGINE_TESTS, "large_mean"),
    Mutant("lo dropped from normalize", MATHS, "return a, offset - lo * a", "return a, offset", ENGINE_TESTS, "large_mean"),
    Mutant("dropped term in the input gradient", MATHS, "return a, -rstd * sum_g / at_least_one - lo * a",
           "return 0 * a, -rstd * sum_g / at_least_one", ENGINE_TESTS, "concatenated and ragged and graph"),
    Mutant("local count in the backward pass", KERNELS, "moment_path_coefficients(tf.cast(count, rstd.dtype)",
           "moment_path_coefficients(tf.cast(count, rstd.dtype) / 2", ENGINE_TESTS, "concatenated and ragged and graph"),
    Mutant("message times a local scale", KERNELS, "    message = tf.concat([scale * sum_dy, scale * dscale], 0)\n    messages = [message] if exchange is None else exchange(message)\n",
           "    message = tf.concat([sum_dy, dscale], 0)\n    messages = [tf.tile(scale, [2]) * v for v in ([message] if exchange is None else exchange(message))]\n",
           ENGINE_TESTS, "concatenated and differ and graph"),
    Mutant("moments are constants of the second derivative", ENGINE, "mean, variance = self._attach(folded, mask)",
           "mean, variance = joined(self.moments.mean), self.moments.variance", ENGINE_TESTS, "second_order"),
    Mutant("mask forgotten in the count", KERNELS, "n = tf.math.count_nonzero(mask)", "n = tf.size(mask, tf.int64)",
           ENGINE_TESTS, "concatenated and masked and graph"),
    Mutant("mask forgotten in the backward pass", KERNELS, "through = tf.where(fold.fold_mask(mask, x), through, tf.zeros([], through.dtype))", "pass",
           ENGINE_TESTS, "concatenated and masked and graph"),
    Mutant("naive float32 sums", KERNELS, "BLOCK_ROWS = 1024", "BLOCK_ROWS = 10**9", ENGINE_TESTS, "million"),
    Mutant("groups selected by multiplication", REPLICAS, "v = tf.where(mine, v[None], tf.zeros([], v.dtype))",
           "v = tf.cast(mine, v.dtype) * v[None]", ENGINE_TESTS, "nan_stays"),
    Mutant("groups averaged without their counts", REPLICAS, "weights = tf.cast(counts, variances.dtype) / tf.cast(tf.maximum(total, 1), variances.dtype)",
           "weights = tf.ones_like(counts) / world.groups", ENGINE_TESTS, "groups"),
    Mutant("pairs added before they are subtracted", MATHS, "(k - pivot) + r", "(k + r) - pivot", "test_maths.py", "merge"),
    Mutant("a message a moment", ENGINE, "passes.moments_of_sums(world.messages(message))",
           "passes.moments_of_sums([tf.concat([world.sum_by_group(v) for v in (message[:1], message[1:])], 0)])", LAYER_TESTS, "one_collective"),
    Mutant("a message in inference", LAYER, "        if not training:\n            mean, variance =", "        if not training:\n            self._engine.moments(inputs, **where)\n            mean, variance =",
           LAYER_TESTS, "inference_and_building"),
    Mutant("moving statistics from local moments", LAYER, "moments = self._engine.moments(inputs, **where)",
           "moments = self._engine.moments(inputs, **where)\n            local = self._engine.moments(inputs, **{**where, 'group': LOCAL})\n            moments = moments._replace(average=local[:3])",
           LAYER_TESTS, "concatenated and ragged and graph"),
    Mutant("statistics move at count 0", "contract.py", "usable = count > 0", "usable = count > -1", LAYER_TESTS, "says_nothing"),
    Mutant("statistics that are not finite move", "contract.py", "usable = usable & (finite if", "usable = usable | (finite if", LAYER_TESTS, "says_nothing"),
    Mutant("padding that is not finite spreads", LAYER, "ops.logical_or(mask, ops.isfinite(inputs))", "ops.ones_like(inputs, 'bool')",
           LAYER_TESTS, "padding"),
    Mutant("momentum the wrong way round", MATHS, "old * momentum + new * (1 - momentum)", "new * momentum + old * (1 - momentum)",
           ALONE_TESTS, "equals_keras or renorm_by_formula"),
    Mutant("adjustment dropped", LAYER, "a, b = flat", "a, b = 1, 0", ALONE_TESTS, "adjustment_by_formula or adjustment_in"),
    Mutant("r and d after the statistics moved", LAYER, "            scale, offset = self._scale_and_offset(inputs, moments, gamma, beta)\n",
           "            self._update_statistics(moments)\n            scale, offset = self._scale_and_offset(inputs, moments, gamma, beta)\n", ALONE_TESTS, "renorm_by_formula"),
    Mutant("renorm is recomputed", "validation.py", "    if recomputed:", "    if False:", "keras/test_layer_keras.py", "remat"),
    Mutant("variable bounds become weights", LAYER, "self._clipping = _Untracked(validation.check_renorm_clipping(renorm_clipping))",
           "self._clipping = _Untracked(validation.check_renorm_clipping(renorm_clipping)); self._bounds = validation.check_renorm_clipping(renorm_clipping)",
           ALONE_TESTS, "clipping_takes"),
]  # fmt: skip
