"""The tokenizer: one encoder that understands, two streams that make its features a picture again (paper, Sec. 3.1, 3.2).

    I ─ vision encoder E_s + projector ─ f_v ─┬─ semantic stream: no attention, few blocks ─ z_s ─┐
                                              └─ pixel stream: a Transformer, then the same ─ z_p ─┴─ F ─ z_f ─ D_p ─ Î

In: pictures `b 3 H W` in [-1, 1]. Out: f_v `b n d` (what the LLM reads), latents z_s, z_p, z_f `b n p`, pictures again.
Architectures: E_s is InternViT's (arXiv 2404.16821), D_p and E_p are DC-AE's (arXiv 2410.10733).

    python tokenizer.py            shape trace
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from torch import Tensor, nn

from attention import attention
from layer import Layer, RMSNorm
from linear_attention import linear_attention
from processes import average

# ---------------------------------------------------------------- vision encoder E_s


class SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "b n (r h e) -> r b h n e", r=3, h=self.heads)
        return self.out(rearrange(attention(q, k, v), "b h n e -> b n (h e)"))


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
    """E_s with its projector: `b 3 H W` -> f_v `b n d`, one token for each 2×2 patches. The side must be the one it was
    built for (its positions are learned)."""

    def __init__(self, side: int, patch: int, width: int, layers: int, heads: int, mlp_ratio: float, d: int):
        super().__init__()
        if side % (2 * patch):
            raise ValueError(f"side {side} is no multiple of a token's {2 * patch} pixels: choose another side or patch")
        self.side, self.grid = side, side // patch
        self.patches = nn.Conv2d(3, width, patch, stride=patch)
        self.cls = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.positions = nn.Parameter(torch.randn(1, 1 + self.grid**2, width) * 0.02)
        self.layers = nn.ModuleList(TransformerLayer(width, heads, mlp_ratio, layer_scale=0.1) for _ in range(layers))
        self.projector = nn.Sequential(nn.LayerNorm(4 * width), nn.Linear(4 * width, d), nn.GELU(), nn.Linear(d, d))

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[-2:] != (self.side, self.side):
            raise ValueError(f"expected {self.side}×{self.side} pictures, got {tuple(images.shape)}: resize them first")
        x = rearrange(self.patches(images), "b d h w -> b (h w) d")
        x = torch.cat([repeat(self.cls, "1 1 d -> b 1 d", b=len(x)), x], 1) + self.positions
        for layer in self.layers:
            x = layer(x)
        x = x[:, 1:]  # CLS is dropped
        x = rearrange(x, "b (h s1 w s2) d -> b (h w) (s1 s2 d)", s1=2, s2=2, h=self.grid // 2)
        return self.projector(x)  # f_v


# ---------------------------------------------------------------- pixel autoencoder: E_p and D_p


class ChannelNorm(RMSNorm):
    """RMS over the channels of `b c h w`, then a learned scale and shift."""

    def __init__(self, c: int):
        super().__init__(c, eps=1e-5)
        self.bias = nn.Parameter(torch.zeros(c))

    def forward(self, x: Tensor) -> Tensor:
        return rearrange(super().forward(rearrange(x, "b c h w -> b h w c")) + self.bias, "b h w c -> b c h w")


class ResBlock(Layer):
    def __init__(self, c: int):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(c, c, 3, padding=1), nn.Conv2d(c, c, 3, padding=1, bias=False)
        self.norm = ChannelNorm(c)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.conv2(F.silu(self.conv1(x))))


class MixFFN(nn.Module):
    """1×1 up, depthwise 3×3, gate, 1×1 down: `b c h w` -> same. The DiT's feed-forward too."""

    def __init__(self, c: int, ratio: float = 4):
        super().__init__()
        hidden = int(ratio * c)
        self.up = nn.Conv2d(c, 2 * hidden, 1)
        self.depth = nn.Conv2d(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden)
        self.down = nn.Conv2d(hidden, c, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.depth(F.silu(self.up(x))).chunk(2, dim=1)
        return self.down(x * F.silu(gate))


class EfficientViTBlock(Layer):
    """Linear attention over the features and over their 5×5 neighbourhoods (two scales), then a Mix-FFN."""

    def __init__(self, c: int, head_width: int = 32, neighbourhood: int = 5):
        super().__init__()
        self.head_width = head_width
        self.qkv = nn.Conv2d(c, 3 * c, 1, bias=False)
        self.nearby = nn.Sequential(
            nn.Conv2d(3 * c, 3 * c, neighbourhood, padding=neighbourhood // 2, groups=3 * c, bias=False),
            nn.Conv2d(3 * c, 3 * c, 1, groups=3 * c // head_width, bias=False))
        self.out = nn.Conv2d(2 * c, c, 1, bias=False)
        self.norm = ChannelNorm(c)
        self.ffn, self.ffn_norm = MixFFN(c), ChannelNorm(c)

    def forward(self, x: Tensor) -> Tensor:
        near = self.qkv(x)
        scales = torch.cat([near, self.nearby(near)], 1)
        q, k, v = rearrange(scales, "b (s r e) h w -> r b s (h w) e", r=3, e=self.head_width)
        mixed = rearrange(linear_attention(q, k, v).to(x.dtype), "b s (h w) e -> b (s e) h w", h=x.shape[2])
        x = x + self.norm(self.out(mixed))
        return x + self.ffn_norm(self.ffn(x))


class Down(nn.Module):
    """Half the side: conv + pixel unshuffle (`resample` shuffle) or a conv of stride 2 (conv), plus (shortcut) the
    unshuffled input averaged down to the channels."""

    def __init__(self, c_in: int, c_out: int, shortcut: bool = True, resample: str = "shuffle"):
        super().__init__()
        self.shuffle, self.shortcut, self.c_out = resample == "shuffle", shortcut, c_out
        self.conv = nn.Conv2d(c_in, c_out // 4 if self.shuffle else c_out, 3, 1 if self.shuffle else 2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.pixel_unshuffle(self.conv(x), 2) if self.shuffle else self.conv(x)
        return y + reduce(F.pixel_unshuffle(x, 2), "b (c g) h w -> b c h w", "mean", c=self.c_out) if self.shortcut else y


class Up(nn.Module):
    """Twice the side: conv + pixel shuffle (`resample` shuffle) or each pixel four times + conv (conv), plus (shortcut) the
    input's channels repeated and shuffled."""

    def __init__(self, c_in: int, c_out: int, shortcut: bool = True, resample: str = "shuffle"):
        super().__init__()
        self.shuffle, self.shortcut, self.repeats = resample == "shuffle", shortcut, 4 * c_out // c_in
        self.conv = nn.Conv2d(c_in, 4 * c_out if self.shuffle else c_out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if self.shuffle:
            y = F.pixel_shuffle(self.conv(x), 2)
        else:
            y = self.conv(repeat(x, "b c h w -> b c (h s1) (w s2)", s1=2, s2=2))
        return y + F.pixel_shuffle(repeat(x, "b c h w -> b (c g) h w", g=self.repeats), 2) if self.shortcut else y


def resize(images: Tensor, side: int) -> Tensor:
    """`b 3 H H` -> `b 3 side side`, bilinear, smoothed where it shrinks; as it is where it fits."""
    if images.shape[-1] == side:
        return images
    return F.interpolate(images, size=(side, side), mode="bilinear", antialias=images.shape[-1] > side)


def blocks(c: int, depth: int, is_vit: bool) -> list[nn.Module]:
    return [EfficientViTBlock(c) if is_vit else ResBlock(c) for _ in range(depth)]


class PixelEncoder(nn.Module):
    """E_p: `b 3 H W` -> latents `b n p`, one for `factor`² pixels. Each stage after the first halves the side; the deepest
    `vit_stages` hold EfficientViT blocks. A first depth of 0 means: the first stage is one strided convolution, as in the
    first DC-AE f32; `resample` conv is the later one's, SANA's."""

    def __init__(self, p: int, widths: tuple, depths: tuple, vit_stages: int, resample: str = "shuffle"):
        super().__init__()
        self.p, self.stages, last = p, nn.ModuleList(), len(widths) - 1
        self.factor = 2**last
        self.stem = nn.Conv2d(3, widths[0], 3, padding=1) if depths[0] else Down(3, widths[1], False, resample)
        for i, (c, depth) in enumerate(zip(widths, depths)):
            down = [Down(c, widths[i + 1], resample=resample)] if depth and i < last else []
            self.stages.append(nn.Sequential(*blocks(c, depth, i > last - vit_stages), *down))
        self.out = nn.Conv2d(widths[-1], p, 3, padding=1)

    def features(self, images: Tensor) -> list[Tensor]:
        """The maps `b c h w` after the stem and after each stage, shallow to deep."""
        maps = [self.stem(images.contiguous(memory_format=torch.channels_last))]  # convolutions are faster so
        for stage in self.stages:
            if len(stage):
                maps.append(stage(maps[-1]))
        return maps

    def forward(self, images: Tensor) -> Tensor:
        x = self.features(images)[-1]
        z = self.out(x) + reduce(x, "b (p g) h w -> b p h w", "mean", p=self.p)
        return rearrange(z, "b p h w -> b (h w) p")


class PixelDecoder(nn.Module):
    """D_p, the mirror of E_p: latents `b n p` of a square grid -> `b 3 H W`."""

    def __init__(self, p: int, widths: tuple, depths: tuple, vit_stages: int, resample: str = "shuffle"):
        super().__init__()
        self.repeats, self.stages, last = widths[-1] // p, nn.ModuleList(), len(widths) - 1
        self.stem = nn.Conv2d(p, widths[-1], 3, padding=1)
        for i, (c, depth) in reversed(list(enumerate(zip(widths, depths)))):
            up = [Up(widths[i + 1], c, resample=resample)] if depth and i < last else []
            self.stages.append(nn.Sequential(*up, *blocks(c, depth, i > last - vit_stages)))
        c = widths[0] if depths[0] else widths[1]
        self.norm = ChannelNorm(c)
        self.out = nn.Conv2d(c, 3, 3, padding=1) if depths[0] else Up(c, 3, False, resample)

    def forward(self, z: Tensor) -> Tensor:
        z = rearrange(z, "b (h w) p -> b p h w", h=round(z.shape[1] ** 0.5))
        x = self.stem(z) + repeat(z, "b p h w -> b (p g) h w", g=self.repeats)
        for stage in self.stages:
            x = stage(x)
        return self.out(F.relu(self.norm(x)))


# ---------------------------------------------------------------- the two streams and their fusion


class ResidualMLP(nn.Module):
    """x + Linear(GELU(Linear(LN(x))))"""

    def __init__(self, d: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.LayerNorm(d), nn.Linear(d, d), nn.GELU(), nn.Linear(d, d))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(x)


class Stream(nn.Sequential):
    """f_v `b n d` -> latent `b n p`: `layers` Transformer layers (pixel stream T_p; semantic stream: 0), residual blocks,
    projection. Without attention a stream can change the features only token by token."""

    def __init__(self, d: int, p: int, layers: int, heads: int, residual_blocks: int):
        super().__init__(*(TransformerLayer(d, heads) for _ in range(layers)),
                         *(ResidualMLP(d) for _ in range(residual_blocks)),
                         nn.Sequential(nn.LayerNorm(d), nn.Linear(d, p), nn.GELU(), nn.Linear(p, p)))
        self.apply(start_small)


def start_small(module: nn.Module) -> None:
    """The paper's start of new layers: truncated normal, std 0.02, zero biases."""
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
        self.semantic_stream = None if variant == "pixel-only" else Stream(d, p, semantic_layers, heads, residual_blocks)
        self.pixel_stream = None if variant == "semantic-only" else Stream(d, p, pixel_layers, heads, residual_blocks)
        width = p * (2 if variant == "dual" else 1)
        self.fusion = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, p))
        self.fusion.apply(start_small)

    def features(self, images: Tensor) -> Tensor:
        return self.vision(images)  # f_v

    def latents(self, f_v: Tensor) -> Latents:
        z_s = self.semantic_stream(f_v) if self.semantic_stream else None
        z_p = self.pixel_stream(f_v) if self.pixel_stream else None
        return Latents(z_s, z_p, self.fuse(z_s, z_p))

    def fuse(self, z_s: Tensor | None, z_p: Tensor | None) -> Tensor:
        return self.fusion(torch.cat([z for z in (z_s, z_p) if z is not None], -1))  # z_f = F([z_s ; z_p])

    def decode(self, z_f: Tensor, side: int) -> Tensor:
        """D_p; where its factor differs from a token's pixels (paper: 32 and 28) the picture is resized to `side`."""
        return resize(self.decoder(z_f), side)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Latents]:
        """-> (reconstruction `b 3 H W`, f_v `b n d`, latents)"""
        f_v = self.features(images)
        latents = self.latents(f_v)
        return self.decode(latents.fused, images.shape[-1]), f_v, latents


# ---------------------------------------------------------------- losses: perceptual, adversarial


def perceptual_distance(maps: list[Tensor], others: list[Tensor], heads: list[Tensor] | None = None) -> Tensor:
    """LPIPS (arXiv 1801.03924, Eq. 1): unit-normalise each position's feature, squared difference, `heads` weigh the
    channels (None: all 1), mean over positions and batch, sum over layers."""
    total = maps[0].new_zeros((), dtype=torch.float32)
    for i, (a, b) in enumerate(zip(maps, others)):
        a, b = a.float(), b.float()
        difference = (F.normalize(a, dim=1, eps=1e-6) - F.normalize(b, dim=1, eps=1e-6)).square()
        total = total + ((difference if heads is None else difference * heads[i]).sum(1)).mean()
    return total


class Perceptual(nn.Module):
    """The feature network of the perceptual loss, frozen. Offline: a copy of the pixel encoder E_p and its stages.

    # differs from paper: there it is LPIPS on VGG16 (`VGG16`, with a weight file) plus a ConvNeXt-S distance.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network.requires_grad_(False).eval()

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = self.network.features(targets)
        return perceptual_distance(self.network.features(images), wanted, getattr(self.network, "heads", None))


class VGG16(nn.Module):
    """VGG16's five stages with LPIPS's heads, from one weight file with torchvision's names (`features.N.weight`) and
    LPIPS's (`linK.model.1.weight`). Raises ValueError if the file lacks one."""

    STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))

    def __init__(self, weights: dict[str, Tensor]):
        super().__init__()
        self.stages, c_in, number = nn.ModuleList(), 3, 0
        wanted = {}
        for widths in self.STAGES:
            stage = nn.ModuleList()
            for c in widths:
                stage.append(nn.Conv2d(c_in, c, 3, padding=1))
                wanted[f"features.{number}"] = stage[-1]
                c_in, number = c, number + 2  # torchvision counts the ReLUs
            self.stages.append(stage)
            number += 1  # and the pooling
        names = [f"{name}.{key}" for name in wanted for key in ("weight", "bias")]
        missing = [name for name in [*names, *(f"lin{i}.model.1.weight" for i in range(5))] if name not in weights]
        if missing:
            raise ValueError(f"no {missing[0]} in the LPIPS weights: join VGG16's and LPIPS's state dicts in one file")
        for name, conv in wanted.items():
            conv.load_state_dict({key: weights[f"{name}.{key}"] for key in ("weight", "bias")})
        self.heads = nn.ParameterList(weights[f"lin{i}.model.1.weight"] for i in range(5))
        self.register_buffer("mean", torch.tensor([-0.030, -0.088, -0.188])[:, None, None])  # LPIPS's scaling of [-1, 1]
        self.register_buffer("std", torch.tensor([0.458, 0.448, 0.450])[:, None, None])

    def features(self, images: Tensor) -> list[Tensor]:
        x, maps = (images - self.mean) / self.std, []
        for number, stage in enumerate(self.stages):
            x = F.max_pool2d(x, 2) if number else x
            for conv in stage:
                x = F.relu(conv(x))
            maps.append(x)
        return maps


class Discriminator(nn.Module):
    """PatchGAN (arXiv 1611.07004): `b 3 H W` -> one logit per patch `b 1 h w`."""

    def __init__(self, width: int = 64, layers: int = 3):
        super().__init__()
        widths = [min(width * 2**i, 8 * width) for i in range(layers + 1)]
        body = [nn.Conv2d(3, widths[0], 4, 2, 1), nn.LeakyReLU(0.2)]
        for i in range(1, layers + 1):
            stride = 2 if i < layers else 1
            body += [nn.Conv2d(widths[i - 1], widths[i], 4 if stride == 2 else 3, stride, 1, bias=False),
                     nn.GroupNorm(min(8, widths[i]), widths[i]), nn.LeakyReLU(0.2)]
        self.body = nn.Sequential(*body, nn.Conv2d(widths[-1], 1, 3, padding=1))
        self.register_buffer("anchors", torch.zeros(2))  # LeCam: running means of the logits, real and fake

    def forward(self, images: Tensor) -> Tensor:
        return self.body(images)

    def loss(self, real: Tensor, fake: Tensor, lecam: float = 0.001) -> Tensor:
        """Hinge loss, plus LeCam (arXiv 2104.03310): logits stay near the running mean of the other kind."""
        on_real, on_fake = self(real), self(fake.detach())
        if self.training:
            now = average(torch.stack([on_real.detach().mean(), on_fake.detach().mean()]))
            self.anchors.lerp_(now.to(self.anchors), 0.01)
        hinge = F.relu(1 - on_real).mean() + F.relu(1 + on_fake).mean()
        distance = (F.relu(on_real - self.anchors[1]).square() + F.relu(self.anchors[0] - on_fake).square()).mean()
        return hinge + lecam * distance

    def generator_loss(self, fake: Tensor) -> Tensor:
        return -self(fake).mean()  # L_GAN


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
