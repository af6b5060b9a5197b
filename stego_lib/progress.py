"""Progress bars that stay out of the way, and lines beside them."""

import sys
from collections.abc import Iterable
from typing import TypeVar

from tqdm.std import tqdm

Item = TypeVar("Item")


def progress(items: Iterable[Item], what: str, **options) -> "tqdm[Item]":
    """A bar on the error stream, redrawn at most twice a second, gone when done. `options` go to tqdm."""
    return tqdm(items, desc=what, mininterval=0.5, leave=False, dynamic_ncols=True, **options)


def say(text: str) -> None:
    """A line on the error stream, above any bar."""
    tqdm.write(text, file=sys.stderr)
