"""Pre-training of a small ViT without labels, as for the embedded backbones."""

# ruff: noqa: F401
from .contrast import DenseContrast, point_contrast, two_views
from .images import draw_scenes, read_streets
from .loop import pretrain
from .network import MEAN, STD, build_network, save_backbone, structure
from .recipe import PHOTOS, PHOTOS_SECOND_STAGE, SECOND_STAGE, STREETS, PretrainRecipe
from .watching import read_curve, watcher, write_curve
