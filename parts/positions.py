"""Where a token stands: rotary positions of words (RoFormer), sines of row and column on a grid."""

import math

import torch
from einops import rearrange, repeat
from torch import Tensor


def rotary(positions: Tensor, width: int, base: float = 1e6) -> tuple[Tensor, Tensor]:
    """Positions `b l` -> cosines and sines `b 1 l e` of the angles position · base^(−2i/e) (arXiv 2104.09864)."""
    frequencies = base ** (-torch.arange(0, width, 2, device=positions.device) / width)
    angles = repeat(positions[..., None] * frequencies, "b l e -> b 1 l (two e)", two=2)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-second, first], -1) * sin).to(x.dtype)  # angles are float32, x may be half


def word_positions(mask: Tensor | None, x: Tensor, past: int = 0) -> Tensor:
    """`b l`: which word of its sequence each is; padding does not count, so it moves no other word."""
    if mask is None:
        return torch.arange(past, past + x.shape[1], device=x.device)[None]
    return (mask.cumsum(1) - 1).clamp(min=0)[:, past:]


def sine_positions(h: int, w: int, c: int, device) -> Tensor:
    """`n c`: half of the channels tell the row, half the column, in sines and cosines."""
    frequencies = 10.0 ** -torch.linspace(0, 2, c // 4, device=device)
    row, column = (torch.arange(size, device=device)[:, None] * frequencies for size in (h, w))
    row, column = (torch.cat([a.sin(), a.cos()], -1) for a in (row, column))
    grid = torch.cat([row[:, None].expand(h, w, -1), column[None].expand(h, w, -1)], -1)
    return rearrange(grid, "h w c -> (h w) c")


def grid_positions(x: Tensor) -> Tensor:
    """Sines of row and column for tokens `b n d` of a square grid, `n d`."""
    side = math.isqrt(x.shape[1])
    return sine_positions(side, side, x.shape[2], x.device)
