"""Entry points of torch.hub: torch.hub.load(REPOSITORY, "stego", run="hf:user/name")."""

from typing import Any

import torch
from torch import Tensor, nn

dependencies = ["numpy", "pandas", "PIL", "pydantic", "safetensors", "sklearn", "scipy", "timm", "torch", "tqdm"]


class Segmenter(nn.Module):
    """A run as a module. `names` are those of the labels."""

    def __init__(self, run: Any):
        super().__init__()
        self.run, self.backbone, self.model, self.names = run, run.backbone, run.model, run.segments.names

    def forward(self, images: Tensor) -> Tensor:
        """RGB images (B, 3, H, W), uint8 or float in [0, 1] -> labels, uint8 (B, H, W), 255 for dropped clusters."""
        if images.is_floating_point():
            images = (255 * images).round().to(torch.uint8)
        return torch.stack([torch.from_numpy(self.run.predict(image)) for image in images.cpu()])


def stego(run: str, **options: Any) -> nn.Module:
    """A trained run. run, options: of `stego_lib.load_run`, such as a run folder, "hf:user/name", device="cpu".

    Examples
    --------
    >>> model = torch.hub.load(".", "stego", source="local", run="runs/NAME")
    >>> labels = model(torch.rand(2, 3, 240, 320))
    """
    from stego_lib import load_run

    return Segmenter(load_run(run, **options))
