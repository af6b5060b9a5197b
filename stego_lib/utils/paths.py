"""Expansion of paths that users type, and default folders."""

import os
from pathlib import Path, PureWindowsPath

from .errors import StegoError

PACKAGE = Path(__file__).resolve().parents[1]


def user_path(path: str | os.PathLike[str] | None, default: str | os.PathLike[str] = "") -> Path:
    """Expands `~` and variables such as `$HOME` in a path or `default`. Raises StegoError for an empty path."""
    text = os.fspath(default if path is None else path)
    if not text.strip():
        raise StegoError("a path is empty. Leave it out for the default, or write . for the working folder.")
    return Path(os.path.expandvars(os.path.expanduser(text)))


def base_name(path: str) -> str:
    """Last part of a path, which may have been written on Windows."""
    return PureWindowsPath(path).name


def project_root() -> Path:
    """The checkout that contains this package, or the working folder if the package is installed elsewhere."""
    return PACKAGE.parent if (PACKAGE.parent / "pyproject.toml").exists() else Path.cwd()


def shown_path(path: str | Path) -> str:
    """A path for messages, relative to the project if it is inside."""
    absolute, root = Path(path).resolve(), project_root().resolve()
    return str(absolute.relative_to(root) if absolute.is_relative_to(root) else absolute)


def data_root() -> Path:
    """Default folder of the datasets: `data/` of the project."""
    return project_root() / "data"


def runs_root() -> Path:
    """Default folder of runs and stored features: `runs/` of the project."""
    return project_root() / "runs"
