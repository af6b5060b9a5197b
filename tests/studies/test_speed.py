"""The goals' table and the cost model, from results made up here."""

import json

import pytest
from records import speed_rows

from stego_book.studies import speed
from stego_lib import StegoError


@pytest.fixture
def rows() -> dict:
    return speed_rows()


def test_goals_are_compared_with_what_was_measured_and_with_what_can_be(rows):
    table = speed.goals(rows)
    found = {work: tuple(line) for work, line in table.iterrows()}
    assert found["training step from the store, batch 16"] == ("25 x", "40.0 x", "", "yes")
    # 32 images of 0.5 s at least: 16 s, more than the baseline's 10
    assert found["training step online, bfloat16, batch 16"] == ("4 x", "not measured", "0.62 x", "impossible here")
    assert found["training step online, float32, batch 16"] == ("", "2.00 x", "3.12 x", "")
    assert found["extraction, float32"] == ("1.7 x", "2.00 x", "3.00 x", "yes")
    assert found["extraction, bfloat16"] == ("6 x", "0.50 x", "0.60 x", "impossible here")
    # two passes of 0.2 s at least, and half of a second of CRF
    assert found["evaluation, no CRF, smooth"] == ("5 x", "4.00 x", "5.00 x", "no")
    assert found["evaluation, with CRF, smooth"] == ("4 x", "3.00 x", "3.33 x", "impossible here")
    assert found["Cityscapes-sized recipe, ViT-S/8 (extrapolated)"][1:] == ("120", "not below 25 min", "no"), (
        "14,875 x 0.1 s"
    )
    assert found["Cityscapes-sized recipe, ViT-B/8, one GPU"][1:] == ("not measured", "", "")
    assert found["peak memory of training, store of 10.0 GB"][1:] == ("2.50", "", "yes")


def test_a_recipe_whose_features_alone_take_an_hour_is_impossible(rows):
    for least in rows["limits"]["least_s_per_image"].values():
        least[speed.NETWORK] += 0.15
    line = speed.goals(rows).loc["Cityscapes-sized recipe, ViT-S/8 (extrapolated)"]
    assert tuple(line)[1:] == ("120", "not below 62 min", "impossible here")


def test_what_was_not_measured_is_said(rows):
    table = speed.goals({"rest": rows["rest"]})
    assert (table["measured"] == "not measured").sum() == len(table) - 1
    assert table.loc["head, loss and probes, batch 4", "reached"] == "yes"
    without = speed.goals({name: row for name, row in rows.items() if name != "limits"})
    line = without.loc["evaluation, no CRF, smooth"]
    assert tuple(line) == ("5 x", "4.00 x", "", "no"), "what can be is not known then"


def test_costs_add_up(rows):
    model = speed.costs(rows)
    assert model.store(1000) == pytest.approx(1000 * 0.15 + 2 + speed.STEPS * 0.5)
    assert model.store(1000, 5) == pytest.approx(1000 * 0.03 + 2 + speed.STEPS * 0.5)
    assert model.online(1000) == pytest.approx(model.store(1000) + speed.STEPS * 64 * 0.15)
    assert model.published(1000) == pytest.approx(300 + 2 + speed.STEPS * (64 * 0.3 + 32 * 0.05))
    assert model.shared_from() == pytest.approx(speed.STEPS * 0.5 / 0.15)
    assert model.neighbors(10_000_000) == pytest.approx(1e14 * 2e-6), "all pairs where nothing else was measured"
    rows["neighbors"]["approximate"] = {"images": 1_000_000, "seconds": 200.0}
    assert speed.costs(rows).neighbors(4_000_000) == pytest.approx(8 * 200) and speed.costs(rows).neighbors(
        1000
    ) == pytest.approx(2)
    table = speed.plan(model, {"some": 1000, "many": 10_000_000})
    assert list(table.index) == ["some, 1,000 images", "many, 10,000,000 images"] and list(table["store takes"]) == [
        "804.4 MB",
        "8.0 TB",
    ]
    by_hand = 128 * 784 + 4 * 128 + 4 * 384  # codes, units, mean feature
    assert model.compact_bytes == by_hand and table["compact store takes at most"].iloc[0] == f"{by_hand / 1000:.1f} MB"
    with pytest.raises(StegoError, match="rows rest, recipe"):
        speed.costs({name: rows[name] for name in ("extraction", "neighbors")})


def test_goals_of_later_rows_are_met_or_missed_or_not_measured(tmp_path):
    assert set(speed.later_goals(tmp_path)["measured"]) == {"not measured"}

    def write(name: str, date: str, row: dict, of: str) -> None:
        result = {"machine": {"date": date, "gpu": None}, "settings": {"tiny": False}, "rows": {of: row}}
        (tmp_path / f"{name}.json").write_text(json.dumps(result))

    def ways(**seconds: float) -> dict:
        return {"ways": {name.replace("_", " "): {"median_s": value} for name, value in seconds.items()}}

    small = {"bytes": {"full": 800, "compact": 100}, "error": {"fitted": 0.004, "measured": 0.02}}
    write("a", "2026-01-02", small | ways(full_store=0.2, compact_store=0.1), "compact")
    write("b", "2026-01-03", {"same_labels": 0.9995} | ways(pydensecrf=1.0, lattice=3.5), "crf_engines")
    write("c", "2026-01-01", {"same_labels": 0.1} | ways(pydensecrf=1.0, lattice=1.0), "crf_engines")
    table = speed.later_goals(tmp_path)
    assert table["measured"].tolist()[:3] == ["1/8.0", "0.0200", "2.00 x"], "of the newest results"
    assert table["measured"].tolist()[-2:] == ["99.95 %", "3.50 x"] and set(table["measured"].iloc[3:-2]) == {
        "not measured"
    }
    assert table["reached"].tolist() == ["yes", "no", "yes", "", "", "", "", "", "yes", "no"]
    kinds = {
        "smooth": {"ways": {"ours, no CRF": {"median_s": 2.0}, "ours, backbone alone": {"median_s": 1.5}}, "busy": 0.95}
    }
    write("d", "2026-01-04", {"kinds": kinds}, "evaluation")
    steps = {"ours, channels first, float32": 3.0, "ours": 2.5, "ours, bfloat16": 1.5}
    write("e", "2026-01-04", ways(**steps), "rest")
    write("f", "2026-01-04", {"total_s": 9060}, "recipe")
    approximate = {
        "images": 1_000_000,
        "seconds": 300.0,
        "recall": 0.97,
        "exact_hours": 3.0,
        "extrapolated": {"images": 10_000_000, "bytes": 4e9},
    }
    exact = {"images": 600_000, "hours": 1.25, "bytes": 1e9}
    write("g", "2026-01-04", {"extrapolated": exact, "approximate": approximate}, "neighbors")
    write("h", "2026-01-04", {"large": {"images": 10_000_000, "store_bytes": 8e12, "peak_bytes": 2e9}}, "memory")
    found = {work: tuple(line) for work, line in speed.later_goals(tmp_path).iterrows()}
    assert found["backbone's share of evaluation, smooth"] == (">= 80 %", "75 %", "no")
    assert found["busy cores, evaluation with CRF, smooth"] == (">= 90 %", "95 %", "yes")
    assert found["head, loss and optimizer, probes joint"] == (">= 1.5 x before", "2.00 x", "yes")
    assert found["Cityscapes-sized recipe, two cores, extrapolated"] == ("< 150 min", "151 min", "no")
    assert found["600,000 images, exact neighbors, extrapolated"] == ("< 8 GB", "1.0 GB, 1.2 h", "yes")
    assert found["1,000,000 images, approximate neighbors"] == ("< 60 min (all pairs: 3.0 h)", "5.0 min", "yes")
    assert found["10,000,000 images, approximate, extrapolated"] == ("< 3 GB", "4.00 GB", "no")
    assert found["10,000,000 images, store opened and trained from"] == ("< 3 GB", "2.00 GB", "yes")
    assert all(len(work) <= 50 for work in found), "tables cut longer ones off"


def test_the_newest_whole_result_counts_and_trials_do_not(tmp_path):
    def write(name: str, date: str, rows: list[str], tiny: bool = False, gpu: str | None = None) -> None:
        result = {
            "machine": {"date": date, "gpu": gpu},
            "settings": {"tiny": tiny},
            "rows": {row: {"of": name} for row in rows},
        }
        (tmp_path / f"{name}.json").write_text(json.dumps(result))

    with pytest.raises(StegoError, match="make bench"):
        speed.newest_results(tmp_path)
    write("old", "2026-01-01", ["a", "b"])
    write("new", "2026-01-02", ["a", "b"])
    write("part", "2026-01-03", ["a"])
    write("trial", "2026-01-04", ["a", "b", "full_recipe"], tiny=True, gpu="G")
    assert speed.newest_results(tmp_path)[0].name == "new.json" and speed.on_a_gpu(tmp_path) == {}
    write("gpu", "2026-01-01", ["full_recipe"], gpu="G")
    assert speed.on_a_gpu(tmp_path) == {"full_recipe": {"of": "gpu", "gpu": "G"}}


def test_exports_are_read_from_the_newest_result_that_measured_them(tmp_path):
    def write(name: str, date: str, rows: dict, tiny: bool = False) -> None:
        result = {"machine": {"date": date, "gpu": None}, "settings": {"tiny": tiny}, "rows": rows}
        (tmp_path / f"{name}.json").write_text(json.dumps(result))

    def row(seconds: float) -> dict:
        times = {"predict": 1.0, "onnxruntime, float32": seconds, "onnxruntime, int8": 0.25}
        files = {"float32": {"bytes": 8_000_000, "agreement": 1.0}, "int8": {"bytes": 2_500_000, "agreement": 0.9973}}
        kind = {"ways": {way: {"median_s": taken} for way, taken in times.items()}, "files": files, "image": [96, 128]}
        return {"exports": {"kinds": {"scenes": kind}}}

    with pytest.raises(StegoError, match="make bench ARGS=exports"):
        speed.exports(tmp_path)
    write("old", "2026-01-01", row(0.9))
    write("new", "2026-01-02", row(0.5))
    write("whole", "2026-01-03", {"step": {}, "limits": {}})
    write("trial", "2026-01-04", row(0.1), tiny=True)
    table, machine = speed.exports(tmp_path)
    assert machine["date"] == "2026-01-02" and len(table) == 3
    assert table.loc[("scenes, 96 x 128", "float32")].tolist() == [8.0, 100.0, 0.5]
    assert table.loc[("scenes, 96 x 128", "int8")].tolist() == pytest.approx([2.5, 99.73, 0.25])
    assert table.loc[("scenes, 96 x 128", "Run.predict"), "seconds per image"] == 1.0
