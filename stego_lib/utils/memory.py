"""Errors for a lack of memory."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .errors import StegoError


@contextmanager
def enough_memory(what: str, remedy: str) -> Iterator[None]:
    """Turns a lack of GPU or CPU memory into a StegoError: `what` needs more memory, and the `remedy`."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error):
            raise StegoError(f"{what} needs more memory than there is. {remedy}") from error
        raise
