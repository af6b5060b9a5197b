"""Keys as features, and loss terms, of the authors' code that no recipe uses; see `experiment.Official`.

Salience masks, whose files were not released, and the repulsion term, which the code does not implement, are missing.
"""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from torch import Tensor
from torchvision import transforms

from .loss import sample
from .networks.geometry import is_vit
from .utils.errors import StegoError
from .utils.torch_state import drawing

if TYPE_CHECKING:
    from .backbone import Backbone
    from .batches import Batch
    from .experiment import Experiment
    from .features import Features
    from .model import Stego

# Number of attention heads that the published code assumes for keys.
PUBLISHED_HEADS = 6
# Side in pixels of the maps of the CRF-inspired loss, and number of points.
CRF_SIDE, CRF_POINTS = 56, 1000
# Ranges of the area of a view relative to the image, and of its aspect ratio.
SCALE, RATIO = (0.8, 1.0), (3 / 4, 4 / 3)
PHOTOMETRIC = transforms.Compose(
    [
        transforms.ColorJitter(brightness=0.3, contrast=0.3, saturation=0.3, hue=0.1),
        transforms.RandomGrayscale(0.2),
        transforms.RandomApply([transforms.GaussianBlur(5)], 0.5),
    ]
)


def block_and_heads(backbone: "Backbone", keys: bool, block: int, published: bool) -> tuple[int, int | None]:
    """The block, counted from 0, and the number of heads of keys. Raises StegoError if they do not exist."""
    blocks = backbone.vit.blocks if is_vit(backbone.vit) else ()
    exists = -len(blocks) <= block < len(blocks)
    attention = getattr(blocks[block], "attn", None) if exists else None
    heads = PUBLISHED_HEADS if published else getattr(attention, "num_heads", 0)
    if not exists or (keys and not (getattr(attention, "qkv", None) and heads and backbone.dim % heads == 0)):
        problem = f"backbone {backbone.name!r} has {len(blocks)} blocks, and block={block} has no such features"
        raise StegoError(f"{problem} (keys={keys}, {heads} attention heads). Change block, or use keys=False.")
    return block % len(blocks), heads if keys else None


def attention_keys(backbone: "Backbone", images: Tensor) -> Tensor:
    """Attention keys of the block, (B, C, h, w); channel = head * (C / heads) + channel within the head."""
    attention, inputs = backbone.vit.blocks[backbone.block].attn, []
    with attention.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0])):
        backbone.vit.forward_intermediates(images, indices=[backbone.block], intermediates_only=True, stop_early=True)
    bias = None if attention.qkv.bias is None else attention.qkv.bias.chunk(3)[1]
    keys = F.linear(inputs[0], attention.qkv.weight.chunk(3)[1], bias)[:, backbone.vit.num_prefix_tokens :]
    # Memory order: (B, heads, positions, channels within a head). A wrong number of heads mixes positions.
    by_head = keys.unflatten(2, (attention.num_heads, -1)).transpose(1, 2)
    by_head = by_head.reshape(len(images), backbone.key_heads, *backbone.grid(*images.shape[-2:]), -1)
    return by_head.movedim(-1, 2).flatten(1, 2)


def draw_optional(
    batch: "Batch",
    rows: Tensor,
    features: "Features",
    model: "Stego",
    backbone: "Backbone",
    experiment: "Experiment",
    generator: torch.Generator,
) -> None:
    """Adds the inputs of the optional terms for the images `rows`, int64 (B,), to a batch."""
    terms, device = experiment.official.loss_weights, batch.feats.device
    if "loss_crf" in terms:
        batch.images = backbone.normalize(features.image_rows(rows)).float()
        batch.crf_points = random_pixels(CRF_POINTS, CRF_SIDE, generator).to(device)
    if "loss_aug" in terms:
        with drawing(int(torch.randint(2**31, (), generator=generator))):
            views, coords = augmented_views(features.image_rows(rows), features.shape[2:])
        batch.feats_view, batch.view_coords = model.centered(backbone(views)), coords.to(device)


def optional_losses(
    model: "Stego", batch: "Batch", feats: Tensor, code: Tensor, experiment: "Experiment"
) -> dict[str, Tensor]:
    """Values of the optional terms for features (B, C, h, w) and codes (B, K, h, w)."""
    terms = experiment.official.loss_weights
    losses = {}
    if "loss_rec" in terms:
        losses["loss_rec"] = reconstruction_loss(feats, model.decoder(code))
    if "loss_crf" in terms:
        assert batch.images is not None and batch.crf_points is not None  # see `draw_optional`
        losses["loss_crf"] = image_crf_loss(batch.images, code, batch.crf_points)
    if "loss_aug" in terms:
        assert batch.feats_view is not None and batch.view_coords is not None
        view = model.head(batch.feats_view)
        losses["loss_aug"] = alignment_loss(code, view, batch.view_coords, published=experiment.official.published)
    return losses


def reconstruction_loss(feats: Tensor, rebuilt: Tensor) -> Tensor:
    """Negative mean cosine similarity of features and their reconstruction from the code, both (B, C, h, w)."""
    return -F.cosine_similarity(feats, rebuilt, dim=1, eps=1e-10).mean()


def crf_loss(
    guidance: Tensor,
    codes: Tensor,
    points: Tensor,
    *,
    alpha: float = 0.5,
    beta: float = 0.15,
    gamma: float = 0.05,
    w1: float = 10.0,
    w2: float = 3.0,
    shift: float = 0.0,
) -> Tensor:
    """Negative product of code similarity and CRF affinity for each pair of points, (B, n, n).

    guidance: colors (B, 3, H, W); codes: (B, K, H, W) of unit length; points: rows and columns, int64 (2, n). For the
    squared distances d in pixels and g in color, the affinity is
    w1 exp(-d / 2 alpha - g / 2 beta) + w2 exp(-d / 2 gamma) - shift.
    """
    rows, columns = points
    distance = (points[:, :, None] - points[:, None]).square().sum(0)
    colors, codes = guidance[:, :, rows, columns], codes[:, :, rows, columns]
    contrast = (colors[:, :, :, None] - colors[:, :, None]).square().sum(1)
    affinity = w1 * torch.exp(-distance / (2 * alpha) - contrast / (2 * beta)) + w2 * torch.exp(-distance / (2 * gamma))
    return -torch.einsum("bka,bkc->bac", codes, codes) * (affinity - shift)


def image_crf_loss(images: Tensor, code: Tensor, points: Tensor) -> Tensor:
    """Mean of `crf_loss` after resizing both maps to CRF_SIDE x CRF_SIDE pixels.

    images: normalized colors (B, 3, H, W); code: (B, K, h, w); points: int64 (2, n) in [0, CRF_SIDE).
    """
    colors, codes = (F.interpolate(maps, (CRF_SIDE, CRF_SIDE), mode="bilinear") for maps in (images, code))
    return crf_loss(colors, F.normalize(codes, dim=1, eps=1e-10), points).mean()


def random_pixels(count: int, side: int, generator: torch.Generator) -> Tensor:
    """Rows and columns of random pixels of a square: int64 (2, count)."""
    return torch.randint(side, (2, count), generator=generator)


def alignment_loss(code: Tensor, code_view: Tensor, coords: Tensor, *, published: bool = False) -> Tensor:
    """Negative mean cosine similarity between the codes of an augmented view and of the image at the same positions.

    code, code_view: (B, K, h, w) of images and of their views; coords: (B, h, w, 2), position of each cell of the view
    in the image, for `loss.sample`. `published` reproduces a defect: the axes are swapped, so cells are compared with
    those mirrored across the diagonal (ValueError for grids that are not square).
    """
    if published and code.shape[2] != code.shape[3]:
        raise ValueError(f"the published alignment needs square grids, not {tuple(code.shape[2:])}")
    sampled = sample(code, coords)
    sampled = sampled if published else sampled.transpose(2, 3)
    return -F.cosine_similarity(sampled, code_view, dim=1, eps=1e-10).mean()


def augmented_views(images: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """A random view of each image: resized crop, horizontal flip and color jitter, by torch's global generator.

    images: uint8 (B, 3, H, W); grid: (h, w) of the codes. Returns views, uint8 (B, 3, H, W), and `view_coords`,
    (B, h, w, 2).
    """
    views, coords = [], []
    height, width = images.shape[-2:]
    for image in images:
        box = transforms.RandomResizedCrop.get_params(image, SCALE, RATIO)
        mirrored = bool(torch.rand(()) < 0.5)
        view = TF.resized_crop(image, *box, [height, width], antialias=True)
        views.append(PHOTOMETRIC(view.flip(-1) if mirrored else view))
        coords.append(view_coords(box, mirrored, (height, width), grid))
    return torch.stack(views), torch.stack(coords)


def view_coords(box: tuple[int, int, int, int], mirrored: bool, size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Positions of a view's cells in the image, (h, w, 2) as (x, y), where -1 and 1 are the outer cells.

    box: (top, left, height, width) of the crop in pixels; mirrored: whether it was flipped horizontally; size: (H, W)
    of the image; grid: (h, w).
    """
    axes = []
    for start, length, pixels, cells in zip(box[:2], box[2:], size, grid, strict=True):
        middle = start + (torch.arange(cells) + 0.5) / cells * length  # in pixels of the image
        cell = middle / pixels * cells - 0.5  # in cells of the image, 0 is the center of the first
        axes.append(2 * cell / max(cells - 1, 1) - 1)
    y, x = axes
    y, x = torch.meshgrid(y, x.flip(0) if mirrored else x, indexing="ij")
    return torch.stack([x, y], dim=-1)
