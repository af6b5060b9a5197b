"""Stand-ins for real datasets: a few made-up images in the exact published layout.

Images are flat stripes, one for each stored label id, so that files of the real size are small and quick to write.
"""

import struct
import zlib
from pathlib import Path

import numpy as np
import scipy.io
from PIL import Image

from stego_lib.datasets.labelmefacade import CLASSES
from stego_lib.datasets.potsdam import COLORS

# Ids that no file of COCO-Stuff holds: gaps in COCO's list of things.
UNUSED = (11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90)


def save(path: Path, array: np.ndarray, **options: object) -> Path:
    """Writes an image or label map, and the folders it needs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


def stripes(ids: list[int], height: int, width: int) -> np.ndarray:
    """Label map, uint8 (height, width): upright stripes of equal width, one for each id."""
    return np.tile(np.array(ids, np.uint8)[np.arange(width) * len(ids) // width], (height, 1))


def colored(label: np.ndarray, seed: int = 0) -> np.ndarray:
    """Image, uint8 (H, W, 3): each stored id in a color of its own."""
    return np.random.default_rng(seed).integers(0, 256, (256, 3), dtype=np.uint8)[label]


def noise_images(folder: Path, *sizes: tuple[int, int]) -> list[Path]:
    """Writes 0.png, 1.png, ... of these widths and heights, of smooth noise."""
    paths = []
    for number, size in enumerate(sizes):
        noise = np.random.default_rng(number).integers(0, 256, (5, 6, 3), dtype=np.uint8)
        paths.append(save(folder / f"{number}.png", np.asarray(Image.fromarray(noise).resize(size))))
    return paths


def flat_png(path: Path, side: int) -> Path:
    """A black PNG of side x side pixels, 1 bit each: 400 megapixels are 50 kB, and made without an image in memory."""
    return write_png(path, (side, side, 1, 0), bytes((1 + (side + 7) // 8) * side))


def write_png(path: Path, header: tuple[int, int, int, int], rows: bytes) -> Path:
    """A PNG of width, height, bits and color type, from its rows, each after a filter byte."""
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", *header, 0, 0, 0)), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    written = [
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(written))
    return path


def camvid(root: Path, counts: dict[str, int], height: int = 360, width: int = 480) -> None:
    """root/camvid with `counts` images a split; ids 0 to 11."""
    for split, count in counts.items():
        for i in range(count):
            label = stripes([(i + k) % 12 for k in range(12)], height, width)
            save(root / "camvid" / split / f"0001TP_{i:06d}.png", colored(label))
            save(root / "camvid" / f"{split}annot" / f"0001TP_{i:06d}.png", label)


def labelmefacade(root: Path, counts: dict[str, int], height: int = 512, width: int = 683) -> None:
    """root/labelmefacade with `counts` images of each place; label maps are colors of 16 bits and alpha."""
    colors = np.array([(0, 0, 0), *CLASSES.colors])
    for place, count in counts.items():
        for i in range(count):
            label = stripes([(i + k) % 9 for k in range(9)], height, width)
            save(root / "labelmefacade" / "images" / f"static_street_{place}__img_{i}.jpg", colored(label))
            save_colors(root / "labelmefacade" / "labels" / f"static_street_{place}__img_{i}.png", colors[label])


def save_colors(path: Path, colors: np.ndarray) -> None:
    """Writes 8-bit colors (H, W, 3) as an opaque PNG of 16 bits, which Pillow cannot."""
    height, width = colors.shape[:2]
    pixels = np.full((height, width, 4), 255 * 257, ">u2")
    pixels[..., :3] = colors * 257
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    write_png(path, (width, height, 16, 6), rows)


def cityscapes(root: Path, counts: dict[str, int], height: int = 1024, width: int = 2048) -> None:
    """root/cityscapes with `counts` images a split, in two cities; ids 0 to 33 (of which 7 and above are classes)."""
    for split, count in counts.items():
        for i in range(count):
            city = ("aachen", "ulm")[i % 2]
            stem = f"{city}_{i:06d}_000019"
            label = stripes([(i + k) % 34 for k in range(34)], height, width)
            save(root / "cityscapes" / "leftImg8bit" / split / city / f"{stem}_leftImg8bit.png", colored(label))
            save(root / "cityscapes" / "gtFine" / split / city / f"{stem}_gtFine_labelIds.png", label)


def cocostuff(
    root: Path, counts: dict[str, int], lists: tuple[str, ...], height: int = 480, width: int = 640, first: int = 9
) -> None:
    """root/cocostuff with `counts` images a split, all of them in each of `lists`; used ids of 0 to 181, and 255."""
    used = [id_ for id_ in range(182) if id_ not in UNUSED]
    for split, count in counts.items():
        ids = [f"{first + i:012d}" for i in range(count)]
        for i, name in enumerate(ids):
            label = stripes(used[i:] + used[:i], height, width)
            label[-height // 8 :] = 255
            save(root / "cocostuff" / "images" / f"{split}2017" / f"{name}.jpg", colored(label))
            save(root / "cocostuff" / "annotations" / f"{split}2017" / f"{name}.png", label)
        for list_ in lists:
            path = root / "cocostuff" / "curated" / f"{split}2017" / list_
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(f"{name}\n" for name in ids))


def potsdam_patches(root: Path, train: int, val: int, unlabeled: int = 0, side: int = 200) -> None:
    """root/potsdam in the published layout: .mat files with four channels, and the four lists."""
    folder = root / "potsdam"
    for kind in ("imgs", "gt"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    names = [str(100 + i) for i in range(train + val + unlabeled)]
    for i, name in enumerate(names):
        label = stripes([(i + k) % 6 for k in range(6)], side, side)
        image = np.dstack([colored(label), np.full((side, side), 7, np.uint8)])
        scipy.io.savemat(folder / "imgs" / f"{name}.mat", {"img": image})
        if i < train + val:
            scipy.io.savemat(folder / "gt" / f"{name}.mat", {"gt": label.astype(np.int32)})
    for list_, part in (
        ("labeled_train", names[:train]), ("labeled_test", names[train : train + val]),
        ("unlabeled_train", names[train + val :]), ("all", names),
    ):  # fmt: skip
        (folder / f"{list_}.txt").write_text("".join(f"{name}\n" for name in part))


def potsdam_tile(root: Path, tile: str, side: int = 6000, labeled: bool = True) -> None:
    """One raw tile in root/potsdam; the stripes are the six classes and black, which means nothing."""
    row = stripes([*range(6), 6], 1, side)  # all rows are alike
    image = np.repeat(colored(row, seed=int(tile.replace("_", ""))), side, 0)
    save(root / "potsdam" / "2_Ortho_RGB" / f"top_potsdam_{tile}_RGB.tif", image, compression="tiff_lzw")
    if labeled:
        path = root / "potsdam" / "5_Labels_all" / f"top_potsdam_{tile}_label.tif"
        label = np.repeat(np.array([*COLORS, (0, 0, 0)], np.uint8)[row], side, 0)
        save(path, label, compression="tiff_lzw")
