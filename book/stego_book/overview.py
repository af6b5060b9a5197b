"""Overview of the datasets: classes, sources and available splits."""

from pathlib import Path
from typing import Any

from stego_lib import StegoError
from stego_lib.datasets import Classes, camvid, cityscapes, cocostuff, labelmefacade, open_dataset, painter, potsdam
from stego_lib.datasets.scenes import COLORS

# Dataset -> names and colors of its classes; "folder" has none.
LABEL_SPACES: dict[str, Classes] = {
    "scenes": Classes(painter.CLASSES, tuple(COLORS[name] for name in painter.CLASSES)),
    "camvid": camvid.CLASSES,
    "cityscapes": cityscapes.CLASSES,
    **cocostuff.CLASSES,
    "potsdam3": potsdam.CLASSES,
    "labelmefacade": labelmefacade.CLASSES,
}
# Dataset -> kind of images, source.
KINDS = {
    "scenes": ("synthetic scenes, drawn by code", "nothing: drawn by code"),
    "camvid": ("real street images, filmed from a car", camvid.SOURCE),
    "cityscapes": ("real street images", cityscapes.SOURCE),
    **{name: ("real photographs", cocostuff.SOURCE.replace("NAME", name)) for name in cocostuff.CLASSES},
    "potsdam3": ("real aerial images", potsdam.SOURCE),
    "labelmefacade": ("real street photographs of many places", labelmefacade.SOURCE),
    "folder": ("your own images", "your own images"),
}
SOURCES = {name: source for name, (_, source) in KINDS.items()}


def introduction(name: str, root: str | Path, backbone: str, split: str = "val") -> str:
    """One line for the top of a page: dataset, number of images and backbone."""
    train, other = len(open_dataset(name, root, "train")), len(open_dataset(name, root, split))
    hint = " For CamVid's street images, use `-p dataset camvid -p data_root FOLDER`." if name == "scenes" else ""
    weights = Path(backbone).stem if Path(backbone).suffix else backbone
    counts = f"{train:,} for training and {other:,} in {split}"
    return f"**This page shows `{name}`**: {KINDS[name][0]}, {counts}. Backbone: `{weights}`.{hint}"


def overview(root: str | Path) -> list[dict[str, Any]]:
    """One row per dataset: name, number of classes, number of images per split in `root`, and source."""
    return [
        {
            "dataset": name,
            "classes": len(LABEL_SPACES[name]) if name in LABEL_SPACES else "yours",
            "train": _count(name, root, "train"),
            "val": _count(name, root, "val"),
            "source": source,
        }
        for name, source in SOURCES.items()
    ]


def _count(name: str, root: str | Path, split: str) -> str:
    try:
        return f"{len(open_dataset(name, root, split)):,}"
    except StegoError:
        return "not here"
