"""The trained parts: segmentation head, cluster probe, linear probe. The backbone is not among them."""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .loss import upsample

if TYPE_CHECKING:
    from .experiment import Experiment

# Scale of the cosines in the cluster probe's softmax. It matters only through the CRF.
ALPHA = 2.0
# Activation of the head's two-layer branch, by kind of the head.
ACTIVATIONS = {"nonlinear": nn.ReLU, "silu": nn.SiLU}


class ChannelDropout(nn.Dropout2d):
    """`nn.Dropout2d` that draws from `generator` if it is set, so that threads do not disturb each other."""

    generator: torch.Generator | None = None

    def forward(self, features: Tensor) -> Tensor:
        if self.generator is None or not self.training or not self.p:
            return super().forward(features)
        kept = features.new_empty(*features.shape[:2], 1, 1).bernoulli_(1 - self.p, generator=self.generator)
        return features * kept.div_(1 - self.p)


class SegmentationHead(nn.Module):
    """1 x 1 convolutions from features (B, C, h, w) to codes (B, K, h, w) (paper, section 3.4).

    While training, the input of each branch goes through channel dropout.

    Parameters
    ----------
    in_dim, code_dim
        C and K.
    kind
        'nonlinear': a linear branch plus a two-layer ReLU branch, as in the paper; 'silu': SiLU for ReLU, as SmooSeg
        has it; 'linear': the first alone; 'none': the features are the code (K = C).
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
            self.nonlinear = nn.Sequential(
                nn.Conv2d(in_dim, in_dim, 1), ACTIVATIONS[kind](), nn.Conv2d(in_dim, code_dim, 1)
            )

    def forward(self, features: Tensor) -> Tensor:
        """Codes (B, K, h, w), not normalized."""
        if self.kind == "none":
            return features
        code = self.linear(self.dropout(features))
        if self.kind in ACTIVATIONS:
            code = code + self.nonlinear(self.dropout(features))
        return code


class ClusterProbe(nn.Module):
    """Cosine k-means by gradient descent (paper, section 3.4). `lengths` (PriMaPs): centers are not normalized."""

    def __init__(self, code_dim: int, n_clusters: int, lengths: bool = False):
        super().__init__()
        self.lengths = lengths
        self.clusters = nn.Parameter(torch.randn(n_clusters, code_dim))

    def forward(self, code: Tensor) -> Tensor:
        """Cosine of each code with each cluster: (B, K, h, w) -> (B, n, h, w), in [-1, 1] without `lengths`."""
        return self.similarity(F.normalize(code, dim=1))

    def similarity(self, code: Tensor) -> Tensor:
        """`forward` times the length of the code, (B, n, h, w).

        It is linear in the code, so n similarities can be upsampled instead of K code channels; the nearest cluster is
        the same.
        """
        return torch.einsum("bkhw,nk->bnhw", code, self.clusters if self.lengths else F.normalize(self.clusters, dim=1))

    def loss(self, code: Tensor, alpha: float | None = None) -> Tensor:
        """Minus the mean cosine with the nearest cluster, or with all clusters weighted by softmax(alpha * cosine)."""
        cosine = self(code)
        if alpha is None:
            return -cosine.amax(1).mean()
        return -((alpha * cosine).softmax(1) * cosine).sum(1).mean()

    def log_probabilities(self, code: Tensor, alpha: float = ALPHA) -> Tensor:
        """log softmax(alpha * cosine), (B, n, h, w)."""
        return (alpha * self(code)).log_softmax(1)


class LinearProbe(nn.Module):
    """A linear classifier on the code, trained with labels: it measures the code and never shapes it.

    Its weights are zero in a run without training labels (`forget`), so that nobody takes its guesses for scores.
    """

    def __init__(self, code_dim: int, n_classes: int):
        super().__init__()
        self.classifier = nn.Conv2d(code_dim, n_classes, 1)

    def forward(self, code: Tensor) -> Tensor:
        """Logits: (B, K, h, w) -> (B, n, h, w)."""
        return self.classifier(code)

    @property
    def trained(self) -> bool:
        """Whether it has seen labels."""
        return bool(self.classifier.weight.any())

    def forget(self) -> None:
        """Sets all weights to zero."""
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def loss(self, code: Tensor, label: Tensor) -> Tensor:
        """Cross-entropy at the resolution of the label (B, H, W); ids outside [0, n) are ignored.

        Logits are upsampled bilinearly. A batch without a labeled pixel gives 0.
        """
        logits = self(code)
        counted = (label >= 0) & (label < logits.shape[1])
        target = torch.where(counted, label, -1)
        chunk = 1 if logits.device.type == "cpu" else len(logits)  # one image stays in a CPU's cache: twice as fast
        total = sum(
            F.cross_entropy(upsample(some, label.shape[-2:]), wanted, ignore_index=-1, reduction="sum")
            for some, wanted in zip(logits.split(chunk), target.split(chunk), strict=True)
        )
        return total / counted.sum().clamp(min=1)


class Stego(nn.Module):
    """Head and probes, with the mean that is subtracted from the features (zeros by default).

    `decoder`: add a 1 x 1 convolution from codes to features, for the reconstruction loss; `lengths`: see
    `ClusterProbe`.
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
        lengths: bool = False,
    ):
        super().__init__()
        self.head = SegmentationHead(in_dim, code_dim, head, dropout)
        self.cluster_probe = ClusterProbe(self.head.code_dim, n_classes + extra_clusters, lengths)
        self.linear_probe = LinearProbe(self.head.code_dim, n_classes)
        if decoder:
            self.decoder = nn.Conv2d(self.head.code_dim, in_dim, 1)
        self.register_buffer("feature_mean", torch.zeros(1, in_dim, 1, 1))

    @property
    def n_clusters(self) -> int:
        """Clusters, extra ones included."""
        return len(self.cluster_probe.clusters)

    def centered(self, features: Tensor) -> Tensor:
        """Features minus the dataset's mean, (B, C, h, w)."""
        return features - self.feature_mean

    def forward(self, features: Tensor) -> Tensor:
        """Frozen features (B, C, h, w) -> codes (B, K, h, w)."""
        return self.head(self.centered(features))

    def mean_code(self, features: Tensor, flipped: Tensor | None = None) -> Tensor:
        """Codes (B, K, h, w), averaged with those of the horizontally flipped images where their features are given."""
        device = self.feature_mean.device
        if flipped is None:
            return self(features.to(device))
        code, of_flipped = self(torch.cat([features, flipped]).to(device)).chunk(2)
        return 0.5 * (code + of_flipped.flip(-1))


def build_model(experiment: "Experiment", in_dim: int, n_classes: int) -> Stego:
    """A model with fresh weights drawn from the experiment's seed. in_dim: channels of the features."""
    official = experiment.official
    from .utils.torch_state import drawing

    with drawing(experiment.seed):
        return Stego(
            in_dim,
            experiment.code_dim,
            n_classes,
            head=experiment.head,
            dropout=experiment.dropout,
            extra_clusters=official.extra_clusters,
            decoder=official.rec_weight > 0,
            lengths=experiment.method == "primaps",
        )
