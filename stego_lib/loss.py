"""The correspondence loss (paper, section 3.2): pure functions of tensors and numbers.

Shapes: features (B, C, h, w), codes (B, K, h, w), points (B, S, S, 2) as (x, y) in [-1, 1], correspondences
(B, S, S, S, S).
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

# Of self, kNN and random pairs.
Triple = tuple[float, float, float]


def correspondence(a: Tensor, b: Tensor) -> Tensor:
    """Cosine similarity of all pairs of positions (paper, equation 1).

    (B, C, h, w), (B, C, i, j) -> (B, h, w, i, j), in [-1, 1].

    Examples
    --------
    >>> features = torch.rand(2, 384, 28, 28)
    >>> correspondence(features, features).shape
    torch.Size([2, 28, 28, 28, 28])
    """
    return torch.einsum("bchw,bcij->bhwij", F.normalize(a, dim=1, eps=1e-10), F.normalize(b, dim=1, eps=1e-10))


def center(correspondences: Tensor) -> Tensor:
    """Spatial centering (paper, section 3.2) of (B, h, w, i, j): subtracts each position's mean over (i, j).

    As in the published code, the mean of the batch is added back, so shifts keep their meaning.
    """
    centered = correspondences - correspondences.mean(dim=(3, 4), keepdim=True)
    return centered - centered.mean() + correspondences.mean()


def pair_loss(
    features: Tensor,
    codes: Tensor,
    shift: float,
    centering: bool = True,
    zero_clamp: bool = True,
    stabilize: bool = False,
) -> Tensor:
    """-(F - shift) * S for each pair of points (paper, equations 2 to 4), without averaging: (B, h, w, i, j).

    Parameters
    ----------
    features, codes
        Correspondences F (without gradient) and S, (B, h, w, i, j).
    shift
        b: pairs with F > b attract, others repel.
    centering, zero_clamp, stabilize
        Center F spatially, see `center`. Clamp S to at least 0. Clamp S to at most 0.8.
    """
    with torch.no_grad():
        force = (center(features) if centering else features) - shift
    if zero_clamp:
        codes = codes.clamp(min=0.0)
    if stabilize:
        codes = codes.clamp(max=0.8)
    return -codes * force


def correspondence_loss(
    feats1: Tensor, feats2: Tensor, code1: Tensor, code2: Tensor, shift: float, **switches: bool
) -> tuple[Tensor, Tensor]:
    """`pair_loss` of sampled features and codes.

    Parameters
    ----------
    feats1, feats2, code1, code2
        Frozen features (B, C, S, S), without gradient, and codes (B, K, S, S) at S x S points.
    shift, switches
        As in `pair_loss`.

    Returns
    -------
    tuple of Tensor
        The loss of each pair, and the code correspondences before clamping, (B, S, S, S, S).
    """
    with torch.no_grad():
        features = correspondence(feats1, feats2)
    codes = correspondence(code1, code2)
    return pair_loss(features, codes, shift, **switches), codes


def stego_loss(
    feats: Tensor,
    feats_knn: Tensor,
    code: Tensor,
    code_knn: Tensor,
    coords1: Tensor,
    coords2: Tensor,
    permutations: Tensor,
    weights: Triple,
    shifts: Triple,
    **switches: bool,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum of the losses of self, kNN and random pairs (paper, equation 5).

    Equals `correspondence_loss` of each kind of pair, but samples and normalizes features and codes only once.

    Parameters
    ----------
    feats, feats_knn, code, code_knn
        Features of the images and of one neighbor of each, (B, C, h, w), and their codes, (B, K, h, w).
    coords1, coords2
        Points in the images and in their partners, (B, S, S, 2).
    permutations
        Random partners of each image, int64 (negatives, B).
    weights, shifts, switches
        l and b of self, kNN and random pairs; other arguments of `pair_loss`.

    Returns
    -------
    tuple
        The loss, and "loss_self", "code_self" (mean code correspondence), and the same for knn and rand.
    """
    side = coords1.shape[1]
    points1, points2 = coords1.flatten(1, 2), coords2.flatten(1, 2)

    def sampled(features: Tensor, codes: Tensor, points: Tensor, images: Tensor | None = None) -> list[Tensor]:
        """Unit features and codes at the points, (B, S * S, C) and (B, S * S, K)."""
        return [F.normalize(sample_points(maps, points, images), dim=2, eps=1e-10) for maps in (features, codes)]

    def correspondences(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.transpose(1, 2)).unflatten(2, (side, side)).unflatten(1, (side, side))

    # In channels-last order, all channels of a point are adjacent in memory, which makes sampling fast.
    feats, feats_knn, code, code_knn = (
        maps.contiguous(memory_format=torch.channels_last) for maps in (feats, feats_knn, code, code_knn)
    )
    f, c = sampled(feats, code, points1)
    pairs = {
        "self": [[f, c]],
        "knn": [sampled(feats_knn, code_knn, points2)],
        "rand": [sampled(feats, code, points2, partners) for partners in permutations],
    }
    total, parts = code.new_zeros(()), {}
    for (kind, partners), weight, shift in zip(pairs.items(), weights, shifts, strict=True):
        losses, means = [], []
        for f2, c2 in partners:
            codes = correspondences(c, c2)
            losses.append(pair_loss(correspondences(f, f2), codes, shift, **switches).mean())
            means.append(codes.detach().mean())
        loss = torch.stack(losses).mean()
        total = total + weight * loss
        parts[f"loss_{kind}"] = loss.detach()
        parts[f"code_{kind}"] = torch.stack(means).mean()
    return total, parts


class StegoLoss(nn.Module):
    """`stego_loss` at points and with random partners that each call draws; `parts` holds those of the last call.

    Parameters
    ----------
    weights, shifts, switches
        As in `stego_loss`.
    points, negatives
        S, for S x S points in each image; number of random partners of each image.

    Examples
    --------
    >>> loss_fn = StegoLoss(weights=(1.0, 0.58, 0.91), shifts=(0.3, 0.2, 0.4))
    >>> feats, feats_knn = torch.rand(2, 16, 384, 28, 28)
    >>> code, code_knn = torch.rand(2, 16, 70, 28, 28, requires_grad=True)
    >>> loss_fn(feats, feats_knn, code, code_knn).backward()
    """

    def __init__(self, weights: Triple, shifts: Triple, points: int = 11, negatives: int = 5, **switches: bool):
        super().__init__()
        self.weights, self.shifts, self.points, self.negatives = weights, shifts, points, negatives
        self.switches, self.parts = switches, dict[str, Tensor]()

    def forward(
        self, feats: Tensor, feats_knn: Tensor, code: Tensor, code_knn: Tensor, generator: Generator | None = None
    ) -> Tensor:
        """The loss of maps as in `stego_loss`, a scalar. Raises ValueError for B < 2. generator: on the CPU."""
        if not 1 < len(feats) == len(feats_knn) == len(code) == len(code_knn):
            raise ValueError("All maps must hold the same number of images, at least 2.")
        coords = [random_coords(len(feats), self.points, generator) for _ in range(2)]
        partners = torch.stack([negative_permutation(len(feats), generator) for _ in range(self.negatives)])
        coords1, coords2, partners = (drawn.to(feats.device) for drawn in (*coords, partners))
        loss, self.parts = stego_loss(
            feats, feats_knn, code, code_knn, coords1, coords2, partners, self.weights, self.shifts, **self.switches
        )
        return loss


def sample(maps: Tensor, coords: Tensor) -> Tensor:
    """Samples maps (B, C, h, w) bilinearly at points (B, S, T, 2): (B, C, T, S).

    [b, :, j, i] is the value at coords[b, i, j]. The axes of points are swapped as in the published code, which does
    not change the loss.
    """
    swapped = coords.transpose(1, 2)
    return sample_points(maps, swapped.flatten(1, 2)).transpose(1, 2).unflatten(2, swapped.shape[1:3])


def sample_points(maps: Tensor, coords: Tensor, images: Tensor | None = None) -> Tensor:
    """Samples maps (N, C, h, w) bilinearly at points (B, P, 2), as (x, y) in [-1, 1]: (B, P, C).

    -1 and 1 are the centers of the first and the last cell. The values are those of `F.grid_sample` with border padding
    and aligned corners. Maps in channels-last order are not copied. images: int64 (B,), index of the map of each row of
    points; by default row b samples map b.
    """
    count, channels, height, width = maps.shape
    cells = maps.permute(0, 2, 3, 1).reshape(-1, channels)
    sides = torch.tensor([width, height], device=coords.device)
    position = ((coords + 1) / 2 * (sides - 1)).clamp(min=0).minimum(sides - 1)
    low = position.floor().minimum((sides - 2).clamp(min=0))
    (x, y), (right, below) = low.long().unbind(-1), (position - low).unbind(-1)
    first = torch.arange(count, device=maps.device) if images is None else images
    corner = first[:, None] * (height * width) + y * width + x
    dx, dy = int(width > 1), width * int(height > 1)
    corners = torch.stack([corner, corner + dx, corner + dy, corner + dx + dy], -1)
    shares = torch.stack([(1 - right) * (1 - below), right * (1 - below), (1 - right) * below, right * below], -1)
    values = F.embedding_bag(corners.flatten(0, 1), cells, per_sample_weights=shares.flatten(0, 1), mode="sum")
    return values.view(*coords.shape[:2], channels)


def random_coords(batch: int, points: int, generator: Generator | None = None) -> Tensor:
    """Uniform random points in [-1, 1], (batch, points, points, 2)."""
    return torch.rand(batch, points, points, 2, generator=generator) * 2 - 1


def negative_permutation(batch: int, generator: Generator | None = None) -> Tensor:
    """A random partner of each image of a batch, never the image itself: a random cycle, int64 (batch,)."""
    order = torch.randperm(batch, generator=generator)
    return torch.empty_like(order).scatter_(0, order, order.roll(1))


def published_permutation(batch: int, generator: Generator) -> Tensor:
    """Random partners (batch,) as in the published code: fixed points of a permutation move to the next image."""
    order = torch.randperm(batch, generator=generator)
    return (order + (order == torch.arange(batch))) % batch


def upsample(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear upsampling without aligned corners: (B, C, h, w) -> (B, C, H, W).

    Two matrix products, four times faster than `F.interpolate` on a CPU.
    """
    rows, columns = (interpolation(cells, pixels).to(maps) for cells, pixels in zip(maps.shape[-2:], size, strict=True))
    return rows @ (maps @ columns.T)


@lru_cache(maxsize=64)  # limited, because the images of a folder may have many sizes
@torch.inference_mode(False)  # so that training can use a matrix cached during inference
def interpolation(cells: int, pixels: int) -> Tensor:
    """Matrix of linear interpolation from cells to pixels of a line, (pixels, cells)."""
    identity = torch.eye(cells, dtype=torch.float32)[None]
    return F.interpolate(identity, pixels, mode="linear", align_corners=False)[0].T.contiguous()
