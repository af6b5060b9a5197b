"""Several processes on one run, started by torchrun or SLURM.

The processes divide the work of the frozen backbone; all take the same training steps with the whole batch. Only rank 0
writes files and shows notices. In a single process, every function returns its argument.
"""

import os
import re
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import StegoError, brief
from .notices import Notice

Value = TypeVar("Value")
Items = TypeVar("Items", list, tuple, Tensor)

# How long processes wait for each other at the start of a task, and later, when another may extract features.
JOIN_TIMEOUT, WORK_TIMEOUT = timedelta(minutes=10), timedelta(days=2)

_group: Any = None


def join(device: str, task: str) -> None:
    """Sets up communication between the processes that torchrun or SLURM started; does nothing for a single process.

    Raises StegoError in all processes if a process is missing or has another `task`, a fingerprint of its arguments.
    """
    global _group
    launch = read_ranks()
    if launch is None:
        return
    rank, size, local_rank, local_size = launch
    kind = "cuda" if device == "auto" and torch.cuda.is_available() else "cpu" if device == "auto" else device
    if ":" in kind or (kind == "cuda" and torch.cuda.device_count() < local_size):
        problem = f"device={device!r} cannot serve {local_size} processes with {torch.cuda.device_count()} GPUs"
        raise StegoError(f"{problem}. Use 'cpu', or 'auto' with a GPU for each.")
    try:
        if _group is None:
            if kind == "cuda":
                torch.cuda.set_device(local_rank)
            backend = "nccl" if kind == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=JOIN_TIMEOUT, rank=rank, world_size=size)
        tasks: list[Any] = [None] * size
        dist.all_gather_object(tasks, task)
        problem = "were given different tasks" if len(set(tasks)) > 1 else ""
    except RuntimeError as error:  # base class of the errors of torch.distributed
        problem = f"did not all start within {JOIN_TIMEOUT} ({brief(error)})"
    if problem:
        if dist.is_initialized():
            dist.destroy_process_group()
        _group = None
        raise StegoError(
            f"the {size} processes of this launch {problem}. Start each run separately, with all its processes."
        )
    if _group is None:
        _group = dist.new_group(timeout=WORK_TIMEOUT)
        if not first():
            warnings.simplefilter("ignore", Notice)


def read_ranks() -> tuple[int, int, int, int] | None:
    """Rank, number of processes, local rank and local number of processes; None for a single process."""
    env = os.environ
    if dist.is_available() and dist.is_torchelastic_launched():
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        rank, size, local_rank, local_size = (int(env[name]) for name in names)
    elif int(env.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        rank, size, local_rank = (int(env[f"SLURM_{name}"]) for name in ("PROCID", "STEP_NUM_TASKS", "LOCALID"))
        local_size = size // int(env["SLURM_STEP_NUM_NODES"])
        nodes = env.get("SLURM_STEP_NODELIST", "127.0.0.1")  # for example "gpu[03-05,08],login1"
        env.setdefault("MASTER_ADDR", re.sub(r"\[(\w+).*", r"\1", nodes.split(",")[0]))
        job, step = (int(env.get(f"SLURM_{name}_ID", 0)) for name in ("JOB", "STEP"))
        env.setdefault("MASTER_PORT", str(15000 + (100 * job + step) % 10000))
    else:
        return None
    return (rank, size, local_rank, local_size) if size > 1 else None


def count() -> int:
    """Number of processes."""
    return 1 if _group is None else dist.get_world_size()


def rank() -> int:
    """Rank of this process."""
    return 0 if _group is None else dist.get_rank()


def first() -> bool:
    """Whether this is rank 0, which writes the files."""
    return rank() == 0


def share(items: Items) -> Items:
    """Every n-th item for this process, of a list or of the rows of a tensor."""
    return items[rank() :: count()]


def gather(rows: Tensor) -> Tensor:
    """Inverse of `share` for a tensor: the rows of all processes in order, without gradients."""
    if _group is None:
        return rows
    lengths: list[Any] = [None] * count()
    dist.all_gather_object(lengths, len(rows), group=_group)
    padded = torch.nn.functional.pad(rows, [0, 0] * (rows.ndim - 1) + [0, max(lengths) - len(rows)]).contiguous()
    parts = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(parts, padded, group=_group)
    gathered = rows.new_empty(sum(lengths), *rows.shape[1:])
    for start, (part, length) in enumerate(zip(parts, lengths, strict=True)):
        gathered[start :: count()] = part[:length]
    return gathered


def gather_list(items: list[Value]) -> list[Value]:
    """Inverse of `share` for a list of any objects."""
    if _group is None:
        return items
    parts: list[Any] = [None] * count()
    dist.all_gather_object(parts, items, group=_group)
    gathered: list[Any] = [None] * sum(map(len, parts))
    for start, part in enumerate(parts):
        gathered[start :: count()] = part
    return gathered


def total(value: Tensor) -> Tensor:
    """Sum over all processes, without gradients."""
    return torch.stack(gather_list([value.detach().cpu()])).sum(0).to(value.device)


def once(compute: Callable[[], Value]) -> Value:
    """Calls `compute` in rank 0 and returns its result, or raises its StegoError, in all processes."""
    if _group is None:
        return compute()
    result: list[Any] = [None]
    if first():
        try:
            result = [compute()]
        except StegoError as error:
            result = [error]
    dist.broadcast_object_list(result, group=_group)
    if isinstance(result[0], StegoError):
        raise result[0]
    return result[0]


def wait() -> None:
    """Waits until all processes have called this."""
    if _group is not None:
        dist.barrier(group=_group)
