"""Types of the fields of `Experiment`. They check values, and parse text, because papermill's -p cannot pass lists."""

import math
import os
import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, PlainValidator

from .paths import user_path

# Suffixes of weight files.
BACKBONE_FILES = (".safetensors", ".pth", ".ckpt")


def split_backbone(backbone: str) -> tuple[str, str]:
    """Splits "NAME", "FILE" or "NAME@FILE" into the name of a network and the path of a file; "" for a missing part."""
    name, at, file = backbone.partition("@")
    if at and re.fullmatch(r"[\w.]+", name) and not Path(backbone).is_file():
        return name, _absolute(file)
    return ("", _absolute(backbone)) if backbone.lower().endswith(BACKBONE_FILES) else (backbone, "")


def _absolute(path: str) -> str:
    # so that a run can be opened from any working folder
    return str(user_path(path).absolute())


def _parts(value: Any) -> list[Any]:
    """Items of a list, or of text such as '1 0.5 p80' or '1, 0.5, p80'."""
    if isinstance(value, str):
        return re.split(r"[,\s]+", value.strip(" ()[]"))
    return list(value) if isinstance(value, list | tuple) else [value]


def _number(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError
    return number


def _shift(value: Any) -> float | str:
    if not str(value).startswith("p"):
        return _number(value)
    percent = _number(value[1:])
    if not 0 <= percent <= 100:
        raise ValueError
    return f"p{percent:.12g}"


def _shifts(value: Any) -> Any:
    if value == "auto":
        return value
    try:
        own, knn, rand = map(_shift, _parts(value))
    except (TypeError, ValueError):
        raise ValueError("'auto', or three numbers or percentiles such as 'p70 p80 0.9'") from None
    return own, knn, rand


def _weights(value: Any) -> Any:
    try:
        own, knn, rand = map(_number, _parts(value))
        if min(own, knn, rand) < 0:
            raise ValueError
    except (TypeError, ValueError):
        raise ValueError("three numbers, none negative, such as '1 0.58 0.91'") from None
    return own, knn, rand


def _size(value: Any) -> Any:
    parts = _parts(value)
    whole = all(re.fullmatch(r"\d+(\.0+)?", str(part)) for part in parts)
    sides = [int(float(part)) for part in parts] if whole else []
    if len(sides) not in (1, 2) or not all(8 <= side <= 8192 for side in sides):
        raise ValueError("a number of pixels from 8 to 8192, or height and width, such as 224 or '320 480'")
    return sides[0] if len(sides) == 1 else tuple(sides)


Text = BeforeValidator(lambda value: os.fspath(value) if isinstance(value, os.PathLike) else value)
# An absolute path.
Folder = Annotated[str, Text, AfterValidator(_absolute)]
# A name, a file, or NAME@FILE, with the file as an absolute path.
BackboneName = Annotated[str, Text, AfterValidator(lambda value: "@".join(filter(None, split_backbone(value))))]
# Pixels: N = shorter side scaled to N, then center crop N x N; (H, W) = the whole image scaled to H x W.
Size = Annotated[int | tuple[int, int], PlainValidator(_size)]
# Weights of self, kNN and random pairs.
Weights = Annotated[tuple[float, float, float], PlainValidator(_weights)]
# 'auto' (`calibration.AUTO_SHIFTS`), or for each kind of pair a number or a percentile of its correspondences ('p70').
Shifts = Annotated[str | tuple[float | str, float | str, float | str], PlainValidator(_shifts)]
