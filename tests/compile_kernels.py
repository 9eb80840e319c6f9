"""Compiles every kernel for sm_90, on any machine: `python tests/compile_kernels.py`. Prints one line a kernel."""

from __future__ import annotations

import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from syncbn.kernels import exchange, plans, tiling

NAMES = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.uint8: "*u8", torch.int32: "*i32",
    torch.int64: "*i64", torch.float64: "*fp64",
}  # fmt: skip


class Compiled:
    """Stands for a Launch."""

    def __init__(self, kernel, types, constants, programs, warps, device):
        signature, attributes = {}, {}
        for i, (name, kind) in enumerate(zip(kernel.arg_names, types, strict=False)):
            if kind in NAMES:
                signature[name] = NAMES[kind]
                attributes[(i,)] = [["tt.divisibility", 16]]
            else:
                signature[name] = "i32" if isinstance(kind, int) else "fp32"
        signature |= dict.fromkeys(constants, "constexpr")
        assert list(signature) == kernel.arg_names
        source = ASTSource(kernel, signature, constants, attributes)
        found = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
        assert found.asm["cubin"]
        print(kernel.fn.__name__, {k: constants[k] for k in ("C", "B", "T", "K", "W") if k in constants}, flush=True)


def main() -> None:
    plans.Launch = Compiled
    torch.cuda.get_device_properties = lambda device: type("Properties", (), {"multi_processor_count": 132})
    device = torch.device("cuda", 0)
    plans.Plan(tiling.Fold(32, 64, 3136), torch.bfloat16, device, scale=torch.float32, moving=torch.float32, moves=1)
    plans.Plan(
        tiling.Fold(32 * 49, 2048, 1), torch.float32, device, masked=True, scale=torch.float32, activation="silu", residual=torch.float32,
        moving=torch.float32, moves=2, replicas=2,
    )  # fmt: skip
    plans.Plan(tiling.Fold(4, 64, 49), torch.float16, device, moving=torch.float32, moves=2, sent=True, raw=True)
    plans.Plan(
        tiling.Fold(8 * 49, 2048, 1), torch.bfloat16, device, masked=True, scale=torch.float32, activation="silu",
        residual=torch.float32, moving=torch.float32, moves=1, at_once=True,
    )  # fmt: skip
    numbers = {"C": 256, "X": 64, "W": 8}
    Compiled(exchange.exchange_moments_kernel, (torch.float64, torch.float64, torch.int64, 1, 1, 1), numbers, 1, 4, device)
    Compiled(exchange.exchange_sums_kernel, (torch.float64, torch.float64, torch.int64, 1, 1, 1), numbers, 1, 4, device)


if __name__ == "__main__":
    sys.exit(main())
