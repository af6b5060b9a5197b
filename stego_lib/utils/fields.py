"""Types of an experiment's values: checked, and read from text where the command line gives text."""

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag, TypeAdapter

from .paths import user_path

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
"""Endings of weight files."""


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
"""For self, kNN and random pairs, or 'auto' for all three, see `calibration.AUTO`."""
BackboneName = Annotated[str, BeforeValidator(_text), AfterValidator(_located)]
"""A name, a file, or NAME@FILE, with the file as an absolute path."""
