"""Progress bars and messages on the error stream."""

import io
import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from tqdm.std import tqdm

Item = TypeVar("Item")

# Environment variable that turns bars on in a notebook that runs unattended.
BARS = "STEGO_BARS"
# Seconds between two lines of `Lines`.
LINE_EVERY = 30.0


def progress(items: Iterable[Item], title: str, **options: Any) -> "tqdm[Item]":
    """A progress bar that disappears when done. `options` go to tqdm.

    A notebook that runs unattended (papermill, nbconvert) would store every update of a bar, so it prints a line every
    `LINE_EVERY` seconds instead. Only the first process on a machine shows progress.
    """
    rank = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0"))  # of torchrun or SLURM
    options.setdefault("disable", rank != "0" or sys.stderr is None)
    bar = Lines if unattended() else tqdm
    return bar(items, desc=title, mininterval=0.5, leave=False, dynamic_ncols=True, **options)


@contextmanager
def stage(title: str) -> Iterator[None]:
    """Shows a title while the block runs, for work without countable steps."""
    with progress((), title, total=0, bar_format="{desc} ..."):
        yield


def say(text: str) -> None:
    """Prints a line above any bar."""
    if sys.stderr is not None:
        tqdm.write(text, file=sys.stderr)


def unattended() -> bool:
    """Whether this is the kernel of a notebook that runs unattended, without `BARS`."""
    if BARS in os.environ or "IPython" not in sys.modules:
        return False
    kernel = getattr(sys.modules["IPython"].get_ipython(), "kernel", None)
    return kernel is not None and not getattr(kernel, "_allow_stdin", True)


class Lines(tqdm):
    """Prints lines instead of a bar, and nothing for work that takes less than `LINE_EVERY` seconds."""

    # Time of the last line, shared by all instances.
    last = time.monotonic()

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options | {"file": io.StringIO()})

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        now = time.monotonic()
        if msg != "" and now - Lines.last >= LINE_EVERY:
            Lines.last = now
            say(f"{self.desc.removesuffix(': ')}: {self.n:,} of {self.total or 0:,}")
