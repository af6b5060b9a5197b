"""How far a network has got while it learns: two probes on labelled pictures that it never learns from."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from ..metrics import confusion, identity, match, scores
from .network import tokens_of


def watcher(
    pictures: Tensor, labels: Tensor, n_classes: int, batch: int = 32
) -> Callable[[nn.Module, int], dict[str, float]]:
    """A `watch` for `pretrain`: mIoU (percent) of k-means and of a linear probe on the patch tokens of labelled pictures.

    pictures: uint8 (N, 3, H, W); labels: int64 (N, H, W), below 0 = ignored. Both are fitted on the first 60 % of the
    pictures and scored on the rest, at one label a token (the commonest of its patch). The labels are looked at, never
    learnt from.
    """
    count, _, height, width = pictures.shape
    cells = labels.reshape(count, height // 8, 8, width // 8, 8).transpose(2, 3).flatten(3).mode(-1).values
    fitted = round(0.6 * count)
    known, asked = cells[:fitted].flatten(), cells[fitted:].flatten()
    learnt = (known >= 0).nonzero()[::3, 0]

    @torch.inference_mode()
    def watch(vit: nn.Module, step: int) -> dict[str, float]:
        device = next(vit.parameters()).device
        tokens = torch.cat([tokens_of(vit, part.to(device).float() / 255).cpu() for part in pictures.split(batch)])
        tokens = F.normalize(tokens, dim=-1)
        seen, held_out = tokens[:fitted].flatten(0, 1).numpy(), tokens[fitted:].flatten(0, 1).numpy()
        clusters = KMeans(n_classes, n_init=5, random_state=0).fit(seen).predict(held_out)
        table = confusion(torch.from_numpy(clusters), asked, n_classes, n_classes)
        probe = LogisticRegression(C=10.0, tol=1e-2, max_iter=200).fit(seen[learnt], known[learnt].numpy())
        linear = confusion(torch.from_numpy(probe.predict(held_out)), asked, n_classes, n_classes)
        return {
            "kmeans_miou": scores(table, match(table))["miou"],
            "linear_miou": scores(linear, identity(n_classes))["miou"],
        }

    return watch
