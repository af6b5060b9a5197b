"""Files from strangers that try to run code. Hostile weight files are in `networks/test_weight_files.py`."""

import html
import io
import os
import pickle

import numpy as np
import pytest
from PIL import Image
from project_code import calls, sources
from released import Call

from stego_book.plots import grids
from stego_lib import StegoError, open_dataset
from stego_lib.segment import segment_folder


def test_an_image_that_is_a_program_is_refused(run, tmp_path):
    (tmp_path / "evil.jpg").write_text(
        "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n"
        f"(%pipe%touch {tmp_path / 'ran'}) (w) file pop\nshowpage\n%%EOF\n"
    )
    with pytest.raises(StegoError, match="evil"):
        run.predict(tmp_path / "evil.jpg")
    assert not (tmp_path / "ran").exists()


def test_a_pickle_in_an_array_is_refused(tmp_path):
    """As every feature store would: NumPy's default, which `test_no_code_loads_pickles` keeps."""
    np.save(tmp_path / "features.npy", np.array([Call(os.mkdir, str(tmp_path / "ran"))], object))
    with pytest.raises(ValueError, match="pickle"):
        np.load(tmp_path / "features.npy")
    pickle.loads((tmp_path / "features.npy").read_bytes()[128:])
    assert (tmp_path / "ran").exists(), "the attack works where nothing prevents it"


# Tests that make attacks, and show that they work.
ATTACKING = {"tests/robustness/test_hostile.py", "tests/networks/test_weight_files.py"}


def test_no_code_loads_pickles():
    """No `torch.load` without weights_only=True, and no other call that runs code of a file."""
    count = 0
    for name, tree in sources().items():
        for called, words in calls(tree):
            count += called == "torch.load"
            assert called != "torch.load" or words.get("weights_only") == "True", name
            if name in ATTACKING:
                continue
            assert words.get("allow_pickle") in (None, "False"), name
            assert called not in ("pickle.load", "pickle.loads", "pickle.Unpickler", "os.system"), name
            assert called not in ("eval", "exec") or name.startswith("tests/"), name
            assert called not in ("yaml.load", "joblib.load", "pd.read_pickle", "torch.jit.load"), name
            assert called != "torch.hub.load" or words.get("source") == "'local'", name
            assert not called.endswith((".extractall", ".extract")), name
            assert words.get("shell") in (None, "False"), name
    assert count, "the test looks at calls of torch.load"


NAMES = ("<img src=x onerror=alert(1)>", "$\\frac{$ & <b>", "a\nb")


@pytest.mark.filterwarnings("ignore::stego_lib.utils.notices.Notice")
def test_names_of_files_are_text_in_tables_and_figures(run, tmp_path):
    """A name may hold HTML, which a notebook would run, or TeX, on which a figure would fail."""
    folder = tmp_path / "data" / "imgs" / "train"
    folder.mkdir(parents=True)
    for name in NAMES:
        Image.new("RGB", (32, 32)).save(folder / f"{name}.png")
    areas = segment_folder(run, folder, tmp_path / "out")
    shown = areas._repr_html_()
    assert "<img" not in shown and "<b>" not in shown and html.escape("<img src=x") in shown
    for figure in (
        grids.image_grid({NAMES[0]: [np.zeros((8, 8, 3), np.uint8)]}, titles=[NAMES[1]]),
        grids.examples(open_dataset("folder", tmp_path / "data", "train"), range(len(NAMES))),
    ):
        with io.BytesIO() as buffer:
            figure.savefig(buffer, format="svg")
            assert b"<img" not in buffer.getvalue()
