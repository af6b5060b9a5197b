"""The page that segments in the browser: its pixels are Python's, and nothing that a reader does freezes it."""

import functools
import http.server
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from common import ROOT
from killing import wait_for
from PIL import Image
from randomrun import random_run
from scipy.ndimage import map_coordinates
from sources import serving

from stego_book import browser as page_files
from stego_lib.datasets.images import read_image
from stego_lib.datasets.painter import paint_scene
from stego_lib.predict import Scores, label_maps

onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (extra `export`)")


@pytest.fixture(scope="module")
def site(tmp_path_factory, scenes_root) -> Path:
    """A folder as a static host would serve it: the page alone, with a run of random weights."""
    folder = tmp_path_factory.mktemp("site")
    if why := page_files.fetch_runtime(folder / "npm"):
        pytest.skip(f"the page cannot be put together here: {why}")
    page_files.write_files(random_run(folder, data_root=str(scenes_root)), folder / "npm", folder / "_static" / "try")
    text = (ROOT / "book" / "try.md").read_text(encoding="utf-8")
    html = text.split("```{raw} html\n")[1].split("\n```")[0]
    (folder / "book").mkdir()
    style = '<meta charset="utf-8"><link rel="stylesheet" href="../_static/book.css">'
    (folder / "book" / "try.html").write_text(f"<!doctype html><html><head>{style}</head><body>{html}</body></html>")
    (folder / "_static" / "book.css").write_bytes((ROOT / "book" / "_static" / "book.css").read_bytes())
    return folder


@pytest.fixture(scope="module")
def address(site) -> str:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with serving(functools.partial(Quiet, directory=site)) as root:
        yield f"{root}/book/try.html"


def message(page) -> str:
    return page.find_element("css selector", "[data-part=message]").text


def wait(page, wanted: str) -> str:
    """The page's message once it holds a text."""
    return wait_for(lambda: wanted in (text := message(page)) and text)


def give(page, path: Path) -> None:
    page.find_element("css selector", "[data-part=file]").send_keys(str(path))


@pytest.fixture
def page(browser, address):
    """The page, ready."""
    browser.get(address)
    wait(browser, "Choose a photograph")
    return browser


def test_the_pixels_are_those_of_python(page, site, tmp_path):
    image = np.ascontiguousarray(np.tile(paint_scene(5, 0)[0], (2, 2, 1))[:171, :246])
    Image.fromarray(image).save(tmp_path / "image.png")
    give(page, tmp_path / "image.png")
    assert "246 × 171 pixels" in wait(page, "on this device")
    shown = page.execute_script(
        "const {labels, width, height} = document.getElementById('try').stego.result;"
        "return [[...labels], width, height]"
    )
    labels = np.array(shown[0]).reshape(shown[2], shown[1])
    wanted = random_run(tmp_path).predict(image, refine="none")
    session = onnxruntime.InferenceSession(str(site / "_static" / "try" / "stego.onnx"))
    similarity, features, code = session.run(["similarity", "features", "code"], {"image": image})
    same_file = label_maps(Scores(torch.from_numpy(similarity)), wanted.shape)[0].numpy()
    assert len(np.unique(wanted)) > 1
    # Products of 8 bits round differently on each processor; the browser's are the closer ones to the run in float32.
    assert (labels == same_file).mean() >= 0.96
    assert (labels == wanted).mean() >= 0.98
    shares = page.find_element("css selector", "[data-part=legend]").text
    for id_ in range(3):
        if (labels == id_).any():
            assert f"cluster {id_}: {100 * (labels == id_).mean():.1f} %" in shares
    page.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)})
    page.find_element("css selector", "[data-part=download]").click()
    wait_for((tmp_path / "segments.png").exists)
    np.testing.assert_array_equal(Image.open(tmp_path / "segments.png").convert("L"), labels)
    # The second tab: the cosine of the middle cell's feature with all others.
    for space, maps in (("features", features[0]), ("codes", code[0])):
        page.execute_script(
            "const s = document.querySelector('[data-part=space]'); s.value = arguments[0];"
            "s.dispatchEvent(new Event('change'))",
            space,
        )
        cell, cosines = page.execute_script(
            "const s = document.getElementById('try').stego; return [s.cell, [...s.cosines]]"
        )
        unit = maps.reshape(len(maps), -1) / np.linalg.norm(maps.reshape(len(maps), -1), axis=0)
        np.testing.assert_allclose(unit.T @ unit[:, cell[0] * maps.shape[2] + cell[1]], cosines, atol=5e-2)


def test_transparent_and_turned_images_are_read_as_in_python(page, tmp_path):
    image = Image.fromarray(paint_scene(5, 0)[0]).crop((0, 0, 120, 90))
    layered = image.copy()
    layered.putalpha(Image.linear_gradient("L").resize(image.size))
    layered.save(tmp_path / "layered.png")
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[274] = orientation
        image.save(tmp_path / f"{orientation}.webp", exif=exif, lossless=True)
    done = "const root = document.getElementById('try'); return root.stego.result && root.ariaBusy !== 'true'"
    for path in sorted(tmp_path.iterdir()):
        page.execute_script("document.getElementById('try').stego.result = null")
        give(page, path)
        wait_for(lambda: page.execute_script(done))
        labels, pixels, height, width = page.execute_script("""
            const {labels, photograph, width, height} = document.getElementById("try").stego.result;
            const context = new OffscreenCanvas(width, height).getContext("2d");
            context.drawImage(photograph, 0, 0);
            return [[...labels], [...context.getImageData(0, 0, width, height).data], height, width]""")
        labels, pixels = np.array(labels).reshape(height, width), np.array(pixels).reshape(height, width, 4)
        read = read_image(path)
        assert read.rgb.size == (width, height), path
        assert np.abs(pixels[..., :3] - np.asarray(read.rgb)).max() <= 2, path
        clear = np.zeros_like(labels, bool) if read.transparent is None else read.transparent
        np.testing.assert_array_equal(labels == 255, clear)
        assert clear.any() == (path.suffix == ".png")


def taught(page, clicks: int) -> dict:
    """What the page computed from a number of clicks, once it has."""
    script = """
        const {taught, clicks, result: {maps, h, w, height, width}} = document.getElementById("try").stego;
        return taught?.clicks === arguments[0] && {clicks, codes: [...maps.codes.maps], scores: [...taught.scores],
        labels: [...taught.labels], shape: [-1, h, w], size: [height, width]}"""
    found = wait_for(lambda: page.execute_script(script, clicks))
    return found | {key: np.array(found[key]) for key in ("codes", "scores", "labels")}


def neighbor_scores(codes: np.ndarray, size: list[int], clicks: list[dict]) -> np.ndarray:
    """The rule of `teach` "neighbors" in numpy: logarithms of votes (3, h, w) from codes (C, h, w)."""
    places = [[(click[axis] + 0.5) * cells / pixels - 0.5 for click in clicks]
              for axis, cells, pixels in zip("yx", codes.shape[1:], size, strict=True)]  # fmt: skip
    points = np.stack([map_coordinates(channel, places, order=1, mode="nearest") for channel in codes], 1)
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    votes = np.zeros((3, *codes.shape[1:]))
    for row, column in np.ndindex(*codes.shape[1:]):
        cosines = points @ codes[:, row, column] / np.linalg.norm(codes[:, row, column])
        nearest = np.argsort(-cosines)[:30]
        weights = np.exp((cosines[nearest] - cosines.max()) / 0.02)
        for click, weight in zip(nearest, weights / weights.sum(), strict=True):
            votes[clicks[click]["name"], row, column] += weight
    return np.log(np.maximum(votes, 1e-4))


def test_three_clicks_with_two_names_label_the_photograph_as_teach_does(page, tmp_path):
    from selenium.webdriver import ActionChains, Keys

    def part(name):
        return page.find_element("css selector", f"[data-part={name}]")

    image = np.ascontiguousarray(paint_scene(5, 0)[0])
    Image.fromarray(image).save(tmp_path / "image.png")
    give(page, tmp_path / "image.png")
    wait(page, "on this device")
    part("tab-taught").click()
    canvas, choices = part("taught"), page.find_elements("css selector", "[data-choice]")
    assert not part("map").is_displayed()
    width, height = canvas.size["width"], canvas.size["height"]
    for number, (x, y) in enumerate([(0.2, 0.3), (0.8, 0.9), (0.4, 0.1)]):
        choices[number % 2].click()
        page.execute_script("arguments[0].scrollIntoView({block: 'center'})", canvas)
        place = round((x - 0.5) * width), round((y - 0.5) * height)
        ActionChains(page).move_to_element_with_offset(canvas, *place).click().perform()
    now = taught(page, 3)
    clicks = pd.DataFrame(now["clicks"])
    assert clicks["name"].tolist() == [0, 1, 0]
    size = np.array(now["size"])
    np.testing.assert_allclose(clicks[["x", "y"]] / size[::-1], [[0.2, 0.3], [0.8, 0.9], [0.4, 0.1]], atol=0.02)
    codes, scores = now["codes"].reshape(now["shape"]), now["scores"].reshape(now["shape"])
    np.testing.assert_allclose(scores, neighbor_scores(codes, size, now["clicks"]), atol=1e-2)
    labels = now["labels"].reshape(size)
    same = label_maps(Scores(torch.from_numpy(scores)[None]), tuple(size))[0].numpy()
    assert (labels == same).mean() > 0.999 and set(np.unique(labels)) == {0, 1}
    run = random_run(tmp_path)
    table = clicks.assign(image="image.png", name=clicks["name"].map({0: "thing", 1: "background"}))
    run.teach([tmp_path / "image.png"], table, method="neighbors")
    assert (labels == run.predict(image, refine="none")).mean() > 0.95
    assert f"thing: {100 * (labels == 0).mean():.1f} %" in part("legend").text
    page.find_element("css selector", "[data-name]").send_keys("s of all kinds")
    assert "things of all kinds: " in part("legend").text
    # By keyboard, more clicks than vote.
    canvas.send_keys("3", *(Keys.ARROW_RIGHT, Keys.ARROW_DOWN, Keys.ENTER) * 32)
    many = taught(page, 35)
    assert [click["name"] for click in many["clicks"][3:]] == [2] * 32
    expected = neighbor_scores(codes, size, many["clicks"])
    np.testing.assert_allclose(many["scores"].reshape(now["shape"]), expected, atol=1e-2)
    canvas.send_keys(Keys.BACKSPACE)
    taught(page, 34)
    for _ in range(31):
        part("undo").click()
    np.testing.assert_array_equal(taught(page, 3)["labels"], now["labels"])
    part("clear").click()
    assert not part("map").is_displayed() and not part("undo").is_enabled()


def test_a_broken_file_gives_a_sentence_and_the_next_one_works(page, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 no image")
    give(page, tmp_path / "broken.jpg")
    assert "cannot read" in wait(page, "Choose a JPEG")
    page.find_element("css selector", "[data-sample='sample-1.jpg']").click()
    wait(page, "on this device")


def test_a_browser_without_webassembly_is_told(browser, address):
    browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": "delete window.WebAssembly"})
    browser.get(address)
    assert "lacks WebAssembly" in wait(browser, "newer browser")
