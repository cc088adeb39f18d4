"""The tokenizer: one encoder that understands, two streams that make its features a picture again (paper, Sec. 3.1,
3.2).

    I ─ vision encoder E_s + projector ─ f_v ─┬─ semantic stream: no attention, few blocks ─ z_s ─┐
                                              └─ pixel stream: a Transformer, then the same ─ z_p ─┴─ F ─ z_f ─ D_p ─ Î

In: pictures `b 3 H W` in [-1, 1]. Out: f_v `b n d` (what the LLM reads), latents z_s, z_p, z_f `b n p`, pictures again.
Architectures: E_s is InternViT's (arXiv 2404.16821), D_p and E_p are DC-AE's (arXiv 2410.10733, parts/dcae.py).

    python tokenizer.py            shape trace

Letters: b batch, h w rows and columns, n tokens, d width of visual tokens, p channels of the latent, v width of the
vision encoder, a heads, e width of a head.
"""

import copy
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from attention import attention
from parts.adversary import Discriminator, Perceptual
from parts.dcae import PixelDecoder, PixelEncoder, resize
from parts.layer import ImageNetScale, Layer

# ---------------------------------------------------------------- vision encoder E_s


class SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "b n (three a e) -> three b a n e", three=3, a=self.heads)
        return self.out(rearrange(attention(q, k, v), "b a n e -> b n (a e)"))


class TransformerLayer(Layer):
    """Pre-norm attention and GELU MLP; `layer_scale` starts both branches at that share (None: without)."""

    def __init__(self, width: int, heads: int, mlp_ratio: float = 4, layer_scale: float | None = None):
        super().__init__()
        hidden = int(mlp_ratio * width)
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn = SelfAttention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
        scales = [nn.Parameter(torch.full((width,), layer_scale)) if layer_scale else 1.0 for _ in range(2)]
        self.scale1, self.scale2 = scales

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.scale1 * self.attn(self.norm1(x))
        return x + self.scale2 * self.mlp(self.norm2(x))


class VisionEncoder(nn.Module):
    """E_s with its projector: `b 3 H W` -> f_v `b n d`, one token for each 2×2 patches. Its learned positions are those
    of pictures of `side`; for another side they are interpolated, as InternVL does. `imagenet`: pictures reach it with
    ImageNet's mean 0 and variance 1."""

    def __init__(self, side: int, patch: int, width: int, layers: int, heads: int, mlp_ratio: float, d: int,
                 imagenet: bool = False):
        super().__init__()
        if side % (2 * patch):
            raise ValueError(f"side {side} is no multiple of a token's {2 * patch} pixels: "
                             "choose another side or patch")
        self.grid, self.token = side // patch, 2 * patch
        self.scale = ImageNetScale(imagenet)
        self.patches = nn.Conv2d(3, width, patch, stride=patch)
        self.cls = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.positions = nn.Parameter(torch.randn(1, 1 + self.grid**2, width) * 0.02)
        self.layers = nn.ModuleList(TransformerLayer(width, heads, mlp_ratio, layer_scale=0.1) for _ in range(layers))
        self.projector = nn.Sequential(nn.LayerNorm(4 * width), nn.Linear(4 * width, d), nn.GELU(), nn.Linear(d, d))

    def forward(self, images: Tensor) -> Tensor:
        h, w = images.shape[-2:]
        if h != w or h % self.token:
            raise ValueError(f"pictures of {h}×{w}: make them square, a multiple of a token's {self.token} pixels")
        x = rearrange(self.patches(self.scale(images)), "b v h w -> b (h w) v")
        x = torch.cat([repeat(self.cls, "1 1 v -> b 1 v", b=len(x)), x], 1) + self.positions_on(h // (self.token // 2))
        for layer in self.layers:
            x = layer(x)
        return self.projector(fold(x[:, 1:]))  # f_v; the CLS token is dropped: nothing reads it

    def positions_on(self, grid: int) -> Tensor:
        """Positions of the CLS token and of `grid`² patches, `1 n v`."""
        if grid == self.grid:
            return self.positions
        table = rearrange(self.positions[:, 1:], "1 (h w) v -> 1 v h w", h=self.grid).float()
        table = F.interpolate(table, size=(grid, grid), mode="bicubic")
        return torch.cat([self.positions[:, :1], rearrange(table, "1 v h w -> 1 (h w) v")], 1)


def fold(x: Tensor) -> Tensor:
    """`b n v` of a square grid -> `b n/4 4v`: 2×2 neighbours become the channels of one token (InternVL's pixel
    unshuffle), so that the LLM reads a quarter of the tokens and no number is lost."""
    side = math.isqrt(x.shape[1])
    return rearrange(x, "b (h s1 w s2) v -> b (h w) (s1 s2 v)", s1=2, s2=2, h=side // 2)


# ---------------------------------------------------------------- the two streams and their fusion


class ResidualMLP(nn.Module):
    """x + Linear(GELU(Linear(LN(x))))"""

    def __init__(self, d: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.LayerNorm(d), nn.Linear(d, d), nn.GELU(), nn.Linear(d, d))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(x)


class Stream(nn.Sequential):
    """f_v `b n d` -> latent `b n p`: Transformer layers, residual blocks, projection (LN, Linear, GELU, Linear).

    The one number `layers` is what makes the pair asymmetric (Sec. 3.1). With 0, the semantic stream's, each token is
    changed by itself, so meaning stays where the LLM learned to read it. With more, the pixel stream's (T_p; paper: 6),
    tokens exchange the detail that a picture needs and a description does not.
    """

    def __init__(self, d: int, p: int, layers: int, heads: int, residual_blocks: int):
        super().__init__(*(TransformerLayer(d, heads) for _ in range(layers)),
                         *(ResidualMLP(d) for _ in range(residual_blocks)),
                         nn.Sequential(nn.LayerNorm(d), nn.Linear(d, p), nn.GELU(), nn.Linear(p, p)))
        self.apply(init_new_layer)


def init_new_layer(module: nn.Module) -> None:
    """The paper's initialisation of new layers: truncated normal, std 0.02, zero biases."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


class Latents(NamedTuple):
    semantic: Tensor | None  # z_s `b n p`; None where the ablation has no such stream
    pixel: Tensor | None  # z_p `b n p`
    fused: Tensor  # z_f `b n p`


class Tokenizer(nn.Module):
    """E_s, both streams, fusion and D_p. `variant`: dual, semantic-only or pixel-only (paper, Table 5)."""

    def __init__(self, vision: VisionEncoder, decoder: PixelDecoder, d: int, p: int, pixel_layers: int, heads: int,
                 residual_blocks: int = 3, variant: str = "dual", semantic_layers: int = 0):
        super().__init__()
        if variant not in ("dual", "semantic-only", "pixel-only"):
            raise ValueError(f"unknown tokenizer {variant!r}: dual, semantic-only or pixel-only")
        self.vision, self.decoder = vision, decoder
        self.semantic_stream = self.pixel_stream = None
        if variant != "pixel-only":
            self.semantic_stream = Stream(d, p, semantic_layers, heads, residual_blocks)  # P_s: no attention
        if variant != "semantic-only":
            self.pixel_stream = Stream(d, p, pixel_layers, heads, residual_blocks)  # P_p after T_p
        width = p * (2 if variant == "dual" else 1)
        self.fusion = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, p))
        self.fusion.apply(init_new_layer)

    def features(self, images: Tensor) -> Tensor:
        return self.vision(images)  # Sec. 3.1: f_v = E_s(I), which the LLM reads as well

    def latents(self, f_v: Tensor) -> Latents:
        z_s = self.semantic_stream(f_v) if self.semantic_stream else None  # Sec. 3.1: z_s = P_s(f_v)
        z_p = self.pixel_stream(f_v) if self.pixel_stream else None  # Sec. 3.1: z_p = P_p(T_p(f_v))
        return Latents(z_s, z_p, self.fuse(z_s, z_p))

    def fuse(self, z_s: Tensor | None, z_p: Tensor | None) -> Tensor:
        return self.fusion(torch.cat([z for z in (z_s, z_p) if z is not None], -1))  # Sec. 3.1: z_f = F([z_s ; z_p])

    def decode(self, z_f: Tensor, side: int) -> Tensor:
        """D_p; where its factor differs from a token's pixels (paper: 32 and 28) the picture is resized to `side`."""
        return resize(self.decoder(z_f), side)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Latents]:
        """-> (reconstruction `b 3 H W`, f_v `b n d`, latents)"""
        f_v = self.features(images)
        latents = self.latents(f_v)
        return self.decode(latents.fused, images.shape[-1]), f_v, latents  # Sec. 3.1: Î = D_p(z_f)


# ---------------------------------------------------------------- what P2 and T1 to T3 learn from

Losses = dict[str, Tensor]  # symbol -> value, float32; train.py's stages say which are asked for, with which weights


def squared(a: Tensor, b: Tensor) -> Tensor:
    """Mean of the squared differences, in float32."""
    return (a.float() - b.float()).square().mean()


def pixel_latent(pixel_encoder: PixelEncoder, images: Tensor, grid: int) -> Tensor:
    """E_p(I): pictures `b 3 H W` -> the pixel autoencoder's latents `b n p`, n = grid². Where its factor differs from a
    token's pixels (paper: 32 and 28) it sees the picture resized, as `Tokenizer.decode` resizes what D_p draws."""
    return pixel_encoder(resize(images, grid * pixel_encoder.factor))


def autoencoder_losses(z: Tensor, tokenizer: Tokenizer, images: Tensor, weights: dict[str, float]) -> Losses:
    """P2, in place of DC-AE: E_p(I), z `b n p`, and D_p reconstruct, without the tokenizer's encoder.
    # differs from paper: a small penalty L_z keeps the latents near unit size (DC-AE has none)."""
    losses = {"L_mse": squared(tokenizer.decode(z, images.shape[-1]), images)}
    if "L_z" in weights:
        losses["L_z"] = z.float().square().mean()
    return losses


def frozen_copy(encoder: VisionEncoder) -> VisionEncoder:
    """E_s': the encoder as T3 finds it, for L_s: with weights of its own, which never train again (Sec. 3.2)."""
    return copy.deepcopy(encoder).requires_grad_(False)


def self_distillation(f_v: Tensor, f_v_before: Tensor) -> Tensor:
    """L_s binds the *encoder's tokens*, not a latent: f_v `b n d` of the encoder that trains, to those of its copy
    E_s'. So the LLM, which never trains again, goes on reading what it learned to read."""
    return squared(f_v, f_v_before.detach())  # Sec. 3.2: L_s = ‖E_s(I) − E_s'(I)‖²


def tokenizer_losses(tokenizer: Tokenizer, images: Tensor, weights: dict[str, float],
                     target_latent: Callable[[], Tensor], perceptual: Perceptual | None = None,
                     encoder_before: nn.Module | None = None,
                     discriminator: Discriminator | None = None) -> tuple[Losses, Tensor]:
    """T1 to T3 (Sec. 3.2) -> (the losses that `weights` asks for, the reconstruction `b 3 H W`).

    `target_latent()`: E_p'(I) `b n p`. L_lpips asks `perceptual`, L_s `encoder_before` (E_s'), L_gan `discriminator`.
    """
    reconstruction, f_v, latents = tokenizer(images)
    losses = {"L_mse": squared(reconstruction, images)} if "L_mse" in weights else {}
    if "L_lpips" in weights:
        losses["L_lpips"] = perceptual(reconstruction, images)
    if "L_p" in weights or "L_f" in weights:
        with torch.no_grad():
            z_target = target_latent()
    if "L_p" in weights and latents.pixel is not None:
        losses["L_p"] = squared(latents.pixel, z_target)  # Sec. 3.2: L_p = ‖z_p − E_p'(I)‖²
    if "L_f" in weights:  # differs from paper: U1 keeps P3's DiT frozen, and P3 drew E_p's latents, not z_f
        losses["L_f"] = squared(latents.fused, z_target)
    if "L_s" in weights:
        losses["L_s"] = self_distillation(f_v, encoder_before(images))
    if "L_gan" in weights and discriminator is not None:  # it joins later
        with torch.autocast(images.device.type, enabled=False):
            losses["L_gan"] = discriminator.generator_loss(reconstruction.float())
    return losses, reconstruction


if __name__ == "__main__":
    torch.manual_seed(0)
    vision = VisionEncoder(side=32, patch=4, width=64, layers=2, heads=4, mlp_ratio=4, d=128)
    shape = dict(p=16, widths=(32, 64, 128, 128), depths=(0, 1, 1, 1), vit_stages=1)
    pixel_encoder, tokenizer = PixelEncoder(**shape), Tokenizer(vision, PixelDecoder(**shape), 128, 16, 3, 4)
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    reconstruction, f_v, latents = tokenizer(images)
    print("I              b 3 H W", tuple(images.shape))
    print("f_v            b n d  ", tuple(f_v.shape))
    print("z_s, z_p, z_f  b n p  ", *(tuple(z.shape) for z in latents))
    print("E_p'(I)        b n p  ", tuple(pixel_encoder(images).shape))
    print("Î              b 3 H W", tuple(reconstruction.shape))
    print("logits         b 1 h w", tuple(Discriminator()(images).shape))
    print(f"L_lpips        {Perceptual(pixel_encoder)(reconstruction, images):.3f}")
    assert reconstruction.shape == images.shape and latents.fused.shape == pixel_encoder(images).shape == (2, 16, 16)
