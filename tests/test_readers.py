"""Readers of layouts that are not among the pinned sets, on tiny files: what the page A0c_readers cannot hold."""
import io
import os
import pickle
import tarfile
import zipfile

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from anndata import AnnData

from scformer_nb import datasets, readers


def test_cortex_full(tmp_path):
    head = [["", "tissue", "ctx", "hip"], ["", "group #", "1", "2"], ["", "total mRNA mol", "10", "20"], ["", "well", "1", "2"],
            ["", "sex", "1", "1"], ["", "age", "1", "1"], ["", "diameter", "1", "1"], ["", "cell_id", "c1", "c2"],
            ["", "level1class", "glia", "neuron"], ["", "level2class", "a", "b"], []]
    rows = [["Mbp", "1", "7", "0"], ["Gad1", "2", "0", "3"]]
    (tmp_path / "x.txt").write_text("\n".join("\t".join(r) for r in head + rows) + "\n")
    a = readers.read_cortex_full(tmp_path / "x.txt")
    assert a.X.toarray().tolist() == [[7, 0], [0, 3]] and a.var_names.tolist() == ["Mbp", "Gad1"] and a.obs_names.tolist() == ["c1", "c2"]
    assert a.obs["cell_type"].tolist() == ["glia", "neuron"] and a.obs["batch"].tolist() == ["ctx", "hip"]


def archive_10x(path, barcodes, X):
    with tarfile.open(path, "w:gz") as tar:
        mtx = "%%MatrixMarket matrix coordinate integer general\n" + f"{X.shape[1]} {X.shape[0]} {np.count_nonzero(X)}\n"
        mtx += "".join(f"{j + 1} {i + 1} {X[i, j]}\n" for i, j in zip(*np.nonzero(X), strict=True))
        for name, text in (("barcodes.tsv", "\n".join(barcodes)), ("genes.tsv", "ENSG1\tA\nENSG2\tB\nENSG3\tB"), ("matrix.mtx", mtx)):
            info = tarfile.TarInfo(f"filtered_gene_bc_matrices/GRCh38/{name}")
            info.size = len(text.encode())
            tar.addfile(info, io.BytesIO(text.encode()))
    return path


def test_pbmc8k(tmp_path):
    X = np.array([[1, 0, 2], [0, 5, 0], [3, 3, 3], [1, 1, 1]])
    big = archive_10x(tmp_path / "8k.tar.gz", ["AA-1", "CC-1", "GG-1", "TT-1"], X)
    small = archive_10x(tmp_path / "4k.tar.gz", ["GG-1"], X[:1])
    (tmp_path / "genes.csv").write_text("ENSG,GS\nENSG3,B\nENSG2,B\n")
    meta = {"barcodes": pd.DataFrame({"x": [1, 2, 3]}, index=["CC-1", "AA-1", "GG-1"]), "clusters": np.array([1, 0, 1]),
            "list_clusters": np.array(["B cells", "NK cells"])}
    (tmp_path / "meta.pickle").write_bytes(pickle.dumps(meta))
    a = readers.read_pbmc8k(big, small, tmp_path / "genes.csv", tmp_path / "meta.pickle")
    assert a.obs_names.tolist() == ["AA-1", "CC-1"] and a.X.toarray().tolist() == [[0, 2], [5, 0]]  # GG is shared, TT unlabelled
    assert a.obs["cell_type"].tolist() == ["B cells", "NK cells"] and a.var_names.tolist() == ["B", "B-1"]


def test_pickle_that_runs_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self): return os.system, (f"touch {tmp_path}/ran",)
    (tmp_path / "x.pickle").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match="not opened"):
        readers.read_pickle(tmp_path / "x.pickle")
    assert not (tmp_path / "ran").exists()


def test_scib_and_spleen(tmp_path):
    obs = pd.DataFrame({"celltype": ["a", "b"], "tech": ["x", "y"]}, index=["c1", "c2"])
    AnnData(np.ones((2, 2)) * 0.7, obs=obs, layers={"counts": np.array([[1.0, 0], [0, 2]])}).write_h5ad(tmp_path / "p.h5ad")
    a = readers.read_published_h5ad(tmp_path / "p.h5ad", layer="counts", cell_type="celltype", batch="tech")
    assert a.X.toarray().tolist() == [[1, 0], [0, 2]] and a.obs["batch"].tolist() == ["x", "y"]
    for i, genes in enumerate((["A", "B"], ["B", "C"])):
        obs = pd.DataFrame({"tissue": ["Spleen", "Spleen", "Lymph_Node"], "leiden_subclusters": ["1", "16,0", "1"], "cell_types": "B",
                            "batch": f"SLN{i}"}, index=[f"{i}-{c}" for c in "abc"])
        AnnData(sp.csr_matrix(np.full((3, 2), i + 1.0)), obs=obs, var=pd.DataFrame(index=genes)).write_h5ad(tmp_path / f"s{i}.h5ad")
    a = readers.read_spleen17k(tmp_path / "s0.h5ad", tmp_path / "s1.h5ad")
    assert a.obs_names.tolist() == ["0-a", "1-a"] and a.var_names.tolist() == ["B"] and a.X.toarray().ravel().tolist() == [1, 2]


def test_gears_with_and_without_counts(tmp_path):
    counts = np.array([[1.0, 4], [2, 1], [0, 1]])
    obs = pd.DataFrame({"condition": ["ctrl", "ctrl+SET", "KLF1+SET"], "cell_type": "K562"}, index=["AC-1", "AG", "AT-2"])
    var = pd.DataFrame({"gene_name": ["KLF1", "SET"]}, index=["ENSG1", "ENSG2"])
    for layers in ({}, {"counts": counts}):
        X = np.log1p(counts / counts.sum(1, keepdims=True) * 1e4).astype(np.float32)
        AnnData(sp.csr_matrix(X), obs=obs, var=var, layers=layers).write_h5ad(tmp_path / "perturb_processed.h5ad")
        with zipfile.ZipFile(tmp_path / "x.zip", "w") as z:
            z.write(tmp_path / "perturb_processed.h5ad", "adamson/perturb_processed.h5ad")
        a = readers.read_gears(tmp_path / "x.zip")
        assert a.X.toarray().tolist() == counts.tolist() and a.var_names.tolist() == ["KLF1", "SET"]
        assert a.obs["condition"].tolist() == ["control", "SET", "KLF1+SET"] and a.obs["batch"].tolist() == ["1", "1", "2"]


def test_human_brain_atlas(tmp_path):
    (tmp_path / "m.csv").write_text('sample_name,"A","B"\nn1,0,3\nn2,1,0\nn3,5,5\n')
    (tmp_path / "meta.csv").write_text("sample_name,class_label,subclass_label,cluster_label,external_donor_name_label\n"
                                       "n3,,,,H1\nn2,GABAergic,VIP,Inh 1,H1\nn1,Glutamatergic,IT,Exc 1,H2\n")
    a = readers.read_human_brain_atlas(tmp_path / "m.csv", tmp_path / "meta.csv", **datasets.DATASETS["human_brain_atlas"].options)
    assert a.X.toarray().tolist() == [[0, 3], [1, 0]] and a.obs["cell_type"].tolist() == ["IT", "VIP"]
    assert a.obs["batch"].tolist() == ["H2", "H1"] and a.obs["class"].tolist() == ["Glutamatergic", "GABAergic"]


@pytest.mark.parametrize("least, kept", [(0, ["A", "B", "C"]), (1, ["A", "B"]), (2, ["A", "B"]), (3, ["A"])])
def test_genes_of_enough_cells_are_kept(least, kept):
    assert readers.as_adata(np.array([[1, 0, 0], [2, 3, 0], [4, 5, 0]]), list("ABC"), min_cells=least).var_names.tolist() == kept


# ---- log values back to counts

@pytest.mark.parametrize("known_total", [True, False])
def test_unlog_is_exact(known_total):
    rng = np.random.default_rng(0)
    counts = rng.poisson(rng.lognormal(0, 2, (200, 80)))
    counts[:, 0] = 1 if not known_total else 2  # without the total, the smallest count of a cell must be 1
    total = counts.sum(1) + rng.integers(0, 500, 200)
    L = sp.csr_matrix(np.log1p(counts / total[:, None] * 1e4).astype(np.float32))
    assert (readers.unlog(L, total if known_total else None).toarray() == counts).all()
