"""How much of the library the tests reach: shows the lines that none does, writes the totals to tests/reports/coverage.json.

The last step of `make coverage`; reads the combined .coverage.
"""

import coverage
from common import ROOT

from stego_lib.files import write_json
from stego_lib.run import environment


def main() -> None:
    """The command line."""
    found = coverage.Coverage(config_file=str(ROOT / "pyproject.toml"), data_file=str(ROOT / ".coverage"))
    found.load()
    found.report(show_missing=True, skip_covered=True)
    files = {}
    for path in sorted((ROOT / "stego_lib").rglob("*.py")):
        _, lines, _, missing, _ = found.analysis2(str(path))
        files[str(path.relative_to(ROOT))] = {"lines": len(lines), "reached": len(lines) - len(missing)}
    total = {key: sum(file[key] for file in files.values()) for key in ("lines", "reached")}
    report = {"written by": "make coverage", **total, "files": files, "environment": environment()}
    write_json(ROOT / "tests" / "reports" / "coverage.json", report)
    print(f"{total['reached']} of {total['lines']} lines are reached; written: tests/reports/coverage.json")


if __name__ == "__main__":
    main()
