"""State of torch that belongs to the caller: modes, default dtype and device, and the global random generator."""

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

# Held while the global generator is seeded.
_DRAWING = threading.RLock()


@contextmanager
def usual_modes() -> Iterator[None]:
    """Float32 on the CPU by default, gradients on, autocast off: results do not depend on the caller's settings."""
    dtype = torch.get_default_dtype()
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in ("cpu", "cuda"):
            stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":  # else it would slow down every operation
            stack.enter_context(torch.device("cpu"))
        if dtype != torch.float32:
            stack.callback(torch.set_default_dtype, dtype)
            torch.set_default_dtype(torch.float32)
        yield


@contextmanager
def drawing(seed: int | None = None) -> Iterator[None]:
    """For networks that draw their weights from the global generator: seeds it, and restores it in the end.

    One thread at a time, so that runs which are trained in several threads are those of a single one.
    """
    with _DRAWING, torch.random.fork_rng([]):
        if seed is not None:
            torch.default_generator.manual_seed(seed)
        yield
