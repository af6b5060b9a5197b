"""`check` and the notices of training: each finding on a small dataset, and none on a good one."""

import re
import warnings

import numpy as np
import pytest
import standins
from PIL import Image

from stego_lib.datasets import open_dataset
from stego_lib.datasets.check import check
from stego_lib.datasets.findings import show_findings
from stego_lib.utils.notices import Notice


@pytest.fixture
def own(tmp_path):
    """Three images a split with labels of two classes."""
    for split in ("train", "val"):
        for i in range(3):
            label = standins.stripes([0, 1, 255], 12, 24)
            image = np.random.default_rng(i).integers(0, 256, (12, 24, 3), dtype=np.uint8)
            standins.save(tmp_path / f"folder/imgs/{split}/{i}.png", image)
            standins.save(tmp_path / f"folder/labels/{split}/{i}.png", label)
    (tmp_path / "folder/classes.json").write_text('{"names": ["background", "lesion"]}')
    return tmp_path


def test_a_good_dataset(own, capsys):
    assert check("folder", own)
    text = capsys.readouterr().out
    assert "train: 3 images" in text and "WRONG" not in text and "note" not in text
    assert "33.3 % of the pixels ignored" in text and re.search(r"lesion +33\.3 %", text)


def rewrite(root, name, array, **options):
    return standins.save(root / "folder" / name, np.asarray(array, np.uint8), **options)


def relabel(root, ids):
    for path in (root / "folder/labels").rglob("*.png"):
        standins.save(path, standins.stripes(ids, 12, 24))


def save_exif(root):
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.new("RGB", (24, 12)).save(root / "folder/imgs/train/1.png", exif=exif)


def image(root, name="imgs/train/1.png"):
    return root / "folder" / name


MORE_NAMES = '{"names": ["a", "b", "c"]}'
MASK = np.zeros((12, 24))

# What is done to the folder -> what the finding says, and whether it misleads.
FINDINGS = {
    "objects stored as 255": (lambda root: relabel(root, [0, 255]), "only 'background'.*255 means ignored", True),
    "all ignored": (lambda root: relabel(root, [255]), "no class.*255 means ignored", True),
    "an absent class": (lambda root: image(root, "classes.json").write_text(MORE_NAMES), "1 of 3 classes.*: c", False),
    "an unknown id": (lambda root: rewrite(root, "labels/train/1.png", MASK + 7), r"1\.png contains id 7", True),
    "another size": (lambda root: rewrite(root, "labels/train/1.png", MASK[:, 4:]), r"\(12, 20\)", True),
    "a broken image": (lambda root: image(root).write_bytes(b"x"), r"1\.png cannot be read", True),
    "left-out files": (lambda root: image(root).with_suffix(".heic").touch(), r"ignored files.*1 \.heic", False),
    "subfolders": (lambda root: rewrite(root, "imgs/train/more/b.png", MASK), "1 images in subfolders", False),
    "label maps among images": (
        lambda root: [rewrite(root, f"{kind}/train/1_mask.png", MASK) for kind in ("imgs", "labels")],
        "names of label maps",
        True,
    ),
    "EXIF": (save_exif, "rotated by EXIF", False),
}


@pytest.mark.parametrize("name", FINDINGS)
def test_findings(own, capsys, name):
    spoil, said, misleads = FINDINGS[name]
    spoil(own)
    assert check("folder", own) is not misleads
    text = capsys.readouterr().out
    assert re.search(said, text), text
    assert text.count("WRONG: ") == text.count("WRONG") and ("WRONG" in text) == misleads


def test_both_splits_are_checked_whatever_the_first_is(own, capsys):
    (own / "folder/imgs/train/0.png").write_bytes(b"x")
    assert not check("folder", own)
    assert "val: 3 images" in capsys.readouterr().out
    assert not check("camvid", own) and "MISSING" in capsys.readouterr().out


def test_training_repeats_what_listing_and_counts_tell(own):
    (own / "folder/imgs/train/b.heic").write_bytes(b"x")
    dataset = open_dataset("folder", own, "train")
    with pytest.warns(Notice) as shown:
        show_findings(dataset, [500, 0])
    texts = [str(warning.message) for warning in shown]
    assert len(texts) == 2 and "1 .heic" in texts[0] and "only 'background'" in texts[1]
    (own / "folder/imgs/train/b.heic").unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        show_findings(dataset, [500, 20])
