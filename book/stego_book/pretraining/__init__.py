"""Pre-training of a small ViT without labels, as for the embedded backbones."""

from .crops import mix_colors, two_views
from .curves import read_curve, write_curve
from .dense import DenseContrast, point_contrast
from .images import draw_scenes, labeled_sample, mixture, read_photographs
from .loop import pretrain
from .network import MEAN, STD, build_network, save_backbone, tokens_at, tokens_of
from .recipe import PHOTOS, PHOTOS_SECOND_STAGE, PHOTOS_SHARES, SECOND_STAGE, STREETS, PretrainRecipe
from .streets import hold_out, read_streets
from .watching import watcher

__all__ = [
    "MEAN",
    "PHOTOS",
    "PHOTOS_SECOND_STAGE",
    "PHOTOS_SHARES",
    "SECOND_STAGE",
    "STD",
    "STREETS",
    "DenseContrast",
    "PretrainRecipe",
    "build_network",
    "draw_scenes",
    "hold_out",
    "labeled_sample",
    "mix_colors",
    "mixture",
    "point_contrast",
    "pretrain",
    "read_curve",
    "read_photographs",
    "read_streets",
    "save_backbone",
    "tokens_at",
    "tokens_of",
    "two_views",
    "watcher",
    "write_curve",
]
