"""Checkpoints in the layout of the released ones: read without their packages, never run, as good as a run of our own."""

import os
import pickle
import shutil
import sys
import zipfile
from collections import OrderedDict, defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from common import SHARED, tiny_experiment
from released import OPTIONS, Call, tensors, write_ckpt
from torch._utils import _rebuild_tensor_v2
from torch.testing import assert_close

from stego_lib import Run, StegoError, baselines, crf, evaluate, load_run, open_dataset, probes, train
from stego_lib.model import Stego
from stego_lib.networks.checkpoint import read_published
from stego_lib.networks.dino import DinoViT
from stego_lib.networks.pickles import Placeholder, Unpickler, load_inert, plain
from stego_lib.predict import probe_scores
from stego_lib.run import copy_weights
from stego_lib.utils.notices import Notice


@pytest.fixture(autouse=True)
def without_their_packages(monkeypatch):
    """Importing Lightning or OmegaConf fails in every test here."""
    for name in ("omegaconf", "pytorch_lightning", "lightning"):
        monkeypatch.setitem(sys.modules, name, None)


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory) -> Path:
    return write_ckpt(tmp_path_factory.mktemp("published") / "tiny.ckpt", tensors())


# ---------------------------------------------------------------------------------------------- the golden checkpoint


@pytest.fixture(scope="module")
def golden_run() -> tuple[Run, dict[str, np.ndarray]]:
    path = SHARED / "golden" / "published_format.ckpt"
    if not path.is_file():
        pytest.skip("shared/golden/published_format.ckpt is not beside the project")
    with np.load(path.with_name("published_checkpoint.npz")) as file:
        return load_run(path, device="cpu"), dict(file)


@pytest.fixture(scope="module")
def golden_maps(golden_run):
    run, expected = golden_run
    with torch.inference_mode():
        code = run.code(torch.from_numpy(expected["images_rgb_uint8"]).movedim(-1, 1))
        scores = probe_scores(run.model, code)
        return code, {name: found.logits((320, 320)).log_softmax(1) for name, found in scores.items()}


def test_golden_codes(golden_run, golden_maps):
    assert_close(golden_maps[0], torch.from_numpy(golden_run[1]["code"]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["cluster", "linear"])
def test_golden_classes_and_their_probabilities(golden_run, golden_maps, name):
    found, expected = golden_maps[1][name], golden_run[1]
    assert (found.argmax(1).numpy() == expected[f"{name}_argmax"]).mean() >= 0.999
    logprobs = torch.from_numpy(expected[f"{name}_logprobs_8th"])
    assert_close(found[:, :, ::8, ::8], logprobs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["cluster", "linear"])
def test_golden_classes_after_the_crf(golden_run, golden_maps, name):
    expected = golden_run[1]
    found = crf.dense_crf(expected["images_rgb_uint8"][0], golden_maps[1][name][0]).argmax(0)
    assert (found.numpy() == expected[f"{name}_crf_argmax_image0"]).mean() >= 0.995


def test_golden_predictions_are_the_clusters(golden_run):
    run, expected = golden_run
    for image, clusters in zip(expected["images_rgb_uint8"], expected["cluster_argmax"], strict=True):
        assert (run.predict(image) == clusters).mean() >= 0.999


# ---------------------------------------------------------------------------------------------- one of our own making


def test_the_architecture_comes_from_the_tensors_and_the_recipe_from_the_options(ckpt):
    found = read_published(ckpt)
    vit, experiment = found.vit, found.experiment
    assert (vit.embed_dim, len(vit.blocks), vit.blocks[0].attn.num_heads, vit.patch_embed.patch_size) == (
        48,
        2,
        6,
        (8, 8),
    )
    expected = dict(
        dataset="cityscapes", backbone=str(ckpt), code_dim=6, crop="five", steps=7000, batch_size=32, points=9, negatives=4, centering=False,
        stabilize=True, zero_clamp=True, weights=(1.0, 0.5, 0.9), shifts=(0.4, 0.2, 0.3), lr_head=1e-3, dropout=0.1, extra_clusters=0,
        head="nonlinear", features="feat", precision="float32", published=False,
    )  # fmt: skip
    assert {key: getattr(experiment, key) for key in expected} == expected
    assert found.step == 7000 and found.classes.names[:2] == ("class 0", "class 1") and len(found.classes) == 8


@torch.inference_mode()
def test_its_codes_and_classes_are_those_of_its_tensors(ckpt):
    """Once more by hand, layer by layer."""
    run, weights = load_run(ckpt, mirror=False, device="cpu"), tensors()
    image = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    vit = DinoViT(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=6, num_classes=0, dynamic_img_size=True)
    vit.load_state_dict(
        {key.removeprefix("net.model."): value for key, value in weights.items() if key.startswith("net.model.")}
    )
    tokens = vit.eval().forward_features(run.backbone.normalize(image))[:, 1:].transpose(1, 2).unflatten(2, (4, 4))
    hidden = F.conv2d(tokens, weights["net.cluster2.0.weight"], weights["net.cluster2.0.bias"]).relu()
    code = F.conv2d(tokens, weights["net.cluster1.0.weight"], weights["net.cluster1.0.bias"])
    code += F.conv2d(hidden, weights["net.cluster2.2.weight"], weights["net.cluster2.2.bias"])
    assert_close(run.code(image), code, rtol=1e-4, atol=1e-4)
    assert_close(
        run.model.linear_probe(code), F.conv2d(code, weights["linear_probe.weight"], weights["linear_probe.bias"])
    )
    assert torch.equal(run.model.cluster_probe.clusters, weights["cluster_probe.clusters"]), "not the unused ones"


def test_names_of_a_known_data_set_are_used_where_their_number_fits(tmp_path):
    found = read_published(write_ckpt(tmp_path / "c.ckpt", tensors(27, extra=3)))
    assert (
        found.classes.names[0] == "road" and len(found.classes) == 27 and found.experiment.official.extra_clusters == 3
    )


@pytest.mark.parametrize(
    "theirs, ours, names",
    [
        ("cocostuff27", "cocostuff27", {1: "appliance (things)", 26: "water (stuff)"}),
        ("cocostuff3", "cocostuff3", {0: "sky (stuff)", 2: "ground (stuff)"}),
        ("potsdam", "potsdam3", {0: "road and car", 2: "vegetation and tree"}),
    ],
)
def test_published_names_of_data_sets_are_translated(tmp_path, theirs, ours, names):
    options, count = OPTIONS | {"dataset_name": theirs}, max(names) + 1
    found = read_published(write_ckpt(tmp_path / "c.ckpt", tensors(count), options=options))
    assert found.experiment.dataset == ours and len(found.classes) == count
    assert {i: found.classes.names[i] for i in names} == names


def test_a_linear_head_and_options_that_cannot_be_read(tmp_path):
    state = {key: value for key, value in tensors().items() if not key.startswith("net.cluster2")}
    with pytest.raises(StegoError, match=r"48 channels wide.*attention heads"):  # nothing says how many there are
        read_published(write_ckpt(tmp_path / "a.ckpt", state, hyper_parameters=None))
    found = read_published(
        write_ckpt(tmp_path / "b.ckpt", state, options={"model_type": "vit_small", "dataset_name": "own"})
    )
    assert (
        found.experiment.head == "linear" and found.experiment.dataset == "scenes" and found.experiment.dropout == 0.1
    )


def test_plain_values_of_placeholders(ckpt):
    stored = load_inert(ckpt)
    assert isinstance(stored["hyper_parameters"]["cfg"], Placeholder)
    assert plain(stored["hyper_parameters"]) == {"n_classes": 8, "cfg": OPTIONS}
    assert plain(Placeholder()) is None and plain(torch.zeros(1)) is None
    assert next(iter(stored["callbacks"].values()))["best_model_score"] == 21


class Options(dict):
    """A class of a stranger that is a dictionary."""


class Items(list):
    """A class of a stranger that is a list."""


@pytest.mark.parametrize("values", [{"a": 1}, {"a": 1, "b": [2.5, "c"], "d": {"e": None}}], ids=str)
def test_dictionaries_and_lists_of_foreign_classes_keep_what_they_hold(tmp_path, values):
    """Pickle puts a single item into them by another way than several."""
    torch.save({"options": Options(values), "items": Items(values)}, tmp_path / "foreign.ckpt")
    stored = load_inert(tmp_path / "foreign.ckpt")
    assert type(stored["options"]).__mro__[1] is Placeholder and not isinstance(stored["options"], dict)
    assert plain(stored["options"]) == values
    assert stored["items"].items == dict(enumerate(values)) and not isinstance(stored["items"], list)


@pytest.mark.parametrize("protocol", [2, 4])
def test_calls_of_plain_containers_are_made(tmp_path, protocol):
    """The names that Python 2 and 3 have for them, the items that they are called with or that come later."""
    stored = {
        "called": Call(dict, [("a", 1)]), "list": Call(list, "xy"), "ordered": OrderedDict(b=2, a=[1]),
        "default": defaultdict(list, {"größe": [3]}), "parameter": torch.nn.Parameter(torch.ones(2)),
    }  # fmt: skip
    torch.save(stored, tmp_path / "a.ckpt", pickle_protocol=protocol)
    found = load_inert(tmp_path / "a.ckpt")
    assert torch.equal(found.pop("parameter"), torch.ones(2))
    assert found == {"called": {"a": 1}, "list": ["x", "y"], "ordered": {"b": 2, "a": [1]}, "default": {"größe": [3]}}


def test_plain_values_of_plain_values():
    nested = {
        "a": (1, [2.5, ("b",)]),
        7: True,
        (1, 2): "dropped",
        "none": None,
        "tensor": torch.ones(1),
        "class": Placeholder,
    }
    assert plain(nested) == {"a": [1, [2.5, ["b"]]], 7: True, "none": None, "tensor": None, "class": None}


TYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)  # fmt: skip


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_tensors_of_every_type_come_out_as_they_went_in(tmp_path, dtype):
    """Whole, turned, parts of others, and single numbers."""
    values = torch.tensor([[0, 1, 2, 0], [3, 100, 0, 127]]).to(dtype)
    stored = {"whole": values, "turned": values.T, "part": values[1:, 1::2], "one": values[1, 3], "last": values[:, -1]}
    torch.save(stored, tmp_path / "a.ckpt")
    found = load_inert(tmp_path / "a.ckpt")
    for name, value in stored.items():
        assert found[name].dtype == dtype and found[name].shape == value.shape and torch.equal(found[name], value), name


@pytest.mark.parametrize(
    "change, message",
    [
        ({"net.novelty.weight": torch.zeros(1)}, "net.novelty.weight is unknown"),
        ({"extra": torch.zeros(1)}, "extra is unknown"),
        ({"net.model.blocks.0.ls1.gamma": torch.zeros(48)}, "blocks.0.ls1.gamma is unknown"),
        ({"linear_probe.bias": None}, "linear_probe.bias is missing"),
        ({"net.cluster2.2.bias": None}, "net.cluster2.2.bias is missing"),
        ({"net.model.norm.bias": None}, "norm.bias is missing"),
        ({"decoder.bias": 3}, "decoder.bias is no tensor"),
    ],
    ids=str,
)
def test_every_tensor_is_accounted_for(tmp_path, change, message):
    state = {key: value for key, value in (tensors() | change).items() if value is not None}
    with pytest.raises(StegoError, match=rf"odd\.ckpt .*{message}"):
        load_run(write_ckpt(tmp_path / "odd.ckpt", state))


def test_unused_tensors_may_be_absent(tmp_path):
    state = {key: value for key, value in tensors().items() if not key.startswith(("decoder", "train_cluster"))}
    assert load_run(write_ckpt(tmp_path / "lean.ckpt", state)).step == 7000


@pytest.mark.parametrize("content", [b"", b"text", None, "half", "list", "empty"])
def test_what_is_no_such_checkpoint_is_named(ckpt, tmp_path, content):
    path = tmp_path / "broken.ckpt"
    if content == "half":
        path.write_bytes(ckpt.read_bytes()[: ckpt.stat().st_size // 2])
    elif isinstance(content, str):
        torch.save([1] if content == "list" else {"epoch": 1}, path)
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(StegoError, match=r"broken\.ckpt"):
        load_run(path)


# ---------------------------------------------------------------------------------------------- attacks


class Callable(Call):
    """The same, where what comes out is called again."""

    def __call__(self) -> None:
        """Pickle asks for it."""


def test_code_in_the_pickle_is_never_run(tmp_path):
    marker = tmp_path / "was here"
    attacks = {
        "system": Call(os.system, f"touch '{marker}'"), "exec": Call(exec, f"open({str(marker)!r}, 'w')"),
        "open": Call(open, str(marker), "w"), "eval": Call(eval, f"__import__('pathlib').Path({str(marker)!r}).touch()"),
        "nested": Call(getattr, Call(__import__, "os"), "system"), "as key": {Call(os.system, f"touch '{marker}'"): 1},
        "called again": Call(Callable(getattr, Call(__import__, "os"), "system"), f"touch '{marker}'"),
    }  # fmt: skip
    path = write_ckpt(tmp_path / "evil.ckpt", tensors(), **attacks)
    run = load_run(path, device="cpu")
    assert not marker.exists() and run.step == 7000
    stored = load_inert(path)
    assert all(isinstance(stored[name], Placeholder) for name in attacks if name != "as key")
    for name in ("system", "called again"):
        pickle.loads(pickle.dumps(attacks[name]))
        assert marker.exists(), "the attack works where nobody prevents it"
        marker.unlink()


def test_other_kinds_of_files_run_no_code_either(tmp_path):
    """PyTorch's old format, a bare pickle, and a TorchScript program, which torch.load would hand on: all are refused."""
    marker = tmp_path / "was here"
    evil = {"state_dict": tensors(), "evil": Call(os.system, f"touch '{marker}'")}
    torch.save(evil, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    with pytest.raises(StegoError, match=r"old\.ckpt cannot be read.*saved again"):
        load_inert(tmp_path / "old.ckpt")
    (tmp_path / "bare.ckpt").write_bytes(pickle.dumps(Call(os.system, f"touch '{marker}'")))
    with pytest.raises(StegoError, match=r"bare\.ckpt cannot be read"):
        load_run(tmp_path / "bare.ckpt")
    with zipfile.ZipFile(tmp_path / "script.ckpt", "w") as file:
        for name in ("data.pkl", "constants.pkl", "version"):
            file.writestr(f"script/{name}", b"")
    with pytest.raises(StegoError, match=r"script\.ckpt cannot be read.*TorchScript program"):
        load_run(tmp_path / "script.ckpt")
    assert not marker.exists()


def test_code_among_the_options_or_tensors_is_never_run(tmp_path):
    marker = tmp_path / "was here"
    evil = Call(os.system, f"touch '{marker}'")
    run = load_run(
        write_ckpt(tmp_path / "options.ckpt", tensors(), options=OPTIONS | {"batch_size": evil}), device="cpu"
    )
    assert run.experiment.batch_size == 16, "a value that cannot be read leaves the default"
    with pytest.raises(StegoError, match=r"net\.model\.norm\.bias is no tensor"):
        load_run(write_ckpt(tmp_path / "tensors.ckpt", tensors() | {"net.model.norm.bias": evil}))
    assert not marker.exists()


def test_the_functions_that_put_tensors_together_cannot_be_changed(tmp_path):
    """A pickle may name a function and then set its attributes; this one does."""
    code = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(N}X\x07\x00\x00\x00stainedI1\nst\x62."
    (tmp_path / "state.pkl").write_bytes(code)
    before = dict(vars(_rebuild_tensor_v2))
    with open(tmp_path / "state.pkl", "rb") as file, pytest.raises((pickle.UnpicklingError, AttributeError)):
        Unpickler(file).load()
    assert vars(_rebuild_tensor_v2) == before and not hasattr(_rebuild_tensor_v2, "stained")
    with open(tmp_path / "state.pkl", "rb") as file:
        pickle.load(file)
    assert _rebuild_tensor_v2.stained == 1, "a plain unpickler lets it through"
    del _rebuild_tensor_v2.stained


# ---------------------------------------------------------------------------------------------- like a run of our own


def few_samples(monkeypatch) -> None:
    monkeypatch.setattr(baselines, "SAMPLES", 500)
    monkeypatch.setattr(probes, "RESTARTS", 1)


@pytest.fixture
def on_scenes(scenes_root) -> dict[str, Any]:
    return dict(dataset="scenes", data_root=str(scenes_root), eval_size=64, device="cpu", crf=False)


def test_it_evaluates_and_then_predicts_classes(ckpt, on_scenes, tmp_path, monkeypatch):
    few_samples(monkeypatch)
    run = load_run(ckpt, runs_dir=tmp_path, **on_scenes)
    run.experiment = run.experiment.but(crop="none", train_size=64)  # the baselines look at training images
    image = open_dataset("scenes", on_scenes["data_root"], "val").image(0)
    clusters = run.predict(image)
    record = evaluate(run)
    assert record["step"] == 7000 and set(record["scores"]) >= {"cluster", "linear", "kmeans_features"}
    assert record["experiment"]["backbone"] == "tiny.ckpt" and str(tmp_path) not in str(record)
    again = load_run(ckpt, runs_dir=tmp_path, **on_scenes)
    np.testing.assert_array_equal(again.predict(image), np.array(record["matching"])[clusters])
    with pytest.raises(StegoError, match=r"no metrics\.json"):
        _ = load_run(ckpt, runs_dir=tmp_path, **on_scenes | {"eval_size": 32}).metrics
    assert sorted(path.name for path in ckpt.parent.iterdir()) == ["tiny.ckpt"], "nothing is left beside the checkpoint"


def test_without_baselines_no_training_image_is_needed(ckpt, on_scenes, tmp_path):
    shutil.copytree(Path(on_scenes["data_root"]) / "scenes", tmp_path / "data" / "scenes")
    shutil.rmtree(tmp_path / "data" / "scenes" / "imgs" / "train")
    run = load_run(ckpt, runs_dir=tmp_path / "runs", **on_scenes | {"data_root": str(tmp_path / "data")})
    assert set(evaluate(run, baselines=False)["scores"]) == {"cluster", "linear"}
    with pytest.raises(StegoError):
        evaluate(run)


def test_a_data_set_of_other_classes_is_refused(on_scenes, tmp_path):
    run = load_run(write_ckpt(tmp_path / "c.ckpt", tensors(27)), runs_dir=tmp_path, **on_scenes)
    with pytest.raises(StegoError, match="scenes has 8 classes, this run was trained for 27"):
        evaluate(run)


def test_what_is_evaluated_lies_by_weights_and_way_of_evaluating(ckpt, on_scenes, tmp_path):
    """No record of other weights, or of another way, is ever taken for it; where data and checkpoint lie does not matter."""
    other = write_ckpt(tmp_path / "tiny.ckpt", tensors(seed=1))
    (tmp_path / "moved").mkdir()
    moved = shutil.copy(ckpt, tmp_path / "moved" / "tiny.ckpt")
    folders = [
        load_run(path, runs_dir=tmp_path, **on_scenes | changes).folder
        for path, changes in [(ckpt, {}), (other, {}), (ckpt, {"mirror": False}), (ckpt, {"dataset": "folder"})]
    ]
    assert len(set(folders)) == 4 and all(folder.parent == tmp_path for folder in folders)
    assert load_run(moved, runs_dir=tmp_path, **on_scenes | {"data_root": str(tmp_path)}).folder == folders[0]
    assert load_run(ckpt).shifts == (0.4, 0.2, 0.3), "of self, neighbors and random images"


def test_what_was_trained_cannot_be_changed_while_reading(ckpt):
    with pytest.raises(StegoError, match="cannot change code_dim, backbone"):
        load_run(ckpt, code_dim=3, backbone="dino_vits8")


def fine_tuning(scenes_root, backbone, **changes) -> Any:
    values = dict(code_dim=6, steps=1, start_from=str(backbone), lr_head=1e-9, lr_probes=1e-9)
    return tiny_experiment(scenes_root, backbone, **values | changes)


def test_training_goes_on_from_it(ckpt, scenes_root, tmp_path):
    """With hardly any learning rate the weights after a step are those of the checkpoint."""
    run, source = train(fine_tuning(scenes_root, ckpt), runs_dir=tmp_path), load_run(ckpt)
    for name, value in source.model.state_dict().items():
        assert_close(run.model.state_dict()[name], value, rtol=0, atol=1e-7)
    moved = train(fine_tuning(scenes_root, ckpt, lr_head=1e-3, steps=3), runs_dir=tmp_path)
    assert not torch.allclose(moved.model.head.linear.weight, source.model.head.linear.weight, atol=1e-4)
    again = train(fine_tuning(scenes_root, ckpt, start_from=str(run.folder)), runs_dir=tmp_path)
    assert_close(again.model.state_dict()["head.linear.weight"], source.model.head.linear.weight, rtol=0, atol=1e-7)
    assert load_run(moved.folder).experiment.start_from == str(ckpt)
    centered = train(fine_tuning(scenes_root, ckpt, subtract_mean=True), runs_dir=tmp_path)
    assert not centered.model.feature_mean.any(), "the mean that it was trained with goes with the head"


def test_probes_for_other_classes_begin_anew_and_a_head_that_does_not_fit_is_refused(scenes_root, tmp_path):
    path = write_ckpt(tmp_path / "c.ckpt", tensors(27))
    with pytest.warns(Notice, match="cluster_probe.clusters, linear_probe.*begin anew"):
        run = train(fine_tuning(scenes_root, path), runs_dir=tmp_path)
    assert run.model.cluster_probe.clusters.shape == (8, 6)
    assert_close(run.model.head.linear.weight, tensors(27)["net.cluster1.0.weight"], rtol=0, atol=1e-7)
    for change in (dict(code_dim=7), dict(head="linear")):
        with pytest.raises(StegoError, match="its head is of another kind or size"):
            train(fine_tuning(scenes_root, path, **change), runs_dir=tmp_path)


def test_a_head_on_features_of_another_width_is_refused_even_if_it_is_none():
    source, model = (SimpleNamespace(model=Stego(width, width, 3, head="none")) for width in (7, 5))
    with pytest.raises(StegoError, match="its head is of another kind or size"):
        copy_weights(source, model.model)


def test_a_file_that_holds_no_dictionary_is_named(tmp_path):
    torch.save([torch.zeros(2)], tmp_path / "list.ckpt")
    with pytest.raises(StegoError, match=r"list\.ckpt is not a checkpoint: it holds no dictionary"):
        load_inert(tmp_path / "list.ckpt")
