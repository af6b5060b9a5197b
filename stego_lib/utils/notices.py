"""Notices of what differs from what was asked."""

import warnings


class Notice(UserWarning):
    """Something works, but differently than one might expect."""


def notice(text: str) -> None:
    """Shows `text` as a warning of class Notice at the caller's line."""
    warnings.warn(text, Notice, stacklevel=3)
