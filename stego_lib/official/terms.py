"""The optional terms of a training step: their weights in an experiment, and their values."""

from typing import TYPE_CHECKING

from torch import Tensor

from .losses import alignment_loss, image_crf_loss, reconstruction_loss

if TYPE_CHECKING:
    from ..batches import Batch
    from ..experiment import Experiment
    from ..model import Stego


def optional_weights(experiment: "Experiment") -> dict[str, float]:
    """Weights of the optional terms that are on, by the name of their loss."""
    weights = dict(
        loss_rec=experiment.official.rec_weight,
        loss_crf=experiment.official.crf_weight,
        loss_aug=experiment.official.aug_alignment_weight,
    )
    return {name: weight for name, weight in weights.items() if weight}


def optional_losses(
    model: "Stego", batch: "Batch", feats: Tensor, code: Tensor, experiment: "Experiment"
) -> dict[str, Tensor]:
    """Values of the optional terms that are on, for the images' features (B, C, h, w) and codes (B, K, h, w)."""
    found = {}
    if experiment.official.rec_weight:
        found["loss_rec"] = reconstruction_loss(feats, model.decoder(code))
    if experiment.official.crf_weight:
        found["loss_crf"] = image_crf_loss(batch.images, code, batch.crf_points)
    if experiment.official.aug_alignment_weight:
        code_view = model.head(batch.feats_view)
        found["loss_aug"] = alignment_loss(code, code_view, batch.view_coords, published=experiment.official.published)
    return found
