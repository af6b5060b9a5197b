"""A run that one person shares and another opens: folder, hub, cache, model card."""

import base64
import hashlib
import json
import re
import shutil
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from common import ROOT, tiny_experiment, write_backbone
from PIL import Image
from randomrun import random_run, written
from sources import serving

from stego_lib import Run, StegoError, evaluate, load_run, train

pytestmark = pytest.mark.usefixtures("few_samples")

COMMIT = "0" * 40


@pytest.fixture
def run(tmp_path) -> Run:
    """A run on an embedded backbone, matched to classes."""
    return written(random_run(tmp_path, [2, 0, 1], crf=False, eval_size=64))


@pytest.fixture
def own(tmp_path, backbone_file) -> Run:
    """A run on a user's file."""
    return written(random_run(tmp_path, backbone=str(backbone_file), crf=False, eval_size=64))


@pytest.fixture
def image(tmp_path) -> Path:
    path = tmp_path / "private.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8)).save(path)
    return path


def metadata(card: str) -> dict:
    return yaml.safe_load(card.split("---")[1])


class Hub(BaseHTTPRequestHandler):
    """The part of the hub's protocol that makes a repository, takes a commit of small files, and gives them back."""

    files: dict[str, bytes]

    def log_message(self, *_):
        pass

    def answer(self, body: bytes, **headers: str):
        self.send_response(200)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        if "/preupload/" in self.path:
            paths = [file["path"] for file in json.loads(body)["files"]]
            answer = {"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]}
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                if line["key"] == "deletedFile":
                    del self.files[line["value"]["path"]]
            answer = {"commitUrl": f"http://127.0.0.1/user/streets/commit/{COMMIT}", "commitOid": COMMIT}
        else:  # the repository, the check of the card's metadata
            answer = {"url": "http://127.0.0.1/user/streets", "errors": [], "warnings": []}
        self.answer(json.dumps(answer).encode())

    def do_GET(self):
        name = self.path.rpartition("/")[2]
        if "/tree/" in self.path:
            listed = [{"type": "file", "path": path, "size": len(c), "oid": path} for path, c in self.files.items()]
            return self.answer(json.dumps(listed).encode())
        if "/revision/" in self.path:
            return self.answer(json.dumps({"id": "user/streets", "sha": COMMIT}).encode())
        if name not in self.files:
            return self.send_error(404)
        etag = hashlib.sha256(self.files[name]).hexdigest()
        self.answer(self.files[name], ETag=f'"{etag}"', X_Repo_Commit=COMMIT)

    do_HEAD = do_GET


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A stand-in hub; the cache is empty. Gives its files."""
    handler = type("Handler", (Hub,), {"files": {}})
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with serving(handler) as address:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
        template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield handler.files


def test_a_run_in_an_empty_folder_predicts_the_same(image, backbone_file, hub, tmp_path, monkeypatch):
    """Runs with names, with a taught classifier, and with the file of their backbone, from folders and from the hub."""
    files, expected = {}, {}
    for kind in ("named", "taught", "own"):
        (tmp_path / kind).mkdir()
        changes = {"backbone": str(backbone_file)} if kind == "own" else {}
        run = written(random_run(tmp_path / kind, [2, 0, 1], crf=False, eval_size=64, **changes))
        if kind == "named":
            run.name_segments({"a": "road", "c": None})
        if kind == "taught":
            halves = np.tile(np.arange(90, dtype=np.uint8) // 45, (70, 1))
            run.teach([image], [halves], names=["left", "right"])
        folder = tmp_path / f"shared_{kind}"
        run.save_pretrained(folder, images=[image], include_backbone=kind == "own")
        if kind == "named":
            run.push_to_hub("user/named")
        files[kind] = {path.name for path in folder.iterdir()}
        expected[kind] = run.predict(image), run.segments.names
        text = (folder / "config.json").read_text(encoding="utf-8") + (folder / "README.md").read_text(encoding="utf-8")
        assert str(tmp_path) not in text and image.name not in text
        shutil.rmtree(tmp_path / kind)
    common = {"config.json", "head.safetensors", "README.md", "thumbnail.webp"}
    extra = {"named": set(), "taught": {"taught.safetensors"}, "own": {"backbone.safetensors"}}
    assert files == {kind: common | more for kind, more in extra.items()}
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    for kind, source in [("named", "user/named"), *((kind, tmp_path / f"shared_{kind}") for kind in files)]:
        opened = Run.from_pretrained(source, runs_dir="runs")
        assert np.array_equal(opened.predict(image), expected[kind][0]) and opened.segments.names == expected[kind][1]
    assert len(list((tmp_path / "empty" / "runs" / "shared").iterdir())) == 4
    assert not list((tmp_path / "cache").rglob("README.md"))


def test_a_file_of_a_backbone_is_asked_for_and_checked(own, image, backbone_file, tmp_path):
    own.save_pretrained(tmp_path / "shared")
    assert sum(path.stat().st_size for path in (tmp_path / "shared").iterdir()) < 500_000
    runs = {"runs_dir": tmp_path / "runs"}
    with pytest.raises(StegoError, match="backbone=FILE"):
        load_run(tmp_path / "shared", **runs).predict(image)
    opened = load_run(tmp_path / "shared", backbone=str(backbone_file), **runs)
    assert np.array_equal(opened.predict(image), own.predict(image))
    shutil.copy(backbone_file, opened.folder / backbone_file.name)
    assert np.array_equal(load_run(tmp_path / "shared", **runs).predict(image), own.predict(image))


def test_what_a_stranger_wrote_is_checked(run, tmp_path):
    folder = tmp_path / "shared"
    run.save_pretrained(folder)
    with pytest.raises(StegoError, match="empty"):
        run.save_pretrained(folder)
    with pytest.raises(StegoError, match="name"):
        run.save_pretrained(tmp_path / "other", include_backbone=True)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    elsewhere = config["experiment"] | {"backbone": str(write_backbone(tmp_path / "secret.safetensors"))}
    for changed in (config | {"experiment": elsewhere}, config | {"experiment": 1}, [], {}):
        (folder / "config.json").write_text(json.dumps(changed))
        with pytest.raises(StegoError, match=r"secret|shared"):
            _ = load_run(folder, runs_dir=tmp_path / "runs").backbone


def test_an_upload_is_the_folder(run, image, hub, tmp_path):
    run.push_to_hub("user/streets", license="mit", images=[image])
    run.save_pretrained(tmp_path / "shared", license="mit", images=[image])
    for path in (tmp_path / "shared").iterdir():
        if path.suffix != ".md":
            assert hub[path.name] == path.read_bytes()
    assert b'load_run("hf:user/streets")' in hub["README.md"]
    with pytest.raises(StegoError, match="uploaded"):
        run.push_to_hub("streets/of/user")
    hub["LICENSE"] = b"by the user"
    run.push_to_hub("user/streets", license="mit")
    assert "thumbnail.webp" not in hub and b"thumbnail" not in hub["README.md"], "no file of the earlier upload is left"
    assert {"LICENSE", "config.json", "head.safetensors"} < set(hub)


def test_without_a_network_the_cache_is_read(run, image, monkeypatch, tmp_path):
    repository = tmp_path / "cache" / "models--user--streets"
    run.save_pretrained(repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    opened = Run.from_pretrained("user/streets", runs_dir=tmp_path / "runs")
    assert np.array_equal(opened.predict(image), run.predict(image))
    opened.name_segments({"a": "road"})  # kept, and not in the cache
    assert "road" in load_run("hf:user/streets", runs_dir=tmp_path / "runs").segments.names
    with pytest.raises(StegoError, match="download"):
        load_run("hf:user/fields", runs_dir=tmp_path / "runs")


def test_torch_hub_gives_a_module(run, tmp_path):
    run.save_pretrained(tmp_path / "shared")
    options = dict(run=str(tmp_path / "shared"), runs_dir=tmp_path / "runs", trust_repo=True)
    module = torch.hub.load(str(ROOT), "stego", source="local", **options)
    images = torch.randint(0, 256, (2, 3, 60, 90), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    labels = module(images)
    assert isinstance(module, torch.nn.Module) and module.names == run.segments.names
    assert np.array_equal(labels, run.predict(list(images))) and torch.equal(module(images / 255), labels)
    assert sum(value.numel() for value in module.parameters()) > 1e6
    with pytest.raises(StegoError, match="device"):
        torch.hub.load(str(ROOT), "stego", source="local", device="nowhere", **options)


@pytest.mark.parametrize(
    ("backbone", "allowed", "forbidden"),
    [
        ("scenes_vit_tiny8", "apache-2.0", None),
        ("photos_vit_tiny8_d6", None, "mit"),  # saw images for non-commercial research
        ("dino_vits8", "mit", None),
        ("vit_base_patch16_224.mae", "cc-by-nc-4.0", "mit"),
        ("vit_small_patch16_dinov3.lvd1689m", "dinov3-license", "apache-2.0"),
        ("vit_base_patch16_224.mae@weights.pth", None, "cc-by-nc-4.0"),
        ("weights.safetensors", None, "mit"),
    ],
)
def test_a_card_claims_no_license_that_the_backbone_does_not_allow(run, backbone, allowed, forbidden, tmp_path):
    run.experiment = run.experiment.but(backbone=backbone)
    run.save_pretrained(tmp_path / "none")
    assert "license" not in metadata((tmp_path / "none" / "README.md").read_text(encoding="utf-8"))
    if allowed:
        run.save_pretrained(tmp_path / "allowed", license=allowed)
        assert metadata((tmp_path / "allowed" / "README.md").read_text(encoding="utf-8"))["license"] == allowed
    if forbidden:
        with pytest.raises(StegoError, match="license"):
            run.save_pretrained(tmp_path / "forbidden", license=forbidden)
        assert not (tmp_path / "forbidden").exists()


def test_the_card_has_scores_over_seeds_and_says_what_labels_did(scenes_root, backbone_file, tmp_path):
    runs = [
        train(tiny_experiment(scenes_root, backbone_file, seed=seed), runs_dir=tmp_path / "runs") for seed in (0, 3)
    ]
    records = [evaluate(run) for run in runs]
    other = train(tiny_experiment(scenes_root, backbone_file, code_dim=9), runs_dir=tmp_path / "runs")
    evaluate(other)  # of another experiment: does not count
    old = {key: value for key, value in records[1].items() if key not in ("provenance", "data")}
    (tmp_path / "runs" / "old").mkdir()  # of another version: does not count
    (tmp_path / "runs" / "old" / "metrics.json").write_text(json.dumps(old), encoding="utf-8")
    runs[0].save_pretrained(tmp_path / "shared")
    card = (tmp_path / "shared" / "README.md").read_text(encoding="utf-8")
    rows = {row.split(" | ")[0].strip("| "): row.split(" | ")[1:] for row in re.findall(r"^\|.*$", card, re.MULTILINE)}
    assert "seeds 0, 3." in card and runs[0].backbone.weights_id in card
    for method in ("cluster", "linear", "kmeans_features", "linear_features"):
        own, second = (record["scores"][method]["miou"] for record in records)
        mean, deviation = (own + second) / 2, abs(own - second) / 2**0.5
        assert rows[method][1:3] == [f"{own:.1f}", f"{mean:.1f} ± {deviation:.1f}"]
        assert ("train" in rows[method][3]) == method.startswith("linear")
