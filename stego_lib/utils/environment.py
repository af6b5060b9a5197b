"""Versions and hardware for run records."""

import platform
from datetime import UTC, datetime
from importlib.metadata import version

import torch


def environment() -> dict[str, str]:
    """Versions of packages, processor, threads and the date (UTC)."""
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "timm", "scikit-learn", "numpy")},
        "machine": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{platform.machine()} CPU ({torch.backends.cpu.get_cpu_capability()})",
        "threads": str(torch.get_num_threads()),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
    }
