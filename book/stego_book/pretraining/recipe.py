"""Settings of a pre-training run, and the recipes of the embedded backbones."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class PretrainRecipe:
    """Everything that determines a pre-training run, except the images."""

    steps: int = 2000
    """Training steps; the last `full_size_steps` of them use crops of `full_crop` pixels."""
    batch_size: int = 64
    """Images per step, two crops each."""
    crop: int = 64
    """Side of a crop in pixels. Small crops are cheap, because the number of tokens grows with the area."""
    full_size_steps: int = 200
    full_crop: int = 128
    """Crop of the last steps, with a quarter of the batch, so that position embeddings fit the size at prediction."""
    schedule_steps: int | None = None
    """Length of the learning rate schedule if the run ends earlier; None: `steps`."""
    shrink: int = 1
    """Downsampling factor of the images before cropping: the same view needs fewer tokens."""
    zoom: tuple[float, float] = (0.75, 1.4)
    """Range of the zoom from image to crop (log-uniform)."""
    color_mixing: tuple[float, float, float, float] = (0.35, 0.3, 0.15, 0.2)
    """Strength of `mix_colors`: spreads of matrix, logarithm of contrast and brightness; share of gray crops."""
    points: int = 24
    """Dense contrast: matched points per image."""
    temperature: float = 0.15
    """Dense contrast: temperature of InfoNCE."""
    projection: int = 64
    """Dense contrast: width of the projector, which is discarded after training."""
    lr: float = 1e-3
    weight_decay: float = 0.05
    warmup: int = 100
    """Steps of linear warm-up, followed by cosine decay to a hundredth."""
    seed: int = 0
    structured: bool = False
    """Initialize with sinusoidal positions and mimetic attention, see `structure`; else timm's random weights."""
    architecture: str = "vit_tiny_patch16_224"
    """timm's name; the patch size is set to 8 pixels."""
    depth: int = 4
    img_size: int = 128
    """Side in pixels for which the position embedding is stored (timm resamples it for other sizes)."""

    def timm_arguments(self) -> dict:
        """Keyword arguments of `timm.create_model` (the model name is "architecture")."""
        return dict(
            architecture=self.architecture, patch_size=8, img_size=self.img_size, depth=self.depth, num_classes=0,
            global_pool="token", dynamic_img_size=True,
        )  # fmt: skip

    def varied(self, seed: int, steps: int | None = None) -> "PretrainRecipe":
        """The recipe with another seed and, if given, another number of steps, with phases shortened in proportion."""
        if steps is None:
            return replace(self, seed=seed)
        full = max(1, steps // 10) if self.full_size_steps else 0
        return replace(
            self, seed=seed, steps=steps, full_size_steps=full, schedule_steps=None, warmup=max(1, steps // 20)
        )


SECOND_STAGE = PretrainRecipe(steps=240, full_size_steps=40, lr=3e-4, warmup=20, color_mixing=(0.2, 0.15, 0.08, 0.1))
"""Second stage of `scenes_vit_tiny8`, on scenes in all weathers, after `PretrainRecipe()` on clear scenes."""

PHOTOS = PretrainRecipe(
    steps=660, schedule_steps=1300, full_size_steps=0, batch_size=32, crop=80, zoom=(0.334, 0.7),
    color_mixing=(0.25, 0.2, 0.1, 0.15), points=32, lr=8e-4, warmup=60, structured=True, depth=12, img_size=112,
)  # fmt: skip
"""First stage of `photos_vit_tiny8`, on CamVid's training images and photographs in the ratio `PHOTOS_SHARES`.

Crops of 80 pixels show 114 to 240 pixels of an image of 320 x 240, a sixth to three quarters of it, so that the
position in the crop is related to the position in the image. Colors are mixed less than for scenes, because they
are informative in photographs. The run ended at 660 of 1,300 planned steps.
"""
PHOTOS_SECOND_STAGE = replace(
    PHOTOS, steps=200, schedule_steps=None, batch_size=16, crop=112, zoom=(0.467, 0.9), lr=3e-4, warmup=20
)
"""Second stage: crops of 112 pixels that show 124 to 240 pixels, closer to the scale at prediction."""
PHOTOS_SHARES = (0.6, 0.4)
"""Fractions of CamVid's images and of photographs in the samples of `photos_vit_tiny8`."""

_SIX = replace(PHOTOS, depth=6, schedule_steps=None)
STREETS = (
    replace(_SIX, steps=11_000, shrink=2, crop=40, batch_size=64, points=16),
    replace(_SIX, steps=1_200, zoom=(0.5, 1.0)),
    replace(_SIX, steps=600, crop=112, batch_size=16, zoom=(0.467, 0.9), lr=3e-4),
)
"""The three stages of `photos_vit_tiny8_d6`, with six blocks: half-size images, a quarter of the tokens for the same
view; crops of 80 pixels closer to the scale at prediction; crops of `PHOTOS_SECOND_STAGE`."""
