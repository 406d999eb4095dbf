"""Checks: what the page 01b_data cannot hold."""
import subprocess
import sys

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from anndata import AnnData
from toy import cells

from scformer_nb import data
from scformer_nb.io import speaking_shell
from scformer_nb.simulate import simulate

# ---- bad input

def dense(value):
    X = simulate(60, 40, 2, 2).X.toarray()
    X[3, 5] = value
    return X


def batch(values):
    a = cells()
    a.obs["batch"] = values
    return a


def typed(**columns):
    a = cells()
    a.var = a.var.assign(**columns)
    return a


def broken_csr(indices=None, indptr=None):
    X = cells().X
    if indices is not None:
        X.indices[7] = indices
    if indptr is not None:
        X.indptr[30] = indptr
    return X


COUNTS = cells().X
ERRORS = {
    "not an AnnData": (lambda: data.check_adata(np.ones((3, 3))), "AnnData is needed, not ndarray"),
    "no cells": (lambda: data.check_adata(cells()[:0].copy()), "empty: 0 cells x 40 genes"),
    "no genes": (lambda: data.check_adata(cells()[:, :0].copy()), "empty: 60 cells x 0 genes"),
    "no X": (lambda: data.check_adata(cells(X=None)), "X is empty: pass layer="),
    "zeros only": (lambda: data.check_adata(cells(X=COUNTS * 0)), "zeros only"),
    "logged": (lambda: data.check_adata(cells(X=COUNTS.log1p())), "as in logged data: pass layer= with the name"),
    "logged, a layer": (lambda: data.check_adata(cells(X=COUNTS.log1p(), layers={"raw": COUNTS})), "pass layer='raw', it looks"),
    "logged, .raw": (lambda: data.check_adata(cells(raw=lambda a: a.copy(), X=COUNTS.log1p())), "pass adata.raw.to_adata"),
    "logged layer": (lambda: data.check_adata(cells(layers={"log": COUNTS.log1p()}), layer="log"), "pass layer=None, it looks like counts"),
    "scaled": (lambda: data.check_adata(cells(X=COUNTS.toarray() - 1)), "are negative, as in scaled data"),
    "one negative": (lambda: data.check_adata(cells(X=dense(-1))), "1 of .* stored values are negative"),
    "NaN": (lambda: data.check_adata(cells(X=dense(np.nan))), "1 of .* stored values are NaN"),
    "infinite": (lambda: data.check_adata(cells(X=dense(np.inf))), "1 of .* stored values are infinite"),
    "text": (lambda: data.check_adata(cells(X=COUNTS.toarray().astype(str))), "are not counts; store numbers"),
    "no such layer": (lambda: data.check_adata(cells(layers={"counts": COUNTS}), layer="count"), "did you mean 'counts'"),
    "no layers": (lambda: data.check_adata(cells(), layer="counts"), "; there are none"),
    "genes twice": (lambda: data.check_adata(cells(var_names=["A"] * 40)), "39 of 40 gene names are not unique; call adata.var_names_make"),
    "batch_key missing": (lambda: data.check_adata(cells(), batch_key="bach"), "did you mean 'batch'"),
    "batch_key NaN": (lambda: data.check_adata(batch([np.nan] * 2 + ["x"] * 58), batch_key="batch"), "missing for 2 of 60 cells"),
    "label_key missing": (lambda: data.check_adata(cells(), label_key="cell_typ"), "did you mean 'cell_type'"),
    "label_key NaN": (lambda: data.check_adata(batch([None] * 2 + ["x"] * 58), label_key="batch"), "missing for 2 of 60 cells"),
    "peaks only": (lambda: data.check_adata(typed(feature_types=["Peaks"] * 40)), r"var\['feature_types'\] holds no .* 40 'Peaks'"),
    "antibodies only": (lambda: data.check_adata(typed(modality=["ADT"] * 40)), r"var\['modality'\] holds no 'Gene Expression'"),
    "1e30": (lambda: data.check_adata(cells(X=dense(1e30))), "1 of .* stored values are above 2,147,483,647"),
    "beyond float32": (lambda: data.check_adata(cells(X=dense(1e300).astype(np.float64))), "1 of .* stored values are infinite"),
    "index out of range": (lambda: data.check_adata(cells(X=broken_csr(indices=4000))), "X is a damaged sparse matrix"),
    "index negative": (lambda: data.check_adata(cells(X=broken_csr(indices=-3))), "X is a damaged sparse matrix"),
    "index 2e9": (lambda: data.check_adata(cells(X=broken_csr(indices=2_000_000_000))), "X is a damaged sparse matrix"),
    "indptr falls": (lambda: data.check_adata(cells(X=broken_csr(indptr=0))), "X is a damaged sparse matrix"),
    "damaged layer": (lambda: data.check_adata(cells(layers={"c": broken_csr(indices=4000)}), layer="c"), r"layers\['c'\] is a damaged"),
    "counts per million": (lambda: data.check_adata(cells(X=sp.diags(1e6 / COUNTS.sum(1).A1) @ COUNTS)), "every cell sums to 1,000,000"),
}
WARNINGS = {
    "float counts": (lambda: data.check_adata(cells(X=COUNTS * 1.37)), "counts in X are not integers"),
    "cells twice": (lambda: data.check_adata(cells(obs_names=["A"] * 3 + [f"c{i}" for i in range(57)])), "2 of 60 cell names"),
    "batch_key constant": (lambda: data.check_adata(batch("x"), batch_key="batch"), "treated as no batch"),
    "batch of one cell": (lambda: data.check_adata(batch(["y"] + ["x"] * 59), batch_key="batch"), "1 of 2 batches .* one cell"),
}


# ---- genes among other features

def test_only_genes_are_kept_and_the_rest_is_counted():
    kinds = ["Gene Expression"] * 25 + ["Peaks"] * 10 + ["Antibody Capture"] * 5
    with pytest.warns(UserWarning, match="15 of 40 features are not genes by var.'feature_types'. .*10 'Peaks', 5 'Antibody Capture'"):
        out = data.check_adata(typed(feature_types=kinds))
    assert out.var_names.tolist() == cells().var_names[:25].tolist() and (out.X != COUNTS[:, :25]).nnz == 0
    assert set(out.var["feature_types"]) == {"Gene Expression"}


@pytest.mark.parametrize("columns", [{"feature_types": "Gene Expression"}, {"feature_types": "GEX"}, {"modality": "rna"},
                                     {"feature_type": ["protein_coding", "lncRNA"] * 20}, {"modality": "plate"}])
def test_columns_that_leave_nothing_out(columns, recwarn):
    assert data.check_adata(typed(**columns)).n_vars == 40
    assert not [w for w in recwarn if issubclass(w.category, UserWarning)]


def test_antibodies_may_be_no_counts_and_share_the_name_of_a_gene():
    X, names = COUNTS.toarray(), [*cells().var_names[:39], cells().var_names[0]]
    X[:, 39] = -0.5
    a = AnnData(X, obs=cells().obs, var=pd.DataFrame({"feature_types": ["Gene Expression"] * 39 + ["Antibody Capture"]}, index=names))
    with pytest.warns(UserWarning, match="1 of 40 features"):
        assert data.check_adata(a).n_vars == 39


# ---- batches that look like numbers

@pytest.mark.parametrize("values", [np.arange(60) % 2, (np.arange(60) % 2).astype(float), pd.Categorical((np.arange(60) % 2).astype(float)),
                                    (np.arange(60) % 2).astype(str)])
def test_one_and_one_point_zero_are_one_batch(values):
    assert data.check_adata(batch(values), batch_key="batch").obs["batch"].cat.categories.tolist() == ["0", "1"]


def test_levels_that_no_cell_has_are_dropped():
    values = pd.Categorical(["a", "b"] * 30, categories=["a", "b", "never"])
    assert data.check_adata(batch(values), batch_key="batch").obs["batch"].cat.categories.tolist() == ["a", "b"]


def test_names_seen_stand_in_the_messages():
    with pytest.raises(ValueError, match="missing for 1 of 60 cells .others have '1', '2'"):
        data.check_adata(batch([np.nan] + [1, 2] * 29 + [1]), batch_key="batch")
    with pytest.warns(UserWarning, match="1 of 2 batches in 'batch' have one cell only .'7'"):
        data.check_adata(batch([7.0] + [1.0] * 59), batch_key="batch")


@pytest.mark.parametrize("case", ERRORS)
@pytest.mark.filterwarnings("ignore")
def test_bad_input_is_a_clear_error(case):
    run, message = ERRORS[case]
    with pytest.raises(ValueError, match=message):
        run()


@pytest.mark.parametrize("case", WARNINGS)
@pytest.mark.filterwarnings("ignore::anndata.ImplicitModificationWarning")
@pytest.mark.filterwarnings("ignore:Observation names are not unique")
def test_odd_input_is_a_counted_warning(case):
    run, message = WARNINGS[case]
    with pytest.warns(UserWarning, match=message):
        run()


@pytest.mark.parametrize("form", [COUNTS.toarray(), COUNTS.tocsc(), COUNTS.astype(np.int64), sp.csr_array(COUNTS), COUNTS.astype(float)],
                         ids=["dense", "CSC", "int64", "csr_array", "float64"])
def test_every_form_of_counts_gives_the_same(form, tmp_path, recwarn):
    given = cells(X=form)
    given.write_h5ad(tmp_path / "x.h5ad")
    backed = anndata.read_h5ad(tmp_path / "x.h5ad", backed="r")
    for a in (given, backed, given[:, :]):
        checked = data.check_adata(a, batch_key="batch", label_key="cell_type")
        assert sp.isspmatrix_csr(checked.X) and checked.X.dtype == np.float32 and checked.X.has_sorted_indices
        assert (checked.X != COUNTS).nnz == 0 and checked.obs.equals(given.obs)
    backed.file.close()
    assert not [w for w in recwarn if issubclass(w.category, UserWarning)]


def test_explicit_zeros_and_unsorted_indices_are_put_right():
    X = sp.csr_matrix((np.array([3.0, 0, 1]), np.array([2, 0, 1]), np.array([0, 3, 3])), shape=(2, 3))
    checked = data.check_adata(AnnData(X)).X
    assert checked.indices.tolist() == [1, 2] and checked.data.tolist() == [1, 3]


def test_check_never_modifies_its_input():
    a = cells(layers={"log": COUNTS.log1p()})
    a.obs["batch"] = np.arange(60) % 3
    before = a.copy()
    out = data.check_adata(a, batch_key="batch")
    out.X.data[:], out.obs["new"], out.var["new"] = 7, 1, 1
    assert (a.X != before.X).nnz == 0 and a.obs.equals(before.obs) and a.var.equals(before.var)
    assert out.obs["batch"].tolist() == [str(i % 3) for i in range(60)]


def test_way_out_is_worded_for_the_shell():
    a = cells(X=COUNTS.log1p(), layers={"raw": COUNTS})
    with speaking_shell(), pytest.raises(ValueError, match=r"pass --layer raw \(to run: -p layer=raw\), it looks like counts"):
        data.check_adata(a)


def test_import_is_light():
    code = "import sys, scformer_nb.data; print([m for m in ('scanpy', 'torch', 'rdata', 'pooch', 'matplotlib') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


