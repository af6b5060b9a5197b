"""The datasets at a glance: classes, sources, and which splits are available."""

from pathlib import Path
from typing import Any

from ..utils.errors import StegoError
from . import camvid, cityscapes, cocostuff, open_dataset, painter, potsdam
from .classes import Classes
from .scenes import COLORS

LABEL_SPACES: dict[str, Classes] = {
    "scenes": Classes(painter.CLASSES, tuple(COLORS[name] for name in painter.CLASSES)),
    "camvid": camvid.CLASSES,
    "cityscapes": cityscapes.CLASSES,
    **{
        name: Classes(
            tuple(cocostuff.TABLE["names"][i] for i in form.coarse), tuple(cocostuff.COLORS[i] for i in form.coarse)
        )
        for name, form in cocostuff.FORMS.items()
    },
    "potsdam3": potsdam.CLASSES,
}
"""Names and colors of the classes of every dataset that brings its own ("folder" reads yours)."""
SOURCES = {
    "scenes": "nothing: drawn by code",
    "camvid": camvid.SOURCE,
    "cityscapes": cityscapes.SOURCE,
    **{name: cocostuff.SOURCE.replace("NAME", name) for name in cocostuff.FORMS},
    "potsdam3": potsdam.SOURCE,
    "folder": "your own images",
}
"""Where the files of each dataset come from."""

KINDS = {
    "scenes": "synthetic scenes, drawn by code",
    "camvid": "real street images, filmed from a car",
    "cityscapes": "real street images",
    **dict.fromkeys(cocostuff.FORMS, "real photographs"),
    "potsdam3": "real aerial images",
    "folder": "your own images",
}
"""What the images of each dataset are."""


def introduction(name: str, root: str | Path, backbone: str, split: str = "val") -> str:
    """One line for the top of a page: which images it shows, how many there are, and the backbone.

    Raises DataNotFound where the dataset is missing.
    """
    counts = [
        f"{len(open_dataset(name, root, one)):,} {word}"
        for one, word in (("train", "for training"), (split, f"in {split}"))
    ]
    other = (
        "" if name != "scenes" else " With CamVid at hand, `-p dataset camvid -p data_root FOLDER` shows real streets."
    )
    weights = Path(backbone).stem if Path(backbone).suffix else backbone
    return f"**This page shows `{name}`**: {KINDS[name]}, {' and '.join(counts)}. Backbone: `{weights}`.{other}"


def overview(root: str | Path) -> list[dict[str, Any]]:
    """One row per dataset: name, classes, and how many images each split has below `root`, or that it is not there."""
    rows = []
    for name, source in SOURCES.items():
        row: dict[str, Any] = {
            "dataset": name,
            "classes": len(LABEL_SPACES[name]) if name in LABEL_SPACES else "yours",
        }
        for split in ("train", "val"):
            try:
                row[split] = f"{len(open_dataset(name, root, split)):,}"
            except StegoError:
                row[split] = "not here"
        rows.append(row | {"source": source})
    return rows
