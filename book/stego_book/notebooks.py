"""Runs the notebooks with papermill, and refuses parameters that a notebook does not have or that are of another type.

    python -m stego_book.notebooks notebooks/train.ipynb out.ipynb -p dataset camvid

papermill itself accepts a misspelled name and runs with the default, and makes a number of text that looks like one
(`2024_01` becomes 202401). Two guards stop that: `run_notebook` compares names and types with the notebook's parameters
before it starts, and `check_parameters`, called by each notebook after its parameters, does the same from within, for
people who call papermill directly. The command line reads a value by the declared type, so text stays text.
"""

import argparse
import ast
import math
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stego_lib.utils.errors import StegoError, brief, did_you_mean
from stego_lib.utils.files import atomic, disk_errors
from stego_lib.utils.paths import user_path
from stego_lib.utils.progress import BARS

SUMMARY = "summary"
"""Tag of the cell whose text is printed when a notebook has run."""
EXPECTED = {"str": "text", "int": "a whole number", "float": "a number", "bool": "True or False"}
"""Types that a parameter can declare -> what an error says is expected."""
FORMER = {
    "pictures": "images",
    "devices": "`torchrun --nproc-per-node N train.py` for several devices",
}  # codespell:ignore pictures
"""Former parameters -> their present names, or what to use instead."""
SWITCH = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
"""Spellings of True and False on the command line, in any case."""


@dataclass(frozen=True)
class Parameter:
    """A parameter as a notebook declares it.

    Parameters
    ----------
    name
        Its name.
    kind
        A key of `EXPECTED`, or None where another type, or none, is declared.
    optional
        Whether None is allowed: it is the default or part of the type.
    """

    name: str
    kind: str | None
    optional: bool

    def parse(self, text: str) -> Any:
        """The value that `text` of the command line stands for.

        Where text is declared it is kept to the letter, except that `None` leaves an optional parameter open. Raises
        StegoError for what is no number, or neither True nor False, where one is declared.
        """
        if self.optional and text == "None":
            return None
        value: Any = text
        try:
            if self.kind == "bool":
                value = SWITCH.get(text.strip().lower(), text)
            elif self.kind in ("int", "float"):
                value = int(text) if self.kind == "int" else float(text)
        except ValueError:
            pass
        self.check(value)
        return value

    def check(self, value: Any, remedy: bool = False) -> None:
        """Raises StegoError for a value of another type. remedy: whether to say how plain papermill is told."""
        if (value is None and self.optional) or self.kind is None:
            return
        fits = {
            "str": isinstance(value, str | os.PathLike),
            "int": isinstance(value, int) and not isinstance(value, bool),
            "float": isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value),
            "bool": isinstance(value, bool),
        }
        if fits[self.kind]:
            return
        text = f"{self.name} = {value!r}: {EXPECTED[self.kind]} is expected"
        if remedy and self.kind == "str":
            text += (
                f". papermill's -p reads what looks like a number, True, False or None as one; write -r {self.name} TEXT "
                "instead, or put quotes around the text in a parameter file"
            )
        elif remedy and self.kind == "bool":
            text += f". papermill knows no other spelling: -p {self.name} True or -p {self.name} False"
        raise StegoError(text)


def declared(source: str) -> dict[str, Parameter]:
    """The parameters that a cell declares, by name: its assignments, `name: type = default` or `name = default`."""
    found = {}
    for statement in _statements(source):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            types = [part.strip() for part in ast.unparse(statement.annotation).strip("'\"").split("|")]
            kinds = [part for part in types if part != "None"]
            kind = kinds[0] if len(kinds) == 1 and kinds[0] in EXPECTED else None
            default = statement.value
            optional = "None" in types or (isinstance(default, ast.Constant) and default.value is None)
            found[statement.target.id] = Parameter(statement.target.id, kind, optional)
        elif isinstance(statement, ast.Assign):
            kind = type(getattr(statement.value, "value", None)).__name__
            for name in (target.id for target in statement.targets if isinstance(target, ast.Name)):
                found[name] = Parameter(name, kind if kind in EXPECTED else None, kind not in EXPECTED)
    return found


def parameters_of(notebook: str | Path) -> dict[str, Parameter]:
    """The parameters of a notebook, by name. Raises StegoError for a file that is no notebook."""
    return _parameters(_read(user_path(notebook)))


def run_notebook(notebook: str | Path, output: str | Path, parameters: dict[str, Any] | None = None) -> str:
    """Executes a notebook with parameters, and writes the executed copy.

    Progress bars go to the error stream and not into the copy. The kernel ends with this process, also at a signal.

    Parameters
    ----------
    notebook, output
        The notebook, and the file of the executed copy.
    parameters
        Values by name.

    Returns
    -------
    str
        What the cell tagged "summary" printed.

    Raises
    ------
    StegoError
        Before anything runs: for an unknown parameter or one of another type, a file that is no notebook, and an output that
        cannot be written.
    PapermillExecutionError
        When a cell fails.

    Examples
    --------
    >>> run_notebook("notebooks/train.ipynb", "out.ipynb", {"seed": 1})
    """
    try:
        import nbformat
        import papermill
    except ImportError:
        raise StegoError(
            "notebooks need papermill, which is not installed: pip install 'stego_lib[notebooks]'"
        ) from None
    from jupyter_client.kernelspec import NoSuchKernel

    notebook, output, parameters = user_path(notebook), user_path(output), parameters or {}
    known = _parameters(_read(notebook))
    refuse_unknown(parameters, list(known), str(notebook))
    for name, value in parameters.items():
        known[name].check(value)
    refuse_output(output, notebook)
    given = {name: os.fspath(value) if isinstance(value, os.PathLike) else value for name, value in parameters.items()}
    plain = [str(path).replace("{", "{{").replace("}", "}}") for path in (notebook, output)]  # papermill fills in {...}
    try:
        with _ended_in_order(), _bars(sys.stderr.isatty()):
            executed = papermill.execute_notebook(*plain, given, progress_bar=False, stderr_file=sys.stderr)
    except NoSuchKernel as error:
        raise StegoError(
            f"{notebook} asks for the kernel {error.name!r}, which is not installed; `jupyter kernelspec list` shows those that are"
        ) from None
    without_progress(executed)
    with atomic(output) as temporary:
        nbformat.write(executed, temporary)
    cells = [cell for cell in executed.cells if SUMMARY in cell.metadata.get("tags", [])]
    return "".join(printed.get("text", "") for cell in cells for printed in cell.outputs)


def _read(path: Path) -> Any:
    """A notebook's content."""
    import nbformat

    if path.is_dir():
        raise StegoError(f"{path} is a folder; name a notebook in it (.ipynb)")
    try:
        content = nbformat.read(path, 4)
        nbformat.validate(content)
        return content
    except FileNotFoundError:
        there = sorted(other.name for other in path.parent.glob("*.ipynb"))
        raise StegoError(f"there is no notebook {path}{did_you_mean(path.name, there)}") from None
    except OSError as error:
        raise StegoError(f"{path} cannot be read ({error.strerror})") from None
    except Exception as error:  # nbformat raises whatever comes of a file that is something else
        raise StegoError(f"{path} is not a notebook, or a damaged one ({brief(error)})") from None


def _parameters(content: Any) -> dict[str, Parameter]:
    """The parameters that the cell tagged "parameters" declares."""
    tagged = (cell for cell in content.cells if "parameters" in cell.metadata.get("tags", []))
    return declared(next((cell.source for cell in tagged if cell.cell_type == "code"), ""))


def refuse_output(output: Path, notebook: Path) -> None:
    """Raises StegoError where the executed copy could not be written, or would replace the notebook itself."""
    if output.is_dir():
        raise StegoError(
            f"{output} is a folder; name the file that the executed copy goes to, such as {output / notebook.name}"
        )
    if output.exists() and output.samefile(notebook):
        raise StegoError(f"the executed copy would replace the notebook {notebook}; name another file for it")
    try:
        with disk_errors(output):
            output.parent.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=output.parent).close()
            if output.exists():
                open(output, "r+b").close()
    except StegoError:
        raise
    except OSError as error:
        raise StegoError(f"{output} cannot be written ({error.strerror})") from None


class Ended(KeyboardInterrupt):
    """A signal asked this process to end."""


@contextmanager
def _ended_in_order() -> Iterator[None]:
    """Answers SIGTERM and SIGHUP like Ctrl-C, by an exception, so that the kernel is shut down."""

    def end(number: int, _: Any) -> None:
        for other in numbers:  # a second one must not break the shutting down
            signal.signal(other, signal.SIG_IGN)
        raise Ended(number)

    named = (getattr(signal, name, None) for name in ("SIGTERM", "SIGHUP"))
    numbers = [number for number in named if number is not None and signal.getsignal(number) == signal.SIG_DFL]
    if threading.current_thread() is not threading.main_thread():
        numbers = []  # Python allows handlers in the main thread alone
    for number in numbers:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


@contextmanager
def _bars(wanted: bool) -> Iterator[None]:
    """Tells the kernel, by its environment, whether to draw progress bars."""
    before = os.environ.pop(BARS, None)
    if wanted:
        os.environ[BARS] = "1"
    try:
        yield
    finally:
        os.environ.pop(BARS, None)
        if before is not None:
            os.environ[BARS] = before


def without_progress(notebook: Any) -> None:
    """Removes progress bars from a notebook's outputs."""
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if not (o.output_type == "stream" and "\r" in o.text)]


def check_parameters() -> None:
    """Called in a notebook after its parameters: StegoError for an unknown name or a value of another type.

    Parameters are the names that cells so far assign with a type (`name: type = default`), also if edited by hand; papermill
    injects values in a cell that starts with "# Parameters". Outside a notebook it does nothing.
    """
    try:
        from IPython import get_ipython
    except ImportError:
        return
    shell = get_ipython()
    sources = shell.user_ns.get("In", []) if shell else []
    known: dict[str, Parameter] = {}
    injected: list[str] = []
    values: dict[str, ast.expr] = {}  # of each name the one that was run last
    for source in sources:
        for statement in _statements(source):
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name) and statement.value:
                known[statement.target.id] = declared(ast.unparse(statement))[statement.target.id]
                values[statement.target.id] = statement.value
            elif isinstance(statement, ast.Assign) and source.startswith("# Parameters\n"):
                names = [target.id for target in statement.targets if isinstance(target, ast.Name)]
                injected += names
                values |= dict.fromkeys(names, statement.value)
    refuse_unknown(injected, list(known), "this notebook")
    for name, expression in values.items():
        number = isinstance(expression, ast.Call) and ast.unparse(expression.func) == "float"  # papermill: float('nan')
        try:
            value = ast.literal_eval(expression.args[0] if isinstance(expression, ast.Call) and number else expression)
        except (ValueError, IndexError):  # a default that is computed
            continue
        value = float(value) if number else value
        known[name].check(value, remedy=name in injected)


def refuse_unknown(names: Any, known: list[str], where: str) -> None:
    """StegoError that lists the unknown names, with a guess at what was meant."""
    unknown = [name for name in names if name not in known]
    if unknown:
        guesses = ", ".join(f"{name!r}{_hint(name, known)}" for name in unknown)
        raise StegoError(f"{where} has no parameter {guesses}; it has: {', '.join(known)}")


def _hint(name: str, known: list[str]) -> str:
    """What an error adds to an unknown name: what replaces a former parameter, or a guess at what was meant."""
    present = FORMER.get(name, "")
    if present in known:
        return f" (it is called {present!r} now)"
    return f" (use {present})" if " " in present else did_you_mean(name, known)


def _statements(source: str) -> list[ast.stmt]:
    """The statements of a cell; none for a cell with magics, which holds no parameters."""
    try:
        return ast.parse(source).body
    except SyntaxError:
        return []


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m stego_book.notebooks", description="Runs a notebook with papermill, its parameters checked."
    )
    parser.add_argument("notebook")
    parser.add_argument("output", help="where the executed copy goes")
    parser.add_argument(
        "-p", "--parameter", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"),
        help="VALUE is read by the type that the notebook declares: text is kept to the letter; None leaves an optional parameter open",
    )  # fmt: skip
    given = parser.parse_args(arguments)
    try:
        known = parameters_of(given.notebook)
        refuse_unknown([name for name, _ in given.parameter], list(known), given.notebook)
        parameters = {name: known[name].parse(value) for name, value in given.parameter}
        text = run_notebook(given.notebook, given.output, parameters)
    except StegoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Ended as ended:
        print(f"ended by a signal; the notebook up to there: {given.output}", file=sys.stderr)
        return 128 + ended.args[0]
    except KeyboardInterrupt:
        print(f"interrupted; the notebook up to there: {given.output}", file=sys.stderr)
        return 130
    except Exception as error:
        return _report(error, given.notebook, given.output)
    print(f"{text}executed notebook: {given.output}")
    return 0


def _report(error: Exception, notebook: str, output: str) -> int:
    """Prints why a notebook stopped halfway; raises unexpected errors again."""
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    if isinstance(error, PapermillExecutionError):
        print(f"error in a cell of {notebook} (see {output}):\n{error.ename}: {error.evalue}", file=sys.stderr)
    elif isinstance(error, DeadKernelError):
        print(f"the kernel of {notebook} died (was it killed, or was memory short?); see {output}", file=sys.stderr)
    else:
        raise error
    return 1


if __name__ == "__main__":
    sys.exit(main())
