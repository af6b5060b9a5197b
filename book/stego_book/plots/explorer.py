"""The interactive explorer of correspondences: a piece of HTML that works from a file, without server or kernel.

Point at a place in one image, and each image shows how much its places correspond with it. The unit vectors of all
places travel with the page, one byte a number; the browser forms their cosines.
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
    """What the page needs, as JSON can hold it.

    images: uint8 (N, 3, H, W). spaces: name -> maps (N, C, h, w), such as backbone features and codes, on one grid.
    names: of the images. Returns grid [h, w], images (PNG as data addresses), names, and of each space its name,
    channels C, scale and vectors: base64 of int8 (N, h, w, C); times the scale they are the unit vectors. `floor` is
    the 5th percentile of the cosines, below which the page draws nothing. StegoError if sizes do not agree.
    """
    grids = {tuple(maps.shape[-2:]) for maps in spaces.values()}
    if len(grids) != 1 or {len(maps) for maps in spaces.values()} != {len(images)} or len(names) != len(images):
        raise StegoError("the explorer needs as many maps and names as images, and one grid for all spaces")
    return {
        "grid": list(grids.pop()),
        "names": names,
        "images": [_png(image) for image in images],
        "spaces": [_space(name, maps) for name, maps in spaces.items()],
    }


def explorer_html(data: dict[str, Any], fallback: str, description: str) -> str:
    """The explorer as HTML for one place in a page.

    fallback: address of the image that stands there while scripts are off. description: what that image shows.
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
