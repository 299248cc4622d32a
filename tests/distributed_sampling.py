"""Sampling in one process or as one of several: what tests/test_sample.py runs under gloo.

python distributed_sampling.py RANK WORLD_SIZE RENDEZVOUS_FILE RESULT_FILE
"""

import process_group
import torch

import fastgen

SEEDS = [7, -1, 2**63 - 1, 0, 12345]  # of five samples, which two processes cannot share evenly
SHAPE = (1, 6, 6)


def network():
    """Elementwise, so that a sample's bits do not depend on the batch even in the network."""
    return lambda x, t: torch.tanh(x) * (1 + t.reshape(-1, 1, 1, 1) / 100)


def sample(rank=0, world_size=1):
    """The images of this process's share of the seeds."""
    seeds = SEEDS[rank * len(SEEDS) // world_size : (rank + 1) * len(SEEDS) // world_size]
    schedule = fastgen.Schedule.cosine(100)
    return fastgen.sample(network(), (len(seeds), *SHAPE), schedule, steps=10, clip=1.0, sample_seeds=seeds)


def gather(rank, world_size, result):
    shares = [None] * world_size if rank == 0 else None
    torch.distributed.gather_object(sample(rank, world_size), shares)
    if rank == 0:
        torch.save(torch.cat(shares), result)


if __name__ == "__main__":
    process_group.main(gather)
