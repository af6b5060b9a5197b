"""Refines segment borders with a dense CRF (Krähenbühl and Koltun 2011), as the paper's last step does."""

import importlib.util

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import StegoError

ITERATIONS = 10
SMOOTHNESS = dict(sxy=1, compat=3)
"""Gaussian kernel: standard deviation in pixels, weight."""
APPEARANCE = dict(sxy=67, srgb=3, compat=4)
"""Bilateral kernel: standard deviations in pixels and in grey levels, weight."""


def available() -> bool:
    """Whether pydensecrf is installed."""
    return importlib.util.find_spec("pydensecrf") is not None


def dense_crf(image: np.ndarray, log_probabilities: Tensor, iterations: int = ITERATIONS) -> Tensor:
    """Class probabilities of each pixel after mean-field inference.

    image: uint8 (H, W, 3), RGB. log_probabilities: (n, h, w); brought to (H, W) bilinearly if smaller.
    Returns float32 (n, H, W). The channels are handed over as BGR, as in the published code (the filter is not
    symmetric in them). Raises StegoError without pydensecrf.
    """
    if not available():
        raise StegoError("the dense CRF needs pydensecrf: pip install 'stego_lib[crf]' (a C++ compiler must be there)")
    from pydensecrf.densecrf import DenseCRF2D
    from pydensecrf.utils import unary_from_softmax

    height, width = image.shape[:2]
    upsampled = F.interpolate(log_probabilities[None].float(), (height, width), mode="bilinear", align_corners=False)[0]
    probabilities = upsampled.softmax(0).cpu().numpy()
    field = DenseCRF2D(width, height, len(probabilities))
    field.setUnaryEnergy(np.ascontiguousarray(unary_from_softmax(probabilities)))
    field.addPairwiseGaussian(**SMOOTHNESS)
    field.addPairwiseBilateral(rgbim=np.ascontiguousarray(image[:, :, ::-1]), **APPEARANCE)
    return torch.from_numpy(np.array(field.inference(iterations))).reshape(-1, height, width)
