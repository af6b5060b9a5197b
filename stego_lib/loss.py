"""The correspondence loss (paper, section 3.2), as pure functions of tensors and numbers."""

from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

Whole = Callable[[Tensor], Tensor]
"""Makes of a value of one share of the batch that of the whole batch, see `processes.Processes.mean` and `gather`."""


def sample_points(maps: Tensor, coords: Tensor, images: Tensor | None = None) -> Tensor:
    """Looks maps up at points between their grid cells (bilinear): (B, P, C), one row a point.

    maps: (N, C, h, w). coords: (B, P, 2) as (x, y) in [-1, 1], -1 and 1 being the centers of the first and last cell;
    points outside are moved to the border. images: int64 (B,), the map that each row of points looks up; by default
    row b looks up map b. Same values as `F.grid_sample`; maps in channels-last order are read without a copy.
    """
    count, channels, height, width = maps.shape
    cells = maps.permute(0, 2, 3, 1).reshape(-1, channels)
    sides = torch.tensor([width, height], device=coords.device)
    place = ((coords + 1) / 2 * (sides - 1)).clamp(min=0).minimum(sides - 1)
    low = place.floor().minimum((sides - 2).clamp(min=0))
    (x, y), (right, below) = low.long().unbind(-1), (place - low).unbind(-1)
    first = torch.arange(count, device=maps.device) if images is None else images
    corner = first[:, None] * (height * width) + y * width + x
    dx, dy = int(width > 1), width * int(height > 1)
    corners = torch.stack([corner, corner + dx, corner + dy, corner + dx + dy], -1)
    shares = torch.stack([(1 - right) * (1 - below), right * (1 - below), (1 - right) * below, right * below], -1)
    found = F.embedding_bag(corners.flatten(0, 1), cells, per_sample_weights=shares.flatten(0, 1), mode="sum")
    return found.view(*coords.shape[:2], channels)


def sample(maps: Tensor, coords: Tensor) -> Tensor:
    """The same for a grid of points: maps (B, C, h, w) at coords (B, S, T, 2) -> (B, C, T, S).

    [b, :, j, i] is the map at coords[b, i, j] (the two point axes are swapped, as in the published code; the loss does
    not mind).
    """
    swapped = coords.transpose(1, 2)
    return sample_points(maps, swapped.flatten(1, 2)).transpose(1, 2).unflatten(2, swapped.shape[1:3])


def correspondence(a: Tensor, b: Tensor) -> Tensor:
    """Cosine of every position of `a` with every position of `b` (paper, equation 1).

    a: (B, C, h, w), b: (B, C, i, j); returns (B, h, w, i, j) in [-1, 1].
    """
    return torch.einsum("bchw,bcij->bhwij", F.normalize(a, dim=1, eps=1e-10), F.normalize(b, dim=1, eps=1e-10))


def alone(value: Tensor) -> Tensor:
    """The same value: what a process that has the whole batch takes for the mean over, or the rows of, all processes."""
    return value


def center(correspondences: Tensor, average: Whole = alone) -> Tensor:
    """Spatial centering (paper, section 3.2): takes off each position's mean over the positions of the partner.

    correspondences: (B, h, w, i, j). As the published code does, the mean of the whole batch is put back, so the
    result depends on the batch and shifts keep their meaning. `average`: mean over those who share the batch.
    """
    mean = average(correspondences.mean())
    correspondences = correspondences - correspondences.mean(dim=(3, 4), keepdim=True)
    return correspondences - average(correspondences.mean()) + mean


def pair_loss(
    features: Tensor,
    codes: Tensor,
    shift: float,
    *,
    centering: bool = True,
    zero_clamp: bool = True,
    stabilize: bool = False,
    average: Whole = alone,
) -> Tensor:
    """-(F - shift) * S for every pair of points (paper, equations 2 to 4), not yet averaged.

    features, codes: correspondences F (no gradient flows into them) and S, both (B, h, w, i, j). `centering` centers F,
    `zero_clamp` uses max(S, 0), `stabilize` min(S, 0.8). `average`: see `center`.
    """
    with torch.no_grad():
        force = (center(features, average) if centering else features) - shift
    clamped = codes
    if zero_clamp:
        clamped = clamped.clamp(min=0.0)
    if stabilize:
        clamped = clamped.clamp(max=0.8)
    return -clamped * force


def correspondence_loss(
    feats1: Tensor, feats2: Tensor, code1: Tensor, code2: Tensor, shift: float, **switches: bool
) -> tuple[Tensor, Tensor]:
    """`pair_loss` of sampled features and codes, and the code correspondences before clamping, both (B, S, S, S, S).

    feats1, feats2: frozen features at S x S points, (B, C, S, S); no gradient flows into them. code1, code2: codes at
    the same points, (B, K, S, S). switches: as `pair_loss` takes them.
    """
    with torch.no_grad():
        features = correspondence(feats1, feats2)
    codes = correspondence(code1, code2)
    return pair_loss(features, codes, shift, **switches), codes  # type: ignore[arg-type]  # all are bool


def stego_loss(
    feats: Tensor,
    feats_knn: Tensor,
    code: Tensor,
    code_knn: Tensor,
    coords1: Tensor,
    coords2: Tensor,
    permutations: Tensor,
    weights: tuple[float, float, float],
    shifts: tuple[float, float, float],
    *,
    average: Whole = alone,
    gather: Whole = alone,
    **switches: bool,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The three-part loss (paper, equation 5): self, kNN and random pairs.

    feats, feats_knn: (B, C, h, w) of images and of their neighbors; code, code_knn: (B, K, h, w). coords1, coords2:
    (B, S, S, 2), points in the images and in their partners. permutations: int64 (negatives, B), the random partner of
    each image. weights, shifts: (self, knn, rand). switches: as `pair_loss` takes them. Where several processes share a
    batch, B is this one's share, permutations number the whole batch, and `average` and `gather` reach the others.
    Returns the weighted loss and its parts: mean loss and mean code correspondence of each of self, knn and rand.
    The same as `correspondence_loss` of each pair, but every sample is taken and normed once.
    """
    batch, side = coords1.shape[:2]
    points1, points2 = coords1.flatten(1, 2), coords2.flatten(1, 2)

    def unit(maps: Tensor, points: Tensor, images: Tensor | None = None) -> Tensor:
        return F.normalize(sample_points(maps, points, images), dim=2, eps=1e-10)

    def correspondences(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.transpose(1, 2)).view(batch, side, side, side, side)

    # A point's features and code have their channels side by side in channels-last order: one copy here saves many.
    feats, feats_knn, code, code_knn = (
        maps.contiguous(memory_format=torch.channels_last) for maps in (feats, feats_knn, code, code_knn)
    )
    f, c = unit(feats, points1), unit(code, points1)
    all_feats, all_code = (gather(maps).contiguous(memory_format=torch.channels_last) for maps in (feats, code))
    partners = {
        "self": [(f, c)],
        "knn": [(unit(feats_knn, points2), unit(code_knn, points2))],
        "rand": [(unit(all_feats, points2, p), unit(all_code, points2, p)) for p in permutations],
    }
    total, parts = code.new_zeros(()), {}
    for (kind, pairs), weight, shift in zip(partners.items(), weights, shifts, strict=True):
        losses, means = [], []
        for f2, c2 in pairs:
            codes = correspondences(c, c2)
            losses.append(pair_loss(correspondences(f, f2), codes, shift, average=average, **switches).mean())
            means.append(codes.detach().mean())
        loss = torch.stack(losses).mean()
        total = total + weight * loss
        parts[f"loss_{kind}"] = loss.detach()
        parts[f"code_{kind}"] = torch.stack(means).mean()
    return total, parts


def random_coords(batch: int, points: int, generator: torch.Generator) -> Tensor:
    """(batch, points, points, 2) positions, uniform in [-1, 1]."""
    return torch.rand(batch, points, points, 2, generator=generator) * 2 - 1


def negative_permutation(batch: int, generator: torch.Generator) -> Tensor:
    """A random partner for each image of a batch, int64 (batch,): never itself, and every image serves once.

    It is one random cycle through the batch. (The published code repeats some images: `published_permutation`.)
    """
    order = torch.randperm(batch, generator=generator)
    partner = torch.empty_like(order)
    partner[order] = order.roll(1)
    return partner


def published_permutation(batch: int, generator: torch.Generator) -> Tensor:
    """The published code's partners, int64 (batch,): never itself (batch > 1), but some images twice and others never.

    A permutation is drawn and its fixed points move on by one, the last to the first, whoever is there already.
    """
    order = torch.randperm(batch, generator=generator)
    return (order + (order == torch.arange(batch))) % batch


def upsample(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, C, h, w) -> (B, C, H, W), bilinear; cell centers are kept in place (as align_corners=False).

    As two matrix products, which take a quarter of the time of `F.interpolate` on a CPU and give the same.
    """
    rows, columns = (interpolation(cells, pixels).to(maps) for cells, pixels in zip(maps.shape[-2:], size, strict=True))
    return rows @ (maps @ columns.T)


@lru_cache(maxsize=64)  # a folder may hold images of a thousand sizes
@torch.inference_mode(False)
def interpolation(cells: int, pixels: int) -> Tensor:
    """(pixels, cells): the share of each cell in each pixel of a line; for training as well, if an evaluation asked first."""
    return F.interpolate(torch.eye(cells)[None], pixels, mode="linear", align_corners=False)[0].T.contiguous()
