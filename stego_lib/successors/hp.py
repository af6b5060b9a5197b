"""HP (Seong et al., CVPR 2023, "Leveraging Hidden Positives for Unsupervised Semantic Segmentation").

A patch attracts its hidden positives: patches of the batch that are more similar to it than all patches in a random
pool. A second set of positives comes from a moving average of the head, with increasing weight during training.

Shapes: maps (B, C, h, w); patches (M, C) of unit length, M = B h w in the order image, row, column; pairs (M, M) as
(anchor, patch). Formulas follow the released code (hynnsk/HP, commit 8913644) and are tested against its numbers.
Features are computed once, so the consistency with color-augmented images is omitted.
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
from ..utils.errors import explained
from ..utils.progress import progress
from ..utils.torch_state import drawing
from .base import Successor, at_cells, random_cells, unit_patches, update_ema, weighted_info_nce

# Temperature tau and share rho of random negatives (released code).
COCOSTUFF, STREETS, AERIAL = dict(tau=0.8, rho=0.02), dict(tau=0.6, rho=0.02), dict(tau=0.4, rho=1.0)
# Dataset -> its settings. The authors used cocostuff27, cityscapes and potsdam3; other datasets use the most similar.
SETTINGS = dict.fromkeys(("cocostuff27", "cocostuff15", "cocostuff3", "scenes", "folder"), COCOSTUFF)
SETTINGS |= dict.fromkeys(("cityscapes", "camvid", "labelmefacade"), STREETS) | {"potsdam3": AERIAL}
# Patches in a reference pool, and steps between its renewals (released code).
POOL_SIZE, RENEWAL = 2048, 100
# Decay of the moving average of the head; weight decay of AdamW; maximum norm of the gradient (released code).
DECAY, WEIGHT_DECAY, CLIP = 0.99, 0.1, 10.0
# Random cells per image and step, as many as STEGO's points. The released code uses all, minutes per step on a CPU.
POSITIONS = 121
# Share of the steps without positives of the averaged head, 1000 of about 2326 (released code, CocoStuff).
WARMUP = 0.43


@torch.no_grad()
def reference_pools(feats: Tensor, ema_head: nn.Module, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Unit features (Q, C) and codes (Q, K) of a random patch of each image (Q, C, h, w) (paper, section 3.2)."""
    cells = torch.randint(feats[0, 0].numel(), (len(feats), 1), generator=generator).to(feats.device)
    patches = at_cells(feats, cells)
    return unit_patches(patches), unit_patches(ema_head(patches))


def thresholds(patches: Tensor, pool: Tensor) -> Tensor:
    """Cosine of each patch with the most similar patch of a pool (paper, section 3.2): (M, C), (Q, C) -> (M,)."""
    return (patches @ pool.T).amax(1)


def hidden_positives(patches: Tensor, threshold: Tensor) -> Tensor:
    """Pairs of different patches with a cosine above the threshold of one of them (paper, section 3.2).

    (M, C), (M,) -> bool (M, M).

    Examples
    --------
    >>> patches, pool = unit_patches(torch.rand(2, 384, 8, 8)), unit_patches(torch.rand(20, 384, 1, 1))
    >>> hidden_positives(patches, thresholds(patches, pool)).shape
    torch.Size([128, 128])
    """
    cosine = patches @ patches.T
    return ((cosine > threshold[:, None]) | (cosine > threshold)).fill_diagonal_(False)


def hp_loss(
    feats: Tensor, code_ema: Tensor, z: Tensor, z_local: Tensor, pools: tuple[Tensor, Tensor], negatives: Tensor,
    lam: float, tau: float,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """Half the sum of the global and the local contrastive loss, mean over images (paper, sections 3.2 and 3.3).

    The weight of a pair is 1 for a feature positive plus `lam` for a positive of the averaged head. As in the released
    code, anchors without a feature positive are ignored, positives of the averaged head are not in the denominator, and
    the loss is multiplied by tau / 0.07. Memory grows with M squared; for large batches pass maps of P random cells,
    (B, C, P, 1). Returns also the detached parts "loss_global" and "loss_local" of each image, (B,).

    Parameters
    ----------
    feats, code_ema
        Frozen features (B, C, h, w), and codes of the averaged head (B, K, h, w) without gradient.
    z, z_local
        `unit_patches` (M, D) of the projected codes, without and with `local_mix`.
    pools, negatives
        `reference_pools`, and random pairs in the denominator of every image, bool (h w, M).
    lam, tau
        `ema_weight`, in [0, 1], and temperature.

    Examples
    --------
    >>> feats, code_ema, z = torch.rand(2, 384, 8, 8), torch.rand(2, 70, 8, 8), unit_patches(torch.rand(2, 64, 8, 8))
    >>> pools = unit_patches(torch.rand(9, 384, 1, 1)), unit_patches(torch.rand(9, 70, 1, 1))
    >>> loss, parts = hp_loss(feats, code_ema, z, z, pools, torch.rand(64, 128) < 0.02, lam=0.5, tau=0.8)
    """
    with torch.no_grad():
        positives, positives_ema = (
            hidden_positives(patches, thresholds(patches, pool))
            for patches, pool in zip((unit_patches(feats), unit_patches(code_ema)), pools, strict=True)
        )
        allowed = (positives | negatives.repeat(len(feats), 1)).fill_diagonal_(False)
        weights = (positives + lam * positives_ema) * positives.any(1, keepdim=True)
    shape, parts = (len(feats), -1, len(z)), {}
    for name, codes in (("loss_global", z), ("loss_local", z_local)):
        images = [pairs.view(shape) for pairs in (codes @ codes.T / tau, weights, allowed)]
        parts[name] = tau / 0.07 * torch.stack([weighted_info_nce(*image) for image in zip(*images, strict=True)])
    loss = (parts["loss_global"] + parts["loss_local"]).mean() / 2
    return loss, {name: part.detach() for name, part in parts.items()}


def ema_weight(step: int, steps: int) -> float:
    """Weight of the averaged head's positives: 0 for `WARMUP` of the steps, then linear to 1 (released code)."""
    warmup = round(WARMUP * steps)
    return 0.0 if step <= warmup else (step - warmup) / (steps - warmup)


def neighbor_cells(height: int, width: int) -> Tensor:
    """3 x 3 neighborhood of each cell, int64 (h w, 9), row-major; the index h w means outside the grid."""
    cells = torch.arange(height * width, dtype=torch.float32).view(1, 1, height, width)
    return F.unfold(F.pad(cells, (1, 1, 1, 1), value=height * width), 3)[0].T.long()


def attention_weights(attention: Tensor, grid: tuple[int, int], sigma: float | None = None) -> Tensor:
    """Weights of the 3 x 3 neighbors for `local_mix` in one image (paper, section 3.3): (h w, 9), 0 outside the grid.

    attention: softmax attention of the last block, (heads, tokens, tokens) as (query, key); the last h w tokens are
    patches. It is averaged over heads, clipped to the 10 % and 90 % quantiles of each patch, passed through a softmax
    over all patches, set to 0 below the mean, and divided by the number of neighbors in the grid. sigma: a factor, by
    default h w / 28, the released constant 28 for 28 x 28 patches.
    """
    cells, neighbors = grid[0] * grid[1], neighbor_cells(*grid).to(attention.device)
    shares = attention[:, -cells:, -cells:].float().mean(0)
    low, high = shares.quantile(torch.tensor([0.1, 0.9], device=shares.device), 1)[..., None]
    shares = (cells / 28 if sigma is None else sigma) * shares.clamp(low, high).softmax(1)
    shares = torch.where(shares < shares.mean(1, keepdim=True), 0, shares)
    return F.pad(shares, (0, 1)).gather(1, neighbors) / (neighbors < cells).sum(1, keepdim=True)


def local_mix(code: Tensor, weights: Tensor, cells: Tensor) -> Tensor:
    """Weighted sum of codes over the 3 x 3 neighbors of some cells (paper, section 3.3).

    code (B, K, h, w), weights (B, h w, 9) of `attention_weights`, cells int64 (B, P) -> (B, K, P, 1).
    """
    neighbors = neighbor_cells(*code.shape[2:]).to(cells.device)[cells]
    padded = F.pad(code.flatten(2), (0, 1))  # the last column, for outside the grid, is 0
    index = neighbors.flatten(1)[:, None].expand(-1, code.shape[1], -1)
    shares = weights.gather(1, cells[..., None].expand(-1, -1, 9))
    return (padded.gather(2, index).unflatten(2, neighbors.shape[1:]) * shares[:, None]).sum(3, keepdim=True)


class Trainer(Successor):
    """Trains the head with hidden positives. `SETTINGS` of the dataset are recorded in correspondences.json."""

    stored = ("pool_feats", "pool_codes", "average", "project")
    logged = ("loss_global", "loss_local", "lambda")

    def __init__(self, run: Run, features: Features, neighbors: Tensor):
        super().__init__(run, features, neighbors)
        head = self.model.head
        with drawing(self.experiment.seed):
            self.project = nn.Conv2d(head.code_dim, head.code_dim, 1).to(self.device)
        self.average = copy.deepcopy(head).eval().requires_grad_(False)
        parameters = [*head.parameters(), *self.project.parameters()]
        self.optimizer = torch.optim.AdamW(parameters, self.experiment.lr_head, weight_decay=WEIGHT_DECAY)
        self.settings = SETTINGS[self.experiment.dataset]
        self.mix = self.cached(self._attention_weights, "attention")

    def begin(self) -> dict[str, Any]:
        self.pool_feats, self.pool_codes = self._draw_pools(0)
        return super().begin() | self.settings

    def step(self, number: int) -> dict[str, float]:
        rows, feats, generator = self.draw(number)
        if number and number % RENEWAL == 0:
            self.pool_feats, self.pool_codes = self._draw_pools(number)
        with torch.no_grad():
            code_ema = self.average(feats)
        code = self.model.head(feats)
        update_ema(self.average, self.model.head, DECAY)  # before the head's update, as in the released code
        cells = random_cells(feats, POSITIONS, generator)
        mixed = local_mix(code, torch.from_numpy(self.mix[rows.numpy()]).float().to(self.device), cells)
        z, z_local = (unit_patches(self.project(maps)) for maps in (at_cells(code, cells), mixed))
        feats, code_ema = at_cells(feats, cells), at_cells(code_ema, cells)
        negatives = torch.rand(cells.shape[1], len(z), generator=generator) < self.settings["rho"]
        lam, tau = ema_weight(number, self.experiment.steps), self.settings["tau"]
        pools, negatives = (self.pool_feats, self.pool_codes), negatives.to(self.device)
        loss, parts = hp_loss(feats, code_ema, z, z_local, pools, negatives, lam, tau)
        return self.update(loss, {name: part.mean() for name, part in parts.items()} | {"lambda": lam}, CLIP)

    def _draw_pools(self, number: int) -> tuple[Tensor, Tensor]:
        """`reference_pools` of `POOL_SIZE` random images, or of several patches per image if there are fewer."""
        generator, count = seeded(self.experiment.seed, "pool", number), len(self.features)
        images = torch.randperm(count, generator=generator).repeat(POOL_SIZE // count + 1)[:POOL_SIZE]
        maps = (self.model.centered(self.features.rows(rows, self.device)) for rows in images.split(64))
        feats, codes = zip(*(reference_pools(batch, self.average, generator) for batch in maps), strict=True)
        return torch.cat(feats), torch.cat(codes)

    def _attention_weights(self) -> np.ndarray:
        """`attention_weights` of every training image, float16 (N, h w, 9)."""
        count, _, *grid = self.features.shape
        weights = torch.empty(count, grid[0] * grid[1], 9, dtype=torch.float16)
        for rows in progress(torch.arange(count).split(4), "attention of the training images"):
            attention = block_attention(self.run.backbone, self.features.image_rows(rows))
            for row, image in zip(rows.tolist(), attention, strict=True):
                weights[row] = attention_weights(image, (grid[0], grid[1])).half()
        return weights.numpy()


@torch.inference_mode()
def block_attention(backbone: Backbone, images: Tensor) -> Tensor:
    """Softmax attention of the block of the features: uint8 (B, 3, H, W) -> (B, heads, tokens, tokens)."""
    problem = f"method='hp' needs attention, which backbone {backbone.name!r} does not have"
    with explained((AttributeError, IndexError, TypeError), problem, "Use a ViT such as DINO's."):
        attention = backbone.vit.blocks[backbone.block].attn
        fused, _ = attention.fused_attn, attention.attn_drop
    matrices: list[Tensor] = []
    attention.fused_attn = False  # fused attention does not store the matrix
    try:
        with attention.attn_drop.register_forward_pre_hook(lambda _, inputs: matrices.append(inputs[0])):
            backbone.maps(backbone.normalize(images))
    finally:
        attention.fused_attn = fused
    return matrices[0]
