"""Says what is done otherwise than asked."""

import warnings


class Notice(UserWarning):
    """Something works, but not as one might expect."""


def notice(text: str) -> None:
    """Shows `text` as a warning of class Notice at the caller's line."""
    warnings.warn(text, Notice, stacklevel=3)
