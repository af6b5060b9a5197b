"""STEGO: unsupervised semantic segmentation by distilling feature correspondences (Hamilton et al., ICLR 2022).

>>> from stego_lib import Experiment, evaluate, train
>>> run = train(Experiment.preset("scenes"))
>>> record = evaluate(run)
>>> label_maps = run.predict("picture.jpg")
"""

from .backbone import Backbone
from .datasets import open_dataset
from .errors import DataNotFound, StegoError
from .evaluation import evaluate
from .experiment import PRESETS, Experiment
from .run import Run, load_run
from .training import train

__version__ = "0.1.0"
__all__ = [
    "PRESETS",
    "Backbone",
    "DataNotFound",
    "Experiment",
    "Run",
    "StegoError",
    "evaluate",
    "load_run",
    "open_dataset",
    "train",
]
