"""Several processes, as torchrun starts them. Alone, each function does what one process needs: nothing."""

import torch
from torch import Tensor
from torch import distributed as dist


def first_process() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def wait_for_all() -> None:
    if dist.is_initialized():
        dist.barrier()


def average(values: Tensor) -> Tensor:
    """Puts the mean over all processes into `values`, and returns it."""
    if dist.is_initialized():
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return values


def agreed(mine: bool, device: torch.device) -> bool:
    """What the first process decides."""
    if not dist.is_initialized():
        return mine
    answer = torch.tensor(float(mine), device=device)
    dist.broadcast(answer, 0)
    return bool(answer)
