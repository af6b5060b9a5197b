"""Refines segment borders with a dense CRF (Krähenbühl and Koltun 2011), as the paper's last step does.

It runs on the CPU, also where there is a GPU: of the libraries at hand, only pydensecrf gives the published code's numbers.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import StegoError
from .meanfield import APPEARANCE, INSTALL, ITERATIONS, SMOOTHNESS, available, refine

__all__ = ["APPEARANCE", "INSTALL", "ITERATIONS", "SMOOTHNESS", "available", "dense_crf"]


def dense_crf(image: np.ndarray, log_probabilities: Tensor, iterations: int = ITERATIONS) -> Tensor:
    """Class probabilities of each pixel after mean-field inference.

    image: uint8 (H, W, 3), RGB. log_probabilities: (n, h, w), up to a constant at each pixel; brought to (H, W)
    bilinearly if smaller. Returns float32 (n, H, W). Raises StegoError without pydensecrf.
    """
    if not available():
        raise StegoError(f"the dense CRF needs pydensecrf: {INSTALL}")
    probabilities = (
        F.interpolate(log_probabilities[None].float(), image.shape[:2], mode="bilinear")[0].softmax(0).cpu().numpy()
    )
    return torch.from_numpy(refine(image, [probabilities], iterations)[0])
