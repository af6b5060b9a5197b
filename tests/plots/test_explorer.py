"""The explorer: its data against exact cosines, and the page in a browser (pointer, keys, touch, scripts off)."""

import base64
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

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
def page(tmp_path_factory) -> Path:
    data = explorer_data(IMAGES, SPACES, ["one", 'two "quoted"', "</script>"])
    html = explorer_html(data, STILL, 'says "<x>"')
    assert html.count("<script") == html.count("</script>") == 1
    assert 'alt="says &quot;&lt;x>&quot;"' in html and "http" not in html, "nothing is fetched from elsewhere"
    path = tmp_path_factory.mktemp("explorer") / "page.html"
    path.write_text(f'<!doctype html><meta charset="utf-8"><body>{html}</body>')
    return path


def test_the_stored_vectors_give_the_exact_cosines_to_a_hundredth():
    data = json.loads(json.dumps(explorer_data(IMAGES, SPACES, list("abc"))))
    for space in data["spaces"]:
        stored = np.frombuffer(base64.b64decode(space["vectors"]), np.int8)
        vectors = stored.reshape(-1, space["channels"]) * space["scale"]
        exact = cosines(space["name"])
        assert np.abs(vectors @ vectors.T - exact).max() < 0.012
        assert space["floor"] == pytest.approx(np.percentile(exact, 5), abs=0.02)
    with pytest.raises(StegoError, match="grid"):
        explorer_data(IMAGES, SPACES | {"small": torch.ones(COUNT, 2, 2, 2)}, list("abc"))


def look(driver, space: str) -> list[int]:
    """Where the page says the query is; its correspondences are compared with the exact ones."""
    explorer = driver.find_element("class name", "correspondence-explorer")
    image, row, column = query = [int(n) for n in explorer.get_attribute("data-query").split()]
    shown = driver.execute_script("return [...document.querySelector('.correspondence-explorer').correspondences]")
    exact = cosines(space)[(image * ROWS + row) * COLUMNS + column]
    np.testing.assert_allclose(np.array(shown), exact, atol=0.012)
    return query


def point(driver, canvas, row: int, column: int, kind: str = "mouse") -> None:
    """Puts a mouse or a finger on the middle of a grid cell."""
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.actions.pointer_input import PointerInput

    x = round(((column + 0.5) / COLUMNS - 0.5) * canvas.size["width"])
    y = round(((row + 0.5) / ROWS - 0.5) * canvas.size["height"])
    chain = ActionChains(driver, devices=[PointerInput(kind, "finger")] if kind == "touch" else None)
    chain.move_to_element_with_offset(canvas, x, y)
    if kind == "touch":
        chain.click()
    chain.perform()


def test_pointer_keys_and_touch_move_the_query_and_the_heat_maps_follow(browser, page):
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    browser.get(page.as_uri())
    explorer = browser.find_element("class name", "correspondence-explorer")
    WebDriverWait(browser, 60).until(lambda _: explorer.get_attribute("data-query"))
    canvases = browser.find_elements("css selector", ".images canvas")
    pixels = "return [...document.querySelectorAll('.images canvas')].map(c => c.toDataURL())"
    assert len(canvases) == COUNT and not browser.find_element("class name", "plain").is_displayed()
    point(browser, canvases[1], 2, 4)
    assert look(browser, "features") == [1, 2, 4]
    before = browser.execute_script(pixels)
    point(browser, canvases[0], 0, 1)
    assert look(browser, "features") == [0, 0, 1]
    after = browser.execute_script(pixels)
    assert all(old != new for old, new in zip(before, after, strict=True)), "every heat map changed"
    canvases[0].send_keys(Keys.ARROW_RIGHT, Keys.ARROW_DOWN, Keys.ARROW_DOWN, Keys.ARROW_LEFT)
    assert look(browser, "features") == [0, 2, 1]
    canvases[0].send_keys(*[Keys.ARROW_UP] * 9)
    assert look(browser, "features") == [0, 0, 1], "it stops at the border"
    browser.find_elements("css selector", "input[type=radio]")[1].click()
    point(browser, canvases[2], 3, 0, "touch")
    assert look(browser, "codes") == [2, 3, 0]


def test_a_plain_image_stands_there_while_scripts_are_off(open_browser, page):
    browser = open_browser("--blink-settings=scriptEnabled=false")
    browser.get(page.as_uri())
    assert browser.find_element("class name", "plain").is_displayed()
    assert not browser.find_element("class name", "live").is_displayed()
