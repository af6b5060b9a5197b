"""A lack of memory is told from other errors."""

import pytest
import torch

from stego_lib import StegoError
from stego_lib.utils.errors import enough_memory


def allocate_too_much() -> None:
    torch.empty(2**55)


def full_gpu() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("work", [allocate_too_much, full_gpu])
def test_a_lack_of_memory_is_an_error_with_a_remedy(work):
    with pytest.raises(StegoError, match="batch_size"), enough_memory("a step", "Lower batch_size."):
        work()


def test_other_errors_stay_what_they_are():
    with pytest.raises(RuntimeError, match="sizes do not match"), enough_memory("a step", "-"):
        raise RuntimeError("sizes do not match")
