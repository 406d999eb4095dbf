"""A model that begins as another one ended: what is taken over, what is the data's own, and what is refused."""
from dataclasses import replace

import numpy as np
import pytest
import torch
from toy import SMALL, toy

import scformer_nb as scf
from scformer_nb.pretrained import known_vectors, take_known_genes, take_over, weights_of_data
from scformer_nb.recipe import DEFAULT, PAPER
from scformer_nb.scformer import ScFormer
from scformer_nb.simulate import simulate
from scformer_nb.tokens import Vocabulary

TOGETHER = replace(DEFAULT, **SMALL, steps=4, epochs=1)


def study(seed=0, n_genes=60, first=0, n_batches=2):
    adata = simulate(60, n_genes, 3, n_batches, seed=seed)
    adata.var_names = [f"G{first + j}" for j in range(n_genes)]
    return adata


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("old") / "model"
    ScFormer(study(), "batch", recipe=TOGETHER).fit(progress=False).save(path)
    return path


@pytest.mark.parametrize("recipe", [TOGETHER, replace(PAPER, **SMALL), replace(TOGETHER, mgm=1.0, zero=1.0, count=1.0, mvc=1.0, dar=1.0)])
@pytest.mark.parametrize("batch_key", [None, "batch"])
def test_what_belongs_to_the_data_has_its_shape(recipe, batch_key):
    model = ScFormer(study(), batch_key, recipe=recipe)
    for name, weight in model.network.state_dict().items():
        has = 60 in weight.shape or 62 in weight.shape or "batch.weight" in name or "dsbn" in name or "dar" in name
        assert (name in weights_of_data(model)) <= has, name
    assert "encoder.gene.weight" in weights_of_data(model) and "encoder.value.mask" not in weights_of_data(model)


def test_known_genes_keep_their_vectors_whatever_their_order(folder):
    old, adata = ScFormer.load(folder), study(seed=1, first=20)
    model = ScFormer.from_pretrained(folder, adata[:, ::-1].copy(), n_new=0)
    assert set(model.vocab.genes) == {f"G{j}" for j in range(20, 60)}
    before, now = old.embed_genes(), model.embed_genes()
    assert np.allclose(before.loc[now.index], now, atol=1e-6)


def test_new_genes_are_turned_with_the_known_ones():
    torch.manual_seed(0)
    known, both = Vocabulary([f"G{j}" for j in range(40)]), Vocabulary([f"G{j}" for j in range(50)])
    whole = torch.randn(52, 6)
    start = whole @ torch.linalg.qr(torch.randn(6, 6))[0]
    assert torch.allclose(known_vectors(start, both, whole[:42], known), whole, atol=1e-4)


def test_decoders_begin_at_the_averages_of_the_new_cells(folder):
    adata = study(seed=1)
    plain, model = ScFormer(adata, recipe=TOGETHER), ScFormer.from_pretrained(folder, adata)
    assert torch.equal(model.network.heads.nb.bias, plain.network.heads.nb.bias)


@pytest.mark.parametrize("batch_key", [None, "batch"])
def test_decoders_are_told_the_mean_batch_first(folder, batch_key):
    old, model = ScFormer.load(folder).network.heads, ScFormer.from_pretrained(folder, study(seed=1), batch_key).network.heads
    z, mean = torch.randn(5, TOGETHER.latent), old.batch.weight.mean(0).expand(5, -1)
    theirs = old.nb.cell(torch.cat([z, mean], 1))
    ours = model.nb.cell(torch.cat([z, model.batch.weight[:1].expand(5, -1)], 1) if batch_key else z)
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_a_tuned_model_is_saved_loaded_and_resumed(folder, tmp_path):
    adata = study(seed=1, first=20)
    model = ScFormer.from_pretrained(folder, adata, "batch", n_new=5, seed=3)
    assert (model.recipe.steps, model.recipe.dim) == (250, TOGETHER.dim)
    whole = model.fit(2, tmp_path / "whole", progress=False).embed_cells(adata)
    part = ScFormer.from_pretrained(folder, adata, "batch", n_new=5, seed=3).fit(1, tmp_path / "part", progress=False)
    again = ScFormer.from_pretrained(folder, adata, "batch", n_new=5, seed=3).fit(2, tmp_path / "part", resume=True, progress=False)
    assert np.array_equal(again.embed_cells(adata), whole) and len(part.history) == 1
    again.save(tmp_path / "saved")
    assert np.allclose(ScFormer.load(tmp_path / "saved").embed_cells(adata), whole, atol=1e-6)


def test_before_training_it_embeds_as_the_old_one_where_the_genes_are_the_same(folder):
    adata, old = study(seed=1), ScFormer.load(folder)
    model = ScFormer.from_pretrained(folder, adata)
    b = scf.tokens.make_batch(model.cells, np.arange(10))
    with torch.no_grad():
        ours, theirs = (m.network.eval().decoded(m.network.encoder(b, cell_only=True)[1]) for m in (model, old))
    order = [model.vocab.genes == old.vocab.genes]
    assert order == [True] and torch.allclose(ours, theirs, atol=1e-5)


def test_counts_in_a_layer(folder):
    adata = study(seed=1)
    adata.layers["raw"], adata.X = adata.X.copy(), np.log1p(adata.X.toarray())
    model = ScFormer.from_pretrained(folder, adata, layer="raw").fit(1, progress=False)
    assert model.embed_cells(adata).shape == (60, TOGETHER.latent)


@pytest.mark.parametrize(("change", "message"), [(dict(first=100), "only 0 of the model's 60 genes"),
    (dict(first=40), "only 20 of the model's 60")])
def test_other_genes_are_refused(folder, change, message):
    with pytest.raises(ValueError, match=message):
        ScFormer.from_pretrained(folder, study(**change))


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError):
        ScFormer.from_pretrained(tmp_path / "none", study())


def test_the_genes_are_the_known_and_the_most_variable_others():
    adata = study(seed=1, n_genes=200)
    known = Vocabulary([f"G{j}" for j in range(40)])
    cells = take_known_genes(adata, known, n_new=30)
    assert set(known.genes) <= set(cells.var_names) and cells.n_vars == 70 and adata.n_vars == 200
    assert list(cells.var_names) == [g for g in adata.var_names if g in set(cells.var_names)]


def test_models_of_other_sizes_cannot_be_mixed_up(folder):
    adata, old = study(seed=1), ScFormer.load(folder)
    model = ScFormer(adata, recipe=replace(TOGETHER, n_blocks=2))
    take_over(model, old)  # a second block has nothing to take over and keeps its start
    assert torch.equal(model.network.encoder.blocks[0].qkv.weight, old.network.encoder.blocks[0].qkv.weight)


def test_of_the_other_genes_those_that_vary_most_are_taken_wherever_they_stand():
    rng = np.random.default_rng(0)
    X = rng.poisson(rng.uniform(1, 20, 160), (60, 160)).astype(np.float32)
    X[:, 150:] = rng.poisson(np.repeat([0.2, 15], 30)[:, None], (60, 10))  # the last ten, as high as others
    adata = toy(X, names=[f"G{j}" for j in range(160)])
    cells = take_known_genes(adata, Vocabulary([f"G{j}" for j in range(40)]), n_new=10)
    assert set(cells.var_names) - {f"G{j}" for j in range(40)} == {f"G{j}" for j in range(150, 160)}
