"""A recipe as it can be run here: sizes that its backbone takes, and the embedded backbone where weights cannot be fetched."""

from typing import Any

from .backbone import EMBEDDED, Backbone, HubUnreachable, fit_sizes
from .experiment import PRESETS, Experiment
from .notices import notice

EMBEDDED_FOR_PHOTOGRAPHS = "photos_vit_tiny8"
"""The embedded backbone that has seen photographs; see stego_lib/weights/photos_vit_tiny8.md."""


def preset_here(name: str, **changes: Any) -> Experiment:
    """`Experiment.preset`, with sizes that the backbone takes (see `fit_sizes`), and with the embedded backbone for photographs
    where the recipe's own cannot be fetched.

    The latter only for the recipes of this project on real pictures ('camvid', 'folder'), only if `changes` name no backbone, and
    with a notice: that backbone has seen a thousandth of DINO's photographs. The experiment, and so every run record, names what was taken.
    The paper's recipes, and `published=True`, stand for published numbers; with another backbone these would be other
    numbers under the same name, so nothing is put in its place there and loading the backbone is an error.
    """
    experiment = Experiment.preset(name, **changes)
    ours = name in PRESETS and PRESETS[name]["dataset"] == name  # a recipe named like its data set is not the paper's
    if not ours or "backbone" in changes or experiment.published or experiment.backbone in EMBEDDED:
        return fit_sizes(experiment)
    try:
        return fit_sizes(experiment, Backbone(experiment.backbone, device="cpu").geometry)
    except HubUnreachable as error:
        notice(
            f"{error}. Taking {EMBEDDED_FOR_PHOTOGRAPHS!r}, which comes with the package and has seen a thousandth as "
            f"many photographs: its scores are no scores of {experiment.backbone!r}. Name a backbone to take another"
        )
        return fit_sizes(experiment.but(backbone=EMBEDDED_FOR_PHOTOGRAPHS))
