"""Picture metrics, all on pictures `b 3 H W` in [-1, 1], each checked against another way to compute it
(tests/plumbing/test_evaluate.py)."""

from collections import defaultdict

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


def psnr(a: Tensor, b: Tensor, mask: Tensor | None = None) -> Tensor:
    """`b 3 H W` twice -> dB for each picture, peak 2 (the range of [-1, 1]); `mask` `b H W` chooses the pixels.
    Equal pictures give infinity, an empty mask gives NaN."""
    error = (a - b).square().mean(1)
    mask = torch.ones_like(error, dtype=torch.bool) if mask is None else mask
    mse = (error * mask).sum((1, 2)) / mask.sum((1, 2))
    return 10 * torch.log10(4 / mse)


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity of each pair, `b 3 H W` -> `b`: 11×11 Gaussian window, σ 1.5, K = 0.01 and 0.03, mean over
    the windows that lie wholly inside and over channels (Wang et al. 2004)."""
    a, b = (x.cpu().double().add(1).div(2) for x in (a, b))  # mps has no float64
    window = torch.exp(-(torch.arange(11, dtype=torch.float64) - 5).square() / (2 * 1.5**2))
    window = torch.outer(window, window) / window.sum() ** 2

    def blur(x):
        return F.conv2d(rearrange(x, "b c h w -> (b c) 1 h w"), window[None, None])

    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b, cov = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2, blur(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    score = (2 * mean_a * mean_b + c1) * (2 * cov + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return rearrange(score, "(b c) 1 h w -> b (c h w)", b=len(a)).mean(1)


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Between the Gaussians fitted to features `n d` and `m d`: |μ_a − μ_b|² + tr(Σ_a + Σ_b − 2 (Σ_a Σ_b)^½).

    tr (Σ_a Σ_b)^½ is the sum of the singular values of A Bᵀ, with Σ_a = AᵀA and Σ_b = BᵀB the centred features
    over √(n−1): exact for any rank, fewer samples than features included.
    """
    a, b = a.cpu().double(), b.cpu().double()
    mean_a, mean_b = a.mean(0), b.mean(0)
    A, B = (a - mean_a) / (len(a) - 1) ** 0.5, (b - mean_b) / (len(b) - 1) ** 0.5
    cross = torch.linalg.svdvals(A @ B.T).sum()
    return ((mean_a - mean_b).square().sum() + A.square().sum() + B.square().sum() - 2 * cross).item()


def share(verdicts) -> float:
    verdicts = list(verdicts)
    return round(sum(verdicts) / max(1, len(verdicts)), 4)


STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # 97.5 % quantiles for 2 to 10 values


def mean_interval(values: Tensor) -> list[float]:
    """95 % interval of a mean over independent values `n`: [low, high]; Student's t up to ten of them, the normal
    distribution for more, which for eleven is a tenth too narrow."""
    quantile, values = dict(enumerate(STUDENT, 2)).get(len(values), 1.96), values.cpu().double()  # mps has no float64
    half = quantile * values.std().item() / len(values) ** 0.5
    return [round(values.mean().item() + sign * half, 4) for sign in (-1, 1)]


def share_interval(verdicts: list[tuple[str, bool]], pictures: bool = False) -> list[float]:
    """95 % interval of the share that is right, of (text, right): Wilson's, for as many independent verdicts as the
    spread between texts leaves, since those of one text are alike. With one verdict throughout there is no spread:
    then the distinct texts count, or every sample where each is about other `pictures`."""
    n, p, groups = len(verdicts), sum(right for _, right in verdicts) / len(verdicts), defaultdict(float)
    for text, right in verdicts:
        groups[text] += right - p
    m = len(groups)
    variance = sum(total**2 for total in groups.values()) / n**2 * m / max(1, m - 1)  # of the mean, clustered by text
    n = min(n, p * (1 - p) / variance) if variance > 0 else n if pictures else m
    z = 1.96**2 / n
    middle, half = (p + z / 2) / (1 + z), (z * p * (1 - p) + z**2 / 4) ** 0.5 / (1 + z)
    return [round(max(0.0, middle - half), 4), round(min(1.0, middle + half), 4)]
