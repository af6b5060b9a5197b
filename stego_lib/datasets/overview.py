"""The datasets at a glance: classes, sources, and which splits are available."""

from pathlib import Path
from typing import Any

from ..runtime.errors import StegoError
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
