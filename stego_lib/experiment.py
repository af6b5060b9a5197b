"""What determines a run: `Experiment`, and the recipes."""

import hashlib
import json
import re
from dataclasses import asdict, fields, replace
from functools import wraps
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass

from .utils import paths
from .utils.errors import StegoError, check_choice, did_you_mean
from .utils.fields import BackboneName, Folder, Shifts, Size, Weights, split_backbone

CHECKED = ConfigDict(extra="forbid", use_attribute_docstrings=True)


@dataclass(frozen=True, kw_only=True, config=CHECKED)
class Official:
    """Options of the authors' code that no recipe of the paper uses, and its defects. All are off by default."""

    published: bool = False
    """Reproduce the authors' code including its defects, see book/fidelity.md."""
    keys: bool = False
    """Use attention keys as features instead of the tokens after the final norm."""
    block: int = -1
    """Block of the ViT for the features, counted from 0 or from the end: -1 is the last."""
    subtract_mean: bool = False
    """Subtract the mean feature of the dataset before computing correspondences (not in the paper)."""
    zero_clamp: bool = True
    """Clamp code correspondences to at least 0, as all recipes do."""
    stabilize: bool = False
    """Also clamp code correspondences to at most 0.8."""
    extra_clusters: int = Field(default=0, ge=0)
    """Number of clusters in addition to one per class."""
    rec_weight: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Weight of the reconstruction loss of features from codes."""
    crf_weight: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Weight of the CRF-inspired loss."""
    aug_alignment_weight: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Weight of the alignment with augmented views, for which the backbone runs at every step."""
    keep_every: int = Field(default=0, ge=0)
    """Steps between weights that are kept, so that `evaluate` can find the step with the best scores; 0 = off."""

    @property
    def loss_weights(self) -> dict[str, float]:
        """Weights of the optional loss terms with a positive weight, by name."""
        weights = dict(loss_rec=self.rec_weight, loss_crf=self.crf_weight, loss_aug=self.aug_alignment_weight)
        return {name: weight for name, weight in weights.items() if weight}


@dataclass(frozen=True, kw_only=True, config=CHECKED)
class Experiment:
    """All settings of a run, immutable and validated. `PRESETS` holds those of the paper.

    Unknown keys and invalid values raise a StegoError. The fields are documented in the source of the class and in the
    book's reference; `but` returns a copy with changes.

    Examples
    --------
    >>> Experiment(dataset="camvid", backbone="dino_vits8", train_size=(240, 320))
    >>> Experiment.preset("cityscapes", seed=1)
    """

    # Data and network
    dataset: str = "scenes"
    """Name of a dataset, see `open_dataset`."""
    data_root: Folder = Field(default_factory=lambda: str(paths.data_root()))
    """Parent folder of the datasets."""
    n_classes: int | None = Field(default=None, ge=1, le=255)
    """Number of clusters for a `folder` without names of classes, 27 by default. For other datasets it is fixed."""
    backbone: BackboneName = "scenes_vit_tiny8"
    """Embedded name, timm name, .safetensors, .pth or .ckpt file, or NAME@FILE for weights of a timm network."""
    train_size: Size = 224
    """Size of training images in pixels: N, or (H, W)."""
    crop: Literal["none", "five", "random", "tiles"] = "none"
    """Crops of training images: 'five' for the four corners and the center at half height and width (paper, section
    3.4), 'random' for five crops of this size at random positions, 'tiles' for tiles of `train_size` that cover large
    images."""

    # Method
    method: Literal["stego", "smooseg", "primaps", "hp", "cause", "depthg"] = "stego"
    """'stego' or a successor; `Experiment.preset` applies the settings in `SUCCESSORS`."""
    head: Literal["nonlinear", "silu", "linear", "none"] = "nonlinear"
    """Segmentation head: linear plus two-layer branch (paper), the same with SiLU instead of ReLU, only the linear
    branch, or no head."""
    code_dim: int = Field(default=70, ge=1, le=4096)
    """K, channels of the code."""
    dropout: float = Field(default=0.1, ge=0, lt=1)
    """Channel dropout before each branch of the head."""
    weights: Weights = (1.0, 0.58, 0.91)
    """l_self, l_knn, l_rand: weights of the three correspondence terms."""
    shifts: Shifts = "auto"
    """b_self, b_knn, b_rand: pairs with a larger feature correspondence attract, others repel. Numbers, percentiles of
    the correspondences of the training features such as 'p70', or 'auto' (`calibration.AUTO_SHIFTS`)."""
    centering: bool = False
    """Spatial centering of the feature correspondences (paper, section 3.2). 'auto' was chosen without it."""
    points: int = Field(default=11, ge=1, le=64)
    """S, for S x S random points per image."""
    neighbors: int = Field(default=7, ge=1)
    """Number of nearest neighbors; the kNN partner of an image is one of them."""
    negatives: int = Field(default=5, ge=1)
    """Random partners per image and step."""
    probes: Literal["joint", "after"] = "joint"
    """'joint' trains both probes with the head, as in the paper; 'after' fits k-means and multinomial regression to the
    trained codes."""

    # Training
    steps: int = Field(default=5000, ge=1)
    """Training steps."""
    batch_size: int = Field(default=16, ge=2)
    """Images per step; at least 2, because random partners are other images of the batch."""
    lr_head: float = Field(default=5e-4, gt=0, allow_inf_nan=False)
    """Learning rate of the head."""
    lr_probes: float = Field(default=5e-3, gt=0, allow_inf_nan=False)
    """Learning rate of both probes."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Random seed."""
    start_from: Folder | None = None
    """Run folder or released .ckpt with initial weights of head and probes; None for random weights."""

    # Evaluation
    eval_size: Size = 320
    """Size of images and labels in evaluation in pixels."""
    mirror: bool = True
    """Average codes over horizontal flips."""
    crf: bool = True
    """Also evaluate after a dense CRF."""

    # Machine
    device: str = "auto"
    """'auto' (a GPU if there is one), 'cpu', 'cuda', 'cuda:1', ..."""
    precision: Literal["float32", "bfloat16", "auto"] = "float32"
    """Precision of the backbone and of the head's matrix products in training; 'auto' is bfloat16 if the hardware
    supports it natively."""
    feature_store: Literal["full", "compact", "online"] = "full"
    """'full' stores frozen features on disk; 'compact' stores principal components in 8 bits, in at most a sixth of the
    space; 'online' computes features at every step."""

    official: Official = Field(default_factory=Official)
    """Options and defects of the authors' code."""

    @classmethod
    def preset(cls, name: str, **changes: Any) -> "Experiment":
        """The recipe `name`, or the default recipe of the dataset `name`, with `changes`."""
        check_choice("preset", name, [*PRESETS, *DEFAULT_PRESET])
        recipe = PRESETS[DEFAULT_PRESET.get(name, name)]
        return cls.from_dict(recipe | SUCCESSORS.get(changes.get("method", "stego"), {}) | changes)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Experiment":
        """Creates an experiment from the keys and values of a JSON file."""
        return cls(**values)

    @classmethod
    def read(cls, path: str | Path) -> "Experiment":
        """Reads experiment.json of a run folder."""
        from .utils.files import read_json  # loads torch

        return cls.from_dict(read_json(paths.user_path(path)))

    def to_dict(self) -> dict[str, Any]:
        """Keys and values for JSON; inverse of `from_dict`."""
        return json.loads(json.dumps(asdict(self)))

    def to_record(self) -> dict[str, Any]:
        """`to_dict` without `MACHINE` and without folders of files."""
        values = {key: value for key, value in self.to_dict().items() if key not in MACHINE}
        name, file = split_backbone(self.backbone)
        values["backbone"] = name or paths.base_name(file)
        if self.start_from is not None:
            values["start_from"] = paths.base_name(self.start_from)
        return values

    def but(self, **changes: Any) -> "Experiment":
        """A validated copy with some values changed. `official` may be a dictionary of options to change."""
        if isinstance(options := changes.get("official"), dict):
            changes["official"] = asdict(self.official) | options
        return replace(self, **changes)

    @property
    def own_prototypes(self) -> bool:
        """Whether the method trains its clusters, instead of k-means on its codes."""
        return self.method in ("smooseg", "primaps", "cause")

    @property
    def name(self) -> str:
        """Short name: dataset, backbone, differences from their recipe, and seed."""
        network, file = split_backbone(self.backbone)
        place = self.dataset, self.backbone
        own = [name for name, values in PRESETS.items() if (values["dataset"], values["backbone"]) == place]
        recipe = Experiment.preset(own[0] if own else self.dataset)
        ignored = ("dataset", "backbone", "seed", "official", *MACHINE)
        ours, theirs = (asdict(experiment) | asdict(experiment.official) for experiment in (self, recipe))
        changes = {key: value for key, value in ours.items() if key not in ignored and value != theirs[key]}
        if self.start_from is not None:
            changes["start_from"] = paths.base_name(self.start_from)
        text = "-".join(f"{key}_{value}" for key, value in changes.items())
        if len(text) > 48:
            text = text[:40] + hashlib.sha256(text.encode()).hexdigest()[:8]
        parts = [self.dataset, Path(network).name or Path(paths.base_name(file)).stem, text, f"seed{self.seed}"]
        return re.sub(r"[^\w.+-]+", "_", "-".join(filter(None, parts)))


# Fields that only affect evaluation.
EVALUATION = ("eval_size", "mirror", "crf")
# Fields that depend on the machine. `Provenance` records the actual precision and store.
MACHINE = ("data_root", "device", "feature_store", "precision")


def _explained(init: Any) -> Any:
    """Wraps `__init__` to raise a StegoError for pydantic's errors."""

    @wraps(init)
    def explained(self: Any, *args: Any, **values: Any) -> None:
        try:
            init(self, *args, **values)
        except ValidationError as error:
            raise StegoError(" ".join(dict.fromkeys(map(_explain, error.errors())))) from None

    return explained


def _explain(problem: Any) -> str:
    """The message of one of pydantic's errors."""
    key = str(problem["loc"][-1])
    if problem["type"] != "unexpected_keyword_argument":
        rule = problem["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
        return f"{key}={problem['input']!r} is invalid. It should be {rule}."
    names, options = ([field.name for field in fields(kind)] for kind in (Experiment, Official))
    if key in options:
        return f"{key!r} is an option of the authors' code. Write official={{{key!r}: ...}}."
    return f"There is no key {key!r}{did_you_mean(key, [*names, *options])}. See `Experiment`."


for _checked in (Official, Experiment):
    setattr(_checked, "__init__", _explained(_checked.__init__))  # noqa: B010


# Recipes as changes of the defaults. Those with the name of a dataset are this project's, the others the paper's.
PRESETS: dict[str, dict[str, Any]] = {
    "scenes": dict(
        dataset="scenes", backbone="scenes_vit_tiny8", train_size=128, eval_size=128, head="linear", code_dim=64,
        steps=300, probes="after",
    ),
    "camvid": dict(
        dataset="camvid", backbone="dino_vits8", train_size=(240, 320), eval_size=(240, 320), code_dim=64, steps=100,
        probes="after",
    ),
    "folder": dict(dataset="folder", backbone="dino_vits8", code_dim=64, steps=1000, probes="after"),
    "cocostuff27-vits8": dict(
        dataset="cocostuff27", backbone="dino_vits8", crop="five", centering=True,
        weights=(0.67, 0.25, 0.63), shifts=(0.08, 0.02, 0.66),
    ),
    "cocostuff27-vitb8": dict(
        dataset="cocostuff27", backbone="dino_vitb8", crop="five", code_dim=90, steps=7000, batch_size=32,
        centering=True, weights=(0.1, 1.0, 0.1538476246415498), shifts=(0.12, 0.2, 1.0),
    ),
    "cityscapes-vitb8": dict(
        dataset="cityscapes", backbone="dino_vitb8", crop="five", code_dim=100, steps=7000, batch_size=32,
        weights=(1.0, 0.577453483136995, 0.9058762625226623),
        shifts=(0.45828472207, 0.1754346515479633, 0.31361241889448443),
    ),
    # b_rand is 0.46 in the published config, and 0.76 in a later study.
    "potsdam3-vits8": dict(
        dataset="potsdam3", backbone="dino_vits8", centering=True,
        weights=(0.67, 0.25, 0.63), shifts=(0.08, 0.02, 0.46),
    ),
}  # fmt: skip

# The paper has no recipes for the other label sets of COCO-Stuff, so they use that of CocoStuff-27.
for _name in ("cocostuff15", "cocostuff3"):
    PRESETS[_name] = PRESETS["cocostuff27-vitb8"] | dict(dataset=_name)

PRESETS["labelmefacade"] = PRESETS["folder"] | dict(dataset="labelmefacade", steps=100)

# Dataset -> its default recipe, if the names differ.
DEFAULT_PRESET = {
    "cityscapes": "cityscapes-vitb8",
    "cocostuff27": "cocostuff27-vitb8",
    "potsdam3": "potsdam3-vits8",
}


def list_presets() -> list[str]:
    """Names for `Experiment.preset`: recipes, and datasets whose default recipe has another name.

    Examples
    --------
    >>> "scenes" in list_presets()
    True
    """
    return [*PRESETS, *DEFAULT_PRESET]


# Published settings of each `method`, which `Experiment.preset` applies to a recipe. Shifts are "auto", because those
# of the recipe are for STEGO's loss; steps are those of the recipe.
SUCCESSORS: dict[str, dict[str, Any]] = {
    "smooseg": dict(
        head="silu", dropout=0.2, code_dim=64, lr_head=1e-4, lr_probes=5e-4, centering=True, shifts="auto",
        probes="after",
    ),
    "primaps": dict(head="none", dropout=0.0, probes="after"),
    "hp": dict(head="nonlinear", code_dim=512, probes="after"),
    "cause": dict(head="nonlinear", code_dim=90, probes="after"),
    "depthg": dict(weights=(0.58, 0.36, 0.7), shifts="auto", probes="after"),
}  # fmt: skip
