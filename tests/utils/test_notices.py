"""Notices are one line without path and source wherever they are read, and can be filtered as warnings."""

import subprocess
import sys

import nbclient
import nbformat
from common import ROOT

SOURCE = """import warnings
from stego_lib.utils.notices import Notice, notice

def train():
    notice("batch_size is 12, not 16")  # a line of ours

train()
"""
FILTERED = f"{SOURCE}warnings.simplefilter('ignore', Notice)\ntrain()\nwarnings.warn('elsewhere')\n"


def test_in_a_script(tmp_path):
    """Other warnings keep their place."""
    (tmp_path / "script.py").write_text(FILTERED)
    command = [sys.executable, tmp_path / "script.py"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stderr
    line, other = shown.split("\n", 1)
    assert line == "Notice: batch_size is 12, not 16" and "script.py:10: UserWarning: elsewhere" in other


def test_in_a_notebook_and_the_page_made_of_it():
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(SOURCE)])
    nbclient.NotebookClient(notebook, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}).execute()
    (output,) = notebook.cells[0].outputs
    assert (output.name, output.text) == ("stderr", "Notice: batch_size is 12, not 16\n")
