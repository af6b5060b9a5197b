"""The way of an image through the library stays short, and the architecture page states it as measured."""

import sys
import threading

from common import tiny_experiment
from newcomers_path import BEGIN, END, PACKAGE, PAGE, lines, path_files, tables

from stego_lib import evaluate, train


def test_the_path_is_short():
    files = path_files()
    assert len(files) <= 14 and sum(map(lines, files)) <= 2500


def test_the_architecture_page_has_the_measured_tables():
    """If this fails: python tests/project/newcomers_path.py --write."""
    text = PAGE.read_text(encoding="utf-8")
    assert text[text.index(BEGIN) + len(BEGIN) : text.index(END)].strip() == tables().strip()


def test_an_image_passes_every_file_of_the_path(scenes_root, backbone_file, tmp_path):
    entered = set()

    def note(frame, event, _):
        if event == "call":
            entered.add(frame.f_code.co_filename)

    threading.setprofile(note)  # images are read in threads
    sys.setprofile(note)
    try:
        evaluate(train(tiny_experiment(scenes_root, backbone_file, steps=1), runs_dir=tmp_path), baselines=False)
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    missed = [file for file in path_files() if str(file) not in entered]
    assert not missed and str(PACKAGE / "plots" / "figures.py") not in entered
