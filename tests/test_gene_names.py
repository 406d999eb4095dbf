"""Gene names: translated on request, counted, and never at the price of a gene."""
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData

from scformer_nb import gene_names
from scformer_nb.gene_names import gene_table, name_table, orthologs, rename_genes, species_of

CD3D, MS4A1 = "ENSG00000167286", "ENSG00000156738"


def cells(names, **var):
    adata = AnnData(np.arange(2.0 * len(names), dtype=np.float32).reshape(2, -1))
    adata.var_names = names
    for column, values in var.items():
        adata.var[column] = values
    return adata


def renamed(adata, *args):
    with pytest.warns(UserWarning, match="genes were named by"):
        return rename_genes(adata, *args)


@pytest.mark.parametrize(("names", "species"), [(["CD3D", "C1orf43", "MT-ND1"], "human"), (["Cd3d", "mt-Nd1", "H2-K1"], "mouse"),
    ([CD3D, MS4A1 + ".4"], "human"), (["ENSMUSG00000032094"], "mouse"), (["GRCh38_CD3D", "GRCh38_MS4A1"], "human"),
    (["1", "2"], None), ([], None)])
def test_the_species_is_read_off_the_names(names, species):
    assert species_of(names) == species


@pytest.mark.parametrize("to", ["symbol", "ensembl"])
@pytest.mark.parametrize("species", ["human", "mouse"])
def test_a_name_leads_to_one_gene(species, to):
    table = name_table(species, to)
    assert table.index.is_unique and table.notna().all() and len(table) > 20_000
    assert orthologs(species).is_unique and orthologs(species).index.is_unique


def test_the_values_stay_with_their_genes():
    adata = cells([MS4A1, "ENSG00000000000", CD3D + ".12"])
    out = renamed(adata, "symbol")
    assert list(out.var_names) == ["MS4A1", "ENSG00000000000", "CD3D"] and list(out.var["name_before"]) == list(adata.var_names)
    assert np.array_equal(out.X, adata.X) and "name_before" not in adata.var


def test_two_genes_of_one_name_keep_theirs():
    out = renamed(cells([CD3D, MS4A1, "x"], gene_symbols=["A", "A", "B"]), "symbol")
    assert list(out.var_names) == [CD3D, MS4A1, "B"]
    out = renamed(cells([CD3D, "MS4A1", MS4A1], gene_symbols=["A", "", "MS4A1"]), "symbol")
    assert out.var_names.is_unique and list(out.var_names) == ["A", "MS4A1", MS4A1]


@pytest.mark.parametrize("nothing", ["", None, np.nan])
def test_an_empty_entry_of_var_keeps_the_name(nothing):
    assert list(renamed(cells([CD3D, MS4A1], gene_symbols=["A", nothing]), "symbol").var_names) in (["A", MS4A1], ["CD3D", "MS4A1"])


def test_a_column_of_the_other_kind_is_not_taken():
    assert list(renamed(cells([CD3D, MS4A1], gene_symbols=[CD3D, MS4A1]), "symbol").var_names) == ["CD3D", "MS4A1"]


@pytest.mark.parametrize(("names", "args", "message"), [(["a1", "b2"], ["ensembl"], "tell no species"),
    ([], ["ensembl"], "there are no genes"),
    (["CD3D"], ["refseq"], "symbol, ensembl"),
    (["CD3D"], ["ensembl", "pig"], "human, mouse"), (["CD3D"], ["ensembl", "mouse"], "none of 1 gene names was found")])
def test_what_cannot_be_translated_is_refused(names, args, message):
    with pytest.raises(ValueError, match=message):
        rename_genes(cells(names), *args)


def test_without_the_table_the_way_out_is_named(monkeypatch):
    gene_table.cache_clear()
    monkeypatch.setattr(gene_names, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install -c constraints.txt '.\[genes\]'"):
        rename_genes(cells([CD3D]), "symbol")
    gene_table.cache_clear()


def test_genes_that_share_an_ortholog_have_none(monkeypatch):
    rows = [("A", "a", "ortholog_one2one"), ("B", "b", "ortholog_one2one"), ("C", "b", "ortholog_one2one"),
        ("D", "d", "ortholog_one2many"), ("E", "e", "ortholog_one2one"), ("E", "f", "ortholog_one2one")]
    monkeypatch.setattr(gene_names, "gene_table", lambda species: pd.DataFrame(rows, columns=["symbol", "other_symbol", "homology"]))
    assert orthologs("human").to_dict() == {"A": "a"}
