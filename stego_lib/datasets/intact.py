"""Looks at every picture and label map before long work begins."""

from concurrent.futures import ThreadPoolExecutor

from ..errors import StegoError
from ..progress import progress
from .base import SegmentationDataset

TOLD = 5
"""Files that are named; of more, the number is told."""


def refuse_broken(dataset: SegmentationDataset) -> None:
    """Reads every picture and label map once, and raises one StegoError that lists those which cannot be used.

    Reading is a few per cent of the work of a backbone, which would else end at the first such file, hours later.
    """
    first = {path: row for row, path in reversed(list(enumerate(dataset.pictures)))}  # of several crops, one

    def fault(row: int) -> str | None:
        try:
            dataset[row]
        except StegoError as error:
            return str(error)
        return None

    with ThreadPoolExecutor() as pool:  # Pillow decodes outside Python's lock
        looked = progress(
            pool.map(fault, sorted(first.values())), f"files of {dataset.name} {dataset.split}", total=len(first)
        )
        faults = [found for found in looked if found]
    if len(faults) > 1:
        more = f"\n  and {len(faults) - TOLD} more" if len(faults) > TOLD else ""
        listed = "".join(f"\n  {found}" for found in faults[:TOLD])
        raise StegoError(
            f"{len(faults)} of {len(first)} pictures of {dataset.name} {dataset.split} cannot be used:{listed}{more}"
        )
    if faults:
        raise StegoError(faults[0])
