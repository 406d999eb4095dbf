"""Figures: legends, numbers beyond eight groups, the same bytes twice, bad input."""
import io
import subprocess

import anndata as ad
import notebooks  # tools/notebooks.py
import numpy as np
import pandas as pd
import pytest
from test_metrics import blobs

from scformer_nb.plots import palette, plot_history, plot_methods, plot_umap, save_figure


def png(fig):
    buffer = io.BytesIO()
    fig.savefig(buffer, dpi=40)
    return buffer.getvalue()


def test_plot_umap(tmp_path):
    Z, obs = blobs(120)
    obs["many"] = [f"g{i % 30}" for i in range(120)]
    obs["holes"] = obs["batch"].where(obs.index > 9)
    adata = ad.AnnData(obs=obs.set_axis(map(str, obs.index)), obsm={"X_scformer": Z})
    fig = plot_umap(adata, color=["cell_type", "many", "holes"])
    legends = [[text.get_text() for text in ax.get_legend().get_texts()] for ax in fig.axes]
    assert legends[0] == [f"t{i}" for i in range(5)] and len(legends[1]) == 30 and legends[2] == ["b0", "b1", "b2", "none"]
    assert legends[1][0] == "1  g0" and list(adata.obsm) == ["X_scformer"] and not adata.uns
    first = png(fig)
    assert first == png(plot_umap(adata, color=["cell_type", "many", "holes"])) and len(plot_umap(adata, color="batch").axes) == 1
    boxes = [ax.get_legend().get_window_extent() for ax in fig.axes]
    assert not any(box.overlaps(ax.get_window_extent()) for box in boxes for ax in fig.axes)
    for wrong in ({"basis": "X_pca"}, {"color": ["celltype"]}):
        with pytest.raises(KeyError, match="is not in obsm; known are|name one of"):
            plot_umap(adata, **wrong)


def test_plot_history():
    history = pd.DataFrame({"epoch": [1, 2, 3], "train_loss": [3., 2., 1.], "valid_loss": [3., np.nan, 4.]})
    history = history.assign(train_mgm=1., valid_ecs=np.nan, lr=1)
    fig = plot_history(history)
    assert [ax.get_title() for ax in fig.axes] == ["loss", "mgm", "ecs"] and png(fig)
    assert fig.axes[0].lines[-1].get_xdata() == [1, 1]    # the best validation epoch
    assert len(plot_history(pd.DataFrame({"epoch": [1]} | {f"train_{i}": [1.] for i in "abcd"})).axes) == 6
    for wrong in (history[["epoch", "lr"]], history.drop(columns="epoch")):
        with pytest.raises(ValueError, match="at least one train_"):
            plot_history(wrong)


def test_types_called_by_numbers_or_missing_words():
    xy = np.random.default_rng(0).normal(size=(8, 2))
    groups = pd.Series([0, "1", "NA", "None", "nan", np.nan, "15", 2], name="type")
    fig = plot_methods({"PCA": xy}, groups)
    legend = [text.get_text() for text in fig.axes[0].get_legend().get_texts()]
    assert legend == ["0", "1", "15", "2", "NA", "None", "nan", "none"]


def test_cells_have_the_colour_of_their_own_group():
    xy, groups = np.random.default_rng(0).normal(size=(60, 2)), pd.Series(list("abc") * 20, name="type")
    points = plot_methods({"PCA": xy}, groups).axes[0].collections[0]
    colour = {tuple(place): tuple(rgba[:3]) for place, rgba in zip(points.get_offsets().data, points.get_facecolors(), strict=True)}
    found = [colour[tuple(place)] for place in np.float64(np.float32(xy))]
    assert np.allclose(found, palette(3)[groups.astype("category").cat.codes])


def test_save_figure_makes_its_folder_and_keeps_dots(tmp_path):
    fig = plot_methods({"PCA": np.eye(4)[:, :2]}, pd.Series(list("aabb"), name="type"))
    assert save_figure(fig, tmp_path / "new" / "v1.5_umap", dpi=20) == tmp_path / "new" / "v1.5_umap.png"
    assert (tmp_path / "new" / "v1.5_umap.png").read_bytes().startswith(b"\x89PNG")


def test_a_figure_that_is_cut_off_leaves_the_old(tmp_path, monkeypatch):
    fig = plot_methods({"PCA": np.eye(4)[:, :2]}, pd.Series(list("aabb"), name="type"))
    old = save_figure(fig, tmp_path / "umap", dpi=20).read_bytes()
    monkeypatch.setattr(fig, "savefig", lambda file, **how: (file.write_bytes(b"half"), 1 / 0))
    with pytest.raises(ZeroDivisionError):
        save_figure(fig, tmp_path / "umap", dpi=20)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {"umap.png": old}


def test_colours_cost_no_scanpy():
    code = "import sys, scformer_nb.plots; assert not {'scanpy', 'igraph', 'torch', 'scib'} & set(sys.modules)"
    subprocess.run([notebooks.BIN / "python", "-c", code], check=True)
    assert len(np.unique(palette(24), axis=0)) == 24
