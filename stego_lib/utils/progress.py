"""Progress bars and messages on the error stream."""

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from tqdm.std import tqdm

Item = TypeVar("Item")

# Environment variable that turns bars on in a notebook that runs unattended.
BARS = "STEGO_BARS"
# Seconds between two updates of a bar in such a notebook.
RARELY = 30.0


def progress(items: Iterable[Item], title: str, **options: Any) -> "tqdm[Item]":
    """A progress bar that disappears when done. `options` go to tqdm.

    A notebook that runs unattended (papermill, nbconvert) stores every update, so there are few. Only the first process
    on a machine shows progress.
    """
    rank = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0"))  # of torchrun or SLURM
    options.setdefault("disable", rank != "0" or sys.stderr is None)
    interval, delay = (RARELY, RARELY) if unattended() else (0.5, 0)
    options |= {"mininterval": interval, "maxinterval": max(interval, 10), "delay": delay}
    options |= {"leave": False, "dynamic_ncols": True}
    return tqdm(items, desc=title, **options)


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
