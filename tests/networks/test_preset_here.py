"""Which backbone a recipe gets where timm's hub cannot be reached: announced, and never in place of the paper's."""

import warnings

import pytest
import timm

from stego_lib import Backbone, Experiment, StegoError
from stego_lib import backbone as backbone_module
from stego_lib.backbone import EMBEDDED, EMBEDDED_FOR_PHOTOGRAPHS, preset_here
from stego_lib.utils.notices import Notice

PUBLISHED = ["cityscapes", "cocostuff27-vits8", "cocostuff27-vitb8", "cityscapes-vitb8", "potsdam3-vits8"]


@pytest.fixture
def no_hub(monkeypatch):
    """timm builds networks, and finds no weights."""
    build = timm.create_model

    def create(name, pretrained=False, **options):
        if pretrained:
            raise OSError("no route to host")
        return build(name, pretrained=False, **options)

    monkeypatch.setattr(timm, "create_model", create)


@pytest.fixture
def silent():
    """Turns a notice into an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Notice)
        yield


@pytest.mark.parametrize("name", ["camvid", "folder"])
def test_without_the_hub_real_images_get_the_embedded_backbone_and_a_notice(no_hub, name):
    with pytest.warns(Notice, match=r"dino_vits8|vit_small_patch8_224\.dino") as told:
        experiment = preset_here(name, seed=3)
    assert experiment == Experiment.preset(name, seed=3, backbone="photos_vit_tiny8_d6")
    text = str(told[0].message)
    assert "no route to host" in text and "photos_vit_tiny8_d6" in text and "no scores of 'dino_vits8'" in text


def test_the_embedded_backbone_for_photographs_is_there_and_loads_without_a_hub(no_hub):
    assert EMBEDDED_FOR_PHOTOGRAPHS in EMBEDDED
    backbone = Backbone(EMBEDDED_FOR_PHOTOGRAPHS, device="cpu", precision="float32")
    assert (backbone.dim, backbone.patch, len(backbone.vit.blocks)) == (192, 8, 6)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_papers_recipes_keep_their_backbone_and_fail_without_it(no_hub, silent, name):
    experiment = preset_here(name)
    assert experiment == Experiment.preset(name)
    with pytest.raises(StegoError, match="could not be fetched"):
        Backbone.of(experiment)


@pytest.mark.parametrize(
    "changes", [{"backbone": "dino_vits8"}, {"backbone": "dino_vitb8"}, {"published": True}], ids=str
)
def test_what_was_asked_for_by_name_or_as_published_is_not_replaced(no_hub, silent, changes):
    assert preset_here("camvid", **changes) == Experiment.preset("camvid", **changes)


def test_a_paper_recipe_on_other_images_is_still_the_papers(no_hub, silent):
    assert preset_here("cocostuff27-vits8", dataset="camvid").backbone == "dino_vits8"


def test_nothing_is_replaced_where_the_weights_can_be_had(monkeypatch, silent):
    build = timm.create_model
    monkeypatch.setattr(
        timm, "create_model", lambda name, pretrained=False, **options: build(name, pretrained=False, **options)
    )
    assert preset_here("camvid") == Experiment.preset("camvid")


def test_scenes_ask_no_hub(monkeypatch, silent):
    monkeypatch.setattr(backbone_module, "Backbone", lambda *_, **__: pytest.fail("loaded"))
    assert preset_here("scenes") == Experiment.preset("scenes")


def test_other_faults_are_no_reason_for_another_backbone(monkeypatch):
    def fails(*_, **__):
        raise StegoError("not enough memory")

    monkeypatch.setattr(backbone_module, "Backbone", fails)
    with pytest.raises(StegoError, match="not enough memory"):
        preset_here("camvid")
