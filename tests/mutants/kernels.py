"""Faults in the Triton kernels."""

from __future__ import annotations

from mutants import Mutant

MOMENTS, POINTWISE, EXCHANGE = (f"kernels/{name}.py" for name in ("moments", "pointwise", "exchange"))
KERNELS, PEERS = "test_kernels_triton.py", "test_exchange.py"

MUTANTS = [
    Mutant("pivots of lanes taken for one", MOMENTS, "d = tl.where(there[:, None], pivot - k[None, :], 0.0)",
           "d = tl.where(there[:, None], 0 * pivot, 0.0)", KERNELS, "bits or (small_tiles and 7)"),
    Mutant("pivots of programs taken for one", MOMENTS, "d = tl.where(there, k - pivot[None, :], 0.0)", "d = tl.where(there, 0 * k, 0.0)",
           KERNELS, "small_tiles and 7"),
    Mutant("masked values as pivots", MOMENTS, "tl.where((n == 0)[:, None], v, pivot)", "tl.where(tile == first, v, pivot)", KERNELS, "small_tiles and mask"),
    Mutant("mask forgotten in the count", MOMENTS, "n += kept.to(tl.float32)", "n += 1.0", KERNELS, "small_tiles and mask"),
    Mutant("arrivals not reset", EXCHANGE, "tl.store(counter, 0)", "tl.store(counter, before + 1)", KERNELS, "bits"),
    Mutant("lo dropped from normalize", POINTWISE, "tl.load(offset + c, mask=inside, other=0.0).to(tl.float32) - lo * a",
           "tl.load(offset + c, mask=inside, other=0.0).to(tl.float32)", KERNELS, "small_tiles and large"),
    Mutant("a turn left out", POINTWISE, "last = length - 1 - turn // across", "last = length - 2 - turn // across", KERNELS, "small_tiles and 7"),
    Mutant("statistics move at count 0", POINTWISE, "moves = (n != 0).to(tl.int32)", "moves = (n == n).to(tl.int32)", KERNELS, "masked_everywhere"),
    Mutant("dropped term in the input gradient", POINTWISE, "through = -rstd * rstd * gx_hat / n", "through = 0 * gx_hat / n", KERNELS, "small_tiles and 7"),
    Mutant("momentum rounded to float32", "kernels/fused.py", "return rounded, weight - rounded", "return rounded, 0.0", KERNELS, "bits_of_the_other"),
    Mutant("the message without its mean's square", MOMENTS, "m2 + n * mean * mean, mask", "m2, mask", KERNELS, "agrees_with and first"),
    Mutant("means of replicas taken for one", EXCHANGE, "its_m2 + d * d * n * part", "its_m2", PEERS, "agree_with"),
    Mutant("saved tensors taken for what they were", "kernels/cuda.py", "if x.stride() == strides and x.data_ptr() % 16 == 0:\n        return x\n    return torch.empty_strided",
           "if True:\n        return x\n    return torch.empty_strided", KERNELS, "another_layout"),
    Mutant("rows of another epoch taken", EXCHANGE, "((words >> 32) == stamp).to", "((words >> 32) >= 0).to", PEERS, "agree_with"),
    Mutant("another call's message taken", EXCHANGE, "(heard == tag.to(tl.int64))", "(heard == heard)", PEERS, "another_call"),
    Mutant("absent replicas not noticed", EXCHANGE, "bad = tl.where(all_sound, 0.0, nothing)\n    return n + bad", "bad = 0.0\n    return n + bad",
           PEERS, "killed"),
]  # fmt: skip
