"""The correspondence loss (paper, section 3.2), as pure functions of tensors and numbers."""

import torch
import torch.nn.functional as F
from torch import Tensor


def sample(maps: Tensor, coords: Tensor) -> Tensor:
    """Looks maps up at points between their grid cells (bilinear).

    maps: (B, C, h, w). coords: (B, S, S, 2) as (x, y) in [-1, 1], -1 and 1 being the centres of the first and last
    cell; points outside are moved to the border. Returns (B, C, S, S) whose [b, :, j, i] is the map at coords[b, i, j]
    (the two point axes are swapped, as in the published code; the loss does not mind).
    """
    return F.grid_sample(maps, coords.transpose(1, 2), padding_mode="border", align_corners=True)


def correspondence(a: Tensor, b: Tensor) -> Tensor:
    """Cosine of every position of `a` with every position of `b` (paper, equation 1).

    a: (B, C, h, w), b: (B, C, i, j); returns (B, h, w, i, j) in [-1, 1].
    """
    return torch.einsum("bchw,bcij->bhwij", F.normalize(a, dim=1, eps=1e-10), F.normalize(b, dim=1, eps=1e-10))


def centre(correspondences: Tensor) -> Tensor:
    """Spatial centring (paper, section 3.2): takes off each position's mean over the positions of the partner.

    correspondences: (B, h, w, i, j). As the published code does, the mean of the whole batch is put back, so the
    result depends on the batch and shifts keep their meaning.
    """
    mean = correspondences.mean()
    correspondences = correspondences - correspondences.mean(dim=(3, 4), keepdim=True)
    return correspondences - correspondences.mean() + mean


def correspondence_loss(
    feats1: Tensor,
    feats2: Tensor,
    code1: Tensor,
    code2: Tensor,
    shift: float,
    *,
    centering: bool = True,
    zero_clamp: bool = True,
    stabilize: bool = False,
) -> tuple[Tensor, Tensor]:
    """-(F - shift) * S for every pair of points (paper, equations 2 to 4), not yet averaged.

    feats1, feats2: frozen features at S x S points, (B, C, S, S); no gradient flows into them. code1, code2: codes at
    the same points, (B, K, S, S). `centering` centres F, `zero_clamp` uses max(S, 0), `stabilize` min(S, 0.8).
    Returns the loss and the code correspondences before clamping, both (B, S, S, S, S).
    """
    with torch.no_grad():
        features = correspondence(feats1, feats2)
        if centering:
            features = centre(features)
    codes = correspondence(code1, code2)
    clamped = codes
    if zero_clamp:
        clamped = clamped.clamp(min=0.0)
    if stabilize:
        clamped = clamped.clamp(max=0.8)
    return -clamped * (features - shift), codes


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
    **switches: bool,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The three-part loss (paper, equation 5): self, kNN and random pairs.

    feats, feats_knn: (B, C, h, w) of pictures and of their neighbours; code, code_knn: (B, K, h, w). coords1, coords2:
    (B, S, S, 2), see `sample`. permutations: int64 (negatives, B), the random partner of each picture. weights, shifts:
    (self, knn, rand). switches: as `correspondence_loss` takes them.
    Returns the weighted loss and its parts: mean loss and mean code correspondence of each of self, knn and rand.
    """
    f, c = sample(feats, coords1), sample(code, coords1)
    partners = {
        "self": [(f, c)],
        "knn": [(sample(feats_knn, coords2), sample(code_knn, coords2))],
        "rand": [(sample(feats[p], coords2), sample(code[p], coords2)) for p in permutations],
    }
    total, parts = code.new_zeros(()), {}
    for (kind, pairs), weight, shift in zip(partners.items(), weights, shifts, strict=True):
        terms = [correspondence_loss(f, f2, c, c2, shift, **switches) for f2, c2 in pairs]
        loss = torch.stack([term.mean() for term, _ in terms]).mean()
        total = total + weight * loss
        parts[f"loss_{kind}"] = loss.detach()
        parts[f"code_{kind}"] = torch.stack([codes.detach().mean() for _, codes in terms]).mean()
    return total, parts


def random_coords(batch: int, points: int, generator: torch.Generator) -> Tensor:
    """(batch, points, points, 2) positions, uniform in [-1, 1]."""
    return torch.rand(batch, points, points, 2, generator=generator) * 2 - 1


def negative_permutation(batch: int, generator: torch.Generator) -> Tensor:
    """A random partner for each picture of a batch, int64 (batch,): never itself, and every picture serves once.

    It is one random cycle through the batch. (The published code repeats some pictures: `published_permutation`.)
    """
    order = torch.randperm(batch, generator=generator)
    partner = torch.empty_like(order)
    partner[order] = order.roll(1)
    return partner


def published_permutation(batch: int, generator: torch.Generator) -> Tensor:
    """The published code's partners, int64 (batch,): never itself (batch > 1), but some pictures twice and others never.

    A permutation is drawn and its fixed points move on by one, the last to the first, whoever is there already.
    """
    order = torch.randperm(batch, generator=generator)
    return (order + (order == torch.arange(batch))) % batch
