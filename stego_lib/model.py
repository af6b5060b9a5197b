"""The trained modules: segmentation head, cluster probe, linear probe."""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .loss import upsample

if TYPE_CHECKING:
    from .experiment import Experiment

# Scale of the cosines in the cluster probe's softmax, which only affects the CRF.
ALPHA = 2.0
# Kind of head -> activation of its two-layer branch.
ACTIVATIONS = {"nonlinear": nn.ReLU, "silu": nn.SiLU}


class ChannelDropout(nn.Dropout2d):
    """`nn.Dropout2d` that draws from `generator` if it is set, so that runs in several threads are reproducible."""

    generator: torch.Generator | None = None

    def forward(self, features: Tensor) -> Tensor:
        if self.generator is None or not self.training or not self.p:
            return super().forward(features)
        kept = features.new_empty(*features.shape[:2], 1, 1).bernoulli_(1 - self.p, generator=self.generator)
        return features * kept.div_(1 - self.p)


class SegmentationHead(nn.Module):
    """1 x 1 convolutions from features (B, C, h, w) to codes (B, K, h, w) (paper, section 3.4).

    In training, channel dropout is applied to the input of each branch.

    Parameters
    ----------
    in_dim, code_dim
        C and K.
    kind
        'nonlinear': sum of a linear branch and a two-layer ReLU branch, as in the paper; 'silu': the same with SiLU, as
        in SmooSeg; 'linear': only the linear branch; 'none': the features are the code (K = C).
    dropout
        Probability that a channel is dropped.

    Examples
    --------
    >>> SegmentationHead(384, 70)(torch.rand(2, 384, 28, 28)).shape
    torch.Size([2, 70, 28, 28])
    """

    def __init__(self, in_dim: int, code_dim: int, kind: str = "nonlinear", dropout: float = 0.1):
        super().__init__()
        self.kind = kind
        self.code_dim = in_dim if kind == "none" else code_dim
        self.dropout = ChannelDropout(dropout)
        if kind != "none":
            self.linear = nn.Conv2d(in_dim, code_dim, 1)
        if kind in ACTIVATIONS:
            layers = nn.Conv2d(in_dim, in_dim, 1), ACTIVATIONS[kind](), nn.Conv2d(in_dim, code_dim, 1)
            self.nonlinear = nn.Sequential(*layers)

    def forward(self, features: Tensor) -> Tensor:
        """Returns codes (B, K, h, w), not normalized."""
        if self.kind == "none":
            return features
        code = self.linear(self.dropout(features))
        if self.kind in ACTIVATIONS:
            code = code + self.nonlinear(self.dropout(features))
        return code


class ClusterProbe(nn.Module):
    """Cosine k-means by gradient descent (paper, section 3.4). lengths: do not normalize the centers (PriMaPs)."""

    def __init__(self, code_dim: int, n_clusters: int, lengths: bool = False):
        super().__init__()
        self.lengths = lengths
        self.clusters = nn.Parameter(torch.randn(n_clusters, code_dim))

    def forward(self, code: Tensor) -> Tensor:
        """Cosine of each code with each cluster: (B, K, h, w) -> (B, n, h, w)."""
        return self.similarity(F.normalize(code, dim=1))

    def similarity(self, code: Tensor) -> Tensor:
        """`forward` times the length of the code, (B, n, h, w): linear in the code, so it can be upsampled instead."""
        return torch.einsum("bkhw,nk->bnhw", code, self.clusters if self.lengths else F.normalize(self.clusters, dim=1))

    def loss(self, code: Tensor, alpha: float | None = None) -> Tensor:
        """Negative mean cosine with the nearest cluster, or with all clusters weighted by softmax(alpha * cosine)."""
        cosine = self(code)
        if alpha is None:
            return -cosine.amax(1).mean()
        return -((alpha * cosine).softmax(1) * cosine).sum(1).mean()

    def log_probabilities(self, code: Tensor, alpha: float = ALPHA) -> Tensor:
        """log softmax(alpha * cosine), (B, n, h, w)."""
        return (alpha * self(code)).log_softmax(1)


class LinearProbe(nn.Module):
    """A linear classifier of the code, trained with labels. It measures the code and does not influence it.

    Without training labels, its weights are zero (`forget`).
    """

    def __init__(self, code_dim: int, n_classes: int):
        super().__init__()
        self.classifier = nn.Conv2d(code_dim, n_classes, 1)

    def forward(self, code: Tensor) -> Tensor:
        """Logits: (B, K, h, w) -> (B, n, h, w)."""
        return self.classifier(code)

    @property
    def trained(self) -> bool:
        """Whether it was trained with labels."""
        return bool(self.classifier.weight.any())

    def forget(self) -> None:
        """Sets all weights to zero."""
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def loss(self, code: Tensor, label: Tensor) -> Tensor:
        """Cross-entropy of upsampled logits with labels (B, H, W); ids outside [0, n) are ignored; 0 without labels."""
        logits = self(code)
        counted = (label >= 0) & (label < logits.shape[1])
        target = torch.where(counted, label, -1)
        height, width = label.shape[-2:]
        chunk = 1 if logits.device.type == "cpu" else len(logits)  # one image fits the cache of a CPU
        losses = [
            F.cross_entropy(upsample(scores, (height, width)), ids, ignore_index=-1, reduction="sum")
            for scores, ids in zip(logits.split(chunk), target.split(chunk), strict=True)
        ]
        return sum(losses, logits.new_zeros(())) / counted.sum().clamp(min=1)


class Stego(nn.Module):
    """Head and probes, and the mean that is subtracted from features (0 by default).

    decoder: add a 1 x 1 convolution from codes to features for the reconstruction loss. lengths: see `ClusterProbe`.
    """

    feature_mean: Tensor

    def __init__(
        self, in_dim: int, code_dim: int, n_classes: int, *, head: str = "nonlinear", dropout: float = 0.1,
        extra_clusters: int = 0, decoder: bool = False, lengths: bool = False,
    ):  # fmt: skip
        super().__init__()
        self.head = SegmentationHead(in_dim, code_dim, head, dropout)
        self.cluster_probe = ClusterProbe(self.head.code_dim, n_classes + extra_clusters, lengths)
        self.linear_probe = LinearProbe(self.head.code_dim, n_classes)
        if decoder:
            self.decoder = nn.Conv2d(self.head.code_dim, in_dim, 1)
        self.register_buffer("feature_mean", torch.zeros(1, in_dim, 1, 1))

    @property
    def n_clusters(self) -> int:
        """Number of clusters, including extra ones."""
        return len(self.cluster_probe.clusters)

    def centered(self, features: Tensor) -> Tensor:
        """Features minus the dataset's mean, (B, C, h, w)."""
        return features - self.feature_mean

    def forward(self, features: Tensor) -> Tensor:
        """Frozen features (B, C, h, w) -> codes (B, K, h, w)."""
        return self.head(self.centered(features))

    def mean_code(self, features: Tensor, flipped: Tensor | None = None) -> Tensor:
        """Codes (B, K, h, w), averaged with those of the features of horizontally flipped images, if given."""
        device = self.feature_mean.device
        if flipped is None:
            return self(features.to(device))
        return mean_over_flips(*self(torch.cat([features, flipped]).to(device)).chunk(2))


def mean_over_flips(maps: Tensor, flipped: Tensor | None = None) -> Tensor:
    """Mean of maps (B, C, h, w) and of those of the horizontally flipped images, if these are given."""
    return maps if flipped is None else 0.5 * (maps + flipped.flip(-1))


def build_model(experiment: "Experiment", in_dim: int, n_classes: int) -> Stego:
    """Creates a model with random weights from the experiment's seed. in_dim: channels of the features."""
    from .utils.torch_state import drawing

    official = experiment.official
    with drawing(experiment.seed):
        return Stego(
            in_dim, experiment.code_dim, n_classes, head=experiment.head, dropout=experiment.dropout,
            extra_clusters=official.extra_clusters, decoder=official.rec_weight > 0,
            lengths=experiment.method == "primaps",
        )  # fmt: skip
