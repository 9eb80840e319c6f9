"""Compiles every kernel for some GPUs, on any machine: `python tests/torch/compile_kernels.py`. Prints one line a kernel."""

from __future__ import annotations

import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from syncbn.torch.triton import plan as plans
from syncbn.torch.triton import tiling
from syncbn.torch.triton.device import peer_exchange as exchange

NAMES = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.uint8: "*u8", torch.int32: "*i32",
    torch.int64: "*i64", torch.float64: "*fp64",
}  # fmt: skip


# What a program may have of shared memory, by compute capability: A100, H100, GeForce 50.
SHARED = {80: 163 << 10, 90: 227 << 10, 120: 99 << 10}


class Compiled:
    """Stands for a Launch."""

    capability = 90

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
        found = triton.compile(source, target=GPUTarget("cuda", self.capability, 32), options={"num_warps": warps})
        assert found.asm["cubin"]
        assert found.metadata.shared <= SHARED[self.capability], (kernel.fn.__name__, constants, found.metadata.shared)
        print(
            self.capability,
            kernel.fn.__name__,
            {k: constants[k] for k in ("C", "B", "T", "K", "W") if k in constants},
            flush=True,
        )


class Properties:
    """Stands for what torch says of a device."""

    multi_processor_count = 132

    def __init__(self, device):
        self.major, self.minor = divmod(Compiled.capability, 10)
        self.shared_memory_per_block_optin = SHARED[Compiled.capability]


def main() -> None:
    plans.Launch = Compiled
    torch.cuda.get_device_properties = Properties
    for Compiled.capability in SHARED:
        compile_all(torch.device("cuda", 0))


def compile_all(device) -> None:
    f32, f64 = torch.float32, torch.float64
    plans.Plan(tiling.Fold(32, 64, 3136), torch.bfloat16, device, scale=f32, moving=f32, moves=1)
    plans.Plan(
        tiling.Fold(32 * 49, 2048, 1), f32, device, masked=True, scale=f32, activation="silu", residual=f32, moving=f32, moves=2,
        replicas=2,
    )  # fmt: skip
    # The most loads under way.
    plans.Plan(tiling.Fold(32 * 3136, 256, 1), f32, device, scale=f32, activation="silu", residual=f32, replicas=2)
    plans.Plan(tiling.Fold(4, 64, 49), torch.float16, device, moving=f32, moves=2, sent=True, raw=True)
    plans.Plan(
        tiling.Fold(8 * 49, 2048, 1), torch.bfloat16, device, masked=True, scale=f32, activation="silu", residual=f32, moving=f32,
        moves=1, at_once=True,
    )  # fmt: skip
    # float64 parameters of a float32 layer.
    plans.Plan(tiling.Fold(8, 64, 49), f32, device, scale=f64, moving=f64, moves=1, at_once=True)
    numbers = {"C": 256, "X": 64, "W": 8}
    Compiled(exchange.exchange_moments_kernel, (f64, f64, torch.int64, 1, 1, 1), numbers, 1, 4, device)
    Compiled(exchange.exchange_sums_kernel, (f64, f64, torch.int64, 1, 1, 1), numbers, 1, 4, device)


if __name__ == "__main__":
    sys.exit(main())
