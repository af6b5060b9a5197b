"""What determines a run: `Experiment`, and the recipes."""

import hashlib
import json
import re
from dataclasses import fields, replace
from functools import wraps
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass

from .runtime import paths
from .runtime.errors import StegoError, did_you_mean
from .runtime.fields import BackboneName, Folder, Shifts, Size, Weights, split_backbone

CHECKED = ConfigDict(extra="forbid", use_attribute_docstrings=True)


@dataclass(frozen=True, kw_only=True, config=CHECKED)
class Method:
    """What is trained: the ten values that matter first, then the others of the paper's recipes."""

    dataset: str = "scenes"
    """Name of the dataset, see `open_dataset`."""
    data_root: Folder = Field(default_factory=lambda: str(paths.data_root()))
    """Folder that holds the folders of the datasets."""
    backbone: BackboneName = "scenes_vit_tiny8"
    """Embedded name, timm name, a .safetensors, .pth or .ckpt file, or NAME@FILE: weights of a timm network in a file."""
    train_size: Size = 224
    """Size of training images in pixels: N, or (H, W)."""
    code_dim: int = Field(70, ge=1, le=4096)
    """K, channels of the code."""
    steps: int = Field(5000, ge=1)
    """Training steps."""
    batch_size: int = Field(16, ge=2)
    """Images per step; at least two, because an image's negatives are the others of its batch."""
    weights: Weights = (1.0, 0.58, 0.91)
    """l_self, l_knn, l_rand: weights of the three correspondence terms."""
    shifts: Shifts = "auto"
    """b_self, b_knn, b_rand: above it features attract, below it they repel. Numbers, percentiles of the correspondences of
    the training features such as 'p70', or 'auto': percentiles by one rule, without labels (`calibration.calibrate`)."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Seed of everything random."""

    method: Literal["stego", "smooseg", "primaps", "hp", "cause", "depthg"] = "stego"
    """'stego', or one of its successors in `stego_lib.family`. `Experiment.preset` takes the settings of `SUCCESSORS` with it."""
    n_classes: int | None = Field(None, ge=1, le=255)
    """Clusters to look for in a `folder` that names no classes, 27 by default; other datasets have their own number."""
    extra_clusters: int = Field(0, ge=0)
    """Clusters beyond the number of classes."""
    crop: Literal["none", "five", "random"] = "none"
    """'five' cuts each training image into its four corners and center, half as high and wide (paper, section 3.4); 'random'
    cuts five pieces of that size at random positions, the same for every seed."""
    head: Literal["nonlinear", "silu", "linear", "none"] = "nonlinear"
    """Segmentation head: linear plus two-layer branch (the paper's), the same with SiLU for ReLU, the linear branch alone, or
    the features themselves."""
    dropout: float = Field(0.1, ge=0, lt=1)
    """Channel dropout at the input of each branch of the head."""
    lr_head: float = Field(5e-4, gt=0, allow_inf_nan=False)
    """Adam's learning rate for the head."""
    lr_probes: float = Field(5e-3, gt=0, allow_inf_nan=False)
    """Adam's learning rate for both probes."""
    centering: bool = False
    """Spatial centering of the feature correspondences (paper, section 3.2). The rule 'auto' was found without it."""
    zero_clamp: bool = True
    """Clamp the code correspondences at zero."""
    points: int = Field(11, ge=1, le=64)
    """S: correspondences are formed between S x S random points of each image."""
    neighbors: int = Field(7, ge=1)
    """The kNN partner of an image is one of this many nearest neighbors."""
    negatives: int = Field(5, ge=1)
    """Random partners of each image in a step."""
    probes: Literal["joint", "after"] = "joint"
    """'joint' trains both probes beside the head, as in the paper; 'after' fits k-means and multinomial regression to the
    trained codes."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the backbone and, but with published, of the head's products while STEGO trains it; 'auto' is bfloat16 on
    hardware that computes it natively. All else is float32."""


@dataclass(frozen=True, kw_only=True, config=CHECKED)
class PublishedSwitches:
    """What no recipe turns on: defects and optional terms of the published code, other features, other starts."""

    published: bool = False
    """Repeat what the published code does, defects included; see book/fidelity.md."""
    features: Literal["feat", "KK"] = "feat"
    """Tokens after the final norm, or keys of the attention."""
    block: int = -1
    """Block of the ViT that features come from, counted from 0, or from the end: -1 is the last."""
    subtract_mean: bool = False
    """Subtract the dataset's mean from the features before correspondences are formed (not in the paper)."""
    stabilize: bool = False
    """Clamp the code correspondences at 0.8 as well."""
    rec_weight: float = Field(0.0, ge=0, allow_inf_nan=False)
    """Weight of the reconstruction of features from codes."""
    crf_weight: float = Field(0.0, ge=0, allow_inf_nan=False)
    """Weight of the CRF-inspired loss."""
    aug_alignment_weight: float = Field(0.0, ge=0, allow_inf_nan=False)
    """Weight of the alignment with augmented views; the backbone then runs at every step."""
    start_from: Folder | None = None
    """Run folder or released .ckpt whose head and probes training starts from; None for fresh weights."""
    validate_every: int = Field(0, ge=0)
    """Keep the weights every so many steps, for `evaluate` to name the step that labels favor; 0 = off (published: 400)."""


@dataclass(frozen=True, kw_only=True, config=CHECKED)
class Evaluation:
    """How a trained run is scored."""

    eval_size: Size = 320
    """Size of images and labels at evaluation in pixels."""
    mirror: bool = True
    """Average the codes of an image and of its horizontal flip."""
    crf: bool = True
    """Report scores after a dense CRF as well."""


@dataclass(frozen=True, kw_only=True, config=CHECKED)
class Machine:
    """How and where a run is computed; its result depends on it by rounding alone."""

    device: str = "auto"
    """'auto' (a GPU if there is one), 'cpu', 'cuda', 'cuda:1', ..."""
    feature_store: Literal["auto", "store", "compact", "online"] = "auto"
    """'store' extracts the frozen features once and keeps them on disk; 'compact' keeps them on fewer components, in a sixth of
    the room or less; 'online' computes them at every step. 'auto' takes the first that fits into 0.8 of the free disk. Results
    are the same up to rounding, with 'compact' up to its stated error of the correspondences."""


@dataclass(frozen=True, kw_only=True, config=CHECKED)
class Experiment(Machine, Evaluation, PublishedSwitches, Method):
    """Everything that determines a run, frozen and checked.

    `Method` holds the values of training, `Evaluation` those of scoring, `Machine` how it is computed, and `PublishedSwitches`
    what no recipe turns on. The numbers of the paper are in `PRESETS`. However an experiment is made, an unknown key
    or a value out of range raises a StegoError that names it.

    Examples
    --------
    >>> Experiment(dataset="camvid", backbone="dino_vits8", train_size=(240, 320))
    >>> Experiment.preset("cityscapes", seed=1)
    """

    @classmethod
    def preset(cls, name: str, **changes: Any) -> "Experiment":
        """The recipe called `name`, or the usual one of the dataset called `name`, with `changes` made to it.

        Raises StegoError for an unknown preset, an unknown key or a value out of range.
        """
        known = USUAL_PRESET.get(name, name)
        if known not in PRESETS:
            raise StegoError(
                f"unknown preset {name!r}{did_you_mean(name, [*PRESETS, *USUAL_PRESET])}; presets: {', '.join(PRESETS)}"
            )
        return cls.from_dict(PRESETS[known] | SUCCESSORS.get(changes.get("method", "stego"), {}) | changes)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Experiment":
        """Builds an experiment from keys and values (of a JSON file, say); StegoError names each that is wrong."""
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Keys and values that JSON can hold; `from_dict` is the way back."""
        return {f.name: list(v) if isinstance(v := getattr(self, f.name), tuple) else v for f in fields(self)}

    @classmethod
    def read(cls, path: str | Path) -> "Experiment":
        """Reads experiment.json of a run folder, also of version 0.1.0."""
        from .runtime.files import read_json  # which loads torch; nothing else here does

        values = read_json(path)
        if not isinstance(values, dict):
            raise StegoError(f"{path} holds no experiment")
        return cls.from_dict({key: value for key, value in values.items() if key != "devices"})

    def to_record(self) -> dict[str, Any]:
        """`to_dict` as a run record holds it: without the folders of one machine and how it was computed there."""
        values = {key: value for key, value in self.to_dict().items() if key not in ("data_root", "feature_store")}
        name, file = split_backbone(self.backbone)
        values["backbone"] = name or Path(file).name
        if self.start_from is not None:
            values["start_from"] = Path(self.start_from).name
        return values

    def but(self, **changes: Any) -> "Experiment":
        """A copy with some values changed, checked again."""
        return replace(self, **changes)

    def differing(self, other: "Experiment", ignored: tuple[str, ...]) -> list[str]:
        """Names of the fields, apart from `ignored`, in which both differ."""
        return [f.name for f in fields(self) if f.name not in ignored and getattr(self, f.name) != getattr(other, f.name)]

    @property
    def own_prototypes(self) -> bool:
        """Whether the method has clusters of its own, so that none are fitted to its codes."""
        return self.method in ("smooseg", "primaps", "cause")

    @property
    def name(self) -> str:
        """Short name of the run: dataset, backbone, what differs from their recipe, and the seed.

        Long differences end in a fingerprint of them all. `MACHINE` fields and `data_root` are not part of it.
        """
        recipe = recipe_of(self.dataset, self.backbone)
        network, file = split_backbone(self.backbone)
        changed = {key: getattr(self, key) for key in self.differing(recipe, (*NAMED, *MACHINE))}
        stated = [_in_name(key, value) for key, value in changed.items()]
        readable = "-".join(text for text, _ in stated)
        if len(readable) > LONGEST or not all(exact for _, exact in stated):
            while len(readable) > LONGEST:
                readable = readable.rpartition("-")[0]
            readable = f"{readable}-{_digest(changed)}".strip("-")
        parts = [self.dataset, Path(network).name or Path(file).stem, *filter(None, [readable]), f"seed{self.seed}"]
        return re.sub(r"[^\w.+-]+", "_", "-".join(parts))


NAMED = ("dataset", "data_root", "backbone", "seed")
"""Fields that are in every name of a run, and the one that is in none."""
LONGEST = 48
"""Characters of a run's name that state what differs from the recipe, at most."""


def recipe_of(dataset: str, backbone: str) -> Experiment:
    """The recipe of a dataset and backbone: the backbone's own, else the usual one of the dataset."""
    own = [name for name, values in PRESETS.items() if (values["dataset"], values["backbone"]) == (dataset, backbone)]
    name = own[0] if own else USUAL_PRESET.get(dataset, dataset)
    return Experiment(**PRESETS.get(name, {}))


def _in_name(key: str, value: Any) -> tuple[str, bool]:
    """A value as a run's name states it, and whether that is the exact value."""
    if isinstance(value, bool):
        return key if value else f"no_{key}", True
    parts = value if isinstance(value, tuple) else (value,)
    texts = [f"{part:g}" if isinstance(part, float) else Path(part).name if isinstance(part, str) else str(part) for part in parts]
    exact = all(float(text) == part if isinstance(part, float) else text == str(part) for text, part in zip(texts, parts, strict=True))
    return "_".join([key, *texts]), exact


def _digest(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]


EVALUATION = tuple(field.name for field in fields(Evaluation))
"""Fields that matter when a run is evaluated, and not when it is trained."""
MACHINE = tuple(field.name for field in fields(Machine))
"""Fields that the result depends on by rounding alone."""


def _explained(init: Any) -> Any:
    """Turns pydantic's error into a StegoError that names each key that is wrong."""

    @wraps(init)
    def explained(self: Experiment, *args: Any, **values: Any) -> None:
        try:
            init(self, *args, **values)
        except ValidationError as error:
            names, lines = [field.name for field in fields(Experiment)], []
            for problem in error.errors():
                key = str(problem["loc"][0]) if problem["loc"] else "?"
                if key not in names:
                    lines.append(f"unknown key {key!r}{did_you_mean(key, names)}")
                else:
                    lines.append(f"{key} = {values.get(key)!r}: {problem['msg']}")
            raise StegoError("Experiment: " + "; ".join(dict.fromkeys(lines))) from None

    return explained


Experiment.__init__ = _explained(Experiment.__init__)  # type: ignore[method-assign]


PRESETS: dict[str, dict[str, Any]] = {
    "scenes": dict(
        dataset="scenes", backbone="scenes_vit_tiny8", train_size=128, eval_size=128, head="linear", code_dim=64, steps=300,
        probes="after",
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
        dataset="cocostuff27", backbone="dino_vitb8", crop="five", code_dim=90, steps=7000, batch_size=32, centering=True,
        weights=(0.1, 1.0, 0.1538476246415498), shifts=(0.12, 0.2, 1.0),
    ),
    "cityscapes-vitb8": dict(
        dataset="cityscapes", backbone="dino_vitb8", crop="five", code_dim=100, steps=7000, batch_size=32, centering=False,
        weights=(1.0, 0.577453483136995, 0.9058762625226623),
        shifts=(0.45828472207, 0.1754346515479633, 0.31361241889448443),
    ),
    # The published config has b_rand 0.46 for Potsdam, a later study 0.76; the published one is taken.
    "potsdam3-vits8": dict(
        dataset="potsdam3", backbone="dino_vits8", centering=True, weights=(0.67, 0.25, 0.63), shifts=(0.08, 0.02, 0.46),
    ),
}  # fmt: skip
"""The recipes, as changes of the defaults. 'scenes', 'camvid' and 'folder' are this project's, the others the paper's."""

SUCCESSORS: dict[str, dict[str, Any]] = {
    "smooseg": dict(
        head="silu", dropout=0.2, code_dim=64, lr_head=1e-4, lr_probes=5e-4, centering=True, shifts="auto",
        probes="after",
    ),
    "primaps": dict(head="none", dropout=0.0, probes="after"),
    "hp": dict(head="nonlinear", code_dim=512, probes="after"),
    "cause": dict(head="nonlinear", code_dim=90, probes="after"),
    "depthg": dict(weights=(0.58, 0.36, 0.7), shifts="auto", probes="after"),
}
"""Settings that `Experiment.preset` takes with a `method`: published ones, where they differ from the recipe's; but shifts are
measured anew, because those of a recipe belong to STEGO's loss, and steps are the recipe's."""

USUAL_PRESET = {
    "cityscapes": "cityscapes-vitb8",
    "cocostuff27": "cocostuff27-vitb8",
    "potsdam3": "potsdam3-vits8",
}
"""The usual recipe of a dataset, where it has another name than the dataset."""
