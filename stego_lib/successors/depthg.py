"""STEGO's loss with a depth term (after DepthG; Sick et al., CVPR 2024), at points sampled by depth.

The formula of the depth correspondence is ours. Each training image has a depth map from any monocular estimator;
prediction needs none. `published` selects three defects of the released code (leonsick/depthg, commit c284180): its
depth correspondence does not depend on depth, depth is sampled at other points than codes, and points are transposed.

Shapes: depth (B, 1, H, W) in [0, 1], larger is farther, NaN if missing; codes (B, K, h, w); points (B, S, S, 2) as
(x, y) in [-1, 1].
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.ndimage import distance_transform_edt
from torch import Tensor

from ..batches import Draw, draw_batch
from ..calibration import percentile
from ..datasets import open_training_set
from ..datasets.base import SegmentationDataset
from ..datasets.crops import Crops
from ..datasets.images import naming
from ..datasets.transforms import resize_image
from ..experiment import Experiment
from ..features import Features
from ..loss import correspondence, pair_loss, sample, stego_loss
from ..run import Run
from ..utils.errors import StegoError
from ..utils.files import read_json
from ..utils.notices import notice
from ..utils.progress import progress
from .base import Successor

# Weight and shift of the depth term: CocoStuff, ViT-S/8 (released settings, for a correspondence of 1 everywhere).
WEIGHT, SHIFT = 0.19, 0.03
# Factor of the weight and of the published shift after each FADE_EVERY steps (released: 0.6 to 1, every 200 to 400).
FADE, FADE_EVERY = 0.8, 300
# Percentile of the depth correspondences that is the shift for shifts="auto"; it does not fade.
AUTO_PERCENTILE = 75.0
# Field of view of the camera in degrees, across the longer side, and stretch of depth in the point cloud.
FIELD_OF_VIEW, STRETCH = 90.0, 5.0
# Values of missing pixels in 16-bit maps.
INVALID = (0, 65535)
# Number of depth maps that are checked, and the share of inverted ones for a notice.
CHECKED, MOSTLY = 50, 0.7


def depth_correspondence(depth1: Tensor, depth2: Tensor, *, published: bool = False) -> Tensor:
    """Similarity in depth of all pairs of positions, 1 - abs(d - d'), in [0, 1] (ours).

    (B, 1, h, w), (B, 1, i, j) -> (B, h, w, i, j). published: the cosine over one channel, 1 for all positive depths.

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


def depth_loss(depth: Tensor, code: Tensor, coords: Tensor, shift: float, *, published: bool = False) -> Tensor:
    """-(D - shift) * max(S, 0) for all pairs of points of an image (paper, section 3): (B, S, S, S, S).

    Codes (B, K, h, w) at points (B, S, S, 2) of similar depth (B, 1, H, W) attract, others repel. Depth is averaged in
    the patches of the codes and sampled at the same points. Pairs with missing depth count 0. published: depth resized
    to S x S regardless of the points, and the published `depth_correspondence`.
    """
    known, depth, (height, width) = (~depth.isnan()).float(), filled(depth), code.shape[-2:]
    if published:
        depths = F.interpolate(depth, coords.shape[1:3], mode="bilinear", align_corners=True)
    else:
        depths = sample(F.adaptive_avg_pool2d(depth, (height, width)), coords)
    codes = sample(code, coords)
    depth_pairs = depth_correspondence(depths, depths, published=published)
    measured = sample(F.adaptive_avg_pool2d(known, (height, width)), coords)[:, 0] > 0.5
    pairs = measured[:, :, :, None, None] & measured[:, None, None]
    return pair_loss(depth_pairs, correspondence(codes, codes), shift, centering=False) * pairs


def filled(depth: Tensor) -> Tensor:
    """Replaces missing depth (B, 1, H, W) by the mean of the image, or by 0.5 if all is missing."""
    mean = depth.nanmean((1, 2, 3), keepdim=True).nan_to_num(0.5)
    return torch.where(depth.isnan(), mean, depth)


def point_cloud(depth: Tensor, *, published: bool = False) -> Tensor:
    """Points in space of a depth map: (B, 1, h, w) -> (B, h w, 3) as (right, down, towards the camera).

    published: 90 degrees read as radians, and the top left corner of a patch instead of its center.
    """
    height, width = depth.shape[-2:]
    across = 2 * math.tan((FIELD_OF_VIEW if published else math.radians(FIELD_OF_VIEW)) / 2)
    rows, columns = (torch.arange(side, device=depth.device) - side / 2 for side in (height, width))
    center, longer, distance = 0.0 if published else 0.5, max(height, width), depth[:, 0]
    down = across * distance * (rows[:, None] + center) / longer
    right = across * distance * (columns + center) / longer
    return torch.stack([right, down, -STRETCH * distance], -1).flatten(1, 2)


def farthest_points(points: Tensor, count: int) -> Tensor:
    """Farthest-point sampling from the first point on: (B, N, D) -> distinct indices, int64 (B, count).

    Raises StegoError if there are fewer points.
    """
    if count > points.shape[1]:
        raise StegoError(
            f"an image has {points.shape[1]} patches, fewer than the {count} different points of method='depthg'. "
            "Lower points or increase train_size."
        )
    chosen = points.new_zeros((len(points), count), dtype=torch.long)
    nearest = points.new_full(points.shape[:2], torch.inf)
    images = torch.arange(len(points), device=points.device)
    for number in range(1, count):
        last = chosen[:, number - 1]
        nearest = nearest.minimum((points - points[images, last][:, None]).square().sum(2))
        nearest[images, last] = -1.0  # points may coincide, but indices are distinct
        chosen[:, number] = nearest.argmax(1)
    return chosen


def depth_coords(depth: Tensor, size: tuple[int, int], points: int, *, published: bool = False) -> Tensor:
    """S x S patch centers of each image, by farthest-point sampling in space (paper, section 3): (B, S, S, 2).

    depth: (B, 1, H, W); size: (h, w) of the codes; points: S. published: as in `point_cloud`; coordinates are (y, x),
    which `loss.sample` reads as (x, y), and never reach the last row or column.

    Examples
    --------
    >>> depth_coords(torch.rand(2, 1, 224, 224), (28, 28), 11).shape
    torch.Size([2, 11, 11, 2])
    """
    height, width = size
    chosen = farthest_points(point_cloud(F.adaptive_avg_pool2d(depth, size), published=published), points**2)
    if published:
        chosen = chosen.sort(1).values
        coords = torch.stack([chosen // width / height, chosen % width / width], -1)
    else:
        coords = torch.stack([chosen % width / max(width - 1, 1), chosen // width / max(height - 1, 1)], -1)
    return (coords * 2 - 1).unflatten(1, (points, points))


class Trainer(Successor):
    """Trains the head by STEGO's loss and the depth term, at farthest points. Needs depth maps, see `read_depth`."""

    stored = ("depth_shift",)
    logged = ("loss_self", "loss_knn", "loss_rand", "code_self", "code_knn", "code_rand", "loss_depth")

    @classmethod
    def check(cls, experiment: Experiment) -> None:
        super().check(experiment)
        dataset = open_training_set(experiment)
        for index in range(len(dataset)):
            depth_file(dataset, index)

    def __init__(self, run: Run, features: Features, neighbors: Tensor):
        super().__init__(run, features, neighbors)
        dataset, size = open_training_set(self.experiment), self.experiment.train_size
        published = self.experiment.official.published
        check_depth(dataset)
        maps = []
        for index in progress(range(len(dataset)), "reading depth maps"):
            stored = resize_image(read_depth(dataset, index), size, published).float() / 255
            depth, measured = F.adaptive_avg_pool2d(stored, features.shape[2:])
            maps.append(depth.masked_fill(measured < 0.5, torch.nan)[None])
        self.depth = torch.stack(maps).to(self.device)
        self.depth_shift = SHIFT

    def begin(self) -> dict[str, Any]:
        shifts = super().begin()
        if self.experiment.shifts == "auto":
            maps = F.adaptive_avg_pool2d(filled(self.depth[:: max(1, len(self.depth) // 64)]), 8)
            self.depth_shift = percentile(depth_correspondence(maps, maps).flatten().cpu(), AUTO_PERCENTILE)
        return shifts | {"depth_shift": self.depth_shift}

    def step(self, number: int) -> dict[str, float]:
        experiment, model, published = self.experiment, self.model, self.experiment.official.published
        draw = Draw(self.neighbors, experiment, number)
        batch = draw_batch(self.features, self.neighbors, model, experiment, number, self.run.backbone)
        height, width = batch.feats.shape[2:]
        coords1, coords2 = (
            depth_coords(filled(self.depth[rows]), (height, width), experiment.points, published=published)
            for rows in (draw.rows, draw.partners)
        )
        model.train()
        code, code_knn = model.head(batch.feats), model.head(batch.feats_knn)
        loss, parts = stego_loss(
            batch.feats, batch.feats_knn, code, code_knn, coords1, coords2, batch.permutations,
            experiment.weights, self.run.shifts, centering=experiment.centering,
            zero_clamp=experiment.official.zero_clamp, stabilize=experiment.official.stabilize,
        )  # fmt: skip
        fade = FADE ** (number // FADE_EVERY)
        shift = self.depth_shift if experiment.shifts == "auto" else fade * self.depth_shift
        term = depth_loss(self.depth[draw.rows], code, coords1, shift, published=published).mean()
        return self.update(loss + fade * WEIGHT * term, parts | {"loss_depth": term.detach()})


def read_depth(dataset: SegmentationDataset, index: int) -> Tensor:
    """Reads the depth map of training image `index`, uint8 (2, H, W): depth, and 255 where it is valid.

    Depth ranges from 0, the nearest point of the image, to 255, the farthest; missing pixels take that of the nearest
    valid pixel. The map is cropped like the image.

    The file DATASET/depth/SPLIT/NAME.png has one gray value per pixel, 8 or 16 bits, and the size of the image NAME.
    Larger values are farther; 0 and 65535 in 16 bits are missing. DATASET/depth/depth.json changes this:
    {"inverse": true, "invalid": [0]}, where inverse means that larger values are nearer, as in MiDaS and Depth
    Anything. `scenes` includes depth maps. Raises StegoError for a missing or invalid map.
    """
    values, measured = _stored_depth(dataset, index)
    low, high = values[measured].min(), values[measured].max()
    scaled = np.round(255 * ((values - low) / max(high - low, 1e-12)).clip(0, 1))
    nearest = distance_transform_edt(~measured, return_distances=False, return_indices=True)
    depth = torch.from_numpy(np.stack([scaled[tuple(nearest)], 255 * measured]).astype(np.uint8))
    return dataset.cut_like(depth, index) if isinstance(dataset, Crops) else depth


def _stored_depth(dataset: SegmentationDataset, index: int) -> tuple[np.ndarray, np.ndarray]:
    """Values of the whole depth map of an image, larger is farther, float64 (H, W), and where they are valid."""
    whole, number = _whole(dataset, index)
    size, file = whole.read(number).rgb.size, depth_file(dataset, index)
    about = file.parents[1] / "depth.json"
    rules = read_json(about) if about.exists() else {}
    if rules.keys() - {"inverse", "invalid"}:
        raise StegoError(f"{about} has unknown keys. Use inverse (true or false) and invalid (a list of values).")
    with naming(f"depth map {file}"), Image.open(file) as stored:
        if stored.size != size or stored.mode not in ("L", "I", "I;16", "I;16B"):
            raise ValueError(f"{stored.mode} {stored.size}, not one gray value per pixel of {size}")
        values = np.asarray(stored, np.float64)
        measured = ~np.isin(values, rules.get("invalid", () if stored.mode == "L" else INVALID))
        if not measured.any():
            raise ValueError("all values are missing")
    return -values if rules.get("inverse") else values, measured


def check_depth(dataset: SegmentationDataset) -> None:
    """Shows a notice if most of `CHECKED` depth maps seem to be inverted."""
    whole = _whole(dataset, 0)[0]
    rows = range(0, len(whole), -(-len(whole) // CHECKED))
    inverted = 0
    for row in rows:
        values, measured = _stored_depth(whole, row)
        third = len(values) // 3
        top, bottom = (values[part][measured[part]] for part in (slice(third), slice(-third, None)))
        inverted += len(top) and len(bottom) and top.mean() < bottom.mean()
    if len(rows) >= 4 and inverted > MOSTLY * len(rows):
        notice(
            f"In {inverted} of {len(rows)} depth maps the top is nearer than the bottom. If larger values are nearer, "
            'as in MiDaS and Depth Anything, write {"inverse": true} into depth/depth.json.'
        )


def _whole(dataset: SegmentationDataset, index: int) -> tuple[SegmentationDataset, int]:
    """The dataset of whole images, and the index in it of image or crop `index`."""
    return (dataset.whole, dataset.places[index][0]) if isinstance(dataset, Crops) else (dataset, index)


def depth_file(dataset: SegmentationDataset, index: int) -> Path:
    """Path of the depth map of an image. Raises StegoError if it is missing."""
    whole, number = _whole(dataset, index)
    image = whole.images[number]
    name = Path("depth", whole.split, f"{image.stem}.png")
    paths = [folder / name for folder in image.parents[:4] if (folder / name).is_file()]
    if not paths:
        raise StegoError(
            f"method='depthg' needs a depth map of each training image; {image} has no {name}. See data/README.md."
        )
    return paths[0]
