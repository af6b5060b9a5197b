"""What determines a pre-training run: `PretrainRecipe`, and the recipes of the embedded backbones."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class PretrainRecipe:
    """Everything that determines a pre-training run, besides the images."""

    steps: int = 2000
    """Training steps; the last `full_size_steps` of them see crops of `full_crop` pixels."""
    batch_size: int = 64
    """Images per step, two crops each."""
    crop: int = 64
    """Side of a crop in pixels. Small crops are cheap: attention and tokens grow with the area."""
    full_size_steps: int = 200
    full_crop: int = 128
    """The last steps use this crop and a quarter of the batch, so that position embeddings fit the size of use."""
    schedule_steps: int | None = None
    """Steps that the learning rate's schedule is laid out for, where a run ends before its end; None: `steps`."""
    shrink: int = 1
    """Images are averaged over squares of this many pixels per side before crops are cut: the same view costs
    fewer tokens."""
    zoom: tuple[float, float] = (0.75, 1.4)
    """Range of the enlargement from image to crop (log-uniform)."""
    color_mixing: tuple[float, float, float, float] = (0.35, 0.3, 0.15, 0.2)
    """Strength of `mix_colors`: spreads of matrix, logarithm of contrast and brightness; share of gray crops."""
    points: int = 24
    """Dense contrast: points an image that are matched between its two crops."""
    temperature: float = 0.15
    """Dense contrast: what cosines are divided by."""
    projection: int = 64
    """Dense contrast: width of the projection on which points are compared; thrown away afterwards."""
    lr: float = 1e-3
    weight_decay: float = 0.05
    warmup: int = 100
    """Steps of linear warm-up; then the learning rate falls by a cosine to a hundredth."""
    seed: int = 0
    structured: bool = False
    """Begin with sinusoidal positions and mimetic attention, see `structure`; else timm's random weights."""
    architecture: str = "vit_tiny_patch16_224"
    """timm's name; the patch is made 8 pixels."""
    depth: int = 4
    img_size: int = 128
    """Side in pixels for which the position embedding is stored (timm resamples it for other sizes)."""

    def timm_arguments(self) -> dict:
        """The network, as keyword arguments of `timm.create_model` (its name under "architecture")."""
        return dict(
            architecture=self.architecture, patch_size=8, img_size=self.img_size, depth=self.depth, num_classes=0,
            global_pool="token", dynamic_img_size=True,
        )  # fmt: skip

    def varied(self, seed: int, steps: int | None = None) -> "PretrainRecipe":
        """The recipe with another seed and, if given, another number of steps; its phases are shortened with it."""
        if steps is None:
            return replace(self, seed=seed)
        full = max(1, steps // 10) if self.full_size_steps else 0
        return replace(
            self, seed=seed, steps=steps, full_size_steps=full, schedule_steps=None, warmup=max(1, steps // 20)
        )


SECOND_STAGE = PretrainRecipe(steps=240, full_size_steps=40, lr=3e-4, warmup=20, color_mixing=(0.2, 0.15, 0.08, 0.1))
"""How `scenes_vit_tiny8`, trained by `PretrainRecipe()` on clear scenes, goes on to scenes in all weathers."""

PHOTOS = PretrainRecipe(
    steps=660, schedule_steps=1300, full_size_steps=0, batch_size=32, crop=80, zoom=(0.334, 0.7),
    color_mixing=(0.25, 0.2, 0.1, 0.15), points=32, lr=8e-4, warmup=60, structured=True, depth=12, img_size=112,
)  # fmt: skip
"""How `photos_vit_tiny8` began, on CamVid's training images and photographs in the shares `PHOTOS_SHARES`.

Crops of 80 pixels show 114 to 240 pixels of an image of 320 x 240, a sixth to three quarters of it, so that a position
in the crop says something about the position in the image. Color tells more of a street than of a scene, and
is mixed less. 1,300 steps were planned; the time for them was up at 660.
"""
PHOTOS_SECOND_STAGE = replace(
    PHOTOS, steps=200, schedule_steps=None, batch_size=16, crop=112, zoom=(0.467, 0.9), lr=3e-4, warmup=20
)
"""How it went on: crops of 112 pixels that show 124 to 240 pixels, nearer in scale to the images of its use."""
PHOTOS_SHARES = (0.6, 0.4)
"""Share of CamVid's images, and of photographs, in what `photos_vit_tiny8` was shown."""

_SIX = replace(PHOTOS, depth=6, schedule_steps=None)
STREETS = (
    replace(_SIX, steps=11_000, shrink=2, crop=40, batch_size=64, points=16),
    replace(_SIX, steps=1_200, zoom=(0.5, 1.0)),
    replace(_SIX, steps=600, crop=112, batch_size=16, zoom=(0.467, 0.9), lr=3e-4),
)
"""How `photos_vit_tiny8_d6` was trained, with six blocks, in three stages: images averaged to half their size,
a quarter of the tokens for the same view; crops of 80 pixels nearer to the size of use; crops of
`PHOTOS_SECOND_STAGE`."""
