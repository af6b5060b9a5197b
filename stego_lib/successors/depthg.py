"""DepthG (Sick et al., CVPR 2024): STEGO's loss with a depth term, at points spread over the depth's point cloud.

Pure functions of tensors and numbers. Depth is a constant map of each training image, from any monocular estimator; prediction
needs none. Three defects of the released code are behind `published`: its depth correspondence holds no depth, depth is read at
other points than codes, and the points are read transposed.

Shapes: depth (B, 1, H, W) in [0, 1], larger is farther; codes (B, K, h, w); points on the grid of the codes, (B, S, S, 2) as
(x, y) in [-1, 1]. The weight and the shift of the depth term fall during published training: both are multiplied by the same
factor (0.6 to 1) every 200 to 400 steps.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..batches import Draw, draw_batch
from ..calibration import percentile
from ..datasets import SegmentationDataset, open_training_set
from ..datasets.crops import COUNT, Crops
from ..datasets.images import BROKEN, FORMATS
from ..datasets.transforms import resize_image
from ..experiment import Experiment
from ..features import Features
from ..loss import correspondence, pair_loss, sample, stego_loss
from ..run import Run
from ..utils.errors import StegoError
from ..utils.files import fingerprint
from ..utils.progress import progress
from .base import Successor

WEIGHT, SHIFT = 0.19, 0.03
"""l and b of the depth term: CocoStuff, ViT-S/8 (published settings). That b was chosen for a correspondence of 1 everywhere."""
FIELD_OF_VIEW = 90.0
"""Of the pinhole camera that turns depth into points, in degrees, across the longer side (published code)."""
STRETCH = 5.0
"""Of the points along the camera's axis (published code)."""


def depth_correspondence(depth1: Tensor, depth2: Tensor, *, published: bool = False) -> Tensor:
    """Closeness in depth of every position with every other, 1 - abs(d - d'): 1 at equal depth, 0 from nearest to farthest.

    The paper asks for features that agree where depths do (abstract); the formula is ours, for we had no more of it.

    Parameters
    ----------
    depth1, depth2
        (B, 1, h, w) and (B, 1, i, j) in [0, 1].
    published
        The cosine of the released code. Over the one channel of depth it is 1 wherever neither depth is 0, else 0.

    Returns
    -------
    Tensor
        (B, h, w, i, j), in [0, 1].

    Examples
    --------
    >>> depth = torch.tensor([0.1, 0.3, 0.9]).view(1, 1, 1, 3)
    >>> depth_correspondence(depth, depth)[0, 0, 0, 0]
    tensor([1.0000, 0.8000, 0.2000])
    >>> depth_correspondence(depth, depth, published=True)[0, 0, 0, 0]
    tensor([1., 1., 1.])
    """
    if published:
        return correspondence(depth1, depth2)
    return 1 - (depth1[:, 0, :, :, None, None] - depth2[:, 0, None, None]).abs()


def sampled_depth(depth: Tensor, coords: Tensor, size: tuple[int, int], *, published: bool = False) -> Tensor:
    """Depth at the points, (B, 1, S, S), in the layout of `stego_lib.loss.sample`.

    Parameters
    ----------
    depth
        (B, 1, H, W).
    coords
        (B, S, S, 2).
    size
        (h, w) of the codes. Depth is averaged in their patches first, so that both are read at the same places.
    published
        Depth resized to S x S wherever the points are, as in the released code.
    """
    if published:
        return F.interpolate(depth, coords.shape[1:3], mode="bilinear", align_corners=True)
    return sample(F.adaptive_avg_pool2d(depth, size), coords)


def depth_loss(depth: Tensor, code: Tensor, coords: Tensor, shift: float, *, published: bool = False) -> Tensor:
    """-(D - shift) * max(S, 0) for every pair of points of an image, not yet averaged (paper, section 3).

    Codes of points at similar depth attract, others repel. No gradient flows into depth.

    Parameters
    ----------
    depth
        (B, 1, H, W), in [0, 1].
    code
        (B, K, h, w).
    coords
        Points, (B, S, S, 2).
    shift
        b: above it depths attract.
    published
        As in `depth_correspondence` and `sampled_depth`: the term is then the same for any depth without zeros.

    Returns
    -------
    Tensor
        (B, S, S, S, S).
    """
    with torch.no_grad():
        depths = sampled_depth(depth, coords, code.shape[-2:], published=published)
        closeness = depth_correspondence(depths, depths, published=published)
    codes = sample(code, coords)
    return pair_loss(closeness, correspondence(codes, codes), shift, centering=False)


def depthg_loss(
    feats: Tensor,
    feats_knn: Tensor,
    code: Tensor,
    code_knn: Tensor,
    depth: Tensor,
    coords1: Tensor,
    coords2: Tensor,
    permutations: Tensor,
    weights: tuple[float, float, float, float],
    shifts: tuple[float, float, float, float],
    *,
    published: bool = False,
    **switches: bool,
) -> tuple[Tensor, dict[str, Tensor]]:
    """STEGO's three parts and the depth term.

    Parameters
    ----------
    depth
        Of the images, (B, 1, H, W), in [0, 1].
    coords1, coords2
        Points in the images and in their partners, (B, S, S, 2), from `depth_coords` of their depths.
    weights, shifts
        l and b of self, kNN and random pairs and of depth.
    published
        As in `depth_loss`.
    feats, feats_knn, code, code_knn, permutations, switches
        As in `stego_lib.loss.stego_loss`.

    Returns
    -------
    tuple
        The weighted sum, and the parts of `stego_loss` with "loss_depth".
    """
    total, parts = stego_loss(
        feats, feats_knn, code, code_knn, coords1, coords2, permutations, weights[:3], shifts[:3], **switches
    )
    loss = depth_loss(depth, code, coords1, shifts[3], published=published).mean()
    return total + weights[3] * loss, parts | {"loss_depth": loss.detach()}


def point_cloud(depth: Tensor, *, published: bool = False) -> Tensor:
    """Points in space of a depth map, row by row: (B, 1, h, w) -> (B, h * w, 3) as (right, down, towards the camera).

    published: 90 degrees taken as radians, and the top left corner of a patch in place of its center.
    """
    height, width = depth.shape[-2:]
    across = 2 * math.tan((FIELD_OF_VIEW if published else math.radians(FIELD_OF_VIEW)) / 2)
    rows, columns = (torch.arange(side, device=depth.device) - side / 2 for side in (height, width))
    center, longer = 0.0 if published else 0.5, max(height, width)
    distance = depth[:, 0]
    down = across * distance * (rows[:, None] + center) / longer
    right = across * distance * (columns + center) / longer
    return torch.stack([right, down, -STRETCH * distance], -1).flatten(1, 2)


def farthest_points(points: Tensor, count: int) -> Tensor:
    """Farthest-point sampling: the first point, then always the one farthest from those chosen (the first of equals).

    Parameters
    ----------
    points
        (B, N, D).
    count
        How many are chosen, each at most once.

    Returns
    -------
    Tensor
        Indices in the order of choice, int64 (B, count).

    Raises
    ------
    StegoError
        There are fewer points than asked for.
    """
    if count > points.shape[1]:
        raise StegoError(
            f"{count} different points cannot be chosen among the {points.shape[1]} patches of an image: "
            "take fewer points or larger images"
        )
    chosen = points.new_zeros((len(points), count), dtype=torch.long)
    nearest = points.new_full(points.shape[:2], torch.inf)
    images = torch.arange(len(points), device=points.device)
    for number in range(1, count):
        last = chosen[:, number - 1]
        nearest = nearest.minimum((points - points[images, last][:, None]).square().sum(2))
        nearest[images, last] = -1.0  # points may coincide; none is taken twice
        chosen[:, number] = nearest.argmax(1)
    return chosen


def depth_coords(depth: Tensor, size: tuple[int, int], points: int, *, published: bool = False) -> Tensor:
    """S x S points of each image, spread over the point cloud of its depth (paper, section 3).

    Parameters
    ----------
    depth
        (B, 1, H, W).
    size
        (h, w) of the codes; every point is the center of one of their patches.
    points
        S.
    published
        As in `point_cloud`; and coordinates are written as (y, x), which `stego_lib.loss.sample` reads as (x, y), and scaled
        so that the last row and the last column are never reached.

    Returns
    -------
    Tensor
        (B, S, S, 2), in [-1, 1].

    Raises
    ------
    StegoError
        There are fewer than S * S patches.

    Examples
    --------
    >>> depth_coords(torch.rand(2, 1, 224, 224), (28, 28), 11).shape
    torch.Size([2, 11, 11, 2])
    """
    height, width = size
    chosen = farthest_points(point_cloud(F.adaptive_avg_pool2d(depth, size), published=published), points**2)
    chosen = chosen.sort(1).values if published else chosen
    rows, columns = chosen // width, chosen % width
    if published:
        coords = torch.stack([rows / height, columns / width], -1)
    else:
        coords = torch.stack([columns / max(width - 1, 1), rows / max(height - 1, 1)], -1)
    return (coords * 2 - 1).unflatten(1, (points, points))


# ---------------------------------------------------------------------------------------------- training

FADE, EVERY = 0.8, 300
"""Factor of the depth term's weight every so many steps, and of its published shift; published are 0.6 to 1, every 200 to 400
steps. A shift that was measured stays: without it the term would come to attract alone."""
AUTO = 75.0
"""Percentile of the depth correspondences that is the depth term's shift where the run's shifts are "auto", as for self pairs."""


class Trainer(Successor):
    """Trains the head by STEGO's loss and the depth term, at farthest points.

    Needs a depth map of each training image, see `read_depth`. The depth term has its published weight; its shift is published
    too, or a percentile of the depth correspondences where the run's shifts are "auto".
    """

    unused = ()

    @classmethod
    def refuse(cls, experiment: Experiment) -> None:
        super().refuse(experiment)
        dataset = open_training_set(experiment)
        for index in range(len(dataset)):
            _depth_file(dataset, index)

    def __init__(self, run: Run, features: Features, neighbors: Tensor):
        super().__init__(run, features, neighbors)
        dataset, size = open_training_set(self.experiment), features.shape[2:]
        like = (self.experiment.train_size, self.experiment.official.published)  # as the images are resized
        maps = [
            F.adaptive_avg_pool2d(resize_image(read_depth(dataset, i), *like).float() / 255, size)
            for i in progress(range(len(dataset)), "reading depth")
        ]
        self.depth = torch.stack(maps).to(self.device)
        self.shift = SHIFT

    def columns(self) -> list[str]:
        return [*super().columns(), "loss_depth"]

    def begin(self) -> dict[str, Any]:
        found = super().begin()
        if self.experiment.shifts == "auto":
            some = F.adaptive_avg_pool2d(self.depth[:: max(1, len(self.depth) // 64)], 8)
            self.shift = percentile(depth_correspondence(some, some).flatten().cpu(), AUTO)
        return found | {"depth_shift": self.shift}

    def step(self, number: int) -> dict[str, float]:
        experiment, model, draw = self.experiment, self.model, Draw(self.neighbors, self.experiment, number)
        batch = draw_batch(self.features, self.neighbors, model, experiment, number, self.run.backbone)
        size, fade = batch.feats.shape[2:], FADE ** (number // EVERY)
        shift = self.shift if experiment.shifts == "auto" else fade * self.shift
        coords1, coords2 = (
            depth_coords(self.depth[rows], size, experiment.points, published=experiment.official.published)
            for rows in (draw.rows, draw.partners)
        )
        model.train()
        loss, parts = depthg_loss(
            batch.feats, batch.feats_knn, model.head(batch.feats), model.head(batch.feats_knn), self.depth[draw.rows],
            coords1, coords2, batch.permutations, (*experiment.weights, fade * WEIGHT),
            (*self.run.shifts, shift), published=experiment.official.published,
            centering=experiment.centering, zero_clamp=experiment.official.zero_clamp, stabilize=experiment.official.stabilize,
        )  # fmt: skip
        return self.update(loss, parts)

    def state(self) -> dict[str, Any]:
        return {"depth_shift": self.shift, "depth": fingerprint(self.depth.cpu())}

    def restore(self, state: dict[str, Any]) -> None:
        if state["depth"] != fingerprint(self.depth.cpu()):
            raise StegoError(
                f"{self.run.folder} was begun with other depth maps; put them back, or train without resume"
            )
        self.shift = state["depth_shift"]


def read_depth(dataset: SegmentationDataset, index: int) -> Tensor:
    """Depth map of training image `index`, uint8 (1, H, W), from 0 (the smallest value of its image) to 255.

    The file is DATASET/depth/SPLIT/NAME.png, in the dataset's folder and called like the image: one gray value a pixel, of 8 or
    16 bits, larger is farther. It is cut as the image is. `scenes` comes with them.

    Raises StegoError for a map that is missing or broken, is no gray image, or is of another size than its image.
    """
    whole, number = _whole(dataset, index)
    image, file = whole.images[number], _depth_file(dataset, index)
    try:
        with Image.open(file, formats=FORMATS) as stored:
            kind, values = stored.mode, np.asarray(stored)
    except BROKEN as error:
        raise StegoError(f"depth map {file} cannot be read ({error}); replace the file") from error
    if values.ndim != 2 or values.dtype.kind not in "buif" or kind == "P":  # numbers of a palette are no depth
        held = "colors of a palette" if kind == "P" else f"shape {values.shape}"
        raise StegoError(f"depth map {file} has {held}; it must hold one gray value per pixel (PNG of 8 or 16 bits)")
    size = whole.read(number).rgb.size[::-1]
    if values.shape != size:
        raise StegoError(
            f"depth map {file} is {values.shape}, its image {image} is {size} (height, width); they must agree"
        )
    values = values.astype(np.float64)
    spread = max(float(np.ptp(values)), 1e-12)
    depth = torch.from_numpy(np.round(255 * (values - values.min()) / spread).astype(np.uint8))[None]
    return dataset.cut_like(depth, index) if isinstance(dataset, Crops) else depth


def _whole(dataset: SegmentationDataset, index: int) -> tuple[SegmentationDataset, int]:
    """The dataset of whole images, and the number of the image that image `index` is or was cut from."""
    return (dataset.whole, index // COUNT) if isinstance(dataset, Crops) else (dataset, index)


def _depth_file(dataset: SegmentationDataset, index: int) -> Path:
    """The depth map's file: in `depth` beside any of the folders that the image is in. StegoError where there is none."""
    whole, number = _whole(dataset, index)
    image = whole.images[number]
    name = Path("depth", whole.split, f"{image.stem}.png")
    found = next((file for folder in image.parents[:4] if (file := folder / name).is_file()), None)
    if found is None:
        drawn = "; scenes drawn by an earlier version lack them: remove the folder, and it is drawn anew"
        raise StegoError(
            f"method='depthg' needs a depth map of each training image: {image} has no {name} in the folder of {whole.name}"
            f"{drawn if whole.name == 'scenes' else '; write it there with a monocular depth estimator, see data/README.md'}"
        )
    return found
