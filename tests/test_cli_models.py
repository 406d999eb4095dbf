"""The command and the models that ship: embedded and labelled by name, cards read, slips refused."""
import json

import h5py
import numpy as np
import pytest
from test_shipped import new_cells

import scformer_nb as scf


@pytest.fixture(scope="module")
def blood(tmp_path_factory):
    "A file with the genes of human_blood."
    path = tmp_path_factory.mktemp("data") / "mine.h5ad"
    new_cells("human_blood").write_h5ad(path)
    return path


def test_a_file_is_embedded_and_labelled_by_name(scformer, blood, tmp_path):
    once, twice = tmp_path / "once.h5ad", tmp_path / "twice.h5ad"
    scformer("embed", "human_blood", blood, "--labels", "-o", once)
    scformer("embed", "human_blood", once, "--labels", "-o", twice)
    before, cells, again = (scf.load(path) for path in (blood, once, twice))
    table = scf.shipped.load_reference("human_blood").transform(before)
    assert list(cells.obs)[-2:] == ["scformer_label", "scformer_confidence"] and cells.obs.equals(again.obs)
    assert (cells.obs["scformer_label"].astype(str) == table["label"].astype(str)).all()
    assert np.array_equal(cells.obsm["X_scformer"], before.obsm["X_scformer"]) and (cells.X != before.X).nnz == 0


def test_without_labels_obs_is_as_it_was(scformer, blood, tmp_path):
    scformer("embed", "human_blood", blood, "-o", tmp_path / "new.h5ad")
    assert scf.load(tmp_path / "new.h5ad").obs.equals(scf.load(blood).obs)


def test_a_table_of_cells_that_cannot_take_columns_is_refused_first(scformer, blood, tmp_path):
    old = tmp_path / "old.h5ad"
    old.write_bytes(blood.read_bytes())
    with h5py.File(old, "r+") as file:
        del file["obs"]
        file["obs"] = np.array([(b"c%d" % i,) for i in range(40)], dtype=[("index", "S8")])
    said = scformer("embed", "human_blood", old, "--labels", "-o", tmp_path / "new.h5ad", code=2)[1]
    assert "obs of" in said and "adata.write_h5ad" in said and not (tmp_path / "new.h5ad").exists()


def test_models_are_listed_and_their_cards_shown(scformer):
    assert set(json.loads(scformer("models", "--json")[0])) == set(scf.shipped.PLANS)
    assert scformer("models", "human_pancreas")[0].startswith("# human_pancreas")
    assert "no model 'liver' ships; known are 'human_blood'" in scformer("models", "liver", code=2)[1]


def test_a_model_without_labelled_cells_says_so(scformer, blood, tmp_path):
    scf.ScFormer.load("human_blood").save(tmp_path / "mine")
    said = scformer("embed", tmp_path / "mine", blood, "--labels", "-o", tmp_path / "new.h5ad", code=2)[1]
    assert "has no labelled cells: leave --labels out" in said


def test_a_slip_in_the_name_says_which_there_are(scformer, blood, tmp_path):
    assert "did you mean 'human_blood'" in scformer("embed", "human_bloot", blood, "-o", tmp_path / "new.h5ad", code=2)[1]
    assert "did you mean 'human_blood'" in scformer("fit", blood, "--from", "human_bloot", "-o", tmp_path / "run", code=2)[1]
