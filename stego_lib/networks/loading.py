"""Loads timm networks with their weights, by name or from a file."""

import json
import re
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.utils import get_session
from torch import Tensor, nn

from ..utils.errors import StegoError, brief, did_you_mean, explained
from ..utils.fields import split_backbone
from ..utils.paths import PACKAGE
from .geometry import Geometry, measure

# Backbones in this package.
EMBEDDED = {path.stem: path for path in sorted((PACKAGE / "weights").glob("*.safetensors"))}
# DINO's names of its networks -> timm's names.
SHORT_NAMES = {
    "dino_vits8": "vit_small_patch8_224.dino",
    "dino_vits16": "vit_small_patch16_224.dino",
    "dino_vitb8": "vit_base_patch8_224.dino",
    "dino_vitb16": "vit_base_patch16_224.dino",
}
# "mean" and "std" of the image channels.
Normalization = dict[str, tuple[float, ...]]
IMAGENET: Normalization = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
# timm arguments that do not change the layers of the features.
HARMLESS_ARGUMENTS = {"num_classes", "global_pool", "img_size", "dynamic_img_size", "dynamic_img_pad"}
# Timeout of the hub in seconds. Its own client retries for a minute.
HUB_TIMEOUT = 4.0


class HubUnreachable(StegoError):
    """The weights of a timm network could not be downloaded."""


def load_network(name: str, heads: int | None = None) -> tuple[nn.Module, Normalization]:
    """Loads a network and the mean and std of its inputs. See `Backbone` for `name` and `heads`."""
    timm_name, file = split_backbone(name)
    path = EMBEDDED.get(name, Path(file))
    if file and timm_name:
        return _from_named_file(full_name(timm_name), path, heads)
    if path.suffix.lower() == ".safetensors":
        return _from_metadata(path)
    if path.suffix.lower() == ".pth":
        from .dino import dino_vit
        from .weights import read_weights, unwrap

        weights = unwrap(read_weights(path)[0], "cls_token")
        weights = {key: value for key, value in weights.items() if not key.startswith("head.")}
        return dino_vit(weights, path, heads), IMAGENET
    if path.suffix.lower() == ".ckpt":
        from .checkpoint import read_published

        return read_published(path).vit, IMAGENET
    return _from_hub(full_name(name))


def full_name(name: str) -> str:
    """timm's name of a network. Raises StegoError if it is unknown."""
    timm_name = SHORT_NAMES.get(name, name)
    if timm_name not in timm.list_models(pretrained="." in timm_name):
        known = [*EMBEDDED, *SHORT_NAMES, *timm.list_models(), *timm.list_models(pretrained=True)]
        raise StegoError(
            f"Unknown backbone {name!r}{did_you_mean(name, known, 3)}. Use the name of a timm network, one of "
            f"{', '.join([*EMBEDDED, *SHORT_NAMES])}, or a .safetensors, .pth or .ckpt file."
        )
    return timm_name


def geometry_of(name: str) -> Geometry:
    """The geometry of a backbone, without downloading weights."""
    timm_name, file = split_backbone(name)
    if name in EMBEDDED or (file and not timm_name):
        return measure(load_network(name)[0].eval(), name)
    with torch.device("meta"):
        return measure(_create(full_name(timm_name)).eval(), name)


def _create(architecture: str, *, pretrained: bool = False, **arguments: Any) -> nn.Module:
    """Creates a timm network without classifier, for images of any size if supported."""
    arguments = {"num_classes": 0} | arguments
    try:
        return timm.create_model(architecture, pretrained=pretrained, **{"dynamic_img_size": True} | arguments)
    except TypeError as error:
        if "dynamic_img_size" not in str(error):
            raise
        return timm.create_model(architecture, pretrained=pretrained, **arguments)


def _from_hub(timm_name: str) -> tuple[nn.Module, Normalization]:
    """Loads a network with weights from timm's hub or its cache."""
    try:
        _check_hub(timm_name)
        network = _create(timm_name, pretrained=True)
    except RuntimeError as error:  # timm: there is no file, or it belongs to another network
        raise StegoError(
            f"timm cannot load the weights of {timm_name!r} ({brief(error)}). Delete them in {constants.HF_HUB_CACHE}."
        ) from error
    except Exception as error:  # the hub's client raises many types for network, proxy and disk
        raise HubUnreachable(
            f"The weights of {timm_name!r} could not be downloaded ({brief(error)}). Use an embedded backbone "
            f"({', '.join(EMBEDDED)}), or {timm_name}@FILE with a downloaded file."
        ) from error
    return _as_published(network, timm_name), _normalization(network)


def _check_hub(timm_name: str) -> None:
    """Raises an error if weights are not cached and the hub does not answer within `HUB_TIMEOUT`."""
    config = timm.get_pretrained_cfg(timm_name)
    if constants.HF_HUB_OFFLINE or not (config and config.hf_hub_id):
        return
    names = [config.hf_hub_filename] if config.hf_hub_filename else ["model.safetensors", "pytorch_model.bin"]
    if not any(isinstance(try_to_load_from_cache(config.hf_hub_id, name), str) for name in names):
        get_session().head(f"{constants.ENDPOINT}/{config.hf_hub_id}", timeout=HUB_TIMEOUT)


def _as_published(network: Any, timm_name: str, heads: int | None = None) -> nn.Module:
    """Replaces DINO's networks by `dino_vit`, because timm resamples position embeddings differently."""
    if not (timm_name.startswith("vit") and timm_name.endswith(".dino")):
        return network
    from .dino import dino_vit

    return dino_vit(network.state_dict(), timm_name, heads or network.blocks[0].attn.num_heads)


def _normalization(network: Any) -> Normalization:
    """Mean and std of the network in timm."""
    return {key: tuple(network.pretrained_cfg[key]) for key in IMAGENET}


def _from_metadata(path: Path) -> tuple[nn.Module, Normalization]:
    """Loads the network that the metadata of a .safetensors file describe."""
    from .weights import fill, read_weights

    weights, metadata = read_weights(path)
    problem = f"The metadata of {path} do not describe a timm network"
    remedy = "Use NAME@FILE, where NAME is the network in timm."
    with explained(Exception, problem, remedy):  # timm raises many types for wrong arguments
        arguments = json.loads(metadata["timm"])
        architecture = arguments.pop("architecture")
        own = {key: tuple(arguments.pop(key)) for key in IMAGENET if key in arguments}
        if architecture.partition(".")[0] not in timm.list_models():  # rejects 'hf-hub:...', which downloads code
            raise ValueError(f"timm has no architecture {architecture!r}")
        if re.search("pretrained|checkpoint|cache|url|file|hub", " ".join(arguments)):
            raise ValueError("the arguments refer to other files")
        network = _create(architecture, **arguments)
        original = "." in architecture or arguments.keys() <= HARMLESS_ARGUMENTS
        normalization = (_normalization(network) if original else IMAGENET) | own
    fill(network, _without_classifier(weights, network), path)
    return network, normalization


def _from_named_file(timm_name: str, path: Path, heads: int | None) -> tuple[nn.Module, Normalization]:
    """Loads a timm network with weights from a file of timm's hub or of the network's authors."""
    from .weights import fill, read_weights, unwrap

    network = _create(timm_name)
    names = network.state_dict().keys()
    weights = unwrap(read_weights(path)[0], next(iter(names)))
    if names - weights.keys():
        with suppress(Exception):  # timm's converters raise many types for a file of another network
            weights = sys.modules[type(network).__module__].checkpoint_filter_fn(weights, network)
    fill(network, _without_classifier(weights, network), path)
    return _as_published(network, timm_name, heads), _normalization(network)


def _without_classifier(weights: dict[str, Tensor], network: Any) -> dict[str, Tensor]:
    """Removes the weights of the classifier, which the network does not have."""
    classifier = network.pretrained_cfg.get("classifier") or ()
    names = (classifier,) if isinstance(classifier, str) else classifier
    prefixes, expected = tuple(f"{name}." for name in names), network.state_dict()
    return {key: value for key, value in weights.items() if key in expected or not key.startswith(prefixes)}
