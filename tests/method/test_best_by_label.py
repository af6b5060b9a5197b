"""The best step by validation labels, as the published code chooses its checkpoint: reported, never the result."""

import json

import numpy as np
import pytest
import torch
from common import tiny_experiment

from stego_book.studies import results
from stego_lib import evaluate, train
from stego_lib.utils.states import load_state

pytestmark = pytest.mark.usefixtures("few_samples")


@pytest.mark.parametrize("changes", [dict(probes="after"), dict(published=True, extra_clusters=6)], ids=str)
def test_kept_steps_score_as_runs_that_ended_there(scenes_root, backbone_file, tmp_path, changes):
    experiment = tiny_experiment(scenes_root, backbone_file, steps=7, **changes)
    run = train(experiment.but(official=dict(keep_every=2)), runs_dir=tmp_path)
    found = evaluate(run, baselines=False)["best_by_label"]
    ended = [train(experiment.but(steps=step, mirror=False), runs_dir=tmp_path) for step in (2, 4, 6)]
    expected = [evaluate(other, baselines=False)["scores"]["cluster"] for other in ended]
    assert found["steps"] == [2, 4, 6]
    np.testing.assert_allclose(found["miou_by_step"], [scores["miou"] for scores in expected], atol=0.05)
    best = int(np.argmax(found["miou_by_step"]))
    assert found["step"] == 2 * (best + 1) and found["miou"] == max(found["miou_by_step"])
    assert found["accuracy"] == pytest.approx(expected[best]["accuracy"], abs=0.02)
    for step, other in zip((2, 4, 6), ended, strict=True):
        kept = load_state(run.folder / "kept" / f"{step:07d}.safetensors")
        left = "probe" if experiment.probes == "after" else "cluster"  # what is fitted anew at the end
        head = {name: value for name, value in other.model.state_dict().items() if left not in name}
        assert all(torch.equal(kept[name], value) for name, value in head.items())


def test_scores_and_model_are_those_of_the_last_step(scenes_root, backbone_file, tmp_path):
    experiment = tiny_experiment(scenes_root, backbone_file, steps=5)
    plain = train(experiment, runs_dir=tmp_path)
    run = train(experiment.but(official=dict(keep_every=1)), runs_dir=tmp_path)
    assert all(torch.equal(value, run.model.state_dict()[name]) for name, value in plain.model.state_dict().items())
    assert not (plain.folder / "kept").exists(), "off by default"
    before, record = evaluate(plain, baselines=False), evaluate(run, baselines=False)
    assert record["scores"] == before["scores"] and record["matching"] == before["matching"]
    assert "best_by_label" not in before and len(record["best_by_label"]["steps"]) == 5
    assert all(torch.equal(value, run.model.state_dict()[name]) for name, value in plain.model.state_dict().items())
    stored = json.loads((run.folder / "metrics.json").read_text())
    assert stored["best_by_label"] == record["best_by_label"] and "best_by_label" not in stored["scores"]
    lines = results.markdown_table([stored]).splitlines()
    assert lines[-1].startswith("| not a result: ") and f"{record['best_by_label']['miou']:.1f}" in lines[-1]
    assert not any("not a result" in line for line in results.markdown_table([before]).splitlines())
