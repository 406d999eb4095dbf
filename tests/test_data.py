"""Checks and preprocessing: what the page 01_data cannot hold."""
import os
import subprocess
import sys
import tracemalloc

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import warm
from anndata import AnnData

from scformer_nb import data
from scformer_nb.datasets import load, open_cells
from scformer_nb.io import speaking_shell
from scformer_nb.simulate import simulate

# ---- bad input

def cells(**how):
    a = simulate(60, 40, 2, 2)
    for k, v in how.items():
        setattr(a, k, v(a) if callable(v) else v)
    return a


def dense(value):
    X = simulate(60, 40, 2, 2).X.toarray()
    X[3, 5] = value
    return X


def batch(values):
    a = cells()
    a.obs["batch"] = values
    return a


def sized(values):
    a = cells()
    a.obs["library_size"] = values
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
    "one cell": (lambda: data.preprocess(cells()[:1].copy()), "1 cells x 40 genes"),
    "one gene": (lambda: data.preprocess(cells()[:, :1].copy()), "60 cells x 1 genes"),
    "n_hvg 0": (lambda: data.preprocess(cells(), n_hvg=0), "n_hvg=0"),
    "min_cells too high": (lambda: data.preprocess(cells(), min_cells=100), "lower min_cells"),
    "library_size too small": (lambda: data.preprocess(cells(obs=lambda a: a.obs.assign(library_size=1.0))), "sum of counts in 60"),
    "library_size text": (lambda: data.preprocess(sized(["many"] * 60)),
                          r"obs\['library_size'\] is not a number in 60 .*'many'.*delete it"),
    "library_size NaN": (lambda: data.preprocess(sized([np.nan] + [1e6] * 59)), r"obs\['library_size'\] is not a number in 1 of 60"),
    "library_size zero": (lambda: data.preprocess(sized([0.0] + [1e6] * 59)), r"obs\['library_size'\] is below the sum of counts in 1 "),
    "library_size infinite": (lambda: data.preprocess(sized([np.inf] * 60)), r"obs\['library_size'\] is infinite in 60 of 60"),
    "library_size categories": (lambda: data.preprocess(sized(pd.Categorical(["a"] * 60))), r"obs\['library_size'\] is not a number"),
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
    "cells without HVG": (lambda: data.preprocess(cells(X=sp.diags([0.0] * 3 + [1.0] * 57) @ COUNTS)), "3 of 60 cells express none"),
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


# ---- counts with fractions, logarithms, and both in one

DEEP = simulate(300, 300, 2, 2, depth=2, seed=5)


def to_total(X, total=1e4):
    return sp.csr_matrix(sp.diags(total / X.sum(1).A1) @ X)


def fractional(kind):
    rng, X = np.random.default_rng(0), DEEP.X.copy()
    if kind == "EM, small":
        X.data = np.minimum(X.data, 15)
        some = rng.random(X.nnz) < 0.3
        X.data[some] += rng.random(some.sum()).round(2)
    elif kind == "one per cent":
        X.data = np.minimum(X.data, 18)
        X.data[rng.random(X.nnz) < 0.01] += 0.37
    elif kind == "ambient, small":  # every value a little below a whole number
        X.data = np.minimum(X.data, 15) - rng.uniform(0.001, 0.15, X.nnz)
    elif kind == "UMI collisions":
        X.data = -4096 * np.log(1 - np.minimum(X.data, 4000) / 4096)
    elif kind == "one value":
        X.data[10] = 2.5
    return X.astype(np.float32)


@pytest.mark.parametrize("kind", ["EM, small", "one per cent", "ambient, small", "UMI collisions", "one value"])
@pytest.mark.parametrize("batch_key", [None, "batch"])
def test_counts_with_fractions_pass_with_a_warning(kind, batch_key):
    a = AnnData(fractional(kind), obs=DEEP.obs, var=DEEP.var)
    with pytest.warns(UserWarning, match="counts in X are not integers; taken as they are"):
        assert (data.check_adata(a, batch_key=batch_key).X != a.X).nnz == 0


def logged(kind):
    X = to_total(DEEP.X)
    if kind == "log2":
        X.data = np.log2(1 + X.data)
    elif kind == "log10":
        X.data = np.log10(1 + X.data)
    elif kind == "log2 of counts":  # three quarters of its values are whole
        X = DEEP.X.copy()
        X.data = np.log2(1 + X.data)
    elif kind == "log of TPM":  # divided by gene length first
        X = to_total(DEEP.X @ sp.diags(1 / np.random.default_rng(0).lognormal(7, 0.7, DEEP.n_vars)), 1e6).log1p()
    elif kind == "log1p":
        X = X.log1p()
    return X.tocsr().astype(np.float32)


LOGS = ["log1p", "log2", "log10", "log2 of counts", "log of TPM"]


@pytest.mark.parametrize("kind", LOGS)
@pytest.mark.parametrize("batch_key", [None, "batch"])
def test_logarithms_are_refused(kind, batch_key):
    with pytest.raises(ValueError, match="as in logged data"):
        data.check_adata(AnnData(logged(kind), obs=DEEP.obs, var=DEEP.var), batch_key=batch_key)


@pytest.mark.parametrize("kind", [*LOGS, "1e4"])
@pytest.mark.parametrize("batch_key", [None, "study"])
def test_a_logged_study_among_counts_is_named(kind, batch_key):
    first = np.arange(300) < 225
    X = sp.vstack([DEEP.X[first], logged(kind)[~first]]).tocsr()
    a = AnnData(X, obs=DEEP.obs.assign(study=np.where(first, "kept", "treated"), plate=np.arange(300) % 3), var=DEEP.var)
    word = "normalised" if kind == "1e4" else "logged"
    with pytest.raises(ValueError, match=rf"of 300 random cells \((study|batch) 'treated'\) hold values as in {word} data: pass layer="):
        data.check_adata(a, batch_key=batch_key)


def test_logged_cells_that_no_column_names_are_counted():
    odd = np.arange(300) % 10 == 0
    X = sp.csr_matrix(np.where(odd[:, None], logged("log1p").toarray(), DEEP.X.toarray()))
    with pytest.raises(ValueError, match="30 of 300 random cells hold values as in logged data"):
        data.check_adata(AnnData(X, obs=DEEP.obs, var=DEEP.var))


@pytest.mark.parametrize("form", [sp.csr_matrix, sp.csc_matrix, np.asarray], ids=["csr", "csc", "dense"])
def test_sampled_cells_are_random_and_hold_something(form, tmp_path):
    X = DEEP.X.toarray()
    X[:150] = 0
    AnnData(form(X), obs=DEEP.obs, layers={"log": form(np.log1p(X))}).write_h5ad(tmp_path / "x.h5ad")
    backed = anndata.read_h5ad(tmp_path / "x.h5ad", backed="r")
    whole = load(tmp_path / "x.h5ad")
    for layer in (None, "log"):
        some = data.sample_cells(backed, 40, seed=1, layer=layer)
        assert some.shape == (40, 300) and not some.isbacked and (np.asarray(some.X.sum(1)).ravel() > 0).all()
        assert some.obs_names.equals(data.sample_cells(whole, 40, seed=1, layer=layer).obs_names)
    assert not some.obs_names.equals(data.sample_cells(backed, 40, seed=2).obs_names)
    assert data.sample_cells(backed, 999).n_obs == 150
    backed.file.close()


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


# ---- preprocessing

@pytest.mark.parametrize("batch_key", [None, "batch"])
def test_preprocess_selects_exactly_and_keeps_counts(batch_key):
    a = simulate(400, 300, 3, 2)
    before = a.copy()
    out = data.preprocess(a, n_hvg=77, batch_key=batch_key)
    assert out.n_vars == 77 and out.uns["hvg"] == {"flavor": "seurat_v3", "n_hvg": 77}
    assert (out.layers["counts"] != a[:, out.var_names].X).nnz == 0 and (a.X != before.X).nnz == 0
    total = np.asarray(a.X.sum(1)).ravel()
    assert abs(np.expm1(out.X).multiply(total[:, None] / 1e4) - out.layers["counts"]).max() < 1e-2
    assert sp.isspmatrix_csr(out.X) and sp.isspmatrix_csr(out.layers["counts"]) and out.X.dtype == np.float32
    assert out.var_names.tolist() == [g for g in a.var_names if g in set(out.var_names)]  # order kept


def test_fallback_is_recorded_and_leaves_log_values():
    out = data.preprocess(simulate(300, 30, 2, 2), n_hvg=10, batch_key="batch")
    assert out.uns["hvg"] == {"flavor": "seurat", "n_hvg": 10}
    total_all = simulate(300, 30, 2, 2).X.sum(1).A1
    assert abs(np.expm1(out.X).multiply(total_all[:, None] / 1e4) - out.layers["counts"]).max() < 1e-2


def test_selection_within_batches_ignores_batch_effects():
    a = simulate(2000, 300, 3, 2, batch_sd=0)
    b = (a.obs["batch"] == "batch_1").to_numpy()
    plain = np.flatnonzero(a.var["marker_of"] == "none")[:20]
    X = a.X.tolil()
    for j in plain:  # twenty genes that differ between the batches and in nothing else
        X[np.flatnonzero(b), j] = X[np.flatnonzero(b), j].toarray() * 10
    a.X = X.tocsr()
    share = [a.var_names[plain].isin(data.preprocess(a, n_hvg=60, batch_key=k).var_names).mean() for k in (None, "batch")]
    assert share[0] > 0.7 and share[1] < share[0] / 2, share


@pytest.mark.slow
def test_genes_too_few_for_loess_do_not_kill_the_process():
    code = ("from scformer_nb import data; from scformer_nb.simulate import simulate; import warnings; warnings.simplefilter('ignore')\n"
            "for n, g in ((300, 3), (2, 200), (60, 20)):\n"
            "    print(data.preprocess(simulate(n, g, 1, 1), n_hvg=2, min_cells=1).uns['hvg'])")
    done = warm.run([sys.executable, "-c", code])
    assert done.returncode == 0 and done.stdout.count("'seurat'") == 3, done.stderr


@pytest.mark.filterwarnings("ignore:.* of the .* genes kept")
def test_nothing_densifies():
    X = sp.random(10_000, 2_000, 0.01, "csr", np.float32, 0, lambda n: np.random.default_rng(0).poisson(2, n) + 1)
    adata = AnnData(X, obs=pd.DataFrame({"batch": np.arange(10_000) % 2}, index=[str(i) for i in range(10_000)]))
    data.preprocess(adata[:5000].copy(), n_hvg=100, batch_key="batch")  # imports and compiles
    tracemalloc.start()
    data.preprocess(adata, n_hvg=1000, batch_key="batch")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10_000 * 2_000 * 4 / 4, f"{peak / 1e6:.0f} MB, the dense matrix would take 80 MB"


# ---- in parts

ATLAS = simulate(900, 300, 3, 3, seed=1)


@pytest.fixture
def small_parts(monkeypatch):
    "As if 900 cells were an atlas."
    monkeypatch.setattr(data, "PART", 100)
    monkeypatch.setattr(data, "LARGE", 300)


@pytest.mark.parametrize("form", ["CSR", "dense", "CSC", "CSR in a layer", "dense in a layer", "in memory"])
@pytest.mark.filterwarnings("ignore:X is stored by columns .CSC.. it is read whole; stored by rows")
def test_an_atlas_gives_the_counts_of_genes_chosen_on_a_sample(form, small_parts, tmp_path):
    rows = data.sample_rows(ATLAS.obs["batch"], 300)
    chosen = data.preprocess(ATLAS[rows], n_hvg=60, batch_key="batch", min_cells=0)
    X = {"CSC": ATLAS.X.tocsc(), "dens": ATLAS.X.toarray()}.get(form[:4].strip(), ATLAS.X)
    layer = "raw" if "layer" in form else None
    a = AnnData(ATLAS.X.log1p() if layer else X, obs=ATLAS.obs, var=ATLAS.var, layers={"raw": X} if layer else None)
    a.write_h5ad(tmp_path / "x.h5ad")
    with open_cells(a if form == "in memory" else tmp_path / "x.h5ad") as source:
        out = data.preprocess(source, n_hvg=60, batch_key="batch", layer=layer)
    assert out.uns["hvg"] == {"flavor": "seurat_v3", "n_hvg": 60, "chosen_on": 300}
    assert out.var_names.equals(chosen.var_names) and out.obs.equals(ATLAS.obs)
    assert (out.layers["counts"] != ATLAS[:, out.var_names].X).nnz == 0
    assert abs(out.X - data.log_normalise(out.layers["counts"], ATLAS.X.sum(1).A1)).max() < 1e-6


def test_the_sample_is_chosen_from_all_batches():
    batch = pd.Series(["large"] * 5000 + ["small"] * 80 + ["lone"])
    drawn = batch.iloc[data.sample_rows(batch, 1000)]
    assert drawn.value_counts().to_dict() == {"large": 919, "small": 80, "lone": 1}
    assert data.sample_rows(batch, 9999).tolist() == list(range(5081))


IN_A_PART = {
    "NaN": (np.nan, "among cells 201 to 300 1 of .* values are NaN"),
    "negative": (-1, "among cells 201 to 300 1 of .* are negative"),
}


@pytest.mark.parametrize("case", IN_A_PART)
def test_a_bad_value_deep_in_an_atlas_is_placed(case, small_parts):
    value, message = IN_A_PART[case]
    a = ATLAS.copy()
    a.X.data[a.X.indptr[250]] = value
    with pytest.raises(ValueError, match=f"X must hold raw counts, but {message}"):
        data.preprocess(a)


def test_odd_values_of_an_atlas_are_counted_once(small_parts, recwarn):
    a = ATLAS.copy()
    a.X.data = a.X.data * 1.37
    data.read_hvg(a, n_hvg=60)
    said, = (str(w.message) for w in recwarn if w.category is UserWarning)
    assert f" of {a.X.nnz:,} counts in X are not integers; taken as they are" in said


def test_a_logged_study_in_an_atlas_is_found(small_parts):
    X = sp.vstack([ATLAS.X[:500], to_total(ATLAS.X[500:]).log1p()]).tocsr()
    with pytest.raises(ValueError, match="among cells 501 to 600 it holds small fractions, as in logged data"):
        data.preprocess(AnnData(X, obs=ATLAS.obs, var=ATLAS.var))


def test_empty_parts_are_no_error_and_an_empty_atlas_is(small_parts):
    empty = np.arange(900) // 300 == 1
    assert data.read_hvg(AnnData(sp.diags(~empty * 1.0) @ ATLAS.X, obs=ATLAS.obs), n_hvg=300)[0].n_obs == 900
    with pytest.raises(ValueError, match="it holds zeros only"):
        data.read_hvg(AnnData(ATLAS.X * 0, obs=ATLAS.obs))


def test_a_source_that_changes_while_it_is_read(small_parts, monkeypatch):
    a, first = ATLAS.copy(), data.read_overview

    def change_after(*args):
        seen = first(*args)
        a.X.data[-1] += 1
        return seen

    monkeypatch.setattr(data, "read_overview", change_after)
    with pytest.raises(ValueError, match="X has changed while it was read: cells 801 to 900 are others now"):
        data.preprocess(a, n_hvg=60)


def test_a_file_that_ends_early(small_parts, tmp_path):
    ATLAS.write_h5ad(tmp_path / "x.h5ad")
    with open_cells(tmp_path / "x.h5ad") as source:
        os.truncate(tmp_path / "x.h5ad", 60_000)
        with pytest.raises(ValueError, match="cannot be read .*: the file may end early"):
            data.preprocess(source)
    with pytest.raises(ValueError, match="cannot be read as .h5ad"), open_cells(tmp_path / "x.h5ad"):
        pass


@pytest.mark.parametrize("batch_key", [None, "batch"])
@pytest.mark.filterwarnings("ignore:.* of the .* genes kept")
def test_counts_are_copied_once(batch_key):
    "The check holds one copy beside the given matrix, the selection two."
    X = sp.random(6000, 2000, 0.1, "csr", np.float32, 0, lambda n: np.random.default_rng(0).poisson(2, n) + 1)
    a = AnnData(X, obs=pd.DataFrame({"batch": np.arange(6000) % 2}, index=[str(i) for i in range(6000)]))
    data.preprocess(a[:3000].copy(), batch_key=batch_key)  # imports and compiles
    peaks = []
    for run in (data.check_adata, data.preprocess):
        tracemalloc.start()
        run(a, batch_key=batch_key)
        peaks.append(tracemalloc.get_traced_memory()[1] / (X.data.nbytes + X.indices.nbytes))
        tracemalloc.stop()
    assert peaks[0] < 1.5 and peaks[1] < 3, peaks


@pytest.mark.filterwarnings("ignore:.* of the .* genes kept")
def test_an_atlas_is_never_in_memory_as_a_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "PART", 500)
    monkeypatch.setattr(data, "LARGE", 500)
    X = sp.random(6000, 2000, 0.1, "csr", np.float32, 0, lambda n: np.random.default_rng(0).poisson(2, n) + 1)
    AnnData(X, layers={"raw": X}).write_h5ad(tmp_path / "x.h5ad")
    data.preprocess(AnnData(X[:500]), n_hvg=100)  # imports and compiles
    tracemalloc.start()
    with open_cells(tmp_path / "x.h5ad") as source:
        kept, _ = data.read_hvg(source, n_hvg=100, layer="raw")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert kept.shape == (6000, 100) and peak < 0.7 * (X.data.nbytes + X.indices.nbytes), peak


def test_import_is_light():
    code = "import sys, scformer_nb.data; print([m for m in ('scanpy', 'torch', 'rdata', 'pooch', 'matplotlib') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


