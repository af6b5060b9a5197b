"""The trained parts: segmentation head, cluster probe, linear probe. The backbone is not among them."""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .loss import Whole, alone, upsample


class ChannelDropout(nn.Dropout2d):
    """Channel dropout whose masks are the same whether one process has the whole batch or several have a share each.

    rank, count: which share of how many the input is. Masks of the whole batch are drawn from the global generator, as
    `nn.Dropout2d` draws them, and this share's taken.
    """

    rank, count = 0, 1

    def forward(self, features: Tensor) -> Tensor:
        """(B, C, h, w), while training with some channels of each image at zero and the others scaled up."""
        if not self.training or self.p == 0:
            return features
        batch, channels = features.shape[:2]
        mask = features.new_empty(batch * self.count, channels, 1, 1).bernoulli_(1 - self.p).div_(1 - self.p)
        return features * mask[batch * self.rank : batch * (self.rank + 1)]


if TYPE_CHECKING:
    from .experiment import Experiment

ALPHA = 2.0
"""Scale of the cosines in the cluster probe's softmax. It matters only through the CRF."""


class SegmentationHead(nn.Module):
    """Turns features (B, C, h, w) into codes (B, K, h, w) with 1 x 1 convolutions (paper, section 3.4).

    kind 'nonlinear': a linear branch plus a two-layer ReLU branch; 'linear': the first alone; 'none': the features
    are the code (K = C). While training, each branch's input goes through channel dropout.
    """

    def __init__(self, in_dim: int, code_dim: int, kind: str = "nonlinear", dropout: float = 0.1):
        super().__init__()
        self.kind = kind
        self.code_dim = in_dim if kind == "none" else code_dim
        self.dropout = ChannelDropout(dropout)
        if kind != "none":
            self.linear = nn.Conv2d(in_dim, code_dim, 1)
        if kind == "nonlinear":
            self.nonlinear = nn.Sequential(nn.Conv2d(in_dim, in_dim, 1), nn.ReLU(), nn.Conv2d(in_dim, code_dim, 1))

    def forward(self, features: Tensor) -> Tensor:
        """Codes (B, K, h, w), not normalized."""
        if self.kind == "none":
            return features
        code = self.linear(self.dropout(features))
        if self.kind == "nonlinear":
            code = code + self.nonlinear(self.dropout(features))
        return code


class ClusterProbe(nn.Module):
    """Cosine k-means by gradient descent: one direction a cluster (paper, section 3.4)."""

    def __init__(self, code_dim: int, n_clusters: int):
        super().__init__()
        self.clusters = nn.Parameter(torch.randn(n_clusters, code_dim))

    def forward(self, code: Tensor) -> Tensor:
        """Cosine of each code with each cluster: (B, K, h, w) -> (B, n, h, w) in [-1, 1]."""
        return self.similarity(F.normalize(code, dim=1))

    def similarity(self, code: Tensor) -> Tensor:
        """Like `forward`, but times the code's length, (B, n, h, w): the largest is the same, and it is linear in the code.

        So it may be upsampled in place of the code: the same clusters, at the cost of n channels rather than K.
        """
        return torch.einsum("bkhw,nk->bnhw", code, F.normalize(self.clusters, dim=1))

    def loss(self, code: Tensor, alpha: float | None = None) -> Tensor:
        """Minus the mean cosine of a code with its nearest cluster; with `alpha`, with all, by softmax(alpha * cosine)."""
        cosine = self(code)
        if alpha is None:
            return -cosine.amax(1).mean()
        return -((alpha * cosine).softmax(1) * cosine).sum(1).mean()

    def log_probabilities(self, code: Tensor, alpha: float = ALPHA) -> Tensor:
        """log softmax(alpha * cosine), (B, n, h, w)."""
        return (alpha * self(code)).log_softmax(1)


class LinearProbe(nn.Module):
    """A linear classifier on the code, trained with labels: it measures the code and never shapes it.

    A run without training labels leaves it at zero (`forget`), so that nobody takes its guesses for scores.
    """

    def __init__(self, code_dim: int, n_classes: int):
        super().__init__()
        self.classifier = nn.Conv2d(code_dim, n_classes, 1)

    def forward(self, code: Tensor) -> Tensor:
        """Logits: (B, K, h, w) -> (B, n, h, w)."""
        return self.classifier(code)

    @property
    def trained(self) -> bool:
        """Whether it has ever seen labels."""
        return bool(self.classifier.weight.any())

    def forget(self) -> None:
        """Sets all weights to zero: it knows nothing."""
        for parameter in self.parameters():
            torch.nn.init.zeros_(parameter)

    def loss(self, code: Tensor, label: Tensor, average: Whole = alone) -> Tensor:
        """Cross-entropy at label resolution; label (B, H, W), ids outside [0, n) are ignored.

        Logits are upsampled bilinearly. A batch without a labeled pixel gives 0, not NaN. `average`: mean over those who
        share the batch, so that the mean of their losses is that of the batch.
        """
        logits = self(code)
        counted = (label >= 0) & (label < logits.shape[1])
        target = torch.where(counted, label, -1)
        together = 1 if logits.device.type == "cpu" else len(logits)  # what stays in the cache goes twice as fast
        total = sum(
            F.cross_entropy(upsample(some, label.shape[-2:]), wanted, ignore_index=-1, reduction="sum")
            for some, wanted in zip(logits.split(together), target.split(together), strict=True)
        )
        pixels = average(counted.sum().float())
        return total / pixels.where(pixels > 0, 1)


class Stego(nn.Module):
    """Head and probes together, with the mean that is taken off the features (zeros if none is).

    With `decoder`, a 1 x 1 convolution that rebuilds the features from the code, for the optional reconstruction loss.
    """

    def __init__(
        self,
        in_dim: int,
        code_dim: int,
        n_classes: int,
        *,
        head: str = "nonlinear",
        dropout: float = 0.1,
        extra_clusters: int = 0,
        decoder: bool = False,
    ):
        super().__init__()
        self.head = SegmentationHead(in_dim, code_dim, head, dropout)
        self.cluster_probe = ClusterProbe(self.head.code_dim, n_classes + extra_clusters)
        self.linear_probe = LinearProbe(self.head.code_dim, n_classes)
        if decoder:
            self.decoder = nn.Conv2d(self.head.code_dim, in_dim, 1)
        self.register_buffer("feature_mean", torch.zeros(1, in_dim, 1, 1))

    def centered(self, features: Tensor) -> Tensor:
        """Features less the dataset's mean, (B, C, h, w)."""
        return features - self.feature_mean

    def forward(self, features: Tensor) -> Tensor:
        """Frozen features (B, C, h, w) -> codes (B, K, h, w)."""
        return self.head(self.centered(features))


def build_model(experiment: "Experiment", in_dim: int, n_classes: int) -> Stego:
    """A model with fresh weights drawn from the experiment's seed."""
    with torch.random.fork_rng([]):  # the CPU's generator alone: weights are drawn there
        torch.default_generator.manual_seed(experiment.seed)
        return Stego(
            in_dim,
            experiment.code_dim,
            n_classes,
            head=experiment.head,
            dropout=experiment.dropout,
            extra_clusters=experiment.extra_clusters,
            decoder=experiment.rec_weight > 0,
        )


def mean_code(model: Stego, features: Tensor, mirrored: Tensor | None) -> Tensor:
    """Code of the features (B, C, h, w), averaged with the turned-back code of the mirrored images' features if given."""
    device = model.feature_mean.device
    if mirrored is None:
        return model(features.to(device))
    code, turned = model(torch.cat([features, mirrored]).to(device)).chunk(2)
    return 0.5 * (code + turned.flip(-1))
