"""Several processes, as torchrun starts them. Alone, each function does what one process needs: nothing."""

import os
import signal

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


def gather(mine: list) -> list:
    """The lists of all processes, one after the other."""
    if not dist.is_initialized():
        return mine
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, mine)
    return [item for part in parts for item in part]


class Stop:
    """While it is entered, the first Ctrl-C or SIGTERM only sets `asked`, so that the step can end and be saved; a second one
    ends the process at once."""

    asked = 0

    def __enter__(self):
        self.before = {number: signal.signal(number, self.ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def ask(self, number, frame) -> None:
        self.asked = number
        for every in self.before:
            signal.signal(every, signal.SIG_DFL)
        os.write(2, b"\nstopping after this step; once more to leave at once\n")

    def leave(self, words: str) -> None:
        """Ends the process as that signal would have, after telling `words`."""
        if first_process():
            print(words, flush=True)
        raise SystemExit(128 + (self.asked or signal.SIGTERM))

    def __exit__(self, *what) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    @staticmethod
    def leave_to_parent(worker: int) -> None:
        """In a process that makes batches: Ctrl-C is for the training process, which ends this one."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
