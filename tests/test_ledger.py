"""The ledger against killed and concurrent runs, lines of something else, and recipes that grow; tables of runs."""
import json
import sys
import warnings
from dataclasses import asdict, field, fields, make_dataclass

import notebooks  # tools/notebooks.py
import numpy as np
import pandas as pd
import pytest
import warm

from scformer_nb import ledger as ledger_module
from scformer_nb.ledger import CARD, KEY, Ledger, canonical, mean_sd, read_line, results_table
from scformer_nb.recipe import RENAMED, Recipe

RUN = {"dataset": "blobs", "method": "PCA", "option": "full", "seed": 0, "settings": {"n_hvg": 1200, "lr": [1e-3, .9]}}


def test_a_finished_line_is_not_computed_again(tmp_path):
    calls = []
    ledger = Ledger(tmp_path / "figures" / "clustering.jsonl")
    first = ledger.get_or_run(**RUN, fn=lambda: calls.append(1) or {"AvgBIO": np.float32(.5), "NMI": np.nan, "n": np.int64(3)})
    second = Ledger(str(ledger.path)).get_or_run(**RUN | {"settings": {"lr": (1e-3, .9), "n_hvg": np.int64(1200)}}, fn=lambda: 1 / 0)
    assert calls == [1] and first == second == json.loads(ledger.path.read_text())
    assert first["experiment"] == "clustering" and first["metrics"] == {"AvgBIO": .5, "NMI": None, "n": 3} and first["seconds"] >= 0
    assert set(first) == {"experiment", "dataset", "method", "option", "seed", "settings", "metrics", "seconds", "versions"}
    assert set(first["versions"]) == {"scformer_nb", "torch", "scanpy", "scib", "python"}


def test_other_settings_are_another_run(tmp_path):
    ledger = Ledger(tmp_path / "x.jsonl")
    for value, n_hvg in ((.1, 1200), (.2, 2000)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            ledger.get_or_run(**RUN | {"settings": {"n_hvg": n_hvg}}, fn=lambda value=value: {"AvgBIO": value})
    assert "n_hvg: 1200 -> 2000" in str(caught[0].message) and caught[0].filename == __file__
    assert ledger.get_or_run(**RUN | {"settings": {"n_hvg": 1200}}, fn=lambda: 1 / 0)["metrics"] == {"AvgBIO": .1}
    assert len(ledger.table()) == len(ledger.summary()) == 2
    line = json.loads(ledger.path.read_text().splitlines()[0])
    with ledger.path.open("a") as file:                  # the newest of equal settings wins
        file.write(json.dumps(line | {"metrics": {"AvgBIO": .9}}) + "\n")
    assert ledger.get_or_run(**RUN | {"settings": {"n_hvg": 1200}}, fn=lambda: 1 / 0)["metrics"] == {"AvgBIO": .9}
    assert sorted(ledger.table()["AvgBIO"]) == [.2, .9]


def test_a_run_killed_at_any_byte_costs_one_line(tmp_path):
    ledger = Ledger(tmp_path / "x.jsonl")
    for seed in (0, 1):
        ledger.get_or_run(**RUN | {"seed": seed}, fn=lambda: {"AvgBIO": .5})
    whole = ledger.path.read_bytes()
    start = whole.index(b"\n") + 1
    for end in range(start, len(whole) + 1):
        ledger.path.write_bytes(whole[:end])
        calls = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            line = ledger.get_or_run(**RUN | {"seed": 1}, fn=lambda calls=calls: calls.append(1) or {"AvgBIO": .5})
            assert len(calls) == (end < len(whole) - 1) and line["seed"] == 1
            assert ledger.table()["seed"].tolist() == [0, 1]


@pytest.mark.parametrize("junk", [b"[1, 2]", b"3", b"null", b'{"experiment": "x"}', b"\xff\xfe", b"{" * 10, b"[" * 100_000])
def test_lines_of_something_else_are_counted_and_skipped(tmp_path, junk):
    ledger = Ledger(tmp_path / "x.jsonl")
    ledger.get_or_run(**RUN, fn=lambda: {"AvgBIO": .5})
    ledger.path.write_bytes(junk + b"\n\n" + ledger.path.read_bytes())
    with pytest.warns(UserWarning, match="1 lines are cut off or no finished runs and are skipped: line 1$"):
        assert len(ledger.table()) == 1


APPEND = """
import sys
from scformer_nb.ledger import Ledger
ledger = Ledger(sys.argv[1])
for seed in range(50):
    ledger.get_or_run("blobs", sys.argv[2], "x" * 3000, seed, {}, lambda: {"AvgBIO": seed})
"""


@pytest.mark.slow
def test_two_processes_append(tmp_path):
    workers = [warm.Popen([sys.executable, "-c", APPEND, tmp_path / "x.jsonl", who]) for who in ("PCA", "HVG")]
    assert [w.wait(120) for w in workers] == [0, 0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table = Ledger(tmp_path / "x.jsonl").table()
    assert len(table) == 100 and table.groupby("method")["AvgBIO"].sum().tolist() == [1225, 1225]


def test_a_failed_run_writes_nothing_and_a_bad_place_is_found_first(tmp_path):
    ledger = Ledger(tmp_path / "x.jsonl")
    with pytest.raises(ZeroDivisionError):
        ledger.get_or_run(**RUN, fn=lambda: 1 / 0)
    with pytest.raises(TypeError, match="cannot be written to a ledger"):
        ledger.get_or_run(**RUN | {"settings": {"model": object()}}, fn=lambda: {})
    assert ledger.table().empty and list(ledger.table()) == ["experiment", "dataset", "method", "option", "seed", "settings", "seconds"]
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        Ledger(tmp_path / "file" / "x.jsonl").get_or_run(**RUN, fn=lambda: pytest.fail("computed before the folder was tried"))


def test_summary_is_mean_and_sd_over_seeds(tmp_path):
    ledger = Ledger(tmp_path / "x.jsonl")
    for method, values in {"PCA": [.1, .2, .6], "HVG": [.5]}.items():
        for seed, value in enumerate(values):
            ledger.get_or_run("blobs", method, "full", seed, {}, lambda value=value: {"AvgBIO": value})
    summary = ledger.summary().set_index("method")
    assert summary.loc["PCA", "AvgBIO"] == pytest.approx(.3)
    assert summary.loc["PCA", "AvgBIO_sd"] == pytest.approx(np.std([.1, .2, .6], ddof=1))
    assert summary["n_seeds"].to_dict() == {"PCA": 3, "HVG": 1} and np.isnan(summary.loc["HVG", "AvgBIO_sd"])
    assert Ledger(tmp_path / "none.jsonl").summary().empty and not (tmp_path / "none.jsonl").exists()


OTHER_TYPES = {name: 3 for name in KEY[:4]} | {"seed": "0", "settings": [], "metrics": None, "seconds": "1", "versions": 1}


@pytest.mark.parametrize("field", OTHER_TYPES)
def test_a_line_with_a_field_of_another_type_is_skipped(tmp_path, field):
    ledger = Ledger(tmp_path / "x.jsonl")
    good = ledger.get_or_run(**RUN, fn=lambda: {"AvgBIO": .5})
    bad = [good | {field: value} for value in (OTHER_TYPES[field], None, True, [[]])] + [{k: good[k] for k in good if k != field}]
    ledger.path.write_text("".join(json.dumps(line) + "\n" for line in [good, *bad]))
    with pytest.warns(UserWarning, match="5 lines .* are skipped: line 2, 3, 4, 5, 6$"):
        assert ledger.get_or_run(**RUN, fn=lambda: 1 / 0) == good
    with pytest.warns(UserWarning, match="5 lines"):
        assert ledger.table()["AvgBIO"].tolist() == [.5] and ledger.summary()["n_seeds"].tolist() == [1]


def test_metrics_are_numbers_and_many_bad_lines_are_counted(tmp_path):
    ledger = Ledger(tmp_path / "x.jsonl")
    good = ledger.get_or_run(**RUN, fn=lambda: {"AvgBIO": np.nan})
    assert good["metrics"] == {"AvgBIO": None} and "NaN" not in ledger.path.read_text()
    bad = json.dumps(good | {"metrics": {"AvgBIO": {"mean": 1}}}) + "\n"
    ledger.path.write_text(bad * 12 + json.dumps(good)[:50])
    with pytest.warns(UserWarning, match="13 lines .*: line 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, ...$"):
        assert ledger.table().empty


# settings that outlive their names

MEASURED = {"reliability", "atlas"}  # no ledgers of runs
STORED = sorted(path for path in (notebooks.ROOT / "figures").glob("*.jsonl") if path.stem not in MEASURED)


def stored_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_all_stored_lines_are_valid():
    lines = [line for path in STORED for line in path.read_text().splitlines()]
    assert len(lines) >= 794
    for line in lines:
        assert set(read_line(line.encode())) == set(json.loads(line))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sum(len(Ledger(path).table()) for path in STORED) == len(lines)    # no line hides another


OTHER_NAMES = {"lr": "learning_rate", "hidden": "d_ff", "warm_start": "svd_init"}


def grown(settings):
    "The settings of tomorrow: scFormer's recipe has a new field, others have other names, two are gone."
    if "attend_masked" not in settings.get("recipe", {}):
        return settings                                                  # no recipe, or another network's
    recipe = {OTHER_NAMES.get(k, k): v for k, v in settings["recipe"].items() if k not in ("pool", "value")}
    return settings | {"recipe": recipe | {"invented": 7}}


@pytest.fixture
def tomorrow(monkeypatch):
    "The code of tomorrow: a recipe without the new field means 7, whatever its default is, and lr has another name."
    new = [(OTHER_NAMES.get(f.name, f.name), f.type, field(default=f.default, metadata=f.metadata)) for f in fields(Recipe)]
    new.append(("invented", int, field(default=9, metadata={"before": 7})))
    Tomorrow = make_dataclass("Recipe", new, frozen=True, namespace={"from_dict": classmethod(Recipe.from_dict.__func__)})
    monkeypatch.setattr(ledger_module, "Recipe", Tomorrow)
    monkeypatch.setitem(RENAMED, "lr", "learning_rate")


def ask(ledger, line, settings, fn):
    return ledger.get_or_run(*(line[k] for k in KEY[1:]), settings, fn)


@pytest.mark.parametrize("path", STORED, ids=lambda path: path.stem)
def test_every_stored_line_is_found_when_the_recipe_grows(path, tmp_path, tomorrow):
    copy = Ledger(tmp_path / path.name)
    copy.path.write_bytes(path.read_bytes())
    for line in stored_lines(path):
        found = ask(copy, line, grown(line["settings"]), lambda: pytest.fail("computed again"))
        assert found["metrics"] == line["metrics"] and found["versions"] == line["versions"]
    assert copy.path.read_bytes() == path.read_bytes()


@pytest.mark.parametrize("other", [{"invented": 8}, {"learning_rate": 5e-4}, {"d_ff": 256}])
def test_another_value_of_a_field_is_another_run(tmp_path, tomorrow, other):
    path = notebooks.ROOT / "figures/integration.jsonl"
    copy = Ledger(tmp_path / path.name)
    copy.path.write_bytes(path.read_bytes())
    *_, line = (line for line in stored_lines(path) if "recipe" in line["settings"])  # the newest
    settings = grown(line["settings"])
    settings["recipe"] = settings["recipe"] | other
    name = next(iter(other))
    with pytest.warns(UserWarning, match=rf"other settings \(recipe.{name}: .* -> {other[name]}\): run anew"):
        assert ask(copy, line, settings, lambda: {"AvgBIO": 0.0})["metrics"] == {"AvgBIO": 0.0}
    assert len(copy.path.read_bytes()) > len(path.read_bytes())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ask(copy, line, settings, lambda: 1 / 0)["metrics"] == {"AvgBIO": 0.0}   # and found the next time


def test_a_field_that_is_gone_means_what_it_was():
    line = next(line for line in stored_lines(notebooks.ROOT / "figures/integration.jsonl") if "recipe" in line["settings"])
    recipe = line["settings"]["recipe"]
    less = {k: v for k, v in recipe.items() if k not in ("pool", "value")}
    assert canonical({"recipe": less}) == canonical({"recipe": recipe}) == {"recipe": asdict(Recipe.from_dict(recipe))}
    assert canonical({"recipe": recipe | {"pool": "mean"}}) == {"recipe": recipe | {"pool": "mean"}}   # not of this version


@pytest.mark.parametrize("recipe", [None, "default", [1], {"lr": "fast"}, {"lr": -1}, {"hidden": 64, "head": "gene"}])
def test_a_recipe_of_something_else_stays_as_it_is(recipe):
    assert canonical({"recipe": recipe, "n_hvg": 1200}) == {"recipe": recipe, "n_hvg": 1200}


# tables

def test_the_card_is_shown_when_asked_for():
    old = {"AvgBIO": .5, "NMI": .4}
    new = {"AvgBIO": .4, "NMI": .4, "kNN_accuracy": .9, "depth_R2": -.1, "Overall_no_ASW": .6, "confounding": 0.}
    assert results_table({"old": old, "new": new}).columns.tolist() == ["AvgBIO", "NMI"]
    table = results_table({"old": old, "new": new}, columns=CARD, missing={"Seurat": "no R here"})
    assert table.columns.tolist() == [*CARD, "note"] and table.index.tolist() == ["old", "new", "Seurat"]
    assert set(table.loc["old"]) == {""} and table.loc["new", ["kNN_accuracy", "depth_R2", "kBET"]].tolist() == ["0.900", "-0.100", ""]
    assert table.loc["new", "Overall_no_ASW"] == "0.600 *"
    one_of_two = results_table({"PCA": pd.DataFrame([old, new])}, columns=["kNN_accuracy"])   # a seed of before, one of today
    assert one_of_two.loc["PCA", "kNN_accuracy"] == "0.900"


def test_results_table():
    table = results_table({"HVG": {"AvgBIO": .5, "NMI": .4, "resolution": 1.}, "PCA": {"AvgBIO": .7, "NMI": .3}, "none": {"NMI": .9}})
    assert table.index.tolist() == ["PCA", "HVG", "none"] and table.columns.tolist() == ["AvgBIO", "NMI"]
    assert table["AvgBIO"].tolist() == ["0.700 *", "0.500", ""] and table.loc["none", "NMI"] == "0.900"
    assert results_table({"a": {"AvgBIO": .9, "Overall": .1}, "b": {"AvgBIO": .1, "Overall": .9}}).index.tolist() == ["b", "a"]


def test_mean_sd():
    runs = pd.DataFrame({"a": [.1, .2, .6], "b": [1., np.nan, np.nan], "c": [np.nan] * 3})
    assert mean_sd(runs, digits=2).to_dict() == {"a": "0.30 ± 0.26", "b": "1.00", "c": ""}
