"""A barrier between the programs of one launch that share a block of channels, with a limited wait.

The programs of a block divide its positions. Each program stores its sums in memory and arrives at the barrier. When all programs
have arrived, each of them adds up all sums of the block.

A GPU does not promise that all programs of a launch run at the same time, because other kernels may occupy its processors. A
barrier without a limit could therefore wait for ever. Here a program polls the counter a limited number of times. Then it gives
up: it sets its bit, counts itself as one that gave up, and ends. The last program to arrive does not wait. It reads which
programs gave up before, and processes their tiles too. So every launch ends, and every tile is written.

A program that gives up sets its bit first, and then counts itself. The atomic operation that counts it also returns how many
programs have arrived. If all have arrived, the program continues after all. Its bit stays set, so the last program may write the
same tile, with the same values.

`counters_ptr` points to two int32 for each block. They are 0 between launches. The first one has three fields: how many programs
have arrived, how many gave up, and how many no longer use the counters. The second one has a bit for each program that gave up.
"""

from __future__ import annotations

import triton
import triton.language as tl

# One in each field of the first counter.
ARRIVED = tl.constexpr(1)
GAVE_UP = tl.constexpr(1 << 8)
RELEASED = tl.constexpr(1 << 16)
FIELD_MASK = tl.constexpr(255)
# The most programs of a block: one bit of an int32 each, without the sign.
MAX_PROGRAMS = 31


@triton.jit
def arrive_and_wait(counters_ptr, split, splits, max_polls):
    """(whether all have arrived, whether this program arrived last, the bits of the programs that gave up before it).

    The bits are 0 for all programs but the last. If all have arrived, what they stored before is visible. max_polls: how often a
    program polls before it gives up.
    """
    tl.debug_barrier()
    before = tl.atomic_add(counters_ptr, ARRIVED, sem="acq_rel", scope="gpu")
    arrived = (before & FIELD_MASK) + 1
    last = arrived == splits
    polls = 0
    while (arrived < splits) & (polls < max_polls):
        arrived = tl.atomic_add(counters_ptr, 0, sem="acquire", scope="gpu") & FIELD_MASK
        polls += 1
    if arrived < splits:
        # The bit first: the last program reads the bits only if the count is not 0.
        tl.atomic_or(counters_ptr + 1, 1 << split, sem="relaxed", scope="gpu")
        arrived = tl.atomic_add(counters_ptr, GAVE_UP, sem="acq_rel", scope="gpu") & FIELD_MASK
    abandoned = 0
    if last & ((before // GAVE_UP & FIELD_MASK) != 0):
        abandoned = tl.atomic_or(counters_ptr + 1, 0, sem="relaxed", scope="gpu")
    tl.debug_barrier()
    return arrived == splits, last, abandoned


@triton.jit
def release_counters(counters_ptr, splits, THREADS: tl.constexpr):
    """Counts this program as one that no longer uses the counters. The last one to be counted sets them to 0.

    The tensor has one element for each thread, and one thread does the work. So the others do not wait for the result.
    """
    thread = tl.arange(0, THREADS)
    first = thread == 0
    # Acquire: the stores below must come after what the other programs did to the counters.
    before = tl.atomic_add(counters_ptr + thread * 0, RELEASED, mask=first, sem="acquire", scope="gpu")
    ends = first & ((before // RELEASED) == splits - 1)
    tl.store(counters_ptr + thread * 0, 0, mask=ends)
    tl.store(counters_ptr + 1 + thread * 0, 0, mask=ends)
