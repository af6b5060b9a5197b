"""Runs the notebooks with papermill, and refuses parameters that a notebook does not have.

    python -m stego_lib.notebooks notebooks/train.ipynb out.ipynb -p dataset camvid

papermill itself accepts a misspelt name and runs with the default. Two guards stop that: `run_notebook` compares names
with `papermill.inspect_notebook` before it starts, and `check_parameters`, called by each notebook after its
parameters, does the same from within, for people who call papermill directly.
"""

import argparse
import ast
import sys
from pathlib import Path
from typing import Any

import yaml

from .errors import StegoError
from .experiment import did_you_mean
from .files import atomic

SUMMARY = "summary"
"""Tag of the cell whose text is printed when a notebook has run."""


def run_notebook(notebook: str | Path, output: str | Path, parameters: dict[str, Any] | None = None) -> str:
    """Executes `notebook` with `parameters` and writes the executed copy to `output`.

    Its progress bars are shown on the error stream and left out of the copy. Returns the text printed by the cell tagged "summary" ("" if there
    is none). Raises StegoError for a parameter that the notebook does not have, before running anything, and
    papermill's PapermillExecutionError when a cell fails.
    """
    import nbformat
    import papermill

    parameters = parameters or {}
    known = list(papermill.inspect_notebook(str(notebook)))
    refuse_unknown(parameters, known, str(notebook))
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    executed = papermill.execute_notebook(
        str(notebook), str(output), parameters, progress_bar=False, stderr_file=sys.stderr
    )
    without_progress(executed)
    with atomic(output) as temporary:
        nbformat.write(executed, temporary)
    cells = [cell for cell in executed.cells if SUMMARY in cell.metadata.get("tags", [])]
    return "".join(printed.get("text", "") for cell in cells for printed in cell.outputs)


def without_progress(notebook: Any) -> None:
    """Takes progress bars out of a notebook's outputs: what was drawn over itself is of no use to a reader."""
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if not (o.output_type == "stream" and "\r" in o.text)]


def check_parameters() -> None:
    """Called in a notebook after its parameters: StegoError if papermill injected a name that is not among them.

    The parameters are the names that cells so far assign with a type (`name: type = default`); what papermill injects
    stands in a cell that begins with "# Parameters". Outside a notebook it does nothing.
    """
    try:
        from IPython import get_ipython
    except ImportError:
        return
    shell = get_ipython()
    sources = shell.user_ns.get("In", []) if shell else []
    known, injected = [], []
    for source in sources:
        statements = _statements(source)
        known += [s.target.id for s in statements if isinstance(s, ast.AnnAssign) and isinstance(s.target, ast.Name)]
        if source.startswith("# Parameters\n"):
            injected += [
                t.id for s in statements if isinstance(s, ast.Assign) for t in s.targets if isinstance(t, ast.Name)
            ]
    refuse_unknown(injected, known, "this notebook")


def refuse_unknown(names: Any, known: list[str], where: str) -> None:
    """Raises StegoError that lists the names which are not known, with a guess at what was meant."""
    unknown = [name for name in names if name not in known]
    if unknown:
        guesses = ", ".join(f"{name!r}{did_you_mean(name, known)}" for name in unknown)
        raise StegoError(f"{where} has no parameter {guesses}; it has: {', '.join(known)}")


def _statements(source: str) -> list[ast.stmt]:
    try:
        return ast.parse(source).body
    except SyntaxError:  # a cell with magics holds no parameters
        return []


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m stego_lib.notebooks", description="Runs a notebook with papermill, its parameters checked."
    )
    parser.add_argument("notebook")
    parser.add_argument("output", help="where the executed copy goes")
    parser.add_argument("-p", "--parameter", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))
    given = parser.parse_args(arguments)
    from papermill.exceptions import PapermillExecutionError

    parameters = {name: yaml.safe_load(value) for name, value in given.parameter}
    try:
        text = run_notebook(given.notebook, given.output, parameters)
    except StegoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except PapermillExecutionError as error:
        print(
            f"error in a cell of {given.notebook} (see {given.output}):\n{error.ename}: {error.evalue}", file=sys.stderr
        )
        return 1
    print(f"{text}executed notebook: {given.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
