"""Stand-ins of the checkpoints that STEGO's authors released."""

import sys
from collections import OrderedDict, defaultdict
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from stego_lib.networks.dino import DinoViT

FOREIGN = {
    "DictConfig": "omegaconf.dictconfig",
    "ListConfig": "omegaconf.listconfig",
    "AnyNode": "omegaconf.nodes",
    "ContainerMetadata": "omegaconf.base",
    "ModelCheckpoint": "pytorch_lightning.callbacks.model_checkpoint",
}
"""Classes that such a pickle names -> their modules."""


OPTIONS = dict(
    dataset_name="cityscapes", model_type="vit_small", dino_feat_type="feat", projection_type="nonlinear", dim=6,
    dropout=True, crop_type="five", max_steps=7000, batch_size=32, num_neighbors=7, res=224, zero_clamp=True,
    stabalize=True, pointwise=False, feature_samples=9, neg_samples=4, lr=1e-3, neg_inter_weight=0.9,
    pos_inter_weight=0.5, pos_intra_weight=1, neg_inter_shift=0.3, pos_inter_shift=0.2, pos_intra_shift=0.4,
    rec_weight=0.0, crf_weight=0.0, aug_alignment_weight=0.0, log_dir="x", pretrained_weights=None, alpha=0.5,
    tags=["a", "b"],
)  # fmt: skip


def tensors(n_classes: int = 8, extra: int = 0, seed: int = 0) -> OrderedDict[str, torch.Tensor]:
    """The state dict of a tiny STEGO: a ViT of 48 channels, 2 blocks and 6 heads, codes of 6 channels."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        vit = DinoViT(
            img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=6, num_classes=0, dynamic_img_size=True
        )
        found = {f"net.model.{key}": value + 0.1 * torch.randn_like(value) for key, value in vit.state_dict().items()}
        shapes = {
            "net.cluster1.0.weight": (6, 48, 1, 1), "net.cluster1.0.bias": (6,),
            "net.cluster2.0.weight": (48, 48, 1, 1),
            "net.cluster2.0.bias": (48,), "net.cluster2.2.weight": (6, 48, 1, 1), "net.cluster2.2.bias": (6,),
            "train_cluster_probe.clusters": (n_classes, 6), "cluster_probe.clusters": (n_classes + extra, 6),
            "linear_probe.weight": (n_classes, 6, 1, 1), "linear_probe.bias": (n_classes,),
            "decoder.weight": (48, 6, 1, 1), "decoder.bias": (48,),
        }  # fmt: skip
        return OrderedDict(found | {key: torch.randn(shape) for key, shape in shapes.items()})


def write_ckpt(path: Path, state: dict[str, Any], *, options: dict[str, Any] | None = None, **more: Any) -> Path:
    """A file in the published layout. The foreign classes exist while it is written and no longer."""
    made = {}
    with pytest.MonkeyPatch.context() as patch:
        for name, module in FOREIGN.items():
            made[name] = type(name, (), {"__module__": module, "__qualname__": name})
            parts = module.split(".")
            for depth in range(1, len(parts) + 1):
                patch.setitem(sys.modules, ".".join(parts[:depth]), ModuleType(".".join(parts[:depth])))
            setattr(sys.modules[module], name, made[name])

        def leaf(value: Any) -> Any:
            node = made["ListConfig" if isinstance(value, list) else "AnyNode"]()
            node._metadata = made["ContainerMetadata"]()
            if isinstance(value, list):
                node._content = [leaf(item) for item in value]
            else:
                node._val = value
            return node

        config = made["DictConfig"]()
        config._content = {key: leaf(value) for key, value in (OPTIONS if options is None else options).items()}
        config._metadata, config._parent = made["ContainerMetadata"](), None
        config._metadata.flags = defaultdict(dict, struct=False)
        torch.save(
            {
                "epoch": 1, "global_step": 7000, "pytorch-lightning_version": "1.5.10",
                "state_dict": state, "optimizer_states": [],
                "callbacks": {made["ModelCheckpoint"]: {"best_model_score": torch.tensor(21.0)}},
                "hparams_name": "kwargs", "hyper_parameters": {"n_classes": 8, "cfg": config},
            } | more,
            path,
        )  # fmt: skip
    return path
