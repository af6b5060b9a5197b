"""The model card of a shared run: inputs, scores, and the use of labels."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import timm
from PIL import Image, ImageOps

from .datasets.images import as_tensor
from .networks.loading import EMBEDDED, SHORT_NAMES
from .provenance import Provenance
from .utils.errors import StegoError
from .utils.fields import split_backbone
from .utils.files import read_json
from .utils.paths import base_name

if TYPE_CHECKING:
    from .run import Run

THUMBNAIL = "thumbnail.webp"
# Side of an image in the thumbnail in pixels.
SIDE = 240
# Licenses of backbones that allow any license for head and probes.
PERMISSIVE = ("apache-2.0", "bsd-3-clause", "mit")
# Licenses of weights that timm does not record. Other embedded backbones were trained on images with special terms.
LICENSES = {"scenes_vit_tiny8": "mit"} | dict.fromkeys(SHORT_NAMES.values(), "apache-2.0")


def backbone_license(backbone: str) -> str | None:
    """License of the weights of a backbone; None if it is unknown, as for files."""
    name, file = split_backbone(backbone)
    timm_name = SHORT_NAMES.get(name, name)
    if file or name in EMBEDDED or timm_name in LICENSES:
        return None if file else LICENSES.get(timm_name)
    return getattr(timm.get_pretrained_cfg(timm_name), "license", None)


def check_license(license: str | None, backbone: str) -> None:
    """Raises StegoError for a license that may be incompatible with that of the backbone."""
    terms = backbone_license(backbone)
    if license and terms not in (*PERMISSIVE, license):
        known = f"has the license {terms}" if terms else "has no known license"
        raise StegoError(f"The backbone {known}, which may be incompatible with {license}. Leave license out.")


def thumbnail(run: "Run", images: Sequence[Any]) -> Image.Image:
    """Images and their segments side by side, one image per row."""
    colors = np.zeros((256, 3), np.uint8)
    colors[: len(run.segments)] = run.segments.colors
    rows = []
    for image in images:
        pixels = as_tensor(image, run.classes.rules)[0].permute(1, 2, 0).numpy()
        pair = [Image.fromarray(array) for array in (pixels, colors[run.predict(image)])]
        rows.append(np.hstack([np.asarray(ImageOps.pad(part, (SIDE, SIDE), color="white")) for part in pair]))
    return Image.fromarray(np.vstack(rows))


def card(run: "Run", source: str, license: str | None, included: bool, has_thumbnail: bool) -> str:
    """Metadata for the hub, and Markdown. source: argument of `load_run`; included: whether the backbone's file is."""
    experiment, (name, file) = run.experiment, split_backbone(run.experiment.backbone)
    metadata = [f"license: {license}\n"] if license else []
    place = (
        "included" if included else "not included: `load_run(..., backbone=FILE)`" if file else "part of `stego_lib`"
    )
    if not file and name not in EMBEDDED:
        place, hub = "loaded by name", getattr(timm.get_pretrained_cfg(SHORT_NAMES.get(name, name)), "hf_hub_id", "")
        metadata += [f"base_model: {hub}\n"] if hub else []
    pairs = zip(run.segments.names, run.segments.colors, strict=True)
    segments = ", ".join(f"{segment} (#{bytes(color).hex()})" for segment, color in pairs)
    return f"""---
library_name: stego_lib
pipeline_tag: image-segmentation
tags: [stego, unsupervised-segmentation]
{"".join(metadata)}---

# {experiment.name}

Segmentation head and probes on a frozen backbone, trained by `stego_lib` (STEGO, Hamilton et al., ICLR 2022).

{f"![Images on the left, their segments on the right]({THUMBNAIL})" if has_thumbnail else ""}

```python
from stego_lib import load_run

run = load_run("{source}")
label_map = run.predict("image.jpg")
```

* Backbone: {name or base_name(file)}, weights {run.provenance.weights}, {place}.
* License of the backbone: {backbone_license(experiment.backbone) or "unknown; ask its authors"}.
* License of head and probes: {license or "not specified"}.
* Training: method {experiment.method}, step {run.step}, seed {experiment.seed}.
* Data: {experiment.dataset}, images {run.provenance.images}, under their own terms.
* Segments: {segments}.

## Scores and use of labels

Head and clusters were trained without labels. {_labels(run)}

{_table(run)}
"""


def _labels(run: "Run") -> str:
    """How labels and users have changed the segments."""
    if run.taught is not None:
        counts = ", ".join(f"{name} {count}" for name, count in run.taught.labels.items())
        return f"The segments were fitted to labels of {len(run.taught.images)} images (pixels or clicks: {counts})."
    names = "A user named or merged some of them. " if run.names else ""
    matching = "matched to classes by validation labels" if run.matched else "not matched to classes"
    return f"{names}Clusters were {matching}."


def _table(run: "Run") -> str:
    """Scores in percent, with the spread over seeds of runs in the same folder."""
    path = run.folder / "metrics.json"
    record = read_json(path) if path.exists() else {}
    if record.get("step") != run.step or not record.get("scores"):
        return "The run was not evaluated."
    others = [read_json(path) for path in run.folder.parent.glob("*/metrics.json")]
    seeds = {other["experiment"]["seed"]: other for other in [*others, record] if _setting(other) == _setting(record)}
    lines = [
        f"Last step, {record['images']} images of the validation split; seeds {', '.join(map(str, sorted(seeds)))}.\n",
        "| method | accuracy | mIoU | mIoU over seeds | labels |",
        "|---|---|---|---|---|",
    ]
    for method, result in record["scores"].items():
        values = [other["scores"][method]["miou"] for other in seeds.values() if method in other["scores"]]
        spread = f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else "one seed"
        use = "train it, count scores" if method.startswith(("linear", "taught")) else "name clusters, count scores"
        lines.append(f"| {method} | {result['accuracy']:.1f} | {result['miou']:.1f} | {spread} | {use} |")
    return "\n".join(lines)


def _setting(record: dict[str, Any]) -> tuple[Any, ...]:
    """Everything that must agree between records of several seeds."""
    experiment = {key: value for key, value in record["experiment"].items() if key != "seed"}
    # Records of other versions may have no provenance.
    return experiment, Provenance.from_dict(record.get("provenance")).key(), record.get("data"), record["step"]
