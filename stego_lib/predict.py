"""From an image to its label map. `Run.predict`, `evaluate`, `segment_folder` and `export_onnx` all take this path:

image -> working size -> code (averaged over the mirrored image) -> scores on the grid -> label map, with or without
CRF. `tiles` takes it window by window.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from . import crf
from .datasets.transforms import Size, resize_image
from .loss import interpolation, upsample
from .model import ALPHA, Stego
from .utils.notices import notice

# Aspect ratio up to which the shorter side of an image is brought to the evaluation size.
MAX_ASPECT_RATIO = 4
# Factor above which a notice says that an image is shrunk.
MAX_SHRINKING = 4
# Pixels per side of the blocks in which `label_maps` works.
BLOCK = 256
# Pixels, and pixels times maps, of the largest image that the CRF works on.
CRF_PIXELS, CRF_VALUES = 2**20, 2**25


class Scores(NamedTuple):
    """Scores of n clusters or classes on the grid of a batch of images; the largest upsampled score wins a pixel.

    Scores are linear in the code, so upsampling them gives the values of the paper's order (codes first) with n
    channels in place of K.
    """

    grid: Tensor
    """(B, n, h, w)."""
    code: Tensor | None = None
    """Codes (B, K, h, w) where the scores are cosines times the length of the code, None where they are logits."""

    def image(self, number: int) -> "Scores":
        """The scores of one image of the batch, B = 1."""
        one = slice(number, number + 1)
        return Scores(self.grid[one], None if self.code is None else self.code[one])

    def logits(self, size: tuple[int, int]) -> Tensor:
        """Log-probabilities at (H, W) up to a constant at each pixel, (B, n, H, W), for the CRF."""
        scores = upsample(self.grid, size)
        return scores if self.code is None else ALPHA * scores / upsampled_length(self.code, size)


def working_size(height: int, width: int, size: Size, patch: int) -> tuple[int, int]:
    """Size at which the backbone sees an image.

    An integer `size` is the length of the shorter side; sides are rounded to whole patches, and nothing is cropped. Of
    an image longer than `MAX_ASPECT_RATIO` allows, the longer side is limited instead.
    """
    if isinstance(size, tuple):
        return size
    # Integers and `sym_max`, not floats and `max`, so that `export` can trace the function for all sizes.
    divisor = torch.sym_max(MAX_ASPECT_RATIO * torch.sym_min(height, width), torch.sym_max(height, width)) * patch

    def whole_patches(side: int) -> Any:
        return torch.sym_max(1, (2 * MAX_ASPECT_RATIO * size * side + divisor) // (2 * divisor)) * patch

    return whole_patches(height), whole_patches(width)


def score_image(
    image: Tensor, scorer: Callable[[Tensor], Scores], size: Size, patch: int, published: bool = False
) -> Scores:
    """Scores of one image, uint8 (3, H, W), at its `working_size`. scorer: uint8 images (B, 3, h, w) -> `Scores`."""
    height, width = image.shape[1:]
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width) and isinstance(size, int):
        notice(
            f"An image is more than {MAX_ASPECT_RATIO} times as long as wide, so its longer side is scaled to "
            f"{MAX_ASPECT_RATIO * size} pixels and small things may vanish. Cut it into pieces to keep them."
        )
    target = working_size(height, width, size, patch)
    if (factor := min(height / target[0], width / target[1])) > MAX_SHRINKING:
        notice(f"Images are shrunk {factor:.0f}-fold, so small things vanish. predict's size= or tile= keeps them.")
    return scorer(resize_image(image, target, published)[None])


def probe_scores(model: Stego, code: Tensor) -> dict[str, Scores]:
    """Scores of the "cluster" probe and, if it was trained, of the "linear" probe, from codes (B, K, h, w)."""
    scores = {"cluster": Scores(model.cluster_probe.similarity(code), code)}
    if model.linear_probe.trained:
        scores["linear"] = Scores(model.linear_probe(code))
    return scores


def label_maps(scores: Scores, size: tuple[int, int], ids: np.ndarray | None = None) -> Tensor:
    """The winner of each pixel, uint8 (B, H, W).

    Computed block by block, so that memory does not grow with n. A map whose largest value among the cells of a block
    is below another's smallest cannot win there, and is skipped.

    Parameters
    ----------
    scores
        Scores on the grid.
    size
        Height and width of the label maps.
    ids
        The id of each of the n maps in the result, uint8 (n,); their positions by default.
    """
    grid = scores.grid.float()
    numbers = torch.arange(grid.shape[1], dtype=torch.uint8) if ids is None else torch.from_numpy(ids)
    numbers = numbers.to(grid.device)
    if grid.shape[-2:] == size:
        return numbers[grid.argmax(1)].cpu()
    labels = torch.empty(len(grid), *size, dtype=torch.uint8)
    rows, columns = (interpolation(cells, pixels) for cells, pixels in zip(grid.shape[-2:], size, strict=True))
    for top in range(0, size[0], BLOCK):
        vertical, row_cells = _used_cells(rows[top : top + BLOCK])
        for left in range(0, size[1], BLOCK):
            horizontal, column_cells = _used_cells(columns[left : left + BLOCK])
            cells = grid[:, :, row_cells, column_cells]
            possible = cells.amax((2, 3)) >= cells.amin((2, 3)).amax(1, keepdim=True)
            chosen = possible.any(0).nonzero().flatten()
            block = vertical.to(grid) @ (cells[:, chosen] @ horizontal.T.to(grid))
            winner = block.max(1).indices  # twice as fast as argmax
            labels[:, top : top + BLOCK, left : left + BLOCK] = numbers[chosen[winner]].cpu()
    return labels


def _used_cells(weights: Tensor) -> tuple[Tensor, slice]:
    """Of the weights of all cells in some pixels, (pixels, cells), the columns of the cells in use, and their slice."""
    cells = torch.nonzero(weights.any(0)).flatten()
    used = slice(int(cells[0]), int(cells[-1]) + 1)
    return weights[:, used], used


@torch.inference_mode()
def refined_label_maps(
    image: Tensor, scores: Sequence[Scores], engine: str = "lattice", ids: np.ndarray | None = None
) -> list[Tensor]:
    """Label maps of one image, uint8 (3, H, W), after the CRF: uint8 (H, W) for each of several scores, B = 1.

    The CRF works on an image of `CRF_PIXELS` at most; its probabilities are upsampled. For ids see `label_maps`.
    """
    height, width = image.shape[1:]
    pixels = min(CRF_PIXELS, CRF_VALUES // max(score.grid.shape[1] for score in scores))
    ratio = min(1.0, math.sqrt(pixels / (height * width)))
    size = max(1, int(ratio * height)), max(1, int(ratio * width))
    maps = [score.logits(size)[0].softmax(0).cpu().numpy() for score in scores]
    refined = crf.refine(resize_image(image, size).permute(1, 2, 0).contiguous().numpy(), maps, engine=engine)
    return [label_maps(Scores(torch.from_numpy(map_)[None]), (height, width), ids)[0] for map_ in refined]


def upsampled_length(code: Tensor, size: tuple[int, int]) -> Tensor:
    """Length of the upsampled code at every pixel, (B, 1, H, W), without upsampling it in both directions.

    Between codes a and b, at the fraction t, `|(1 - t) a + t b|^2 = (1 - t) |a|^2 + t |b|^2 - t (1 - t) |a - b|^2`:
    codes are upsampled along their rows, and the lengths of rows and of steps between rows give the rest.
    """
    height, width = size
    wide = upsample(code, (code.shape[2], width))
    squares = wide.square().sum(1, keepdim=True)
    steps = F.pad((wide[:, :, 1:] - wide[:, :, :-1]).square().sum(1, keepdim=True), (0, 0, 0, 1))
    rows = torch.arange(height, dtype=code.dtype, device=code.device)
    position = ((rows + 0.5) * code.shape[2] / height - 0.5).clamp(min=0)  # as in `upsample`
    first = position.long().clamp(max=code.shape[2] - 1)
    t = (position - first).clamp(max=1)[:, None]
    squared = upsample(squares, size) - t * (1 - t) * steps[:, :, first]
    return squared.clamp(min=0).sqrt().clamp(min=1e-12)
