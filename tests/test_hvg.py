"""Selection of genes, in memory and in parts: what the page 01c_hvg cannot hold."""
import contextlib
import os
import sys
import tracemalloc
from types import SimpleNamespace

import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import warm
from anndata import AnnData
from toy import cells

from scformer_nb import data, h5ad, hvg
from scformer_nb.datasets import open_cells
from scformer_nb.simulate import simulate

# ---- bad input

def sized(values):
    a = cells()
    a.obs["library_size"] = values
    return a


COUNTS = cells().X
ERRORS = {
    "one cell": (lambda: hvg.preprocess(cells()[:1].copy()), "1 cells x 40 genes"),
    "one gene": (lambda: hvg.preprocess(cells()[:, :1].copy()), "60 cells x 1 genes"),
    "n_hvg 0": (lambda: hvg.preprocess(cells(), n_hvg=0), "n_hvg=0"),
    "min_cells too high": (lambda: hvg.preprocess(cells(), min_cells=100), "lower min_cells"),
    "library_size too small": (lambda: hvg.preprocess(cells(obs=lambda a: a.obs.assign(library_size=1.0))), "sum of counts in 60"),
    "library_size text": (lambda: hvg.preprocess(sized(["many"] * 60)),
                          r"obs\['library_size'\] is not a number in 60 .*'many'.*delete it"),
    "library_size NaN": (lambda: hvg.preprocess(sized([np.nan] + [1e6] * 59)), r"obs\['library_size'\] is not a number in 1 of 60"),
    "library_size zero": (lambda: hvg.preprocess(sized([0.0] + [1e6] * 59)), r"obs\['library_size'\] is below the sum of counts in 1 "),
    "library_size infinite": (lambda: hvg.preprocess(sized([np.inf] * 60)), r"obs\['library_size'\] is infinite in 60 of 60"),
    "library_size categories": (lambda: hvg.preprocess(sized(pd.Categorical(["a"] * 60))), r"obs\['library_size'\] is not a number"),
}


@pytest.mark.parametrize("case", ERRORS)
@pytest.mark.filterwarnings("ignore")
def test_bad_input_is_a_clear_error(case):
    run, message = ERRORS[case]
    with pytest.raises(ValueError, match=message):
        run()


@pytest.mark.filterwarnings("ignore::anndata.ImplicitModificationWarning")
def test_cells_without_hvg_are_counted():
    with pytest.warns(UserWarning, match="3 of 60 cells express none"):
        hvg.preprocess(cells(X=sp.diags([0.0] * 3 + [1.0] * 57) @ COUNTS))


# ---- preprocessing

@pytest.mark.parametrize("batch_key", [None, "batch"])
def test_preprocess_selects_exactly_and_keeps_counts(batch_key):
    a = simulate(400, 300, 3, 2)
    before = a.copy()
    out = hvg.preprocess(a, n_hvg=77, batch_key=batch_key)
    assert out.n_vars == 77 and out.uns["hvg"] == {"flavor": "seurat_v3", "n_hvg": 77}
    assert (out.layers["counts"] != a[:, out.var_names].X).nnz == 0 and (a.X != before.X).nnz == 0
    total = np.asarray(a.X.sum(1)).ravel()
    assert abs(np.expm1(out.X).multiply(total[:, None] / 1e4) - out.layers["counts"]).max() < 1e-2
    assert sp.isspmatrix_csr(out.X) and sp.isspmatrix_csr(out.layers["counts"]) and out.X.dtype == np.float32
    assert out.var_names.tolist() == [g for g in a.var_names if g in set(out.var_names)]  # order kept


def test_fallback_is_recorded_and_leaves_log_values():
    out = hvg.preprocess(simulate(300, 30, 2, 2), n_hvg=10, batch_key="batch")
    assert out.uns["hvg"] == {"flavor": "seurat", "n_hvg": 10}
    total_all = simulate(300, 30, 2, 2).X.sum(1).A1
    assert abs(np.expm1(out.X).multiply(total_all[:, None] / 1e4) - out.layers["counts"]).max() < 1e-2


def test_the_library_size_is_that_of_obs_where_it_is_known():
    a = cells()
    a.obs["library_size"] = 3 * a.X.sum(1).A1
    out = hvg.preprocess(a, n_hvg=20)
    expected = out.layers["counts"].multiply(1e4 / a.obs["library_size"].to_numpy()[:, None])
    assert abs(np.expm1(out.X) - expected).max() < 1e-2


def test_selection_within_batches_ignores_batch_effects():
    a = simulate(2000, 300, 3, 2, batch_sd=0)
    b = (a.obs["batch"] == "batch_1").to_numpy()
    plain = np.flatnonzero(a.var["marker_of"] == "none")[:20]
    X = a.X.tolil()
    for j in plain:  # twenty genes that differ between the batches and in nothing else
        X[np.flatnonzero(b), j] = X[np.flatnonzero(b), j].toarray() * 10
    a.X = X.tocsr()
    share = [a.var_names[plain].isin(hvg.preprocess(a, n_hvg=60, batch_key=k).var_names).mean() for k in (None, "batch")]
    assert share[0] > 0.7 and share[1] < share[0] / 2, share


@pytest.mark.slow
def test_genes_too_few_for_loess_do_not_kill_the_process():
    code = ("from scformer_nb import hvg; from scformer_nb.simulate import simulate; import warnings; warnings.simplefilter('ignore')\n"
            "for n, g in ((300, 3), (2, 200), (60, 20)):\n"
            "    print(hvg.preprocess(simulate(n, g, 1, 1), n_hvg=2, min_cells=1).uns['hvg'])")
    done = warm.run([sys.executable, "-c", code])
    assert done.returncode == 0 and done.stdout.count("'seurat'") == 3, done.stderr


@pytest.mark.filterwarnings("ignore:.* of the .* genes kept")
def test_nothing_densifies():
    X = sp.random(10_000, 2_000, 0.01, "csr", np.float32, 0, lambda n: np.random.default_rng(0).poisson(2, n) + 1)
    adata = AnnData(X, obs=pd.DataFrame({"batch": np.arange(10_000) % 2}, index=[str(i) for i in range(10_000)]))
    hvg.preprocess(adata[:5000].copy(), n_hvg=100, batch_key="batch")  # imports and compiles
    tracemalloc.start()
    hvg.preprocess(adata, n_hvg=1000, batch_key="batch")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10_000 * 2_000 * 4 / 4, f"{peak / 1e6:.0f} MB, the dense matrix would take 80 MB"


# ---- in parts

ATLAS = simulate(900, 300, 3, 3, seed=1)


@pytest.fixture
def small_parts(monkeypatch):
    "As if 900 cells were an atlas."
    monkeypatch.setattr(data, "PART", 100)
    monkeypatch.setattr(hvg, "LARGE", 300)


@pytest.mark.parametrize("form", ["CSR", "dense", "CSC", "CSC in a layer", "CSR in a layer", "dense in a layer", "in memory"])
@pytest.mark.filterwarnings("ignore:.* is stored by columns .CSC.. it is first sorted by rows, in")
def test_an_atlas_gives_the_counts_of_genes_chosen_on_a_sample(form, small_parts, tmp_path):
    rows = hvg.sample_rows(ATLAS.obs["batch"], 300)
    chosen = hvg.preprocess(ATLAS[rows], n_hvg=60, batch_key="batch", min_cells=0)
    X = {"CSC": ATLAS.X.tocsc(), "dens": ATLAS.X.toarray()}.get(form[:4].strip(), ATLAS.X)
    layer = "raw" if "layer" in form else None
    a = AnnData(ATLAS.X.log1p() if layer else X, obs=ATLAS.obs, var=ATLAS.var, layers={"raw": X} if layer else None)
    a.write_h5ad(tmp_path / "x.h5ad")
    with open_cells(a if form == "in memory" else tmp_path / "x.h5ad") as source:
        out = hvg.preprocess(source, n_hvg=60, batch_key="batch", layer=layer)
    assert out.uns["hvg"] == {"flavor": "seurat_v3", "n_hvg": 60, "chosen_on": 300}
    assert out.var_names.equals(chosen.var_names) and out.obs.equals(ATLAS.obs)
    assert (out.layers["counts"] != ATLAS[:, out.var_names].X).nnz == 0
    assert abs(out.X - hvg.log_normalise(out.layers["counts"], ATLAS.X.sum(1).A1)).max() < 1e-6


def test_the_sample_is_chosen_from_all_batches():
    batch = pd.Series(["large"] * 5000 + ["small"] * 80 + ["lone"])
    drawn = batch.iloc[hvg.sample_rows(batch, 1000)]
    assert drawn.value_counts().to_dict() == {"large": 919, "small": 80, "lone": 1}
    assert hvg.sample_rows(batch, 9999).tolist() == list(range(5081))


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
        hvg.preprocess(a)


def test_odd_values_of_an_atlas_are_counted_once(small_parts, recwarn):
    a = ATLAS.copy()
    a.X.data = a.X.data * 1.37
    hvg.read_hvg(a, n_hvg=60)
    said, = (str(w.message) for w in recwarn if w.category is UserWarning)
    assert f" of {a.X.nnz:,} counts in X are not integers; taken as they are" in said


def test_a_logged_study_in_an_atlas_is_found(small_parts):
    X = sp.vstack([ATLAS.X[:500], ATLAS.X[500:].multiply(1e4 / ATLAS.X[500:].sum(1).A1[:, None]).log1p()]).tocsr()
    with pytest.raises(ValueError, match="among cells 501 to 600 it holds small fractions, as in logged data"):
        hvg.preprocess(AnnData(X, obs=ATLAS.obs, var=ATLAS.var))


def test_empty_parts_are_no_error_and_an_empty_atlas_is(small_parts):
    empty = np.arange(900) // 300 == 1
    assert hvg.read_hvg(AnnData(sp.diags(~empty * 1.0) @ ATLAS.X, obs=ATLAS.obs), n_hvg=300)[0].n_obs == 900
    with pytest.raises(ValueError, match="it holds zeros only"):
        hvg.read_hvg(AnnData(ATLAS.X * 0, obs=ATLAS.obs))


def test_a_source_that_changes_while_it_is_read(small_parts, monkeypatch):
    a, first = ATLAS.copy(), hvg.read_overview

    def change_after(*args):
        seen = first(*args)
        a.X.data[-1] += 1
        return seen

    monkeypatch.setattr(hvg, "read_overview", change_after)
    with pytest.raises(ValueError, match="X has changed while it was read: cells 801 to 900 are others now"):
        hvg.preprocess(a, n_hvg=60)


def test_a_file_that_ends_early(small_parts, tmp_path):
    ATLAS.write_h5ad(tmp_path / "x.h5ad")
    with pytest.raises(ValueError, match="x.h5ad has changed while it was read"), open_cells(tmp_path / "x.h5ad") as source:
        os.truncate(tmp_path / "x.h5ad", 60_000)
        with pytest.raises(ValueError, match="cannot be read .*: the file may end early"):
            hvg.preprocess(source)
    with pytest.raises(ValueError, match="cannot be read as .h5ad"), open_cells(tmp_path / "x.h5ad"):
        pass


@pytest.mark.parametrize("batch_key", [None, "batch"])
@pytest.mark.filterwarnings("ignore:.* of the .* genes kept")
def test_counts_are_copied_once(batch_key):
    "The check holds one copy beside the given matrix, the selection two."
    X = sp.random(6000, 2000, 0.1, "csr", np.float32, 0, lambda n: np.random.default_rng(0).poisson(2, n) + 1)
    a = AnnData(X, obs=pd.DataFrame({"batch": np.arange(6000) % 2}, index=[str(i) for i in range(6000)]))
    hvg.preprocess(a[:3000].copy(), batch_key=batch_key)  # imports and compiles
    peaks = []
    for run in (data.check_adata, hvg.preprocess):
        tracemalloc.start()
        run(a, batch_key=batch_key)
        peaks.append(tracemalloc.get_traced_memory()[1] / (X.data.nbytes + X.indices.nbytes))
        tracemalloc.stop()
    assert peaks[0] < 1.5 and peaks[1] < 3, peaks


def test_a_file_that_is_written_between_the_two_passes(small_parts, tmp_path, monkeypatch):
    "Also where the counts are the same: what else was read may not be."
    ATLAS.write_h5ad(tmp_path / "x.h5ad")
    second = hvg.read_genes

    def write_before(*args):
        os.utime(tmp_path / "x.h5ad", (1, 1))
        return second(*args)

    monkeypatch.setattr(hvg, "read_genes", write_before)
    with pytest.raises(ValueError, match="x.h5ad has changed while it was read: start again"), open_cells(tmp_path / "x.h5ad") as source:
        hvg.preprocess(source, n_hvg=60)


@pytest.mark.filterwarnings("ignore:X is stored by columns")
def test_a_file_by_columns_that_ends_early_or_is_damaged(small_parts, tmp_path):
    a = AnnData(ATLAS.X.tocsc(), obs=ATLAS.obs, var=ATLAS.var)
    a.write_h5ad(tmp_path / "cut.h5ad")
    with contextlib.suppress(ValueError), open_cells(tmp_path / "cut.h5ad") as source:
        os.truncate(tmp_path / "cut.h5ad", 60_000)
        with pytest.raises(ValueError, match="X cannot be sorted by rows .*: the file may be damaged"):
            hvg.preprocess(source)
    a.write_h5ad(tmp_path / "x.h5ad")
    with h5py.File(tmp_path / "x.h5ad", "r+") as file:
        file["X/indices"][100] = 5000
    with pytest.raises(ValueError, match="X is a damaged sparse matrix"), open_cells(tmp_path / "x.h5ad") as source:
        hvg.preprocess(source)


def test_no_room_to_sort_a_file_by_columns(small_parts, tmp_path, monkeypatch):
    AnnData(ATLAS.X.tocsc(), obs=ATLAS.obs, var=ATLAS.var).write_h5ad(tmp_path / "x.h5ad")
    monkeypatch.setattr(h5ad.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1e3))
    message = "to sort it by rows takes .* GB of .*, which has 0.0 GB free: set TMPDIR .* adata.X = adata.X.tocsr"
    with pytest.raises(ValueError, match=message), open_cells(tmp_path / "x.h5ad") as source:
        hvg.preprocess(source)


@pytest.mark.parametrize("form", ["csr", "csc"])
@pytest.mark.filterwarnings("ignore:.* of the .* genes kept")
@pytest.mark.filterwarnings("ignore:.* is stored by columns")
def test_an_atlas_is_never_in_memory_as_a_whole(form, tmp_path, monkeypatch):
    monkeypatch.setattr(h5ad, "BLOCK", 20_000)
    monkeypatch.setattr(data, "PART", 200)
    monkeypatch.setattr(hvg, "LARGE", 500)
    X = sp.random(6000, 2000, 0.1, "csr", np.float32, 0, lambda n: np.random.default_rng(0).poisson(2, n) + 1)
    stored = X.asformat(form)
    AnnData(stored, layers={"raw": stored}).write_h5ad(tmp_path / "x.h5ad")
    hvg.preprocess(AnnData(X[:500]), n_hvg=100)  # imports and compiles
    tracemalloc.start()
    with open_cells(tmp_path / "x.h5ad") as source:
        kept, _ = hvg.read_hvg(source, n_hvg=100, layer="raw")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert kept.shape == (6000, 100) and peak < 0.7 * (X.data.nbytes + X.indices.nbytes), peak
