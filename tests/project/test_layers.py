"""Imports go down only: between the folders and files of the library, and from the book's package to the library."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from common import ROOT

import stego_lib

PACKAGE = ROOT / "stego_lib"


def file_of(parts: list[str]) -> Path | None:
    """The file of a module of the package, None for a name inside a module."""
    place = PACKAGE.joinpath(*parts)
    return next((file for file in (place.with_suffix(".py"), place / "__init__.py") if file.is_file()), None)


def imported(path: Path) -> set[Path]:
    """Files of the package that `path` imports, also inside functions, but not for type checkers alone."""
    package, found = path.relative_to(PACKAGE).parts[:-1], set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)]
    ignored = {inner for node in typing for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or not node.level or node in ignored:
            continue
        base = [*package[: len(package) - node.level + 1], *(node.module.split(".") if node.module else [])]
        for name in node.names:
            file = file_of([*base, name.name]) or file_of(base)
            assert file is not None, f"{path} imports {'.'.join(base)}, which does not exist"
            if file not in (path, PACKAGE / "__init__.py"):
                found.add(file)
    return found


IMPORTS = {path: imported(path) for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py"}


def folder_of(path: Path) -> str:
    """The folder of a file below the package, or the name of a file of the root."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


FOLDERS: dict[str, set[str]] = {}
"""Folders and files of the root -> those that they import."""
for importer, others in IMPORTS.items():
    FOLDERS.setdefault(folder_of(importer), set()).update(
        {folder_of(other) for other in others} - {folder_of(importer)}
    )


@pytest.mark.parametrize("graph", [FOLDERS, IMPORTS], ids=["folders", "files"])
def test_no_circular_imports(graph):
    left = dict(graph)
    while leaves := [name for name, others in left.items() if not others & set(left)]:
        for name in leaves:
            del left[name]
    assert not left, f"these import each other: {sorted(map(str, left))}"


def test_utils_import_nothing_else_of_ours_and_annotations_neither_runs_nor_models():
    assert FOLDERS["utils"] == set() and FOLDERS["annotations"] <= {"datasets", "utils"}


@pytest.mark.parametrize("other", ["stego_book", r"(from|import) benchmarks"])
def test_the_library_imports_neither_the_book_nor_the_benchmarks(other):
    assert not [path for path in PACKAGE.rglob("*.py") if re.search(other, path.read_text(encoding="utf-8"))]


def test_loss_and_model_load_nothing_else_of_ours_and_the_architecture_page_tells_how_much():
    text = (ROOT / "book" / "architecture.md").read_text(encoding="utf-8")
    table = dict(re.findall(r"^\| `stego_lib\.(\w+)` \| ([\d,]+) \|$", text, re.MULTILINE))
    assert list(table) == ["loss", "model", "training"]  # each loads the one before
    code = "import sys\n"
    for module in table:
        code += (
            f"import stego_lib.{module}\nprint(*(m.__file__ for n, m in sys.modules.items() if n[:9] == 'stego_lib'))\n"
        )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    loaded = [[Path(file) for file in line.split()] for line in done.stdout.splitlines()]
    names = [{path.stem for path in files} for files in loaded]
    assert names[:2] == [{"__init__", "loss"}, {"__init__", "loss", "model"}]
    for files, lines in zip(loaded, table.values(), strict=True):
        count = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in files)
        assert count == pytest.approx(int(lines.replace(",", "")), rel=0.15, abs=100)


def test_public_names_can_be_imported_and_completed():
    """They are imported lazily, so Python does not list them by itself."""
    assert set(stego_lib.__all__) <= set(dir(stego_lib))
    assert all(getattr(stego_lib, name) is not None for name in stego_lib.__all__)
    with pytest.raises(AttributeError, match="trainn"):
        stego_lib.trainn  # noqa: B018
