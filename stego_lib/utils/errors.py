"""Errors that a user can fix."""

import difflib


class StegoError(ValueError):
    """Something outside the code is wrong: a parameter, a file, a missing package. A notebook shows it without traceback."""

    def _render_traceback_(self) -> list[str]:
        return [f"{type(self).__name__}: {self}"]


class DataNotFound(StegoError, FileNotFoundError):
    """A dataset was not found."""


def brief(error: Exception) -> str:
    """Type and first line of an error, for another message: 'OSError: no route to host'."""
    return ": ".join([type(error).__name__, *str(error).splitlines()[:1]])


def did_you_mean(name: str, known: list[str], count: int = 1) -> str:
    """' (did you mean ...?)' with at most `count` known names of similar spelling; empty if there is none."""
    near = difflib.get_close_matches(name, known, n=count, cutoff=0.6)
    return f" (did you mean {' or '.join(map(repr, near))}?)" if near else ""
