"""Fits a classifier of codes or features to a few label maps or clicks, see `Run.teach`.

Clusters may not correspond to the segments that a user needs. Head and clusters do not change and remain unsupervised.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from unicodedata import normalize

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from .datasets.classes import Classes, distinct_colors, without_names
from .datasets.images import as_tensor, read_ids
from .datasets.layout import by_name, list_images
from .predict import Scores, resized
from .probes import multinomial_regression
from .utils.errors import StegoError, check_choice, did_you_mean, explained, outdated
from .utils.files import fingerprint
from .utils.notices import notice
from .utils.paths import user_path
from .utils.states import load_state, save_state
from .utils.torch_state import usual_modes

if TYPE_CHECKING:
    from .run import Run

# File name in the run folder.
FILE = "taught.safetensors"
# Values of the arguments `method` and `on`.
METHODS, MAPS = ("logistic", "neighbors"), ("codes", "features")
# Logit of classes without labels.
MIN_LOGIT = -1e4
# Columns of a table of clicks.
CLICK = ("image", "x", "y", "name")
# Label of unlabeled pixels.
UNLABELED = 255
# Number of voting cells and temperature of their cosines for "neighbors".
NEIGHBORS, TEMPERATURE = 30, 0.02
# Rules of "logistic": the maximum number of observations that an image counts for, and the balance of the names, see
# `multinomial_regression`. Chosen on training images of three datasets: book/records/studies/regularization.csv.
RULE_OF_MAPS, RULE_OF_CLICKS = (10, 0.5), (1, 1.0)
# Maximum number of labeled cells, chosen at random.
MAX_CELLS = 40_000


@dataclass(frozen=True)
class Taught:
    """A classifier of codes or features, fitted to a few labels."""

    names: tuple[str, ...]
    method: str
    """"logistic" or "neighbors"."""
    on: str
    """"codes" or "features"."""
    labels: dict[str, int]
    """Number of labeled pixels or clicks of each name."""
    images: dict[str, str]
    """Fingerprint of the pixels of each labeled image -> file name."""
    model: str
    """Fingerprint of head and backbone, see `model_of`."""
    points: Tensor
    """"logistic": weights, float32 (n, C + 1), with the bias in the last column. "neighbors": unit vectors (M, C)."""
    ids: Tensor
    """"neighbors": index into `names` of each point, int64 (M,). "logistic": empty."""

    @property
    def classes(self) -> Classes:
        """Names and colors."""
        return Classes(self.names, tuple(distinct_colors(len(self.names))))

    def scores(self, maps: Tensor) -> Scores:
        """Logits of the names on the grid, (B, n, h, w), for codes or features (B, C, h, w)."""
        points = self.points.to(maps.device)
        if self.method == "logistic":
            return Scores(F.conv2d(maps, points[:, :-1, None, None], points[:, -1]))
        cosines = torch.einsum("bchw,mc->bhwm", F.normalize(maps, dim=1), points)
        nearest = cosines.topk(min(NEIGHBORS, len(points)), dim=-1)
        votes = (nearest.values / TEMPERATURE).softmax(-1)
        names = F.one_hot(self.ids.to(maps.device), len(self.names)).to(maps)[nearest.indices]
        probabilities = torch.einsum("bhwm,bhwmn->bnhw", votes, names)
        return Scores(probabilities.clamp(min=1e-4).log())

    @property
    def about(self) -> dict[str, Any]:
        """Summary for run records."""
        return {"method": self.method, "on": self.on, "images": len(self.images), "labels": self.labels}

    def class_ids(self, classes: Classes) -> tuple[list[int], list[str]]:
        """Channel of each name in `class_scores`, and the names of the channels: classes, then other names."""
        maps = [*classes.names, *(name for name in self.names if name not in classes.names)]
        return [maps.index(name) for name in self.names], maps

    def class_scores(self, maps: Tensor, classes: Classes) -> Scores:
        """`scores` with channels for all classes, in their order, followed by other names."""
        ids, names = self.class_ids(classes)
        grid = self.scores(maps).grid
        logits = grid.new_full((len(grid), len(names), *grid.shape[2:]), MIN_LOGIT)
        logits[:, ids] = grid
        return Scores(logits)


def stored_classifier(run: "Run") -> Taught | None:
    """The classifier in the folder of a run, see `Run.taught`."""
    path = run.folder / FILE
    if not path.exists():
        return None
    state = load_state(path)
    if state["model"] != model_of(run):
        raise outdated(path, "run.teach(...)")
    return Taught(**(state | {"names": tuple(state["names"])}))


def teach_run(run: "Run", images: Any, *arguments: Any) -> Taught | None:
    """Stores the result of `teach` in the folder of a run, see `Run.teach`."""
    run.check_fitted()
    if images is None:
        (run.folder / FILE).unlink(missing_ok=True)
        return None
    taught = teach(run, images, *arguments)
    save_state(run.folder / FILE, vars(taught))
    return taught


@usual_modes()
@torch.no_grad()
def teach(
    run: "Run",
    images: str | Path | Sequence[Any],
    labels: "str | Path | pd.DataFrame | Sequence[Any]",
    method: str = "logistic",
    on: str = "codes",
    names: Sequence[str] | None = None,
    read: Callable[[Any, str], tuple[Tensor, Tensor]] | None = None,
    rule: tuple[float, float] | None = None,
) -> Taught:
    """Fits a classifier to a few labels, see `Run.teach`.

    read: replaces `read_maps`, for example by a function with a cache. rule: replaces `RULE_OF_MAPS` and
    `RULE_OF_CLICKS`.
    """
    check_choice("method", method, METHODS)
    check_choice("on", on, MAPS)
    read = read or partial(read_maps, run)
    if isinstance(labels, str | Path | pd.DataFrame):
        examples, names = _clicks(read, images, labels, on)
        observations, balance = rule or RULE_OF_CLICKS
    else:
        examples, names = _label_maps(run, read, images, labels, on, names)
        observations, balance = rule or RULE_OF_MAPS
    points = torch.cat([example.points for example in examples])
    ids = torch.cat([example.ids for example in examples])
    counts = np.sum([example.counts for example in examples], axis=0).tolist()
    used = ids.unique().tolist()
    if lost := [name for id_, name in enumerate(names) if counts[id_] and id_ not in used]:
        notice(f"{', '.join(lost)} has the most labels in no grid cell and is ignored. Label larger regions.")
    if len(used) < 2:
        raise StegoError("The labels have fewer than two names. Label pixels of at least two.")
    ids = torch.tensor([used.index(id_) if id_ in used else -1 for id_ in range(len(names))])[ids]
    if len(ids) > MAX_CELLS:
        chosen = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))[:MAX_CELLS]
        points, ids = points[chosen], ids[chosen]
    if method == "logistic":
        # Cells of an image are similar, so their weight is limited.
        total = sum(min(observations, len(example.ids)) for example in examples)
        all_points = torch.cat([example.all_points for example in examples])
        weight, bias = multinomial_regression(points, ids, len(used), total / len(points), all_points, balance)
        points, ids = torch.cat([weight, bias[:, None]], 1), ids[:0]
    else:
        points = F.normalize(points, dim=1)
    return Taught(
        names=tuple(names[id_] for id_ in used),
        method=method,
        on=on,
        labels={names[id_]: counts[id_] for id_ in used},
        images={example.fingerprint: example.name for example in examples},
        model=model_of(run),
        points=points,
        ids=ids,
    )


def model_of(run: "Run") -> str:
    """Fingerprint of backbone and head, which determine codes."""
    head = sorted((name, value) for name, value in run.model.state_dict().items() if name.startswith(("head", "feat")))
    return fingerprint(run.backbone.weights_id, *(item for pair in head for item in pair))


class _Example(NamedTuple):
    """The labeled cells of an image: codes (M, C) and int64 ids (M,)."""

    name: str
    fingerprint: str
    points: Tensor
    ids: Tensor
    counts: np.ndarray  # labeled pixels or clicks of each name
    all_points: Tensor  # of all cells, including unlabeled ones


@torch.inference_mode()
def read_maps(run: "Run", image: Any, on: str) -> tuple[Tensor, Tensor]:
    """Reads an image, uint8 (3, H, W), and its codes or features at the working size of `predict`, (1, C, h, w)."""
    pixels = as_tensor(image, run.classes.rules)[0]
    return pixels, run.maps(resized(run, pixels)[None], on)


def _label_maps(
    run: "Run",
    read: Callable[[Any, str], tuple[Tensor, Tensor]],
    images: Any,
    labels: Sequence[Any],
    on: str,
    names: Sequence[str] | None,
) -> tuple[list[_Example], list[str]]:
    """Labeled cells from label maps, by majority of the labeled pixels in a cell."""
    is_folder = isinstance(images, str | Path)
    if is_folder or not 0 < len(images) == len(labels):
        given = f"{images} is a folder" if is_folder else f"There are {len(images)} images and {len(labels)} label maps"
        raise StegoError(f"{given}. Pass a list of images with a label map for each, or clicks as a CSV file.")
    if names is None and without_names(run.classes):
        raise StegoError("The ids of the label maps have no names. Pass names=[...], one for each id.")
    names = list(run.classes.names if names is None else names)
    Classes(tuple(names), tuple(distinct_colors(len(names))))  # checks the names
    examples = []
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        name = Path(image).name if isinstance(image, str | Path) else f"image {number}"
        ids = read_ids(user_path(label)) if isinstance(label, str | Path) else np.asarray(label)
        pixels, maps = read(image, on)
        labeled, size = ids != UNLABELED, tuple(pixels.shape[1:])
        wrong = np.setdiff1d(ids[labeled], np.arange(len(names)))
        if ids.shape != size or ids.dtype.kind not in "iu" or len(wrong):
            stored = f"is {ids.dtype} {ids.shape}{f' with id {wrong[0]}' if len(wrong) else ''}"
            needed = f"integers of shape {size}, 0 to {len(names) - 1} or 255"
            raise StegoError(f"The label map of {name} {stored}. It should be {needed}.")
        height, width = maps.shape[-2:]
        cells, cell_ids = _vote(ids, labeled, (height, width), len(names))
        points = maps[0].flatten(1).T.float().cpu()
        counts = np.bincount(ids[labeled], minlength=len(names))
        examples.append(_Example(name, fingerprint(pixels), points[cells], cell_ids, counts, points))
    return examples, names


def _vote(ids: np.ndarray, labeled: np.ndarray, grid: tuple[int, int], n: int) -> tuple[Tensor, Tensor]:
    """Grid cells with labeled pixels, row-major indices int64 (M,), and their most frequent id."""
    rows, columns = (np.arange(pixels) * cells // pixels for pixels, cells in zip(ids.shape, grid, strict=True))
    cell = rows[:, None] * grid[1] + columns
    votes = np.bincount(cell[labeled] * n + ids[labeled], minlength=grid[0] * grid[1] * n).reshape(-1, n)
    cells = np.flatnonzero(votes.sum(1))
    return torch.from_numpy(cells), torch.from_numpy(votes[cells].argmax(1))


def _clicks(
    read: Callable[[Any, str], tuple[Tensor, Tensor]], images: Any, clicks: Any, on: str
) -> tuple[list[_Example], list[str]]:
    """Labeled points from clicks, with the interpolated code."""
    table = read_clicks(clicks)
    paths = paths_by_name(images)
    names = list(dict.fromkeys(table["name"]))
    Classes(tuple(names), tuple(distinct_colors(len(names))))  # checks the names
    examples = []
    for file, rows in table.groupby("image", sort=False):
        if file not in paths:
            raise StegoError(f"No image is named {file!r}{did_you_mean(str(file), list(paths))}. Correct the clicks.")
        pixels, maps = read(paths[str(file)], on)
        height, width = pixels.shape[1:]
        x, y = rows["x"].to_numpy(float), rows["y"].to_numpy(float)
        if not ((x >= 0) & (x < width) & (y >= 0) & (y < height)).all():
            raise StegoError(f"A click is outside {file}, which has {width} x {height} pixels. Correct the clicks.")
        place = torch.tensor(np.stack([(x + 0.5) / width, (y + 0.5) / height], 1) * 2 - 1, dtype=maps.dtype)
        place = place[None, None].to(maps.device)
        points = F.grid_sample(maps, place, padding_mode="border", align_corners=False)[0, :, 0].T.float().cpu()
        ids = torch.tensor([names.index(name) for name in rows["name"]])
        counts, all_points = np.bincount(ids, minlength=len(names)), maps[0].flatten(1).T.float().cpu()
        examples.append(_Example(str(file), fingerprint(pixels), points, ids, counts, all_points))
    return examples, names


def paths_by_name(images: str | Path | Sequence[Any]) -> dict[str, Path]:
    """File name (Unicode NFC) -> path of images in a folder or list. Raises StegoError for duplicates or no images."""
    listed = list_images(user_path(images)) if isinstance(images, str | Path) else [user_path(path) for path in images]
    return by_name(listed, lambda path: path.name)


def read_clicks(clicks: Any) -> pd.DataFrame:
    """Reads a table of clicks. Raises StegoError if it is invalid."""
    in_memory = isinstance(clicks, pd.DataFrame)
    problem = f"{'The table' if in_memory else clicks} is not a table of clicks"
    remedy = (
        f"Use a CSV file (UTF-8, commas) or a DataFrame with the columns {', '.join(CLICK)} and numbers as x and y."
    )
    with explained((OSError, ValueError, KeyError), problem, remedy):
        # As text, because a name may be "1" or "NA".
        table = clicks if in_memory else pd.read_csv(user_path(clicks), dtype=str, keep_default_na=False)
        table = table[list(CLICK)].astype({"image": str, "x": float, "y": float})
        if not len(table) or table.isna().any(axis=None) or not all(isinstance(name, str) for name in table["name"]):
            raise ValueError("it has no rows, or a value is missing")
    return table.assign(image=table["image"].map(lambda name: normalize("NFC", name)))
