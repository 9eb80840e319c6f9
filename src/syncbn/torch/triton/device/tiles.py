"""How every kernel walks over a tensor: tiles of [positions, channels] over an input seen as [A, C, B].

Channels first (N, C, H, W) is A = N, B = H·W; channels last is A = N·H·W, B = 1. A channel has J = A·B positions; position j
lies at (j // B)·C·B + c·B + j % B. C and B are compile-time constants, so that the division is a multiplication and Triton
can see which addresses are neighbours: where B is divisible by the vector width, loads are 16 bytes wide.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

# Arguments that may lie anywhere, as a parameter in a flat buffer does. The tensors must be aligned for wide loads.
VECTORS = [
    "mask_ptr",
    "stats_ptr",
    "scale_ptr",
    "offset_ptr",
    "dscale_ptr",
    "doffset_ptr",
    "moving_mean_ptr",
    "moving_variance_ptr",
    "batches_ptr",
    "coefficients_ptr",
]


@triton.jit
def follow(WORLD_SIZE: tl.constexpr):
    """Programmatic dependent launch: this kernel's programs may be on the GPU before the kernel ahead has ended.

    Waits for its end; all programs of this kernel being there by then, the next one's may come. Behind a kernel that waits for a
    peer (WORLD_SIZE > 1) only when the peer has come (`lead`): its successor would fill the GPU and wait too.
    """
    gdc_wait()
    if WORLD_SIZE == 1:
        gdc_launch_dependents()


@triton.jit
def lead():
    """Lets the next kernel's programs come, as far as this one is concerned."""
    gdc_launch_dependents()


@triton.jit
def positions(tile, BLOCK_P: tl.constexpr, WIDE: tl.constexpr):
    """The positions of one tile, [BLOCK_P]: int64 where the tensor needs it."""
    if WIDE:
        first = tile.to(tl.int64) * BLOCK_P
    else:
        first = tile * BLOCK_P
    return first + tl.arange(0, BLOCK_P)


@triton.jit
def positions_of(A, B: tl.constexpr, WIDE: tl.constexpr):
    """J = A·B."""
    if WIDE:
        J = A.to(tl.int64) * B
    else:
        J = A * B
    return J


@triton.jit
def addresses(j, c, C: tl.constexpr, B: tl.constexpr):
    """Offsets of positions j [BLOCK_P] of channels c [BLOCK_C] in such a tensor, [BLOCK_P, BLOCK_C]."""
    if B == 1:
        return j[:, None] * C + c[None, :]
    return ((j // B) * (C * B) + j % B)[:, None] + c[None, :] * B


@triton.jit
def load(pointer, j, c, J, C: tl.constexpr, B: tl.constexpr, BLOCK_C: tl.constexpr, EVEN: tl.constexpr, EVICTION: tl.constexpr):
    """A tile of positions j [BLOCK_P] and channels c [BLOCK_C] in float32; 0 where nothing exists. EVEN: BLOCK_P divides J."""
    return load_narrow(pointer, j, c, J, C, B, BLOCK_C, EVEN, EVICTION).to(tl.float32)


@triton.jit
def load_narrow(
    pointer, j, c, J, C: tl.constexpr, B: tl.constexpr, BLOCK_C: tl.constexpr, EVEN: tl.constexpr, EVICTION: tl.constexpr
):
    """The same in the pointer's dtype."""
    at = pointer + addresses(j, c, C, B)
    if EVEN and C % BLOCK_C == 0:
        return tl.load(at, eviction_policy=EVICTION)
    if EVEN:
        return tl.load(at, mask=(c < C)[None, :], other=0.0, eviction_policy=EVICTION)
    return tl.load(at, mask=(j < J)[:, None] & (c < C)[None, :], other=0.0, eviction_policy=EVICTION)


@triton.jit
def widened(value, PACKED: tl.constexpr):
    """A tile in float32. PACKED: a register contains two 16-bit values, and is converted again at each use.

    The conversion is in assembly, so that the compiler cannot keep its result. The result would take twice the registers.
    """
    if PACKED:
        if value.dtype == tl.bfloat16:
            return tl.inline_asm_elementwise(
                "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=r,=r,r", [value], dtype=tl.float32, is_pure=False, pack=2
            )
        return tl.inline_asm_elementwise(
            "{ .reg .b16 low, high; mov.b32 {low, high}, $2; cvt.f32.f16 $0, low; cvt.f32.f16 $1, high; }",
            "=f,=f,r",
            [value],
            dtype=tl.float32,
            is_pure=False,
            pack=2,
        )
    return value.to(tl.float32)


@triton.jit
def store(
    pointer, value, j, c, J, C: tl.constexpr, B: tl.constexpr, BLOCK_C: tl.constexpr, EVEN: tl.constexpr, EVICTION: tl.constexpr
):
    """Stores a tile, rounded once."""
    at = pointer + addresses(j, c, C, B)
    value = value.to(pointer.dtype.element_ty)
    if EVEN and C % BLOCK_C == 0:
        tl.store(at, value, eviction_policy=EVICTION)
    elif EVEN:
        tl.store(at, value, mask=(c < C)[None, :], eviction_policy=EVICTION)
    else:
        tl.store(at, value, mask=(j < J)[:, None] & (c < C)[None, :], eviction_policy=EVICTION)


@triton.jit
def add_pairs(a, b, more_a, more_b):
    """Two sums at once."""
    return a + more_a, b + more_b


@triton.jit
def narrowed(value, pointer):
    """A float32 or float64 value in a pointer's dtype."""
    if pointer.dtype.element_ty == tl.float64:
        return value.to(tl.float64)
    return value.to(tl.float32).to(pointer.dtype.element_ty)


@triton.jit
def load_mask(pointer, j, J, EVEN: tl.constexpr):
    """The mask of a tile's positions, [BLOCK_P] of 0 and 1: what counts. pointer: uint8 [A, B]."""
    if EVEN:
        return tl.load(pointer + j) != 0
    return tl.load(pointer + j, mask=j < J, other=0) != 0


@triton.jit
def counted(pointer, j, J, EVEN: tl.constexpr, MASKED: tl.constexpr):
    """Which positions count, [BLOCK_P]."""
    if MASKED:
        return load_mask(pointer, j, J, EVEN)
    return j < J


@triton.jit
def is_read(x, counted):
    """Where x counts or is finite; elsewhere it is read as 0, and nothing depends on it: nothing may spread from it."""
    return counted[:, None] | (tl.abs(x) < float("inf"))


@triton.jit
def finite_or_0(x, counted):
    """x, with 0 for what is not read."""
    return tl.where(is_read(x, counted), x, 0.0)
