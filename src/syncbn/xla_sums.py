"""How XLA is given sums over channels last on GPUs, by TensorFlow and by JAX: decision 12."""

from __future__ import annotations

# XLA sums columns in blocks of 32 columns of one part. So many results, over all parts, fill a GPU with blocks.
RESULTS = 16384
# Below so many rows a part is not worth a sum of its own.
ROWS_OF_PART = 16


def parts_of_rows(rows: int, channels: int, *, half: bool = False) -> int:
    """Into how many equal parts to divide an array [rows, channels] that is summed over its rows.

    XLA is given the sum of each part, and then the sum over the parts. In one sum it leaves most of a GPU idle, or writes x − k
    to memory first.
    half: the array is of half precision. Long and wide ones are summed faster in twice as many parts.
    """
    results = 2 * RESULTS if half and channels >= 256 and rows > RESULTS else RESULTS
    most = max(1, min(rows // ROWS_OF_PART, results // max(channels, 1)))
    return next(parts for parts in range(most, 0, -1) if rows % parts == 0)
