"""DC-AE, the pixel autoencoder (arXiv 2410.10733): E_p makes a picture a small grid of latents, D_p makes it a picture
again.

A public model that SPAR starts from; nothing here is a claim of the paper. In: pictures `b 3 H W` in [-1, 1]. Out:
latents `b n p`, one for `factor`² pixels, and back. Parity with the public implementation: tests/claims/test_parity.py.

Letters: the README's key; c channels.
"""

import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from torch import Tensor, nn

from parts.layer import Layer, MixFFN, RMSNorm
from parts.linear_attention import linear_attention


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
        q, k, v = rearrange(scales, "b (a three e) h w -> three b a (h w) e", three=3, e=self.head_width)
        mixed = rearrange(linear_attention(q, k, v).to(x.dtype), "b a (h w) e -> b (a e) h w", h=x.shape[2])
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
        if not self.shortcut:
            return y
        return y + reduce(F.pixel_unshuffle(x, 2), "b (c g) h w -> b c h w", "mean", c=self.c_out)


class Up(nn.Module):
    """Twice the side: conv + pixel shuffle (`resample` shuffle) or each pixel four times + conv (conv), plus (shortcut)
    the input's channels repeated and shuffled."""

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
    """E_p: `b 3 H W` -> latents `b n p`, one for `factor`² pixels. Each stage after the first halves the side; the
    deepest `vit_stages` hold EfficientViT blocks. A first depth of 0 means: the first stage is one strided convolution,
    as in the first DC-AE f32; `resample` conv is the later one's, SANA's."""

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
