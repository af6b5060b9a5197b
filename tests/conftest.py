"""Fixtures that several test files share."""

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # before timm is imported: no test, and nothing that it starts, asks timm's hub

from common import SHARED, tiny_experiment, write_backbone, write_dino
from families import small_families  # noqa: F401
from sources import Server

from stego_lib import Backbone, Run, train
from stego_lib.datasets.scenes import draw_scenes

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts what runs in its background
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the tests press Ctrl-C on processes that inherit this


@pytest.fixture(scope="session")
def backbone_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny backbone as a .safetensors file."""
    return write_backbone(tmp_path_factory.mktemp("backbone") / "tiny.safetensors")


@pytest.fixture(scope="session")
def dino_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny backbone of DINO's family as a .pth file."""
    return write_dino(tmp_path_factory.mktemp("dino") / "tiny.pth")


@pytest.fixture(scope="session")
def scenes_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root whose scenes are few and small: 12 to train on, 6 to score, 64 pixels per side. Not to be changed."""
    root = tmp_path_factory.mktemp("data")
    draw_scenes(root / "scenes", train=12, val=6, size=64)
    return root


@pytest.fixture(scope="session")
def backbone(backbone_file: Path) -> Backbone:
    """The tiny backbone on the CPU in float32. Not to be changed."""
    return Backbone(str(backbone_file), device="cpu", precision="float32")


@pytest.fixture(scope="session")
def run(scenes_root: Path, backbone_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Trained for two steps on the scenes, and not evaluated. Names that a test gives it are removed again."""
    return train(tiny_experiment(scenes_root, backbone_file, steps=2), runs_dir=tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of large files beside the project; tests that need it are skipped elsewhere."""
    if not SHARED.is_dir():
        pytest.skip("the folder shared/ is not beside the project")
    return SHARED


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server on this machine without any file."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = Server()
    yield server
    server.stop()


@pytest.fixture
def mirror(server: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    """The same as the place that everything is fetched from."""
    monkeypatch.setenv("STEGO_DATA_MIRROR", f"{server.address}/")
    return server


@pytest.fixture(scope="session")
def open_browser() -> Iterator[Callable]:
    """Function that starts a headless Chromium with further arguments; skips the test where there is none."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed (extra `dev`)")
    program, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if not program or not driver:
        pytest.skip("Chromium and its driver are not installed (Debian: apt install chromium chromium-driver)")
    started = []

    def start(*arguments: str) -> object:
        options = webdriver.ChromeOptions()
        options.binary_location = program
        for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", *arguments):
            options.add_argument(argument)
        started.append(webdriver.Chrome(options=options, service=webdriver.ChromeService(driver)))
        started[-1].set_window_size(1200, 900)
        return started[-1]

    yield start
    for browser in started:
        browser.quit()


@pytest.fixture
def browser(open_browser: Callable) -> object:
    """Headless Chromium."""
    return open_browser()


@pytest.fixture
def browser_without_scripts(open_browser: Callable) -> object:
    """The same with JavaScript off."""
    return open_browser("--blink-settings=scriptEnabled=false")
