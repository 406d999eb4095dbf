"""Perturbation: what a user may get wrong, what a split must never let through, what a saved model must still say."""
import warnings
import zipfile
from dataclasses import replace

import notebooks  # tools/notebooks.py
import numpy as np
import pandas as pd
import papermill as pm
import pytest
from test_pages import run

from scformer_nb.perturbation import (
    PAPER,
    PerturbationModel,
    PerturbationRecipe,
    additive,
    check_split,
    gears,
    linear,
    mean_change,
    no_change,
    parse_condition,
    pearson,
    perceptron,
    prepare,
    profile,
    score,
    simulate_perturbations,
    situations,
    split_perturbations,
    training_cells,
)

SMALL = PerturbationRecipe(dim=16, hidden=16, n_blocks=1, max_genes=16, batch_size=16)


@pytest.fixture(scope="module")
def adata():
    return simulate_perturbations(n_genes=40, n_targets=8, n_doubles=10, n_cells=12, seed=3)


@pytest.fixture(scope="module")
def data(adata):
    return prepare(adata, batch_key="batch")


@pytest.fixture(scope="module")
def split(data):
    return split_perturbations(data.obs.condition, seed=0)


@pytest.fixture(scope="module")
def train(data, split):
    return training_cells(data, split)


@pytest.fixture(scope="module")
def model(train, adata):
    programs = adata.uns["truth"]["programs"]
    return PerturbationModel(train, direction="up", gene_sets=programs, targets=["UNMEASURED"], recipe=SMALL).fit(1, progress=False)


def renamed(adata, old, new):
    out = adata.copy()
    out.obs["condition"] = out.obs["condition"].astype(str).replace({old: new})
    return out


def test_no_control_cells(adata):
    with pytest.raises(ValueError, match="no control cells; name those without a perturbation 'control'"):
        prepare(renamed(adata, "control", "non-targeting"))
    with pytest.raises(ValueError, match="condition_key='perturbation' is not a column"):
        prepare(adata, condition_key="perturbation")


@pytest.mark.parametrize("name", ["gene0_+_gene1+", "gene0,gene1", "gene0+gene1+gene2", "gene0 gene1", "gene0+gene0", "+gene0", ""])
def test_other_formats_are_refused(adata, name):
    with pytest.raises(ValueError, match="is none of 'A', 'A\\+ctrl', 'A\\+B'"):
        prepare(renamed(adata, "gene0", name))


@pytest.mark.parametrize("name, genes", [("HLA-A", ("HLA-A",)), ("B+A", ("A", "B")), ("ctrl+A", ("A",)), ("control", ()), ("ctrl", ())])
def test_the_formats_of_the_field_are_read(name, genes):
    assert parse_condition(name) == genes


def test_ctrl_and_control_are_the_same(adata, data):
    other = renamed(renamed(renamed(adata, "control", "ctrl"), "gene0", "gene0+ctrl"), "gene1", "ctrl+gene1")
    assert (prepare(other, batch_key="batch").obs.condition.astype(str) == data.obs.condition.astype(str)).all()


def test_an_unknown_perturbation_offers_the_nearest_name(model):
    with pytest.raises(ValueError, match="'gene1O' .did you mean 'gene1'"):
        model.predict(["gene0+gene1O"])
    with pytest.raises(ValueError, match="must be named in `targets`"):
        model.predict("KLF1")
    assert np.isfinite(model.predict("UNMEASURED")).all().all()


def test_small_perturbations_are_left_out_and_counted(adata):
    keep = (adata.obs.condition != "gene0").to_numpy()
    keep[np.flatnonzero(~keep)[:4]] = True
    with pytest.warns(UserWarning, match="1 of 18 perturbations have fewer than 5 cells and are left out: gene0"):
        assert "gene0" not in set(prepare(adata[keep].copy()).obs.condition)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepare(adata)


@pytest.mark.parametrize("test", [["A+B"], ["B+A"], ["A+ctrl"], ["ctrl+A", "C"]])
def test_a_test_perturbation_in_training_is_refused(test):
    with pytest.raises(ValueError, match="1 test perturbations are in training"):
        check_split(["A", "A+B", "control"], test)
    check_split(["A", "A+B", "control"], ["B", "C+A", "control"])


@pytest.mark.parametrize("seed", range(20))
def test_no_split_leaks(data, seed):
    table = split_perturbations(data.obs.condition, seed=seed)
    train, test = table[table.part == "train"], table[table.part == "test"]
    seen = {g for c in train.index for g in parse_condition(c)}
    for c, unseen in test.unseen.items():
        genes = set(parse_condition(c))
        assert c not in train.index and unseen == f"{len(genes - seen)}/{len(genes)}"
    cells = training_cells(data, table)
    assert set(cells.obs.condition) == {"control", *train.index} and len(table) == data.obs.condition.nunique() - 1


def test_training_does_not_see_test_cells(data, split, train):
    "The same predictions when all test cells are replaced by nonsense"
    changed = data.copy()
    hidden = ~changed.obs.condition.isin(["control", *split.index[split.part == "train"]]).to_numpy()
    X = changed.X.toarray()
    X[hidden] = 7
    changed.X = type(data.X)(X)
    test = list(split.index[split.part == "test"])
    for predict in (no_change, mean_change, additive, linear):
        assert predict(training_cells(changed, split), test).equals(predict(train, test))
    models = [PerturbationModel(cells, targets=["gene7"], recipe=SMALL) for cells in (training_cells(changed, split), train)]
    first, second = (model.fit(1, progress=False).predict(test) for model in models)
    assert first.equals(second)


def test_situations_never_show_what_is_asked():
    table = situations(["A", "B", "C", "A+B", "A+C", "B+C"])
    for c, unseen, rows in table.itertuples(index=False):
        names = [["A", "B", "C", "A+B", "A+C", "B+C"][i] for i in rows]
        seen = {g for n in names for g in parse_condition(n)}
        assert c not in names and int(unseen[0]) == len(set(parse_condition(c)) - seen)
    assert {"1/1", "0/2", "1/2", "2/2"} == set(table.unseen)


RECIPES = {"default": SMALL, "genes": replace(SMALL, head="genes"), "raw": replace(SMALL, start=False),
    "bins": replace(SMALL, values="bins"), "paper": replace(PAPER, dim=16, hidden=16, n_blocks=1, batch_size=64)}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_every_recipe_is_saved_and_loaded(train, split, tmp_path, recipe):
    model = PerturbationModel(train, direction="up", recipe=recipe, targets=["X"]).fit(1, progress=False)
    model.save(tmp_path / "model")
    loaded = PerturbationModel.load(tmp_path / "model")
    asked = [*split.index[split.part == "test"], "X", "X+gene0"]
    assert np.allclose(loaded.predict(asked), model.predict(asked), atol=1e-6)
    assert loaded.recipe == recipe and loaded.history.equals(model.history) and repr(loaded) == repr(model)


def test_damaged_and_foreign_folders(model, tmp_path):
    model.save(tmp_path)
    with pytest.raises(FileExistsError, match="overwrite=True"):
        model.save(tmp_path)
    model.save(tmp_path, overwrite=True)
    (tmp_path / "weights.safetensors").write_bytes((tmp_path / "weights.safetensors").read_bytes()[:500])
    with pytest.raises(ValueError, match="cut off or damaged"):
        PerturbationModel.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="holds no saved model"):
        PerturbationModel.load(tmp_path / "nothing")


def test_a_fit_is_reproducible_and_leaves_the_seed_alone(train, split, model, adata):
    import torch
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    again = PerturbationModel(train, direction="up", gene_sets=adata.uns["truth"]["programs"], targets=["UNMEASURED"], recipe=SMALL)
    again.fit(1, progress=False)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert np.allclose(again.predict(split.index), model.predict(split.index), atol=1e-6)


def test_a_run_that_is_killed_loses_one_epoch_at_most(train, split, tmp_path, monkeypatch):
    def begin():
        return PerturbationModel(train, direction="up", recipe=SMALL)

    killed, validate, calls = begin(), PerturbationModel._validate, []

    def stop_in_third(self, items):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return validate(self, items)
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(PerturbationModel, "_validate", stop_in_third)
        killed.fit(4, tmp_path / "run", progress=False)
    again, whole = begin().fit(4, tmp_path / "run", resume=True, progress=False), begin().fit(4, progress=False)
    assert again.history.equals(whole.history) and np.array_equal(again.predict(split.index), whole.predict(split.index))
    with pytest.warns(UserWarning, match="has 4 epochs already, more than max_epochs=1"):
        assert len(begin().fit(1, tmp_path / "run", resume=True, progress=False).history) == 4


def test_a_run_goes_on_only_with_what_it_began_with(train, tmp_path):
    def begin(**k):
        return PerturbationModel(train, direction="up", recipe=replace(SMALL, **k))

    begin().fit(1, tmp_path / "run", progress=False)
    with pytest.raises(FileExistsError, match="is not empty"):
        begin().fit(1, tmp_path / "run")
    with pytest.raises(ValueError, match="`run_dir`, which is not given"):
        begin().fit(1, resume=True)
    with pytest.raises(ValueError, match="other cells, genes, recipe or seed"):
        begin(lr=1e-4).fit(2, tmp_path / "run", resume=True)
    (tmp_path / "run" / "last.ckpt").write_bytes(b"half")
    with pytest.raises(ValueError, match="last.ckpt is cut off or no checkpoint of this library .*; delete it and start anew"):
        begin().fit(2, tmp_path / "run", resume=True)


def test_wrong_options(train):
    with pytest.raises(ValueError, match="direction must be 'down' or 'up', not 'sideways'"):
        PerturbationModel(train, direction="sideways")
    with pytest.raises(ValueError, match="at least 2"):
        PerturbationModel(train[train.obs.condition.isin(["control", train.obs.condition.cat.categories[-1]])].copy())
    with pytest.raises(ValueError, match="max_epochs=0"):
        PerturbationModel(train, recipe=SMALL).fit(0)


def test_effects_find_the_truth_where_signal_is_strong():
    "Single effects of seen genes, learned from 60 cells each, at corr(delta) 0.95 or more against 180 others"
    adata = simulate_perturbations(n_genes=60, n_targets=8, n_doubles=10, n_cells=240, seed=0)
    data = prepare(adata, batch_key="batch")
    first = (data.obs.groupby("condition", observed=True).cumcount() < 60).to_numpy() | (data.obs.condition == "control").to_numpy()
    truth, train = profile(data[~first | (data.obs.condition == "control").to_numpy()].copy()), data[first].copy()
    singles = [c for c in truth.mean.index if "+" not in c]
    model = PerturbationModel(train, direction="up", recipe=SMALL)
    model._settings["gain"] = {"all": 0.0}
    predicted = model.predict(singles)
    assert score(predicted, truth).corr_delta.mean() > 0.95
    assert min(pearson(predicted.loc[c] - model.control, truth.change.loc[c]) for c in singles) > 0.85


def test_perceptron_leaves_the_seed_alone(train, split):
    test = list(split.index[split.part == "test"])
    assert perceptron(train, test, max_epochs=1).equals(perceptron(train, test, max_epochs=1))


def test_gears_runs_where_it_is_installed(train, split, adata):
    pytest.importorskip("gears")
    test = [*split.index[split.part == "test"], "UNMEASURED"]
    predicted = gears(train, test, adata.uns["truth"]["programs"], max_epochs=1)
    assert predicted.shape == (len(test), train.n_vars) and np.isfinite(predicted).all().all()


# --- the page

PAGE = notebooks.ROOT / "nbs/14_exp_perturbation.ipynb"
METHODS = ["no change", "additive", "linear", "start", "scFormer"]


def test_page_on_a_users_file(adata, tmp_path):
    "Other names for the columns, counts in a layer, `ctrl`, no batches, no gene sets."
    mine = adata.copy()
    mine.obs = pd.DataFrame({"guide": mine.obs["condition"].astype(str).replace("control", "ctrl")}, mine.obs_names)
    mine.layers["raw"], mine.X = mine.X.copy(), mine.X.log1p()
    del mine.uns["truth"]
    mine.write_h5ad(tmp_path / "mine.h5ad")
    own = dict(dataset=str(tmp_path / "mine.h5ad"), condition_key="guide", batch_key="", layer="raw", direction="down", gene_sets="")
    notebook = run(PAGE, tmp_path, **own, methods=METHODS, out=str(tmp_path / "out"))
    assert not notebook.metadata.papermill.exception
    lines = pd.read_json(tmp_path / "out/perturbation.jsonl", lines=True)
    assert set(lines.method) == {"ceiling", *METHODS} and set(lines.dataset) == {"mine"}
    assert list((tmp_path / "out").glob("perturbation_mine*.png"))
    with pytest.raises(pm.PapermillExecutionError, match="guides"):
        run(PAGE, tmp_path, **own | {"condition_key": "guides"}, methods=METHODS, out=str(tmp_path / "out2"))


def test_page_on_the_published_layout_of_gears(adata, tmp_path, monkeypatch):
    "A zip with log values, symbols in a column of var, and `A+ctrl`."
    layout = adata.copy()
    condition = layout.obs["condition"].astype(str)
    layout.obs["condition"] = condition.where(condition.str.contains(r"\+"), condition + "+ctrl").replace("control+ctrl", "ctrl")
    layout.obs["cell_type"] = "K562"
    layout.obs_names = layout.obs_names + "-1"
    layout.layers["counts"] = layout.X.copy()
    layout.var["gene_name"] = layout.var_names.to_numpy()
    layout.var_names = [f"ENSG{i}" for i in range(layout.n_vars)]
    del layout.uns["truth"]
    layout.write_h5ad(tmp_path / "perturb_processed.h5ad")
    with zipfile.ZipFile(tmp_path / "norman.zip", "w") as z:
        z.write(tmp_path / "perturb_processed.h5ad", "norman/perturb_processed.h5ad")
    monkeypatch.setenv("SCFORMER_DATA_DIR", str(tmp_path))
    notebook = run(PAGE, tmp_path, dataset="norman_gears", gene_sets="", methods=METHODS, out=str(tmp_path / "out"))
    assert not notebook.metadata.papermill.exception
    assert set(pd.read_json(tmp_path / "out/perturbation.jsonl", lines=True).dataset) == {"norman_gears"}


def test_a_screen_too_small_to_hold_anything_out_keeps_its_start(data):
    few = data[data.obs.condition.isin(["control", *sorted(set(data.obs.condition) - {"control"})[:4]])].copy()
    model = PerturbationModel(few, recipe=SMALL)
    start = model.predict(model.vocab.genes[:10])
    with pytest.warns(UserWarning, match="4 training perturbations are too few to hold some out"):
        model.fit(max_epochs=1, progress=False)
    assert np.array_equal(model.predict(start.index), start)


def test_scores_know_a_perturbation_by_any_of_its_names(data):
    truth = profile(data)
    double = next(c for c in truth.mean.index if "+" in c)
    a, b = double.split("+")
    asked = truth.mean.loc[[double]].set_axis([f"{b}+{a}"])
    assert np.isclose(score(asked, truth).loc[f"{b}+{a}", "corr"], 1)
    with pytest.raises(ValueError, match="there is no profile of 'gene0\\+nogene'"):
        score(asked.set_axis(["gene0+nogene"]), truth)


def test_the_papers_recipe_gives_every_gene_a_token(train):
    paper = replace(PAPER, dim=16, hidden=16, n_blocks=1)
    model = PerturbationModel(train, recipe=paper)
    ours = PerturbationModel(train, recipe=SMALL)
    assert (model.cells.lengths == len(model.vocab.genes)).all() and (ours.cells.lengths < len(model.vocab.genes)).any()
