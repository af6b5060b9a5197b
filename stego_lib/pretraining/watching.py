"""How far a network has got while it learns: two probes on labeled images that it never learns from."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from torch import Tensor, nn

from ..metrics import confusion, identity, match, scores
from ..probes import multinomial_regression
from .network import tokens_of


def watcher(
    images: Tensor, labels: Tensor, n_classes: int, batch: int = 32, every: int = 3
) -> Callable[[nn.Module, int], dict[str, float]]:
    """A `watch` for `pretrain`: mIoU (percent) of k-means and of a linear probe on the patch tokens of labeled images.

    images: uint8 (N, 3, H, W); labels: int64 (N, H, W), below 0 = ignored. Both are fitted on the first 60 % of the
    images, on one token in `every`, and scored on all of the rest, at one label a token (the commonest of its patch). The labels are
    looked at, never learned from.
    """
    count, _, height, width = images.shape
    cells = labels.reshape(count, height // 8, 8, width // 8, 8).transpose(2, 3).flatten(3).mode(-1).values
    fitted = round(0.6 * count)
    known, asked = cells[:fitted].flatten(), cells[fitted:].flatten()
    learned = (known >= 0).nonzero()[::every, 0]

    @torch.inference_mode()
    def watch(vit: nn.Module, step: int) -> dict[str, float]:
        device = next(vit.parameters()).device
        tokens = torch.cat([tokens_of(vit, part.to(device).float() / 255).cpu() for part in images.split(batch)])
        tokens = F.normalize(tokens, dim=-1)
        seen, held_out = tokens[:fitted].flatten(0, 1), tokens[fitted:].flatten(0, 1)
        clusters = KMeans(n_classes, n_init=5, random_state=0).fit(seen[::every].numpy()).predict(held_out.numpy())
        table = confusion(torch.from_numpy(clusters), asked, n_classes, n_classes)
        weight, bias = multinomial_regression(seen[learned], known[learned], n_classes)
        linear = confusion((held_out @ weight.T + bias).argmax(1), asked, n_classes, n_classes)
        return {
            "kmeans_miou": scores(table, match(table))["miou"],
            "linear_miou": scores(linear, identity(n_classes))["miou"],
        }

    return watch
