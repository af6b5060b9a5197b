"""Several processes that work on one run: started by torchrun or SLURM, joined by Lightning Fabric.

They share the work of the frozen backbone; the head, which sees the whole batch, takes the same steps in each. The first alone
writes files and shows notices. In a process alone, every function returns what it is given.
"""

import logging
import os
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor

from .errors import StegoError
from .notices import Notice

Value = TypeVar("Value")
Items = TypeVar("Items", list, tuple, Tensor)

_fabric: Any = None


def join(device: str) -> None:
    """Joins the processes that torchrun or SLURM has started for this program, if there are several.

    Raises StegoError without Lightning Fabric, for a device with a number ('cuda:1') and for fewer GPUs than processes.
    """
    global _fabric
    here, machines = _started()
    if _fabric is not None or here * machines == 1:
        return
    try:
        import lightning_fabric
    except ImportError:
        raise StegoError("several processes need Lightning Fabric: pip install 'stego_lib[parallel]'") from None
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    kind = torch.device("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else torch.device(device)
    if kind.index is not None:
        raise StegoError(f"device = {device!r} is one; several processes need device 'auto', 'cuda' or 'cpu'")
    if kind.type == "cuda" and torch.cuda.device_count() < here:
        raise StegoError(f"{here} processes need a GPU each, this machine has {torch.cuda.device_count()}")
    strategy = lightning_fabric.strategies.DDPStrategy(timeout=timedelta(days=2))  # one may extract features for hours
    _fabric = lightning_fabric.Fabric(accelerator=kind.type, devices=here, num_nodes=machines, strategy=strategy)
    _fabric.launch()
    if not first():
        warnings.simplefilter("ignore", Notice)


def _started() -> tuple[int, int]:
    """Processes of this program on this machine, and machines."""
    env = os.environ
    if torch.distributed.is_available() and torch.distributed.is_torchelastic_launched():
        return int(env["LOCAL_WORLD_SIZE"]), int(env["WORLD_SIZE"]) // int(env["LOCAL_WORLD_SIZE"])
    tasks, machines = int(env.get("SLURM_STEP_NUM_TASKS", 1)), int(env.get("SLURM_STEP_NUM_NODES", 1))
    return (tasks // machines, machines) if tasks > 1 else (1, 1)


def count() -> int:
    """Number of processes."""
    return 1 if _fabric is None else _fabric.world_size


def first() -> bool:
    """Whether this process writes the files."""
    return _fabric is None or _fabric.global_rank == 0


def share(items: Items) -> Items:
    """This process's part of `items` (a list, or rows of a tensor): neighboring ones, in their order."""
    rank = 0 if _fabric is None else _fabric.global_rank
    return items[len(items) * rank // count() : len(items) * (rank + 1) // count()]


def gather(rows: Tensor) -> Tensor:
    """The rows of all processes in their order, without gradients: the inverse of `share`."""
    if _fabric is None:
        return rows
    lengths = _fabric.all_gather(torch.tensor(len(rows), device=rows.device)).tolist()
    found = _fabric.all_gather(torch.nn.functional.pad(rows, [0, 0] * (rows.ndim - 1) + [0, max(lengths) - len(rows)]))
    return torch.cat([part[:length] for part, length in zip(found, lengths, strict=True)])


def total(value: Tensor) -> Tensor:
    """The sum over all processes, without gradients."""
    return value if _fabric is None else _fabric.all_reduce(value.detach().clone(), reduce_op="sum").to(value.device)


def once(compute: Callable[[], Value]) -> Value:
    """What `compute` returns in the first process, computed there alone."""
    return compute() if _fabric is None else _fabric.broadcast(compute() if first() else None)


def wait() -> None:
    """Returns when all processes have come here."""
    if _fabric is not None:
        _fabric.barrier()
