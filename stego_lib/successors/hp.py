"""HP (Seong et al., CVPR 2023, "Leveraging Hidden Positives for Unsupervised Semantic Segmentation"): pure functions.

A patch attracts its hidden positives: the patches of the batch that are more like it than anything in a pool of random
patches. A second set of positives comes from a moving average of the head, and counts more as training goes on.

Shapes: maps (B, C, h, w); patches (M, C) of unit length with M = B h w in the order image, row, column. `anchors` are the
A patches of one image whose loss is computed, int64 (A,), numbers below M. The formulas are those of the released code
(`loss.py`, `DinoFeaturizer.py` and `run.py`, commit 8913644), which the project's golden numbers replay.
"""

import copy
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backbone import Backbone
from ..batches import seeded
from ..features import Features
from ..run import Run
from ..utils.errors import StegoError
from ..utils.notices import notice
from ..utils.progress import progress
from .base import Successor, at_cells, random_cells, states

SETTINGS = {
    "cocostuff27": dict(tau=0.8, warmup=1000, rho=0.02),
    "cityscapes": dict(tau=0.6, warmup=50, rho=0.02),
    "potsdam": dict(tau=0.4, warmup=100, rho=1.0),
}
"""Published temperature, steps without EMA positives and share of random negatives, by dataset (released code)."""
POOL_SIZE, RENEWAL = 2048, 100
"""Patches in a reference pool, and the steps after which a new one is drawn (released code)."""
DECAY = 0.99
"""Decay of the moving average of the head (released code)."""
CONSISTENCY_WEIGHT = 0.05
"""Weight of `consistency_loss` in the total (released code)."""
CHUNK = 1 << 22
"""Pairs of patches that are in memory at once. Few are faster on a CPU, since they stay in its cache."""


def unit_patches(maps: Tensor) -> Tensor:
    """(B, C, h, w) -> patches (B h w, C) of unit length, in the order image, row, column."""
    return F.normalize(maps.permute(0, 2, 3, 1).flatten(0, 2), dim=1)


@torch.no_grad()
def reference_pools(feats: Tensor, ema_head: nn.Module, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """One random patch of each image, as a unit feature and as a unit code of the averaged head (paper, section 3.2).

    Published are `POOL_SIZE` images, drawn again every `RENEWAL` steps. Pools of parts of the images can be joined.

    Parameters
    ----------
    feats
        Features of random training images, (Q, C, h, w).
    ema_head
        Maps (Q, C, 1, 1) to codes (Q, K, 1, 1); in evaluation mode.
    generator
        Draws the patches.

    Returns
    -------
    tuple of Tensor
        (Q, C) and (Q, K).
    """
    images, cells = torch.arange(len(feats)), feats[0, 0].numel()
    patches = feats.flatten(2)[images, :, torch.randint(cells, (len(feats),), generator=generator)]
    return F.normalize(patches, dim=1), unit_patches(ema_head(patches[:, :, None, None]))


def thresholds(patches: Tensor, pool: Tensor) -> Tensor:
    """Cosine of each patch with the most similar one of a pool (paper, section 3.2): (M, C), (Q, C) -> (M,)."""
    return (patches @ pool.T).amax(1)


def hidden_positives(patches: Tensor, threshold: Tensor, anchors: Tensor) -> Tensor:
    """Pairs whose cosine is above the threshold of one of the two (paper, section 3.2); never a patch with itself.

    Parameters
    ----------
    patches, threshold
        (M, C) of unit length, and their `thresholds` (M,).
    anchors
        int64 (A,).

    Returns
    -------
    Tensor
        bool (A, M).

    Examples
    --------
    >>> patches = unit_patches(torch.rand(2, 384, 8, 8))
    >>> pool = unit_patches(torch.rand(20, 384, 1, 1))
    >>> hidden_positives(patches, thresholds(patches, pool), torch.arange(64)).shape
    torch.Size([64, 128])
    """
    cosine = patches[anchors] @ patches.T
    return without_self((cosine > threshold[anchors, None]) | (cosine > threshold), anchors)


def without_self(pairs: Tensor, anchors: Tensor) -> Tensor:
    """Sets the pair of each anchor with itself to False, in place: bool (A, M)."""
    return pairs.scatter_(1, anchors[:, None], False)


def random_negatives(anchors: int, patches: int, rho: float, generator: torch.Generator) -> Tensor:
    """Random pairs for the denominator, each with probability `rho` in [0, 1]: bool (A, M).

    As in the released code, a step draws them once, and they serve the anchors of every image.
    """
    return torch.rand(anchors, patches, generator=generator) < rho


def denominator(positives: Tensor, negatives: Tensor, anchors: Tensor) -> Tensor:
    """Pairs in the softmax: feature positives and random negatives, bool (A, M); never a patch with itself.

    As in the released code, positives of the averaged head are not among them unless drawn.
    """
    return without_self(positives | negatives, anchors)


def pair_weights(positives: Tensor, positives_ema: Tensor, lam: float) -> Tensor:
    """1 for a feature positive plus `lam` for one of the averaged head, (A, M) (paper, section 3.2).

    As in the released code, an anchor without a feature positive gets zeros and so drops out.
    """
    return (positives + lam * positives_ema) * positives.any(1, keepdim=True)


def anchor_losses(z: Tensor, anchors: Tensor, weights: Tensor, allowed: Tensor, tau: float) -> Tensor:
    """-sum_j w_ij log softmax_j(z_i z_j / tau) / sum_j w_ij of each anchor, (A,) (paper, section 3.2).

    Parameters
    ----------
    z
        Projected codes of unit length, (M, D).
    anchors
        int64 (A,).
    weights, allowed
        `pair_weights`, and the pairs in the softmax, see `denominator`: (A, M).
    tau
        Temperature.

    Returns
    -------
    Tensor
        0 for an anchor without a weight. It can be below 0, for a positive of the averaged head need not be allowed.
    """
    tiny = torch.finfo(z.dtype).tiny  # keeps the logarithm of a row without a pair finite
    logits, total = z[anchors] / tau @ z.T, weights.sum(1)
    spread = (logits.exp() * allowed).sum(1).clamp(min=tiny).log()  # cosines are small enough for a bare exponential
    return (total * spread - (weights * logits).sum(1)) / total.clamp(min=1)


def anchor_weights(weights: Tensor, *, reweight: bool = True) -> Tensor:
    """How much each anchor counts, (A,): the sum of its pair weights (A, M), "reweighting"; without it 1 if there is any."""
    return weights.sum(1) if reweight else weights.any(1).to(weights.dtype)


def hp_loss(
    feats: Tensor,
    code_ema: Tensor,
    z: Tensor,
    z_local: Tensor,
    pools: tuple[Tensor, Tensor],
    negatives: Tensor,
    lam: float,
    tau: float,
    *,
    reweight: bool = True,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Global and local contrastive loss of a batch (paper, sections 3.2 and 3.3): half the sum of both, mean over images.

    The loss of an image is tau / 0.07 times the mean of its `anchor_losses`, weighted by `anchor_weights`; 0 if nothing
    counts. The factor keeps the size of the gradient at other temperatures.

    Time grows with M squared. Where all positions take too long, give maps of P random ones, (B, C, P, 1), everywhere.

    Parameters
    ----------
    feats, code_ema
        Frozen features (B, C, h, w) and codes of the averaged head (B, K, h, w), both without gradient. Half precision is
        faster on a processor that has it, and moves pairs at the threshold.
    z, z_local
        `unit_patches` (M, D) of the projected codes, without and with `local_mix`.
    pools
        As `reference_pools` returns them, of the same precision as feats and code_ema.
    negatives
        `random_negatives`, bool (h w, M).
    lam
        `ema_weight` of this step, in [0, 1].
    tau
        Temperature.
    reweight
        As in `anchor_weights`.

    Returns
    -------
    tuple
        The loss, and its parts "loss_global" and "loss_local" of each image, (B,), without gradient.

    Examples
    --------
    >>> feats, code_ema = torch.rand(2, 384, 8, 8), torch.rand(2, 70, 8, 8)
    >>> z = unit_patches(torch.rand(2, 64, 8, 8))
    >>> pools = unit_patches(torch.rand(9, 384, 1, 1)), unit_patches(torch.rand(9, 70, 1, 1))
    >>> negatives = random_negatives(64, 128, 0.02, torch.Generator().manual_seed(0))
    >>> loss, parts = hp_loss(feats, code_ema, z, z, pools, negatives, lam=0.5, tau=0.8)
    >>> loss.shape, parts["loss_global"].shape
    (torch.Size([]), torch.Size([2]))
    """
    count, rows = len(feats), max(1, CHUNK // len(z))
    with torch.no_grad():
        views = [
            (unit, thresholds(unit, pool))
            for unit, pool in zip(map(unit_patches, (feats, code_ema)), pools, strict=True)
        ]
    # The (A, M) arrays of a batch would fill the memory, so each chunk of anchors gives its gradient at once.
    leaves = [codes.detach().requires_grad_() for codes in (z, z_local)]
    gradients, parts = [torch.zeros_like(leaf) for leaf in leaves], z.new_zeros(2, count)
    for image, patches in enumerate(torch.arange(len(z), device=z.device).chunk(count)):
        counted, slopes = z.new_zeros(()), [torch.zeros_like(leaf) for leaf in leaves]
        for anchors, drawn in zip(patches.split(rows), negatives.split(rows), strict=True):
            with torch.no_grad():
                positives, positives_ema = (hidden_positives(unit, limits, anchors) for unit, limits in views)
                weights, allowed = pair_weights(positives, positives_ema, lam), denominator(positives, drawn, anchors)
                counts = anchor_weights(weights, reweight=reweight)
            counted += counts.sum()
            for part, leaf, slope in zip(parts, leaves, slopes, strict=True):
                with torch.enable_grad():
                    loss = (counts * anchor_losses(leaf, anchors, weights, allowed, tau)).sum()
                    slope += torch.autograd.grad(loss, leaf)[0]
                part[image] += loss.detach()
        scale = tau / 0.07 / counted.clamp(min=1)  # an anchor that counts, counts 1 or more
        parts[:, image] *= scale
        for gradient, slope in zip(gradients, slopes, strict=True):
            gradient += slope * scale / (2 * count)
    handle = (z * gradients[0]).sum() + (z_local * gradients[1]).sum()  # has the gradient; its value is subtracted
    return parts.sum(0).mean() / 2 + (handle - handle.detach()), dict(
        zip(("loss_global", "loss_local"), parts, strict=True)
    )


def attention_weights(attention: Tensor, grid: tuple[int, int], sigma: float | None = None) -> Tensor:
    """How much of each of its 3 x 3 neighbors a patch takes on (paper, section 3.3). They depend on the frozen backbone alone.

    Attention, averaged over heads, is clipped at each patch's 10 % and 90 % quantiles, goes through a softmax over all patches,
    and is set to 0 below its mean; then it is divided by the number of neighbors inside the grid.

    Parameters
    ----------
    attention
        Softmax attention of the last block (B, heads, tokens, tokens), as (query, key); the patches are the last h w tokens.
    grid
        h and w.
    sigma
        Factor. h w / 28 by default: the released constant 28 at the 28 x 28 patches it was made for, and the same weights on
        average at other grids.

    Returns
    -------
    Tensor
        (B, 9, h, w), neighbors row by row, the patch itself fifth; 0 outside of the grid.

    Raises
    ------
    StegoError
        If there are fewer tokens than positions.
    """
    cells = grid[0] * grid[1]
    if attention.shape[-1] < cells:
        raise StegoError(
            f"the attention has {attention.shape[-1]} tokens, fewer than the {grid[0]} x {grid[1]} patches of the grid; "
            "give the grid of the features that came with it"
        )
    sigma = cells / 28 if sigma is None else sigma
    # Position of each neighbor; those outside of the grid point at an additional last column of zeros.
    numbered = torch.arange(cells, device=attention.device, dtype=torch.float32).view(1, 1, *grid)
    around = F.unfold(F.pad(numbered, (1, 1, 1, 1), value=cells), 3)[0].T.long()
    found = []
    for rows in attention[..., -cells:, -cells:]:
        rows = rows.float().mean(0)
        low, high = rows.quantile(torch.tensor([0.1, 0.9], device=rows.device), 1)[..., None]
        shares = sigma * rows.clamp(low, high).softmax(1)
        shares = torch.where(shares < shares.mean(1, keepdim=True), 0, shares)
        found.append(F.pad(shares, (0, 1)).gather(1, around))
    return (torch.stack(found) / (around < cells).sum(1, keepdim=True)).transpose(1, 2).unflatten(2, grid)


def similarity_weights(feats: Tensor) -> Tensor:
    """A stand-in for `attention_weights` where no attention is stored; it is not in the paper.

    Cosine of a patch and each of its 3 x 3 neighbors, 0 where negative, divided by the number of neighbors inside the grid.

    feats: (B, C, h, w) -> (B, 9, h, w) in [0, 1], in the order of `attention_weights`.
    """
    unit, sides = F.normalize(feats, dim=1), feats.shape[-2:]
    padded = F.pad(unit, (1, 1, 1, 1))
    shifted = [padded[..., y : y + sides[0], x : x + sides[1]] for y in range(3) for x in range(3)]
    cosines = torch.stack([(unit * neighbor).sum(1) for neighbor in shifted], 1)
    inside = F.avg_pool2d(torch.ones_like(feats[:1, :1]), 3, 1, 1, divisor_override=1)
    return cosines.clamp(min=0) / inside


def local_mix(code: Tensor, weights: Tensor, cells: Tensor | None = None) -> Tensor:
    """Sum of the codes of the 3 x 3 neighbors, weighted (paper, section 3.3): (B, K, h, w), (B, 9, h, w) -> (B, K, h, w).

    cells: positions of each image in row-major order, int64 (B, P), where it is wanted alone: -> (B, K, P, 1).
    """
    height, width = code.shape[2:]
    wanted = torch.arange(height * width, device=code.device).expand(len(code), -1) if cells is None else cells
    padded = F.pad(code, (1, 1, 1, 1)).flatten(2)
    corner = wanted // width * (width + 2) + wanted % width  # upper left neighbor, in the padded map
    shares = weights.flatten(2).gather(2, wanted[:, None].expand(-1, 9, -1))
    mixed = code.new_zeros(*code.shape[:2], wanted.shape[1])
    for number, share in enumerate(shares.unbind(1)):
        around = (corner + number // 3 * (width + 2) + number % 3)[:, None].expand(-1, code.shape[1], -1)
        mixed = mixed + padded.gather(2, around) * share[:, None]
    return mixed.view_as(code) if cells is None else mixed[..., None]


def consistency_loss(z: Tensor, z_augmented: Tensor) -> Tensor:
    """Mean distance of projected codes of images and of their color-augmented copies, both (M, D) (paper, section 3.4).

    It needs features of augmented images: training on stored features leaves it out (weight 0 for `CONSISTENCY_WEIGHT`).
    """
    return F.pairwise_distance(z, z_augmented).mean()


@torch.no_grad()
def update_ema(average: nn.Module, student: nn.Module, decay: float = DECAY) -> None:
    """Moves every parameter of `average` towards that of `student`: e <- decay e + (1 - decay) s, in place."""
    for e, s in zip(average.parameters(), student.parameters(), strict=True):
        e.lerp_(s, 1 - decay)


def ema_weight(step: int, steps: int, warmup: int) -> float:
    """Weight lambda of the averaged head's positives: 0 up to step `warmup`, then linear to 1 at `steps` (released code)."""
    return 0.0 if step <= warmup else (step - warmup) / (steps - warmup)


# ---------------------------------------------------------------------------------------------- training

POSITIONS = 121
"""Random positions of an image that a step sees, as many as STEGO's; the released code takes all, minutes a step on a CPU."""
WARMUP = 0.43
"""Share of the steps without EMA positives: 1000 of about 2326 (released code, CocoStuff)."""
WEIGHT_DECAY, CLIP = 0.1, 10.0
"""AdamW's weight decay, and the norm to which gradients are clipped (released code)."""


class Trainer(Successor):
    """Trains the head by hidden positives, on stored features and so without the consistency term.

    Temperature and random negatives are those of `SETTINGS` for the dataset, of CocoStuff for others. The attention of the
    training images is computed once and kept beside the features.
    """

    def __init__(self, run: Run, features: Features, neighbors: Tensor):
        super().__init__(run, features, neighbors)
        head, width = self.model.head, self.model.head.code_dim
        with torch.random.fork_rng([]):
            torch.default_generator.manual_seed(self.experiment.seed)
            self.project = nn.Linear(width, width).to(self.device)
        self.average = copy.deepcopy(head).eval().requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            [*head.parameters(), *self.project.parameters()], self.experiment.lr_head, weight_decay=WEIGHT_DECAY
        )
        self.settings = SETTINGS.get(self.experiment.dataset, SETTINGS["cocostuff27"])
        self.pools: tuple[Tensor, Tensor] | None = None
        self.neighborhood = self.beside_features(self._neighborhood, "attention")

    def columns(self) -> list[str]:
        return ["loss", "loss_global", "loss_local", "lambda"]

    def step(self, number: int) -> dict[str, float]:
        rows, feats, generator = self.draw(number)
        if number % RENEWAL == 0 or self.pools is None:
            self.pools = self._pools(number)
        with torch.no_grad():
            code_ema = self.average(feats)
        code = self.model.head(feats)
        update_ema(self.average, self.model.head)
        cells = random_cells(feats, POSITIONS, generator)
        mixed = local_mix(code, torch.from_numpy(self.neighborhood[rows.numpy()]).float().to(self.device), cells)
        feats, code_ema, code = (at_cells(one, cells) for one in (feats, code_ema, code))
        z, z_local = (unit_patches(projected(self.project, one)) for one in (code, mixed))
        negatives = random_negatives(len(z) // len(feats), len(z), self.settings["rho"], generator).to(self.device)
        lam = ema_weight(number, self.experiment.steps, round(WARMUP * self.experiment.steps))
        loss, parts = hp_loss(feats, code_ema, z, z_local, self.pools, negatives, lam, self.settings["tau"])
        values = {name: part.mean() for name, part in parts.items()} | {"lambda": torch.tensor(lam)}
        return self.update(loss, values, CLIP)

    def _pools(self, number: int) -> tuple[Tensor, Tensor]:
        """`reference_pools` of `POOL_SIZE` random images; of fewer images, with several patches of each."""
        generator = seeded(self.experiment.seed, "pool", number)
        images = torch.randperm(len(self.features), generator=generator).repeat(POOL_SIZE // len(self.features) + 1)
        parts = [
            reference_pools(self.model.centered(self.features.rows(rows, self.device)), self.average, generator)
            for rows in images[:POOL_SIZE].split(64)
        ]
        of_feats, of_codes = zip(*parts, strict=True)
        return torch.cat(of_feats), torch.cat(of_codes)

    def _neighborhood(self) -> np.ndarray:
        """Weights of the 3 x 3 neighbors of every training image, float16 (N, 9, h, w).

        By attention, or, with a notice, by similarity where the network shows none.
        """
        count, _, height, width = self.features.shape
        found = torch.empty(count, 9, height, width, dtype=torch.float16)
        try:
            for rows in progress(torch.arange(count).split(4), "attention of the training images"):
                attention = block_attention(self.run.backbone, self.features.image_rows(rows))
                found[rows] = attention_weights(attention, (height, width)).half().cpu()
        except StegoError as error:
            notice(f"{error}; HP mixes neighbors by the similarity of their features instead")
            for rows in torch.arange(count).split(64):
                found[rows] = similarity_weights(self.own_rows(rows)).half().cpu()
        return found.numpy()

    def state(self) -> dict[str, Any]:
        pools = {} if self.pools is None else {"pools": list(self.pools)}
        return states(average=self.average, project=self.project) | pools

    def restore(self, state: dict[str, Any]) -> None:
        self.average.load_state_dict(state["average"])
        self.project.load_state_dict(state["project"])
        if "pools" in state:
            of_feats, of_codes = (pool.to(self.device) for pool in state["pools"])
            self.pools = of_feats, of_codes


def projected(project: nn.Linear, code: Tensor) -> Tensor:
    """A linear layer on every position: (B, K, h, w) -> (B, D, h, w)."""
    return project(code.movedim(1, -1)).movedim(-1, 1)


@torch.inference_mode()
def block_attention(backbone: Backbone, images: Tensor) -> Tensor:
    """Softmax attention of the block that the features come from, (B, heads, tokens, tokens), of uint8 images (B, 3, H, W).

    Raises StegoError for a network whose attention cannot be read.
    """
    blocks = getattr(backbone.vit, "blocks", None)
    attention: Any = getattr(blocks[backbone.block], "attn", None) if blocks is not None else None
    if not hasattr(attention, "attn_drop") or not hasattr(attention, "fused_attn"):
        raise StegoError(f"the attention of backbone {backbone.name!r} cannot be read")
    seen: list[Tensor] = []
    fused, attention.fused_attn = attention.fused_attn, False  # the fused product never has the attention in memory
    try:
        with attention.attn_drop.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])):
            backbone.maps(backbone.normalize(images))
    finally:
        attention.fused_attn = fused
    return seen[0]
