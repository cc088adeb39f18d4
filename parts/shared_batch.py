"""A batch that several processes share: means over all of it. Alone, a process has all of it."""

import torch
from torch import Tensor
from torch import distributed as dist


def mean_over_processes(values: Tensor) -> Tensor:
    """Puts the mean over all processes into `values`, and returns it."""
    if dist.is_initialized():
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return values


def share_of_mean(mean: Tensor, count: int) -> Tensor:
    """A mean over this process's `count` words as its part of the mean over all, the average of the parts."""
    if not dist.is_initialized():
        return mean
    return mean * count / mean_over_processes(torch.tensor(float(count), device=mean.device)).clamp(min=1e-6)
