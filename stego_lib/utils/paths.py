"""Paths as users write them, and default folders."""

import os
from pathlib import Path

from .errors import StegoError

PACKAGE = Path(__file__).resolve().parents[1]


def user_path(path: str | os.PathLike[str] | None, default: str | os.PathLike[str] = "") -> Path:
    """A path from a user, with `~` and variables such as `$HOME` expanded; `default` for None.

    Raises StegoError for an empty path, which would silently be the working folder, and for the home of an unknown user.
    """
    text = os.fspath(default if path is None else path)
    if not text.strip():
        raise StegoError("an empty path names nothing; leave it out for the default, or write . for the working folder")
    found = os.path.expanduser(os.path.expandvars(text))
    if found.startswith("~") and not os.path.lexists(found):
        raise StegoError(f"{text}: there is no home folder of that name; write the path in full")
    return Path(found)


def project_root() -> Path:
    """The checkout that this package is imported from, or the working folder if it was installed elsewhere."""
    return PACKAGE.parent if (PACKAGE.parent / "pyproject.toml").exists() else Path.cwd()


def shown_path(path: str | Path) -> str:
    """A path for messages: relative to the project or the working folder, if it is in one of them."""
    for start in (project_root(), Path.cwd()):
        if Path(path).resolve().is_relative_to(start.resolve()):
            return str(Path(path).resolve().relative_to(start.resolve()))
    return str(path)


def data_root() -> Path:
    """Default folder of the datasets: `data/` of the project."""
    return project_root() / "data"


def runs_root() -> Path:
    """Default folder of runs and stored features: `runs/` of the project."""
    return project_root() / "runs"
