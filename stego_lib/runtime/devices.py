"""Processes that work on one run together: started here, by torchrun or by SLURM, joined by Lightning Fabric."""

import json
import logging
import multiprocessing
import os
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from .errors import DataNotFound, StegoError
from .pool import end_with

Item = TypeVar("Item")
Part = TypeVar("Part", list, tuple, Tensor)

PATIENCE = timedelta(days=2)
"""How long a process waits for another: one may compute features for hours. One that dies ends the others at once."""
METHOD = "spawn"
"""How processes are started: fresh ones, as a GPU cannot be used by copies of a process that has used it."""
GRACE = 10.0
"""Seconds that processes have to end by themselves when they are told to."""


class Processes:
    """The processes that work together: this one alone, or as many as a Fabric has joined.

    rank: number of this process, from 0. count: how many there are. Alone, every method gives back what it takes.
    """

    def __init__(self, fabric: Any = None):
        self._fabric = fabric
        self.rank: int = 0 if fabric is None else fabric.global_rank
        self.count: int = 1 if fabric is None else fabric.world_size

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes files."""
        return self.rank == 0

    def device(self, asked: str) -> str:
        """The device of this process; alone, the one that is asked for."""
        return asked if self._fabric is None else str(self._fabric.device)

    def share(self, items: Part) -> Part:
        """The part of `items` (a list, or rows of a tensor) that is this process's: neighboring ones, in their order."""
        begin, end = (len(items) * rank // self.count for rank in (self.rank, self.rank + 1))
        return items[begin:end]

    def gather(self, part: Tensor) -> Tensor:
        """(B, ...) of each process -> (B * count, ...) of all, in the order of ranks; gradients flow back to all."""
        if self._fabric is None:
            return part
        found = self._fabric.all_gather(part, sync_grads=True)
        if found.requires_grad:  # gloo sends gradients byte by byte, whatever the order of their axes in memory
            found.register_hook(torch.Tensor.contiguous)
        return found.flatten(0, 1)

    def mean(self, value: Tensor) -> Tensor:
        """Mean over the processes, without gradients."""
        return value if self._fabric is None else self._reduced(value.detach().clone(), "mean")

    def sum(self, value: Tensor) -> Tensor:
        """Sum over the processes, without gradients."""
        return value if self._fabric is None else self._reduced(value.detach().clone(), "sum")

    def broadcast(self, value: Item) -> Item:
        """The value that the first process has."""
        return value if self._fabric is None else self._fabric.broadcast(value)

    def wait(self) -> None:
        """Returns when all processes have come here."""
        if self._fabric is not None:
            self._fabric.barrier()

    def _reduced(self, value: Tensor, operation: str) -> Tensor:
        return self._fabric.all_reduce(value, reduce_op=operation).to(value.device)


ALONE = Processes()
"""This process, with no others."""


def started() -> tuple[int, int]:
    """How many processes torchrun or SLURM has started for this program: on this machine, and on how many machines."""
    env = os.environ
    if torch.distributed.is_available() and torch.distributed.is_torchelastic_launched():
        return int(env["LOCAL_WORLD_SIZE"]), int(env["WORLD_SIZE"]) // int(env["LOCAL_WORLD_SIZE"])
    if (tasks := int(env.get("SLURM_STEP_NUM_TASKS", 1))) > 1:
        machines = int(env.get("SLURM_STEP_NUM_NODES", 1))
        return tasks // machines, machines
    return 1, 1


def join(devices: int, device: str) -> Processes:
    """The processes that torchrun or SLURM has started, joined; `ALONE` if this is the only one.

    Raises StegoError where there are neither one nor `devices` of them.
    """
    here, machines = started()
    if here * machines == 1:
        return ALONE
    if devices not in (1, here * machines):
        raise StegoError(
            f"devices = {devices}, but {here * machines} processes were started; leave devices at 1, or start as many"
        )
    return _joined(here, machines, device)


def spawn(function: Callable[..., Any], devices: int, device: str, *args: Any) -> Any:
    """Calls `function` with the processes and `args` in `devices` new processes of this machine; returns what the first gives.

    function and args cross over by torch's own start of processes, so function belongs to a module; what comes back is of the
    kinds that JSON has. A StegoError of any process is raised here, other errors as RuntimeError with the traceback; the other
    processes are then ended. Ctrl-C ends them all.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise StegoError(_GUARD)
    fabric, start = _fabric(), torch.multiprocessing.start_processes
    with tempfile.TemporaryDirectory(prefix="stego-") as told:
        port = fabric.plugins.environments.lightning.find_free_network_port()
        arguments = (devices, device, port, told, function, args)
        workers = start(_work, arguments, devices, join=False, start_method=METHOD)
        try:
            while not workers.join():
                pass
        except (ProcessExitedException, ProcessRaisedException) as error:
            _end(workers.processes)
            raise _first_error(Path(told), error) from None
        finally:
            _end(workers.processes)
        return json.loads((Path(told) / "result").read_text(encoding="utf-8"))


_GUARD = (
    "a script is read again by every process that it starts: put what it does below if __name__ == '__main__': "
    "(a notebook needs nothing), or start it with torchrun"
)


def _fabric() -> Any:
    try:
        import lightning_fabric
    except ImportError:
        raise StegoError(
            "several processes need Lightning Fabric, which is not installed: pip install 'stego_lib[parallel]'"
        ) from None
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    warnings.filterwarnings(
        "ignore", r"torch\.distributed\.nn\.functional\.all_gather is deprecated"
    )  # Fabric's business
    return lightning_fabric


def _joined(here: int, machines: int, device: str, spawned: bool = False) -> Processes:
    fabric = _fabric()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = torch.device(device)
    if kind.index is not None:
        raise StegoError(f"device = {device!r} is one; several processes need device 'auto', 'cuda' or 'cpu'")
    if kind.type == "cuda" and torch.cuda.device_count() < here:
        raise StegoError(f"{here} processes need a GPU each, this machine has {torch.cuda.device_count()}")
    joined = fabric.Fabric(
        accelerator=kind.type,
        devices=here,
        num_nodes=machines,
        strategy=fabric.strategies.DDPStrategy(timeout=PATIENCE),
        plugins=[fabric.plugins.environments.LightningEnvironment()] if spawned else None,
    )
    joined.launch()
    return Processes(joined)


def _work(
    rank: int, count: int, device: str, port: int, told: str, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    """One process of `spawn`: does its part and leaves, in the folder `told`, what came of it."""
    if (parent := multiprocessing.parent_process()) and parent.pid:
        end_with(parent.pid)
    interrupted = signal.getsignal(signal.SIGINT)

    def once(*received: Any) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must not break the tidying up
        if callable(interrupted):
            interrupted(*received)

    signal.signal(signal.SIGINT, once)
    os.environ.update(LOCAL_RANK=str(rank), NODE_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(max(1, torch.get_num_threads() // count))
    try:
        found = function(_joined(count, 1, device, spawned=True), *args)
        if rank == 0:
            (Path(told) / "result").write_text(json.dumps(found), encoding="utf-8")
    except BaseException as error:
        kind = type(error).__name__ if isinstance(error, StegoError) else None
        with suppress(OSError):
            (Path(told) / f"error{rank}").write_text(
                json.dumps([time.time(), kind, str(error), traceback.format_exc()]), encoding="utf-8"
            )
        os._exit(1)  # the usual end would wait for the others


def _first_error(told: Path, error: ProcessExitedException | ProcessRaisedException) -> Exception:
    """The error that came first; those of other processes only tell that its process has gone."""
    found = sorted(json.loads(path.read_text(encoding="utf-8")) for path in told.glob("error*"))
    for _, kind, message, _ in found:
        if kind is not None:
            return {"DataNotFound": DataNotFound}.get(kind, StegoError)(message)
    if not (told / f"error{error.error_index}").exists():
        return StegoError(f"{error}, and could not say why: is there enough memory? In a script: {_GUARD}")
    return RuntimeError(f"a process failed:\n{found[0][3]}")


def _end(processes: Sequence[Any]) -> None:
    """Ends processes: by Ctrl-C, so that they tidy up; if that does not help, at once."""
    for stop in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        alive = [process for process in processes if process.is_alive()]
        for process in alive:
            with suppress(ProcessLookupError):
                os.kill(process.pid, stop)
        until = time.monotonic() + GRACE
        for process in alive:
            process.join(max(0.0, until - time.monotonic()))
