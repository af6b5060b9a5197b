"""Paths as users write them, and default folders."""

import os
from pathlib import Path

from .errors import StegoError

PACKAGE = Path(__file__).resolve().parents[1]


def user_path(path: str | os.PathLike[str] | None, default: str | os.PathLike[str] = "") -> Path:
    """A path that a user wrote, with `~` and, in text, variables such as `$HOME` expanded; `default` for None.

    Variables are not expanded in a `Path` or in the path of a file that exists, which may contain `$`. Raises
    StegoError for an empty path, and for the home folder of an unknown user.
    """
    path = default if path is None else path
    text = os.fspath(path)
    if not text.strip():
        raise StegoError("a path is empty. Leave it out for the default, or write . for the working folder.")
    if isinstance(path, str) and not os.path.lexists(text):
        text = os.path.expandvars(text)
    expanded = os.path.expanduser(text)
    if expanded.startswith("~") and not os.path.lexists(expanded):
        raise StegoError(f"{text}: there is no such home folder. Write the path in full.")
    return Path(expanded)


def project_root() -> Path:
    """The checkout that this package is imported from, or the working folder if it is installed elsewhere."""
    return PACKAGE.parent if (PACKAGE.parent / "pyproject.toml").exists() else Path.cwd()


def shown_path(path: str | Path) -> str:
    """A path for messages: relative to the project if it is inside, else absolute."""
    absolute, root = Path(path).resolve(), project_root().resolve()
    return str(absolute.relative_to(root) if absolute.is_relative_to(root) else absolute)


def data_root() -> Path:
    """Default folder of the datasets: `data/` of the project."""
    return project_root() / "data"


def runs_root() -> Path:
    """Default folder of runs and stored features: `runs/` of the project."""
    return project_root() / "runs"
