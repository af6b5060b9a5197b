"""Interleaved timing, peak memory of a process, and description of the machine."""

import json
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import torch

from stego_lib.backbone import choose_device, choose_precision
from stego_lib.utils.environment import environment
from stego_lib.utils.files import write_json

from .material import Settings

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results"
QUICK = 3.0
"""Seconds. The first call of a faster variant is a warm-up and is not counted."""


def interleaved(ways: dict[str, Callable[[], Any]], repeats: int, seconds: float) -> dict[str, dict[str, float]]:
    """Calls all variants in turn, `repeats` times or until `seconds` have passed, at least once.

    Returns median_s, min_s, max_s and n of each. Because they alternate, other load on the machine affects all alike.
    """
    taken: dict[str, list[float]] = {name: [] for name in ways}
    begun = time.perf_counter()
    for name, way in ways.items():
        first = seconds_of(way)
        if first > QUICK:
            taken[name].append(first)
    for _ in range(repeats):
        for name, way in ways.items():
            late = time.perf_counter() - begun > seconds
            if len(taken[name]) < repeats and not (late and taken[name]):
                taken[name].append(seconds_of(way))
    return {name: summary(values) for name, values in taken.items()}


def timed(ways: dict[str, Callable[[], Any]], settings: Settings) -> dict[str, dict[str, float]]:
    """`interleaved` with the repetitions and time limit of the settings."""
    return interleaved(ways, settings.repeats, settings.seconds)


def seconds_of(way: Callable[[], Any]) -> float:
    """Seconds of one call, including GPU work."""
    settle()
    started = time.perf_counter()
    way()
    settle()
    return time.perf_counter() - started


def settle() -> None:
    """Waits for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def summary(values: list[float]) -> dict[str, float]:
    """Median, minimum, maximum and number of the values."""
    return {
        "median_s": round(statistics.median(values), 6),
        "min_s": round(min(values), 6),
        "max_s": round(max(values), 6),
        "n": len(values),
    }


def in_child(module: str, *arguments: object) -> dict[str, Any]:
    """Runs `python -m MODULE ARGUMENTS` and returns the JSON of its last line, with its peak memory as "peak_bytes".

    The peak is the resident memory of the process (including mapped files), sampled every 20 ms.
    """
    command = [sys.executable, "-m", module, *map(str, arguments)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, encoding="utf-8") as child:
        process, peak = psutil.Process(child.pid), 0
        while child.poll() is None:
            try:
                peak = max(peak, process.memory_info().rss)
            except psutil.NoSuchProcess:
                break
            time.sleep(0.02)
        output = child.communicate()[0]
    if child.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {child.returncode}")
    return json.loads(output.splitlines()[-1]) | {"peak_bytes": peak}


def machine() -> dict[str, Any]:
    """Processor, memory, graphics card, threads and versions."""
    found = {
        "cpu": _cpu(),
        "amx": bool(torch.cpu._is_amx_tile_supported()),
        "bfloat16": choose_precision("auto", choose_device("auto")) is torch.bfloat16,
        "cores": len(psutil.Process().cpu_affinity()),
    }
    found |= {"memory_gb": round(psutil.virtual_memory().total / 1e9, 1), "load": psutil.getloadavg()[0]}
    found["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return found | environment()


def _cpu() -> str:
    """The processor's name from `lscpu`."""
    try:
        told = subprocess.run(["lscpu"], capture_output=True, text=True, env={"LC_ALL": "C"}).stdout
    except OSError:
        told = ""
    name = re.search(r"^Model name:\s*(.+)$", told, re.M)
    return name[1].strip() if name else platform.processor() or platform.machine()


def save(record: dict[str, Any], folder: Path) -> Path:
    """Writes MACHINE-DATE.json (MACHINE-DATE-tiny.json of a trial).

    If the file exists (same day and machine), rows that are not in `record` are kept, with machine and settings;
    "again" then stores date and load of the rows in `record`.
    """
    of = record["machine"]
    name = re.sub(r"[^a-z0-9]+", "-", (of["gpu"] or of["cpu"]).lower()).strip("-")
    trial = "-tiny" if record["settings"]["tiny"] else ""
    path = folder / f"{name}-{datetime.now(UTC):%Y-%m-%d}{trial}.json"
    if path.exists():
        earlier = json.loads(path.read_text(encoding="utf-8"))
        if earlier["rows"].keys() - record["rows"].keys():
            moment = {key: of[key] for key in ("date", "load") if key in of}
            again = earlier.get("again", {}) | dict.fromkeys(record["rows"], moment)
            record = earlier | {"rows": earlier["rows"] | record["rows"], "again": again}
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, record)
    return path
