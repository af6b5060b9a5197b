"""Augmented views of images, for the published augmentation alignment."""

import torch
import torchvision.transforms.functional as TF
from torch import Tensor
from torchvision import transforms

SCALE, RATIO = (0.8, 1.0), (3 / 4, 4 / 3)
"""Ranges of a view's area as a fraction of the image, and of its aspect ratio."""
PHOTOMETRIC = transforms.Compose(
    [
        transforms.ColorJitter(brightness=0.3, contrast=0.3, saturation=0.3, hue=0.1),
        transforms.RandomGrayscale(0.2),
        transforms.RandomApply([transforms.GaussianBlur(5)], 0.5),
    ]
)
"""Random color jitter, grayscale and blur."""


def augmented_views(images: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """One random view of each image: a resized crop, perhaps flipped horizontally, with changed colors.

    images: uint8 (B, 3, H, W); grid: (h, w) of the codes. Returns the views, uint8 (B, 3, H, W), and where each of their
    grid cells lies in the image, (B, h, w, 2), as `view_coords` gives it. Draws from torch's global generator.
    """
    views, coords = [], []
    size = images.shape[-2:]
    for image in images:
        box = transforms.RandomResizedCrop.get_params(image, SCALE, RATIO)
        mirrored = bool(torch.rand(()) < 0.5)
        view = TF.resized_crop(image, *box, list(size), antialias=True)
        views.append(PHOTOMETRIC(view.flip(-1) if mirrored else view))
        coords.append(view_coords(box, mirrored, size, grid))
    return torch.stack(views), torch.stack(coords)


def view_coords(box: tuple[int, int, int, int], mirrored: bool, size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Where the centers of a view's cells lie in the image: (h, w, 2) as (x, y), -1 and 1 being the image's outer cells.

    box: (top, left, height, width) of the crop in pixels; mirrored: whether the crop was then flipped horizontally; size:
    (H, W) of the image; grid: (h, w).
    """
    axes = []
    for start, length, pixels, cells in zip(box[:2], box[2:], size, grid, strict=True):
        middle = start + (torch.arange(cells) + 0.5) / cells * length  # in pixels of the image
        cell = middle / pixels * cells - 0.5  # in cells of the image, 0 = the first one's center
        axes.append(2 * cell / max(cells - 1, 1) - 1)
    y, x = axes
    y, x = torch.meshgrid(y, x.flip(0) if mirrored else x, indexing="ij")
    return torch.stack([x, y], dim=-1)
