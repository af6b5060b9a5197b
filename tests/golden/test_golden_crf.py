"""The dense CRF against the published code's numbers."""

import sys

import pytest
import torch
from common import golden
from torch.testing import assert_close

from stego_lib import crf
from stego_lib.utils.notices import Notice

G = golden("crf")
WITHIN = {"pydensecrf": 1e-4, "lattice": 1e-3}
"""Engine -> largest difference from the published probabilities."""


@pytest.fixture(autouse=True, params=WITHIN)
def engine(request, monkeypatch):
    if request.param == "pydensecrf":
        pytest.importorskip("pydensecrf.densecrf", reason="pydensecrf is not installed (make -B setup)")
    else:
        monkeypatch.setitem(sys.modules, "pydensecrf.densecrf", None)
    assert crf.engine() == request.param
    return request.param


def refine(case: str, image: str = "image_used_rgb_uint8", **options: int) -> torch.Tensor:
    """Class probabilities of a golden case; `image`: the published code loses one gray level here and there, so its own image is stored."""
    return crf.dense_crf(G[f"{case}.{image}"], torch.from_numpy(G[f"{case}.logprobs"]), **options)


def agrees(found: torch.Tensor, name: str) -> None:
    within = WITHIN[crf.engine()]
    expected = torch.from_numpy(G[name])
    assert found.shape == expected.shape and found.dtype == torch.float32
    assert_close(found, expected, rtol=0, atol=within)


@pytest.mark.parametrize("case", ["sq64", "rect96x64"])
def test_probabilities_and_labels(case):
    found = refine(case)
    agrees(found, f"{case}.Q")
    labels = torch.from_numpy(G[f"{case}.argmax"]).long()
    assert (found.argmax(0) == labels).float().mean() >= 0.9999
    before = torch.from_numpy(G[f"{case}.unary_argmax"]).long()
    assert (labels != before).any(), "the CRF is meant to change something here"


@pytest.mark.parametrize("iterations", [0, 1, 2, 5])
def test_fewer_iterations(iterations):
    agrees(refine("sq64", iterations=iterations), f"sq64.Q_iter{iterations}")


def test_the_number_of_iterations_is_the_published_one():
    assert int(G["params_max_iter"]) == crf.ITERATIONS


def test_appearance_kernel_alone(monkeypatch):
    monkeypatch.setitem(crf.SMOOTHNESS, "compat", 0)
    agrees(refine("sq64"), "sq64.Q_bilateral_only")


def test_smoothness_kernel_alone(monkeypatch):
    monkeypatch.setitem(crf.APPEARANCE, "compat", 0)
    agrees(refine("sq64"), "sq64.Q_gaussian_only")


def test_the_image_as_it_was():
    agrees(refine("sq64", "image_rgb_uint8"), "sq64.Q_with_original_uint8")


def test_probabilities_sum_to_one():
    assert_close(refine("rect96x64").sum(0), torch.ones(96, 64), rtol=0, atol=1e-5)


def test_maps_that_are_refined_together_are_those_refined_alone():
    """Of different numbers of classes, too."""
    image = G["sq64.image_used_rgb_uint8"]
    maps = [
        torch.rand(classes, 64, 64, generator=torch.Generator().manual_seed(classes)).softmax(0).numpy()
        for classes in (4, 4, 7)
    ]
    for found, one in zip(crf.refine(image, maps), maps, strict=True):
        assert_close(torch.from_numpy(found), torch.from_numpy(crf.refine(image, [one])[0]), rtol=0, atol=1e-5)


def test_without_pydensecrf_it_says_what_to_install(engine):
    if engine == "lattice":
        with pytest.warns(
            Notice, match=r"CRF is the project's own.*pip install 'cython>=3'.* --no-build-isolation pydensecrf2"
        ):
            crf.engine(quiet=False)


def test_sources_that_were_not_built_are_no_pydensecrf(monkeypatch, tmp_path):
    """A clone of pydensecrf in the working folder, or a build for another Python, has the package but not its extension."""
    (tmp_path / "pydensecrf").mkdir()
    (tmp_path / "pydensecrf" / "__init__.py").write_text("")
    for name in [name for name in sys.modules if name.split(".")[0] == "pydensecrf"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    assert crf.engine() == "lattice"
