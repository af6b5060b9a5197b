"""Progress bars, and lines beside them."""

import io
import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from tqdm.std import tqdm

Item = TypeVar("Item")

BARS = "STEGO_BARS"
"""Environment variable that asks for bars in a notebook that runs unattended."""
LINE_EVERY = 30.0
"""Least seconds between two lines, where lines take the place of bars."""


def progress(items: Iterable[Item], what: str, **options: Any) -> "tqdm[Item]":
    """A progress bar on the error stream, removed when done. `options` go to tqdm.

    A notebook that runs unattended (papermill, nbconvert) would keep each redrawing as an output. It gets a line at each tenth,
    at most every `LINE_EVERY` seconds. Of several processes on a machine only the first shows anything.
    """
    kind = Lines if unattended() else tqdm
    rank = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0"))  # torchrun's, else SLURM's
    options.setdefault("disable", rank != "0")
    return kind(items, desc=what, mininterval=0.5, leave=False, dynamic_ncols=True, **options)


@contextmanager
def stage(what: str) -> Iterator[None]:
    """Shows `what` on the error stream while the block runs, where there are no steps to count."""
    with progress((), what, total=0, bar_format="{desc} ..."):
        yield


def say(text: str) -> None:
    """Prints a line on the error stream, above any bar."""
    tqdm.write(text, file=sys.stderr)


def unattended() -> bool:
    """Whether this is the kernel of a notebook that runs unattended, and bars are not asked for."""
    if BARS in os.environ or "IPython" not in sys.modules:
        return False
    kernel = getattr(sys.modules["IPython"].get_ipython(), "kernel", None)
    return kernel is not None and not getattr(kernel, "_allow_stdin", True)


class Lines(tqdm):
    """Lines in place of a bar; none for what takes less than `LINE_EVERY` seconds."""

    last = time.monotonic()
    """Time of the last line of any bar."""

    def __init__(self, *arguments: Any, **options: Any):
        self.tenth = 0
        super().__init__(*arguments, **options | {"file": io.StringIO()})

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        now, tenth = time.monotonic(), 10 * self.n // self.total if self.total else 0
        if msg == "" or now - Lines.last < LINE_EVERY or (self.total and tenth == self.tenth):
            return
        self.tenth, Lines.last = tenth, now
        what = self.desc.removesuffix(": ")
        print(f"{what}: {self.n:,} of {self.total:,}" if self.total else what, file=sys.stderr)
