"""Runs a notebook with papermill after checking its parameters.

    python -m stego_book.notebooks notebooks/train.ipynb out.ipynb -p dataset camvid

papermill ignores misspelled parameter names and converts text that looks like a number (`2024_01` becomes 202401).
`run_notebook` checks names and types against the notebook's parameters before it starts. `check_parameters`, which each
notebook calls after its parameters, does the same when papermill is called directly.
"""

import argparse
import ast
import math
import os
import re
import signal
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from stego_lib.utils.errors import StegoError, check_choice, did_you_mean
from stego_lib.utils.progress import BARS

# Declared type -> its name in error messages; other types are not checked.
TYPES = {"str": "text", "int": "a whole number", "float": "a number", "bool": "True or False"}
# True and False on the command line.
SWITCHES = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
# Parameters with the same choices in all notebooks, which otherwise are first used after training.
CHOICES = {"refine": ("crf", "none")}


class Parameter(NamedTuple):
    """A parameter of a notebook: name, declared type, and default as text."""

    name: str
    type: str
    default: str

    def parse(self, text: str) -> Any:
        """Converts a command-line argument to the declared type; text that does not fit stays text."""
        if text == self.default == "None":
            return None
        if self.type == "bool":
            return SWITCHES.get(text.lower(), text)
        with suppress(ValueError):
            return {"int": int, "float": float}.get(self.type, str)(text)
        return text

    def check(self, value: Any) -> None:
        """Raises StegoError for a value of another type or not in `CHOICES`. None is valid if it is the default."""
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        valid = {
            "str": isinstance(value, str | os.PathLike),
            "int": number and isinstance(value, int),
            "float": number,
            "bool": isinstance(value, bool),
        }
        if not valid.get(self.type, True) and not (value is None and self.default == "None"):
            remedy = f" With papermill, write -r {self.name} TEXT instead of -p." if self.type == "str" else ""
            raise StegoError(f"{self.name}={value!r} must be {TYPES[self.type]}.{remedy}")
        counts = self.type == "int" and self.default.isdecimal() and self.default != "0"
        if counts and value < 1:
            raise StegoError(f"{self.name}={value!r} must be at least 1.")
        if self.name in CHOICES and value is not None:
            check_choice(self.name, value, CHOICES[self.name])


def parameters_of(notebook: str | Path) -> dict[str, Parameter]:
    """The parameters of a notebook by name, as papermill reads them."""
    import nbformat
    import papermill

    notebook = Path(notebook)
    if not notebook.is_file():
        others = [path.name for path in notebook.parent.glob("*.ipynb")]
        raise StegoError(f"{notebook} does not exist{did_you_mean(notebook.name, others)}.")
    try:
        declared = papermill.inspect_notebook(str(notebook))
    except (ValueError, nbformat.ValidationError):
        raise StegoError(f"{notebook} is not a notebook.") from None
    return {
        name: Parameter(name, about["inferred_type_name"], str(about["default"])) for name, about in declared.items()
    }


def check_values(values: Mapping[str, Any], known: Mapping[str, Parameter], where: str) -> None:
    """Raises StegoError if `where` lacks one of the parameters, or if a value does not have the declared type."""
    for name, value in values.items():
        if name not in known:
            suggestion = did_you_mean(name, list(known))
            raise StegoError(f"{where} has no parameter {name!r}{suggestion}. It has: {', '.join(known)}.")
        known[name].check(value)


def run_notebook(notebook: str | Path, output: str | Path, parameters: dict[str, Any] | None = None) -> str:
    """Executes a notebook with parameters, writes the executed copy, and returns the text of the cell tagged "summary".

    Progress is printed to stderr and not stored in the copy. Raises StegoError for an unknown parameter or a value of
    the wrong type before the notebook runs, and PapermillExecutionError if a cell fails.

    >>> run_notebook("notebooks/train.ipynb", "out.ipynb", {"seed": 1})
    """
    import nbformat
    import papermill

    notebook, output, parameters = Path(notebook), Path(output), parameters or {}
    check_values(parameters, parameters_of(notebook), str(notebook))
    if output.is_dir() or output.resolve() == notebook.resolve():
        raise StegoError(f"{output} is a folder or the notebook itself. Name another file for the executed copy.")
    output.parent.mkdir(parents=True, exist_ok=True)
    values = {name: os.fspath(value) if isinstance(value, os.PathLike) else value for name, value in parameters.items()}
    executed = papermill.execute_notebook(
        str(notebook), str(output), values, progress_bar=False, stderr_file=sys.stderr
    )
    for cell in executed.cells:
        if cell.cell_type == "code":  # remove redrawn progress bars
            cell.outputs = [out for out in cell.outputs if not (out.output_type == "stream" and "\r" in out.text)]
    nbformat.write(executed, output)
    summaries = [cell for cell in executed.cells if "summary" in cell.metadata.get("tags", [])]
    return "".join(out.get("text", "") for cell in summaries for out in cell.outputs)


def check_parameters() -> None:
    """Checks the parameters of the calling notebook: StegoError for an unknown name or a value of the wrong type.

    Parameters are the names assigned with a type annotation (`name: type = default`) in the cells run so far. papermill
    injects values in a cell that starts with "# Parameters".
    """
    from IPython import get_ipython

    shell = get_ipython()
    known: dict[str, Parameter] = {}
    values: dict[str, Any] = {}
    for source in shell.user_ns["In"] if shell else ():
        try:
            statements = ast.parse(source).body
        except SyntaxError:  # a cell with magics
            continue
        for statement in statements:
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name) and statement.value:
                name = statement.target.id
                known[name] = Parameter(name, ast.unparse(statement.annotation), ast.unparse(statement.value))
            elif isinstance(statement, ast.Assign) and source.startswith("# Parameters\n"):
                name = ast.unparse(statement.targets[0])
            else:
                continue
            try:
                values[name] = ast.literal_eval(statement.value)
            except ValueError:  # a computed default
                values.pop(name, None)
                if source.startswith("# Parameters\n"):  # papermill writes float('nan')
                    values[name] = math.nan
    check_values(values, known, "this notebook")


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    about = "Runs a notebook with papermill after checking its parameters."
    parser = argparse.ArgumentParser(prog="python -m stego_book.notebooks", description=about)
    parser.add_argument("notebook")
    parser.add_argument("output", help="file of the executed copy")
    parser.add_argument("-p", "--parameter", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))
    given = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # also stops the kernel
    if sys.stderr.isatty():
        os.environ[BARS] = "1"
    try:
        known = parameters_of(given.notebook)
        values = {name: known[name].parse(text) if name in known else text for name, text in given.parameter}
        summary = run_notebook(given.notebook, given.output, values)
    except StegoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except PapermillExecutionError as error:
        lines = [re.sub(r"\x1b\[[\d;]*m", "", line) for line in error.traceback]  # one line of a StegoError
        print(f"a cell failed, see {given.output}", *lines, sep="\n", file=sys.stderr)
        return 1
    except DeadKernelError:
        print(f"the kernel died, possibly out of memory; see {given.output}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"interrupted, see {given.output}", file=sys.stderr)
        return 130
    print(f"{summary}executed notebook: {given.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
