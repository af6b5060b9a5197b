"""Your own images: a folder with imgs/{train,val}, and optionally labels/{train,val} and classes.json."""

from pathlib import Path

from ..utils.errors import check_choice
from ..utils.notices import notice
from .base import SegmentationDataset
from .classes import cluster_classes, read_classes
from .layout import by_name, find_folder, ignored_files, images_in, list_images, pair_by_stem

LAYOUT = (
    "imgs/train/*.jpg and imgs/val/*.jpg (or .png, ...), or only images if you have no labels; for evaluation also "
    "labels/train/*.png and labels/val/*.png (8-bit class ids, 255 = ignored) and classes.json (names of the classes)"
)
# Default number of clusters without labels, classes.json and `n_classes`.
N_CLASSES = 27


def load(name: str, root: Path, split: str, n_classes: int | None = None) -> SegmentationDataset:
    """Opens root/NAME, or root itself, in the layout above.

    Labels require classes.json (see `read_classes`). Without labels and names there are `n_classes` clusters, named
    "cluster 0" and so on. A folder of images without imgs/ uses all images for both splits, with a notice.
    """
    check_choice("split", split, ("train", "val"))
    plain = _plain_folder(root, name)
    if plain:
        folder, images = plain, list_images(plain)
    else:
        ignored = next((ignored_files(path) for path in (root / name, root) if path.is_dir()), "")
        folder = find_folder(root, (name,), (f"imgs/{split}",), LAYOUT, f"your own images, in that layout{ignored}")
        images = list_images(folder / "imgs" / split)
    by_name(images, lambda path: path.stem)  # label maps are found by the stem
    has_maps = not plain and (folder / "labels" / split).is_dir()
    labels: list[Path | None] = pair_by_stem(images, folder / "labels" / split) if has_maps else [None for _ in images]
    # Both splits need the same classes, so labels of one are enough. (`segment_folder` writes to labels/ as well.)
    labeled = not plain and any((folder / "labels" / part).is_dir() for part in ("train", "val"))
    classes = read_classes(folder / "classes.json", None if labeled else cluster_classes(n_classes or N_CLASSES))
    if plain and split == "val":
        notice(f"{plain} has no imgs/train and imgs/val: its {len(images)} images are used for training and validation")
    return SegmentationDataset(name, split, classes, images, labels)


def _plain_folder(root: Path, name: str) -> Path | None:
    """The first of root/NAME and root that directly holds images, if neither has imgs/train or imgs/val."""
    candidates = (root / name, root)
    if any((folder / "imgs" / split).exists() for folder in candidates for split in ("train", "val")):
        return None
    return next((folder for folder in candidates if images_in(folder)), None)
