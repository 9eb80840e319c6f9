"""Compiles every kernel for some GPUs, on any machine: `python tests/torch/compile_kernels.py`. Prints one line a kernel."""

from __future__ import annotations

import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from syncbn.groups import Activation
from syncbn.torch.triton import ops, plan
from syncbn.torch.triton.plan import Plan, PlanOptions
from syncbn.torch.triton.tiling import ChannelView

NAMES = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.uint8: "*u8", torch.int32: "*i32",
    torch.int64: "*i64", torch.float64: "*fp64",
}  # fmt: skip


# What a program may have of shared memory, by compute capability: A100, H100, GeForce 50.
SHARED = {80: 163 << 10, 90: 227 << 10, 120: 99 << 10}


class Compiled:
    """Stands for a Launch."""

    capability = 90

    def __init__(self, kernel, types, constants, *, warps, **_):
        constants = {name: constants[name] for name in kernel.arg_names if name in constants}
        names, attributes, signature = kernel.arg_names, {}, {}
        for i, name in enumerate(names[: len(names) - len(constants)]):
            kind = types[name]
            if kind in NAMES:
                signature[name] = NAMES[kind]
                attributes[(i,)] = [["tt.divisibility", 16]]
            else:
                signature[name] = "i32" if isinstance(kind, int) else "fp32"
        signature |= dict.fromkeys(constants, "constexpr")
        assert list(signature) == names
        source = ASTSource(kernel, signature, constants, attributes)
        found = triton.compile(source, target=GPUTarget("cuda", self.capability, 32), options={"num_warps": warps})
        assert found.asm["cubin"]
        assert found.metadata.shared <= SHARED[self.capability], (kernel.fn.__name__, constants, found.metadata.shared)
        print(
            self.capability,
            kernel.fn.__name__,
            {k: constants[k] for k in ("C", "B", "BLOCK_P", "BLOCK_C", "WORLD_SIZE") if k in constants},
            flush=True,
        )


class Properties:
    """Stands for what torch says of a device."""

    multi_processor_count = 132

    def __init__(self, device):
        self.major, self.minor = divmod(Compiled.capability, 10)
        self.shared_memory_per_block_optin, self.L2_cache_size = SHARED[Compiled.capability], 50 << 20


def main() -> None:
    plan.Launch = ops.Launch = Compiled
    torch.cuda.get_device_properties = Properties
    for Compiled.capability in SHARED:
        compile_all(torch.device("cuda", 0))


def compile_all(device) -> None:
    f32, f64, silu = torch.float32, torch.float64, Activation("silu")
    fused = PlanOptions(1e-5, masked=True, scale=f32, activation=silu, residual=f32, statistics=f32, update=2)
    for view, dtype, options in (
        (ChannelView(32, 64, 3136), torch.bfloat16, PlanOptions(1e-5, scale=f32, statistics=f32, update=1)),
        (ChannelView(32 * 49, 2048, 1), f32, fused._replace(replicas=2)),
        # The most loads under way.
        (ChannelView(32 * 3136, 256, 1), f32, PlanOptions(1e-5, scale=f32, activation=silu, residual=f32, replicas=2)),
        (
            ChannelView(4, 64, 49),
            torch.float16,
            PlanOptions(1e-5, statistics=f32, update=2, partial_sums=True, reduced_sums=True),
        ),
        (ChannelView(8 * 49, 2048, 1), torch.bfloat16, fused._replace(update=1, single_launch=True)),
        # A barrier, and tiles that are read twice.
        (ChannelView(8 * 784, 256, 1), f32, fused._replace(update=1, single_launch=True)),
        (ChannelView(8 * 784, 512, 1), torch.float16, PlanOptions(1e-5, scale=f32, statistics=f32, update=1, single_launch=True)),
        (ChannelView(8, 64, 12544), torch.bfloat16, PlanOptions(1e-5, scale=f32, statistics=f32, update=1, single_launch=True)),
        # float64 parameters of a float32 layer.
        (ChannelView(8, 64, 49), f32, PlanOptions(1e-5, scale=f64, statistics=f64, update=1, single_launch=True)),
    ):
        Plan(view, dtype, device, options)
    for kind in ("moments", "sums"):
        ops.exchange_launch(kind, 256, 8, device)


if __name__ == "__main__":
    sys.exit(main())
