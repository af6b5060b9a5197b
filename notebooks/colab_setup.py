"""Installs this clone of the project; the first cell of each notebook runs it in a fresh runtime."""

import importlib.metadata
import importlib.util
import subprocess
import sys
from pathlib import Path

root = Path(__file__).resolve().parent.parent
# An installed torch stays: a newer one would not fit the other packages of the runtime.
pinned = [f"torch=={importlib.metadata.version('torch')}"] if importlib.util.find_spec("torch") else []
packages = ["--editable", f"{root}[annotations,export,hub,prepare]", "--editable", f"{root / 'book'}"]
subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *pinned, *packages], check=True)
sys.path[:0] = [str(root), str(root / "book")]  # a kernel that already runs does not see an editable installation

import torch  # noqa: E402

device = (
    torch.cuda.get_device_name() if torch.cuda.is_available() else "the CPU (in Colab: Runtime, Change runtime type)"
)
print(f"stego_lib from {root}, torch {torch.__version__} on {device}")
