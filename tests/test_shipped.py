"""Models that come with the package: found by name, whole or refused, with labels, a card and a plan that makes them again."""
import json
import shutil
from dataclasses import replace

import notebooks  # tools/notebooks.py
import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import torch

import scformer_nb as scf
from scformer_nb import model_files, shipped
from scformer_nb.model_files import find_model, shipped_models
from scformer_nb.recipe import DEFAULT
from scformer_nb.scformer import ScFormer
from scformer_nb.shipped import PLANS, REFERENCE_FILE, Labelled, load_reference, read_labelled, write_labelled
from scformer_nb.simulate import simulate

LEDGER = notebooks.ROOT / "figures/new_study.jsonl"
per_model = pytest.mark.parametrize("name", sorted(PLANS))


def new_cells(name, n=40, least=1.0):
    "Simulated cells with the genes of a model, or the first of them."
    genes = ScFormer.load(name).vocab.genes
    adata = simulate(n, int(least * len(genes)), 3, 1, seed=2)
    adata.var_names = genes[:adata.n_vars]
    return adata


@pytest.fixture
def own(tmp_path):
    "A copy of a model that ships, in a folder of the user."
    return shutil.copytree(find_model("human_blood"), tmp_path / "mine")


@per_model
def test_it_embeds_and_labels_by_name(name):
    adata = new_cells(name)
    table = load_reference(name).transform(adata)
    assert adata.obsm["X_scformer"].shape == (40, 32) and np.isfinite(adata.obsm["X_scformer"]).all()
    assert table["confidence"].between(0, 1).all() and "unknown" in table["label"].cat.categories
    assert np.array_equal(ScFormer.load(name).embed_cells(adata), adata.obsm["X_scformer"])


@per_model
def test_it_is_small_and_has_what_its_plan_says(name):
    folder, plan = find_model(name), PLANS[name]
    assert {file.name for file in folder.iterdir()} == {"model.json", "weights.safetensors", REFERENCE_FILE, "README.md"}
    assert sum(file.stat().st_size for file in folder.iterdir()) < 4e6
    model = ScFormer.load(name)
    assert list(model.settings["studies"]) == list(plan.studies) and model.recipe == DEFAULT
    given = {label for words in plan.labels.values() for label in words.values()}
    assert set(read_labelled(folder, 32).labels) <= given
    assert set(json.loads((folder / "model.json").read_text())["history"][0]) & {"seconds", "cells_per_second"} == set()


@per_model
def test_no_plan_holds_a_study_that_only_checks(name):
    plan, only = PLANS[name], {"pbmc4k", "pancreas_baron_human", "pancreas_baron_mouse", "pancreas_3studies", "human_cortex_m1"}
    assert not {where["dataset"] for where in plan.studies.values()} & only
    assert {"dataset", "batch"} >= {key for where in plan.studies.values() for key in where}
    assert ("pancreas_5tech", "indrop") not in [(w["dataset"], w.get("batch")) for w in plan.studies.values()]  # Baron et al. as well


@per_model
def test_the_card_says_what_the_ledger_says(name):
    card = (find_model(name) / "README.md").read_text()
    assert shipped.describe_checks(name, LEDGER) in card and "Not for diagnosis" in card
    for where in PLANS[name].studies.values():
        known = scf.datasets.DATASETS[where["dataset"]]
        assert known.source in card and f"| {known.licence} |" in card
    for dataset in PLANS[name].checks:
        assert f"| {dataset} | zero-shot |" in card and f"| {dataset} | PCA |" in card


def test_numbers_that_are_missing_are_said_to_be(tmp_path):
    assert shipped.describe_checks("human_blood", tmp_path / "none.jsonl") == "Not measured."


# ---- names and folders

def test_a_folder_of_the_user_goes_first(own, monkeypatch):
    monkeypatch.chdir(own.parent)
    own.rename("human_blood")
    assert not find_model("human_blood").is_absolute()


@pytest.mark.parametrize(("name", "message"), [("human_blod", "did you mean 'human_blood'"),
    ("liver", "known are 'human_blood', 'human_pancreas'"), ("some/human_blood", "no model of this name ships$"),
    ("", "holds no saved model"), ("../human_blood", "ships$")])
def test_an_unknown_name_says_which_there_are(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        ScFormer.load(name)


def test_too_few_genes_are_refused():
    with pytest.raises(ValueError, match="of the model's 1200 genes are in the data"):
        ScFormer.load("human_blood").embed_cells(new_cells("human_blood", least=.3))


def test_it_is_tuned_by_name():
    adata = new_cells("human_blood", n=60)
    tuned = ScFormer.from_pretrained("human_blood", adata).fit(1, progress=False)
    assert tuned.embed_cells(adata).shape == (60, 32) and tuned.settings["n_bins"] == 51


# ---- damage

@pytest.mark.parametrize("file", ["model.json", "weights.safetensors", REFERENCE_FILE])
@pytest.mark.parametrize("share", [0, .5, .99])
def test_a_model_that_is_cut_off_is_refused(own, file, share, monkeypatch):
    data = (own / file).read_bytes()
    (own / file).write_bytes(data[:int(share * len(data))])
    monkeypatch.setattr(model_files, "MODELS", own.parent)
    with pytest.raises(ValueError, match="cut off or damaged .*; install scformer_nb again"):
        load_reference(own)


def test_files_of_two_models_are_not_mixed(own):
    shutil.copy(find_model("human_pancreas") / REFERENCE_FILE, own)
    with pytest.raises(ValueError, match="reference.safetensors does not belong to its model.; copy or save it again"):
        load_reference(own)


@pytest.mark.parametrize("harm", [dict(embedding=torch.zeros(3, 5).half()), dict(embedding=torch.full((3, 32), torch.inf).half()),
    dict(labels=torch.tensor([0, 1, 9], dtype=torch.uint8)), dict(studies=torch.zeros(2, dtype=torch.uint8)), dict(labels=torch.ones(3)),
    dict(embedding=torch.tensor(1.0)), dict(labels=torch.tensor([0, -1, 0], dtype=torch.int8))])
def test_labelled_cells_that_cannot_be_are_refused(own, harm):
    cells = Labelled(np.zeros((3, 32), np.float32), np.array(["a", "b", "a"]), np.array(["s", "s", "t"]))
    write_labelled(own, cells)
    assert read_labelled(own, 32).labels.tolist() == ["a", "b", "a"]
    with safetensors.safe_open(own / REFERENCE_FILE, "pt") as file:
        said, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
    safetensors.torch.save_file(tensors | harm, own / REFERENCE_FILE, said)
    with pytest.raises(ValueError, match="cut off or damaged .reference.safetensors"):
        read_labelled(own, 32)


def test_a_pipe_for_the_labelled_cells_is_not_waited_for(own):
    import os
    (own / REFERENCE_FILE).unlink()
    os.mkfifo(own / REFERENCE_FILE)
    with pytest.raises(ValueError, match="is a pipe"):
        load_reference(own)


# ---- plans

@pytest.fixture
def plan(monkeypatch):
    "A plan of two simulated studies."
    made = {"one": simulate(90, 80, 3, 2, seed=0), "two": simulate(70, 80, 3, 1, seed=1)}
    monkeypatch.setattr(shipped, "load", lambda name: made[name].copy())
    words = {label: label.upper() for label in made["one"].obs["cell_type"].unique()}
    studies = {"a": {"dataset": "one", "batch": "batch_0"}, "b": {"dataset": "two"}}
    monkeypatch.setitem(shipped.PLANS, "toy", shipped.Plan("toys", studies, {"one": words, "two": words}, [], []))
    return made


def test_a_plan_takes_its_batches_and_leaves_a_study_out(plan):
    studies = shipped.read_studies("toy")
    assert list(studies) == ["a", "b"] and (studies["a"].obs["batch"] == "batch_0").all() and studies["b"].n_obs == 70
    assert set(studies["a"].obs["label"]) == {label.upper() for label in plan["one"].obs["cell_type"].unique()}
    assert list(shipped.read_studies("toy", without="one")) == ["b"]


def test_the_same_plan_gives_the_same_bits(plan, tmp_path):
    threads = torch.get_num_threads()
    for place in ("first", "second"):
        model = shipped.pretrain("toy", max_epochs=2, recipe=replace(DEFAULT, dim=16, d_ff=16))
        shipped.write_shipped(model, "toy", tmp_path / place, shipped.read_studies("toy"))
    for file in (tmp_path / "first").iterdir():
        assert file.read_bytes() == (tmp_path / "second" / file.name).read_bytes(), file.name
    assert torch.get_num_threads() == threads
    shipped_cells = shipped.read_labelled(tmp_path / "first", model.recipe.latent).embedding
    of_shipped = shipped.embed_labelled(ScFormer.load(tmp_path / "first"), shipped.read_studies("toy")).embedding
    assert np.array_equal(shipped_cells, np.float16(of_shipped)), "they are embedded by the weights of 16 bits that ship"


def test_labels_without_a_word_do_not_vote(plan, tmp_path):
    del shipped.PLANS["toy"].labels["two"]
    model = shipped.pretrain("toy", max_epochs=1, recipe=replace(DEFAULT, dim=16, d_ff=16))
    cells = shipped.embed_labelled(model, shipped.read_studies("toy"))
    assert set(cells.studies) == {"a"} and len(cells.labels) == (plan["one"].obs["batch"] == "batch_0").sum()


def test_a_weight_too_large_for_16_bits_is_refused(plan):
    model = shipped.pretrain("toy", max_epochs=1, recipe=replace(DEFAULT, dim=16, d_ff=16))
    with torch.no_grad():
        model.network.encoder.gene.weight[3, 0] = 1e6
    with pytest.raises(ValueError, match="encoder.gene.weight has values that 16 bits cannot hold"):
        shipped.half_precision(model)


def test_an_unknown_plan_is_refused():
    with pytest.raises(ValueError, match="no model 'human_blod' ships; did you mean 'human_blood'"):
        shipped.pretrain("human_blod")
    assert set(shipped_models()) == set(PLANS)


def test_labels_of_a_model_are_words_of_its_plan():
    words = shipped.common_labels("human_blood", "kang_pbmc", pd.Series(["pDC", "T activated"]))
    assert words.tolist() == ["plasmacytoid dendritic", None]
    assert shipped.common_labels("human_blood", "pbmc4k", pd.Series(["c1"])).tolist() == [None]
