"""Several processes, as torchrun starts them. Alone, each function does what one process needs: nothing."""

import gc
import os
import signal
import sys
from datetime import timedelta

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from parts.layer import layers
from parts.shared_batch import mean_over_processes
from plumbing.command import UserError


def first_process() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def process_rank() -> tuple[int, int]:
    """(which process this is, how many there are)"""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def wait_for_all() -> None:
    if dist.is_initialized():
        dist.barrier()


def wait_for_first() -> None:
    """While it does alone what may take hours, and what no other barrier's limit of time should end."""
    if dist.is_initialized():
        dist.barrier(dist.new_group(backend="gloo", timeout=timedelta(days=7)))


def mean_of_metrics(metrics: dict[str, Tensor | float]) -> dict[str, float]:
    """The mean of each number over all processes, in one exchange."""
    device = next(value.device for value in metrics.values() if isinstance(value, Tensor))
    numbers = [torch.as_tensor(value, dtype=torch.float32, device=device).detach() for value in metrics.values()]
    return dict(zip(metrics, mean_over_processes(torch.stack(numbers)).tolist()))


def decided_by_first(decision: bool, device: torch.device) -> bool:
    """What the first process decides: clocks and signals differ between processes, and all save in the same step."""
    if not dist.is_initialized():
        return decision
    answer = torch.tensor(float(decision), device=device)
    dist.broadcast(answer, 0)
    return bool(answer)


def gather(items: list) -> list:
    """The lists of all processes, one after the other."""
    if not dist.is_initialized():
        return items
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def wrap(module: nn.Module, shard: bool) -> nn.Module:
    """Over the processes: a copy on each (DDP), or with `shard` a part of each weight (FSDP2)."""
    if not dist.is_initialized():
        return module
    if not shard:
        return DistributedDataParallel(module, broadcast_buffers=False, find_unused_parameters=True)
    module.to(memory_format=torch.contiguous_format)  # FSDP2 takes no other, and on GPUs convolutions have another
    for layer in layers(module):
        fully_shard(layer)
    return fully_shard(module)


def unsharded(tensor: Tensor) -> Tensor:
    """A sharded tensor put together; all processes ask for it at once."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def join_processes(device: str, shard: bool) -> str:
    """Where torchrun started several processes: finds the others, and this one's device."""
    if "LOCAL_RANK" not in os.environ:
        if shard:
            raise UserError("--shard spreads a model over processes: "
                            "start them with torchrun --nproc-per-node N train.py …")
        return device
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    env, backend = os.environ, "nccl" if device.startswith("cuda") else "gloo"
    if env["LOCAL_WORLD_SIZE"] != env["WORLD_SIZE"]:  # several machines
        dist.init_process_group(backend)
        return device
    # torchrun keeps its store over a restart, and in it the addresses of those that were killed: each start has its own
    # keys
    store = dist.TCPStore(env["MASTER_ADDR"], int(env["MASTER_PORT"]), is_master=False)
    store = dist.PrefixStore(env["TORCHELASTIC_RESTART_COUNT"], store)
    dist.init_process_group(backend, store=store, rank=int(env["RANK"]), world_size=int(env["WORLD_SIZE"]))
    return device


def leave_processes() -> None:
    """The first process goes on alone; the others end here."""
    if dist.is_initialized():
        first = first_process()
        dist.destroy_process_group()
        gc.collect()  # what still refers to the group keeps its threads, and threads that outlive Python can abort it
        if not first:  # DTensor's caches refer to it for good
            sys.stdout.flush()
            os._exit(0)


class Stop:
    """While it is entered, the first Ctrl-C or SIGTERM only sets `signal`, so that the step can end and be saved; a
    second one ends the process at once."""

    signal = 0

    def __enter__(self):
        self.before = {number: signal.signal(number, self.note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def note(self, number, frame) -> None:
        self.signal = number
        for every in self.before:
            signal.signal(every, signal.SIG_DFL)
        os.write(2, b"\nstopping after this step; once more to leave at once\n")

    def leave(self, message: str) -> None:
        """Ends the process as that signal would have, after printing `message`."""
        if first_process():
            print(message, flush=True)
        raise SystemExit(128 + (self.signal or signal.SIGTERM))

    def __exit__(self, *error) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    @staticmethod
    def leave_to_parent(worker: int) -> None:
        """In a process that makes batches: Ctrl-C is for the training process, which ends this one."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
