"""Backbones of every family, built small and with random weights: nothing is fetched."""

import pytest
import timm
import torch

SMALL = dict(embed_dim=48, depth=3, num_heads=4)
# Family -> timm's name, and what makes it small; each keeps the family's own tokens, positions and norms.
FAMILIES = {
    "DINO": ("vit_small_patch8_224.dino", SMALL | dict(img_size=64)),
    "DINOv2": ("vit_small_patch14_dinov2.lvd142m", SMALL | dict(img_size=70)),
    "DINOv2 with registers": ("vit_small_patch14_reg4_dinov2.lvd142m", SMALL | dict(img_size=70)),
    "DINOv3": ("vit_small_patch16_dinov3.lvd1689m", SMALL | dict(img_size=64)),
    "DINOv3 with biases": ("vit_small_patch16_dinov3_qkvb.lvd1689m", SMALL | dict(img_size=64)),
    "MAE": ("vit_base_patch16_224.mae", SMALL | dict(img_size=64)),
    "CLIP": ("vit_base_patch16_clip_224.openai", SMALL | dict(img_size=64)),
    "EVA-02": ("eva02_tiny_patch14_224.mim_in22k", SMALL | dict(img_size=70)),
    "EVA-02 with keys apart": ("eva02_base_patch14_224.mim_in22k", SMALL | dict(img_size=70)),
}
create_model = timm.create_model


@pytest.fixture
def small_families(monkeypatch):
    """timm builds small networks with random weights, large enough that features differ from place to place."""
    small = dict(FAMILIES.values())

    def build(name, pretrained=False, **options):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            vit = create_model(name, pretrained=False, **options, **small.get(name, {}))
            vit.load_state_dict({key: value + 0.2 * torch.randn_like(value) for key, value in vit.state_dict().items()})
        return vit.eval()

    monkeypatch.setattr(timm, "create_model", build)
