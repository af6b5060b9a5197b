"""Running out of memory, explained."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .errors import StegoError, brief


@contextmanager
def enough_memory(what: str, knobs: str) -> Iterator[None]:
    """Turns a lack of memory, of the GPU or the machine, into a StegoError: `what` needs it, `knobs` would take less."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        lacking = isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
        if not lacking:
            raise
        raise StegoError(f"{what} needs more memory than there is ({brief(error)}); {knobs}") from error
