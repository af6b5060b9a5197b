"""The frozen feature extractor: a timm ViT that gives (B, C, h, w)."""

import copy
import json
import math
import re
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import timm
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .errors import StegoError, brief
from .experiment import Experiment, did_you_mean
from .files import fingerprint
from .memory import enough_memory
from .paths import PACKAGE
from .published import read_published
from .vit import dino_vit, load_pth

EMBEDDED = {path.stem: path for path in sorted((PACKAGE / "weights").glob("*.safetensors"))}
"""Backbones that come with the package."""
SHORT_NAMES = {
    "dino_vits8": "vit_small_patch8_224.dino",
    "dino_vits16": "vit_small_patch16_224.dino",
    "dino_vitb8": "vit_base_patch8_224.dino",
    "dino_vitb16": "vit_base_patch16_224.dino",
}
"""The names under which DINO's authors published their networks -> timm's names."""
LARGEST = 16_384
"""Above any number that describes a ViT: pixels, channels, blocks."""
AT_ONCE = 16 * 2**20
"""Bytes of the widest activation that a CPU computes at once. Larger ones leave its cache, and each is memory fetched anew from
the system: pieces of two ViT-S pictures instead of sixteen take a fifth less time a picture (two cores of an AMD EPYC)."""
PUBLISHED_HEADS = 6
"""Attention heads that the published code assumes when it reads keys."""
IMAGENET: dict[str, tuple[float, ...]] = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


class HubUnreachable(StegoError):
    """The weights of a network that timm knows could not be fetched."""


class Backbone(nn.Module):
    """A frozen ViT. Features are the patch tokens of its last block after the final norm (paper, section 3.1).

    name: an embedded backbone (`EMBEDDED`), a short name (`SHORT_NAMES`), any ViT of timm (weights from its hub), or a
    file: .safetensors whose metadata hold the timm arguments as JSON under "timm", .pth as DINO's authors publish it, or
    .ckpt, a released STEGO checkpoint. features: 'feat' (tokens) or 'KK' (keys of the attention, head by head, neither
    scaled nor normed). block: which block they come from, counted from 0, or from the end: -1 the last, -2 the published
    n=2; the final norm is applied to tokens of any block. heads: attention heads of a .pth file whose heads are not 64
    wide. published: read keys as if there were six heads, as the published code does (it scrambles those of a ViT-B).
    Position embeddings of DINO's networks are resampled as DINO does, those of others as their own timm model does.
    Always in eval mode, without gradients. Raises StegoError when it cannot be had.
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
        self.vit, normalisation = _load(name, heads)
        depth = len(self.vit.blocks)
        if not -depth <= block < depth:
            raise StegoError(
                f"backbone {name!r} has {depth} blocks: block must be {-depth} to {depth - 1}, not {block}"
            )
        self.features, self.block = features, block % depth
        if features == "KK":
            self.key_heads = PUBLISHED_HEADS if published else _attention(self).num_heads
            if self.dim % self.key_heads:
                raise StegoError(
                    f"published keys need channels that divide by {self.key_heads}; {name!r} has {self.dim}"
                )
        self.weights_id = _weights_id(self.vit)
        for key, values in normalisation.items():
            self.register_buffer(key, torch.tensor(values).view(1, 3, 1, 1))
        with enough_memory(f"backbone {name!r}", "choose a smaller one, or device='cpu'"):
            self.requires_grad_(False).eval().to(self.device, self.precision)

    @classmethod
    def of(cls, experiment: Experiment) -> "Backbone":
        """The backbone that an experiment asks for."""
        return cls(
            experiment.backbone, features=experiment.features, block=experiment.block, published=experiment.published,
            device=experiment.device, precision=experiment.precision,
        )  # fmt: skip

    def untrained(self, seed: int = 0) -> "Backbone":
        """The same network with random weights: what its shape alone gives."""
        fresh = copy.deepcopy(self)
        fresh.name = f"{self.name} (random weights, seed {seed})"
        with torch.random.fork_rng():
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

    def normalise(self, pictures: Tensor) -> Tensor:
        """uint8 or float [0, 1] pictures (B, 3, H, W) -> what the network takes, on its device and in its precision."""
        pictures = pictures.to(self.device)
        if pictures.dtype == torch.uint8:
            pictures = pictures.float() / 255
        return (pictures.to(self.precision) - self.mean) / self.std

    @torch.inference_mode()
    def forward(self, pictures: Tensor) -> Tensor:
        """uint8 or float [0, 1] pictures (B, 3, H, W) -> float32 features (B, C, h, w) on the backbone's device."""
        cells = math.prod(self.grid(*pictures.shape[-2:]))
        pieces = self.normalise(pictures).split(self._at_once(cells))
        return torch.cat(
            [self._keys(piece) if self.features == "KK" else self._tokens(piece) for piece in pieces]
        ).float()

    def _at_once(self, cells: int) -> int:
        """Pictures of so many grid cells that go through the network together."""
        if self.device.type != "cpu":
            return 2**31
        widest = 4 * self.dim * cells * self.precision.itemsize  # the hidden layer of a block's MLP
        return max(1, AT_ONCE // widest)

    def _tokens(self, pictures: Tensor) -> Tensor:
        """Tokens of the block after the final norm, (B, C, h, w)."""
        found = self.vit.forward_intermediates(
            pictures, indices=[self.block], norm=True, intermediates_only=True, stop_early=True
        )
        return found[-1]

    def _keys(self, pictures: Tensor) -> Tensor:
        """Keys of the block's attention, (B, C, h, w); channel = head * (C / heads) + channel of the head."""
        attention, seen = _attention(self), []
        with attention.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])):
            self.vit.forward_intermediates(pictures, indices=[self.block], intermediates_only=True, stop_early=True)
        keys = _project_keys(attention, seen[0])[:, self.vit.num_prefix_tokens :]
        batch, grid = len(pictures), self.grid(*pictures.shape[-2:])
        # The memory order is (B, heads, positions, channels of a head), in which a wrong number of heads mixes positions.
        by_head = keys.unflatten(2, (attention.num_heads, -1)).transpose(1, 2)
        return by_head.reshape(batch, self.key_heads, *grid, -1).movedim(-1, 2).flatten(1, 2)

    def fingerprint(self) -> str:
        """Changes with anything that changes the features: weights, architecture, block, normalisation, precision ..."""
        which = (self.features, self.block, self.key_heads if self.features == "KK" else None)
        return fingerprint(self.weights_id, repr(self.vit), self.mean, self.std, str(self.precision), which)


def _weights_id(vit: nn.Module) -> str:
    return fingerprint(*(item for pair in sorted(vit.state_dict().items()) for item in pair))


def choose_device(device: str) -> torch.device:
    """'auto' -> the GPU if there is one, else the CPU. StegoError for a device that is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise StegoError(f"device {device!r} cannot be used here ({brief(error)}); use 'auto' or 'cpu'") from error
    return chosen


def choose_precision(precision: str, device: torch.device) -> torch.dtype:
    """'auto' -> bfloat16 where the device multiplies it natively (GPUs from Ampere on, CPUs with AMX), else float32."""
    if precision == "auto":
        native = torch.cuda.is_bf16_supported(False) if device.type == "cuda" else torch.cpu._is_amx_tile_supported()
        return torch.bfloat16 if native else torch.float32
    return getattr(torch, precision)


def _load(name: str, heads: int | None) -> tuple[nn.Module, dict[str, tuple[float, ...]]]:
    path = EMBEDDED.get(name, Path(name).expanduser())
    if path.suffix == ".safetensors":
        return _from_file(path), IMAGENET
    if path.suffix == ".pth":
        return dino_vit(load_pth(path), str(path), heads), IMAGENET
    if path.suffix == ".ckpt":
        return read_published(path).vit, IMAGENET
    timm_name = SHORT_NAMES.get(name, name)
    if timm_name not in timm.list_models(pretrained="." in timm_name):
        known = [*EMBEDDED, *SHORT_NAMES, *timm.list_models("*vit*"), *timm.list_models("*vit*", pretrained=True)]
        raise StegoError(
            f"unknown backbone {name!r}{did_you_mean(name, known, 3)}; give one of {', '.join([*EMBEDDED, *SHORT_NAMES])}, a timm ViT or a .safetensors, .pth or .ckpt file"
        )
    try:
        vit = timm.create_model(timm_name, pretrained=True, num_classes=0, dynamic_img_size=True)
    except TypeError as error:
        raise StegoError(f"backbone {name!r} is not a ViT of timm that takes pictures of any size ({error})") from error
    except Exception as error:  # whatever the hub's client raises when the network, the proxy or the disk fails
        raise HubUnreachable(
            f"the weights of {timm_name!r} could not be fetched from timm's hub ({brief(error)}); "
            f"without a network use a .safetensors file or an embedded backbone: {', '.join(EMBEDDED)}"
        ) from error
    normalisation = {key: vit.pretrained_cfg[key] for key in IMAGENET}
    if timm_name.endswith(".dino"):  # timm would resample DINO's position embeddings in a way of its own
        vit = dino_vit(vit.state_dict(), timm_name, vit.blocks[0].attn.num_heads)
    return vit, normalisation


def _attention(backbone: Backbone) -> nn.Module:
    """The attention whose keys are the features; StegoError if the block has none of a kind that we know."""
    attention = getattr(backbone.vit.blocks[backbone.block], "attn", None)
    if getattr(attention, "qkv", None) is None and getattr(attention, "k_proj", None) is None:
        raise StegoError(f"the attention of backbone {backbone.name!r} has no keys to read; use features='feat'")
    return attention


def _project_keys(attention: nn.Module, tokens: Tensor) -> Tensor:
    """Keys of the tokens, (B, N, C) -> (B, N, C), whether timm keeps query, key and value in one matrix or in three."""
    if getattr(attention, "qkv", None) is None:
        return attention.k_proj(tokens)
    bias = getattr(attention, "k_bias", None)
    if bias is None and attention.qkv.bias is not None:
        bias = attention.qkv.bias.chunk(3)[1]
    return F.linear(tokens, attention.qkv.weight.chunk(3)[1], bias)


def _from_file(path: Path) -> nn.Module:
    if not path.is_file():
        raise StegoError(f"backbone file {path.resolve()} does not exist; embedded backbones: {', '.join(EMBEDDED)}")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            weights = {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118 (a safetensors file is no dict)
        arguments = json.loads(metadata["timm"])
        build = _harmless(arguments.pop("architecture"), arguments, len(weights))
        with torch.device("meta"):  # shapes alone: a small file may name a network that no memory holds
            _refuse_other_shapes(build().state_dict(), weights)
        vit = build()
        vit.load_state_dict(weights)
    except KeyError as error:
        raise StegoError(
            f'{path} lacks {error} in its metadata: "timm" must hold {{"architecture": NAME, ...timm arguments}}'
        ) from error
    except (SafetensorError, RuntimeError, TypeError, ValueError) as error:
        raise StegoError(f"{path} is not a backbone that timm can build ({brief(error)})") from error
    return vit


def _harmless(architecture: str, arguments: dict[str, Any], tensors: int) -> Callable[[], nn.Module]:
    """What builds the network, from the metadata of a file that may come from a stranger.

    timm's arguments can also name other files and addresses, which timm would load, and sizes without bounds.
    Raises ValueError for these.
    """
    if architecture.partition(".")[0] not in timm.list_models():
        raise ValueError(f"timm has no architecture {architecture!r}")
    files = [key for key in arguments if re.search("pretrained|checkpoint|cache|url|file|hub", key)]
    if files:
        raise ValueError(f"its metadata name other files ({', '.join(files)})")
    if oversized := [key for key, value in arguments.items() if isinstance(value, int) and value > LARGEST]:
        raise ValueError(f"{', '.join(oversized)} above {LARGEST}")
    if isinstance(depth := arguments.get("depth"), int) and depth > tensors:
        raise ValueError(f"{depth} blocks cannot be made of {tensors} tensors")
    return partial(timm.create_model, architecture, pretrained=False, **arguments)


def _refuse_other_shapes(expected: dict[str, Tensor], weights: dict[str, Tensor]) -> None:
    wrong = [name for name in {*expected, *weights} if _shape(expected, name) != _shape(weights, name)]
    if wrong:
        first = min(wrong)
        raise ValueError(
            f"{len(wrong)} tensors are not those of the network in its metadata, such as {first}: "
            f"{_shape(weights, first)}, not {_shape(expected, first)}"
        )


def _shape(tensors: dict[str, Tensor], name: str) -> tuple[int, ...] | None:
    return tuple(tensors[name].shape) if name in tensors else None


def upsample(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, C, h, w) -> (B, C, H, W), bilinear; cell centres are kept in place (as align_corners=False).

    As two matrix products, which take a quarter of the time of `F.interpolate` on a CPU and give the same.
    """
    rows, columns = (interpolation(cells, pixels).to(maps) for cells, pixels in zip(maps.shape[-2:], size, strict=True))
    return rows @ (maps @ columns.T)


@lru_cache(maxsize=64)  # a folder may hold images of a thousand sizes
@torch.inference_mode(False)
def interpolation(cells: int, pixels: int) -> Tensor:
    """(pixels, cells): the share of each cell in each pixel of a line; for training as well, if an evaluation asked first."""
    return F.interpolate(torch.eye(cells)[None], pixels, mode="linear", align_corners=False)[0].T.contiguous()
