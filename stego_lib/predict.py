"""From an image to its label map, for `Run.predict`, `evaluate`, `segment_folder` and `export_onnx`:

image -> resized image -> code (averaged over horizontal flips) -> scores on the grid -> label map, optionally with CRF.
"""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .datasets.transforms import Size, resize_image
from .loss import interpolation, upsample
from .model import ALPHA, Stego, mean_over_flips
from .utils.errors import StegoError, check_choice
from .utils.notices import notice
from .utils.torch_state import usual_modes

if TYPE_CHECKING:
    from .run import Run

# Normalized images (B, 3, H, W) and their features (B, C, h, w) -> features (B, C, h', w').
Upsampler = Callable[[Tensor, Tensor], Tensor]
# Values of `refine` of `Run.predict`.
REFINEMENTS = ("crf", "none")
# Maximum aspect ratio for resizing by the shorter side.
MAX_ASPECT_RATIO = 4
# Maximum downsampling factor without a notice.
MAX_SHRINKING = 4
# Side of the blocks of `label_maps` in pixels.
BLOCK = 256
# Maximum number of pixels, and of pixels times channels, for the CRF.
CRF_PIXELS, CRF_VALUES = 2**20, 2**25


class Scores(NamedTuple):
    """Scores of n clusters or classes on the grid of a batch of images. The largest upsampled score is the prediction.

    Scores are linear in the code, so upsampling n scores equals upsampling K channels of the code, as in the paper.
    """

    grid: Tensor
    """(B, n, h, w)."""
    code: Tensor | None = None
    """Codes (B, K, h, w) if scores are cosines times the length of the code; None if they are logits."""

    def image(self, number: int) -> "Scores":
        """The scores of one image of the batch, B = 1."""
        row = slice(number, number + 1)
        return Scores(self.grid[row], None if self.code is None else self.code[row])

    def logits(self, size: tuple[int, int]) -> Tensor:
        """Log-probabilities for the CRF at (H, W), up to a constant per pixel, (B, n, H, W)."""
        scores = upsample(self.grid, size)
        return scores if self.code is None else ALPHA * scores / upsampled_length(self.code, size)


def working_size(height: int, width: int, size: Size, patch: int) -> tuple[int, int]:
    """Size of an image for the backbone.

    An integer `size` is the shorter side. Sides are rounded to whole patches. If the aspect ratio is above
    `MAX_ASPECT_RATIO`, the longer side is MAX_ASPECT_RATIO * size instead.
    """
    if isinstance(size, tuple):
        return size
    # Integers and `sym_max` instead of floats and `max`, so that `export` can trace the function.
    divisor = torch.sym_max(MAX_ASPECT_RATIO * torch.sym_min(height, width), torch.sym_max(height, width)) * patch

    def whole_patches(side: int) -> Any:
        return torch.sym_max(1, (2 * MAX_ASPECT_RATIO * size * side + divisor) // (2 * divisor)) * patch

    return whole_patches(height), whole_patches(width)


def run_maps(run: "Run", images: Tensor, on: str | None = None, upsampler: Upsampler | None = None) -> Tensor:
    """Codes or features of images at their size, see `Run.maps`."""
    views = torch.cat([images, images.flip(-1)]) if run.experiment.mirror else images
    features = run.backbone(views)
    if upsampler is not None:
        upsampled = upsampler(run.backbone.normalize(views).float(), features)
        if not isinstance(upsampled, Tensor) or upsampled.shape[:2] != features.shape[:2]:
            raise StegoError(
                f"upsampler returned {tuple(upsampled.shape) if isinstance(upsampled, Tensor) else type(upsampled)} "
                f"for features {tuple(features.shape)}. It should return a tensor (B, C, H', W')."
            )
        features = upsampled.float()
    pair = features.split(len(images))
    on = on or ("codes" if run.taught is None else run.taught.on)
    return run.model.mean_code(*pair) if on == "codes" else mean_over_flips(*pair)


def resized(run: "Run", image: Tensor, size: int | None = None) -> Tensor:
    """An image, uint8 (3, H, W), at its working size; `Experiment.eval_size` by default."""
    target = working_size(image.shape[1], image.shape[2], size or run.experiment.eval_size, run.backbone.patch)
    return resize_image(image, target, run.experiment.official.published)


@usual_modes()
@torch.inference_mode()
def image_scores(run: "Run", image: Tensor, size: int | None, upsampler: Upsampler | None = None) -> Scores:
    """See `Run.scores`."""
    small = resized(run, image, size)
    factor = min(old / new for old, new in zip(image.shape[1:], small.shape[1:], strict=True))
    if factor > MAX_SHRINKING:
        notice(f"Images are downsampled by {factor:.0f}, so small objects are lost. Use size= or tile= to keep them.")
    return run.score_maps(run_maps(run, small[None], upsampler=upsampler))


def uses_crf(run: "Run", refine: str | None) -> bool:
    """Whether to apply the CRF for this `refine` of `Run.predict`. Raises StegoError for an unknown value."""
    if refine is None:
        return run.experiment.crf
    check_choice("refine", refine, REFINEMENTS)
    return refine == "crf"


def probe_scores(model: Stego, code: Tensor) -> dict[str, Scores]:
    """Scores of the "cluster" probe and, if it is trained, the "linear" probe, for codes (B, K, h, w)."""
    scores = {"cluster": Scores(model.cluster_probe.similarity(code), code)}
    if model.linear_probe.trained:
        scores["linear"] = Scores(model.linear_probe(code))
    return scores


def label_maps(scores: Scores, size: tuple[int, int], ids: np.ndarray | None = None) -> Tensor:
    """Label maps of (H, W) = `size` from upsampled scores, uint8 (B, H, W).

    Computed in blocks to save memory. A channel with a maximum in a block below the minimum of another channel is
    skipped. ids: label of each of the n channels, uint8 (n,); by default its index.
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
            best = block.max(1).indices  # twice as fast as argmax
            labels[:, top : top + BLOCK, left : left + BLOCK] = numbers[chosen[best]].cpu()
    return labels


def _used_cells(weights: Tensor) -> tuple[Tensor, slice]:
    """Removes cells without weights from (pixels, cells), and returns their slice."""
    cells = torch.nonzero(weights.any(0)).flatten()
    used = slice(int(cells[0]), int(cells[-1]) + 1)
    return weights[:, used], used


@torch.inference_mode()
def refined_label_maps(
    image: Tensor, scores: Sequence[Scores], engine: str = "lattice", ids: np.ndarray | None = None
) -> list[Tensor]:
    """Label maps of one image, uint8 (3, H, W), after the CRF: uint8 (H, W) for each of several scores, B = 1.

    Images above `CRF_PIXELS` are downsampled, and probabilities are upsampled. For ids see `label_maps`.
    """
    from . import crf  # loads scipy

    height, width = image.shape[1:]
    pixels = min(CRF_PIXELS, CRF_VALUES // max(score.grid.shape[1] for score in scores))
    ratio = min(1.0, math.sqrt(pixels / (height * width)))
    size = max(1, int(ratio * height)), max(1, int(ratio * width))
    maps = [score.logits(size)[0].softmax(0).cpu().numpy() for score in scores]
    refined = crf.refine(resize_image(image, size).permute(1, 2, 0).contiguous().numpy(), maps, engine=engine)
    return [label_maps(Scores(torch.from_numpy(map_)[None]), (height, width), ids)[0] for map_ in refined]


def upsampled_length(code: Tensor, size: tuple[int, int]) -> Tensor:
    """Length of the upsampled code at each pixel, (B, 1, H, W), with upsampling along rows only.

    For interpolation between rows, `|(1 - t) a + t b|^2 = (1 - t) |a|^2 + t |b|^2 - t (1 - t) |a - b|^2`.
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
