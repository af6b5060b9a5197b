"""Images to pre-train on: sizes, shares, and folders that hold none."""

import numpy as np
import pytest
import torch
from PIL import Image

from stego_book.pretraining import labeled_sample, mixture, pretrain, read_photographs
from stego_book.pretraining.loop import _draw
from stego_lib import StegoError


def save(path, width: int, height: int) -> None:
    """An image whose red grows with x and whose green grows with y, in pixels of its own."""
    y, x = np.mgrid[:height, :width].astype(np.uint8)
    Image.fromarray(np.stack([x, y, 0 * x], 2)).save(path)


def test_photographs_cover_the_size_and_are_not_stretched(tmp_path):
    save(tmp_path / "b.png", 160, 60)  # twice as wide as asked for: left and right are cut off
    save(tmp_path / "a.png", 40, 90)  # too narrow: enlarged twice, top and bottom are cut off
    (tmp_path / "notes.txt").write_text("no image")
    found = read_photographs(tmp_path, (60, 80))
    assert found.shape == (2, 3, 60, 80) and found.dtype == torch.uint8
    tall, wide = found.float()
    assert torch.equal(wide[0], torch.arange(40.0, 120.0).expand(60, 80)), "the middle of the columns"
    assert torch.equal(wide[1], torch.arange(60.0)[:, None].expand(60, 80))
    assert_rows = tall[1, :, 40]  # of 90 rows the middle 30, each twice
    assert assert_rows[0] == pytest.approx(30, abs=1) and assert_rows[-1] == pytest.approx(59, abs=1)
    assert tall[0, 30, 0] == pytest.approx(0, abs=1) and tall[0, 30, -1] == pytest.approx(39, abs=1)


def test_a_folder_without_images_is_named(tmp_path):
    with pytest.raises(StegoError, match=rf"no image in {tmp_path}"):
        read_photographs(tmp_path)
    with pytest.raises(StegoError, match=r"nowhere cannot be read"):
        read_photographs(tmp_path / "nowhere")
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    with pytest.raises(StegoError, match=r"broken\.jpg cannot be read"):
        read_photographs(tmp_path)


def test_a_mixture_is_drawn_by_its_shares_whatever_the_sizes():
    parts = [torch.full((count, 3, 2, 2), value, dtype=torch.uint8) for count, value in ((3, 1), (40, 2), (2, 3))]
    images, chances = mixture(parts, [3, 1, 1])
    assert images.shape == (45, 3, 2, 2) and chances.sum().item() == pytest.approx(1)
    rows = _draw(45, chances, 20_000, torch.Generator().manual_seed(0))
    kinds = images[rows, 0, 0, 0]
    for value, share in ((1, 0.6), (2, 0.2), (3, 0.2)):
        assert (kinds == value).float().mean().item() == pytest.approx(share, abs=0.015)
    assert len(rows.unique()) == 45


def test_images_without_a_chance_are_not_seen(tmp_path):
    """An image that is never drawn may as well be another one."""
    from recipes import DISTILLED

    images = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    chances = torch.tensor([1.0, 1, 1, 0, 0, 0])
    losses = []
    for number, changed in enumerate((slice(3, 6), slice(0, 3))):
        other = images.clone()
        other[changed] = 255 - other[changed]
        runs = [
            pretrain(p, DISTILLED, tmp_path / f"{number}{i}", chances=chances)[1] for i, p in enumerate((images, other))
        ]
        losses.append([[line["loss"] for line in log] for log in runs])
    assert losses[0][0] == losses[0][1] and losses[1][0] != losses[1][1]


def test_a_labeled_sample_keeps_images_and_labels_together():
    def pair(row: int):
        return torch.full((3, 20, 24), row, dtype=torch.uint8), torch.full((20, 24), 100 + row)

    class Eleven:
        def __len__(self) -> int:
            return 11

        def __getitem__(self, row: int):
            return pair(row)

    images, labels = labeled_sample(Eleven(), [0, 5, 10], (16, 8))
    assert images.shape == (3, 3, 16, 8) and labels.shape == (3, 16, 8)
    assert images[:, 0, 0, 0].tolist() == [0, 5, 10] and labels[:, 15, 7].tolist() == [100, 105, 110]
