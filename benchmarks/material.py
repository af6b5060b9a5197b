"""Inputs of the benchmarks: networks with random weights, synthetic images, random features."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from stego_lib import Backbone, Experiment
from stego_lib.datasets.images import read_image
from stego_lib.datasets.layout import list_images
from stego_lib.datasets.painter import paint_scene
from stego_lib.datasets.transforms import resize_image
from stego_lib.utils.files import write_json

N_CLASSES = 27
TINY = dict(architecture="vit_tiny_patch16_224", patch_size=8, img_size=32, depth=2, embed_dim=32, num_heads=2)
"""Network for `--tiny`."""


@dataclass(frozen=True)
class Settings:
    """Size and repetitions of the measurements."""

    folder: Path
    """Folder for temporary files."""
    tiny: bool = False
    """Minimal sizes, to test that the benchmarks run."""
    repeats: int = 5
    seconds: float = 60.0
    """Time limit for the repetitions of a row."""
    photos: Path | None = None
    """Folder of photographs for the CRF."""
    seed: int = 0

    def choose(self, full: int, tiny: int) -> int:
        """`tiny` with `--tiny`, else `full`."""
        return tiny if self.tiny else full

    def network(self, name: str = "vit_small_patch8_224") -> Path:
        """Path of a file with random weights of timm's ViT `name`."""
        arguments = TINY if self.tiny else dict(architecture=name)
        arguments = {**arguments, "num_classes": 0, "dynamic_img_size": True}
        path = self.folder / f"{arguments['architecture']}.safetensors"
        if not path.exists():
            with torch.random.fork_rng():
                torch.manual_seed(self.seed)
                made = timm.create_model(
                    **{"model_name" if k == "architecture" else k: v for k, v in arguments.items()}
                )
            save_file(made.state_dict(), path, {"timm": json.dumps(arguments)})
        return path

    def embedded(self) -> str:
        """An embedded backbone, which users have without a download; with `--tiny`, a smaller one."""
        return str(self.network()) if self.tiny else "photos_vit_tiny8_d6"

    def experiment(self, images: Path, **changes: object) -> Experiment:
        """The recipe of ViT-S/8 on CocoStuff (K = 70, batch size 16) for the images in the folder `images`."""
        values: dict = dict(
            dataset="folder", data_root=str(images), backbone=str(self.network()), precision="float32",
            train_size=self.choose(224, 32), eval_size=self.choose(320, 48), batch_size=self.choose(16, 4),
            seed=self.seed, neighbors=self.choose(7, 2), crf=False,
        )  # fmt: skip
        return Experiment.from_dict(values | changes)


class RandomFeatures(Backbone):
    """A backbone that returns random features without computation."""

    def forward(self, images: Tensor) -> Tensor:
        return torch.randn(len(images), self.dim, *self.grid(*images.shape[-2:]), device=self.device)


def draw_folder(folder: Path, images: list[np.ndarray], train: int, val: int, seed: int = 0) -> Path:
    """Writes a dataset in the layout of `folder`: `train` and `val` JPEGs, shifted copies of `images`, and label maps.

    A label map has 4 x 4 rectangles of random classes, unrelated to the image.
    """
    rng = np.random.default_rng(seed)
    for split, count in {"train": train, "val": val}.items():
        for kind in ("imgs", "labels"):
            (folder / kind / split).mkdir(parents=True)
        for i in range(count):
            image = np.roll(images[i % len(images)], rng.integers(8), axis=1)
            Image.fromarray(image).save(folder / "imgs" / split / f"{i:05d}.jpg", quality=90)
            label = Image.fromarray(rng.integers(0, N_CLASSES, (4, 4), np.uint8))
            label.resize(image.shape[1::-1], Image.Resampling.NEAREST).save(folder / "labels" / split / f"{i:05d}.png")
    write_json(folder / "classes.json", {"names": [f"class {i}" for i in range(N_CLASSES)]})
    return folder


def scenes(size: int, count: int = 16, seed: int = 0) -> list[np.ndarray]:
    """Synthetic scenes with texture, uint8 (size, size, 3)."""
    return [paint_scene(seed, i, size)[0] for i in range(count)]


def smooth(size: int) -> list[np.ndarray]:
    """One synthetic image without texture."""
    y, x = np.mgrid[:size, :size] / size
    waves = [np.sin(6 * x + 3 * y), np.cos(4 * y - x), np.sin(5 * x * y)]
    return [np.stack([127 + 100 * wave for wave in waves], -1).astype(np.uint8)]


def photographs(folder: Path, size: int, count: int = 8) -> list[np.ndarray]:
    """The first photographs of a folder, center-cropped to `size` pixels."""
    found: Iterator[Path] = islice(list_images(folder), count)
    tensors = [torch.from_numpy(np.array(read_image(path).rgb)).movedim(-1, 0) for path in found]
    return [resize_image(tensor, size).permute(1, 2, 0).contiguous().numpy() for tensor in tensors]
