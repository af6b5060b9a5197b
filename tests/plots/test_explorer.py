"""The explorer: its data against exact cosines, and the page in a browser (pointer, keys, touch, scripts off)."""

import base64
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from common import ROOT
from PIL import Image

from stego_book.plots.explorer import explorer_data, explorer_html
from stego_lib import StegoError

ROWS, COLUMNS, COUNT = 4, 6, 3
GENERATOR = torch.Generator().manual_seed(0)
IMAGES = torch.randint(0, 256, (COUNT, 3, 32, 48), generator=GENERATOR, dtype=torch.uint8)
SPACES = {
    "features": torch.randn(COUNT, 20, ROWS, COLUMNS, generator=GENERATOR) + 0.5,
    "codes": torch.randn(COUNT, 8, ROWS, COLUMNS, generator=GENERATOR),
}
STILL = "data:image/gif;base64,R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7"


def cosines(space: str) -> np.ndarray:
    """(N * h * w, N * h * w), one pair of places at a time."""
    vectors = SPACES[space].movedim(1, -1).reshape(COUNT * ROWS * COLUMNS, -1)
    return np.array([[F.cosine_similarity(a, b, dim=0).item() for b in vectors] for a in vectors])


@pytest.fixture(scope="module")
def data() -> dict:
    return explorer_data(IMAGES, SPACES, ["one", 'two "quoted"', "</script>"])


@pytest.fixture(scope="module")
def page(data, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("explorer") / "page.html"
    path.write_text(
        f'<!doctype html><meta charset="utf-8"><body>{explorer_html(data, STILL, "a <still> image")}</body>'
    )
    return path


def test_the_stored_vectors_give_the_exact_cosines_to_a_hundredth(data):
    data = json.loads(json.dumps(data))
    assert data["grid"] == [ROWS, COLUMNS] and len(data["images"]) == COUNT
    for space in data["spaces"]:
        vectors = (
            np.frombuffer(base64.b64decode(space["vectors"]), np.int8).reshape(-1, space["channels"]) * space["scale"]
        )
        exact = cosines(space["name"])
        assert np.abs(vectors @ vectors.T - exact).max() < 0.012
        assert space["floor"] == pytest.approx(np.percentile(exact, 5), abs=0.02)


def test_sizes_that_do_not_agree_are_an_error():
    with pytest.raises(StegoError, match="as many maps and names"):
        explorer_data(IMAGES[:2], SPACES, ["a", "b"])
    with pytest.raises(StegoError, match="one grid"):
        explorer_data(IMAGES, SPACES | {"small": torch.ones(COUNT, 2, 2, 2)}, list("abc"))


def test_the_piece_of_html_is_whole(data):
    html = explorer_html(data, STILL, 'says "<x>"')
    assert "__" not in html.split("const data =")[0] and html.count("<script") == html.count("</script>") == 1
    assert 'alt="says &quot;&lt;x>&quot;"' in html and "http" not in html, "nothing is fetched from elsewhere"


def look(driver, space: str) -> tuple[list[int], float]:
    """Where the page says the query is, and the largest error of the correspondences that it shows."""
    query = [
        int(n) for n in driver.find_element("class name", "correspondence-explorer").get_attribute("data-query").split()
    ]
    found = driver.execute_script("return [...document.querySelector('.correspondence-explorer').correspondences]")
    row = (query[0] * ROWS + query[1]) * COLUMNS + query[2]
    return query, float(np.abs(np.array(found) - cosines(space)[row]).max())


def shown(driver) -> list[str]:
    """What the canvases show."""
    return driver.execute_script("return [...document.querySelectorAll('.images canvas')].map(c => c.toDataURL())")


def open_page(driver, page: Path) -> list:
    from selenium.webdriver.support.ui import WebDriverWait

    driver.get(page.as_uri())
    WebDriverWait(driver, 60).until(
        lambda d: d.find_element("class name", "correspondence-explorer").get_attribute("data-query")
    )
    return driver.find_elements("css selector", ".images canvas")


def point(driver, canvas, row: int, column: int, kind: str = "mouse") -> None:
    """Puts a mouse or a finger on the middle of a grid cell."""
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.actions.pointer_input import PointerInput

    size = canvas.size
    x = round((column + 0.5) / COLUMNS * size["width"] - size["width"] / 2)
    y = round((row + 0.5) / ROWS * size["height"] - size["height"] / 2)
    chain = ActionChains(driver, devices=[PointerInput(kind, "finger")] if kind == "touch" else None)
    chain.move_to_element_with_offset(canvas, x, y)
    if kind == "touch":
        chain.click()
    chain.perform()


def test_pointer_keys_and_touch_move_the_query_and_the_heat_maps_follow(browser, page):
    from selenium.webdriver.common.keys import Keys

    canvases = open_page(browser, page)
    assert len(canvases) == COUNT and not browser.find_element("class name", "plain").is_displayed()
    point(browser, canvases[1], 2, 4)
    query, error = look(browser, "features")
    assert query == [1, 2, 4] and error < 0.012
    before = shown(browser)
    point(browser, canvases[0], 0, 1)
    query, error = look(browser, "features")
    assert query == [0, 0, 1] and error < 0.012
    assert all(old != new for old, new in zip(before, shown(browser), strict=True)), "every heat map changed"

    canvases[0].send_keys(Keys.ARROW_RIGHT, Keys.ARROW_DOWN, Keys.ARROW_DOWN, Keys.ARROW_LEFT)
    assert look(browser, "features")[0] == [0, 2, 1]
    canvases[0].send_keys(*[Keys.ARROW_UP] * 9)
    assert look(browser, "features")[0] == [0, 0, 1], "it stops at the border"
    assert "row 1 of 4, column 2 of 6" in browser.find_element("class name", "says").text

    browser.find_elements("css selector", "input[type=radio]")[1].click()
    assert look(browser, "codes")[1] < 0.012
    point(browser, canvases[2], 3, 0, "touch")
    query, error = look(browser, "codes")
    assert query == [2, 3, 0] and error < 0.012
    kept = ROOT / "build" / "explorer.png"
    kept.parent.mkdir(exist_ok=True)
    browser.save_screenshot(str(kept))
    assert len(np.unique(np.asarray(Image.open(kept).convert("L")))) > 50, "the screenshot shows something"


def test_a_plain_image_stands_there_while_scripts_are_off(browser_without_scripts, page):
    browser_without_scripts.get(page.as_uri())
    still = browser_without_scripts.find_element("class name", "plain")
    assert still.is_displayed() and still.get_attribute("alt") == "a <still> image"
    assert not browser_without_scripts.find_element("class name", "live").is_displayed()
