"""The frozen backbone, a timm network: images (B, 3, H, W) -> features (B, C, h, w)."""

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .networks.geometry import Geometry, feature_map, is_vit, measure
from .networks.loading import EMBEDDED, HubUnreachable, geometry_of, load_network
from .utils.errors import StegoError, explained
from .utils.files import fingerprint
from .utils.notices import notice
from .utils.torch_state import usual_modes

if TYPE_CHECKING:
    from .experiment import Experiment

# Bytes of the largest activation per chunk on a CPU. Chunks that fit its cache take a fifth less time per image (2
# images instead of 16 for a ViT-S on two cores of an AMD EPYC).
CPU_BYTES = 16 * 2**20
# The embedded backbone trained on photographs, see weights/photos_vit_tiny8_d6.md.
EMBEDDED_FOR_PHOTOGRAPHS = "photos_vit_tiny8_d6"


class Backbone(nn.Module):
    """A frozen network, always in eval mode and without gradients.

    Features are the patch tokens of a ViT's last block after the final norm (paper, section 3.1), or the output of the
    last stage of a network with stages (ResNet, ConvNeXt, Swin, ...).

    Parameters
    ----------
    name
        An embedded backbone (`EMBEDDED`), a short name (`SHORT_NAMES`), a timm network with feature maps (weights from
        its hub or the hub's cache), or a file: a .safetensors file with timm arguments as JSON in the metadata,
        {"timm": {"architecture": NAME, ...}}; a .pth file of DINO's authors; or a released STEGO checkpoint (.ckpt).
        "NAME@FILE" loads the weights of the timm network NAME from FILE, such as a `model.safetensors` from its hub.
    keys
        Use attention keys as features instead of tokens, neither scaled nor normalized.
    block
        Block of a ViT, counted from 0 or from the end: -1 is the last, -2 the published n=2. The final norm is applied
        to the tokens of any block.
    heads
        Number of attention heads in a .pth file, if the heads are not 64 channels wide.
    published
        Assume six heads when reading keys, as the published code does (it scrambles those of a ViT-B).
    device, precision
        As in `Experiment`.

    Raises
    ------
    StegoError
        For an unknown network, or a missing or broken file; `HubUnreachable` if weights cannot be downloaded.

    Notes
    -----
    Images are normalized with the network's mean and std. For a .safetensors file these are "mean" and "std" of the
    timm arguments, or those of the architecture if its name has a tag ("vit_small_patch16_224.augreg_in21k") or no
    argument changes the network; otherwise, and for .pth and .ckpt files, ImageNet's. Position embeddings of DINO's
    networks are resampled as in DINO's code, others as in timm.

    Examples
    --------
    >>> backbone = Backbone("scenes_vit_tiny8")
    >>> backbone(torch.rand(1, 3, 128, 128)).shape
    torch.Size([1, 192, 16, 16])
    """

    vit: Any  # a network of timm, which have no common type
    mean: Tensor
    std: Tensor

    @usual_modes()
    def __init__(
        self, name: str, *, keys: bool = False, block: int = -1, heads: int | None = None, published: bool = False,
        device: str = "auto", precision: str = "float32",
    ):  # fmt: skip
        super().__init__()
        self.name, self.keys = name, keys
        self.device = choose_device(device)
        self.precision = choose_precision(precision, self.device)
        self.vit, normalization = load_network(name, heads)
        self.geometry = measure(self.vit.eval(), name)
        # The last block, or the last stage of a network without blocks.
        self.block, self.key_heads = (len(self.vit.blocks) - 1 if is_vit(self.vit) else -1), None
        if keys or block != -1:
            from .official import block_and_heads

            self.block, self.key_heads = block_and_heads(self, keys, block, published)
        self.weights_id = weights_id(self.vit)
        for key, values in normalization.items():
            self.register_buffer(key, torch.tensor(values, device=self.device).view(1, 3, 1, 1))
        self.vit.to(self.device, self.precision)
        self.requires_grad_(False).eval()

    @classmethod
    def of(cls, experiment: "Experiment") -> "Backbone":
        """Creates the backbone of an experiment."""
        official = experiment.official
        return cls(
            experiment.backbone, keys=official.keys, block=official.block, published=official.published,
            device=experiment.device, precision=experiment.precision,
        )  # fmt: skip

    @property
    def dim(self) -> int:
        """C, channels of the features."""
        return self.geometry.dim

    @property
    def patch(self) -> int:
        """Pixels per side of a grid cell."""
        return self.geometry.patch

    def train(self, mode: bool = True) -> "Backbone":
        """Does nothing: the backbone stays in eval mode."""
        return super().train(False)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Grid (h, w) of an image of (H, W) pixels. Raises StegoError for an unsupported size."""
        if not self.geometry.accepts(height, width):
            fixed = self.geometry.fixed_size
            accepted = f"multiples of {self.patch}" if fixed is None else f"{fixed[0]} x {fixed[1]} pixels"
            raise StegoError(
                f"backbone {self.name!r} does not accept images of {height} x {width} pixels. Choose {accepted}."
            )
        return height // self.patch, width // self.patch

    def normalize(self, images: Tensor) -> Tensor:
        """Normalizes uint8 or float [0, 1] images (B, 3, H, W), on the network's device and in its precision."""
        images = images.to(self.device)
        images = images / 255 if images.dtype == torch.uint8 else images.float()
        return ((images - self.mean) / self.std).to(self.precision)

    @usual_modes()
    @torch.inference_mode()
    def forward(self, images: Tensor) -> Tensor:
        """uint8 or float [0, 1] images (B, 3, H, W) -> float32 features (B, C, h, w), on the backbone's device."""
        cells = math.prod(self.grid(*images.shape[-2:]))
        chunk = len(images)
        if self.device.type == "cpu":
            largest = 4 * self.dim * cells * self.precision.itemsize  # hidden layer of an MLP
            chunk = max(1, CPU_BYTES // largest)
        return torch.cat([self.maps(part) for part in self.normalize(images).split(chunk)]).float()

    def maps(self, images: Tensor) -> Tensor:
        """Features of normalized images in the backbone's precision, without chunks."""
        if self.keys:
            from .official import attention_keys

            return attention_keys(self, images)
        return feature_map(self.vit, images, self.block, self.geometry.normed)

    def fingerprint(self) -> str:
        """Identifies everything that determines features: weights, architecture, block, normalization, precision."""
        output = ("KK" if self.keys else "feat", self.block, self.key_heads)
        return fingerprint(self.weights_id, repr(self.vit), self.mean, self.std, str(self.precision), output)


def weights_id(vit: nn.Module) -> str:
    """Identifies the weights of a network."""
    return fingerprint(*(item for pair in sorted(vit.state_dict().items()) for item in pair))


def choose_device(device: str) -> torch.device:
    """'auto' is the GPU if there is one, otherwise the CPU. Raises StegoError if the device is not available."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with explained((RuntimeError, AssertionError), f"device {device!r} is not available", "Use 'auto' or 'cpu'."):
        chosen = torch.device(device)
        torch.empty(1, device=chosen)
    return chosen


def choose_precision(precision: str, device: torch.device) -> torch.dtype:
    """'auto' is bfloat16 if native (GPUs since Ampere, CPUs with AMX or AVX512_BF16), otherwise float32."""
    if precision == "auto":
        cpu = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
        native = torch.cuda.is_bf16_supported(False) if device.type == "cuda" else cpu
        return torch.bfloat16 if native else torch.float32
    return getattr(torch, precision)


def fit_sizes(experiment: "Experiment", geometry: Geometry | None = None) -> "Experiment":
    """Replaces image sizes by the nearest ones that the backbone accepts, with a notice.

    geometry: of the backbone, if it is loaded.
    """
    geometry = geometry or geometry_of(experiment.backbone)
    sizes = {key: getattr(experiment, key) for key in ("train_size", "eval_size")}
    changes = {key: near for key, size in sizes.items() if (near := geometry.nearest(size)) != size}
    if changes:
        text = " and ".join(f"{key}={size} instead of {sizes[key]}" for key, size in changes.items())
        notice(f"backbone {experiment.backbone!r}: {text}, because its patches are {geometry.patch} pixels wide.")
    return experiment.but(**changes) if changes else experiment


def preset_here(name: str, **changes: Any) -> "Experiment":
    """`Experiment.preset` for this machine: with accepted sizes, and an embedded backbone if weights are unreachable.

    Only this project's recipes for photographs ('camvid', 'folder', ...) fall back to `EMBEDDED_FOR_PHOTOGRAPHS`, with
    a notice, unless `changes` set a backbone or `published`. The paper's recipes keep their backbone.
    """
    from .experiment import PRESETS, Experiment

    experiment = Experiment.preset(name, **changes)
    ours = PRESETS.get(name, {}).get("dataset") == name and experiment.backbone not in EMBEDDED
    if ours and "backbone" not in changes and not experiment.official.published:
        try:
            load_network(experiment.backbone)
        except HubUnreachable as error:
            notice(f"{error} Using {EMBEDDED_FOR_PHOTOGRAPHS!r}, trained on far fewer images: expect lower scores.")
            experiment = experiment.but(backbone=EMBEDDED_FOR_PHOTOGRAPHS)
    return fit_sizes(experiment)
