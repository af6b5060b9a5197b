"""Refines segment borders with a dense CRF (Krähenbühl and Koltun 2011), as in the paper's evaluation.

The default engine uses the sparse matrices of `stego_lib.lattice`. `engine="pydensecrf"` is the library of the
published code (extra `crf`, needs a C++ compiler). Their labels agree at 99.9 % of the pixels or more.
"""

from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .lattice import NormalizedLattice
from .utils.errors import StegoError, check_choice

ENGINES = ("lattice", "pydensecrf")
ITERATIONS = 10
# Smallest probability after clipping, as in the published code.
MIN_PROBABILITY = 1e-5
# Gaussian kernel: standard deviation in pixels, weight.
SMOOTHNESS = dict(sxy=1, compat=3)
# Bilateral kernel: standard deviations in pixels and in gray levels, weight.
APPEARANCE = dict(sxy=67, srgb=3, compat=4)


def dense_crf(
    image: np.ndarray, log_probabilities: Tensor, iterations: int = ITERATIONS, *, engine: str = "lattice"
) -> Tensor:
    """Refines class probabilities by mean-field inference.

    Parameters
    ----------
    image
        uint8 (H, W, 3), RGB.
    log_probabilities
        (n, h, w), up to a constant per pixel; upsampled bilinearly to (H, W).
    iterations
        Number of mean-field steps.
    engine
        "lattice" or "pydensecrf".

    Returns
    -------
    Tensor
        Class probabilities, float32 (n, H, W).

    Raises
    ------
    StegoError
        If the image has another shape or dtype, or the engine is unknown or not installed.

    Examples
    --------
    >>> image = np.zeros((40, 60, 3), np.uint8)
    >>> dense_crf(image, torch.rand(4, 10, 15)).shape
    torch.Size([4, 40, 60])
    """
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise StegoError("The image must be a uint8 array (H, W, 3). Convert it, for example from floats in [0, 1].")
    logits = F.interpolate(log_probabilities[None].float(), image.shape[:2], mode="bilinear")[0]
    return torch.from_numpy(refine(image, [logits.softmax(0).cpu().numpy()], iterations, engine)[0])


def refine(
    image: np.ndarray, maps: Sequence[np.ndarray], iterations: int = ITERATIONS, engine: str = "lattice"
) -> list[np.ndarray]:
    """Refines several maps of class probabilities of one image, float32 (n, H, W) each, with the same kernels.

    image: uint8 (H, W, 3), RGB. The channels are converted to BGR as in the published code, because the result depends
    on their order.
    """
    check_engine(engine)
    bgr = np.ascontiguousarray(image[:, :, ::-1])
    return (_by_pydensecrf if engine == "pydensecrf" else _by_lattice)(bgr, maps, iterations)


def check_engine(engine: str) -> None:
    """Raises StegoError if an engine is unknown or not installed."""
    check_choice("engine", engine, ENGINES)
    if engine == "pydensecrf" and find_spec("pydensecrf") is None:  # whose build needs more than an extra
        raise StegoError(
            "engine='pydensecrf' needs pydensecrf2 and a C++ compiler. Run: pip install 'cython>=3' setuptools; "
            "pip install --no-build-isolation pydensecrf2"
        )


def _by_pydensecrf(bgr: np.ndarray, maps: Sequence[np.ndarray], iterations: int) -> list[np.ndarray]:
    from pydensecrf.densecrf import DenseCRF2D
    from pydensecrf.utils import unary_from_softmax

    height, width = bgr.shape[:2]
    refined = []
    for probabilities in maps:
        field = DenseCRF2D(width, height, len(probabilities))
        field.addPairwiseGaussian(**SMOOTHNESS)
        field.addPairwiseBilateral(rgbim=bgr, **APPEARANCE)
        field.setUnaryEnergy(np.ascontiguousarray(unary_from_softmax(probabilities, clip=MIN_PROBABILITY)))
        refined.append(np.array(field.inference(iterations)).reshape(-1, height, width))
    return refined


def _by_lattice(bgr: np.ndarray, maps: Sequence[np.ndarray], iterations: int) -> list[np.ndarray]:
    """Concatenates the classes of all maps, so that each kernel is applied once."""
    height, width = bgr.shape[:2]
    appearance = np.concatenate(
        [_positions(height, width) / APPEARANCE["sxy"], bgr.reshape(-1, 3) / APPEARANCE["srgb"]], 1
    )
    kernels = (
        (SMOOTHNESS["compat"], _grid_lattice(height, width, SMOOTHNESS["sxy"])),
        (APPEARANCE["compat"], NormalizedLattice(appearance)),
    )
    logs = [np.log(map_.clip(MIN_PROBABILITY, 1)).reshape(len(map_), -1) for map_ in maps]
    unary = np.concatenate(logs).T.astype(np.float32)
    borders = np.cumsum([len(map_) for map_ in maps])[:-1]

    def softmax(logits: np.ndarray) -> np.ndarray:
        parts = [np.exp(part - part.max(1, keepdims=True)) for part in np.split(logits, borders, 1)]
        return np.concatenate([part / part.sum(1, keepdims=True) for part in parts], 1)

    q = softmax(unary)
    for _ in range(iterations):
        messages = [weight * kernel(q) for weight, kernel in kernels if weight]
        q = softmax(sum(messages, unary))
    return [np.ascontiguousarray(part.T).reshape(-1, height, width) for part in np.split(q, borders, 1)]


@lru_cache(maxsize=2)
def _grid_lattice(height: int, width: int, deviation: float) -> NormalizedLattice:
    """The lattice of the positions in images of one size."""
    return NormalizedLattice(_positions(height, width) / deviation)


def _positions(height: int, width: int) -> np.ndarray:
    """Coordinates (x, y) of each pixel, (H W, 2)."""
    return np.indices((height, width)).reshape(2, -1)[::-1].T
