"""Does speed cost quality? Trains what the chapter on speed compares and has no run record of (`stego_book.studies.quality`).

python -m benchmarks.quality                                          # scenes
python -m benchmarks.quality --camvid-root FOLDER --camvid-backbone FILE   # CamVid too
"""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from stego_book.studies import quality
from stego_lib import Experiment
from stego_lib.features import online, opening
from stego_lib.features.source import Source
from stego_lib.utils.paths import project_root, runs_root

from .limits import bfloat16_is_native


class Float32Features(online.OnlineFeatures):
    """Online features that are never rounded, and kept in memory: backbone and images are fixed, so they never change.

    The library's own online features are rounded to float16, like stored ones.
    """

    kept: ClassVar[dict[str, dict[int, Tensor]]] = {}
    """Fingerprint of a set of features -> image -> float32 (C, h, w)."""

    def __init__(self, source: Source, root: str | Path):
        super().__init__(source, root)
        self._kept = self.kept.setdefault(source.fingerprint(root, "features"), {})

    def rows(self, index: Tensor, device: torch.device | str = "cpu") -> Tensor:
        new = [row for row in index.unique().tolist() if row not in self._kept]
        for rows in torch.tensor(new, dtype=torch.int64).split(self._batch) if new else ():
            images = torch.stack(self._images.take(rows.tolist()))
            computed = self._source.features(images, rows.tolist()).float()
            self._kept.update(zip(rows.tolist(), computed.cpu(), strict=True))
        return torch.stack([self._kept[row] for row in index.tolist()]).to(device)


@contextmanager
def unrounded() -> Iterator[None]:
    """Within it, experiments with feature_store="online" train and are scored on `Float32Features`."""
    usual = opening.OnlineFeatures
    opening.OnlineFeatures = Float32Features  # type: ignore[misc]
    try:
        yield
    finally:
        opening.OnlineFeatures = usual  # type: ignore[misc]


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.quality", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--camvid-root", help="folder that holds CamVid; without it, scenes alone")
    parser.add_argument("--camvid-backbone", help="backbone of the recipe for CamVid, name or file")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--records", type=Path, default=project_root() / "book" / "records")
    parser.add_argument("--runs", type=Path, default=runs_root(), help="folder for runs and stored features")
    given = parser.parse_args(arguments)
    bases = [Experiment.preset("scenes")]
    if given.camvid_root:
        changes = {"data_root": given.camvid_root, "backbone": given.camvid_backbone}
        bases.append(Experiment.preset("camvid", **{key: value for key, value in changes.items() if value}))
    with unrounded():
        for base in bases:
            for way, study in quality.studies(base, given.seeds, given.records).items():
                if study.variants[0].experiment.precision == "auto" and bfloat16_is_native():
                    print(
                        f"{', probes '.join(way)}: not trained, as 'auto' is bfloat16 here and its records are of float32"
                    )
                    continue
                study.run(runs_dir=given.runs)
            found = quality.studies(base, given.seeds, given.records)
            print(base.dataset, quality.table(found), quality.verdicts(found), sep="\n")


if __name__ == "__main__":
    main()
