"""Out-of-memory errors with a remedy."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .errors import StegoError


@contextmanager
def enough_memory(task: str, remedy: str) -> Iterator[None]:
    """Turns an out-of-memory error of the GPU or the CPU into a StegoError with a remedy."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error):
            raise StegoError(f"{task} needs more memory than is available. {remedy}") from error
        raise
