"""Faults in the Keras layer, the algebra and what runs on TensorFlow."""

from __future__ import annotations

from mutants import Mutant

ENGINE, REPLICAS = "tensorflow/engine.py", "tensorflow/replicas.py"
KERNELS, GPU, LAYER, MATHS, CONTRACT = (
    "tensorflow/passes_cpu.py",
    "tensorflow/passes_gpu.py",
    "keras/layer.py",
    "maths.py",
    "contract.py",
)
GPU_TESTS = "tensorflow/test_passes_gpu.py"
ENGINE_TESTS, LAYER_TESTS, ALONE_TESTS = (
    "tensorflow/test_engine_tensorflow.py",
    "tensorflow/test_layer_tensorflow.py",
    "keras/test_layer_keras.py",
)


SUMS = "    return tf.concat([tf.reshape(count, [1]), *maths.raw_sums(count, tf.cast(k, tf.float64), s, q)], 0)\n"
FLOAT32 = "tf.cast(tf.cast({}, tf.float32), tf.float64)"
MUTANTS = [
    Mutant("a sum's failure unexplained", "tensorflow/replicas.py", "ReduceOp.SUM, v)\n        except tf.errors.OpError", "ReduceOp.SUM, v)\n        except KeyError",
           "tensorflow/test_engine_tensorflow.py", "message_that_fails and (forward or backward)"),
    Mutant("a gathering's failure unexplained", "tensorflow/replicas.py", "all_gather(payload, axis=0)\n        except tf.errors.OpError", "all_gather(payload, axis=0)\n        except KeyError",
           "tensorflow/test_engine_tensorflow.py", "message_that_fails and gathered"),
    Mutant("no collective", REPLICAS, "        if self.replicas == 1:\n            return v\n", "        return v\n",
           ENGINE_TESTS, "concatenated and ragged and graph"),
    Mutant("mean of means", KERNELS, SUMS, SUMS.replace("return", "message =") + "    return message / tf.maximum(count, 1)\n",
           ENGINE_TESTS, "concatenated and ragged and graph"),
    Mutant("E[x²] − E[x]² in float32", KERNELS, SUMS, SUMS.replace("return", "message =") + f"    return {FLOAT32.format('message')}\n",
           ENGINE_TESTS, "large_mean"),
    Mutant("mean rounded before the merge", KERNELS, SUMS,
           f"    some = tf.maximum(count, 1)\n    k, s, q = {FLOAT32.format('tf.cast(k, tf.float64) + s / some')}, 0 * s, q - s * s / some\n{SUMS}",
           ENGINE_TESTS, "large_mean"),
    Mutant("lo dropped from normalize", MATHS, "return a, offset - lo * a", "return a, offset", ENGINE_TESTS, "large_mean"),
    Mutant("dropped term in the input gradient", MATHS, "return a, -rstd * sum_g / at_least_one - lo * a",
           "return 0 * a, -rstd * sum_g / at_least_one", ENGINE_TESTS, "concatenated and ragged and graph"),
    Mutant("local count in the backward pass", KERNELS, "tf.cast(count, rstd.dtype)", "tf.cast(count, rstd.dtype) / 4", ENGINE_TESTS, "concatenated and ragged and graph"),
    Mutant("message times a local scale", KERNELS, "    messages = [message] if exchange is None else exchange(message)\n",
           "    messages = [tf.concat([scale] * 2, 0) * exchange(tf.concat([sum_dy, dscale], 0))[0]]\n",
           ENGINE_TESTS, "concatenated and differ and graph"),
    Mutant("moments are constants of the second derivative", ENGINE, "mean, variance = self._attach(folded, mask)",
           "mean, variance = self.moments[1:3]", ENGINE_TESTS, "second_order"),
    Mutant("mask forgotten in the count", KERNELS, "n = tf.math.count_nonzero(mask)", "n = tf.size(mask, tf.int64)",
           ENGINE_TESTS, "concatenated and masked and graph"),
    Mutant("mask forgotten in the backward pass", KERNELS, "        through = tf.where(fold.fold_mask(mask, x), through, tf.zeros([], through.dtype))\n", "        pass\n",
           ENGINE_TESTS, "concatenated and masked and graph"),
    Mutant("naive float32 sums", KERNELS, "BLOCK_ROWS = 1024", "BLOCK_ROWS = 10**9", ENGINE_TESTS, "million"),
    Mutant("groups selected by multiplication", REPLICAS, "v = tf.where(mine, v[None], tf.zeros([], v.dtype))",
           "v = tf.cast(mine, v.dtype) * v[None]", ENGINE_TESTS, "nan_stays"),
    Mutant("groups averaged without their counts", REPLICAS, "weights = tf.cast(counts, variances.dtype) / tf.cast(tf.maximum(total, 1), variances.dtype)",
           "weights = tf.ones_like(counts) / world.groups", ENGINE_TESTS, "groups"),
    Mutant("pairs added before they are subtracted", MATHS, "(k - pivot) + r", "(k + r) - pivot", "test_maths.py", "merge"),
    Mutant("a message a moment", ENGINE, "passes.moments_of_sums(world.messages(message))",
           "passes.moments_of_sums([tf.concat([world.messages(v)[0] for v in tf.split(message, [1, message.shape[0] - 1])], 0)])",
           LAYER_TESTS, "one_collective"),
    Mutant("a message in inference", LAYER, "            y = self._engine.normalize(inputs, Moments(None, mean, variance)",
           "            self._engine.moments(inputs, **where)\n            y = self._engine.normalize(inputs, Moments(None, mean, variance)",
           LAYER_TESTS, "inference_and_building"),
    Mutant("moving statistics from local moments", ENGINE, "        return Moments(count, mean, variance, world.replicas)\n",
           "        own = passes.moments_of_sums([message])\n        return Moments(count, mean, variance, world.replicas, own)\n",
           LAYER_TESTS, "concatenated and ragged and graph"),
    Mutant("statistics move at count 0", CONTRACT, "usable = count > 0", "usable = count > -1", LAYER_TESTS, "says_nothing"),
    Mutant("statistics that are not finite move", CONTRACT, "usable = usable & (finite if", "usable = usable | (finite if", LAYER_TESTS, "says_nothing"),
    Mutant("padding that is not finite spreads", LAYER, "ops.logical_or(mask, ops.isfinite(inputs))", "ops.ones_like(inputs, 'bool')",
           LAYER_TESTS, "padding"),
    Mutant("momentum the wrong way round", MATHS, "old * momentum + new * (1 - momentum)", "new * momentum + old * (1 - momentum)",
           ALONE_TESTS, "equals_keras or renorm_by_formula"),
    Mutant("adjustment dropped", LAYER, "a, b = flat", "a, b = 1, 0", ALONE_TESTS, "adjustment_by_formula or adjustment_in"),
    Mutant("r and d after the statistics moved", LAYER, "            scale, offset = self._scale_and_offset(inputs, moments, gamma, beta)\n            self._update_statistics(moments)\n",
           "            self._update_statistics(moments)\n            scale, offset = self._scale_and_offset(inputs, moments, gamma, beta)\n", ALONE_TESTS, "renorm_by_formula"),
    Mutant("renorm is recomputed", "validation.py", "    if recomputed:", "    if False:", "keras/test_layer_keras.py", "remat"),
    Mutant("variable bounds become weights", LAYER, "self._clipping = _Untracked(validation.check_renorm_clipping(renorm_clipping))",
           "self._clipping = _Untracked(validation.check_renorm_clipping(renorm_clipping)); self._bounds = validation.check_renorm_clipping(renorm_clipping)",
           ALONE_TESTS, "clipping_takes"),
    Mutant("on GPUs no path through the moments", GPU, "through = _where(mask, (wide - hi) * a + b)", "through = 0 * wide", GPU_TESTS, "a_training_step"),
    Mutant("on GPUs one replica's message", GPU, "    message = tf.add_n(messages)\n", "    message = messages[0]\n", GPU_TESTS, "a_training_step"),
    Mutant("on GPUs the mask forgotten in the sums", GPU, "rest = _where(mask, x - layout.spread(k))", "rest = x - layout.spread(k)", GPU_TESTS, "a_training_step"),
    Mutant("on GPUs momentum the wrong way round", GPU, "tf.cast(new, old.dtype), 1 - weight)", "tf.cast(new, old.dtype), weight)", GPU_TESTS, "a_training_step"),
    Mutant("on GPUs half of the mean", GPU, "    return hi, mean - tf.cast(hi, mean.dtype)\n", "    return hi, 0 * mean\n", GPU_TESTS, "large_means"),
    Mutant("every shape is compiled", GPU, "if len(shapes) < COMPILED_SHAPES:", "if True:", GPU_TESTS, "a_number_of_shapes"),
    Mutant("every unknown size is compiled", GPU, "if None in x.shape[1:]:", "if False:", GPU_TESTS, "unknown_sizes"),
    Mutant("the CPU's passes in steps that XLA compiles", ENGINE, "    if compiled_by_xla():\n        return passes_gpu\n", "", GPU_TESTS, "large_means or device"),
    Mutant("clusters in inference", ENGINE, "    if passes is passes_cpu:\n", "    if True:\n", GPU_TESTS, "inference_and_exports"),
    Mutant("a layer from outside of the scope trains", ENGINE, "if not all(isinstance(v, tf.distribute.DistributedValues) for v in variables):", "if False:", GPU_TESTS, "outside_of_the_scope"),
    Mutant("forward mode says nothing", ENGINE, "    if has_tangents(given):\n", "    if False:\n", GPU_TESTS, "forward_mode"),
    Mutant("a compiled step is compiled at each call", "tensorflow/compiled_step.py", "compiled = functions.setdefault(number, compiled)", "pass", GPU_TESTS, "compiles_once"),
]  # fmt: skip
