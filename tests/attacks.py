"""Attacks by files from strangers: each is a real file, made when it is asked for. `test_hostile` shows that they fail.

Checkpoints, stores, archives and images that try to run code, to write elsewhere or to fill the memory.
"""

import io
import json
import os
import pickle
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import TIMM_ARGUMENTS
from PIL import Image
from released import Call, tensors, write_ckpt
from safetensors.torch import load_file, save_file
from standins import flat_png

from stego_lib import StegoError, load_run
from stego_lib.backbone import Backbone
from stego_lib.features.extraction import problem
from stego_lib.networks.dino import DinoViT
from stego_lib.utils.files import checksum, read_json, write_json

ROOM = 2**30
"""Bytes that reading a small file may take at most, in address space; the attacks ask for a multiple."""


@dataclass
class Lair:
    """Where an attack is prepared: a folder of its own, and a file that would be there if code had run."""

    folder: Path
    marker: Path
    run: Path
    """A run folder, good but for what the attack changes."""
    store: Path
    """A feature store, likewise."""
    backbone: Path

    @property
    def call(self) -> Call:
        """Pickles as a call of the shell."""
        return Call(os.system, f"touch '{self.marker}'")


Attack = Callable[[Lair], tuple[Path, Callable[[], Any]]]
"""Makes the file, and returns it with what a user would do with it."""
ATTACKS: dict[str, Attack] = {}


def attack(function: Attack) -> Attack:
    ATTACKS[function.__name__.replace("_", " ")] = function
    return function


def dino(**changes: torch.Tensor) -> dict[str, torch.Tensor]:
    vit = DinoViT(img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=1, num_classes=0, dynamic_img_size=True)
    return vit.state_dict() | changes


def as_backbone(path: Path) -> tuple[Path, Callable[[], Any]]:
    return path, lambda: Backbone(str(path), device="cpu")


def as_run(lair: Lair) -> tuple[Path, Callable[[], Any]]:
    return lair.run / "checkpoint.pt", lambda: load_run(lair.run)


def as_released(path: Path) -> tuple[Path, Callable[[], Any]]:
    return path, lambda: load_run(path, device="cpu")


# ---------------------------------------------------------------------------------------------- code in pickles


def pickled(value: Any, kind: str) -> bytes:
    buffer = io.BytesIO()
    if kind == "bare":
        return pickle.dumps(value)
    torch.save(value, buffer, _use_new_zipfile_serialization=kind == "new")
    return buffer.getvalue()


for kind in ("new", "old", "bare"):
    for name in ("a backbone .pth", "a checkpoint of a run", "a released .ckpt"):

        def with_code(lair: Lair, kind: str = kind, name: str = name) -> tuple[Path, Callable[[], Any]]:
            if name == "a checkpoint of a run":
                path = lair.run / "checkpoint.pt"
                state = torch.load(path, weights_only=True)
                path.write_bytes(pickled(lair.call if kind == "bare" else state | {"evil": lair.call}, kind))
                return as_run(lair)
            path = lair.folder / ("evil.pth" if "pth" in name else "evil.ckpt")
            state = dino() if "pth" in name else {"state_dict": tensors() | {"evil": lair.call}}
            path.write_bytes(pickled(lair.call if kind == "bare" else state | {"evil": lair.call}, kind))
            return as_backbone(path) if "pth" in name else as_released(path)

        ATTACKS[f"a pickle that calls the shell: {name}, {kind} format"] = with_code


@attack
def a_pickle_that_calls_the_shell_as_the_teacher_of_a_DINO_checkpoint(lair):
    torch.save({"teacher": dino() | {"x": lair.call}, "student": {}}, lair.folder / "evil.pth")
    return as_backbone(lair.folder / "evil.pth")


def torchscript(path: Path) -> Path:
    """A program as PyTorch stores it, which `torch.load` without weights_only=True would hand on to be run."""
    torch.save({}, path)
    with zipfile.ZipFile(path, "a") as archive:
        folder = archive.namelist()[0].partition("/")[0]
        archive.writestr(f"{folder}/constants.pkl", b"\x80\x02).")
        archive.writestr(f"{folder}/code/__torch__.py", b"class Evil(Module):\n  pass\n")
    return path


@attack
def a_TorchScript_program_as_a_released_ckpt(lair):
    return as_released(torchscript(lair.folder / "evil.ckpt"))


@attack
def a_TorchScript_program_as_a_backbone(lair):
    return as_backbone(torchscript(lair.folder / "evil.pth"))


@attack
def a_TorchScript_program_as_a_checkpoint(lair):
    torchscript(lair.run / "checkpoint.pt")
    return as_run(lair)


def named_backbone(lair: Lair, arguments: dict[str, Any]) -> tuple[Path, Callable[[], Any]]:
    path = lair.folder / "evil.safetensors"
    save_file(load_file(lair.backbone), path, {"timm": json.dumps(TIMM_ARGUMENTS | arguments)})
    return as_backbone(path)


def evil_pth(lair: Lair) -> str:
    (lair.folder / "other.pth").write_bytes(pickle.dumps(lair.call))
    return str(lair.folder / "other.pth")


for key in ("checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay"):

    def names_a_file(lair: Lair, key: str = key) -> tuple[Path, Callable[[], Any]]:
        value: Any = evil_pth(lair)
        if key != "checkpoint_path":
            value = {"file": value, "num_classes": 0}
        return named_backbone(lair, {key: value} | ({} if key == "checkpoint_path" else {"pretrained": True}))

    ATTACKS[f"a .safetensors whose metadata have timm unpickle another file: {key}"] = names_a_file

for address in ("hf-hub:evil/model", "local-dir:/evil", "https://evil.example/model"):

    def names_an_address(lair: Lair, address: str = address) -> tuple[Path, Callable[[], Any]]:
        return named_backbone(lair, {"architecture": address})

    ATTACKS[f"a .safetensors whose metadata name {address.partition(':')[0]}"] = names_an_address


@attack
def a_run_of_a_stranger_whose_backbone_is_on_a_hub(lair):
    values = read_json(lair.run / "experiment.json")
    write_json(lair.run / "experiment.json", values | {"backbone": "hf-hub:evil/model"})
    return Path("hf-hub:evil/model"), lambda: load_run(lair.run).backbone


def stored_with_code(lair: Lair, name: str, allow: bool) -> tuple[Path, Callable[[], Any]]:
    """A store whose checksums are right: who makes a file can make its checksum too."""
    path = lair.store / f"{name}.npy"
    good = np.load(path)
    np.save(path, np.array([lair.call] * len(good), object), allow_pickle=allow)
    return sealed(lair, name)


def sealed(lair: Lair, name: str) -> tuple[Path, Callable[[], Any]]:
    about = read_json(lair.store / "about.json")
    expected = {
        array: (value.dtype.type, value.shape)
        for array in about["sha256"]
        if array != name
        for value in [np.load(lair.store / f"{array}.npy", mmap_mode="r")]
    } | {name: (np.float16, (12, 32, 8, 8))}
    about["sha256"][name] = checksum(lair.store / f"{name}.npy")
    write_json(lair.store / "about.json", about)

    def use() -> None:
        if reason := problem(lair.store, expected):
            raise StegoError(f"{name}.npy: {reason}")

    return Path(f"{name}.npy"), use


@attack
def a_store_with_a_pickle_for_features(lair):
    return stored_with_code(lair, "features", True)


@attack
def a_store_with_a_pickle_in_an_npz(lair):
    np.savez(lair.folder / "x.npz", features=np.array([lair.call], object))
    shutil.copy(lair.folder / "x.npz", lair.store / "features.npy")
    return sealed(lair, "features")


@attack
def a_image_that_is_a_PostScript_program(lair):
    path = lair.folder / "evil.jpg"
    path.write_text(
        f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(%pipe%touch {lair.marker}) (w) file pop\nshowpage\n%%EOF\n"
    )
    return path, lambda: load_run(lair.run).predict(path)


# ---------------------------------------------------------------------------------------------- lying headers, bombs


def rezipped(path: Path, change: Callable[[str, bytes], bytes], method: int = zipfile.ZIP_STORED) -> None:
    """Writes a zip file anew with its members changed."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, change(name, content))


HUGE = 3 * ROOM


def zeros_deflated() -> bytes:
    """`HUGE` zeros as a deflate stream of a few MB: one block of them, again and again."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = packer.compress(bytes(2**20)) + packer.flush(zlib.Z_FULL_FLUSH)
    return block * (HUGE // 2**20) + packer.flush()


def add_bomb(archive: zipfile.ZipFile, name: str) -> None:
    """A member that unpacks to `HUGE` zeros. (Its checksum is wrong, which one learns when the memory is full.)"""
    info, content = zipfile.ZipInfo(name), zeros_deflated()
    info.compress_type, info.CRC, info.file_size, info.compress_size = zipfile.ZIP_DEFLATED, 0, HUGE, len(content)
    info.header_offset = archive.start_dir
    archive.fp.seek(archive.start_dir)
    archive.fp.write(info.FileHeader() + content)
    archive.start_dir = archive.fp.tell()
    archive.filelist.append(info)
    archive.NameToInfo[name] = info


def swell(path: Path) -> None:
    """Puts a bomb in place of the first tensor of a PyTorch file."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            if not name.endswith("data/0"):
                archive.writestr(name, content)
        for name in members:
            if name.endswith("data/0"):
                add_bomb(archive, name)


@attack
def a_checkpoint_that_unpacks_to_3_GB(lair):
    swell(lair.run / "checkpoint.pt")
    return as_run(lair)


@attack
def a_released_ckpt_that_unpacks_to_3_GB(lair):
    path = write_ckpt(lair.folder / "evil.ckpt", tensors())
    swell(path)
    return as_released(path)


@attack
def a_backbone_pth_that_unpacks_to_3_GB(lair):
    torch.save(dino(), lair.folder / "evil.pth")
    swell(lair.folder / "evil.pth")
    return as_backbone(lair.folder / "evil.pth")


def strided(shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor of one number that claims to be large."""
    return torch.zeros(1).expand(*shape)


@attack
def a_backbone_pth_whose_tensor_is_one_number_repeated(lair):
    torch.save(dino(**{"blocks.0.mlp.fc1.weight": strided((2**20, 2**12))}), lair.folder / "evil.pth")
    return as_backbone(lair.folder / "evil.pth")


@attack
def a_checkpoint_whose_tensor_is_one_number_repeated(lair):
    path = lair.run / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    state["model"]["feature_mean"] = strided((1, 2**32, 1, 1))
    torch.save(state, path)
    return as_run(lair)


@attack
def a_released_ckpt_whose_tensor_is_one_number_repeated(lair):
    return as_released(
        write_ckpt(lair.folder / "evil.ckpt", tensors() | {"net.model.pos_embed": strided((1, 2**24, 2**8))})
    )


@attack
def a_released_ckpt_with_a_tensor_stored_a_thousand_times(lair):
    state = tensors()
    big = torch.zeros(2**18)
    return as_released(
        write_ckpt(lair.folder / "evil.ckpt", state | {f"net.model.x{i}": big.view(-1) for i in range(5000)})
    )


class Reaching:
    """Pickles as a tensor that reaches beyond its bytes."""

    def __init__(self, tensor: torch.Tensor, size: int):
        self.tensor, self.size = tensor, size

    def __reduce__(self) -> tuple:
        from torch._utils import _rebuild_tensor_v2

        storage = torch.storage.TypedStorage(
            wrap_storage=self.tensor.untyped_storage(), dtype=torch.float32, _internal=True
        )
        return _rebuild_tensor_v2, (storage, 0, (self.size,), (1,), False, {})


@attack
def a_released_ckpt_whose_tensor_reaches_beyond_its_bytes(lair):
    return as_released(
        write_ckpt(lair.folder / "evil.ckpt", tensors() | {"linear_probe.bias": Reaching(torch.zeros(8), 9000)})
    )


@attack
def a_backbone_pth_whose_tensor_reaches_beyond_its_bytes(lair):
    torch.save(dino() | {"norm.bias": Reaching(torch.zeros(64), 9000)}, lair.folder / "evil.pth")
    return as_backbone(lair.folder / "evil.pth")


def with_pickle(path: Path, code: bytes) -> Path:
    """A file in PyTorch's format with this pickle in it."""
    torch.save({}, path)
    rezipped(path, lambda name, content: code if name.endswith("data.pkl") else content)
    return path


@attack
def a_released_ckpt_whose_pickle_numbers_the_four_billionth_object(lair):
    code = b"\x80\x02}" + b"r" + struct.pack("<I", 0xFFFFFFF0) + b"."
    return as_released(with_pickle(lair.folder / "evil.ckpt", code))


@attack
def a_released_ckpt_whose_pickle_announces_a_text_of_1_TB(lair):
    code = b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"x."
    return as_released(with_pickle(lair.folder / "evil.ckpt", code))


@attack
def a_checkpoint_whose_pickle_numbers_the_four_billionth_object(lair):
    with_pickle(lair.run / "checkpoint.pt", b"\x80\x02}" + b"r" + struct.pack("<I", 0xFFFFFFF0) + b".")
    return as_run(lair)


@attack
def a_released_ckpt_whose_options_nest_to_a_billion_billion(lair):
    nested: list = []
    for _ in range(60):
        nested = [nested, nested]
    return as_released(write_ckpt(lair.folder / "evil.ckpt", tensors(), hyper_parameters={"cfg": nested}))


@attack
def a_released_ckpt_whose_options_hold_themselves(lair):
    nested: list = []
    nested.append(nested)
    return as_released(write_ckpt(lair.folder / "evil.ckpt", tensors(), hyper_parameters={"cfg": nested}))


@attack
def a_backbone_pth_that_names_a_billion_blocks(lair):
    torch.save(dino(**{"blocks.999999999.norm1.weight": torch.zeros(64)}), lair.folder / "evil.pth")
    return as_backbone(lair.folder / "evil.pth")


@attack
def a_backbone_pth_of_a_network_that_no_memory_holds(lair):
    width = 2**15
    names = {f"blocks.{i}.norm1.weight": torch.zeros(1) for i in range(500)}
    found = {
        "patch_embed.proj.weight": torch.zeros(width, 1, 1, 1),
        "pos_embed": torch.zeros(1, 2, 1),
        "blocks.0.mlp.fc1.weight": torch.zeros(9),
    }
    torch.save(names | found, lair.folder / "evil.pth")
    return as_backbone(lair.folder / "evil.pth")


@attack
def a_safetensors_of_a_network_that_no_memory_holds(lair):
    return named_backbone(lair, {"embed_dim": 16_000, "num_heads": 2, "depth": 24})


@attack
def a_safetensors_of_a_billion_blocks(lair):
    return named_backbone(lair, {"depth": 10**9})


@attack
def a_run_of_a_model_that_no_memory_holds(lair):
    path = lair.run / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    state["model"]["feature_mean"] = torch.zeros(1, 2**18, 1, 1)
    torch.save(state, path)
    return as_run(lair)


def safetensors_header(lair: Lair, header: bytes, length: int | None = None) -> tuple[Path, Callable[[], Any]]:
    path = lair.folder / "evil.safetensors"
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + bytes(64))
    return as_backbone(path)


def header(shape: list[int], begin: int, end: int) -> bytes:
    tensor = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    return json.dumps({"__metadata__": {"timm": json.dumps(TIMM_ARGUMENTS)}, "w": tensor}).encode()


@attack
def a_safetensors_whose_header_is_said_to_be_huge(lair):
    return safetensors_header(lair, b"{}", 2**62)


@attack
def a_safetensors_whose_tensor_lies_beyond_the_file(lair):
    return safetensors_header(lair, header([2**30], 0, 2**32))


@attack
def a_safetensors_whose_shape_overflows(lair):
    return safetensors_header(lair, header([2**40, 2**40], 0, 64))


@attack
def a_safetensors_whose_shape_is_not_its_bytes(lair):
    return safetensors_header(lair, header([2**28], 0, 64))


@attack
def a_safetensors_with_a_header_nested_without_end(lair):
    return safetensors_header(lair, b'{"a":' * 50_000)


@attack
def a_store_whose_header_claims_a_terabyte(lair):
    with open(lair.store / "features.npy", "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f2", "fortran_order": False, "shape": (12, 2**32, 8, 8)})
        file.write(bytes(100))
    return sealed(lair, "features")


@attack
def a_store_whose_header_is_a_program(lair):
    text = f"__import__('os').system(\"touch '{lair.marker}'\")\n".encode().ljust(118)
    (lair.store / "features.npy").write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text)
    return sealed(lair, "features")


@attack
def a_run_whose_experiment_nests_without_end(lair):
    (lair.run / "experiment.json").write_text("[" * 200_000)
    return lair.run / "experiment.json", lambda: load_run(lair.run)


def as_image(lair: Lair, path: Path) -> tuple[Path, Callable[[], Any]]:
    return path, lambda: load_run(lair.run).predict(path)


@attack
def a_PNG_of_900_megapixels_in_100_kB(lair):
    return as_image(lair, flat_png(lair.folder / "evil.png", 30_000))


@attack
def a_PNG_whose_header_claims_four_billion_pixels_a_side(lair):
    body = b"IHDR" + struct.pack(">IIBBBBB", 2**31 - 1, 2**31 - 1, 8, 2, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
    (lair.folder / "evil.png").write_bytes(content)
    return as_image(lair, lair.folder / "evil.png")


@attack
def a_PNG_with_a_text_of_3_GB_in_a_few_MB(lair):
    Image.new("RGB", (8, 8)).save(lair.folder / "evil.png")
    body = b"zTXtx\x00\x00" + b"\x78\xda" + zeros_deflated()
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    content = (lair.folder / "evil.png").read_bytes()
    (lair.folder / "evil.png").write_bytes(content[:33] + chunk + content[33:])
    return as_image(lair, lair.folder / "evil.png")


@attack
def a_TIFF_of_a_hundred_gigapixels(lair):
    Image.new("L", (8, 8)).save(lair.folder / "evil.tif")
    content = bytearray((lair.folder / "evil.tif").read_bytes())
    for tag in (256, 257):  # width and height, as 16 or 32 bits
        place = max(content.find(struct.pack("<HHI", tag, kind, 1)) for kind in (3, 4))
        content[place : place + 12] = struct.pack("<HHII", tag, 4, 1, 300_000)
    (lair.folder / "evil.tif").write_bytes(content)
    return as_image(lair, lair.folder / "evil.tif")
