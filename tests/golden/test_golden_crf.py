"""The dense CRF against the published code's numbers, and its two engines against each other."""

import numpy as np
import pytest
import torch
from common import golden
from torch.testing import assert_close

from stego_lib import StegoError, crf

G = golden("crf")
# Engine -> largest difference from the published probabilities.
TOLERANCE = {"pydensecrf": 1e-4, "lattice": 1e-3}


@pytest.fixture(params=TOLERANCE)
def engine(request):
    if request.param == "pydensecrf":
        pytest.importorskip("pydensecrf.densecrf", reason="pydensecrf is not installed (make -B setup)")
    return request.param


def refine(case: str, image: str = "image_used_rgb_uint8", **options) -> torch.Tensor:
    """Class probabilities of a golden case. The image is stored as the published code saw it."""
    return crf.dense_crf(G[f"{case}.{image}"], torch.from_numpy(G[f"{case}.logprobs"]), **options)


def check(probabilities: torch.Tensor, name: str, engine: str) -> None:
    assert probabilities.dtype == torch.float32
    assert_close(probabilities, torch.from_numpy(G[name]), rtol=0, atol=TOLERANCE[engine])
    assert_close(probabilities.sum(0), torch.ones(probabilities.shape[1:]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", ["sq64", "rect96x64"])
def test_probabilities_and_labels(case, engine):
    refined = refine(case, engine=engine)
    check(refined, f"{case}.Q", engine)
    labels = torch.from_numpy(G[f"{case}.argmax"]).long()
    assert (refined.argmax(0) == labels).float().mean() >= 0.9999
    assert (labels != torch.from_numpy(G[f"{case}.unary_argmax"]).long()).any(), "the CRF changes something here"


@pytest.mark.parametrize("iterations", [0, 1, 2, 5])
def test_fewer_iterations(iterations, engine):
    check(refine("sq64", iterations=iterations, engine=engine), f"sq64.Q_iter{iterations}", engine)


@pytest.mark.parametrize(
    ("left_out", "case"), [("SMOOTHNESS", "sq64.Q_bilateral_only"), ("APPEARANCE", "sq64.Q_gaussian_only")]
)
def test_one_kernel_alone(left_out, case, engine, monkeypatch):
    monkeypatch.setitem(getattr(crf, left_out), "compat", 0)
    check(refine("sq64", engine=engine), case, engine)


def test_the_original_image(engine):
    check(refine("sq64", "image_rgb_uint8", engine=engine), "sq64.Q_with_original_uint8", engine)


def test_the_number_of_iterations_is_the_published_one():
    assert int(G["params_max_iter"]) == crf.ITERATIONS


def test_maps_refined_together_equal_maps_refined_alone(engine):
    image = G["sq64.image_used_rgb_uint8"]
    maps = [torch.rand(n, 64, 64, generator=torch.Generator().manual_seed(n)).softmax(0).numpy() for n in (4, 4, 7)]
    for refined, map_ in zip(crf.refine(image, maps, engine=engine), maps, strict=True):
        assert_close(refined, crf.refine(image, [map_], engine=engine)[0], rtol=0, atol=1e-5)


def test_both_engines_agree_on_an_image_with_texture():
    pytest.importorskip("pydensecrf.densecrf", reason="pydensecrf is not installed (make -B setup)")
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (1, 3, 12, 16), generator=generator).float()
    image = torch.nn.functional.interpolate(image, (96, 128), mode="bilinear")[0]
    image = (image + 8 * torch.randn(3, 96, 128, generator=generator)).clamp(0, 255).byte().permute(1, 2, 0).numpy()
    logits = 3 * torch.randn(12, 12, 16, generator=generator)
    theirs, ours = (crf.dense_crf(image, logits, engine=engine).argmax(0) for engine in ("pydensecrf", "lattice"))
    assert (theirs == ours).float().mean() >= 0.999


@pytest.mark.parametrize("image", [np.zeros((3, 8, 8), np.uint8), np.zeros((8, 8, 3)), torch.zeros(8, 8, 3).byte()])
def test_what_is_no_image_is_refused(image):
    with pytest.raises(StegoError, match="uint8"):
        crf.dense_crf(image, torch.zeros(2, 4, 4))


def test_an_unknown_engine_is_refused():
    with pytest.raises(StegoError, match="engine"):
        refine("sq64", engine="gpu")
