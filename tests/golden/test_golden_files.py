"""The golden arrays kept here are those of the project's shared folder."""

import numpy as np
import pytest
from common import GOLDEN, golden

FILES = sorted(path.relative_to(GOLDEN).as_posix() for path in GOLDEN.rglob("*.npz") if path.stem != "frozen")


def test_all_files_are_there():
    assert {"correlation_loss", "probes", "metrics", "knn", "trajectory", "crf", "crf_loss", "head", "transforms"} <= {
        name.removesuffix(".npz") for name in FILES
    }
    family = {f"family/{name}" for name in ("smooseg", "primaps", "hp", "cause", "depthg")}
    assert family <= {name.removesuffix(".npz") for name in FILES}


@pytest.mark.parametrize("name", FILES)
def test_arrays_equal_the_originals(shared, name):
    if not (shared / "golden" / name).exists():
        pytest.skip(f"shared/golden/{name} is not beside the project")
    with np.load(shared / "golden" / name) as original:
        for key, value in golden(name.removesuffix(".npz")).items():
            assert value.dtype == original[key].dtype, key
            np.testing.assert_array_equal(value, original[key], err_msg=key)
