"""STEGO: unsupervised semantic segmentation by distilling feature correspondences (Hamilton et al., ICLR 2022).

>>> from stego_lib import Experiment, evaluate, train
>>> run = train(Experiment.preset("scenes"))
>>> record = evaluate(run)
>>> label_map = run.predict("image.jpg")
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .backbone import Backbone
    from .datasets import list_datasets, open_dataset
    from .evaluation import evaluate
    from .experiment import PRESETS, Experiment, list_presets
    from .loss import StegoLoss
    from .model import SegmentationHead
    from .run import Run, load_run
    from .segment import segment_folder
    from .training import train
    from .utils.errors import DataNotFound, StegoError

__version__ = "0.2.0"
__all__ = ["PRESETS", "Backbone", "DataNotFound", "Experiment", "Run", "SegmentationHead", "StegoError", "StegoLoss"]
__all__ += ["evaluate", "list_datasets", "list_presets", "load_run", "open_dataset", "segment_folder", "train"]

# Module of each public name, imported when the name is used, so that small modules load fast.
_MODULES = {"PRESETS": "experiment", "Backbone": "backbone", "DataNotFound": "utils.errors", "Experiment": "experiment"}
_MODULES |= {"Run": "run", "SegmentationHead": "model", "StegoError": "utils.errors", "StegoLoss": "loss"}
_MODULES |= {"evaluate": "evaluation", "list_datasets": "datasets", "list_presets": "experiment", "load_run": "run"}
_MODULES |= {"open_dataset": "datasets", "segment_folder": "segment", "train": "training"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
