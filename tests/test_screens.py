"""Screens: names of perturbations as users write them, gene sets of another species, splits that must not leak."""
import warnings

import numpy as np
import pandas as pd
import pytest

from scformer_nb.screens import (
    CONTROL_NAMES,
    check_gene_sets,
    check_split,
    is_control,
    parse_condition,
    prepare_screen,
    read_conditions,
    split_perturbations,
    training_cells,
)


def renamed(adata, names):
    out = adata.copy()
    out.obs["condition"] = out.obs["condition"].astype(str).replace(names)
    return out


def same(prepared, data):
    return (prepared.obs.condition.astype(str) == data.obs.condition.astype(str)).all() and (prepared.X != data.X).nnz == 0


CONTROLS = [*sorted(CONTROL_NAMES), "CTRL", "Control", "NT", "non-targeting", "Non_Targeting", "negative control", "safe-targeting", "WT"]


@pytest.mark.parametrize("name", CONTROLS)
def test_control_by_all_its_names(adata, data, name):
    assert is_control(name) and same(prepare_screen(renamed(adata, {"control": name}), batch_key="batch"), data)
    assert parse_condition(f"KLF1+{name}") == parse_condition(f"{name}+KLF1") == ("KLF1",)


@pytest.mark.parametrize("name", ["WT1", "NTS", "NEGR1", "MOCS1", "CTRL1P", "GFP", "AAVS1", "VEH", "nan"])
def test_genes_are_not_control(name):
    assert not is_control(name)


def test_control_guides_with_numbers(adata, data):
    numbered = renamed(adata, {"control": "NegCtrl0"})
    rows = np.flatnonzero(numbered.obs.condition == "NegCtrl0")
    numbered.obs.iloc[rows[::2], numbered.obs.columns.get_loc("condition")] = "NegCtrl10_NegCtrl3"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(prepare_screen(numbered, batch_key="batch"), data)


def test_two_kinds_of_control_are_said(adata):
    mixed = renamed(adata, {"control": "vehicle", "gene0": "WT"})
    with pytest.warns(UserWarning, match="control cells go by 2 names: 'WT', 'vehicle'; all count as control"):
        prepare_screen(mixed)


@pytest.mark.parametrize("sign", ["_", "|", ",", ";", "&", " & ", " + "])
def test_doubles_with_other_signs_are_read_and_said(adata, data, sign):
    doubles = {c: c.replace("+", sign) for c in adata.obs.condition.unique() if "+" in c}
    other = renamed(adata, doubles)
    if "+" in sign:
        assert same(prepare_screen(other, batch_key="batch"), data)
    else:
        with pytest.warns(UserWarning, match=f"{len(doubles)} perturbations are read as two genes: 'gene"):
            assert same(prepare_screen(other, batch_key="batch"), data)


def test_genes_that_are_only_perturbed_are_known_too():
    obs = pd.DataFrame({"condition": ["ctrl", "FOO", "BAR+ctrl", "FOO_BAR", "HLA-A"]})
    with pytest.warns(UserWarning, match="'FOO_BAR' as BAR"):
        assert read_conditions(obs, "condition").tolist() == ["control", "FOO", "BAR", "BAR+FOO", "HLA-A"]


@pytest.mark.parametrize("name, said", [
    ("gene0_OTHER", "may be one gene or two"), ("gene0-gene1", "may be one gene or two"), ("FOO_BAR", "may be one gene or two"),
    ("gene0 gene1", "may be one gene or two"), ("gene0+gene1+gene2", "one or two genes"), ("gene0+gene0", "one or two genes"),
    ("+gene0", "one or two genes"), ("gene0_+_gene1+", "may be one gene or two"), ("gene0_g1", "a guide of 'gene0'"),
    ("gene0-2", "a guide of 'gene0'"), ("sgGENE0", "a guide of 'GENE0'"), ("gene0_sg2+gene1", "a guide of 'gene0'")])
def test_what_is_unclear_is_refused_by_name(adata, name, said):
    with pytest.raises(ValueError, match=said) as e:
        prepare_screen(renamed(adata, {"gene0": name}))
    assert any(repr(part) in str(e.value) for part in (name, *name.split("+")))


@pytest.mark.parametrize("name", ["A_B", "A-B", "sgA", "A_g1", "A_1"])
def test_a_gene_with_a_sign_in_its_name_is_that_gene(name):
    assert parse_condition(name, {"A", "B", name}) == (name,)
    assert parse_condition(f"{name}+ctrl", {"A", "B", name}) == (name,)


def test_a_name_that_can_be_cut_twice_is_refused():
    with pytest.raises(ValueError, match="may be one gene or two"):
        parse_condition("A_B_C", {"A", "B_C", "A_B", "C"})
    assert parse_condition("A_B_C", {"A", "B_C"}) == ("A", "B_C")


def test_a_gene_called_like_control_is_refused():
    with pytest.raises(ValueError, match="'NT' is a gene of the data and a name of control"):
        parse_condition("NT", {"NT", "A"})


@pytest.mark.parametrize("missing", ["nan", "NaN", "", " ", "NA", "None", "<NA>", "unknown", None, np.nan])
def test_missing_names_are_counted(adata, missing):
    other = adata.copy()
    other.obs["condition"] = other.obs["condition"].astype(object)
    other.obs.loc[other.obs.condition == "gene0", "condition"] = missing
    with pytest.raises(ValueError, match=r"12 of \d+ cells have no perturbation in obs\['condition'\]"):
        prepare_screen(other)


def test_no_control_cells(adata):
    with pytest.raises(ValueError, match=r"no control cells; name those .* It has 'GFP', 'gene0'"):
        prepare_screen(renamed(adata, {"control": "GFP"}))
    with pytest.raises(ValueError, match="condition_key='conditions' is not a column of adata.obs; did you mean 'condition'"):
        prepare_screen(adata, condition_key="conditions")


def test_unmeasured_genes_are_named(adata):
    other = renamed(adata, {"gene0": "GFP", "gene1": "Gene1"})
    with pytest.warns(UserWarning, match=r"2 of 10 perturbed genes are not measured: 'GFP', 'Gene1' \(did you mean 'gene1'\?\)"):
        prepare_screen(other)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepare_screen(other, targets=["GFP", "Gene1"])


def test_many_unmeasured_genes_are_counted(adata):
    other = adata[:, 8:].copy()
    with pytest.warns(UserWarning, match="8 of 8 perturbed genes are not measured: 'gene0'.* and 3 more"):
        prepare_screen(other)


def test_small_perturbations_are_left_out_and_counted(adata):
    keep = (adata.obs.condition != "gene0").to_numpy()
    keep[np.flatnonzero(~keep)[:4]] = True
    with pytest.warns(UserWarning, match="1 of 18 perturbations have fewer than 5 cells and are left out: gene0"):
        assert "gene0" not in set(prepare_screen(adata[keep].copy()).obs.condition)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepare_screen(adata)


@pytest.mark.parametrize("sets, said", [
    (["KLF1", "CBL", "TP53"], r"name 0 of 3 perturbed genes \(3 when case is ignored: sets of another species\?\)"),
    (["Klf1", "CBL", "TP53"], r"name 1 of 3 perturbed genes \(3 when case is ignored"),
    (["ENSG00000105610"], r"name 0 of 3 perturbed genes \(names of another kind\?\)")])
def test_gene_sets_of_another_species(sets, said):
    with pytest.raises(ValueError, match=said):
        check_gene_sets({"set": sets}, ["Klf1", "Cbl", "Tp53"])


def test_gene_sets_of_some_genes_are_enough():
    assert check_gene_sets({"set": ["Klf1"]}, ["Klf1", "Cbl", "Tp53"]) is None


@pytest.mark.parametrize("test", [["A+B"], ["B+A"], ["A+ctrl"], ["CTRL+A", "C"]])
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


def test_a_split_knows_doubles_in_either_order(data):
    names = list(data.obs.condition.unique())
    turned = ["+".join(reversed(c.split("+"))) for c in names]
    assert turned != names and split_perturbations(turned, seed=1).equals(split_perturbations(names, seed=1))
