"""Interactive explorer of correspondences: HTML that works without server or kernel.

Select a position in one image, and every image shows its correspondence with it. The page contains the normalized
features of all positions as int8; the browser computes the cosines.
"""

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from stego_lib.utils.errors import StegoError
from stego_lib.utils.files import fingerprint

TEMPLATE = Path(__file__).with_name("explorer.html")


def explorer_data(images: Tensor, spaces: dict[str, Tensor], names: list[str]) -> dict[str, Any]:
    """The data of the page, ready for JSON.

    images: uint8 (N, 3, H, W). spaces: name -> maps (N, C, h, w), such as backbone features and codes, on one grid.
    names: of the images. Returns grid [h, w], images (PNG data URLs), names, and for each space its name, channels C,
    scale and vectors: base64 of int8 (N, h, w, C), the unit vectors divided by the scale. `floor` is the 5th percentile
    of the cosines; the page does not draw smaller values. StegoError if sizes do not agree.
    """
    grids = {tuple(maps.shape[-2:]) for maps in spaces.values()}
    if len(grids) != 1 or {len(maps) for maps in spaces.values()} != {len(images)} or len(names) != len(images):
        raise StegoError("images, maps and names differ in number or grid. Give one map and one name per image.")
    return {
        "grid": list(grids.pop()),
        "names": names,
        "images": [_png(image) for image in images],
        "spaces": [_space(name, maps) for name, maps in spaces.items()],
    }


def explorer_html(data: dict[str, Any], fallback: str, description: str) -> str:
    """The explorer as an HTML fragment.

    fallback: URL of the image shown without JavaScript. description: its alternative text.
    """
    html = TEMPLATE.read_text(encoding="utf-8")
    parts = {"ID": f"explorer-{fingerprint(json.dumps(data))}", "FALLBACK": fallback, "DESCRIPTION": description}
    for name, text in parts.items():
        html = html.replace(f"__{name}__", text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;"))
    return html.replace("__DATA__", json.dumps(data).replace("</", "<\\/"))


def _space(name: str, maps: Tensor) -> dict[str, Any]:
    unit = F.normalize(maps.float(), dim=1).movedim(1, -1)
    scale = float(unit.abs().max()) / 127
    vectors = (unit / scale).round().numpy().astype(np.int8)
    flat = vectors.reshape(-1, vectors.shape[-1]).astype(np.float32) * scale
    cosines = flat[:: max(1, len(flat) // 256)] @ flat.T
    return {
        "name": name,
        "channels": vectors.shape[-1],
        "scale": scale,
        "floor": float(np.percentile(cosines, 5)),
        "vectors": base64.b64encode(vectors.tobytes()).decode(),
    }


def _png(image: Tensor) -> str:
    buffer = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
