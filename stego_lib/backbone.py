"""The frozen feature extractor: a network of timm that gives (B, C, h, w)."""

import argparse
import copy
import json
import math
import re
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import timm
import torch
import torch.nn.functional as F
from huggingface_hub import constants as hub
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.utils import get_session
from safetensors import SafetensorError, safe_open
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from .experiment import PRESETS, Experiment, Size, split_backbone
from .networks.dino import dino_vit, load_pth
from .published.checkpoint import read_published
from .runtime.errors import StegoError, brief, did_you_mean
from .runtime.files import fingerprint, load_tensors
from .runtime.memory import enough_memory
from .runtime.notices import notice
from .runtime.paths import PACKAGE

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
the system: pieces of two ViT-S images instead of sixteen take a fifth less time an image (two cores of an AMD EPYC)."""
PUBLISHED_HEADS = 6
"""Attention heads that the published code assumes when it reads keys."""
IMAGENET: dict[str, tuple[float, ...]] = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
SAME_NETWORK = {"num_classes", "global_pool", "img_size", "dynamic_img_size", "dynamic_img_pad"}
"""Arguments of timm that leave the layers between the first and the last as they are."""
HUB_ANSWERS = 4.0
"""Seconds within which timm's hub answers, or counts as out of reach."""


class HubUnreachable(StegoError):
    """The weights of a network that timm knows could not be fetched."""


@dataclass(frozen=True)
class Geometry:
    """What a network makes of an image's size."""

    dim: int
    """C, channels of the features."""
    patch: int
    """Pixels a side of one grid cell: the patch of a ViT, the stride of the last stage of a network with stages."""
    only: tuple[int, int] | None
    """The one size (H, W) in pixels that the network takes; None for any that divides into grid cells."""
    normed: bool
    """Whether timm applies the network's final norm to its features."""

    def fits(self, height: int, width: int) -> bool:
        """Whether the network takes images of this size in pixels."""
        return (height, width) == self.only or not (self.only or height % self.patch or width % self.patch)

    def nearest(self, size: Size) -> Size:
        """The size that fits and is nearest to `size`."""
        if self.only is not None:
            return self.only
        if isinstance(size, tuple):
            return self._side(size[0]), self._side(size[1])
        return self._side(size)

    def _side(self, pixels: int) -> int:
        return min(max(1, round(pixels / self.patch)), 8192 // self.patch) * self.patch


class Backbone(nn.Module):
    """A frozen network. Features are the patch tokens of a ViT's last block after the final norm (paper, section 3.1).

    Of a network with stages (ResNet, ConvNeXt, Swin, ...) they are what its last stage gives, after the final norm where it
    has one; a grid cell is then as wide as the stage's stride.

    Normalization is the network's own: for a timm name what timm's `pretrained_cfg` says. A .safetensors file may give "mean"
    and "std" beside the timm arguments in its metadata. Without them it is that of its architecture, if that has a tag
    ("vit_small_patch16_224.augreg_in21k") or if no argument changes the network; the weights of a network of another depth,
    width or patch are not those that timm knows, and ImageNet's mean and std are taken, as for .pth and .ckpt files.

    Parameters
    ----------
    name
        An embedded backbone (`EMBEDDED`), a short name (`SHORT_NAMES`), any network of timm that gives a map of features
        (weights from its hub or the cache of it), or a file: .safetensors whose metadata hold the timm arguments as JSON under
        "timm", .pth as DINO's authors publish it, or .ckpt, a released STEGO checkpoint. "NAME@FILE" takes the weights of the
        timm network NAME from FILE, for example a `model.safetensors` downloaded by hand.
    features
        'feat' (tokens) or 'KK' (keys of the attention, head by head, neither scaled nor normed).
    block
        Which block of a ViT they come from, counted from 0, or from the end: -1 the last, -2 the published n=2; the final norm
        is applied to tokens of any block.
    heads
        Attention heads of a .pth file whose heads are not 64 wide.
    published
        Read keys as if there were six heads, as the published code does (it scrambles those of a ViT-B).

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
        self.vit, normalization = _load(name, heads)
        self.features, self.block = features, block
        if _is_vit(self.vit):
            self.block = _block_of(name, len(self.vit.blocks), block)
        elif block != -1 or features == "KK":
            raise StegoError(
                f"backbone {name!r} has stages in place of a ViT's blocks: its features are those of the last stage; leave "
                "block at -1 and features at 'feat'"
            )
        if features == "KK":
            self.key_heads = PUBLISHED_HEADS if published else _attention(self).num_heads
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
        """The backbone that an experiment asks for."""
        return cls(
            experiment.backbone, features=experiment.features, block=experiment.block, published=experiment.published,
            device=experiment.device, precision=experiment.precision,
        )  # fmt: skip

    def untrained(self, seed: int = 0) -> "Backbone":
        """The same network with random weights: what its shape alone gives."""
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
        """Pixels a side of one grid cell."""
        return self.geometry.patch

    def train(self, mode: bool = True) -> "Backbone":
        """Stays in eval mode whatever is asked."""
        return super().train(False)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """(h, w) in grid cells of an image of (H, W) pixels; StegoError if the network does not take that size."""
        if not self.geometry.fits(height, width):
            if self.geometry.only is not None:
                only = "{} x {}".format(*self.geometry.only)
                raise StegoError(f"backbone {self.name!r} takes images of {only} pixels alone, not of {height} x {width}")
            raise StegoError(
                f"images of {height} x {width} pixels do not divide into patches of {self.patch}; choose sizes that are multiples of {self.patch}"
            )
        return height // self.patch, width // self.patch

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 or float [0, 1] images (B, 3, H, W) -> what the network takes, on its device and in its precision."""
        images = images.to(self.device)
        if images.dtype == torch.uint8:
            images = images.float() / 255
        return (images.to(self.precision) - self.mean) / self.std

    @torch.inference_mode()
    def forward(self, images: Tensor) -> Tensor:
        """uint8 or float [0, 1] images (B, 3, H, W) -> float32 features (B, C, h, w) on the backbone's device."""
        cells = math.prod(self.grid(*images.shape[-2:]))
        pieces = self.normalize(images).split(self._at_once(cells))
        return torch.cat(
            [self._keys(piece) if self.features == "KK" else self._tokens(piece) for piece in pieces]
        ).float()

    def _at_once(self, cells: int) -> int:
        """Images of so many grid cells that go through the network together."""
        if self.device.type != "cpu":
            return 2**31
        widest = 4 * self.dim * cells * self.precision.itemsize  # the hidden layer of a block's MLP
        return max(1, AT_ONCE // widest)

    def _tokens(self, images: Tensor) -> Tensor:
        """Tokens of the block after the final norm, or what the last stage gives, (B, C, h, w)."""
        return _map(self.vit, images, self.block, self.geometry.normed)

    def _keys(self, images: Tensor) -> Tensor:
        """Keys of the block's attention, (B, C, h, w); channel = head * (C / heads) + channel of the head."""
        attention, seen = _attention(self), []
        with attention.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])):
            self.vit.forward_intermediates(images, indices=[self.block], intermediates_only=True, stop_early=True)
        keys = _project_keys(attention, seen[0])[:, self.vit.num_prefix_tokens :]
        batch, grid = len(images), self.grid(*images.shape[-2:])
        # The memory order is (B, heads, positions, channels of a head), in which a wrong number of heads mixes positions.
        by_head = keys.unflatten(2, (attention.num_heads, -1)).transpose(1, 2)
        return by_head.reshape(batch, self.key_heads, *grid, -1).movedim(-1, 2).flatten(1, 2)

    def fingerprint(self) -> str:
        """Changes with anything that changes the features: weights, architecture, block, normalization, precision ..."""
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


@torch.inference_mode()
def measure(network: nn.Module, name: str) -> Geometry:
    """What `network` makes of images: found by trying, of the smallest image and else of the one that it was made for.

    Shapes alone are needed, so that a network without weights, on the device "meta", will do.
    Raises StegoError that calls it `name` if it gives no map of features.
    """
    try:
        cell = int(network.feature_info[-1]["reduction"])
    except (AttributeError, KeyError, IndexError, TypeError) as error:
        raise StegoError(_no_map(name, brief(error))) from error
    made_for = (getattr(network, "pretrained_cfg", None) or {}).get("input_size", ())[1:]
    made_for = getattr(getattr(network, "patch_embed", None), "img_size", None) or made_for
    small = (2 * cell, 3 * cell)
    # A network with stages may know positions up to the size that it was made for, and no further.
    larger = (made_for[0] + 2 * cell, made_for[1] + cell) if made_for and not _is_vit(network) else small
    tried = ""
    for normed in (True, False):
        for sizes in filter(None, ([small, larger], [tuple(made_for)] if made_for else None)):
            try:
                maps = [_map(network, _blank(network, size), -1, normed).shape for size in sizes]
            except Exception as error:  # whatever a network raises for a size, or a norm, that it was not made for
                tried = tried or brief(error)
                continue
            if all((1, h * cell, w * cell) == (n, *size) for (n, _, h, w), size in zip(maps, sizes, strict=True)):
                return Geometry(maps[0][1], cell, None if sizes[0] == small else sizes[0], normed)
    raise StegoError(_no_map(name, tried or "its last stage is no grid over the image"))


@torch.inference_mode()
def _blank(network: nn.Module, size: tuple[int, int]) -> Tensor:
    return torch.zeros(1, 3, *size, device=next(network.parameters()).device)


def _no_map(name: str, reason: str) -> str:
    return f"backbone {name!r} gives no map of features ({reason}); choose a ViT or a convolutional network of timm"


def geometry_of(name: str) -> Geometry:
    """The geometry of the backbone called `name`, without fetching weights. StegoError if there is none of that name."""
    timm_name, file = split_backbone(name)
    path = EMBEDDED.get(name, Path(file))
    if path.suffix.lower() == ".safetensors" and (name in EMBEDDED or not timm_name):
        empty = _from_file(path, fill=False)[0]
    elif timm_name:
        with torch.device("meta"):
            empty = _create(_known(timm_name)).eval()
        if not _is_vit(empty):  # without values, some would not notice positions that they do not know
            with torch.random.fork_rng([]):
                empty = _create(timm_name).eval()
    else:
        empty = _load(name, None)[0].eval()
    return measure(empty, name)


def fit_sizes(experiment: Experiment, geometry: Geometry | None = None, tell: bool = True) -> Experiment:
    """The experiment with sizes that its backbone takes: the nearest, and a notice if they are not those that were asked for.

    geometry: that of the backbone, where it is loaded already.
    """
    geometry = geometry or geometry_of(experiment.backbone)
    asked = {key: getattr(experiment, key) for key in ("train_size", "eval_size")}
    taken = {key: size if _fits(geometry, size) else geometry.nearest(size) for key, size in asked.items()}
    changed = [key for key in asked if taken[key] != asked[key]]
    if not changed:
        return experiment
    if tell:
        why = f"its patch or stride is {geometry.patch} pixels" if geometry.only is None else "it takes no other size"
        what = " and ".join(f"{key} {_shown(taken[key])} in place of {_shown(asked[key])}" for key in changed)
        notice(f"backbone {experiment.backbone!r}: {what}, for {why}")
    return experiment.but(**taken)


def _fits(geometry: Geometry, size: Size) -> bool:
    return geometry.fits(*(size if isinstance(size, tuple) else (size, size)))


def _shown(size: Size) -> str:
    return f"{size[0]} x {size[1]}" if isinstance(size, tuple) else str(size)


def _is_vit(network: nn.Module) -> bool:
    """Whether it has blocks of tokens that can be chosen among, rather than stages."""
    return hasattr(network, "blocks") and hasattr(network, "num_prefix_tokens")


def _block_of(name: str, depth: int, block: int) -> int:
    if not -depth <= block < depth:
        raise StegoError(f"backbone {name!r} has {depth} blocks: block must be {-depth} to {depth - 1}, not {block}")
    return block % depth


def _map(network: nn.Module, images: Tensor, block: int, normed: bool) -> Tensor:
    """Features of the block (or of the last stage, -1), (B, C, h, w), after the final norm, wherever the network keeps it."""
    found = network.forward_intermediates(
        images, indices=[block], norm=normed, intermediates_only=True, stop_early=True
    )[-1]
    norm = getattr(getattr(network, "head", None), "norm", None)  # of ConvNeXt, which timm's intermediates leave out
    return norm(found) if isinstance(norm, LayerNorm2d) else found


def _load(name: str, heads: int | None) -> tuple[nn.Module, dict[str, tuple[float, ...]]]:
    """The network with its weights, and mean and std of what it takes."""
    timm_name, file = split_backbone(name)
    path = EMBEDDED.get(name, Path(file))
    if file and timm_name:
        return _from_named_file(_known(timm_name), path, heads)
    if path.suffix.lower() == ".safetensors":
        return _from_file(path)
    if path.suffix.lower() == ".pth":
        return dino_vit(load_pth(path), str(path), heads), IMAGENET
    if path.suffix.lower() == ".ckpt":
        return read_published(path).vit, IMAGENET
    timm_name = _known(name)
    try:
        _refuse_silent_hub(timm_name)
        network = _create(timm_name, pretrained=True)
    except Exception as error:  # whatever the hub's client raises when the network, the proxy or the disk fails
        if "Error(s) in loading state_dict" in str(error):
            raise StegoError(
                f"the weights in the cache of timm's hub are not those of {timm_name!r} ({brief(error)}); remove them from {hub.HF_HUB_CACHE}"
            ) from error
        raise HubUnreachable(
            f"the weights of {timm_name!r} could not be fetched from timm's hub ({brief(error)}); without a network take an embedded "
            f"backbone ({', '.join(EMBEDDED)}), or download model.safetensors elsewhere and take {timm_name}@FILE as the backbone"
        ) from error
    return _as_published(network, timm_name), _of_config(network)


def _known(name: str) -> str:
    """timm's name for `name`; StegoError if it has none."""
    timm_name = SHORT_NAMES.get(name, name)
    if timm_name not in timm.list_models(pretrained="." in timm_name):
        known = [*EMBEDDED, *SHORT_NAMES, *timm.list_models(), *timm.list_models(pretrained=True)]
        raise StegoError(
            f"unknown backbone {name!r}{did_you_mean(name, known, 3)}; give one of {', '.join([*EMBEDDED, *SHORT_NAMES])}, the "
            "name of a timm network or a .safetensors, .pth or .ckpt file"
        )
    return timm_name


def _create(architecture: str, *, pretrained: bool = False, **arguments: Any) -> nn.Module:
    """timm's network without its classifier, for images of any size where it can be had so."""
    arguments = {"num_classes": 0} | arguments
    try:
        return timm.create_model(architecture, pretrained=pretrained, **{"dynamic_img_size": True} | arguments)
    except TypeError as error:
        if "dynamic_img_size" not in str(error):
            raise
        return timm.create_model(architecture, pretrained=pretrained, **arguments)


def _as_published(network: nn.Module, timm_name: str, heads: int | None = None) -> nn.Module:
    """DINO's networks as DINO runs them, for timm would resample their position embeddings in a way of its own."""
    if not timm_name.endswith(".dino") or not timm_name.startswith("vit"):
        return network
    return dino_vit(network.state_dict(), timm_name, heads or network.blocks[0].attn.num_heads)


def _of_config(network: nn.Module) -> dict[str, tuple[float, ...]]:
    """Mean and std with which timm says the network was trained."""
    return {key: tuple(network.pretrained_cfg[key]) for key in IMAGENET}


def _refuse_silent_hub(timm_name: str) -> None:
    """Raises OSError if weights are not in the hub's cache and the hub does not answer; its client would try for a minute."""
    config = timm.get_pretrained_cfg(timm_name)
    repository = config and config.hf_hub_id
    if not repository or hub.HF_HUB_OFFLINE:
        return
    names = [config.hf_hub_filename] if config.hf_hub_filename else ["model.safetensors", "pytorch_model.bin"]
    if any(isinstance(try_to_load_from_cache(repository, name), str) for name in names):
        return
    found: list[Exception | None] = []

    def ask() -> None:
        try:
            get_session().head(f"{hub.ENDPOINT}/{repository}", timeout=HUB_ANSWERS)
            found.append(None)
        except Exception as error:
            found.append(error)

    asking = threading.Thread(target=ask, daemon=True)  # the name of a host may be looked up for longer than any timeout
    asking.start()
    asking.join(1.5 * HUB_ANSWERS)
    if error := found[0] if found else TimeoutError("no answer"):
        raise OSError(f"{hub.ENDPOINT} is out of reach: {brief(error)}") from error


def _attention(backbone: Backbone) -> nn.Module:
    """The attention whose keys are the features; StegoError if the block has none of a kind that we know."""
    attention = getattr(backbone.vit.blocks[backbone.block], "attn", None)
    if not (getattr(attention, "qkv", None) or getattr(attention, "k_proj", None)) or not hasattr(attention, "num_heads"):
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


def _read(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Tensors and metadata of a file; of a .pth, what torch.save wrote and no metadata."""
    if not path.is_file():
        raise StegoError(f"backbone file {path.resolve()} does not exist; embedded backbones: {', '.join(EMBEDDED)}")
    if path.suffix.lower() != ".safetensors":
        stored = load_tensors(path, (argparse.Namespace,))
        return stored if isinstance(stored, dict) else {}, {}
    with safe_open(path, "pt") as file:
        weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (a safetensors file is no dict)
        return weights, file.metadata() or {}


def _from_file(path: Path, fill: bool = True) -> tuple[nn.Module, dict[str, tuple[float, ...]]]:
    """The network that the metadata of a .safetensors file describe, with its weights unless `fill` is False."""
    try:
        weights, metadata = _read(path)
        if "timm" not in metadata:
            raise StegoError(
                f"{path} does not say which network its weights are of: name timm's network beside it, as in "
                f'backbone vit_small_patch14_dinov2.lvd142m@{path}, or put "timm" into its metadata: '
                '{"architecture": NAME, ...timm arguments}'
            )
        arguments = json.loads(metadata["timm"])
        stated = {key: arguments.pop(key) for key in IMAGENET if key in arguments}
        architecture = arguments.pop("architecture")
        build = _harmless(architecture, arguments, len(weights))
        with torch.device("meta"):  # shapes alone: a small file may name a network that no memory holds
            empty = build().eval()
        weights = _without_classifier(weights, empty)
        _refuse_other_shapes(empty.state_dict(), weights)
        own = "." in architecture or arguments.keys() <= SAME_NETWORK
        normalization = (_of_config(empty) if own else IMAGENET) | _three_numbers(stated)
        return (_filled(build, weights) if fill else empty), normalization
    except KeyError as error:
        raise StegoError(
            f'{path} lacks {error} in its metadata: "timm" must hold {{"architecture": NAME, ...timm arguments}}'
        ) from error
    except StegoError:
        raise
    except (SafetensorError, RuntimeError, TypeError, ValueError, AssertionError, AttributeError) as error:
        raise StegoError(f"{path} is not a backbone that timm can build ({brief(error)})") from error


def _from_named_file(
    timm_name: str, path: Path, heads: int | None
) -> tuple[nn.Module, dict[str, tuple[float, ...]]]:
    """timm's network `timm_name` with the weights of a file, of timm's hub or of the network's authors."""
    build = partial(_create, timm_name)
    try:
        with torch.device("meta"):
            empty = build()
        weights = _as_timm_names_them(_read(path)[0], empty)
        _refuse_other_shapes(empty.state_dict(), weights)
        network = _filled(build, weights)
    except StegoError:
        raise
    except Exception as error:  # timm's converters raise whatever they stumble over in a file of another kind
        raise StegoError(f"{path} does not hold the weights of {timm_name!r} ({brief(error)})") from error
    return _as_published(network, timm_name, heads), _of_config(empty)


def _as_timm_names_them(stored: dict[str, Any], network: nn.Module) -> dict[str, Tensor]:
    """The weights of `network` in what a file holds, whatever its authors wrap them in."""
    for key in ("state_dict", "model", "teacher", "target_encoder"):
        stored = stored[key] if isinstance(stored.get(key), dict) else stored
    weights = {key: value for key, value in stored.items() if isinstance(value, Tensor)}
    expected = network.state_dict()
    first = next(iter(expected))
    prefixes = [key.removesuffix(first) for key in weights if key.endswith(first)]  # 'module.encoder_q.', say
    prefix = min(prefixes, key=len, default="")
    weights = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
    if expected.keys() - weights.keys():
        convert = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
        weights = convert(weights, network) if convert else weights
    return _without_classifier(weights, network)


def _without_classifier(weights: dict[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """The weights without those of a classifier that the network was built without."""
    named = network.pretrained_cfg.get("classifier") or ()
    heads = tuple(f"{name}." for name in ((named,) if isinstance(named, str) else named))
    expected = network.state_dict()
    return {key: value for key, value in weights.items() if key in expected or not key.startswith(heads)}


def _filled(build: Callable[[], nn.Module], weights: dict[str, Tensor]) -> nn.Module:
    network = build()
    network.load_state_dict({key: value.float() if value.is_floating_point() else value for key, value in weights.items()})
    return network


def _three_numbers(stated: dict[str, Any]) -> dict[str, tuple[float, ...]]:
    """Mean and std as a file's metadata state them; ValueError for what is no mean or std of three channels."""
    for key, values in stated.items():
        good = isinstance(values, list) and len(values) == 3 and all(isinstance(one, int | float) for one in values)
        if not good or not all(map(math.isfinite, values)) or (key == "std" and min(values) <= 0):
            raise ValueError(f"{key} {values!r} in its metadata is not a list of three numbers of a use")
    return {key: tuple(map(float, values)) for key, values in stated.items()}


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
    return partial(_create, architecture, **arguments)


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


EMBEDDED_FOR_PHOTOGRAPHS = "photos_vit_tiny8"
"""The embedded backbone that has seen photographs; see stego_lib/weights/photos_vit_tiny8.md."""


def preset_here(name: str, **changes: Any) -> Experiment:
    """`Experiment.preset`, with sizes that the backbone takes (see `fit_sizes`), and with the embedded backbone for photographs
    where the recipe's own cannot be fetched.

    The latter only for the recipes of this project on real images ('camvid', 'folder'), only if `changes` name no backbone, and
    with a notice: that backbone has seen a thousandth of DINO's photographs. The experiment, and so every run record, names what was taken.
    The paper's recipes, and `published=True`, stand for published numbers; with another backbone these would be other
    numbers under the same name, so nothing is put in its place there and loading the backbone is an error.
    """
    experiment = Experiment.preset(name, **changes)
    ours = name in PRESETS and PRESETS[name]["dataset"] == name  # a recipe named like its dataset is not the paper's
    if not ours or "backbone" in changes or experiment.published or experiment.backbone in EMBEDDED:
        return fit_sizes(experiment)
    try:
        return fit_sizes(experiment, Backbone(experiment.backbone, device="cpu").geometry)
    except HubUnreachable as error:
        notice(
            f"{error}. Taking {EMBEDDED_FOR_PHOTOGRAPHS!r}, which comes with the package and has seen a thousandth as "
            f"many photographs: its scores are no scores of {experiment.backbone!r}. Name a backbone to take another"
        )
        return fit_sizes(experiment.but(backbone=EMBEDDED_FOR_PHOTOGRAPHS))
