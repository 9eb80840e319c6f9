"""Faults in the Triton kernels."""

from __future__ import annotations

from mutants import Mutant

MOMENTS, POINTWISE, FORWARD, BACKWARD, BARRIER, EXCHANGE = (
    f"torch/triton/device/{name}.py"
    for name in ("moments", "pointwise", "single_forward", "single_backward", "barrier", "peer_exchange")
)
KERNELS, PEERS = "torch/test_kernels_triton.py", "torch/test_exchange.py"

MUTANTS = [
    Mutant("pivots of accumulators taken for one", MOMENTS, "d = tl.where(there[:, None], pivot - k[None, :], 0.0)",
           "d = tl.where(there[:, None], 0 * pivot, 0.0)", KERNELS, "bits or (small_tiles and 7)"),
    Mutant("pivots of programs taken for one", MOMENTS, "d = tl.where(there, k - pivot[None, :], 0.0)", "d = tl.where(there, 0 * k, 0.0)",
           KERNELS, "small_tiles and 7"),
    Mutant("masked values as pivots", MOMENTS, "pivot = tl.where((n == 0)[:, None], v, pivot)", "pivot = v", KERNELS, "small_tiles and mask"),
    Mutant("mask forgotten in the count", MOMENTS, "        n += there.to(tl.float32)\n    else:", "        n += 1.0\n    else:", KERNELS, "small_tiles and mask"),
    Mutant("arrivals not reset", EXCHANGE, "tl.store(counter, 0)", "tl.store(counter, before + 1)", KERNELS, "bits"),
    Mutant("lo dropped from normalize", POINTWISE, "return hi, lo, rstd, a, beta - lo * a",
           "return hi, lo, rstd, a, beta", KERNELS, "small_tiles and large"),
    Mutant("a step left out", POINTWISE, "last = length - 1 - step // across", "last = length - 2 - step // across", KERNELS, "small_tiles and 7"),
    Mutant("statistics move at count 0", POINTWISE, "updates = (n != 0).to(tl.int32)", "updates = (n == n).to(tl.int32)", KERNELS, "masked_everywhere"),
    Mutant("dropped term in the input gradient", POINTWISE, "through = -rstd * rstd * mean_gx", "through = 0 * mean_gx", KERNELS, "small_tiles and 7"),
    Mutant("what registers hold past the end taken for values", FORWARD, "if MASKED or not EVEN:", "if MASKED:", KERNELS, "equals_oracle and bfloat16 and launch"),
    Mutant("moments in registers of masked values too", FORWARD, "part = tl.where(there[:, None], part, 0.0)", "part += 0", KERNELS, "registers_a_masked_value"),
    Mutant("statistics move in registers at count 0", FORWARD, "updated = c < tl.where(all_n != 0, C, 0)", "updated = c < C", KERNELS, "registers_a_batch"),
    Mutant("sums in registers before the scale dropped", BACKWARD, "        all_g *= gamma", "        all_g *= 1", KERNELS, "equals_oracle and bfloat16 and launch"),
    Mutant("lo dropped in registers", BACKWARD, "(all_gx - lo * all_g)", "all_gx", KERNELS, "equals_oracle and large and launch"),
    Mutant("a sum in registers that is too large", FORWARD, "part = v * (1.0 / tl.maximum(total, 1).to(tl.float32))", "part = v", KERNELS, "too_large"),
    Mutant("tiles of programs that gave up not written", FORWARD, "if (abandoned >> (tile // tiles_per_program)) & 1:", "if abandoned == 0:", KERNELS, "share_a_block and 7 and 1-5"),
    Mutant("the same in the backward pass", BACKWARD, "if (abandoned >> (tile // tiles_per_program)) & 1:", "if abandoned == 0:", KERNELS, "share_a_block and 7 and 1-5"),
    Mutant("the wrong bit for a program that gave up", BARRIER, "1 << split,", "1 << (split + 1),", KERNELS, "share_a_block and 7 and 1-5"),
    Mutant("counters of the barrier not reset", BARRIER, "tl.store(counters_ptr + thread * 0, 0, mask=ends)", "pass", KERNELS, "barrier_can_be"),
    Mutant("bits of programs that gave up not reset", BARRIER, "tl.store(counters_ptr + 1 + thread * 0, 0, mask=ends)", "pass", KERNELS, "barrier_can_be"),
    Mutant("a tile that is not in registers left out of the moments", FORWARD, "for tile in tl.range(first + REGISTER_TILES, end", "for tile in tl.range(first + REGISTER_TILES + 1, end", KERNELS, "share_a_block and 7 and 1-5"),
    Mutant("the same in the sums", BACKWARD, "for tile in tl.range(first + REGISTER_TILES, end", "for tile in tl.range(first + REGISTER_TILES + 1, end", KERNELS, "share_a_block and 7 and 1-5"),
    Mutant("the same in the output", FORWARD, "for step in tl.range(first + REGISTER_TILES, end", "for step in tl.range(first + REGISTER_TILES + 1, end", KERNELS, "share_a_block and 7 and 1-5"),
    Mutant("pivots of programs dropped where they meet", FORWARD, "tl.store(at, k, mask=inside)", "tl.store(at, 0 * k, mask=inside)", KERNELS, "share_a_block and 7 and 1-5"),
    Mutant("more programs at a barrier than it has bits", "torch/triton/tiling.py", "min(barrier.MAX_PROGRAMS, max(1, processors // blocks))", "max(1, processors // blocks)", KERNELS, "cover_every_value"),
    Mutant("a kernel compiled for every size of image", "torch/triton/backend.py", "len(sizes) < MAX_SIZES", "True", KERNELS, "differ_in_size"),
    Mutant("more tiles in registers than the last program has", "torch/triton/tiling.py", "    return min(capacity, last_of(each)), each", "    return min(capacity, each), each", KERNELS, "partition or cover_every"),
    Mutant("recomputations counted as another kind of call", "torch/triton/backend.py", "options._replace(statistics=None, update=0))", "options)", KERNELS, "differ_in_size"),
    Mutant("squares that are too large as NaN", MOMENTS, 'tl.where(q == float("inf"), q, q + d', 'tl.where(q < 0, q, q + d', KERNELS, "too_large and tiles"),
    Mutant("a mean of masked programs' pivots that is too large", MOMENTS, "weighted += n * each_value[None, :] * k", "weighted += n * k * each_value[None, :]", KERNELS, "too_large and barrier"),
    Mutant("the mean of the pivots for the mean", FORWARD, "if REGISTER_TILES == 1 and not REREAD:", "if True:", KERNELS, "infinite_mean and tiles"),
    Mutant("one launch for 1/batches too", "torch/fused.py", "communicator is None and (statistics is None or statistics.weight is not None)", "communicator is None", KERNELS,
           "statistics_are_torchs"),
    Mutant("a recomputation in one launch, the first pass in two", "torch/fused.py", "    updated = statistics if",
           "    single_launch = single_launch or not should_update_now(False)\n    updated = statistics if", KERNELS, "recomputation"),
    Mutant("a biased variance by the kernels", "torch/fused.py", "not statistics.unbiased or ", "", KERNELS, "only_torchs_moving"),
    Mutant("counters of graphs given away", "torch/triton/scratch.py", "_replaced.append(slab)", "pass", KERNELS, "stay_alive"),
    Mutant("loads under way past the shared memory", "torch/triton/tiling.py", "1 + min(UNDER_WAY", "5 + min(UNDER_WAY", "torch/test_kernels_compile.py", "fits"),
    Mutant("float32 into float64 parameters' gradients", "torch/triton/device/tiles.py", "return value.to(tl.float64)", "return value", "torch/test_kernels_compile.py", "fits"),
    Mutant("an infinite mean as NaN", FORWARD, "mean, k.to(tl.float64))", "mean, mean)", KERNELS, "registers_what"),
    Mutant("a gradient for what was not read", POINTWISE, "g = tl.where(read, g, 0.0)", "g += 0", KERNELS, "depends_on_a_masked and two and False"),
    Mutant("the same in registers", BACKWARD, "g = tl.where(read, g, 0.0)", "g += 0", KERNELS, "depends_on_a_masked and one and False"),
    Mutant("the same where it is differentiable", "torch/fused.py", "torch.where(read, gradients[0], 0)", "gradients[0]", KERNELS,
           "depends_on_a_masked and True"),
    Mutant("momentum rounded to float32", "torch/triton/ops.py", "return rounded, weight - rounded", "return rounded, 0.0", KERNELS, "bits_of_the_other"),
    Mutant("the message without its mean's square", MOMENTS, "m2 + n * mean * mean, mask", "m2, mask", KERNELS, "agrees_with and first"),
    Mutant("means of replicas taken for one", EXCHANGE, "its_m2 + d * d * n * part", "its_m2", PEERS, "agree_with"),
    Mutant("saved tensors taken for what they were", "torch/triton/backend.py", "if x.stride() == strides and x.data_ptr() % 16 == 0:\n        return x\n    return torch.empty_strided",
           "if True:\n        return x\n    return torch.empty_strided", KERNELS, "another_layout"),
    Mutant("rows of another epoch taken", EXCHANGE, "((words >> 32) == stamp).to", "((words >> 32) >= 0).to", PEERS, "agree_with"),
    Mutant("another call's message taken", EXCHANGE, "(its_tag == tag.to(tl.int64))", "(its_tag == its_tag)", PEERS, "another_call"),
    Mutant("absent replicas not noticed", EXCHANGE, "bad = tl.where(all_sound, 0.0, nothing)\n    return n + bad", "bad = 0.0\n    return n + bad",
           PEERS, "killed"),
    Mutant("kernels that cannot be imported end the step", "torch/dispatch.py", "    except Exception as error:\n        # A", "    except ZeroDivisionError as error:\n        # A",
           "torch/test_kernels_compile.py", "imported"),
    Mutant("a bias without a weight past the kernels", "torch/engine.py", "given = scale_and_offset(x, weight, bias)", "pass", KERNELS, "bias_without"),
    Mutant("an argument in another's place", "torch/triton/launch.py", "{**given, **nothing}", "{**dict(zip(given, reversed(given.values()))), **nothing}", KERNELS, "cumulative"),
]  # fmt: skip
