"""Errors that a user can fix."""

import difflib
import importlib.util
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager


class StegoError(ValueError):
    """A wrong parameter, file or package that the user can fix. Notebooks show it without a traceback."""

    def _render_traceback_(self) -> list[str]:
        return [f"{type(self).__name__}: {self}"]


class DataNotFound(StegoError, FileNotFoundError):
    """A missing dataset or file."""


def outdated(path: object, call: str) -> StegoError:
    """An error for a file of a run that belongs to other weights. `call`: the function that writes it."""
    return StegoError(f"{path} belongs to other weights. Remove it, and call {call} again.")


def brief(error: Exception) -> str:
    """Type and first line of an error, to be part of another message: 'OSError: no route to host'."""
    return ": ".join([type(error).__name__, *str(error).splitlines()[:1]])


@contextmanager
def explained(errors: type[Exception] | tuple[type[Exception], ...], problem: str, remedy: str) -> Iterator[None]:
    """Turns errors of other packages into a StegoError with problem, cause and remedy."""
    try:
        yield
    except StegoError:
        raise
    except errors as error:
        raise StegoError(f"{problem} ({brief(error)}). {remedy}") from error


def did_you_mean(name: str, known: list[str], count: int = 1) -> str:
    """' (did you mean ...?)' with up to `count` similar names, or ''."""
    near = difflib.get_close_matches(name, known, n=count, cutoff=0.6)
    return f" (did you mean {' or '.join(map(repr, near))}?)" if near else ""


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """Raises StegoError unless the value of a parameter is one of its choices."""
    choices = list(choices)
    if value not in choices:
        guess = did_you_mean(str(value), choices)
        raise StegoError(f"{name}={value!r} is unknown{guess}. Choose from {', '.join(choices)}.")


def check_installed(purpose: str, packages: Sequence[str], extra: str) -> None:
    """Raises StegoError if packages of the extra are missing."""
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        raise StegoError(f"{purpose} needs {', '.join(missing)}. Run: pip install 'stego_lib[{extra}]'")


@contextmanager
def enough_memory(task: str, remedy: str) -> Iterator[None]:
    """Turns an out-of-memory error of the GPU or the CPU into a StegoError with a remedy."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if re.search("out of memory|can't allocate memory", str(error)) or isinstance(error, MemoryError):
            raise StegoError(f"{task} needs more memory than is available. {remedy}") from error
        raise
