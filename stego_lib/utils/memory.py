"""Errors for a lack of memory."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .errors import StegoError, brief


@contextmanager
def enough_memory(what: str, options: str) -> Iterator[None]:
    """Turns a lack of GPU or CPU memory into a StegoError that names `what` needs it and the `options` that need less."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        lacking = isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
        if not lacking:
            raise
        raise StegoError(f"{what} needs more memory than there is ({brief(error)}); {options}") from error
