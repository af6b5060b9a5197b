"""A few labels on the codes of a run: `Run.teach`.

Clusters answer a question that nobody asked in their own words. A few label maps or clicks say which segments are
wanted. They fit a classifier of codes; head and clusters stay as they were trained, without labels.
"""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from .datasets.classes import Classes, distinct_colors, without_names
from .datasets.images import as_tensor, read_ids
from .datasets.layout import list_images
from .datasets.transforms import resize_image
from .predict import Scores, working_size
from .probes import multinomial_regression
from .utils.errors import StegoError, brief, check_choice, did_you_mean
from .utils.files import disk_errors, fingerprint, read_text
from .utils.notices import notice
from .utils.paths import user_path
from .utils.states import load_state, save_state

if TYPE_CHECKING:
    from .run import Run

# Name of the file in a run's folder.
FILE = "taught.safetensors"
# What fits the labels, and to what.
METHODS, MAPS = ("logistic", "neighbors"), ("codes", "features")
# Logit of a class that has no label.
NEVER = -1e4
# Columns of a table of clicks.
CLICK = ("image", "x", "y", "name")
# Label of pixels that say nothing.
UNLABELED = 255
# Of "neighbors": labeled cells that vote for a cell, and temperature of their cosines.
NEIGHBORS, TEMPERATURE = 30, 0.02
# Labeled cells that are kept, at most; random ones of more.
MAX_CELLS = 40_000


@dataclass(frozen=True)
class Taught:
    """A classifier of codes or features that a few labels fitted."""

    names: tuple[str, ...]
    method: str
    """"logistic" or "neighbors"."""
    on: str
    """"codes" or "features"."""
    labels: dict[str, int]
    """Labeled pixels or clicks of each name."""
    images: dict[str, str]
    """Fingerprint of the pixels of each labeled image -> its name."""
    model: str
    """Fingerprint of head and backbone, see `model_of`."""
    points: Tensor
    """"logistic": weights, float32 (n, C + 1), the last column is the bias. "neighbors": unit vectors (M, C)."""
    ids: Tensor
    """"neighbors": name of each point, int64 (M,). Empty for "logistic"."""

    @property
    def classes(self) -> Classes:
        """Names and colors."""
        return Classes(self.names, tuple(distinct_colors(len(self.names))))

    def scores(self, maps: Tensor) -> Scores:
        """Logits of the names on the grid, (B, n, h, w), from codes or features (B, C, h, w)."""
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
        """What a run record says of the labels."""
        return {"method": self.method, "on": self.on, "images": len(self.images), "labels": self.labels}

    def class_ids(self, classes: Classes) -> tuple[list[int], list[str]]:
        """Map of each name in `class_scores`, and the names of these maps: the classes, then names of no class."""
        maps = [*classes.names, *(name for name in self.names if name not in classes.names)]
        return [maps.index(name) for name in self.names], maps

    def class_scores(self, maps: Tensor, classes: Classes) -> Scores:
        """`scores` with a map for each of the classes, in their order, and then for each name that is no class."""
        ids, names = self.class_ids(classes)
        grid = self.scores(maps).grid
        of_classes = grid.new_full((len(grid), len(names), *grid.shape[2:]), NEVER)
        of_classes[:, ids] = grid
        return Scores(of_classes)

    def save(self, path: Path) -> None:
        """Writes the classifier atomically."""
        save_state(path, vars(self))

    @classmethod
    def load(cls, path: Path) -> "Taught":
        """Reads what `save` wrote."""
        state = load_state(path)
        return cls(**(state | {"names": tuple(state["names"])}))


def teach(
    run: "Run",
    images: str | Path | Sequence[Any],
    labels: "str | Path | pd.DataFrame | Sequence[Any]",
    method: str = "logistic",
    on: str = "codes",
    names: Sequence[str] | None = None,
    read: Callable[[Any, str], tuple[Tensor, Tensor]] | None = None,
) -> Taught:
    """Fits a classifier of codes to a few labels; see `Run.teach`.

    read: reads the images of clicks in place of `read_maps`; one that keeps its results saves the backbone's time.
    """
    check_choice("method", method, METHODS)
    check_choice("on", on, MAPS)
    if isinstance(labels, str | Path | pd.DataFrame):
        examples, names = _clicks(read or partial(read_maps, run), images, labels, on)
    else:
        examples, names = _label_maps(run, images, labels, on, names)
    points = torch.cat([example.points for example in examples])
    ids = torch.cat([example.ids for example in examples])
    counts = np.sum([example.counts for example in examples], axis=0).tolist()
    used = ids.unique().tolist()
    if lost := [name for id_, name in enumerate(names) if counts[id_] and id_ not in used]:
        notice(
            f"No grid cell has most of its labels from {', '.join(lost)}, so it is left out. Label larger parts of it."
        )
    if len(used) < 2:
        raise StegoError(f"The labels hold {len(used)} names with pixels. Label at least two, so there is a choice.")
    ids = torch.tensor([used.index(id_) if id_ in used else -1 for id_ in range(len(names))])[ids]
    if len(ids) > MAX_CELLS:
        chosen = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))[:MAX_CELLS]
        points, ids = points[chosen], ids[chosen]
    if method == "logistic":
        # Cells of an image resemble each other, so each image counts as one observation, however many cells it has.
        all_points = torch.cat([example.all_points for example in examples])
        weight, bias = multinomial_regression(points, ids, len(used), len(examples) / len(points), all_points, True)
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
    """Fingerprint of what makes the codes of a run: backbone and head."""
    head = sorted((name, value) for name, value in run.model.state_dict().items() if name.startswith(("head", "feat")))
    return fingerprint(run.backbone.weights_id, *(item for pair in head for item in pair))


class _Example(NamedTuple):
    """The labeled cells of an image."""

    name: str
    fingerprint: str
    points: Tensor
    """(M, C)."""
    ids: Tensor
    """int64 (M,)."""
    counts: np.ndarray
    """Labeled pixels or clicks of each name."""
    all_points: Tensor
    """Those of all cells, labeled or not."""


@torch.inference_mode()
def read_maps(run: "Run", image: Any, on: str) -> tuple[Tensor, Tensor]:
    """The image, uint8 (3, H, W), and its codes or features at the working size of `predict`, (1, C, h, w)."""
    experiment, (pixels, _) = run.experiment, as_tensor(image, run.classes.rules)
    size = working_size(pixels.shape[1], pixels.shape[2], experiment.eval_size, run.backbone.patch)
    return pixels, run.maps(resize_image(pixels, size, experiment.official.published)[None], on)


def _label_maps(
    run: "Run", images: Any, labels: Sequence[Any], on: str, names: Sequence[str] | None
) -> tuple[list[_Example], list[str]]:
    """Examples of images with label maps: each grid cell has the id of most of its labeled pixels."""
    images = list(images) if isinstance(images, list | tuple) else [images]
    if len(images) != len(labels):
        raise StegoError(f"There are {len(images)} images and {len(labels)} label maps. Give one for each image.")
    if names is None:
        if without_names(run.classes):
            raise StegoError("The ids of the label maps have no names. Give names=[...], one for each id.")
        names = run.classes.names
    Classes(tuple(names), tuple(distinct_colors(len(names))))  # checks the names
    examples = []
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        name = Path(image).name if isinstance(image, str | Path) else f"image {number}"
        ids = read_ids(user_path(label)) if isinstance(label, str | Path) else np.asarray(label)
        pixels, maps = read_maps(run, image, on)
        if ids.shape != tuple(pixels.shape[1:]) or ids.dtype.kind not in "iu":
            raise StegoError(
                f"The label map of {name} is {ids.dtype} {ids.shape}. It must hold an integer for each pixel of the "
                f"image, {tuple(pixels.shape[1:])}."
            )
        labeled = ids != UNLABELED
        wrong = np.setdiff1d(ids[labeled], np.arange(len(names)))
        if len(wrong):
            raise StegoError(f"The label map of {name} has id {wrong[0]}, and there are {len(names)} names.")
        height, width = maps.shape[-2:]
        cells, cell_ids = _vote(ids, labeled, (height, width), len(names))
        points = maps[0].flatten(1).T.float().cpu()
        counts = np.bincount(ids[labeled], minlength=len(names))
        examples.append(_Example(name, fingerprint(pixels), points[cells], cell_ids, counts, points))
    return examples, list(names)


def _vote(ids: np.ndarray, labeled: np.ndarray, grid: tuple[int, int], n: int) -> tuple[Tensor, Tensor]:
    """Grid cells with labeled pixels, int64 (M,) in row-major order, and the id of most of these pixels."""
    rows, columns = (np.arange(pixels) * cells // pixels for pixels, cells in zip(ids.shape, grid, strict=True))
    cell = rows[:, None] * grid[1] + columns
    votes = np.bincount(cell[labeled] * n + ids[labeled], minlength=grid[0] * grid[1] * n).reshape(-1, n)
    cells = np.flatnonzero(votes.sum(1))
    return torch.from_numpy(cells), torch.from_numpy(votes[cells].argmax(1))


def _clicks(
    read: Callable[[Any, str], tuple[Tensor, Tensor]], images: Any, clicks: Any, on: str
) -> tuple[list[_Example], list[str]]:
    """Examples of clicks, each with the code at its point."""
    table = read_clicks(clicks)
    paths = paths_by_name(images)
    names = list(dict.fromkeys(table["name"]))
    Classes(tuple(names), tuple(distinct_colors(len(names))))  # checks the names
    examples = []
    for file, rows in table.groupby("image", sort=False):
        if file not in paths:
            raise StegoError(f"There is no image {file!r}{did_you_mean(str(file), list(paths))}. Correct the clicks.")
        pixels, maps = read(paths[str(file)], on)
        height, width = pixels.shape[1:]
        x, y = rows["x"].to_numpy(float), rows["y"].to_numpy(float)
        outside = ~((x >= 0) & (x < width) & (y >= 0) & (y < height))
        if outside.any():
            raise StegoError(
                f"A click at ({x[outside][0]:g}, {y[outside][0]:g}) lies outside of {file}, which has {width} x "
                f"{height} pixels. Give x and y in pixels from the top left corner."
            )
        place = torch.tensor(np.stack([(x + 0.5) / width, (y + 0.5) / height], 1) * 2 - 1, dtype=maps.dtype)
        place = place[None, None].to(maps.device)
        points = F.grid_sample(maps, place, padding_mode="border", align_corners=False)[0, :, 0].T.float().cpu()
        ids = torch.tensor([names.index(name) for name in rows["name"]])
        counts, all_points = np.bincount(ids, minlength=len(names)), maps[0].flatten(1).T.float().cpu()
        examples.append(_Example(str(file), fingerprint(pixels), points, ids, counts, all_points))
    return examples, names


def paths_by_name(images: str | Path | Sequence[Any]) -> dict[str, Path]:
    """File name -> path of the images of a folder or a list. Raises StegoError for equal names, and for no image."""
    listed = list_images(user_path(images)) if isinstance(images, str | Path) else [user_path(path) for path in images]
    paths = {path.name: path for path in listed}
    if not paths:
        raise StegoError("The list of images is empty. Name at least one.")
    if len(paths) < len(listed):
        raise StegoError("Two images have the same file name, so clicks do not tell them apart. Rename one.")
    return paths


def read_clicks(clicks: Any) -> pd.DataFrame:
    """The table of clicks. Raises StegoError for another table."""
    if isinstance(clicks, pd.DataFrame):
        table = clicks
    else:
        path = user_path(clicks)
        with disk_errors(path, "Name a CSV file, or give a list of label maps."):
            text = read_text(path)
        try:  # as text: a name may be "1" or "NA"
            table = pd.read_csv(io.StringIO(text), dtype=str, keep_default_na=False)
        except (pd.errors.EmptyDataError, pd.errors.ParserError) as error:
            raise StegoError(f"{path} is not a table of clicks ({brief(error)}). Write a CSV file.") from None
    missing = [column for column in CLICK if column not in table]
    if missing or not len(table):
        raise StegoError(f"The table of clicks has no {', '.join(missing) or 'rows'}. It needs {', '.join(CLICK)}.")
    table = table[list(CLICK)].astype({"image": str})
    numbers = table[["x", "y"]].apply(pd.to_numeric, errors="coerce")
    if numbers.isna().any(axis=None) or not table["name"].map(lambda name: isinstance(name, str)).all():
        raise StegoError("A click has no number in x or y, or no name. Complete the table.")
    return table.assign(**numbers)
