"""Isolation from the caller's torch settings: modes, default dtype and device, global random generator."""

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

# Only one thread at a time may seed the global generator.
_GENERATOR_LOCK = threading.RLock()


@contextmanager
def usual_modes() -> Iterator[None]:
    """Sets float32 and the CPU as defaults, gradients on, autocast off, so that the caller's settings do not matter."""
    dtype = torch.get_default_dtype()
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in ("cpu", "cuda"):
            stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":  # setting a default device slows down every operation
            stack.enter_context(torch.device("cpu"))
        if dtype != torch.float32:
            stack.callback(torch.set_default_dtype, dtype)
            torch.set_default_dtype(torch.float32)
        yield


@contextmanager
def drawing(seed: int | None = None) -> Iterator[None]:
    """Seeds the global generator for drawing random weights, and restores it at the end.

    Other threads wait, so runs trained in several threads equal runs trained in one.
    """
    with _GENERATOR_LOCK, torch.random.fork_rng([]):
        if seed is not None:
            torch.default_generator.manual_seed(seed)
        yield
