"""The golden arrays kept here are those of the project's shared folder."""

import numpy as np
import pytest
from common import GOLDEN, golden

FILES = sorted(path.relative_to(GOLDEN).as_posix() for path in GOLDEN.rglob("*.npz") if path.stem != "frozen")


@pytest.mark.parametrize("name", FILES)
def test_arrays_equal_the_originals(shared, name):
    if not (shared / "golden" / name).exists():
        pytest.skip(f"shared/golden/{name} is not beside the project")
    with np.load(shared / "golden" / name) as original:
        for key, value in golden(name.removesuffix(".npz")).items():
            assert value.dtype == original[key].dtype, key
            np.testing.assert_array_equal(value, original[key], err_msg=key)
