"""A few steps of DDPM training, in one process or as one of several: what tests/test_training.py runs under gloo.

python distributed_training.py RANK WORLD_SIZE RENDEZVOUS_FILE RESULT_FILE
"""

import process_group
import torch

import fastgen
from fastgen.models import UNet

SCHEDULE = fastgen.Schedule.cosine(100)
BATCH, STEPS = 8, 3


def train(rank=0, world_size=1):
    """Every process has its share of the same batch; a sample's noise is that of its own seed. Returns weights, x_t and losses
    (of this process's share)."""
    torch.manual_seed(0)  # the same weights everywhere
    model = UNet(1, base_channels=8, blocks=1, image_size=8).double()
    if world_size > 1:
        model = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    share = slice(rank * BATCH // world_size, (rank + 1) * BATCH // world_size)
    noised, losses = [], []
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        x0 = torch.rand(BATCH, 1, 8, 8, generator=generator, dtype=torch.float64)[share] * 2 - 1
        t = torch.randint(len(SCHEDULE), (BATCH,), generator=generator)[share]
        seeds = (step * BATCH + torch.arange(BATCH))[share]
        x_t = fastgen.q_sample(x0, t, SCHEDULE, seed=seeds)
        options = {"seed": seeds, "prediction": "v_prediction", "weighting": "min_snr"}
        loss = fastgen.diffusion_loss(model(x_t, t), x0, t, SCHEDULE, **options)
        optimizer.zero_grad()
        loss.backward()  # here the processes take the mean of their gradients
        optimizer.step()
        noised.append(x_t)
        losses.append(loss.item())
    weights = {name.removeprefix("module."): value for name, value in model.state_dict().items()}
    return {"weights": weights, "x_t": torch.stack(noised), "losses": losses}


if __name__ == "__main__":
    process_group.main(lambda rank, world_size, result: torch.save(train(rank, world_size), result))
