"""Pre-trains a small ViT on images without labels, where none can be downloaded: how the embedded backbones were made."""

from .comparison import equal_time
from .crops import large_and_small_views, mix_colors, two_views
from .curves import read_curve, write_curve
from .dense import DenseContrast, point_contrast
from .dino import Dino
from .ibot import Ibot
from .images import draw_scenes, labeled_sample, mixture, read_photographs
from .loop import OBJECTIVES, pretrain
from .network import MEAN, STD, build_network, save_backbone, tokens_at, tokens_of
from .recipe import PHOTOS, PHOTOS_SECOND_STAGE, PHOTOS_SHARES, SECOND_STAGE, Distillation, PretrainRecipe
from .watching import watcher

__all__ = [
    "MEAN",
    "OBJECTIVES",
    "PHOTOS",
    "PHOTOS_SECOND_STAGE",
    "PHOTOS_SHARES",
    "SECOND_STAGE",
    "STD",
    "DenseContrast",
    "Dino",
    "Distillation",
    "Ibot",
    "PretrainRecipe",
    "build_network",
    "draw_scenes",
    "equal_time",
    "labeled_sample",
    "large_and_small_views",
    "mix_colors",
    "mixture",
    "point_contrast",
    "pretrain",
    "read_curve",
    "read_photographs",
    "save_backbone",
    "tokens_at",
    "tokens_of",
    "two_views",
    "watcher",
    "write_curve",
]
