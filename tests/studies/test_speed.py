"""The goals' table and the cost model, from results made up here."""

import json

import pytest
from records import speed_rows

from stego_book.studies import speed
from stego_lib import StegoError


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
