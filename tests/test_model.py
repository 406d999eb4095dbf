"""The encoder on toy tensors: the residual connections, options that are named, domain-specific batch normalisation."""
import numpy as np
import pytest
import scipy.sparse as sp
import torch
from torch import nn

from scformer_nb.model import Block, DomainBatchNorm, Encoder, ValueEmbedding
from scformer_nb.tokens import CellTokens, Vocabulary, make_batch

COUNTS = sp.csr_matrix(np.random.default_rng(0).poisson(1.2, size=(6, 30)).astype(np.float32))
CELLS = CellTokens(COUNTS.minimum(9).astype(np.uint8), COUNTS, Vocabulary([f"gene{i}" for i in range(30)]), np.repeat([0, 1], 3))


def encoder(**options):
    torch.manual_seed(0)
    return Encoder(n_tokens=32, n_bins=10, n_batches=2, dim=16, n_blocks=2, d_ff=8, **options).eval()


def silenced(block, *names):
    "The block with layers that give nothing."
    for name in names:
        nn.init.zeros_(getattr(block, name).weight)
        nn.init.zeros_(getattr(block, name).bias)
    return block


def test_each_branch_is_added_to_its_input():
    "A block whose branches give nothing is the identity; with one branch it is the input and that branch."
    x = torch.randn(2, 5, 16)
    assert torch.equal(silenced(Block(16, 4, 32), "out", "fc2")(x, None, 5), x)
    block = silenced(Block(16, 4, 32), "out")
    assert torch.equal(block(x, None, 5), x + block.fc2(nn.functional.gelu(block.fc1(block.norm2(x)))))


def test_options_of_the_encoder_are_named():
    with pytest.raises(TypeError, match="positional"):
        Encoder(32)


def test_the_cell_embedding_is_the_output_at_cls():
    b = make_batch(CELLS, np.arange(6))
    h, h_c = encoder()(b)
    assert torch.equal(h[:, 0], h_c) and h.shape == (*b.genes.shape, 16)


def test_batch_normalisation_learns_only_in_training():
    norm, x, batch = DomainBatchNorm(4, 2), 3 + torch.randn(6, 5, 4), torch.tensor([0, 0, 0, 1, 1, 1])
    valid = torch.ones(6, 5, dtype=torch.bool)
    norm.eval()(x, batch, valid)
    assert not norm.mean.any()
    norm.train()(x, batch, valid)
    assert torch.allclose(norm.mean, 0.1 * torch.stack([x[:3].mean((0, 1)), x[3:].mean((0, 1))]), atol=1e-6)


def test_an_affine_norm_takes_the_average_for_an_unseen_batch():
    norm, x = DomainBatchNorm(4, 2, affine=True).eval(), torch.randn(2, 5, 4)
    with torch.no_grad():
        norm.shift[0], norm.shift[1] = 1, 3
    valid, seen, unseen = torch.ones(2, 5, dtype=torch.bool), torch.tensor([0, 1]), torch.tensor([-1, -1])
    difference = norm(x, unseen, valid) - norm(x, seen, valid)
    assert torch.allclose(difference[0], torch.ones(5, 4)) and torch.allclose(difference[1], -torch.ones(5, 4))


@pytest.mark.parametrize("attend_masked", [False, True])
def test_values_under_the_mask_never_matter(attend_masked):
    b = make_batch(CELLS, np.arange(6), 0.4, rng=np.random.default_rng(0))
    made, before = encoder(attend_masked=attend_masked), b.values.clone()
    h = made(b)[0]
    b.values = torch.where(b.masked, 9.0, before)
    assert torch.equal(made(b)[0], h)
    b.values = torch.where(b.masked, before, 9.0)
    assert not torch.equal(made(b)[0], h)


def test_values_are_seen_relative_to_the_number_of_bins():
    torch.manual_seed(0)
    ten = ValueEmbedding(8, n_bins=11)
    hundred = ValueEmbedding(8, n_bins=101)
    hundred.load_state_dict(ten.state_dict())
    values = torch.tensor([[1.0, 5.0, 10.0]])
    masked = torch.zeros(1, 3, dtype=torch.bool)
    assert torch.allclose(ten(values, masked), hundred(10 * values, masked), atol=1e-6)
