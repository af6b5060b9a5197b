"""Refines segment borders with a dense CRF (Krähenbühl and Koltun 2011), as the paper's last step does.

Two engines give the same labels: pydensecrf, which the published code uses and which needs a C++ compiler, and, where that is not
installed, the same inference with the sparse matrices of `optional.lattice`.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

import numpy as np

from .utils.notices import notice

if TYPE_CHECKING:  # the workers that run `refine` start at once without torch
    from torch import Tensor

    from .lattice import NormalizedLattice

ITERATIONS = 10
LEAST = 1e-5
"""Probabilities are clipped to it, as in the published code."""
SMOOTHNESS = dict(sxy=1, compat=3)
"""Gaussian kernel: standard deviation in pixels, weight."""
APPEARANCE = dict(sxy=67, srgb=3, compat=4)
"""Bilateral kernel: standard deviations in pixels and in gray levels, weight."""
INSTALL = "pip install 'cython>=3' setuptools, then pip install --no-build-isolation pydensecrf2, with a C++ compiler"
"""How to install pydensecrf. It asks for an old Cython, which cannot build it on Python 3.13 and later."""


def engine(quiet: bool = True) -> Literal["pydensecrf", "lattice"]:
    """What `refine` runs: "pydensecrf" where it can be imported, else "lattice". quiet: show no notice of the latter."""
    try:
        import pydensecrf.densecrf  # noqa: F401
    except ImportError:
        if not quiet:
            notice(
                f"pydensecrf is not installed: the CRF is the project's own, with the same labels at 99.9 % of the pixels or more, in about twice the time (to have it: {INSTALL})"
            )
        return "lattice"
    return "pydensecrf"


def refine(image: np.ndarray, maps: Sequence[np.ndarray], iterations: int = ITERATIONS) -> list[np.ndarray]:
    """Class probabilities after mean-field inference, float32 (n, H, W), for each of several maps of one image.

    image: uint8 (H, W, 3), RGB. maps: class probabilities, float32 (n, H, W); maps of one image share the kernels, which depend
    on the image alone. Channels are passed as BGR, as in the published code (the filter is not symmetric in them).
    """
    return (refine_by_pydensecrf if engine() == "pydensecrf" else refine_by_lattice)(image, maps, iterations)


def refine_by_pydensecrf(
    image: np.ndarray, maps: Sequence[np.ndarray], iterations: int = ITERATIONS
) -> list[np.ndarray]:
    """`refine` by the published code's library."""
    from pydensecrf.densecrf import DenseCRF2D
    from pydensecrf.utils import unary_from_softmax

    bgr = np.ascontiguousarray(image[:, :, ::-1])
    height, width = bgr.shape[:2]
    field, classes, refined = None, 0, []
    for probabilities in maps:
        if field is None or len(probabilities) != classes:
            classes = len(probabilities)
            field = DenseCRF2D(width, height, classes)
            field.addPairwiseGaussian(**SMOOTHNESS)
            field.addPairwiseBilateral(rgbim=bgr, **APPEARANCE)
        field.setUnaryEnergy(np.ascontiguousarray(unary_from_softmax(probabilities, clip=LEAST)))
        refined.append(np.array(field.inference(iterations)).reshape(-1, height, width))
    return refined


def refine_by_lattice(image: np.ndarray, maps: Sequence[np.ndarray], iterations: int = ITERATIONS) -> list[np.ndarray]:
    """`refine` by sparse matrices, for all maps at once: their classes lie side by side in one array, so that a kernel is applied to all together."""
    from .lattice import NormalizedLattice

    bgr = np.ascontiguousarray(image[:, :, ::-1])
    height, width = bgr.shape[:2]
    near = _positions(height, width)
    alike = np.concatenate([near / APPEARANCE["sxy"], bgr.reshape(-1, 3) / APPEARANCE["srgb"]], 1)
    kernels = (
        (SMOOTHNESS["compat"], _grid_lattice(height, width, SMOOTHNESS["sxy"])),
        (APPEARANCE["compat"], NormalizedLattice(alike)),
    )
    unary = np.concatenate([np.log(one.clip(LEAST, 1)).reshape(len(one), -1) for one in maps]).T.astype(np.float32)
    borders = np.cumsum([len(one) for one in maps])[:-1]

    def softmax(logits: np.ndarray) -> np.ndarray:
        parts = [np.exp(part - part.max(1, keepdims=True)) for part in np.split(logits, borders, 1)]
        return np.concatenate([part / part.sum(1, keepdims=True) for part in parts], 1)

    found = softmax(unary)
    for _ in range(iterations):
        found = softmax(sum((weight * kernel(found) for weight, kernel in kernels if weight), unary))
    return [np.ascontiguousarray(part.T).reshape(-1, height, width) for part in np.split(found, borders, 1)]


@lru_cache(maxsize=2)
def _grid_lattice(height: int, width: int, deviation: float) -> "NormalizedLattice":
    """That of the pixels' positions, which all images of a size share."""
    from .lattice import NormalizedLattice

    return NormalizedLattice(_positions(height, width) / deviation)


def _positions(height: int, width: int) -> np.ndarray:
    """x and y of each pixel, (H W, 2)."""
    return np.indices((height, width)).reshape(2, -1)[::-1].T


def refined_labels(image: np.ndarray, maps: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The most probable class of each pixel after `refine`: int32 (H, W) for each of the maps."""
    return [probabilities.argmax(0).astype(np.int32) for probabilities in refine(image, maps)]


def dense_crf(image: np.ndarray, log_probabilities: "Tensor", iterations: int = ITERATIONS) -> "Tensor":
    """Class probabilities of each pixel after mean-field inference.

    Parameters
    ----------
    image
        uint8 (H, W, 3), RGB.
    log_probabilities
        (n, h, w), up to a constant at each pixel; upsampled bilinearly to (H, W).
    iterations
        Of mean-field inference.

    Returns
    -------
    Tensor
        float32 (n, H, W).
    """
    import torch
    import torch.nn.functional as F

    probabilities = (
        F.interpolate(log_probabilities[None].float(), image.shape[:2], mode="bilinear")[0].softmax(0).cpu().numpy()
    )
    return torch.from_numpy(refine(image, [probabilities], iterations)[0])
