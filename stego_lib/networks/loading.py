"""Networks of timm with their weights: by name, from timm's hub, or from a file that may come from a stranger."""

import argparse
import json
import math
import re
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import timm
import torch
from huggingface_hub import constants as hub
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.utils import get_session
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..utils.errors import StegoError, brief, did_you_mean
from ..utils.fields import Size, split_backbone
from ..utils.files import load_tensors
from ..utils.notices import notice
from ..utils.paths import PACKAGE
from .dino import dino_vit, load_pth
from .geometry import Geometry, is_vit, measure
from .released import read_released

if TYPE_CHECKING:
    from ..experiment import Experiment

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
Normalization = dict[str, tuple[float, ...]]
"""Mean and std of an image's channels."""
IMAGENET: Normalization = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
SAME_NETWORK = {"num_classes", "global_pool", "img_size", "dynamic_img_size", "dynamic_img_pad"}
"""Arguments of timm that leave the layers between the first and the last as they are."""
HUB_ANSWERS = 4.0
"""Seconds within which timm's hub answers, or counts as out of reach."""


class HubUnreachable(StegoError):
    """The weights of a network that timm knows could not be fetched."""


def load_network(name: str, heads: int | None = None) -> tuple[nn.Module, Normalization]:
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
        return read_released(path).vit, IMAGENET
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

    asking = threading.Thread(
        target=ask, daemon=True
    )  # the name of a host may be looked up for longer than any timeout
    asking.start()
    asking.join(1.5 * HUB_ANSWERS)
    if error := found[0] if found else TimeoutError("no answer"):
        raise OSError(f"{hub.ENDPOINT} is out of reach: {brief(error)}") from error


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


def _from_file(path: Path, fill: bool = True) -> tuple[nn.Module, Normalization]:
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


def _from_named_file(timm_name: str, path: Path, heads: int | None) -> tuple[nn.Module, Normalization]:
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
    network.load_state_dict(
        {key: value.float() if value.is_floating_point() else value for key, value in weights.items()}
    )
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


def geometry_of(name: str) -> Geometry:
    """The geometry of the backbone called `name`, without fetching weights. StegoError if there is none of that name."""
    timm_name, file = split_backbone(name)
    path = EMBEDDED.get(name, Path(file))
    if path.suffix.lower() == ".safetensors" and (name in EMBEDDED or not timm_name):
        empty = _from_file(path, fill=False)[0]
    elif timm_name:
        with torch.device("meta"):
            empty = _create(_known(timm_name)).eval()
        if not is_vit(empty):  # without values, some would not notice positions that they do not know
            with torch.random.fork_rng([]):
                empty = _create(timm_name).eval()
    else:
        empty = load_network(name)[0].eval()
    return measure(empty, name)


def fit_sizes(experiment: "Experiment", geometry: Geometry | None = None, quiet: bool = False) -> "Experiment":
    """The experiment with the nearest sizes that its backbone takes; a notice says which changed.

    geometry: that of the backbone, where it is loaded. quiet: show no notice.
    """
    geometry = geometry or geometry_of(experiment.backbone)
    asked = {key: getattr(experiment, key) for key in ("train_size", "eval_size")}
    taken = {key: size if _fits(geometry, size) else geometry.nearest(size) for key, size in asked.items()}
    changed = [key for key in asked if taken[key] != asked[key]]
    if not changed:
        return experiment
    if not quiet:
        why = f"its patch or stride is {geometry.patch} pixels" if geometry.only is None else "it takes no other size"
        what = " and ".join(f"{key} {_shown(taken[key])} in place of {_shown(asked[key])}" for key in changed)
        notice(f"backbone {experiment.backbone!r}: {what}, for {why}")
    return experiment.but(**taken)


def _fits(geometry: Geometry, size: Size) -> bool:
    return geometry.fits(*(size if isinstance(size, tuple) else (size, size)))


def _shown(size: Size) -> str:
    return f"{size[0]} x {size[1]}" if isinstance(size, tuple) else str(size)
