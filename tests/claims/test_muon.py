"""Claims about the optimizer: orthogonal steps for matrices, AdamW's for the rest."""

import pytest
import torch

from parts.muon import Muon, orthogonalise


@pytest.mark.parametrize("shape", [(16, 16), (16, 24), (24, 16), (16, 64), (64, 16), (3, 8, 40)])
def test_orthogonalised_matrices_keep_their_directions_and_have_singular_values_near_one(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    result = left.mT @ orthogonalise(matrix) @ right.mT  # diagonal in the matrix's own directions
    seen = result.diagonal(dim1=-2, dim2=-1)
    assert (result - torch.diag_embed(seen)).abs().max() < 1e-3
    assert seen.min() > 0.5 and seen.max() < 1.3, values


def test_long_rows_take_the_short_way_to_the_same_result():
    long = torch.randn(8, 40, generator=torch.Generator().manual_seed(1))
    parts = long[:, :16] @ torch.linalg.qr(torch.randn(16, 16))[0]  # 16 columns: the plain way
    padded = torch.cat([parts, torch.zeros(8, 24)], 1)  # zeros change no step, and 40 columns go the short way
    assert torch.allclose(orthogonalise(padded)[:, :16], orthogonalise(parts), atol=1e-4)


def test_what_is_no_matrix_moves_as_in_adam():
    ours, theirs = (torch.nn.Parameter(torch.linspace(-1, 1, 9)) for _ in range(2))
    adam = torch.optim.Adam([theirs], lr=0.1, betas=(0.9, 0.99))
    optimizers = Muon([dict(params=[ours], matrices=False, lr=0.1)]), adam
    for step in range(5):
        for parameter, optimizer in zip((ours, theirs), optimizers):
            optimizer.zero_grad()
            (parameter - step).square().sum().backward()
            optimizer.step()
    assert torch.allclose(ours, theirs, atol=1e-6)


def test_a_matrix_learns_a_linear_map():
    generator = torch.Generator().manual_seed(0)
    wanted, weight = torch.randn(8, 8, generator=generator), torch.nn.Parameter(torch.zeros(8, 8))
    optimizer = Muon([dict(params=[weight], matrices=True, lr=0.05)])
    for _ in range(200):
        optimizer.zero_grad()
        (weight - wanted).square().mean().backward()
        optimizer.step()
    assert (weight - wanted).abs().max() < 0.2
