"""What the experiment pages share: data and keys, settings that find stored lines, runs, claims."""
import json
import sys
import time
import warnings
from dataclasses import asdict

import notebooks  # tools/notebooks.py
import numpy as np
import pandas as pd
import pytest
import warm
from own_data import own_file

from scformer_nb import experiment as experiment_module
from scformer_nb.experiment import CHECKING, CHOOSING, EARLIER, Experiment, check_methods, data_settings, gain, margins, verdicts
from scformer_nb.ledger import Ledger, canonical
from scformer_nb.recipe import DEFAULT


@pytest.fixture
def mine(tmp_path):
    return Experiment("toy", own_file(tmp_path), str(tmp_path), label_key="my_label", batch_key="plate", layer="raw", n_cells=120)


@pytest.mark.parametrize("methods", [["PCA", "No, such"], ["pca"], ["HVG", ""], "PCA"])
def test_unknown_methods_are_refused_by_name(methods):
    with pytest.raises(ValueError, match="methods are HVG, .*scANVI .sees labels., scFormer, scFormer .untrained., .*; not '"):
        check_methods(methods)


def test_data_and_keys(mine, tmp_path):
    assert mine.hvg.n_obs == 120 and (mine.dataset, mine.layer) == ("mine", "raw")
    assert mine.groups.name == "cell type" and mine.groups.isna().sum() > 0 and mine.batches("it needs").nunique() == 2
    again = Experiment("toy", own_file(tmp_path), str(tmp_path), layer="raw", n_cells=120)
    assert list(again.hvg.obs_names) == list(mine.hvg.obs_names) and again.groups.unique().tolist() == ["all cells"]
    assert (again.label_key, again.batch_key) == (None, None) and again.settings["label_key"] is None


def test_coordinates_that_are_drawn_anew_and_cut_off_leave_the_old(mine, monkeypatch):
    def half(file, array):
        file.write(b"half")
        raise KeyboardInterrupt
    monkeypatch.setattr(experiment_module, "umap", lambda Z: Z)
    mine.keep_umap("PCA", np.zeros((120, 2)))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(experiment_module.np, "save", half)
        mine.keep_umap("PCA", np.ones((120, 2)))
    assert (np.load(f"{mine.path('PCA', 'umap')}.npy") == 0).all()


@pytest.mark.slow
def test_arrays_of_two_runs_at_once_are_both_kept(mine, monkeypatch):
    "The second is there before the first has written: it waits."
    code = ("import sys; import numpy as np; from scformer_nb.experiment import Results\n"
        "Results('toy', 'mine', sys.argv[1]).keep('second', Z=np.ones(2))")
    other, save = [], np.savez_compressed

    def with_another(*args, **arrays):
        other.append(warm.Popen([sys.executable, "-c", code, str(mine.out)]))
        time.sleep(.5)
        save(*args, **arrays)
    monkeypatch.setattr(experiment_module.np, "savez_compressed", with_another)
    mine.keep("first", Z=np.zeros(2))
    assert other[0].wait(60) == 0 and set(mine.arrays) == {"first, Z", "second, Z"}


@pytest.mark.parametrize(("key", "message"), [("one", r"obs\['one'\] has one value, it needs two or more"),
    ("donor", r"batch_key='donor' is not a column of obs \(.*plate.*\): name one"), (None, "batch_key=None is not")])
def test_batches_that_are_none(mine, key, message):
    mine.batch_key = key
    with pytest.raises(ValueError, match=message):
        mine.batches("it needs")


def test_an_unknown_label_is_named(mine):
    mine.label_key = "celltype"
    with pytest.raises(ValueError, match="label_key='celltype' is not a column of obs"):
        mine.groups  # noqa: B018


def test_settings_change_with_data_and_columns_only(mine):
    want = data_settings(mine.adata, "raw", batch_key="plate", label_key="my_label")
    other = mine.adata.copy()
    other.obs["one"] = "else"                                            # a column that is not used
    assert data_settings(other, "raw", batch_key="plate", label_key="my_label") == want
    other.obs["my_label"] = other.obs["my_label"].to_numpy()[::-1]
    assert data_settings(other, "raw", batch_key="plate", label_key="my_label")["data"] != want["data"]
    assert data_settings(other, "raw", batch_key="plate", label_key=None)["label_key"] is None
    other = mine.adata.copy()
    other.layers["raw"].data[0] += 1
    assert data_settings(other, "raw", batch_key="plate", label_key="my_label")["data"] != want["data"]


def test_the_stored_runs_are_found():
    "The lines of scFormer's full runs are those of today's recipe, or of the one before."
    for name in ("clustering", "integration"):
        table = Ledger(notebooks.ROOT / f"figures/{name}.jsonl").table()
        stored = table.loc[table["method"] == "scFormer", "settings"].map(json.loads)
        today, before = (canonical(json.loads(json.dumps({"recipe": asdict(r)})))["recipe"] for r in (DEFAULT, EARLIER))
        assert [s["recipe"] for s in stored].count(before) == 15
        assert all(s["recipe"] == today and s["max_epochs"] is None for s in stored if s["recipe"] != before)
        assert {*CHOOSING, *CHECKING} >= {*table["dataset"]}


def test_a_failing_baseline_costs_its_row_and_scformer_the_page(mine, monkeypatch):
    def broken(*args):
        raise OSError("no\n room")
    monkeypatch.setattr(experiment_module, "BASELINES", experiment_module.BASELINES | {"PCA": broken})
    monkeypatch.setattr(Experiment, "train", lambda *_: 1 / 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(RuntimeError, match="scFormer failed: ZeroDivisionError"):
            mine.compare(["PCA", "scFormer"], [0], 1)
        monkeypatch.setattr(Experiment, "train", lambda *a: pytest.fail("trained again"))
        mine.ledger.get_or_run("mine", "scFormer", "default", 0,
            mine.settings | {"max_epochs": 1, "recipe": asdict(DEFAULT)}, lambda: {"AvgBIO": .5})
        runs, failed = mine.compare(["PCA", "scFormer"], [0], 1)
    assert failed == {"PCA": "OSError: no room"} and runs["scFormer"]["AvgBIO"].tolist() == [.5]


def test_coordinates_of_other_cells_are_not_drawn(mine, monkeypatch):
    (mine.out / "umap").mkdir()
    mine.keep_umap("PCA", np.random.default_rng(0).normal(size=(120, 4)))
    mine.keep_umap("HVG", np.random.default_rng(0).normal(size=(60, 4)))
    drawn = []
    original = experiment_module.plot_methods
    monkeypatch.setattr(experiment_module, "plot_methods", lambda xy, groups: drawn.append(list(xy)) or original(xy, groups))
    mine.draw_umaps({"PCA": "PCA", "HVG": "HVG", "scVI": "scVI"}, mine.groups, "umap")
    mine.draw_umaps({"scVI": "scVI"}, mine.groups, "empty")
    assert drawn == [["PCA"], []] and mine.path("umap").with_suffix(".png").exists()


def test_margins_are_of_the_newest_settings_and_over_what_sees_no_label(tmp_path):
    ledger = Ledger(tmp_path / "toy.jsonl")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for method, n, value in (("PCA", 1, .9), ("PCA", 2, .4), ("HVG", 1, .3), ("scFormer", 1, .6), ("scANVI (sees labels)", 1, .8)):
            ledger.get_or_run("a", method, "default", 0, {"n": n}, lambda value=value: {"AvgBIO": value})
    assert margins(ledger, "AvgBIO").loc[("other", "a"), ["PCA", "margin"]].tolist() == [.4, .2]


def test_verdicts_need_two_standard_errors():
    index = pd.MultiIndex.from_product([["full", "less"], range(4)], names=["option", "seed"])
    runs = pd.DataFrame({"AvgBIO": [.5, .6, .7, .8, .4, .52, .58, .69]}, index)
    d = gain(runs, "AvgBIO", "full", "less")
    assert d.to_numpy() == pytest.approx([.1, .08, .12, .11])
    noisy = d - pd.Series([0, .3, 0, .3])
    found = verdicts({"up": d, "down": -d, "noise": noisy, "never run": gain(runs, "NMI", "full", "less")})
    assert found["here"].to_dict() == {"up": "holds", "down": "fails", "noise": "open"}
    assert found.loc["up", "se"] == round(d.std(ddof=1) / 2, 3) and found["seeds"].tolist() == [4, 4, 4]
