"""The task heads: what they ask, what they must not see, and the list that holds them."""
from dataclasses import replace

import numpy as np
import pytest
import scipy.sparse as sp
import torch
import torch.nn.functional as F
from torch import nn

from scformer_nb.heads import HEADS, BatchClassifier, Head, HeadInput, Heads, HeadSizes, elastic_cell_similarity, upgrade_weights
from scformer_nb.tokens import CellTokens, Vocabulary, make_batch

SIZES = HeadSizes(dim=8, n_genes=30, n_bins=10, n_batches=2)
LATENT = replace(SIZES, latent=3)
ALL = dict.fromkeys(HEADS, 1.0)
COUNTS = sp.csr_matrix(np.random.default_rng(0).poisson(1.2, size=(6, 30)).astype(np.float32))
CELLS = CellTokens(COUNTS.minimum(9).astype(np.uint8), COUNTS, Vocabulary([f"gene{i}" for i in range(30)]), np.repeat([0, 1], 3))


def drawn(weights, sizes=SIZES):
    torch.manual_seed(0)
    return Heads(sizes, weights)


@pytest.fixture
def parts():
    "Gene vectors, `h`, `h_c` and the mini-batch that heads are called with."
    torch.manual_seed(1)
    b = make_batch(CELLS, np.arange(6), 0.4, rng=np.random.default_rng(0))
    h = torch.randn(*b.genes.shape, 8)
    return torch.randn(30, 8), h, h[:, 0], b


# ---- faults that nothing else would see

def test_a_cell_is_no_pair_with_itself():
    "Two orthogonal cells: one pair, at a similarity of 0. With the diagonal the loss would be -(0.36 + 0.16) / 2."
    assert torch.isclose(elastic_cell_similarity(torch.eye(2), 0.6), torch.tensor(-0.36))
    alike = torch.ones(3, 4)
    assert torch.isclose(elastic_cell_similarity(alike, 0.6), torch.tensor(-0.16))


def test_pairs_above_beta_are_pulled_together_and_those_below_pushed_apart():
    near, far = (torch.tensor([[1.0, 0.0], [c, (1 - c * c) ** 0.5]], requires_grad=True) for c in (0.8, 0.3))
    for cells, sign in ((near, 1), (far, -1)):
        before = F.cosine_similarity(cells[0], cells[1], dim=0)
        elastic_cell_similarity(cells, 0.6).backward()
        after = F.cosine_similarity(*(cells - 0.1 * cells.grad), dim=0)
        assert (after - before) * sign > 0


def test_dar_teaches_its_classifier_and_the_opposite_to_the_encoder(parts):
    "A step down the gradient makes the batches easier to tell for the classifier, harder in the cell embedding."
    genes, h, h_c, b = parts
    dar, leaf = BatchClassifier(SIZES), h_c.clone().requires_grad_()
    seen = HeadInput(genes, h, h_c, leaf, b)
    before = dar(seen)
    before.backward()
    with torch.no_grad():
        moved = replace(seen, h_c=leaf - 0.05 * leaf.grad)
        assert dar(moved) > before
        for w in dar.parameters():
            w -= 0.05 * w.grad
        assert dar(seen) < before


def test_what_the_bottleneck_holds_costs(parts):
    "Nothing for N(0, 1) itself; for a mean of 2 in three numbers (4 / 2) * 3 nats, a share for each of 30 genes."
    genes, h, h_c, b = parts
    nothing = HeadInput(genes, h, h_c, torch.zeros(6, 3), b, spread=torch.ones(6, 3))
    kl = HEADS["kl"](LATENT)
    assert kl(nothing) == 0 and torch.isclose(kl(replace(nothing, h_c=torch.full((6, 3), 2.0))), torch.tensor(6 / 30))


# ---- the list of heads

def test_a_new_head_is_one_class(parts, monkeypatch):
    monkeypatch.setattr("scformer_nb.heads.HEADS", HEADS.copy())

    class Length(Head, name="length"):
        "Cell embeddings of length one."
        def __init__(self, sizes):
            super().__init__()

        def forward(self, x):
            return (x.h_c.norm(dim=-1) - 1).square().mean()

    heads = drawn(ALL | {"length": 2.0})
    losses = heads(*parts)
    assert torch.isclose(losses["length"], (parts[2].norm(dim=-1) - 1).square().mean())
    assert torch.isclose(heads.total(losses), sum(losses.values()) + losses["length"])


def test_a_head_starts_the_same_whichever_others_are_on():
    whole = drawn(ALL, LATENT).state_dict()
    for name in HEADS:
        alone = drawn({name: 1.0}, LATENT)
        assert alone.weights.keys() == {name} and all(torch.equal(w, whole[k]) for k, w in alone.state_dict().items())


def test_heads_that_are_off_do_not_exist(parts):
    heads = drawn(dict(mgm=1.0, mvc=0.0))
    assert "mvc" not in heads and not any(k.startswith(("mvc", "count", "dar")) for k in heads.state_dict())
    assert heads(*parts).keys() == {"mgm"}
    assert "dar" not in drawn(ALL, replace(SIZES, n_batches=1))


@pytest.mark.parametrize("loss", ["mse", "ce"])
def test_visible_genes_have_no_part_in_the_losses(parts, loss):
    genes, h, h_c, b = parts
    heads = drawn(ALL, replace(SIZES, loss=loss))
    before = heads(*parts)
    others = replace(b, bins=torch.where(b.hidden, b.bins, 9 - b.bins), counts=torch.where(b.hidden, b.counts, 1e3),
        values=torch.where(b.masked, b.values, 9.0))
    after = heads(genes, h, h_c, others)
    assert before.keys() - {"nb"} == HEADS.keys() - {"kl", "nb"}, "nb asks for all genes"
    assert all(torch.equal(before[k], after[k]) for k in before if k != "nb")
    hidden = replace(b, bins=torch.where(b.hidden, (b.bins + 1) % 10, b.bins), counts=torch.where(b.hidden, b.counts + 1, b.counts),
        values=torch.where(b.masked, 9 - b.values, b.values))
    changed = heads(genes, h, h_c, hidden)
    assert all(not torch.equal(before[k], changed[k]) for k in ("mgm", "mvc", "zero", "count"))


@pytest.mark.parametrize("sizes", [SIZES, LATENT], ids=["h_c", "bottleneck"])
def test_what_shapes_the_cells_never_sees_the_batch_embedding(parts, sizes):
    heads = drawn(ALL, sizes).eval()
    before = heads(*parts)
    with torch.no_grad():
        heads.batch.weight += 1
    after = heads(*parts)
    assert {k for k in before if torch.equal(before[k], after[k])} == before.keys() & {"ecs", "dar", "kl"}


def test_an_unknown_head_is_an_error():
    with pytest.raises(ValueError, match="unknown heads gepc; known are mgm, "):
        drawn(dict(gepc=1.0))


# ---- the bottleneck and the counts of all genes

@pytest.mark.parametrize("change", [lambda X: X * 0 + 1e6, lambda X: X * 1e6, lambda X: X * 0, lambda X: X * np.array([[0], *[[1]] * 5]),
                                    lambda X: X * .37], ids=["1e6 everywhere", "times 1e6", "no counts", "an empty cell", "fractions"])
def test_any_counts_have_a_finite_likelihood_and_gradient(change):
    X = sp.csr_matrix(change(COUNTS.toarray()).astype(np.float32))
    bins = sp.csr_matrix((X.toarray() > 0).astype(np.uint8))
    b = make_batch(CellTokens(bins, X, CELLS.vocab, CELLS.batch), np.arange(6), 0.4, rng=np.random.default_rng(0))
    heads, h = drawn(dict(kl=2.0, nb=10.0), LATENT), torch.randn(*b.genes.shape, 8)
    losses = heads(torch.randn(30, 8), h, h[:, 0], b)
    heads.total(losses).backward()
    assert losses.keys() == {"kl", "nb"} and all(torch.isfinite(v) for v in losses.values())
    assert all(torch.isfinite(w.grad).all() for w in heads.parameters() if w.grad is not None)


def test_nothing_is_random_in_evaluation(parts):
    heads = drawn(ALL, LATENT)
    assert not torch.equal(heads(*parts)["nb"], heads(*parts)["nb"]), "in training a code is drawn"
    heads.eval()
    first, second = heads(*parts), heads(*parts)
    assert all(torch.equal(first[k], second[k]) for k in HEADS)


def test_each_weight_of_the_default_heads_has_a_gradient(parts):
    "A weight that no loss uses would keep several processes waiting for each other."
    heads = drawn(dict(kl=2.0, nb=10.0), LATENT)
    heads.total(heads(*parts)).backward()
    assert [k for k, w in heads.named_parameters() if w.grad is None] == []


# ---- weights of version 0.1.0

@pytest.mark.parametrize("on", [list(HEADS), ["mgm", "count"], ["mvc"]], ids=str)
def test_weights_of_the_first_version_are_read(parts, on):
    "They hold the heads that were off, and the batch biases of the counts beside that head."
    class Network(nn.Module):
        def __init__(self, weights):
            super().__init__()
            self.heads = drawn(weights)

    whole, wanted = Network(ALL), Network(dict.fromkeys(on, 1.0))
    old = {k.replace("heads.count.batch.", "heads.count_batch."): w + 1 for k, w in whole.state_dict().items()}
    assert "heads.count_batch.weight" in old
    wanted.load_state_dict(upgrade_weights(old, wanted))
    assert all(torch.equal(w, whole.state_dict()[k] + 1) for k, w in wanted.state_dict().items())
    again = wanted.state_dict()
    assert upgrade_weights(again, wanted).keys() == again.keys()
