"""Clocks and scales: interleaved timing, the peak memory of a process, and what machine it was."""

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
"""Seconds; the first call of whatever takes less only warms up and is not counted."""


def interleaved(ways: dict[str, Callable[[], Any]], repeats: int, seconds: float) -> dict[str, dict[str, float]]:
    """Calls all `ways` in turn, `repeats` times or until `seconds` are over (once at least).

    Returns for each way median_s, min_s, max_s and n. As the ways take turns, other load on the machine affects all.
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
    """The same, as often and as long as the settings say."""
    return interleaved(ways, settings.repeats, settings.seconds)


def seconds_of(way: Callable[[], Any]) -> float:
    """Seconds that one call takes, work that it leaves to the GPU included."""
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
    """Median, smallest and largest of some seconds, and how many they are."""
    return {
        "median_s": round(statistics.median(values), 6),
        "min_s": round(min(values), 6),
        "max_s": round(max(values), 6),
        "n": len(values),
    }


def in_child(module: str, *arguments: object) -> dict[str, Any]:
    """Runs `python -m MODULE ARGUMENTS` and returns the JSON of its last line, with its peak memory as "peak_bytes".

    The peak is the resident memory of the process (what it has mapped of files included), looked at every 20 ms.
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
    """The processor's name, as `lscpu` tells it."""
    try:
        told = subprocess.run(["lscpu"], capture_output=True, text=True, env={"LC_ALL": "C"}).stdout
    except OSError:
        told = ""
    name = re.search(r"^Model name:\s*(.+)$", told, re.M)
    return name[1].strip() if name else platform.processor() or platform.machine()


def save(record: dict[str, Any], folder: Path) -> Path:
    """Writes MACHINE-DATE.json (MACHINE-DATE-tiny.json of a trial).

    Rows of an earlier run of that day on that machine that are not in `record` stay, and with them what was said of
    machine and settings; "again" then tells when, and at which load, the rows of `record` were measured.
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
