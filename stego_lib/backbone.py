"""The frozen feature extractor: a timm ViT that gives (B, C, h, w)."""

import json
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .errors import StegoError, first_line
from .experiment import did_you_mean
from .files import fingerprint
from .paths import PACKAGE

EMBEDDED = {path.stem: path for path in sorted((PACKAGE / "weights").glob("*.safetensors"))}
"""Backbones that come with the package."""
SHORT_NAMES = {
    "dino_vits8": "vit_small_patch8_224.dino",
    "dino_vits16": "vit_small_patch16_224.dino",
    "dino_vitb8": "vit_base_patch8_224.dino",
    "dino_vitb16": "vit_base_patch16_224.dino",
}
"""The names under which DINO's authors published their networks -> timm's names."""
IMAGENET = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


class Backbone(nn.Module):
    """A frozen ViT. Features are the patch tokens of its last block after the final norm (paper, section 3.1).

    name: an embedded backbone (`EMBEDDED`), a short name (`SHORT_NAMES`), any ViT of timm (weights from its hub), or
    the path of a .safetensors file whose metadata hold the timm arguments as JSON under "timm".
    Always in eval mode, without gradients. Raises StegoError when it cannot be had.
    """

    def __init__(self, name: str, *, device: str = "auto", precision: str = "auto"):
        super().__init__()
        self.name = name
        self.device = choose_device(device)
        self.precision = choose_precision(precision, self.device)
        self.vit, normalisation = _load(name)
        self.weights_id = fingerprint(*(item for pair in sorted(self.vit.state_dict().items()) for item in pair))
        for key, values in normalisation.items():
            self.register_buffer(key, torch.tensor(values).view(1, 3, 1, 1))
        self.requires_grad_(False).eval().to(self.device, self.precision)

    @property
    def dim(self) -> int:
        """C, channels of the features."""
        return self.vit.embed_dim

    @property
    def patch(self) -> int:
        """Pixels a side of one grid cell."""
        return self.vit.patch_embed.patch_size[0]

    def train(self, mode: bool = True) -> "Backbone":
        """Stays in eval mode whatever is asked."""
        return super().train(False)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """(h, w) in grid cells of a picture of (H, W) pixels; StegoError if the patch does not divide it."""
        if height % self.patch or width % self.patch:
            raise StegoError(
                f"pictures of {height} x {width} pixels do not divide into patches of {self.patch}; choose sizes that are multiples of {self.patch}"
            )
        return height // self.patch, width // self.patch

    @torch.inference_mode()
    def forward(self, pictures: Tensor) -> Tensor:
        """uint8 or float [0, 1] pictures (B, 3, H, W) -> float32 features (B, C, h, w) on the backbone's device."""
        self.grid(*pictures.shape[-2:])
        pictures = pictures.to(self.device)
        if pictures.dtype == torch.uint8:
            pictures = pictures.float() / 255
        pictures = (pictures.to(self.precision) - self.mean) / self.std
        return self.vit.forward_intermediates(pictures, indices=1, norm=True, intermediates_only=True)[-1].float()

    def fingerprint(self) -> str:
        """Changes with weights, architecture, normalisation and precision: with anything that changes the features."""
        return fingerprint(self.weights_id, repr(self.vit), self.mean, self.std, str(self.precision))


def choose_device(device: str) -> torch.device:
    """'auto' -> the GPU if there is one, else the CPU. StegoError for a device that is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise StegoError(f"device {device!r} cannot be used here ({first_line(error)}); use 'auto' or 'cpu'") from error
    return chosen


def choose_precision(precision: str, device: torch.device) -> torch.dtype:
    """'auto' -> bfloat16 where the device multiplies it natively (GPUs from Ampere on, CPUs with AMX), else float32."""
    if precision == "auto":
        native = torch.cuda.is_bf16_supported(False) if device.type == "cuda" else torch.cpu._is_amx_tile_supported()
        return torch.bfloat16 if native else torch.float32
    return getattr(torch, precision)


def _load(name: str) -> tuple[nn.Module, dict[str, tuple[float, ...]]]:
    path = EMBEDDED.get(name, Path(name).expanduser())
    if path.suffix == ".safetensors":
        return _from_file(path), IMAGENET
    timm_name = SHORT_NAMES.get(name, name)
    if timm_name.split(".")[0] not in timm.list_models():
        known = [*EMBEDDED, *SHORT_NAMES, *timm.list_models("*vit*", pretrained=True)]
        raise StegoError(
            f"unknown backbone {name!r}{did_you_mean(name, known)}; give one of {', '.join([*EMBEDDED, *SHORT_NAMES])}, a timm ViT or a .safetensors file"
        )
    try:
        vit = timm.create_model(timm_name, pretrained=True, num_classes=0, dynamic_img_size=True)
    except TypeError as error:
        raise StegoError(f"backbone {name!r} is not a ViT of timm that takes pictures of any size ({error})") from error
    except Exception as error:  # whatever the hub's client raises when the network, the proxy or the disk fails
        raise StegoError(
            f"the weights of {timm_name!r} could not be fetched from timm's hub ({first_line(error)}); "
            f"without a network use a .safetensors file or an embedded backbone: {', '.join(EMBEDDED)}"
        ) from error
    return vit, {key: vit.pretrained_cfg[key] for key in IMAGENET}


def _from_file(path: Path) -> nn.Module:
    if not path.is_file():
        raise StegoError(f"backbone file {path.resolve()} does not exist; embedded backbones: {', '.join(EMBEDDED)}")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            weights = {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118 (a safetensors file is no dict)
        arguments = json.loads(metadata["timm"])
        vit = timm.create_model(arguments.pop("architecture"), **arguments)
        vit.load_state_dict(weights)
    except KeyError as error:
        raise StegoError(
            f'{path} lacks {error} in its metadata: "timm" must hold {{"architecture": NAME, ...timm arguments}}'
        ) from error
    except (SafetensorError, RuntimeError, TypeError, ValueError) as error:
        raise StegoError(f"{path} is not a backbone that timm can build ({first_line(error)})") from error
    return vit


def upsample(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, C, h, w) -> (B, C, H, W), bilinear; cell centres are kept in place (align_corners=False)."""
    return F.interpolate(maps, size, mode="bilinear", align_corners=False)
