"""What `check`, training and segmenting say of a dataset before it misleads."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import standins
from common import SHARED, tiny_experiment
from PIL import Image

from stego_lib import StegoError, open_dataset, train
from stego_lib.datasets import findings, write_crops
from stego_lib.datasets import potsdam_tiles as tiles
from stego_lib.datasets.__main__ import main
from stego_lib.datasets.crops import FiveCrop
from stego_lib.datasets.findings import look
from stego_lib.datasets.intact import survey
from stego_lib.datasets.potsdam_tiles import COLORS, TILES
from stego_lib.utils.notices import Notice

SIDE = 32


def noise(seed: int, high: int = 256) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, high, (SIDE, SIDE, 3), dtype=np.uint8)


def labeled(root: Path, names: list[str], ids: list[list[int]], **more: object) -> Path:
    """root/folder with an image and a label map of stripes for each list of ids, in train and in val."""
    for split in ("train", "val"):
        for number, row in enumerate(ids):
            standins.save(root / f"folder/imgs/{split}/{number}.png", noise(number))
            standins.save(root / f"folder/labels/{split}/{number}.png", standins.stripes(row, SIDE, SIDE))
    (root / "folder/classes.json").write_text(json.dumps({"names": names} | more))
    return root


def texts(root: Path, name: str = "folder", split: str = "train") -> str:
    return "\n".join(f"{'WRONG ' if one.misleads else ''}{one.text}" for one in look(open_dataset(name, root, split)))


def checked(capsys: pytest.CaptureFixture, name: str, root: Path) -> tuple[int, str]:
    status = main(["check", name, "--root", str(root)])
    return status, capsys.readouterr().out


# ---------------------------------------------------------------------------------------------- classes that never occur


@pytest.mark.parametrize("place", ["masks/{split}", "label/{split}", "labels/training", "labels"])
def test_label_maps_in_another_place_are_told(tmp_path, place):
    """They make no score, and nobody would know why."""
    root = labeled(tmp_path, ["a", "b"], [[0, 1]] * 2)
    for split in ("train", "val"):
        target = root / "folder" / place.format(split=split)
        moved = root / f"moved-{split}"
        (root / "folder" / "labels" / split).rename(moved)
        target.mkdir(parents=True, exist_ok=True)
        for path in moved.iterdir():
            path.rename(target / path.name)
    if place != "labels" and not place.startswith("labels"):
        (root / "folder" / "labels").rmdir()
    said = texts(root)
    assert f"folder train counts as unlabeled: {place.partition('/')[0]} in {root / 'folder'} is not read" in said
    assert str(root / "folder" / "labels" / "train") in said


def test_a_list_that_names_an_image_twice_is_told(tmp_path):
    standins.cocostuff(tmp_path, dict(train=1, val=2), ("Coco164kFull_Stuff_Coarse_7.txt",), 24, 32)
    path = tmp_path / "cocostuff/curated/val2017/Coco164kFull_Stuff_Coarse_7.txt"
    path.write_text(path.read_text() * 2)
    with pytest.warns(Notice, match=r"Coarse_7\.txt lists 2 ids again, so these images count more than once"):
        assert len(open_dataset("cocostuff27", tmp_path, "val")) == 4


def test_255_that_is_the_object_is_told_everywhere(tmp_path, backbone_file, capsys):
    """As SAM, ISIC and CVAT write masks: 0 and 255."""
    root = labeled(tmp_path, ["background", "lesion"], [[0, 255], [0, 0, 255]] * 3)
    status, said = checked(capsys, "folder", root)
    assert status == 1
    for split in ("train", "val"):
        assert f"WRONG: folder {split}: 'background' is the only class in 6 label maps (ids seen: 0, 255)" in said
    assert "255 means ignored: where it is the object, save it as the id of its class" in said
    for _ in range(2):  # the second time, the features are there
        with pytest.warns(Notice, match=r"'background' is the only class.*ids seen: 0, 255") as told:
            train(
                tiny_experiment(root, backbone_file, dataset="folder", train_size=32, eval_size=32, steps=1),
                runs_dir=tmp_path / "runs",
            )
        assert len([one for one in told if "only class" in str(one.message)]) == 1


@pytest.mark.parametrize(
    "ids, wrong, said",
    [
        ([[0, 1, 2]], False, ""),
        (
            [[0, 1, 255]],
            False,
            "1 of 3 classes occur in none of 1 label map: 'c' (ids seen: 0, 1, 255); 255 means ignored",
        ),
        ([[0, 0, 0, 0, 1, 255, 255, 255]], True, "'c' (ids seen: 0, 1, 255); 255 means ignored"),
        ([[1, 2], [1, 2]], False, "'a' (ids seen: 1, 2); ids start at 0"),
        ([[2, 2]], True, "'c' is the only class in 1 label map (ids seen: 2)"),
        ([[255, 255]], True, "no pixel of 1 label map has a class (ids seen: 255)"),
    ],
)
def test_classes_that_never_occur_are_named_with_the_ids_that_were_seen(tmp_path, ids, wrong, said):
    found = texts(labeled(tmp_path, ["a", "b", "c"], ids))
    assert said in found and found.startswith("WRONG") == wrong and bool(found) == bool(said)


@pytest.mark.parametrize(
    "ids, said", [([1, 2], "holds id 2.*start at 1: subtract 1"), (list(range(32)), "2, 3.*photograph, colors, or a label map saved as JPEG")]
)  # fmt: skip
def test_ids_that_are_no_class_hint_at_what_they_are(tmp_path, ids, said):
    root = labeled(tmp_path, ["a", "b"], [ids])
    with pytest.raises(StegoError, match=said):
        open_dataset("folder", root, "train").label(0)


def test_the_single_class_of_a_dataset_of_one_class_makes_no_scores(tmp_path):
    assert texts(labeled(tmp_path, ["a"], [[0, 255]])).startswith(
        "WRONG folder train: 'a' is the only class in 1 label map"
    )


# ---------------------------------------------------------------------------------------------- what lies in the folder


def test_what_is_left_out_is_told_in_one_line(tmp_path, capsys):
    for number in range(3):
        standins.save(tmp_path / f"{number}.jpg", noise(number))
        standins.save(tmp_path / f"vacation/deep/{number}.png", noise(number))
        (tmp_path / f"{number}.HEIC").write_bytes(b"x")
    for name in ("a.dng", "DSC_0001", "notes.txt", "classes.xml", "._0.jpg", ".DS_Store", "Thumbs.db", "desktop.ini"):
        (tmp_path / name).write_bytes(b"x")
    standins.save(tmp_path / "__MACOSX/0.jpg", noise(0))
    status, said = checked(capsys, "folder", tmp_path)
    line = next(line for line in said.splitlines() if "left out of" in line)
    assert status == 0
    for part in ("3 .heic", "1 .dng", "1 without an ending", "images in subfolders: 3 (vacation"):
        assert part in line, part
    assert [one.text for one in look(tmp_path)] == [line.partition("note: ")[2]], "segmenting says the same"


@pytest.mark.parametrize("place", ["", "folder", "imgs/train"])
def test_a_folder_without_any_image_that_is_read_says_what_it_holds(tmp_path, place):
    (tmp_path / place).mkdir(parents=True, exist_ok=True)
    for number in range(3):
        (tmp_path / place / f"{number}.heic").write_bytes(b"x")
    standins.save(tmp_path / place / "more/a.jpg", noise(0))
    with pytest.raises(StegoError, match=r"left out of .*: 3 \.heic .*images in subfolders: 1 \(more"):
        open_dataset("folder", tmp_path, "train")


def test_a_folder_of_nothing_but_images_has_nothing_to_tell(tmp_path):
    standins.save(tmp_path / "a.jpg", noise(0))
    (tmp_path / "notes.txt").write_text("x")
    assert look(tmp_path) == [] == look(open_dataset("folder", tmp_path, "train"))


@pytest.mark.parametrize(
    "mask", ["0_mask.png", "0_L.png", "0-seg.png", "mask_0.png", "0.label.png", "0_gt.png", "0_segmentation.png"]
)
def test_masks_among_images_are_told_by_their_names(tmp_path, mask, capsys):
    for number in range(4):
        standins.save(tmp_path / f"{number}.jpg", noise(number))
    standins.save(tmp_path / mask, np.dstack([standins.stripes([0, 200], SIDE, SIDE)] * 3))
    (found,) = look(tmp_path)
    assert found.misleads and f"1 of 5 images in {tmp_path} look like label maps ({mask})" in found.text
    status, said = checked(capsys, "folder", tmp_path)
    assert status == 1 and f"look like label maps ({mask}) and are trained on" in said


def test_pairs_of_photographs_are_not_taken_for_masks(tmp_path):
    """Left and right views, a gray and a color copy."""
    for name in ("a.jpg", "a_L.jpg", "a_color.jpg", "b_mask.jpg"):
        standins.save(tmp_path / name, noise(0))
    assert look(tmp_path) == []


@pytest.mark.parametrize("mode", ["P", "L", "1", "RGB"])
def test_masks_of_other_names_are_told_by_their_content(tmp_path, mode):
    for number in range(4):
        standins.save(tmp_path / f"{number}.jpg", noise(number))
    ids = Image.fromarray(np.repeat(np.arange(4, dtype=np.uint8) * 80, 8)[None].repeat(SIDE, 0))
    (ids.point(lambda value: 255 * (value > 0), "1") if mode == "1" else ids.convert(mode)).save(tmp_path / "other.png")
    (found,) = look(open_dataset("folder", tmp_path, "train"))
    assert found.misleads and "1 of 5 images" in found.text and "(other.png)" in found.text
    assert bool(look(tmp_path)) == (mode != "RGB"), (
        "of a folder to be segmented, only files of one channel are read for it"
    )


def test_photographs_are_not_taken_for_masks(tmp_path):
    """Gray, dithered and even ones."""
    for number, image in enumerate((Image.fromarray(noise(0)).convert("L"), Image.fromarray(noise(1)).convert("P"), Image.fromarray(noise(2)).convert("1"), Image.new("L", (SIDE, SIDE), 3))):  # fmt: skip
        image.save(tmp_path / f"{number}.png")
    assert look(tmp_path) == [] == look(open_dataset("folder", tmp_path, "train"))


def test_twins_of_another_ending_may_be_label_maps(tmp_path):
    standins.save(tmp_path / "imgs/train/a.jpg", noise(0))
    standins.save(tmp_path / "imgs/train/a.png", noise(0)[..., 0] % 3)
    with pytest.raises(StegoError, match=r"differ in their ending only; rename one, or if one of them is a label map, move it to .*labels/train"):  # fmt: skip
        open_dataset("folder", tmp_path, "train")


def test_label_maps_of_another_name_are_pointed_at(tmp_path):
    root = labeled(tmp_path, ["a", "b"], [[0, 1]])
    (root / "folder/labels/train/0.png").rename(root / "folder/labels/train/0_mask.tif")
    with pytest.raises(
        StegoError, match=r"0\.png, but it holds 0_mask\.tif: call label maps like their images, and save them as PNG"
    ):
        open_dataset("folder", root, "train")


# ---------------------------------------------------------------------------------------------- how images are read


def test_turned_images_are_told_where_they_have_label_maps(tmp_path, capsys):
    exif = Image.Exif()
    exif[0x0112] = 3
    root = labeled(tmp_path, ["a", "b"], [[0, 1]] * 3)
    Image.fromarray(noise(0)).save(root / "folder/imgs/train/1.png", exif=exif)
    found = texts(root)
    assert "1 of 3 images are turned upright as their EXIF data say (orientation 3: 1)" in found
    assert '"exif": "ignore"' in found and not found.startswith("WRONG")
    for rule, said in (("apply", "as their EXIF data say"), ("ignore", "left as stored")):
        (root / "folder/classes.json").write_text(json.dumps({"names": ["a", "b"], "exif": rule}))
        assert texts(root) == ""
        status, printed = checked(capsys, "folder", root)
        assert status == 0 and "EXIF: 1 of 3 images" in printed and said in printed


def test_depth_is_told_with_the_range_of_all_images(tmp_path, capsys):
    for split in ("train", "val"):
        for number, high in enumerate((4095, 300)):
            ramp = np.linspace(high / 10, high, SIDE * SIDE).reshape(SIDE, SIDE).astype(np.uint16)
            standins.save(tmp_path / f"imgs/{split}/{number}.png", ramp)
        standins.save(tmp_path / f"imgs/{split}/8 bits.png", noise(0))
    status, said = checked(capsys, "folder", tmp_path)
    assert status == 1 and "2 of 3 images of folder train (such as " in said and "values from 30 to 4,095" in said
    assert "numpy.clip" in said
    (tmp_path / "classes.json").write_text('{"range": [0, 4095]}')
    status, said = checked(capsys, "folder", tmp_path)
    assert status == 0 and "depth: 16-bit grayscale, of which 0 to 4,095 become 8 bits" in said
    (tmp_path / "classes.json").unlink()
    for path in tmp_path.rglob("[01].png"):
        standins.save(path, np.full((SIDE, SIDE), 40_000, np.uint16))
    status, said = checked(capsys, "folder", tmp_path)
    assert status == 0 and "note: folder train: 2 of 3 images hold 16-bit grayscale; 0 to 65,535 become 8 bits" in said
    assert any("2 of 3 images hold 16-bit grayscale" in one.text for one in look(tmp_path / "imgs/train"))


def test_transparent_images_are_told(tmp_path, capsys):
    root = labeled(tmp_path, ["a", "b"], [[0, 1]] * 3)
    layered = np.dstack([noise(0), np.full((SIDE, SIDE), 255, np.uint8)])
    layered[:4, :, 3] = 0
    standins.save(root / "folder/imgs/train/0.png", layered)
    assert (
        texts(root) == "folder train: 1 of 3 images have transparent pixels, which are white and ignored in label maps"
    )
    assert [one.text for one in look(root / "folder/imgs/train")] == [
        "1 of 3 images have transparent pixels, which belong to no segment"
    ]
    layered[..., 3] = 0
    standins.save(root / "folder/imgs/train/0.png", layered)
    status, said = checked(capsys, "folder", root)
    assert status == 1 and "WRONG: folder train: 1 of 3 images are transparent all over and so white (0.png)" in said


def test_files_of_several_pages_are_told_and_overviews_are_not(tmp_path):
    first, second = (Image.fromarray(noise(i)) for i in range(2))
    first.save(tmp_path / "stack.tif", save_all=True, append_images=[second])
    first.save(tmp_path / "moves.gif", save_all=True, append_images=[second])
    first.save(tmp_path / "phone.jpg", "MPO", save_all=True, append_images=[second])
    pyramid = first.resize((16, 16))
    pyramid.encoderinfo = {"tiffinfo": {254: 1}}
    first.save(tmp_path / "pyramid.tif", save_all=True, append_images=[pyramid])
    for found in (look(tmp_path), look(open_dataset("folder", tmp_path, "train"))):
        assert (
            len(found) == 1
            and "2 of 4 image files hold several frames or pages (moves.gif, stack.tif)" in found[0].text
        )


def test_label_maps_whose_palettes_contradict_each_other_are_told(tmp_path):
    """As programs write them that make a palette for each file."""
    root = labeled(tmp_path, ["a", "b"], [[0, 1]] * 2)
    colors = ([200, 0, 0, 0, 200, 0], [200, 0, 0, 0, 200, 0])
    for number, palette in enumerate(colors):
        stored = Image.fromarray(standins.stripes([0, 1], SIDE, SIDE))
        stored.putpalette(palette)
        stored.save(root / f"folder/labels/train/{number}.png")
    assert texts(root) == ""
    stored.putpalette([0, 200, 0, 200, 0, 0])
    stored.save(root / "folder/labels/train/1.png")
    assert texts(root).startswith("WRONG folder train: label maps color the same id otherwise (id 0, 1)")


# ---------------------------------------------------------------------------------------------- sister releases


def put(root: Path, name: str, stored: np.ndarray) -> None:
    """Writes `stored` over every label map of a stand-in."""
    kinds = {"camvid": "*annot/*.png", "cityscapes": "gtFine/*/*/*_labelIds.png", "cocostuff": "annotations/*/*.png"}
    for path in (root / name).glob(kinds[name]):
        standins.save(path, stored.astype(np.uint8))


def city_of(ids: list[int]) -> np.ndarray:
    return standins.stripes(ids, 32, 64)


@pytest.mark.parametrize(
    "ids, said", [([4, 17, 21], "id 17, 21.*ids 0 to 10, and 11.*32 classes"), ([0, 12], "holds id 12")]
)
def test_camvids_larger_release_is_named(tmp_path, capsys, ids, said):
    standins.camvid(tmp_path, {"train": 2, "val": 1}, 32, 64)
    put(tmp_path, "camvid", city_of(ids))
    with pytest.raises(StegoError, match=rf"trainannot/.*\.png holds {said}" if "id 17" in said else said):
        open_dataset("camvid", tmp_path, "train").label(0)
    assert checked(capsys, "camvid", tmp_path)[0] == 1


def test_camvids_ids_that_start_at_1_are_told(tmp_path, capsys):
    standins.camvid(tmp_path, {"train": 2, "val": 1}, 32, 64)
    put(tmp_path, "camvid", city_of([1, 2, 4, 4, 4, 5, 6, 9, 0]))
    status, said = checked(capsys, "camvid", tmp_path)
    assert status == 1 and "id 4 (pavement) is far more frequent than id 3 (road): ids may start at 1" in said


def test_the_real_camvid_raises_no_doubt(shared):
    if not (shared / "data/camvid").is_dir():
        pytest.skip("shared/data/camvid is not beside the project")
    dataset = open_dataset("camvid", shared / "data", "val")
    assert look(dataset, survey(dataset, range(0, 101, 5))) == []


@pytest.mark.parametrize(
    "ids, said",
    [([0, 1, 10, 255], "id 255 and none from 19 to 33.*trainIds"), ([7, 26, 40], "holds id 40.*labelIds are 0 to 33")],
)
def test_cityscapes_maps_of_other_kinds_are_named(tmp_path, capsys, ids, said):
    standins.cityscapes(tmp_path, {"train": 2, "val": 1}, 32, 64)
    put(tmp_path, "cityscapes", city_of(ids))
    with pytest.raises(StegoError, match=said):
        open_dataset("cityscapes", tmp_path, "train").label(0)
    assert checked(capsys, "cityscapes", tmp_path)[0] == 1
    assert open_dataset("cityscapes", tmp_path, "train", published=True).label(0) is not None


def test_label_maps_of_another_release_are_named_where_the_right_ones_are_missing(tmp_path, monkeypatch):
    standins.cityscapes(tmp_path, {"train": 1, "val": 1}, 32, 64)
    (path,) = (tmp_path / "cityscapes/gtFine/train").rglob("*_labelIds.png")
    path.rename(path.with_name(path.name.replace("_labelIds", "_labelTrainIds")))
    with pytest.raises(StegoError, match=r"1 label maps missing.*beside aachen_.*_labelTrainIds\.png"):
        open_dataset("cityscapes", tmp_path, "train")
    root, tile = potsdam(tmp_path, monkeypatch), TILES["val"][0]
    path = root / f"potsdam/5_Labels_all/top_potsdam_{tile}_label.tif"
    path.rename(path.with_name(f"top_potsdam_{tile}_label_noBoundary.tif"))
    with pytest.raises(
        StegoError, match=r"_label\.tif is missing; there is .*_label_noBoundary\.tif, of another release"
    ):
        open_dataset("potsdam3", root, "val")


def test_cityscapes_train_ids_without_255_are_told(tmp_path, capsys):
    standins.cityscapes(tmp_path, {"train": 2, "val": 1}, 32, 64)
    put(tmp_path, "cityscapes", city_of([0, 1, 2, 8, 10, 13, 18]))
    status, said = checked(capsys, "cityscapes", tmp_path)
    assert status == 1 and "no id from 19 to 33" in said and "trainIds" in said


@pytest.mark.parametrize(
    "ids, said", [([1, 182], "holds id 182.*start at 1"), ([0, 183], "holds id 183.*stuff-only pixelmaps"), ([0, 200], "holds id 200.*stuffthingmaps")]
)  # fmt: skip
def test_cocostuffs_other_releases_are_named(tmp_path, ids, said):
    standins.cocostuff(tmp_path, {"train": 2, "val": 1}, ("Coco164kFull_Stuff_Coarse_7.txt",), 32, 64)
    put(tmp_path, "cocostuff", city_of(ids))
    for name in ("cocostuff27", "cocostuff15"):
        with pytest.raises(StegoError, match=said):
            open_dataset(name, tmp_path, "train").label(0)


def real_coco(root: Path) -> Path:
    """The sample's layout below `root`, with lists of its images."""
    sample = SHARED / "data" / "cocostuff_sample"
    if not sample.is_dir():
        pytest.skip("shared/data/cocostuff_sample is not beside the project")
    for year in ("train2017", "val2017"):
        ids = [path.stem for path in sorted((sample / "images" / year).iterdir())]
        (root / "cocostuff/curated" / year).mkdir(parents=True)
        (root / "cocostuff/curated" / year / "Coco164kFull_Stuff_Coarse_7.txt").write_text("\n".join(ids))
        for kind in ("images", "annotations"):
            (root / "cocostuff" / kind).mkdir(exist_ok=True)
            (root / "cocostuff" / kind / year).symlink_to(sample / kind / year)
    return root


def test_real_coco_images_raise_no_doubt_until_their_ids_start_at_1(tmp_path, shared, capsys):
    root = real_coco(tmp_path)
    status, said = checked(capsys, "cocostuff27", root)
    assert status == 0 and "WRONG" not in said and "first 640" in said
    for year in ("train2017", "val2017"):
        maps = root / "cocostuff/annotations" / year
        paths = list(maps.resolve().iterdir())
        maps.unlink()
        for path in paths:
            stored = np.asarray(Image.open(path)).astype(int)
            standins.save(maps / path.name, np.where(stored == 255, 255, stored + 1).astype(np.uint8))
    status, said = checked(capsys, "cocostuff27", root)
    assert status == 1 and "which stuffthingmaps do not use: the ids may start at 1" in said


# ---------------------------------------------------------------------------------------------- Potsdam, and what is kept


def label_tile(root: Path, tile: str, colors: np.ndarray) -> None:
    standins.save(root / f"potsdam/5_Labels_all/top_potsdam_{tile}_label.tif", colors)


def potsdam(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(TILES, "val", TILES["val"][:2])
    monkeypatch.setitem(TILES, "train", TILES["val"])
    for tile in TILES["val"]:
        standins.potsdam_tile(root, tile, 400)
    return root


def test_tiles_off_the_palette_are_told_with_their_share(tmp_path, monkeypatch, capsys):
    root, tile = potsdam(tmp_path, monkeypatch), TILES["val"][0]
    assert checked(capsys, "potsdam3", root)[0] == 0
    colors = np.array(COLORS, np.uint8)[standins.stripes(list(range(6)), 400, 400)]
    colors[:100] = (254, 255, 255)
    label_tile(root, tile, colors)
    status, said = checked(capsys, "potsdam3", root)
    assert (
        status == 0
        and f"1 of 2 label tiles hold colors that mean no class, which are ignored: {tile} 25.0 % of the pixels" in said
    )
    label_tile(root, tile, np.maximum(colors, 1) - 1)
    status, said = checked(capsys, "potsdam3", root)
    assert status == 1 and "WRONG" in said and f"{tile} 100.0 % of the pixels" in said


def test_red_and_blue_in_each_others_place_are_told(tmp_path, monkeypatch, capsys):
    """The other order of channels has the same colors: cars become low vegetation."""
    root = potsdam(tmp_path, monkeypatch)
    usual = np.array(COLORS, np.uint8)[standins.stripes([0, 0, 1, 1, 2, 2, 2, 3, 4, 5], 400, 400)]
    for tile in TILES["val"]:
        label_tile(root, tile, usual)
    assert checked(capsys, "potsdam3", root)[0] == 0
    for tile in TILES["val"]:
        label_tile(root, tile, usual[..., ::-1])
    status, said = checked(capsys, "potsdam3", root)
    assert status == 1 and "are red and blue swapped in the label maps?" in said


def test_patches_are_cut_anew_when_their_tile_or_label_map_changes(tmp_path, monkeypatch):
    root, tile = potsdam(tmp_path, monkeypatch), TILES["val"][0]
    before = open_dataset("potsdam3", root, "val")
    image, label, state = before.image(0), before.label(0), before.state()
    assert open_dataset("potsdam3", root, "val").state() == state, "nothing is cut twice"
    label_tile(root, tile, np.full((400, 400, 3), COLORS[1], np.uint8))
    after = open_dataset("potsdam3", root, "val")
    assert (after.label(0) == 1).all() and not (label == 1).all() and (after.image(0) == image).all()
    standins.save(root / f"potsdam/2_Ortho_RGB/top_potsdam_{tile}_RGB.tif", np.full((400, 400, 3), 9, np.uint8))
    assert (open_dataset("potsdam3", root, "val").image(0) == 9).all()
    (root / f"potsdam/5_Labels_all/top_potsdam_{tile}_label.tif").unlink()
    with pytest.raises(StegoError, match=r"label\.tif is missing"):
        open_dataset("potsdam3", root, "val")
    (root / f"potsdam/2_Ortho_RGB/top_potsdam_{tile}_RGB.tif").unlink()
    assert (open_dataset("potsdam3", root, "val").image(0) == 9).all(), "a raw tile may be removed once it is cut"


def test_patches_without_a_record_of_their_tile_are_cut_anew(tmp_path, monkeypatch):
    root = potsdam(tmp_path, monkeypatch)
    open_dataset("potsdam3", root, "val")
    patches = root / "potsdam/patches" / TILES["val"][0]
    (patches / tiles.ABOUT).unlink()
    standins.save(next((patches / "gt").iterdir()), np.zeros((200, 200), np.uint8))
    assert not (open_dataset("potsdam3", root, "val").label(0) == 0).all()


def test_written_crops_follow_their_images(tmp_path):
    standins.save(tmp_path / "imgs/train/a.png", noise(0))
    write_crops(FiveCrop(open_dataset("folder", tmp_path, "train")), tmp_path / "crops")
    first = (tmp_path / "crops/img/train/0.jpg").read_bytes()
    standins.save(tmp_path / "imgs/train/a.png", noise(1))
    write_crops(FiveCrop(open_dataset("folder", tmp_path, "train")), tmp_path / "crops")
    assert (tmp_path / "crops/img/train/0.jpg").read_bytes() != first


# ---------------------------------------------------------------------------------------------- once each, and kept


def test_findings_are_kept_until_a_file_changes(tmp_path, monkeypatch):
    root = labeled(tmp_path, ["a", "b", "c"], [[0, 1]] * 2)
    surveyed = []
    monkeypatch.setattr(findings, "survey", lambda dataset: surveyed.append(dataset) or survey(dataset))
    first, again = (look(open_dataset("folder", root, "train"), keep=tmp_path / "kept") for _ in range(2))
    assert first == again != [] and len(surveyed) == 1
    standins.save(root / "folder/labels/train/0.png", standins.stripes([0, 2], SIDE, SIDE))
    assert look(open_dataset("folder", root, "train"), keep=tmp_path / "kept") == [] and len(surveyed) == 2
    for path in (tmp_path / "kept").iterdir():
        path.write_text("{")
    assert look(open_dataset("folder", root, "train"), keep=tmp_path / "kept") == [] and len(surveyed) == 3


def test_crops_have_the_findings_of_their_images(tmp_path):
    root = labeled(tmp_path, ["a", "b", "c"], [[0, 1]])
    assert look(FiveCrop(open_dataset("folder", root, "train"))) == look(open_dataset("folder", root, "train")) != []


def test_a_training_without_findings_says_nothing(tmp_path, backbone_file):
    root = labeled(tmp_path, ["a", "b"], [[0, 1]] * 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error", Notice)
        train(tiny_experiment(root, backbone_file, dataset="folder", train_size=32, eval_size=32, steps=1), runs_dir=tmp_path / "runs")  # fmt: skip
