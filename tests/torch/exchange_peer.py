"""One of two processes that exchange through shared memory, under Triton's interpreter: `exchange_peer.py FOLDER RANK ROUNDS LIMIT TAG`.

LIMIT bounds the waits of all rounds but the first; TAG says whose messages these are. Prints one JSON line a round: the moments and the sums of both. It tests protocol and bound, not the order of a GPU's memory.
"""

import json
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch

from syncbn.torch.triton import ops, tiling
from syncbn.torch.triton.device import peer_exchange
from syncbn.torch.triton.exchange import Exchange
from syncbn.torch.triton.plan import Plan, PlanOptions
from syncbn.torch.triton.tiling import Tile

BATCHES = [(3, 2), (1, 0), (2, 5), (4, 1)]
CHANNELS = 70


def data(turn, rank):
    """(x, dy) of a replica in a round; some replicas are empty."""
    rng = np.random.default_rng([turn, rank])
    shape = (BATCHES[turn % len(BATCHES)][rank], CHANNELS, 3)
    return (
        torch.tensor(rng.normal(size=shape) * (1 + rank) + 1000 * rank, dtype=torch.float32),
        torch.tensor(rng.normal(size=shape), dtype=torch.float32),
    )


def main():
    folder, rank, rounds, limit, tag = sys.argv[1], *map(int, sys.argv[2:])
    words = peer_exchange.words(2)
    buffers = [torch.from_file(f"{folder}/buffer{r}", shared=True, size=words, dtype=torch.int64) for r in range(2)]
    status = torch.zeros(1, dtype=torch.int64)
    table = torch.tensor([b.data_ptr() for b in buffers] + [status.data_ptr()])
    tile = {"moments": Tile(4, 32, 1, 2), "sums": Tile(4, 64, 1, 2)}
    bound = limit
    for turn in range(rounds):
        # Processes start when they like: the first round waits.
        limit = bound if turn else 10**9
        x, dy = data(turn, rank)
        options = PlanOptions(1e-3, replicas=2, gradients=torch.float64)
        plan = Plan(tiling.channel_view(x), x.dtype, x.device, options, tile)
        stats = ops.measure(plan, x, None, Exchange(table, rank, limit, tag))
        ops.gradient_sums(plan, x, dy, stats, None, None, exchange=Exchange(table, rank, limit, tag + 1))
        said = {
            "stats": stats[: 2 * CHANNELS + 1].tolist(),
            "coefficients": ops.coefficients_at(stats, CHANNELS)[: 5 * CHANNELS].tolist(),
            "status": status.item(),
        }
        print(json.dumps(said), flush=True)


if __name__ == "__main__":
    main()
