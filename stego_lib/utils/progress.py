"""Progress bars, and lines beside them, on the error stream."""

import io
import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from tqdm.std import tqdm

Item = TypeVar("Item")

# Environment variable that asks for bars in a notebook that runs unattended.
BARS = "STEGO_BARS"
# Seconds between two lines, where lines take the place of bars.
LINE_EVERY = 30.0


def progress(items: Iterable[Item], what: str, **options: Any) -> "tqdm[Item]":
    """A progress bar, removed when done. `options` go to tqdm.

    A notebook that runs unattended (papermill, nbconvert) would keep each redrawing as an output; it gets a line every
    `LINE_EVERY` seconds. Only the first process on a machine shows anything, and none where there is no error stream.
    """
    rank = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0"))  # torchrun's, else SLURM's
    options.setdefault("disable", rank != "0" or sys.stderr is None)
    kind = Lines if unattended() else tqdm
    return kind(items, desc=what, mininterval=0.5, leave=False, dynamic_ncols=True, **options)


@contextmanager
def stage(what: str) -> Iterator[None]:
    """Shows `what` while the block runs, where there are no steps to count."""
    with progress((), what, total=0, bar_format="{desc} ..."):
        yield


def say(text: str) -> None:
    """Prints a line above any bar."""
    if sys.stderr is not None:
        tqdm.write(text, file=sys.stderr)


def unattended() -> bool:
    """Whether this is the kernel of a notebook that runs unattended, and bars are not asked for."""
    if BARS in os.environ or "IPython" not in sys.modules:
        return False
    kernel = getattr(sys.modules["IPython"].get_ipython(), "kernel", None)
    return kernel is not None and not getattr(kernel, "_allow_stdin", True)


class Lines(tqdm):
    """Lines in place of a bar; none for what takes less than `LINE_EVERY` seconds."""

    # Time of the last line of any bar.
    last = time.monotonic()

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options | {"file": io.StringIO()})

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        now = time.monotonic()
        if msg != "" and now - Lines.last >= LINE_EVERY:
            Lines.last = now
            say(f"{self.desc.removesuffix(': ')}: {self.n:,} of {self.total or 0:,}")
