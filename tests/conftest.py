"""Fixtures that several test files share."""

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # before timm is imported: no test, and nothing that it starts, asks timm's hub

import timm
import torch
from common import SHARED, tiny_experiment, write_backbone
from sources import Mirror, serving

from stego_lib import Backbone, Run, baselines, probes, train
from stego_lib.datasets.scenes import draw_scenes

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts what runs in its background
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the tests press Ctrl-C on processes that inherit this


@pytest.fixture(scope="session")
def backbone_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny backbone as a .safetensors file."""
    return write_backbone(tmp_path_factory.mktemp("backbone") / "tiny.safetensors")


@pytest.fixture(scope="session")
def dino_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny network in DINO's format: random weights, patches of 8, positions for 224 pixels, heads 64 wide."""
    path = tmp_path_factory.mktemp("dino") / "tiny.pth"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vit = timm.create_model("vit_small_patch8_224", embed_dim=64, depth=2, num_heads=1, num_classes=0)
        torch.save({key: value + 0.1 * torch.randn_like(value) for key, value in vit.state_dict().items()}, path)
    return path


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


@pytest.fixture(scope="module")
def few_samples() -> Iterator[None]:
    """Makes the baselines quick, and poor."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(baselines, "SAMPLES", 500)
        patch.setattr(probes, "RESTARTS", 1)
        yield


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of large files beside the project; tests that need it are skipped elsewhere."""
    if not SHARED.is_dir():
        pytest.skip("the folder shared/ is not beside the project")
    return SHARED


@pytest.fixture
def mirror(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Mirror]]:
    """A server on this machine without any file, as the place that everything is fetched from."""
    handler = type("Handler", (Mirror,), {"files": {}, "log": []})
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serving(handler) as address:
        monkeypatch.setenv("STEGO_DATA_MIRROR", f"{address}/")
        yield handler


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
