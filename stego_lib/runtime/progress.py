"""Progress bars that stay out of the way, and lines beside them."""

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
"""Environment variable that is set where somebody looks at the bars of a notebook that runs unattended."""
APART = 30.0
"""Seconds between two lines at least, where lines take the place of bars."""


def progress(items: Iterable[Item], what: str, **options: Any) -> "tqdm[Item]":
    """A bar on the error stream, redrawn at most twice a second, gone when done. `options` go to tqdm.

    In a notebook that runs unattended (papermill, nbconvert) each redrawing would stay in the notebook as an output of its own;
    there a line now and then takes the bar's place: at a new tenth of the way, and `APART` seconds after the last one. Of
    several processes that work together on this machine the first one alone shows anything.
    """
    kind = _Lines if _unattended() else tqdm
    options.setdefault("disable", os.environ.get("LOCAL_RANK", "0") != "0")
    return kind(items, desc=what, mininterval=0.5, leave=False, dynamic_ncols=True, **options)


@contextmanager
def stage(what: str) -> Iterator[None]:
    """Names on the error stream what is being done while the block runs, where there are no steps to count."""
    with progress((), what, total=0, bar_format="{desc} ..."):
        yield


def say(text: str) -> None:
    """A line on the error stream, above any bar."""
    tqdm.write(text, file=sys.stderr)


def _unattended() -> bool:
    """Whether this is the kernel of a notebook whose front end cannot be asked anything, and nobody has asked for bars."""
    if BARS in os.environ or "IPython" not in sys.modules:
        return False
    kernel = getattr(sys.modules["IPython"].get_ipython(), "kernel", None)
    return kernel is not None and not getattr(kernel, "_allow_stdin", True)


class _Lines(tqdm):
    """Lines in place of a bar. No line comes of what is over in less than `APART` seconds."""

    last = time.monotonic()
    """When the last line of any of them was written."""

    def __init__(self, *arguments: Any, **options: Any):
        self.tenth = 0
        super().__init__(*arguments, **options | {"file": io.StringIO()})

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        now, tenth = time.monotonic(), 10 * self.n // self.total if self.total else 0
        if msg == "" or now - _Lines.last < APART or (self.total and tenth == self.tenth):
            return
        self.tenth, _Lines.last = tenth, now
        print(f"{self.desc.removesuffix(': ')}: {self.n:,} of {self.total:,}" if self.total else self.desc.removesuffix(": "), file=sys.stderr)
