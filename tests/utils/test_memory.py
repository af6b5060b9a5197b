"""A lack of memory is told from other errors."""

import pytest
import torch

from stego_lib import StegoError
from stego_lib.utils.memory import enough_memory

LACK = "you tried to allocate 20 GiB"


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError(LACK), MemoryError(LACK), RuntimeError(f"DefaultCPUAllocator: can't allocate memory: {LACK}")],
    ids=["of the GPU", "of Python", "of PyTorch on the CPU"],
)  # fmt: skip
def test_a_lack_of_memory_says_what_needs_it_and_what_would_take_less(error):
    said = rf"a step needs more memory than there is \(.*{LACK}\); lower batch_size"
    with pytest.raises(StegoError, match=said), enough_memory("a step", "lower batch_size"):
        raise error


def test_pytorchs_own_words_are_known():
    """More than any machine has; nothing is taken."""
    with pytest.raises(StegoError, match="needs more memory"), enough_memory("a step", "-"):
        torch.empty(2**55)


def test_other_errors_stay_what_they_are():
    with pytest.raises(RuntimeError, match="sizes do not match"), enough_memory("a step", "-"):
        raise RuntimeError("sizes do not match")
