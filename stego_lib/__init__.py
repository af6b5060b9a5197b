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
    from .datasets import open_dataset
    from .evaluation import evaluate
    from .experiment import PRESETS, Experiment
    from .run import Run, load_run
    from .training import train
    from .utils.errors import DataNotFound, StegoError

__version__ = "0.2.0"
__all__ = ["PRESETS", "Backbone", "DataNotFound", "Experiment", "Run", "StegoError", "evaluate", "load_run"]
__all__ += ["open_dataset", "train"]

# Module of each public name, imported when the name is used, so that small modules load fast.
_MODULES = {"PRESETS": "experiment", "Backbone": "backbone", "DataNotFound": "utils.errors", "Experiment": "experiment"}
_MODULES |= {"Run": "run", "StegoError": "utils.errors", "evaluate": "evaluation", "load_run": "run"}
_MODULES |= {"open_dataset": "datasets", "train": "training"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
