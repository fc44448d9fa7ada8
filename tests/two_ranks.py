"""A training step in each of two processes, one of which has no pixels."""

import torch
from tiny import Sample, make_model
from torch.nn.parallel import DistributedDataParallel


def inputs_of(rank: int) -> dict:
    """A text with an image, or a text alone."""
    if rank == 0:
        sample = Sample("ttFtttt", (1, 4, 6), seed=2)
        return sample.inputs() | {"labels": sample.ids[None]}
    ids = Sample("tttttt", seed=1).ids[None]
    return {"input_ids": ids, "labels": ids}


def step(rank: int, folder: str) -> None:
    """Writes the averaged gradients to FOLDER/rank.pt. Every parameter must have one."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    model = DistributedDataParallel(make_model().train())
    for _ in range(2):  # the second step fails if the first one left a parameter out
        model.zero_grad()
        model(**inputs_of(rank)).loss.backward()
    torch.save({name: parameter.grad for name, parameter in model.module.named_parameters()}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()
