"""How much of the library the tests reach: shows the lines that none does, writes totals and lines to tests/reports/coverage.json.

The last step of `make coverage`; reads the combined .coverage. Fails if it finds a line without a reason in `REASONS`.
"""

import sys

import coverage
from common import ROOT

from stego_lib.utils.environment import environment
from stego_lib.utils.files import write_json

REASONS: dict[tuple[str, str], str] = {}
"""(file, line of code) -> why no test reaches it."""


def main() -> int:
    """The command line; returns the exit status."""
    found = coverage.Coverage(config_file=str(ROOT / "pyproject.toml"), data_file=str(ROOT / ".coverage"))
    found.load()
    found.report(show_missing=True, skip_covered=True)
    files, left = {}, []
    for path in sorted((ROOT / "stego_lib").rglob("*.py")):
        _, lines, _, missing, _ = found.analysis2(str(path))
        name, code = str(path.relative_to(ROOT)), path.read_text().splitlines()
        files[name] = {"lines": len(lines), "reached": len(lines) - len(missing)}
        for number in missing:
            line = code[number - 1].strip()
            left.append({"file": name, "line": number, "code": line, "why": REASONS.get((name, line))})
    total = {key: sum(file[key] for file in files.values()) for key in ("lines", "reached")}
    report = {"written by": "make coverage", **total, "left": left, "files": files, "environment": environment()}
    write_json(ROOT / "tests" / "reports" / "coverage.json", report)
    print(f"{total['reached']} of {total['lines']} lines are reached; written: tests/reports/coverage.json")
    unexplained = [f"{line['file']}:{line['line']}" for line in left if not line["why"]]
    if unexplained:
        print(f"test or remove these, or say in tests/reached.py why not: {', '.join(unexplained)}", file=sys.stderr)
    return 1 if unexplained else 0


if __name__ == "__main__":
    sys.exit(main())
