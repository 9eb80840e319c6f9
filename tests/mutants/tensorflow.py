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


RAW = "total, squares = maths.raw_sums(count, wide_k, s, q)"
ROUND = "tf.cast(tf.cast({}, tf.float32), tf.float64)"
MUTANTS = [
    Mutant("no collective", REPLICAS, "        if self.replicas == 1:\n            return v\n", "        return v\n",
           ENGINE_TESTS, "concatenated and ragged and graph"),
    Mutant("mean of means", ENGINE, RAW, f"{RAW}\n    some = tf.maximum(count, 1)\n    total, squares, count = total / some, squares / some, count / some",
           ENGINE_TESTS, "concatenated and ragged and graph"),
    Mutant("E[x²] − E[x]² in float32", ENGINE, RAW, f"{RAW}\n    total, squares = {ROUND.format('total')}, {ROUND.format('squares')}",
           ENGINE_TESTS, "large_mean"),
    Mutant("mean rounded before the merge", ENGINE, RAW,
           f"some = tf.maximum(count, 1)\n    wide_k, s, q = {ROUND.format('wide_k + s / some')}, 0 * s, q - s * s / some\n    {RAW}",
           ENGINE_TESTS, "large_mean"),
    Mutant("lo dropped from normalize", MATHS, "return a, offset - lo * a", "return a, offset", ENGINE_TESTS, "large_mean"),
    Mutant("dropped term in the input gradient", MATHS, "return a, -rstd * sum_g / at_least_one - lo * a",
           "return 0 * a, -rstd * sum_g / at_least_one", ENGINE_TESTS, "concatenated and ragged and graph"),
    Mutant("local count in the backward pass", ENGINE, "tf.cast(moments.count, self.wide)",
           "tf.cast(moments.count, self.wide) / moments.replicas", ENGINE_TESTS, "concatenated and ragged and graph"),
    Mutant("message times a local scale", ENGINE, "sums = self.world.sum_of_group(tf.concat([wide_scale * sum_dy, wide_scale * dscale], 0))\n        a, b =",
           "sums = tf.concat([wide_scale] * 2, 0) * self.world.sum_of_group(tf.concat([sum_dy, dscale], 0))\n        a, b =",
           ENGINE_TESTS, "concatenated and differ and graph"),
    Mutant("moments are constants of the second derivative", ENGINE, "mean, variance = self._attach(x)",
           "mean, variance = self.mean, self.variance", ENGINE_TESTS, "second_order"),
    Mutant("mask forgotten in the count", KERNELS, "n = tf.math.count_nonzero(mask)", "n = tf.size(mask, tf.int64)",
           ENGINE_TESTS, "concatenated and masked and graph"),
    Mutant("mask forgotten in the backward pass", ENGINE, "dx if self.mask is None else", "dx if True else",
           ENGINE_TESTS, "concatenated and masked and graph"),
    Mutant("naive float32 sums", KERNELS, "BLOCK_ROWS = 1024", "BLOCK_ROWS = 10**9", ENGINE_TESTS, "million"),
    Mutant("groups selected by multiplication", REPLICAS, "v = tf.where(mine, v[None], tf.zeros([], v.dtype))",
           "v = tf.cast(mine, v.dtype) * v[None]", ENGINE_TESTS, "nan_stays"),
    Mutant("groups averaged without their counts", REPLICAS, "weights = tf.cast(counts, variances.dtype) / tf.cast(tf.maximum(total, 1), variances.dtype)",
           "weights = tf.ones_like(counts) / world.groups", ENGINE_TESTS, "groups"),
    Mutant("pairs added before they are subtracted", MATHS, "(k - pivot) + r", "(k + r) - pivot", "test_maths.py", "merge"),
    Mutant("a message a moment", ENGINE, "message = world.sum_by_group(tf.concat([tf.reshape(count, [1]), total, squares], 0))",
           "message = tf.concat([world.sum_by_group(v) for v in (tf.reshape(count, [1]), total, squares)], -1)", LAYER_TESTS, "one_collective"),
    Mutant("a message in inference", LAYER, "        else:\n            mean, variance =", "        else:\n            self._engine.moments(inputs, **where)\n            mean, variance =",
           LAYER_TESTS, "inference_and_building"),
    Mutant("moving statistics from local moments", LAYER, "moments = self._engine.moments(inputs, **where)",
           "moments = self._engine.moments(inputs, **where)\n            local = self._engine.moments(inputs, **{**where, 'group': LOCAL})\n            moments = moments._replace(average=local[:3])",
           LAYER_TESTS, "concatenated and ragged and graph"),
    Mutant("statistics move at count 0", LAYER, "sound = count > 0", "sound = count > -1", LAYER_TESTS, "says_nothing"),
    Mutant("statistics that are not finite move", LAYER, "sound = ops.logical_and(sound, finite if len(ops.shape(count)) else ops.all(finite))", "pass", LAYER_TESTS, "says_nothing"),
    Mutant("padding that is not finite spreads", LAYER, "ops.logical_or(mask, ops.isfinite(inputs))", "ops.ones_like(inputs, 'bool')",
           LAYER_TESTS, "padding"),
    Mutant("momentum the wrong way round", MATHS, "old * momentum + new * (1 - momentum)", "new * momentum + old * (1 - momentum)",
           ALONE_TESTS, "equals_keras or renorm_by_formula"),
    Mutant("adjustment dropped", LAYER, "a, b = flat", "a, b = 1, 0", ALONE_TESTS, "adjustment_by_formula or adjustment_in"),
    Mutant("r and d after the statistics moved", LAYER, "            if self.renorm:\n                found =",
           "            self._move(moments)\n            if self.renorm:\n                found =", ALONE_TESTS, "renorm_by_formula"),
    Mutant("renorm is recomputed", "validation.py", "    if recomputed:", "    if False:", "keras/test_layer_keras.py", "remat"),
    Mutant("variable bounds become weights", LAYER, "self._clipping = _Untracked(validation.check_renorm_clipping(renorm_clipping))",
           "self._clipping = _Untracked(validation.check_renorm_clipping(renorm_clipping)); self._bounds = validation.check_renorm_clipping(renorm_clipping)",
           ALONE_TESTS, "clipping_takes"),
]  # fmt: skip
