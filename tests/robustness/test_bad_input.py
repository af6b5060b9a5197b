"""Mistakes of users, odd but valid input, and files that try to run code: one clear error each, or it works.

Formats of images and label maps are in tests/datasets, parameters out of range in test_experiment.py, hostile weight
files in networks/test_weight_files.py.
"""

import ast
import html
import io
import json
import math
import re
import shutil
from collections.abc import Iterator

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
from common import ROOT, TIMM_ARGUMENTS, tiny_experiment, write_backbone
from PIL import Image
from safetensors.torch import load_file, save_file
from standins import flat_png, save

from stego_book.plots import grids
from stego_book.plots.style import use_style
from stego_lib import Experiment, Run, StegoError, evaluate, load_run, open_dataset, train, training
from stego_lib.segment import segment_folder

SIDE = 32
IGNORED = np.full((SIDE, SIDE), 255, np.uint8)


@pytest.fixture
def experiment(tmp_path, backbone_file) -> Experiment:
    """On a small labeled folder: 5 images to train on, 2 to score."""
    for split, count in (("train", 5), ("val", 2)):
        for i in range(count):
            rng = np.random.default_rng(i)
            save(tmp_path / f"folder/imgs/{split}/{i}.png", rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8))
            save(tmp_path / f"folder/labels/{split}/{i}.png", rng.integers(0, 3, (SIDE, SIDE), dtype=np.uint8))
    (tmp_path / "folder/classes.json").write_text('{"names": ["road", "tree", "car"]}')
    return tiny_experiment(tmp_path, backbone_file, dataset="folder", train_size=SIDE, eval_size=SIDE, steps=2)


@pytest.fixture
def image(tmp_path):
    return tmp_path / "folder/imgs/train/2.png"


@pytest.mark.parametrize(
    "spoil",
    [lambda image: (image.unlink(), image.symlink_to("nowhere")), lambda image: flat_png(image, 20_000)],
    ids=["a dangling link", "400 megapixels"],
)
def test_training_names_a_file_that_cannot_be_read(experiment, image, tmp_path, monkeypatch, spoil):
    spoil(image)
    monkeypatch.setattr(training, "train_step", lambda *_: pytest.fail("training began"))
    with pytest.raises(StegoError, match=r"2\.png cannot be read"):
        train(experiment, runs_dir=tmp_path / "runs")


def test_weights_that_are_no_numbers_are_named(experiment, tmp_path):
    path = write_backbone(tmp_path / "own.safetensors")
    weights = load_file(path)
    save_file(weights | {"norm.weight": weights["norm.weight"] * math.nan}, path, {"timm": json.dumps(TIMM_ARGUMENTS)})
    with pytest.raises(StegoError, match="weights"):
        train(experiment.but(backbone=str(path)), runs_dir=tmp_path / "runs")


def load_with_another_head(run: Run) -> None:
    values = json.loads((run.folder / "experiment.json").read_text())
    (run.folder / "experiment.json").write_text(json.dumps(values | {"code_dim": 9}))
    load_run(run.folder)


def score_without_labels(run: Run) -> None:
    for path in (run.folder.parent.parent / "folder/labels/val").iterdir():
        save(path, IGNORED)
    evaluate(run, baselines=False)


@pytest.mark.filterwarnings("ignore:.*no class")
@pytest.mark.parametrize(
    "use, said",
    [
        (load_with_another_head, "checkpoint"),
        (score_without_labels, "ignored"),
        (lambda run: load_run(run.folder, code_dim=3), "code_dim"),
    ],
)
def test_runs_are_checked(experiment, tmp_path, use, said):
    run = train(experiment, runs_dir=tmp_path / "runs")
    with pytest.raises(StegoError, match=said):
        use(run)


def add_other_files(image, label) -> None:
    for name in ("Thumbs.db", ".hidden.png", "notes.txt"):
        (image.parent / name).write_bytes(b"x")
    shutil.copy(label, label.with_name("99.png"))


VALID = {
    "two views, as phones save them": lambda image, label: Image.new("RGB", (SIDE, SIDE)).save(image, "MPO"),
    "one pixel": lambda image, label: (Image.new("RGB", (1, 1)).save(image), Image.new("L", (1, 1)).save(label)),
    "a label map that is all ignored": lambda image, label: save(label, IGNORED),
    "other files beside": add_other_files,
}


@pytest.mark.parametrize("name", VALID)
def test_odd_input_works(experiment, image, tmp_path, name):
    VALID[name](image, tmp_path / "folder/labels/train/2.png")
    assert train(experiment, runs_dir=tmp_path / "runs").step == 2


def test_an_image_that_is_a_program_is_refused(run, tmp_path):
    (tmp_path / "evil.jpg").write_text(
        "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n"
        f"(%pipe%touch {tmp_path / 'ran'}) (w) file pop\nshowpage\n%%EOF\n"
    )
    with pytest.raises(StegoError, match="evil"):
        run.predict(tmp_path / "evil.jpg")
    assert not (tmp_path / "ran").exists()


def calls() -> Iterator[tuple[str, str, dict[str, str]]]:
    """File, function and named arguments of every call in the two packages and in the notebooks."""
    sources = {path: path.read_text() for part in ("stego_lib", "book") for path in (ROOT / part).rglob("*.py")}
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        code = [cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]
        sources[path] = re.sub(r"^\s*[%!].*$", "", "\n".join(code), flags=re.MULTILINE)
    for path, text in sources.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call):
                words = {word.arg or "**": ast.unparse(word.value) for word in node.keywords}
                yield str(path.relative_to(ROOT)), ast.unparse(node.func), words


FORBIDDEN = {
    "pickle.load", "pickle.loads", "pickle.Unpickler", "yaml.load", "joblib.load", "pd.read_pickle", "torch.jit.load",
    "os.system", "eval", "exec",
}  # fmt: skip


def test_no_code_loads_pickles():
    count = 0
    for name, called, words in calls():
        count += called == "torch.load"
        assert called not in FORBIDDEN and not called.endswith((".extractall", ".extract")), name
        assert called != "torch.load" or words.get("weights_only") == "True", name
        assert called != "torch.hub.load" or words.get("source") == "'local'", name
        assert words.get("allow_pickle") in (None, "False") and words.get("shell") in (None, "False"), name
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
    with plt.rc_context(), io.BytesIO() as buffer:
        use_style()
        grids.image_grid({NAMES[0]: [np.zeros((8, 8, 3), np.uint8)]}, titles=[NAMES[1]]).savefig(buffer, format="svg")
        examples = grids.examples(open_dataset("folder", tmp_path / "data", "train"), range(len(NAMES)))
        examples.savefig(buffer, format="svg")
        assert b"<img" not in buffer.getvalue()
