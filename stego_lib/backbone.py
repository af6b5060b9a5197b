"""The frozen backbone: a network of timm that turns images (B, 3, H, W) into features (B, C, h, w)."""

import copy
import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .experiment import PRESETS, Experiment
from .networks.geometry import Geometry, feature_map, is_vit, measure
from .networks.keys import attention_of, project_keys
from .networks.loading import EMBEDDED, SHORT_NAMES, HubUnreachable, fit_sizes, geometry_of, load_network
from .utils.errors import StegoError, brief
from .utils.files import fingerprint
from .utils.memory import enough_memory
from .utils.notices import notice

__all__ = [
    "EMBEDDED", "SHORT_NAMES", "Backbone", "Geometry", "HubUnreachable", "choose_device", "choose_precision", "fit_sizes", "geometry_of",
    "preset_here",
]  # fmt: skip

CPU_BYTES = 16 * 2**20
"""Bytes of the widest activation that a CPU computes at once: chunks that stay in its cache take a fifth less time per image
(chunks of 2 instead of 16 for a ViT-S on two cores of an AMD EPYC)."""
PUBLISHED_HEADS = 6
"""Attention heads that the published code assumes when it reads keys."""


class Backbone(nn.Module):
    """A frozen network, always in eval mode and without gradients.

    Features are the patch tokens of a ViT's last block after the final norm (paper, section 3.1), or the last stage of a
    network with stages (ResNet, ConvNeXt, Swin, ...), whose stride is then the side of a grid cell.

    Normalization is the network's own. For a .safetensors file it is given by "mean" and "std" in the metadata, else by its
    architecture if that has a tag ("vit_small_patch16_224.augreg_in21k") or if no argument changes the network; in all other
    cases, and for .pth and .ckpt files, it is ImageNet's.

    Parameters
    ----------
    name
        An embedded backbone (`EMBEDDED`), a short name (`SHORT_NAMES`), any network of timm that gives a map of features
        (weights from its hub or the hub's cache), or a file: .safetensors whose metadata hold the timm arguments as JSON
        under "timm", .pth as DINO's authors publish it, or .ckpt, a released STEGO checkpoint. "NAME@FILE" takes the weights
        of the timm network NAME from FILE, for example a `model.safetensors` downloaded by hand.
    features
        'feat' (tokens) or 'KK' (keys of the attention, head by head, neither scaled nor normalized).
    block
        Block of a ViT, counted from 0, or from the end: -1 the last, -2 the published n=2. The final norm is applied to the
        tokens of any block.
    heads
        Attention heads of a .pth file whose heads are not 64 wide.
    published
        Read keys as if there were six heads, as the published code does (it scrambles those of a ViT-B).
    device, precision
        As in `Experiment`.

    Raises
    ------
    StegoError
        For an unknown or broken network, and `HubUnreachable` where its weights cannot be fetched.

    Notes
    -----
    Position embeddings of DINO's networks are resampled as DINO does, those of others as their timm model does.

    Examples
    --------
    >>> backbone = Backbone("scenes_vit_tiny8")
    >>> backbone(torch.rand(1, 3, 128, 128)).shape
    torch.Size([1, 192, 16, 16])
    """

    def __init__(
        self,
        name: str,
        *,
        features: Literal["feat", "KK"] = "feat",
        block: int = -1,
        heads: int | None = None,
        published: bool = False,
        device: str = "auto",
        precision: str = "auto",
    ):
        super().__init__()
        self.name = name
        self.device = choose_device(device)
        self.precision = choose_precision(precision, self.device)
        self.vit, normalization = load_network(name, heads)
        self.features, self.block = features, block
        if is_vit(self.vit):
            self.block = _block_of(name, len(self.vit.blocks), block)
        elif block != -1 or features == "KK":
            raise StegoError(
                f"backbone {name!r} has stages in place of a ViT's blocks: its features are those of the last stage; leave "
                "block at -1 and features at 'feat'"
            )
        if features == "KK":
            self.key_heads = PUBLISHED_HEADS if published else attention_of(self.vit, self.block, self.name).num_heads
        self.geometry = measure(self.vit.eval(), name)
        if features == "KK" and self.dim % self.key_heads:
            raise StegoError(f"published keys need channels that divide by {self.key_heads}; {name!r} has {self.dim}")
        self.weights_id = _weights_id(self.vit)
        for key, values in normalization.items():
            self.register_buffer(key, torch.tensor(values).view(1, 3, 1, 1))
        with enough_memory(f"backbone {name!r}", "choose a smaller one, or device='cpu'"):
            self.requires_grad_(False).eval().to(self.device, self.precision)

    @classmethod
    def of(cls, experiment: Experiment) -> "Backbone":
        """The backbone that an experiment names."""
        return cls(
            experiment.backbone, features="KK" if experiment.official.keys else "feat", block=experiment.official.block, published=experiment.official.published,
            device=experiment.device, precision=experiment.precision,
        )  # fmt: skip

    def untrained(self, seed: int = 0) -> "Backbone":
        """The same network with random weights."""
        fresh = copy.deepcopy(self)
        fresh.name = f"{self.name} (random weights, seed {seed})"
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(seed)
            for weights in fresh.vit.parameters():  # tokens and position embeddings; the layers draw theirs anew below
                nn.init.trunc_normal_(weights, std=0.02)
            for layer in fresh.vit.modules():
                if hasattr(layer, "reset_parameters"):
                    layer.reset_parameters()
        fresh.weights_id = _weights_id(fresh.vit)
        return fresh

    @property
    def dim(self) -> int:
        """C, channels of the features."""
        return self.geometry.dim

    @property
    def patch(self) -> int:
        """Pixels per side of one grid cell."""
        return self.geometry.patch

    def train(self, mode: bool = True) -> "Backbone":
        """Stays in eval mode."""
        return super().train(False)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Grid (h, w) of an image of (H, W) pixels. Raises StegoError for a size that the network does not take."""
        if not self.geometry.fits(height, width):
            if self.geometry.only is not None:
                only = "{} x {}".format(*self.geometry.only)
                raise StegoError(
                    f"backbone {self.name!r} takes images of {only} pixels only, not of {height} x {width}"
                )
            raise StegoError(
                f"images of {height} x {width} pixels do not divide into patches of {self.patch}; choose sizes that are multiples of {self.patch}"
            )
        return height // self.patch, width // self.patch

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 or float [0, 1] images (B, 3, H, W) -> the network's input, on its device and in its precision."""
        images = images.to(self.device)
        if images.dtype == torch.uint8:
            images = images.float() / 255
        return (images.to(self.precision) - self.mean) / self.std

    @torch.inference_mode()
    def forward(self, images: Tensor) -> Tensor:
        """uint8 or float [0, 1] images (B, 3, H, W) -> float32 features (B, C, h, w) on the backbone's device."""
        cells = math.prod(self.grid(*images.shape[-2:]))
        chunks = self.normalize(images).split(self._chunk(cells))
        return torch.cat([self.maps(chunk) for chunk in chunks]).float()

    def _chunk(self, cells: int) -> int:
        """Images of so many grid cells that are computed at once."""
        if self.device.type != "cpu":
            return 2**31
        widest = 4 * self.dim * cells * self.precision.itemsize  # the hidden layer of a block's MLP
        return max(1, CPU_BYTES // widest)

    def maps(self, images: Tensor) -> Tensor:
        """The same for normalized images, all at once: keys, or tokens after the final norm, or the last stage."""
        return (
            self._keys(images)
            if self.features == "KK"
            else feature_map(self.vit, images, self.block, self.geometry.normed)
        )

    def _keys(self, images: Tensor) -> Tensor:
        """Keys of the block's attention, (B, C, h, w); channel = head * (C / heads) + channel of the head."""
        attention, seen = attention_of(self.vit, self.block, self.name), []
        with attention.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])):
            self.vit.forward_intermediates(images, indices=[self.block], intermediates_only=True, stop_early=True)
        keys = project_keys(attention, seen[0])[:, self.vit.num_prefix_tokens :]
        batch, grid = len(images), self.grid(*images.shape[-2:])
        # The memory order is (B, heads, positions, channels of a head), in which a wrong number of heads mixes positions.
        by_head = keys.unflatten(2, (attention.num_heads, -1)).transpose(1, 2)
        return by_head.reshape(batch, self.key_heads, *grid, -1).movedim(-1, 2).flatten(1, 2)

    def fingerprint(self) -> str:
        """Changes with all that changes the features: weights, architecture, block, normalization, precision."""
        which = (self.features, self.block, self.key_heads if self.features == "KK" else None)
        return fingerprint(self.weights_id, repr(self.vit), self.mean, self.std, str(self.precision), which)


def _weights_id(vit: nn.Module) -> str:
    return fingerprint(*(item for pair in sorted(vit.state_dict().items()) for item in pair))


def choose_device(device: str) -> torch.device:
    """'auto' -> the GPU if there is one, else the CPU. Raises StegoError for a device that cannot be used."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise StegoError(f"device {device!r} cannot be used here ({brief(error)}); use 'auto' or 'cpu'") from error
    return chosen


def choose_precision(precision: str, device: torch.device) -> torch.dtype:
    """'auto' -> bfloat16 where the device computes it natively (GPUs from Ampere on, CPUs with AMX or AVX512_BF16), else float32."""
    if precision == "auto":
        here = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
        native = torch.cuda.is_bf16_supported(False) if device.type == "cuda" else here
        return torch.bfloat16 if native else torch.float32
    return getattr(torch, precision)


def _block_of(name: str, depth: int, block: int) -> int:
    if not -depth <= block < depth:
        raise StegoError(f"backbone {name!r} has {depth} blocks: block must be {-depth} to {depth - 1}, not {block}")
    return block % depth


EMBEDDED_FOR_PHOTOGRAPHS = "photos_vit_tiny8_d6"
"""The embedded backbone that was trained on photographs, see stego_lib/weights/photos_vit_tiny8_d6.md."""


def preset_here(name: str, **changes: Any) -> Experiment:
    """`Experiment.preset` as it can be run here: with sizes that the backbone takes, and an embedded backbone if need be.

    Where the weights of this project's recipes for photographs ('camvid', 'folder') cannot be fetched, the embedded backbone
    for photographs takes their place, with a notice, unless `changes` name a backbone. The paper's recipes and
    `published=True` stand for published numbers, so a missing backbone is an error there.
    """
    experiment = Experiment.preset(name, **changes)
    ours = name in PRESETS and PRESETS[name]["dataset"] == name  # a recipe named like its dataset is not the paper's
    if not ours or "backbone" in changes or experiment.official.published or experiment.backbone in EMBEDDED:
        return fit_sizes(experiment)
    try:
        return fit_sizes(experiment, Backbone(experiment.backbone, device="cpu").geometry)
    except HubUnreachable as error:
        notice(
            f"{error}. Taking {EMBEDDED_FOR_PHOTOGRAPHS!r}, which comes with the package and has seen a five-hundredth as "
            f"many photographs: its scores are no scores of {experiment.backbone!r}. Name a backbone to take another"
        )
        return fit_sizes(experiment.but(backbone=EMBEDDED_FOR_PHOTOGRAPHS))
