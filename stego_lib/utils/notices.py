"""Notices of what differs from what was asked."""

import warnings
from typing import Any


class Notice(UserWarning):
    """Something works, but differently than one might expect."""


def notice(text: str) -> None:
    """Shows `text` as a warning of class Notice: one line, filtered as any warning."""
    warnings.warn(text, Notice, stacklevel=3)


def _format(message: Any, category: type[Warning], *place: Any, **more: Any) -> str:
    """A notice without file, line number and source, which say nothing to its reader; other warnings as before."""
    return f"Notice: {message}\n" if issubclass(category, Notice) else _usual(message, category, *place, **more)


_usual, warnings.formatwarning = warnings.formatwarning, _format
