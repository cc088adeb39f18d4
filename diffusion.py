"""Generation: a SANA-style diffusion transformer, flow matching, self-alignment, samplers (paper, Sec. 3.3 and 3.4).

    x_t = (1 − σ) z + σ ε              z: fused latent z_f · scale, ε: Gaussian noise, σ from 1 (noise) to 0 (picture)
    v = ε − z                          what the DiT predicts from x_t, σ and the condition
    L_fm = ‖DiT(x_t, σ, condition) − v‖²
    L_align = − mean_i cos(φ_a(f_dit,i), f'_v,i)        f_dit: tokens inside the DiT, f'_v: f_v of the picture wanted

In: noisy latents `b p h w`, σ `b`, condition tokens `b l u` with their mask `b l`. Out: velocities `b p h w`.
Reference for the DiT: SANA, arXiv 2410.10629 (linear attention, Mix-FFN, AdaLN-single, no positions).

    python diffusion.py            shape trace, and the samplers on a known flow

Letters: b batch, h w rows and columns, n = h·w tokens, p channels of the latent, c width of the DiT, l length and u
width of the condition, d width of visual tokens, a heads, e width of a head.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from attention import attention
from parts.layer import Layer, MixFFN, RMSNorm
from parts.linear_attention import linear_attention
from parts.positions import sine_positions

# ---------------------------------------------------------------- flow matching


def logit_normal_times(b: int, generator: torch.Generator | None = None, shift: float = 1.0) -> Tensor:
    """σ `b` in (0, 1): the sigmoid of a standard normal, moved by `shift` as in `sample`: above 1, more of them lie
    near the noise, where it is decided what goes where (SANA: 3). One from each of b equally likely slices, in random
    order, so that a batch sees the whole path (differs from paper: independent ones, not moved)."""
    share = (torch.randperm(b, generator=generator) + torch.rand(b, generator=generator)) / b
    return (torch.special.ndtri(share.clamp(1e-6, 1 - 1e-6)) + math.log(shift)).sigmoid()


def add_noise(z: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """Clean z and noise ε `b p h w`, σ `b` -> x_t `b p h w` on the straight path from z (σ = 0) to ε (σ = 1)."""
    sigma = rearrange(sigma, "b -> b 1 1 1")
    return (1 - sigma) * z + sigma * noise  # Sec. 3.3: x_t = (1 − σ) z + σ ε


def flow_matching_loss(velocity: Tensor, z: Tensor, noise: Tensor) -> Tensor:
    """Mean of the squared differences, over all numbers, between `velocity` `b p h w` and that of the path."""
    return (velocity.float() - (noise - z)).square().mean()  # Sec. 3.3: L_fm = ‖DiT(x_t, σ, condition) − (ε − z)‖²


def alignment_loss(projected: Tensor, f_v: Tensor) -> Tensor:
    """`projected` = φ_a(f_dit) and the teacher's f'_v, which gets no gradient, are `b n d`. In [−1, 1], best −1."""
    cosine = F.cosine_similarity(projected.float(), f_v.detach().float(), dim=-1)
    return -cosine.mean()  # Sec. 3.4: L_align = − mean_i cos(φ_a(f_dit,i), f'_v,i)


# ---------------------------------------------------------------- diffusion transformer


class LinearSelfAttention(nn.Module):
    def __init__(self, c: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(c, 3 * c, bias=False)
        self.out = nn.Linear(c, c)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "b n (three a e) -> three b a n e", three=3, a=self.heads)
        read = linear_attention(q, k, v)
        if q.dtype == torch.float16:  # its largest number; SANA's sums over all tokens pass it
            read = read.clamp(-65504, 65504)
        return self.out(rearrange(read.to(x.dtype), "b a n e -> b n (a e)"))


class CrossAttention(nn.Module):
    """Several noises of a picture, x `(draws b) n c`, read its condition `b l c` together, as more queries."""

    def __init__(self, c: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q, self.kv, self.out = nn.Linear(c, c), nn.Linear(c, 2 * c), nn.Linear(c, c)

    def forward(self, x: Tensor, condition: Tensor, mask: Tensor | None) -> Tensor:
        q = rearrange(self.q(x), "(draws b) n (a e) -> b a (draws n) e", b=len(condition), a=self.heads)
        k, v = rearrange(self.kv(condition), "b l (two a e) -> two b a l e", two=2, a=self.heads)
        y = attention(q, k, v, key_mask=mask)
        return self.out(rearrange(y, "b a (draws n) e -> (draws b) n (a e)", n=x.shape[1]))


class DiTBlock(Layer):
    """Linear self-attention, cross-attention, Mix-FFN; the first and the last scaled, shifted and gated by σ."""

    def __init__(self, c: int, heads: int, cross_heads: int, mlp_ratio: float):
        super().__init__()
        self.norm = nn.LayerNorm(c, eps=1e-6, elementwise_affine=False)
        self.attn = LinearSelfAttention(c, heads)
        self.cross = CrossAttention(c, cross_heads)
        self.ffn = MixFFN(c, mlp_ratio)
        self.table = nn.Parameter(torch.randn(6, c) / c**0.5)  # AdaLN-single: one time embedding, a table per block

    def forward(self, x: Tensor, condition: Tensor, mask: Tensor | None, time: Tensor, h: int) -> Tensor:
        shift, scale, gate, shift_ffn, scale_ffn, gate_ffn = (self.table + time).unsqueeze(2).unbind(1)  # each b 1 c
        x = x + gate * self.attn(self.norm(x) * (1 + scale) + shift)
        x = x + self.cross(x, condition, mask)
        grid = rearrange(self.norm(x) * (1 + scale_ffn) + shift_ffn, "b (h w) c -> b c h w", h=h)
        return x + gate_ffn * rearrange(self.ffn(grid), "b c h w -> b (h w) c")


class TimeEmbedding(nn.Module):
    """σ in [0, 1] -> 256 cosines and sines of 1000 σ -> MLP."""

    def __init__(self, c: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, c), nn.SiLU(), nn.Linear(c, c))

    def forward(self, sigma: Tensor) -> Tensor:
        frequencies = torch.exp(-math.log(10000) / 128 * torch.arange(128, device=sigma.device))
        angles = 1000 * sigma.float()[:, None] * frequencies
        return self.mlp(torch.cat([angles.cos(), angles.sin()], -1))


class DiT(nn.Module):
    """(x_t `b p h w`, σ `b`, condition `b l u`, mask `b l`) -> (velocity `b p h w`, tokens `b n c` after
    `align_block`). x_t and σ may be `(draws b)`, several noises for each condition.

    `positions`: add sines of row and column to the latent tokens.
    # differs from paper: SANA has no positions; on the toy's small grid they teach places sooner.
    """

    def __init__(self, p: int, c: int, layers: int, heads: int, cross_heads: int, condition_width: int,
                 mlp_ratio: float = 2.5, align_block: int = 6, positions: bool = False):
        super().__init__()
        if not 1 <= align_block <= layers:
            raise ValueError(f"align_block {align_block} of {layers} layers: choose one from 1 to {layers}")
        self.align_block, self.positions = align_block, positions
        self.embed = nn.Linear(p, c)
        self.time = TimeEmbedding(c)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(c, 6 * c))
        self.caption = nn.Sequential(nn.Linear(condition_width, c), nn.GELU("tanh"), nn.Linear(c, c))
        self.caption_norm = RMSNorm(c, eps=1e-5)
        self.blocks = nn.ModuleList(DiTBlock(c, heads, cross_heads, mlp_ratio) for _ in range(layers))
        self.norm = nn.LayerNorm(c, eps=1e-6, elementwise_affine=False)
        self.table = nn.Parameter(torch.randn(2, c) / c**0.5)
        self.out = nn.Linear(c, p)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.modulation[1].weight, std=0.02)
        nn.init.zeros_(self.out.weight)  # starts by predicting no velocity

    def forward(self, x_t: Tensor, sigma: Tensor, condition: Tensor,
                mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x = self.embed(rearrange(x_t, "b p h w -> b (h w) p"))
        if self.positions:
            x = x + sine_positions(*x_t.shape[2:], x.shape[-1], x.device)
        time = self.time(sigma)
        modulation = rearrange(self.modulation(time), "b (six c) -> b six c", six=6)
        condition = self.caption_norm(self.caption(condition))
        x, f_dit = self.through_blocks(x, condition, mask, modulation, x_t.shape[2])
        shift, scale = (self.table + time[:, None]).unsqueeze(2).unbind(1)
        velocity = self.out(self.norm(x) * (1 + scale) + shift)
        return rearrange(velocity, "b (h w) p -> b p h w", h=x_t.shape[2]), f_dit

    def through_blocks(self, x: Tensor, condition: Tensor, mask: Tensor | None, modulation: Tensor,
                       height: int) -> tuple[Tensor, Tensor]:
        """Tokens x `b n c` through all blocks -> (x after the last, f_dit: x after number `align_block`, from 1)."""
        for number, block in enumerate(self.blocks, 1):
            x = block(x, condition, mask, modulation, height)
            if number == self.align_block:
                f_dit = x  # Sec. 3.4: what L_align reads
        return x, f_dit


class AlignmentHead(nn.Sequential):
    """φ_a: DiT tokens `b n c` -> the teacher's width `b n d`: three Linear over `hidden`, SiLU between them."""

    def __init__(self, c: int, hidden: int, d: int):
        super().__init__(nn.Linear(c, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, d))


# ---------------------------------------------------------------- sampling

SAMPLERS = ("euler", "dpm", "renoise")
Velocity = Callable[[Tensor, Tensor], Tensor]  # (x `b p h w`, σ `b`) -> v


def guided(dit: Callable, condition: tuple[Tensor, Tensor], nothing: tuple[Tensor, Tensor],
           guidance: float) -> Velocity:
    """Classifier-free guidance: v = v_nothing + guidance · (v_condition − v_nothing).

    `dit(x, σ, tokens, mask) -> v`; `condition` and `nothing` are (tokens `b l u`, mask `b l`). Guidance 1 asks once.
    """
    if guidance == 1:
        return lambda x, sigma: dit(x, sigma, *condition)
    tokens = torch.cat(equally_long(condition[0], nothing[0]))
    mask = torch.cat(equally_long(condition[1], nothing[1]))

    def velocity(x, sigma):
        with_words, without = dit(torch.cat([x, x]), torch.cat([sigma, sigma]), tokens, mask).chunk(2)
        return without + guidance * (with_words - without)

    return velocity


def equally_long(*parts: Tensor) -> list[Tensor]:
    """Pads `b l …` with zeros (a mask: false) to the longest l."""
    longest = max(part.shape[1] for part in parts)
    return [F.pad(part, (0, 0) * (part.ndim - 2) + (0, longest - part.shape[1])) for part in parts]


def sample(velocity: Velocity, noise: Tensor, steps: int = 20, sampler: str = "dpm", shift: float = 1.0,
           generator: torch.Generator | None = None):
    """From noise `b p h w` at σ = 1 to a latent at σ = 0. Returns (z, the path: steps + 1 latents from noise to z).

    euler   x ← x + (σ' − σ) v
    dpm     multistep DPM-Solver++ (arXiv 2211.01095, Algorithm 2) with α = 1 − σ: extrapolates the clean latent
            x₀ = x − σ v from its last two estimates
    renoise x ← (1 − σ') x₀ + σ' ε' with noise ε' drawn anew (a CPU's `generator`; the steps of arXiv 2303.01469,
            Algorithm 1): a later step mends what an earlier one got wrong. As x₀ is a mean, pictures vary less
    shift   above 1 spends more of the steps near the noise: σ ← shift σ / (1 + (shift − 1) σ)
    Raises ValueError for an unknown sampler or fewer than one step.
    """
    if sampler not in SAMPLERS or steps < 1:
        raise ValueError(f"sampler {sampler!r} with {steps} steps: want one of {', '.join(SAMPLERS)}, and at least 1")
    sigmas = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    sigmas = (shift * sigmas / (1 + (shift - 1) * sigmas)).tolist()
    x, path, previous, gap_before = noise, [noise], None, math.inf  # a gap is a step's change of log((1 − σ) / σ)
    for now, after in zip(sigmas, sigmas[1:]):
        clean = x - now * velocity(x, x.new_full((len(x),), now))
        estimate = clean
        if sampler == "dpm":
            gap = log_snr(after) - log_snr(now)
            if previous is not None and math.isfinite(gap) and math.isfinite(gap_before):
                estimate = clean + gap / (2 * gap_before) * (clean - previous)  # straight on, half a gap further
            previous, gap_before = clean, gap
        if sampler == "renoise":  # differs from paper: it samples with dpm
            x = (1 - after) * clean + after * torch.randn(x.shape, generator=generator).to(x)
        else:  # exact for a constant clean latent; with `clean`, Euler's
            x = after / now * x + (1 - after / now) * estimate
        path.append(x)
    return x, path


def log_snr(sigma: float) -> float:
    """λ = log((1 − σ) / σ), infinite at both ends."""
    return -math.inf if sigma >= 1 else math.inf if sigma <= 0 else math.log((1 - sigma) / sigma)


# ---------------------------------------------------------------- what P3 and U1 to U3 learn from


class Noise(NamedTuple):
    """A batch's times and noises, several of each picture, one round of the whole batch after the other."""

    sigma: Tensor  # σ `(draws b)`
    epsilon: Tensor  # ε `(draws b) p h w`


def flow_losses(dit: DiT, z: Tensor, tokens: Tensor, mask: Tensor, noise: Noise) -> tuple[Tensor, Tensor]:
    """-> (L_fm, f_dit `(draws b) n c`) for clean latents z `b p h w`, each at as many random times as `noise` holds:
    what is dear, the condition, is computed once for all of them."""
    draws = len(noise.sigma) // len(z)
    z = repeat(z, "b ... -> (draws b) ...", draws=draws)
    x_t = add_noise(z, noise.epsilon, noise.sigma)
    velocity, f_dit = dit(x_t, noise.sigma, tokens, mask)
    return flow_matching_loss(velocity, z, noise.epsilon), f_dit


def text_to_image_losses(dit: DiT, z: Tensor, condition, noise: Noise) -> dict[str, Tensor]:
    """P3, in place of SANA: draw the pixel autoencoder's latents z from the LLM's text states."""
    return {"L_fm": flow_losses(dit, z, condition.tokens, condition.mask, noise)[0]}


def unified_losses(batch: dict, weights: dict[str, float], *, condition: Callable, features: Callable,
                   clean_latent: Callable, dit: DiT, align_head: AlignmentHead,
                   external_teacher: nn.Module | None = None) -> dict[str, Tensor]:
    """U1 to U3 (Sec. 3.3, 3.4): draw and edit z_f through queries, router and connector; the tokenizer teaches the DiT.

    `condition`: `MLLM.condition`. `features(images)` -> f_v `b n d`, `clean_latent(images)` -> (z_f · scale `b p h w`,
    f_v). A batch holds requests ("words"), edits ("instructions", "references"), or both, in this order; "images": the
    pictures wanted.
    """
    conditions = []
    if "words" in batch:
        conditions.append(condition(*batch["words"]))
    if "instructions" in batch:
        with torch.no_grad():
            f_v_reference = features(batch["references"])
        conditions.append(condition(*batch["instructions"], f_v_reference))
    tokens = torch.cat(equally_long(*(part.tokens for part in conditions)))
    mask = torch.cat(equally_long(*(part.mask for part in conditions)))
    with torch.no_grad():
        z, f_v = clean_latent(batch["images"])
        teacher = f_v if external_teacher is None else external_teacher(batch["images"])  # Sec. 3.4: f'_v
    L_fm, f_dit = flow_losses(dit, z, tokens, mask, batch["noise"])
    if "L_align" not in weights:
        return {"L_fm": L_fm}
    teacher = repeat(teacher, "b n d -> (draws b) n d", draws=len(f_dit) // len(teacher))
    return {"L_fm": L_fm, "L_align": alignment_loss(align_head(f_dit), teacher)}


if __name__ == "__main__":
    torch.manual_seed(0)
    dit = DiT(p=16, c=128, layers=4, heads=4, cross_heads=4, condition_width=96, align_block=2)
    x, condition, mask = torch.randn(2, 16, 4, 4), torch.randn(2, 9, 96), torch.ones(2, 9, dtype=torch.bool)
    velocity, hidden = dit(x, torch.tensor([0.3, 0.9]), condition, mask)
    print("x_t       b p h w", tuple(x.shape), "  condition b l u", tuple(condition.shape))
    print("velocity  b p h w", tuple(velocity.shape), "  hidden b n c", tuple(hidden.shape))
    print("aligned   b n d  ", tuple(AlignmentHead(128, 256, 64)(hidden).shape))
    assert velocity.shape == x.shape and hidden.shape == (2, 16, 128)
    flow = lambda x, sigma: (x - 2.0) / sigma[:, None, None, None]  # the straight flow to the point 2
    for sampler in SAMPLERS:
        z, path = sample(flow, x, 5, sampler)
        print(f"{sampler:8}  z b p h w", tuple(z.shape), f"mean {z.mean():.3f}", f"path of {len(path)}")
        assert torch.allclose(z, torch.full_like(z, 2.0), atol=1e-5)
