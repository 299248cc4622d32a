"""What the programs that tests run in several processes under gloo share.

python PROGRAM RANK WORLD_SIZE RENDEZVOUS_FILE RESULT_FILE
"""

import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parent.parent))  # such a program finds fastgen, the tests do by themselves


def main(work):
    """work(rank, world_size, result_file) in the process group, on one thread."""
    rank, world_size, rendezvous, result = int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:]
    torch.set_num_threads(1)
    store = f"file://{rendezvous}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
    try:
        work(rank, world_size, result)
    finally:
        torch.distributed.destroy_process_group()
