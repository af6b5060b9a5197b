"""Where things are when nobody says where."""

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent


def project_root() -> Path:
    """The checkout that this package is imported from; the working folder if it was installed elsewhere."""
    return PACKAGE.parent if (PACKAGE.parent / "pyproject.toml").exists() else Path.cwd()


def data_root() -> Path:
    """Default folder of the data sets: `data/` of the project."""
    return project_root() / "data"


def runs_root() -> Path:
    """Default folder of runs and stored features: `runs/` of the project."""
    return project_root() / "runs"
