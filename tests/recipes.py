"""Recipes of pre-training that take no time."""

from stego_book.pretraining import Distillation, PretrainRecipe

SMALL = Distillation(prototypes=7, hidden=8, bottleneck=4, small_crops=2, small_crop=8)
DISTILLED = PretrainRecipe(
    steps=4, batch_size=4, crop=16, full_size_steps=1, full_crop=32, points=4, warmup=2, depth=1, img_size=32,
    projection=8, distillation=SMALL,
)  # fmt: skip
TINY = PretrainRecipe(
    steps=4,
    batch_size=4,
    crop=16,
    full_size_steps=1,
    full_crop=32,
    points=4,
    warmup=2,
    depth=1,
    img_size=32,
    projection=8,
)
