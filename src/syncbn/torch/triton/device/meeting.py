"""How the programs of a block of channels wait for each other inside one launch, and why the launch always ends.

The programs of a block share its positions. Each stores its sums and arrives. When all have arrived, each adds all sums up, and
goes on with the values that it holds in registers.

A GPU does not promise that all programs of a launch run at once, because other kernels may occupy its processors. So a program
waits for a limited number of looks. Then it leaves: it sets its bit, counts itself as one that left, and ends. The last program
to arrive waits for nobody. It reads who left before, and does their tiles too, from memory. So the launch ends, whatever else the
GPU runs: every wait is limited, and there is a program for every tile.

A program that is about to leave sets its bit, and then counts itself. The same step tells it whether all have arrived. If they
have, it stays, and its bit stays set: then two programs may write the same tile, with the same values.

`counters_ptr` points to two int32 a block, which are 0 between launches. The first has three fields: how many have arrived, how
many have left, and how many need the counters no longer. The second has a bit for each program that left.
"""

from __future__ import annotations

import triton
import triton.language as tl

# One in each field of the first counter.
ARRIVED = tl.constexpr(1)
LEFT = tl.constexpr(1 << 8)
DONE = tl.constexpr(1 << 16)
FIELD = tl.constexpr(255)
# The most programs that can meet: the second counter has so many bits, less its sign.
MOST = 31


@triton.jit
def meet(counters_ptr, split, splits, patience):
    """(whether all have arrived, whether this program arrived last, and for the last one: the bits of those that left before).

    If all have arrived, what they stored before is visible. patience: the number of looks that a program waits for.
    """
    tl.debug_barrier()
    before = tl.atomic_add(counters_ptr, ARRIVED, sem="acq_rel", scope="gpu")
    arrived = (before & FIELD) + 1
    last = arrived == splits
    looks = 0
    while (arrived < splits) & (looks < patience):
        arrived = tl.atomic_add(counters_ptr, 0, sem="acquire", scope="gpu") & FIELD
        looks += 1
    if arrived < splits:
        # The bit first: who sees the count reads the bits.
        tl.atomic_or(counters_ptr + 1, 1 << split, sem="relaxed", scope="gpu")
        arrived = tl.atomic_add(counters_ptr, LEFT, sem="acq_rel", scope="gpu") & FIELD
    left = 0
    if last & ((before // LEFT & FIELD) != 0):
        left = tl.atomic_or(counters_ptr + 1, 0, sem="relaxed", scope="gpu")
    tl.debug_barrier()
    return arrived == splits, last, left


@triton.jit
def part(counters_ptr, splits, THREADS: tl.constexpr):
    """Says that this program needs the counters no longer. The last program to say so sets them to 0.

    One thread does it, through a tensor of one element a thread: so no other thread waits for the answer.
    """
    thread = tl.arange(0, THREADS)
    first = thread == 0
    # What others did to the counters before they left comes before what the last program does here.
    before = tl.atomic_add(counters_ptr + thread * 0, DONE, mask=first, sem="acquire", scope="gpu")
    ends = first & ((before // DONE) == splits - 1)
    tl.store(counters_ptr + thread * 0, 0, mask=ends)
    tl.store(counters_ptr + 1 + thread * 0, 0, mask=ends)
