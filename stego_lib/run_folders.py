"""Where runs lie: a new folder for one, and the runs that are there."""

import re
from datetime import datetime
from pathlib import Path

from .backbone import Backbone
from .datasets import SegmentationDataset
from .errors import StegoError
from .experiment import HOW, SCORING, Experiment
from .extraction import content_id
from .files import explained, read_json
from .notices import notice
from .paths import runs_root, user_path
from .run import read_checkpoint


def new_folder(runs_dir: Path, experiment: Experiment) -> Path:
    """Makes a folder named by time and experiment; of two processes that ask at once each gets its own."""
    stem, again = f"{datetime.now():%Y%m%d-%H%M%S}-{experiment.name}", 1
    while True:
        folder = runs_dir / (stem if again == 1 else f"{stem}-{again}")
        try:
            with explained(folder.parent):
                folder.parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir()
            return folder
        except FileExistsError:
            again += 1


def find_run(
    runs_dir: Path, experiment: Experiment, backbone: Backbone, data: dict[str, str], *, tell: bool = True
) -> Path | None:
    """The newest run of this experiment, on these images and weights of the backbone, that has a checkpoint, or None.

    How and where a run computes and how it is scored (`HOW`, `SCORING`) may differ, and so may the places of data and weights:
    `data` are the fingerprints of the training split, see `data_ids`. A run that would be the one but for its data or its
    weights is passed over with a notice; if none is found, a notice says what the nearest differs in. `tell=False` says nothing.
    """
    say = notice if tell else _nothing
    nearest: tuple[list[str], Path] | None = None
    told = False
    for path in sorted(runs_dir.glob("*/experiment.json"), key=lambda path: _natural(path.parent.name), reverse=True):
        try:
            theirs = Experiment.from_dict(read_json(path))
        except (StegoError, TypeError) as error:
            say(f"{path} is passed over: {error}")
            continue
        if not (path.parent / "checkpoint.pt").exists():
            continue
        differing = theirs.differing(experiment, (*HOW, *SCORING, "data_root"))
        state = read_checkpoint(path.parent) if set(differing) <= {"backbone"} else {}
        if differing and (not state or state.get("backbone_weights") != backbone.weights_id):
            if "seed" not in differing and (nearest is None or len(differing) < len(nearest[0])):
                nearest = differing, path
        elif state.get("backbone_weights") not in (None, backbone.weights_id):
            told = True
            say(f"{path.parent} is passed over: it was trained on other weights of {experiment.backbone}")
        elif changed := _changed(state.get("data"), data, theirs.data_root, experiment.data_root):
            told = True
            say(f"{path.parent} is passed over: {changed}")
        else:
            return path.parent
    if nearest is not None and not told and len(nearest[0]) <= TOLD:
        old = Experiment.from_dict(read_json(nearest[1]))
        changes = ", ".join(f"{name} {getattr(old, name)}, now {getattr(experiment, name)}" for name in nearest[0])
        say(f"there is no run of exactly this experiment in {runs_dir}; the nearest, {nearest[1].parent.name}, has {changes}")
    return None


def _nothing(text: str) -> None:
    """Says nothing."""


TOLD = 3
"""Differences up to which another run is near enough to be told."""


def data_ids(dataset: SegmentationDataset, runs_dir: Path) -> dict[str, str]:
    """Fingerprints of a split's images, and of images and label maps: what a run remembers of the data it was trained on."""
    root = runs_dir / "features"
    return {"images": content_id(dataset, root, labels=False), "all": content_id(dataset, root)}


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts 'a-10' behind 'a-2'."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _changed(before: dict[str, str] | None, now: dict[str, str], old_root: str, root: str) -> str | None:
    """What differs in the data that a run was trained on, or None."""
    if before is None:  # a checkpoint of version 0.1.0 does not tell
        same = user_path(old_root).resolve() == user_path(root).resolve()
        return None if same else f"it was trained on data in {old_root}, and does not tell which files these were"
    if before["images"] != now["images"]:
        return f"its training images were others (then in {old_root}, now in {root})"
    return None if before["all"] == now["all"] else "the label maps of its training images have changed since"


def newest_run(runs_dir: str | Path | None = None) -> Path:
    """The run folder made last; StegoError if there is none with a checkpoint."""
    runs_dir = user_path(runs_dir, runs_root())
    found = sorted(runs_dir.glob("*/checkpoint.pt"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise StegoError(f"{runs_dir} holds no run; train one first (make train), or name a run folder")
    return found[-1].parent
