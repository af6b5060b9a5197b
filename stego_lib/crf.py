"""Refines segment borders with a dense CRF (Krähenbühl and Koltun 2011), as the paper's last step does.

It runs on the CPU, also where there is a GPU: of the libraries at hand, only pydensecrf gives the published code's numbers.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from .runtime.errors import StegoError
from .runtime.notices import notice

if TYPE_CHECKING:  # the workers that run `refine` start at once without torch
    from torch import Tensor

ITERATIONS = 10
SMOOTHNESS = dict(sxy=1, compat=3)
"""Gaussian kernel: standard deviation in pixels, weight."""
APPEARANCE = dict(sxy=67, srgb=3, compat=4)
"""Bilateral kernel: standard deviations in pixels and in gray levels, weight."""
INSTALL = "pip install 'cython>=3' setuptools, then pip install --no-build-isolation pydensecrf2, with a C++ compiler"
"""How to install pydensecrf. It asks for an old Cython, which cannot build it on Python 3.13 and later."""


def available(quiet: bool = True) -> bool:
    """Whether pydensecrf can be imported. quiet: show no notice if it cannot."""
    try:
        import pydensecrf.densecrf  # noqa: F401
    except ImportError:
        if not quiet:
            notice(f"pydensecrf is not installed: scores are reported without the CRF (to have it: {INSTALL})")
        return False
    return True


def refine(image: np.ndarray, maps: Sequence[np.ndarray], iterations: int = ITERATIONS) -> list[np.ndarray]:
    """Class probabilities after mean-field inference, float32 (n, H, W), for each of several maps of one image.

    image: uint8 (H, W, 3), RGB. maps: class probabilities, float32 (n, H, W). Consecutive maps with as many classes share the
    kernels' lattice, which depends on the image alone. Channels are passed as BGR, as in the published code (the filter is not
    symmetric in them).
    """
    from pydensecrf.densecrf import DenseCRF2D
    from pydensecrf.utils import unary_from_softmax

    height, width = image.shape[:2]
    field, classes, refined = None, 0, []
    for probabilities in maps:
        if field is None or len(probabilities) != classes:
            classes = len(probabilities)
            field = DenseCRF2D(width, height, classes)
            field.addPairwiseGaussian(**SMOOTHNESS)
            field.addPairwiseBilateral(rgbim=np.ascontiguousarray(image[:, :, ::-1]), **APPEARANCE)
        field.setUnaryEnergy(np.ascontiguousarray(unary_from_softmax(probabilities)))
        refined.append(np.array(field.inference(iterations)).reshape(-1, height, width))
    return refined


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

    Raises
    ------
    StegoError
        Without pydensecrf.
    """
    import torch
    import torch.nn.functional as F

    if not available():
        raise StegoError(f"the dense CRF needs pydensecrf: {INSTALL}")
    probabilities = (
        F.interpolate(log_probabilities[None].float(), image.shape[:2], mode="bilinear")[0].softmax(0).cpu().numpy()
    )
    return torch.from_numpy(refine(image, [probabilities], iterations)[0])
