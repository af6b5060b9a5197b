"""What determines a run: `Experiment`, and the recipes that have a name."""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    TypeAdapter,
    ValidationError,
)
from pydantic.dataclasses import dataclass

from .runtime import paths
from .runtime.errors import StegoError, did_you_mean
from .runtime.paths import user_path

Real = Annotated[float, Field(allow_inf_nan=False)]


def _split(value: Any) -> Any:
    """Lets '1 0.5 p80' or '1, 0.5, p80' stand for a list, as papermill's -p passes scalars only."""
    return re.split(r"[,\s]+", value.strip(" ()[]")) if isinstance(value, str) else value


def _shift(value: Any) -> Any:
    if isinstance(value, str) and value.startswith("p"):
        percent = TypeAdapter(Annotated[Real, Field(ge=0, le=100)]).validate_python(value[1:])
        return f"p{percent:.12g}"
    return TypeAdapter(Real).validate_python(value)


def _one_or_two(value: Any) -> Any:
    if isinstance(value, list | tuple) and len(value) == 1:
        return value[0]
    return value


def _patchable(value: Any) -> Any:
    for side in value if isinstance(value, tuple) else (value,):
        if not 8 <= side <= 8192:
            raise ValueError("a side is 8 to 8192 pixels")
    return value


def _path(value: str | None) -> str | None:
    """An absolute path, so that a run is opened from any working folder; StegoError for an empty one."""
    return None if value is None else str(user_path(value).absolute())


BACKBONE_FILES = (".safetensors", ".pth", ".ckpt")


def split_backbone(backbone: str) -> tuple[str, str]:
    """(timm or embedded name, file) of a backbone, "" for what it does not have: "NAME", "FILE" or "NAME@FILE"."""
    name, at, file = backbone.partition("@")
    if at and re.fullmatch(r"[\w.]+", name) and not Path(backbone).is_file():
        return name, str(_path(file))
    return ("", str(_path(backbone))) if backbone.lower().endswith(BACKBONE_FILES) else (backbone, "")


def _located(backbone: str) -> str:
    return "@".join(filter(None, split_backbone(backbone)))


def _text(value: Any) -> Any:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _sides(value: Any) -> Any:
    parts = _split(value)
    for part in parts if isinstance(parts, list | tuple) else [parts]:
        if isinstance(part, bool) or not re.fullmatch(r"[-+]?\d+(\.0+)?", str(part).strip()):
            raise ValueError("a size is one whole number, or height and width, such as 224 or 320 480")
    return _one_or_two(parts)


Folder = Annotated[str, BeforeValidator(_text), AfterValidator(_path)]
"""An absolute path."""
Shift = Annotated[Real | str, BeforeValidator(_shift)]
"""A number, or 'p70': the 70th percentile of the correspondences measured on the training features."""
Size = Annotated[int | tuple[int, int], BeforeValidator(_sides), AfterValidator(_patchable)]
"""Pixels: N = shorter side scaled to N, then center crop N x N; (H, W) = the whole image scaled to H x W."""


Weight = Annotated[Real, Field(ge=0)]
Weights = Annotated[tuple[Weight, Weight, Weight], BeforeValidator(_split)]
Shifts = Annotated[
    Annotated[Literal["auto"], Tag("auto")]
    | Annotated[tuple[Shift, Shift, Shift], BeforeValidator(_split), Tag("three")],
    Discriminator(lambda value: "auto" if value == "auto" else "three"),
]
"""For self, kNN and random pairs, or 'auto' for all three: set by `calibration.AUTO`."""


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", use_attribute_docstrings=True))
class Experiment:
    """Everything that determines a run. Frozen and checked: an unknown key or a value out of range is an error.

    However it is made (`Experiment(...)`, `but`, `preset`, `from_dict`), such a key or value raises a `StegoError` that names
    it. The numbers of the paper are in `PRESETS`.
    """

    dataset: str = "scenes"
    """Name of the dataset, as `open_dataset` knows it."""
    data_root: Folder = Field(default_factory=lambda: str(paths.data_root()))
    """Folder that holds the datasets' folders."""
    n_classes: int | None = Field(None, ge=1, le=255)
    """How many clusters to look for in a `folder` that names no classes; None = 27 there, elsewhere the dataset's own number."""
    backbone: Annotated[str, BeforeValidator(_text), AfterValidator(_located)] = "scenes_vit_tiny8"
    """Embedded name, timm name, path of a .safetensors, .pth or .ckpt file, or NAME@FILE: weights of a timm network in a file."""
    features: Literal["feat", "KK"] = "feat"
    """Tokens after the final norm, or keys of the attention."""
    block: int = -1
    """Block that the features come from, counted from 0, or from the end: -1 is the last."""
    train_size: Size = 224
    """Size of training images in pixels."""
    eval_size: Size = 320
    """Size of images and labels at evaluation in pixels."""
    crop: Literal["none", "five", "random"] = "none"
    """'five' cuts each training image into its four corners and center, half as high and wide (paper, section 3.4).

    'random' cuts five pieces of that size at random places, the same ones whatever the seed.
    """
    subtract_mean: bool = False
    """Take the dataset's mean off the features before correspondences are formed (not in the paper)."""
    head: Literal["nonlinear", "linear", "none"] = "nonlinear"
    """Segmentation head: linear + two-layer branch (the paper's), linear branch alone, or the features themselves."""
    code_dim: int = Field(70, ge=1, le=4096)
    """K, channels of the code."""
    dropout: float = Field(0.1, ge=0, lt=1)
    """Channel dropout at the input of each branch of the head."""
    steps: int = Field(5000, ge=1)
    """Training steps."""
    batch_size: int = Field(16, ge=2)
    """Images a step; two at least, for an image's negatives are the others of its batch."""
    lr_head: float = Field(5e-4, gt=0, allow_inf_nan=False)
    """Adam's learning rate for the head."""
    lr_probes: float = Field(5e-3, gt=0, allow_inf_nan=False)
    """Adam's learning rate for both probes."""
    weights: Weights = (1.0, 0.58, 0.91)
    """l_self, l_knn, l_rand: weights of the three correspondence terms."""
    shifts: Shifts = "auto"
    """b_self, b_knn, b_rand: below it features repel, above it they attract. Numbers, percentiles such as 'p70', or 'auto':
    measured on the training features by one rule, without labels (`calibration.calibrate`)."""
    centering: bool = False
    """Spatial centering of the feature correspondences (paper, section 3.2). The rule 'auto' was found without it."""
    zero_clamp: bool = True
    """Clamp the code correspondences at zero."""
    stabilize: bool = False
    """Clamp the code correspondences at 0.8 as well."""
    rec_weight: float = Field(0.0, ge=0, allow_inf_nan=False)
    """Weight of the reconstruction of the features from the code (published, off there too)."""
    crf_weight: float = Field(0.0, ge=0, allow_inf_nan=False)
    """Weight of the CRF-inspired loss (published, off there too)."""
    aug_alignment_weight: float = Field(0.0, ge=0, allow_inf_nan=False)
    """Weight of the alignment with augmented views (published, off there too); the backbone then runs at every step."""
    published: bool = False
    """Repeat what the published code does, defects included; book/fidelity.md lists what that changes."""
    start_from: Folder | None = None
    """Run folder or released .ckpt whose head and probes training goes on from; None = fresh weights."""
    points: int = Field(11, ge=1, le=64)
    """Points a side: correspondences are formed between points x points random positions of each image."""
    neighbors: int = Field(7, ge=1)
    """The kNN partner of an image is one of this many nearest neighbors."""
    negatives: int = Field(5, ge=1)
    """Random partners an image and step."""
    probes: Literal["joint", "after"] = "joint"
    """'joint' trains both probes beside the head (the paper's way); 'after' fits them to the trained codes: k-means, its
    start chosen by its own objective, and multinomial regression."""
    extra_clusters: int = Field(0, ge=0)
    """Clusters beyond the number of classes."""
    mirror: bool = True
    """Evaluate on the mean code of an image and its mirror image."""
    crf: bool = True
    """Report scores after a dense CRF as well, where pydensecrf is installed."""
    validate_every: int = Field(0, ge=0)
    """Keep the weights every so many steps, for `evaluate` to name the best of them by labels; 0 = off (published: 400)."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Seed of everything random."""
    device: str = "auto"
    """'auto' (a GPU if there is one), 'cpu', 'cuda', 'cuda:1', ..."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the backbone; 'auto' is bfloat16 where the machine computes it natively. The rest is float32."""
    feature_store: Literal["auto", "store", "online"] = "auto"
    """'store' computes the frozen features once and keeps them on disk, 'online' computes them anew at every step; 'auto'
    stores them if they take at most 0.8 of the free disk. The results are the same up to rounding."""
    devices: int = Field(1, ge=1)
    """Processes that train together, each on a GPU of its own (or on the CPU), each with an equal part of `batch_size`."""

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
        return cls.from_dict(PRESETS[known] | changes)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Experiment":
        """Builds an experiment from keys and values (of a JSON file, say); StegoError names each that is wrong."""
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Keys and values that JSON can hold; `from_dict` is the way back."""
        return {f.name: list(v) if isinstance(v := getattr(self, f.name), tuple) else v for f in fields(self)}

    def but(self, **changes: Any) -> "Experiment":
        """A copy with some values changed, checked again."""
        return replace(self, **changes)

    def differing(self, other: "Experiment", ignored: tuple[str, ...]) -> list[str]:
        """Names of the fields, apart from `ignored`, in which both differ."""
        return [f.name for f in fields(self) if f.name not in ignored and getattr(self, f.name) != getattr(other, f.name)]

    @property
    def name(self) -> str:
        """Short name of the run: dataset, backbone, what differs from the recipe of these two, and the seed.

        Differences that are many or long end in a fingerprint of them all. Where and how the run computes (`MACHINE`,
        `data_root`) is not part of it.
        """
        recipe = _recipe(self.dataset, self.backbone)
        network, file = split_backbone(self.backbone)
        changed = {key: getattr(self, key) for key in self.differing(recipe, (*NAMED, *MACHINE))}
        told = [_in_name(key, value) for key, value in changed.items()]
        readable = "-".join(text for text, _ in told)
        if len(readable) > LONGEST or not all(exact for _, exact in told):
            while len(readable) > LONGEST:
                readable = readable.rpartition("-")[0]
            readable = f"{readable}-{_digest(changed)}".strip("-")
        parts = [self.dataset, Path(network).name or Path(file).stem, *filter(None, [readable]), f"seed{self.seed}"]
        return re.sub(r"[^\w.+-]+", "_", "-".join(parts))


NAMED = ("dataset", "data_root", "backbone", "seed")
"""Fields of an experiment that are in every name, and the one that is in none."""
LONGEST = 48
"""Characters of a run's name that tell what differs from the recipe, at most."""


def _recipe(dataset: str, backbone: str) -> Experiment:
    """The recipe that a dataset and backbone have: of several the backbone's own, else the usual one."""
    own = [name for name, values in PRESETS.items() if (values["dataset"], values["backbone"]) == (dataset, backbone)]
    name = own[0] if own else USUAL_PRESET.get(dataset, dataset)
    return Experiment(**PRESETS.get(name, {}))


def _in_name(key: str, value: Any) -> tuple[str, bool]:
    """A value as a run's name tells it, and whether that tells all of it."""
    if isinstance(value, bool):
        return key if value else f"no_{key}", True
    parts = value if isinstance(value, tuple) else (value,)
    texts = [f"{part:g}" if isinstance(part, float) else Path(part).name if isinstance(part, str) else str(part) for part in parts]
    exact = all(float(text) == part if isinstance(part, float) else text == str(part) for text, part in zip(texts, parts, strict=True))
    return "_".join([key, *texts]), exact


def _digest(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]


MACHINE = ("feature_store", "devices", "device")
"""Fields of an experiment that its result does not depend on, but for rounding: how and where it is computed."""
EVALUATION = ("eval_size", "mirror", "crf")
"""Fields that matter when a run is evaluated, and not when it is trained."""


@contextmanager
def _explained(values: dict[str, Any]) -> Iterator[None]:
    """Turns pydantic's error into a StegoError that names each key that is wrong."""
    try:
        yield
    except ValidationError as error:
        names = [field.name for field in fields(Experiment)]
        lines = []
        for problem in error.errors():
            key = str(problem["loc"][0]) if problem["loc"] else "?"
            if key not in names:
                lines.append(f"unknown key {key!r}{did_you_mean(key, names)}")
            else:
                lines.append(f"{key} = {values.get(key)!r}: {problem['msg']}")
        raise StegoError("Experiment: " + "; ".join(dict.fromkeys(lines))) from None


def _explain_init(init: Any) -> Any:
    @wraps(init)
    def explained(self: Experiment, *args: Any, **values: Any) -> None:
        with _explained(values):
            init(self, *args, **values)

    return explained


# pydantic turns every ValueError of its own validators into a ValidationError, so the translation stands around all of them.
Experiment.__init__ = _explain_init(Experiment.__init__)  # type: ignore[method-assign]


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
"""The recipes: what each changes of the defaults above. 'scenes', 'camvid' and 'folder' are ours, the rest the paper's."""

USUAL_PRESET = {
    "cityscapes": "cityscapes-vitb8",
    "cocostuff27": "cocostuff27-vitb8",
    "potsdam3": "potsdam3-vits8",
}
"""The recipe that a dataset uses when none is named, where it is not called like the dataset."""
