"""The path of an atlas on disk (`make atlas`), on a few cells."""
import json

import atlas  # tools/atlas.py
import pytest


@pytest.fixture
def log(tmp_path, monkeypatch):
    monkeypatch.setattr(atlas, "LOG", tmp_path / "atlas.jsonl")
    monkeypatch.setattr(atlas, "N_GENES", 300)
    return atlas.LOG


def test_a_step_is_a_line_and_the_last_one_counts(log):
    atlas.note("fit", 2000, 5.04, 4.0, 1.0, epochs=1)
    atlas.note("fit", 1000, 2.0, 1.0, 1.0)
    atlas.note("fit", 2000, 7.0, 6.0, 1.0, epochs=5)
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert [(row["cells"], row["seconds"], row.get("epochs")) for row in rows] == [(1000, 2.0, None), (2000, 7.0, 5)]


def test_the_steps_of_a_few_cells(log, tmp_path, capsys):
    file = tmp_path / "200.h5ad"
    for step in ("simulate", "train", "embed", "evaluate"):
        try:
            atlas.STEPS[step](file, 200, "1")
        except SystemExit as end:  # a command of typer ends so
            assert not end.code
    rows = {row["step"]: row for row in map(json.loads, log.read_text().splitlines())}
    assert set(rows) == {"ready", "batches", "fit"} and rows["fit"]["epochs"] == 1
    assert rows["batches"]["rate"] > 0 and all(0 < row["peak_gb"] < 16 for row in rows.values())
    assert "AvgBIO" in capsys.readouterr().out
