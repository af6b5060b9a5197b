"""The baseline: a plain re-implementation of the published order of work. The library does not import it.

Unlike the library, it runs the frozen backbone on image and neighbor at every step, in float32, with an explicit
attention matrix; resizes logits to full size before selecting the labeled pixels; samples and normalizes the maps
separately for each part of the loss; and has three optimizers. Evaluation processes one image at a time and its mirror
image in a separate pass, resizes codes to full size before the probes, and runs the CRFs one after another.
"""

import copy

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from stego_lib import Backbone
from stego_lib.crf import APPEARANCE, ITERATIONS, SMOOTHNESS
from stego_lib.model import Stego


class Published:
    """Copies of `backbone` and `model`, used in the published order of work."""

    def __init__(self, backbone: Backbone, model: Stego, weights: tuple, shifts: tuple, *, centering: bool = True):
        self.vit = copy.deepcopy(backbone.vit).float()
        for block in self.vit.blocks:
            block.attn.fused_attn = False  # timm then forms softmax(Q K^T) and multiplies it with V
        self.normalize = backbone.normalize
        self.model = copy.deepcopy(model).float()
        self.weights, self.shifts, self.centering = weights, shifts, centering
        parts = ((self.model.head, 5e-4), (self.model.linear_probe, 5e-3), (self.model.cluster_probe, 5e-3))
        self.optimizers = [torch.optim.Adam(part.parameters(), lr=rate) for part, rate in parts]

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Patch tokens after the final norm, (B, C, h, w), of uint8 images (B, 3, H, W)."""
        tokens = self.vit.forward_features(self.normalize(images).float())[:, self.vit.num_prefix_tokens :]
        height, width = (side // self.vit.patch_embed.patch_size[0] for side in images.shape[-2:])
        return tokens.transpose(1, 2).reshape(len(images), -1, height, width)

    def step(self, images: Tensor, partners: Tensor, *rest: Tensor) -> dict[str, float]:
        """One training step on uint8 images and their neighbors."""
        return self.rest(self.features(images), self.features(partners), *rest)

    def rest(
        self, feats: Tensor, feats_knn: Tensor, label: Tensor, coords1: Tensor, coords2: Tensor, permutations: Tensor
    ) -> dict[str, float]:
        """The training step without the backbone. Returns the losses."""
        self.model.train()
        head = self.model.head
        code, code_knn = head(feats), head(feats_knn)
        feats, feats_knn = head.dropout(feats), head.dropout(feats_knn)  # with separate masks, so the targets are noisy
        f1, c1 = sampled(feats, coords1), sampled(code, coords1)
        f2, c2 = sampled(feats_knn, coords2), sampled(code_knn, coords2)
        own = self.pair(f1, f1, c1, c1, self.shifts[0])
        knn = self.pair(f1, f2, c1, c2, self.shifts[1])
        random = [
            self.pair(f1, sampled(feats[p], coords2), c1, sampled(code[p], coords2), self.shifts[2])
            for p in permutations
        ]
        parts = {"self": own.mean(), "knn": knn.mean(), "rand": torch.cat(random).mean()}
        total = sum(weight * part for weight, part in zip(self.weights, parts.values(), strict=True))
        parts["linear"] = self.linear_loss(code.detach(), label)
        parts["cluster"] = self.cluster_loss(code.detach())
        total = total + parts["linear"] + parts["cluster"]
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        total.backward()
        for optimizer in self.optimizers:
            optimizer.step()
        return {"loss": total.item()} | {f"loss_{name}": part.item() for name, part in parts.items()}

    def pair(self, f1: Tensor, f2: Tensor, c1: Tensor, c2: Tensor, shift: float) -> Tensor:
        """The loss of each pair of points, (B, S, S, S, S)."""
        with torch.no_grad():
            target = correlation(f1, f2)
            if self.centering:
                mean = target.mean()
                target = target - target.mean((3, 4), keepdim=True)
                target = target - target.mean() + mean
        return -correlation(c1, c2).clamp(min=0) * (target - shift)

    def linear_loss(self, code: Tensor, label: Tensor) -> Tensor:
        """Cross-entropy of the labeled pixels, selected from logits at full size."""
        logits = F.interpolate(
            self.model.linear_probe.classifier(code), label.shape[-2:], mode="bilinear", align_corners=False
        )
        n_classes = logits.shape[1]
        logits, label = logits.permute(0, 2, 3, 1).reshape(-1, n_classes), label.reshape(-1)
        labeled = (label >= 0) & (label < n_classes)
        return F.cross_entropy(logits[labeled], label[labeled])

    def cluster_loss(self, code: Tensor) -> Tensor:
        """Minus the mean cosine of a code with its nearest cluster, computed with one-hot assignments."""
        clusters = F.normalize(self.model.cluster_probe.clusters, dim=1)
        cosine = torch.einsum("bkhw,nk->bnhw", F.normalize(code, dim=1), clusters)
        nearest = F.one_hot(cosine.argmax(1), len(clusters)).permute(0, 3, 1, 2).float()
        return -(nearest * cosine).sum(1).mean()

    @torch.no_grad()
    def code(self, image: Tensor) -> Tensor:
        """Code (1, K, h, w) of one uint8 image (1, 3, H, W): the mean over the image and its mirror image."""
        head = self.model.head.eval()
        return (head(self.features(image)) + head(self.features(image.flip(3))).flip(3)) / 2

    @torch.no_grad()
    def maps(self, code: Tensor, size: tuple[int, int]) -> dict[str, Tensor]:
        """Log-probabilities (n, H, W) of both probes; the code is resized first."""
        code = F.interpolate(code, size, mode="bilinear", align_corners=False)
        clusters = F.normalize(self.model.cluster_probe.clusters, dim=1)
        cosine = torch.einsum("bkhw,nk->bnhw", F.normalize(code, dim=1), clusters)
        linear = self.model.linear_probe.classifier(code)
        return {"cluster": (2 * cosine).log_softmax(1)[0], "linear": linear.log_softmax(1)[0]}


def sampled(maps: Tensor, coords: Tensor) -> Tensor:
    """Bilinear samples (B, C, S, S) of maps (B, C, h, w) at coords (B, S, S, 2)."""
    return F.grid_sample(maps, coords.permute(0, 2, 1, 3), padding_mode="border", align_corners=True)


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """Cosine similarity of all pairs of positions, (B, h, w, i, j)."""
    return torch.einsum("nchw,ncij->nhwij", F.normalize(a, dim=1, eps=1e-10), F.normalize(b, dim=1, eps=1e-10))


def crf(image: Tensor, log_probabilities: Tensor) -> np.ndarray:
    """Labels (H, W) after a separate CRF for one map of one image."""
    from pydensecrf.densecrf import DenseCRF2D
    from pydensecrf.utils import unary_from_softmax

    bgr = np.ascontiguousarray(image.permute(1, 2, 0).numpy()[:, :, ::-1])
    field = DenseCRF2D(bgr.shape[1], bgr.shape[0], len(log_probabilities))
    field.setUnaryEnergy(np.ascontiguousarray(unary_from_softmax(log_probabilities.softmax(0).numpy())))
    field.addPairwiseGaussian(**SMOOTHNESS)
    field.addPairwiseBilateral(rgbim=bgr, **APPEARANCE)
    return np.argmax(field.inference(ITERATIONS), axis=0).reshape(bgr.shape[:2])


def nearest(features: Tensor, top: int = 30) -> Tensor:
    """The `top` images with the largest cosine, the image itself first; 16 chunks of rows against all images."""
    unit = F.normalize(features, dim=1)
    return torch.cat([(rows @ unit.T).topk(top, dim=1).indices for rows in unit.chunk(16)])
