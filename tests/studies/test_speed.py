"""The goals' table and the cost model, from results made up here."""

import json

import pytest
from records import speed_rows, ways

from stego_book.studies import speed
from stego_lib import StegoError


def test_goals_are_compared_with_what_was_measured():
    table = speed.goals(speed_rows())
    lines = {work: tuple(line) for work, line in table.iterrows()}
    assert lines["training step from the store, batch 16"] == ("25 x", "40.00 x", "yes")
    assert lines["training step online, bfloat16, batch 16"] == ("4 x", "not measured", "")
    assert lines["extraction, bfloat16"] == ("6 x", "0.50 x", "no")
    assert lines["evaluation, with CRF, smooth"] == ("4 x", "3.00 x", "no")
    assert lines["Cityscapes-sized recipe, ViT-S/8, extrapolated"] == ("< 60 min", "120.0 min", "no")
    assert lines["Cityscapes-sized recipe, ViT-B/8, one GPU"] == ("< 3 min", "not measured", "")
    assert lines["peak memory of training, store of 10 GB"] == ("< 3 GB", "2.50 GB", "yes")
    compact = {"bytes": {"full": 800, "compact": 100}, "error": {"measured": 0.02}}
    compact |= ways(full_store=0.2, compact_store=0.1)
    assert speed.goals({"compact": compact}).iloc[-3:]["measured"].tolist() == ["1/8.0", "0.0200", "2.00 x"]
    assert speed.goals({"compact": compact}).iloc[-3:]["reached"].tolist() == ["yes", "no", "yes"]
    assert set(speed.goals({})["measured"]) == {"not measured"}


def test_costs_add_up():
    rows = speed_rows()
    model = speed.costs(rows)
    assert model.store(1000) == pytest.approx(1000 * 0.15 + 2 + speed.STEPS * 0.5)
    assert model.store(1000, 5) == pytest.approx(1000 * 0.03 + 2 + speed.STEPS * 0.5)
    assert model.online(1000) == pytest.approx(model.store(1000) + speed.STEPS * 64 * 0.15)
    assert model.published(1000) == pytest.approx(300 + 2 + speed.STEPS * (64 * 0.3 + 32 * 0.05))
    assert model.shared_from() == pytest.approx(speed.STEPS * 0.5 / 0.15)
    table = speed.plan(model, {"some": 1000, "many": 10_000_000})
    assert list(table["store takes"]) == ["804.4 MB", "8.0 TB"]
    assert model.compact_bytes == 128 * 784 + 4 * 128 + 4 * 384  # codes, units, mean feature
    with pytest.raises(StegoError, match="rest recipe"):
        speed.costs({name: rows[name] for name in ("extraction", "neighbors")})


def test_the_newest_whole_result_and_the_newest_rows_count_and_trials_do_not(tmp_path):
    def write(name: str, date: str, rows: list[str], tiny: bool = False) -> None:
        result = {"machine": {"date": date}, "settings": {"tiny": tiny}, "rows": {row: {"of": name} for row in rows}}
        (tmp_path / f"{name}.json").write_text(json.dumps(result))

    with pytest.raises(StegoError, match="make bench"):
        speed.newest_results(tmp_path)
    write("old", "2026-01-01", ["a", "b"])
    write("new", "2026-01-02", ["a", "b"])
    write("part", "2026-01-03", ["a"])
    write("trial", "2026-01-04", ["a", "b", "full_recipe"], tiny=True)
    assert speed.newest_results(tmp_path)[0].name == "new.json"
    rows = speed.newest_rows(tmp_path)
    assert {name: row["of"] for name, row in rows.items()} == {"a": "part", "b": "new"}
    assert rows["a"]["machine"]["date"] == "2026-01-03"


def test_exports_have_a_line_for_each_file():
    kind = ways(predict=1.0) | {"image": [96, 128]}
    kind["ways"] |= {"onnxruntime, float32": {"median_s": 0.5}, "onnxruntime, int8": {"median_s": 0.25}}
    kind["files"] = {"float32": {"bytes": 8e6, "agreement": 1.0}, "int8": {"bytes": 2.5e6, "agreement": 0.9973}}
    table = speed.exports({"kinds": {"scenes": kind}})
    assert table.loc[("scenes, 96 x 128", "float32")].tolist() == [8.0, 100.0, 0.5]
    assert table.loc[("scenes, 96 x 128", "int8")].tolist() == pytest.approx([2.5, 99.73, 0.25])
    assert table.loc[("scenes, 96 x 128", "Run.predict"), "seconds per image"] == 1.0
