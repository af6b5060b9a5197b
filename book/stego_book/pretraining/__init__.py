"""Pre-trains a small ViT on images without labels, where none can be downloaded: how the embedded backbones were made."""

from .comparison import Stages, equal_time
from .crops import large_and_small_views, mix_colors, two_views
from .curves import read_curve, write_curve
from .dense import DenseContrast, point_contrast
from .dino import Dino
from .ibot import Ibot
from .images import draw_scenes, labeled_sample, mixture, read_photographs
from .loop import OBJECTIVES, pretrain
from .mae import Mae
from .network import MEAN, STD, build_network, save_backbone, tokens_at, tokens_of
from .pilots import hold_out, pilot_table, pilot_ways, read_streets
from .recipe import PHOTOS, PHOTOS_SECOND_STAGE, PHOTOS_SHARES, SECOND_STAGE, STREETS, Distillation, PretrainRecipe
from .watching import watcher

__all__ = [
    "MEAN",
    "OBJECTIVES",
    "PHOTOS",
    "PHOTOS_SECOND_STAGE",
    "PHOTOS_SHARES",
    "SECOND_STAGE",
    "STD",
    "STREETS",
    "DenseContrast",
    "Dino",
    "Distillation",
    "Ibot",
    "Mae",
    "PretrainRecipe",
    "Stages",
    "build_network",
    "draw_scenes",
    "equal_time",
    "hold_out",
    "labeled_sample",
    "large_and_small_views",
    "mix_colors",
    "mixture",
    "pilot_table",
    "pilot_ways",
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
