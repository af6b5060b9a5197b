"""Notices: one-line warnings about results or settings that a user may not expect."""

import warnings
from typing import Any


class Notice(UserWarning):
    """A warning that something works differently than a user may expect."""


def notice(text: str) -> None:
    """Issues a warning of class Notice, which can be filtered like any warning."""
    warnings.warn(text, Notice, stacklevel=3)


def _format(message: Any, category: type[Warning], *place: Any, **more: Any) -> str:
    """Formats a notice without file name, line number and source line; other warnings as before."""
    return f"Notice: {message}\n" if issubclass(category, Notice) else _usual(message, category, *place, **more)


_usual, warnings.formatwarning = warnings.formatwarning, _format
