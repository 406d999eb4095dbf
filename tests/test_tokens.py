"""Vocabulary, matching of gene names, external tokens, mini-batches: what the page cannot hold."""
import numpy as np
import pytest
import scipy.sparse as sp
import torch

from scformer_nb.binning import bin_values
from scformer_nb.tokens import (
    CellTokens,
    Vocabulary,
    align_genes,
    draw_mask,
    length_batches,
    make_batch,
    read_gmt,
    sample_genes,
    union_vocabulary,
)

IDS = [f"ENSG{i:011d}" for i in range(20)]
SYMBOLS = [f"GENE{i}" for i in range(20)]
rng = np.random.default_rng(0)
COUNTS = sp.csr_matrix(rng.poisson(rng.gamma(0.4, 2, size=(50, 1)) * rng.gamma(0.4, 2, size=(1, 80))).astype(np.float32))
VOCAB = Vocabulary([f"g{i}" for i in range(80)])


def cells(**how):
    return CellTokens(bin_values(COUNTS), COUNTS, VOCAB, **how)


# ---- names

def test_ids_of_a_vocabulary_are_its_order():
    vocab = union_vocabulary(["B", "A"], ["A", "C"])
    assert vocab.genes == ["B", "A", "C"] and vocab.index == {"B": 0, "A": 1, "C": 2} and len(vocab) == 5
    with pytest.raises(ValueError, match="1 gene names are duplicates"):
        Vocabulary(["A", "A"])
    with pytest.raises(ValueError, match="must start with"):
        Vocabulary(["A"], specials=("<cls>", "<pad>"))


def test_order_and_strangers_do_not_matter(recwarn):
    columns, numbers = align_genes(Vocabulary(SYMBOLS), ["new", *SYMBOLS[::-1]])
    assert columns.tolist() == list(range(1, 21)) and numbers.tolist() == list(range(19, -1, -1)) and not recwarn.list


SAME = {
    "version in the data": (IDS, [f"{g}.{i % 9}" for i, g in enumerate(IDS)], "version"),
    "version in the model": ([f"{g}.3" for g in IDS], IDS, "version"),
    "another version": ([f"{g}.3" for g in IDS], [f"{g}.12" for g in IDS], "version"),
    "prefix of human": (SYMBOLS, [f"GRCh38_{g}" for g in SYMBOLS], "genome prefix"),
    "prefix of an old human genome": (SYMBOLS, [f"hg19_{g}" for g in SYMBOLS], "genome prefix"),
    "prefix of mouse": (SYMBOLS, [f"mm10___{g}" for g in SYMBOLS], "genome prefix"),
    "prefix and version": (IDS, [f"GRCh38_{g}.7" for g in IDS], "genome prefix and version"),
    "dots of R": ([f"HLA-{g}" for g in SYMBOLS], [f"HLA.{g}" for g in SYMBOLS], "dots and dashes"),
}


@pytest.mark.parametrize("case", SAME)
def test_the_same_genes_spelt_otherwise_are_matched_and_said(case):
    known, names, kind = SAME[case]
    with pytest.warns(UserWarning, match=rf"genes were matched without their {kind}: {names[0]!r} in the data is {known[0]!r}"):
        columns, numbers = align_genes(Vocabulary(known), ["other", *names])
    assert columns.tolist() == list(range(1, 21)) and numbers.tolist() == list(range(20))


OTHER = {
    "lower case": (SYMBOLS, [g.lower() for g in SYMBOLS], "20 would match but for case.*'gene0'.*'GENE0'"),
    "mouse for human": (SYMBOLS, [g.title() for g in SYMBOLS], "but for case .as human and mouse"),
    "two versions of one gene": (IDS, [f"{g}.{v}" for g in IDS for v in (1, 2)], "20 would match but for version"),
    "both genomes of a mix": (SYMBOLS, [f"{p}_{g}" for g in SYMBOLS for p in ("GRCh38", "mm10")], "20 would match but for genome prefix"),
    "symbols for ids": (IDS, SYMBOLS, "gene symbols, the model Ensembl ids; .*rename_genes.adata, .ensembl"),
    "ids for symbols": (SYMBOLS, [f"{g}.1" for g in IDS], "Ensembl ids, the model gene symbols; translate them first, .*symbol"),
    "numbers": (SYMBOLS, [str(i) for i in range(20)], "only 0 of the model's 20 genes.*names like '0', '1', '2', the model 'GENE0'"),
    "less than half": (SYMBOLS, SYMBOLS[:9], "only 9 of the model's 20 genes"),
}


@pytest.mark.parametrize("case", OTHER)
def test_genes_that_cannot_be_matched_are_explained(case):
    known, names, message = OTHER[case]
    with pytest.raises(ValueError, match=message):
        align_genes(Vocabulary(known), names)


def test_exactly_half_is_enough_and_the_rest_is_counted():
    with pytest.warns(UserWarning, match="10 of the model's 20 genes are not in the data .*; 1 genes of the data are unknown"):
        assert len(align_genes(Vocabulary(SYMBOLS), [*SYMBOLS[:10], "new"])[0]) == 10


# ---- external tokens

def test_gmt_with_weights_blank_lines_and_a_line_without_genes(tmp_path):
    (tmp_path / "a.gmt").write_text("one\tx\tA,1.0\tB\t\n\ntwo\t\tC\n")
    assert read_gmt(tmp_path / "a.gmt") == {"one": ["A", "B"], "two": ["C"]}
    for line in ("three\tx", "three", "three\tx\t"):
        (tmp_path / "b.gmt").write_text(f"one\tx\tA\n{line}\n")
        with pytest.raises(ValueError, match="b.gmt, line 2"):
            read_gmt(tmp_path / "b.gmt")


# ---- mini-batches

@pytest.mark.parametrize("genes", ["expressed", "all"])
@pytest.mark.parametrize("limits", [{}, {"max_genes": 9}, {"max_masked": 4}, {"max_genes": 9, "max_masked": 4}])
def test_every_token_carries_its_own_gene_bin_and_mask(genes, limits):
    data, rows = cells(genes=genes), np.array([7, 3, 30, 41])
    bins = bin_values(COUNTS).toarray()
    b = make_batch(data, rows, mask_ratio=0.4, rng=np.random.default_rng(1), **limits)
    assert (b.genes[:, 0] == VOCAB.cls).all() and (b.bins.numpy() == bins[rows]).all()
    assert (b.counts.numpy() == COUNTS[rows].toarray()).all() and not b.masked[:, : b.n_visible].any()
    for i, row in enumerate(rows):
        here = (b.genes[i] >= VOCAB.n_specials).numpy()
        number = b.genes[i].numpy()[here] - VOCAB.n_specials
        assert len(set(number)) == len(number)
        assert (b.values[i].numpy()[here] == bins[row, number]).all()
        assert (b.masked[i].numpy()[here] == b.hidden[i].numpy()[number]).all()
        assert (b.values[i].numpy()[~here] == 0).all() and not b.masked[i].numpy()[~here].any()
        could = bins[row] > 0 if genes == "expressed" else np.ones(80, bool)
        hidden = b.hidden[i].numpy()
        n_visible, n_masked = (could & ~hidden).sum(), (could & hidden).sum()
        assert (~b.masked[i].numpy()[here]).sum() == min(n_visible, limits.get("max_genes", 999))
        assert b.masked[i].numpy()[here].sum() == min(n_masked, limits.get("max_masked", 999))


@pytest.mark.parametrize("ratio", [0, .3])
def test_the_share_of_hidden_genes_is_the_ratio(ratio):
    assert abs(draw_mask((200, 500), ratio, np.random.default_rng(0)).mean() - ratio) < .01


def test_a_cell_does_not_depend_on_its_mini_batch():
    alone, among = make_batch(cells(), np.array([5])), make_batch(cells(), np.array([1, 5, 9]))
    n = alone.genes.shape[1]
    assert (among.genes[1, :n] == alone.genes[0]).all() and (among.genes[1, n:] == VOCAB.pad).all()


def test_same_seed_same_mini_batch():
    a, b, c = (make_batch(cells(), np.arange(9), 0.4, 9, 4, np.random.default_rng(s)) for s in (0, 0, 1))
    assert torch.equal(a.genes, b.genes) and torch.equal(a.hidden, b.hidden) and not torch.equal(a.hidden, c.hidden)


def test_cells_without_genes_have_cls_only():
    empty = sp.csr_matrix((2, 80), dtype=np.float32)
    b = make_batch(CellTokens(bin_values(empty), empty, VOCAB), np.arange(2), 0.4)
    assert b.genes.tolist() == [[VOCAB.cls]] * 2 and b.n_visible == 1 and b.bins.sum() == 0


def test_external_fields_travel_with_their_genes():
    by_gene, by_cell = np.arange(80) % 5, sp.csr_matrix(np.arange(50)[:, None] + np.arange(80))
    rows = np.array([8, 2])
    b = make_batch(cells(external=[by_gene, by_cell], batch=np.arange(50) % 3), rows, 0.4)
    real = b.genes >= VOCAB.n_specials
    number = b.genes - VOCAB.n_specials
    assert b.external.shape[2] == 2 and b.batch.tolist() == [2, 2]
    assert (b.external[..., 0][real] == (number % 5)[real]).all() and (b.external[~real] == 0).all()
    assert (b.external[..., 1][real] == (number + torch.tensor(rows)[:, None])[real]).all()


def test_wrong_shapes_and_modes_are_refused():
    with pytest.raises(ValueError, match="80 genes of the vocabulary"):
        CellTokens(bin_values(COUNTS)[:, :70], COUNTS, VOCAB)
    with pytest.raises(ValueError, match="'expressed' or 'all', not 'some'"):
        cells(genes="some")
    with pytest.raises(ValueError, match="mask ratio 1.0"):
        make_batch(cells(), np.arange(3), 1.0)


def sample_dense(chosen, limit, rng):
    "The same genes from a dense matrix of all genes, for comparison."
    if limit is None or chosen.sum(1).max(initial=0) <= limit:
        return chosen
    score = np.where(chosen, rng.random(chosen.shape, dtype=np.float32), 2)
    return chosen & (score < np.partition(score, limit, axis=1)[:, [limit]])


@pytest.mark.parametrize("genes", ["expressed", "all"])
@pytest.mark.parametrize("limits", [(None, None), (9, 4), (5, 0), (1, 999)])
def test_sampling_listed_genes_draws_what_sampling_a_dense_matrix_does(genes, limits):
    data, rows, rng = cells(genes=genes), np.arange(3, 40), np.random.default_rng(1)
    b = make_batch(data, rows, 0.4, *limits, np.random.default_rng(1))
    hidden = draw_mask((len(rows), 80), 0.4, rng)
    tokens = data.bins[rows].toarray() > 0 if genes == "expressed" else np.ones_like(hidden)
    assert (b.hidden.numpy() == hidden).all()
    for block, of, limit in ((b.genes[:, 1:b.n_visible], ~hidden, limits[0]), (b.genes[:, b.n_visible:], hidden, limits[1])):
        for ids, own in zip(block.numpy(), sample_dense(tokens & of, limit, rng), strict=True):
            assert (ids[ids > 0] - VOCAB.n_specials).tolist() == np.flatnonzero(own).tolist()


def test_sampling_is_uniform():
    chosen = np.ones((4000, 10), bool)
    chosen[:, 7] = False
    cell, gene, rank = sample_genes(*np.nonzero(chosen), chosen.shape, 3, np.random.default_rng(0))
    kept = np.zeros_like(chosen)
    kept[cell, gene] = True
    assert set(rank) == {0, 1, 2}
    assert (kept.sum(1) == 3).all() and not kept[:, 7].any()
    assert abs(kept[:, chosen[0]].mean(0) - 1 / 3).max() < 0.03
    assert abs(draw_mask((4000, 10), 0.4, np.random.default_rng(0)).mean(0) - 0.4).max() < 0.03


@pytest.mark.parametrize("n", [0, 1, 15, 16, 17, 1000])
def test_every_cell_is_in_one_mini_batch(n):
    lengths = np.random.default_rng(0).geometric(0.02, n)
    batches = length_batches(lengths, 16, np.random.default_rng(0))
    assert sorted(np.concatenate([[], *batches])) == list(range(n)) and max(map(len, batches), default=0) <= 16
    if n == 1000:
        again, other = (length_batches(lengths, 16, np.random.default_rng(s)) for s in (0, 1))
        assert all((a == b).all() for a, b in zip(batches, again, strict=True))
        assert {tuple(sorted(b)) for b in batches} != {tuple(sorted(b)) for b in other}
