"""Imports go down only: between the folders of the library, between the files of its root, and from the book to the method."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from common import ROOT

import stego_lib

PACKAGE = ROOT / "stego_lib"
BOOK = {"studies", "plots", "pretraining", "notebooks"}
"""What stands above the method: nothing below imports it."""


def file_of(parts: list[str]) -> Path | None:
    """The file of a module of the package, None for a name inside a module."""
    place = PACKAGE.joinpath(*parts)
    return next((file for file in (place.with_suffix(".py"), place / "__init__.py") if file.is_file()), None)


def imported(path: Path) -> set[Path]:
    """Files of the package that `path` imports, wherever in it; imports for type checkers alone do not count."""
    package, found = path.relative_to(PACKAGE).parts[:-1], set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    idle = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or not node.level or node in idle:
            continue
        base = [*package[: len(package) - node.level + 1], *(node.module.split(".") if node.module else [])]
        for name in node.names:
            file = file_of([*base, name.name]) or file_of(base)
            assert file is not None, f"{path} imports {'.'.join(base)}, which is not there"
            if file not in (path, PACKAGE / "__init__.py"):
                found.add(file)
    return found


IMPORTS = {path: imported(path) for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py"}


def room(path: Path) -> str:
    """The folder of a file, or the name of a file of the root."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


ROOMS: dict[str, set[str]] = {}
"""Folders and files of the root -> those that they import."""
for importer, others in IMPORTS.items():
    ROOMS.setdefault(room(importer), set()).update({room(other) for other in others} - {room(importer)})


@pytest.mark.parametrize("graph", [ROOMS, IMPORTS], ids=["folders", "files"])
def test_no_imports_in_a_circle(graph):
    left = dict(graph)
    while leaves := [name for name, others in left.items() if not others & set(left)]:
        for name in leaves:
            del left[name]
    assert not left, f"these import each other: {sorted(map(str, left))}"


def test_the_machinery_imports_nothing_of_ours():
    assert ROOMS["runtime"] == set()


def test_annotations_need_neither_runs_nor_models():
    assert ROOMS["annotations"] <= {"datasets", "runtime"}


def test_the_method_does_not_import_the_book():
    wrong = {name: others & BOOK for name, others in ROOMS.items() if name not in BOOK and others & BOOK}
    assert not wrong


def test_the_root_is_the_method():
    files = {path.stem for path in PACKAGE.glob("*.py")}
    assert len(files) <= 18 and BOOK - files <= {path.parent.name for path in PACKAGE.glob("*/__init__.py")}


@pytest.mark.parametrize(("module", "allowed"), [("loss", {"loss"}), ("model", {"loss", "model"})])
def test_loss_and_model_load_nothing_else_of_ours(module, allowed):
    code = f"import sys, stego_lib.{module}; print(*(name for name in sys.modules if name.startswith('stego_lib.')))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert set(loaded.split()) == {f"stego_lib.{name}" for name in allowed}


def test_what_is_public_is_there_and_found_by_completion():
    """Names are imported when they are asked for, so Python does not see them by itself."""
    assert set(stego_lib.__all__) <= set(dir(stego_lib))
    assert all(getattr(stego_lib, name) is not None for name in stego_lib.__all__)
    with pytest.raises(AttributeError, match="no attribute 'trainn'"):
        stego_lib.trainn  # noqa: B018
