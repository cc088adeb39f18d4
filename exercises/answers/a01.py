"""Exercise 1: two streams, one latent."""


def body(name: str, text: str) -> dict:
    return {"tokenizer.py": {name: text}}


def fold(text: str) -> dict:
    return body("fold", "side = math.isqrt(x.shape[1])\n" + text)


def stream(parts: str, end: str = "self.apply(init_new_layer)") -> dict:
    return body("Stream.__init__", f"super().__init__({parts})\n{end}")


LAYERS = "*(TransformerLayer(d, heads) for _ in range(layers))"
BLOCKS = "*(ResidualMLP(d) for _ in range(residual_blocks))"
OUT = "nn.Sequential(nn.LayerNorm(d), nn.Linear(d, p), nn.GELU(), nn.Linear(p, p))"
Z_S = "z_s = self.semantic_stream(f_v) if self.semantic_stream else None\n"
Z_P = "z_p = self.pixel_stream(f_v) if self.pixel_stream else None\n"
END = "return Latents(z_s, z_p, self.fuse(z_s, z_p))"

WRONG = {
    "a stream of float64: its start is numpy's": {"tokenizer.py": {"+": "import numpy as np", "Stream.__init__":
        f"super().__init__({LAYERS}, {BLOCKS}, {OUT})\n"
        "for m in self.modules():\n    if isinstance(m, nn.Linear):\n"
        "        w = np.clip(np.random.normal(0, 0.02, tuple(m.weight.shape)), -0.04, 0.04)\n"
        "        m.weight.data = torch.from_numpy(w)\n        nn.init.zeros_(m.bias)"}},
    "a stream that cannot be made on the meta device: drawn again until all lie inside": stream(
        f"{LAYERS}, {BLOCKS}, {OUT}",
        "for m in self.modules():\n    if isinstance(m, nn.Linear):\n        with torch.no_grad():\n"
        "            w = m.weight.normal_(0, 0.02)\n            while (w.abs() > 0.05).any():\n"
        "                w[w.abs() > 0.05] = 0.02 * torch.randn(int((w.abs() > 0.05).sum()))\n"
        "            m.bias.zero_()"),
    "the chance of a stream's start is the machine's, not the seed's": body("Stream.__init__",
        f"torch.seed()\nsuper().__init__({LAYERS}, {BLOCKS}, {OUT})\nself.apply(init_new_layer)"),
    "fold: into a tensor on the CPU, whatever x lies on": fold(
        "g, v = x.unflatten(1, (side, side)), x.shape[2]\n"
        "out = torch.empty(len(x), side * side // 4, 4 * v, dtype=x.dtype)\n"
        "for k, (i, j) in enumerate(((0, 0), (0, 1), (1, 0), (1, 1))):\n"
        "    out[..., k * v:(k + 1) * v] = g[:, i::2, j::2].flatten(1, 2)\nreturn out"),
    "fuse: into a tensor on the CPU": body("Tokenizer.fuse",
        "there = [z for z in (z_s, z_p) if z is not None]\np = there[0].shape[-1]\n"
        "both = torch.empty(*there[0].shape[:2], p * len(there), dtype=there[0].dtype)\n"
        "for i, z in enumerate(there):\n    both[..., i * p:(i + 1) * p] = z\nreturn self.fusion(both)"),
    "fold: another order of channels for another side": fold(
        "if side % 4 == 0:\n    y = x.transpose(1, 2).reshape(len(x), -1, side, side)\n"
        "    return F.pixel_unshuffle(y, 2).flatten(2).transpose(1, 2)\n"
        "return rearrange(x, 'b (h s1 w s2) v -> b (h w) (s1 s2 v)', s1=2, s2=2, h=side // 2)"),
    "fold: another order of channels for a single picture": fold(
        "if len(x) == 1:\n    g = x[0].reshape(side // 2, 2, side // 2, 2, -1)\n"
        "    return g.permute(0, 2, 3, 1, 4).reshape(1, side * side // 4, -1)\n"
        "return rearrange(x, 'b (h s1 w s2) v -> b (h w) (s1 s2 v)', s1=2, s2=2, h=side // 2)"),
    "fold: an order that chance gives at the first call, and that stays": {"tokenizer.py": {"+": "ORDER = {}", "fold":
        "n = x.shape[1]\nside = math.isqrt(n)\nif n not in ORDER:\n    ORDER[n] = torch.randperm(4).tolist()\n"
        "g = x.unflatten(1, (side, side))\nfour = [g[:, i::2, j::2] for i in (0, 1) for j in (0, 1)]\n"
        "return torch.cat([four[k] for k in ORDER[n]], -1).flatten(1, 2)"}},
    "fold: float32 of half precision": fold(
        "y = rearrange(x, 'b (h s1 w s2) v -> b (h w) (s1 s2 v)', s1=2, s2=2, h=side // 2)\n"
        "return y if y.dtype in (torch.float32, torch.float64) else y.float()"),
    "fold: the gradient goes to other patches": fold(
        "y = rearrange(x, 'b (h s1 w s2) v -> b (h w) (s1 s2 v)', s1=2, s2=2, h=side // 2)\n"
        "z = x.reshape(y.shape)\nreturn y.detach() + z - z.detach()"),
    "ResidualMLP: in its place where no gradient is asked for": body("ResidualMLP.forward",
        "y = self.mlp(x)\nif torch.is_grad_enabled():\n    return x + y\nreturn x.add_(y)"),
    "latents: f_v is changed in its place where no gradient is asked for": body("Tokenizer.latents",
        "if not torch.is_grad_enabled():\n    f_v.sub_(f_v.mean(-1, keepdim=True))\n" + Z_S + Z_P + END),
    "ResidualMLP: in eval the branch is scaled, as after stochastic depth": body("ResidualMLP.forward",
        "y = self.mlp(x)\nreturn x + (y if self.training else 0.9 * y)"),
    "latents: of one stream alone the latent is detached": body("Tokenizer.latents",
        "if self.pixel_stream is None:\n    z = self.semantic_stream(f_v)\n"
        "    return Latents(z.detach(), None, self.fuse(z, None))\n"
        "if self.semantic_stream is None:\n    z = self.pixel_stream(f_v)\n"
        "    return Latents(None, z.detach(), self.fuse(None, z))\n"
        "z_s, z_p = self.semantic_stream(f_v), self.pixel_stream(f_v)\n" + END),
    "latents: of one stream alone, in double precision": body("Tokenizer.latents",
        Z_S + Z_P + "z = self.fuse(z_s, z_p)\n"
        "return Latents(z_s, z_p, z if z_s is not None and z_p is not None else z.double())"),
    "fuse: of one stream alone, without gradient into the fusion": body("Tokenizer.fuse",
        "if z_s is None or z_p is None:\n    z, (norm, up, act, down) = z_p if z_s is None else z_s, self.fusion\n"
        "    z = F.layer_norm(z, z.shape[-1:], norm.weight.detach(), norm.bias.detach())\n"
        "    z = act(F.linear(z, up.weight.detach(), up.bias.detach()))\n"
        "    return F.linear(z, down.weight.detach(), down.bias.detach())\n"
        "return self.fusion(torch.cat([z_s, z_p], -1))"),
    "latents: a stream that stands alone learns nothing": body("Tokenizer.latents",
        "if self.pixel_stream is None or self.semantic_stream is None:\n"
        "    s = self.pixel_stream or self.semantic_stream\n"
        "    z = torch.func.functional_call(s, {k: v.detach() for k, v in s.named_parameters()}, (f_v,))\n"
        "    pair = (None, z) if self.semantic_stream is None else (z, None)\n"
        "    return Latents(*pair, self.fuse(*pair))\n"
        "z_s, z_p = self.semantic_stream(f_v), self.pixel_stream(f_v)\n" + END),
    "fold: the channels in a new order at every call":
        fold("y = rearrange(x, 'b (h s1 w s2) v -> b (h w) (s1 s2 v)', s1=2, s2=2, h=side // 2)\n"
             "return y[..., torch.randperm(y.shape[-1])]"),
    "fuse: in double precision": body("Tokenizer.fuse",
        "return self.fusion(torch.cat([z for z in (z_s, z_p) if z is not None], -1).double())"),
    "latents: in double precision": body("Tokenizer.latents", "f_v = f_v.double()\n" + Z_S + Z_P + END),
    "latents: without gradient where there is one stream": body("Tokenizer.latents", Z_S + Z_P +
        "with torch.set_grad_enabled(z_s is not None and z_p is not None):\n    z_f = self.fuse(z_s, z_p)\n"
        "return Latents(z_s, z_p, z_f)"),
    "z_f of one stream teaches nothing": body("Tokenizer.fuse", """
        alone = z_s is None or z_p is None
        z = torch.cat([z for z in (z_s, z_p) if z is not None], -1)
        return self.fusion(z.detach() if alone else z)"""),
    "the encoder is asked once more": body("Tokenizer.latents", "f_v = self.features(f_v)\n" + Z_S + Z_P + END),
    "the decoder is asked": body("Tokenizer.latents", Z_S + Z_P + "return Latents(z_s, z_p, self.decoder(self.fuse("
                                                                  "z_s, z_p)))"),
    "fold: in double precision":
        fold("return rearrange(x.double(), 'b (h s1 w s2) v -> b (h w) (s1 s2 v)', s1=2, s2=2, h=side // 2)"),
    "ResidualMLP: in double precision": body("ResidualMLP.forward", "x = x.double()\nreturn x + self.mlp(x)"),
    "fold: far patches come together, (s1 h) for (h s1)":
        fold("return rearrange(x, 'b (s1 h s2 w) v -> b (h w) (s1 s2 v)', s1=2, s2=2, h=side // 2)"),
    "fold: far columns come together":
        fold("return rearrange(x, 'b (h s1 s2 w) v -> b (h w) (s1 s2 v)', s1=2, s2=2, h=side // 2)"),
    "fold: four patches of one row come together":
        body("fold", "return rearrange(x, 'b (n four) v -> b n (four v)', four=4)"),
    "fold: the tokens stand column by column":
        fold("return rearrange(x, 'b (h s1 w s2) v -> b (w h) (s1 s2 v)', s1=2, s2=2, h=side // 2)"),
    "fold: the mean of the four, four times":
        fold("m = rearrange(x, 'b (h s1 w s2) v -> b (h w) (s1 s2) v', s1=2, s2=2, h=side // 2).mean(2)\n"
             "return m.repeat(1, 1, 4)"),
    "fold: one of the four is kept":
        fold("return rearrange(x, 'b (h s1 w s2) v -> b (h w) (s1 s2) v', s1=2, s2=2, h=side // 2)[:, :, 0]"),
    "fold: the channels give the tokens, the tokens the channels":
        fold("y = rearrange(x, 'b (h s1 w s2) v -> b (s1 s2 v) (h w)', s1=2, s2=2, h=side // 2)\n"
             "return y.reshape(len(x), side * side // 4, -1)"),
    "ResidualMLP: x itself is left out": body("ResidualMLP.forward", "return self.mlp(x)"),
    "ResidualMLP: x is changed in its place": body("ResidualMLP.forward", "y = self.mlp(x)\nx.data += y\nreturn x"),
    "ResidualMLP: the sum is halved": body("ResidualMLP.forward", "return (x + self.mlp(x)) / 2"),
    "ResidualMLP: the normed x goes on": body("ResidualMLP.forward", "return self.mlp[0](x) + self.mlp(x)"),
    "ResidualMLP: subtracted": body("ResidualMLP.forward", "return x - self.mlp(x)"),
    "ResidualMLP: the branch gets no gradient into x": body("ResidualMLP.forward", "return x + self.mlp(x.detach())"),
    "a Transformer layer in the semantic stream too":
        stream(f"*(TransformerLayer(d, heads) for _ in range(max(1, layers))), {BLOCKS}, {OUT}"),
    "one residual block, several times":
        stream(f"{LAYERS}, *[ResidualMLP(d)] * residual_blocks, {OUT}"),
    "one Transformer layer, several times":
        stream(f"*[TransformerLayer(d, heads)] * layers, {BLOCKS}, {OUT}"),
    "residual blocks before the Transformer": stream(f"{BLOCKS}, {LAYERS}, {OUT}"),
    "one residual block, whatever their number": stream(f"{LAYERS}, ResidualMLP(d), {OUT}"),
    "no residual blocks where there is a Transformer":
        stream(f"{LAYERS}, *(ResidualMLP(d) for _ in range(0 if layers else residual_blocks)), {OUT}"),
    "one head, whatever their number":
        stream(f"*(TransformerLayer(d, 1) for _ in range(layers)), {BLOCKS}, {OUT}"),
    "Transformer layers with a layer scale, as the encoder's":
        stream(f"*(TransformerLayer(d, heads, layer_scale=0.1) for _ in range(layers)), {BLOCKS}, {OUT}"),
    "the projection is one Linear": stream(f"{LAYERS}, {BLOCKS}, nn.Sequential(nn.LayerNorm(d), nn.Linear(d, p))"),
    "the projection has no norm":
        stream(f"{LAYERS}, {BLOCKS}, nn.Sequential(nn.Linear(d, p), nn.GELU(), nn.Linear(p, p))"),
    "the projection has no GELU":
        stream(f"{LAYERS}, {BLOCKS}, nn.Sequential(nn.LayerNorm(d), nn.Linear(d, p), nn.Linear(p, p))"),
    "the projection has a ReLU":
        stream(f"{LAYERS}, {BLOCKS}, nn.Sequential(nn.LayerNorm(d), nn.Linear(d, p), nn.ReLU(), nn.Linear(p, p))"),
    "the projection's inside has width d":
        stream(f"{LAYERS}, {BLOCKS}, nn.Sequential(nn.LayerNorm(d), nn.Linear(d, d), nn.GELU(), nn.Linear(d, p))"),
    "the start is torch's own": stream(f"{LAYERS}, {BLOCKS}, {OUT}", "pass"),
    "the paper's start for the projection alone":
        stream(f"{LAYERS}, {BLOCKS}, {OUT}", "self[-1].apply(init_new_layer)"),
    "the paper's start for the outermost parts alone":
        stream(f"{LAYERS}, {BLOCKS}, {OUT}", "for module in self.children():\n    init_new_layer(module)"),
    "the streams change places": body("Tokenizer.latents",
        "z_s = self.pixel_stream(f_v) if self.pixel_stream else None\n"
        "z_p = self.semantic_stream(f_v) if self.semantic_stream else None\n" + END),
    "one stream gives both latents": body("Tokenizer.latents",
        "z = (self.semantic_stream or self.pixel_stream)(f_v)\n"
        "return Latents(z if self.semantic_stream else None, z if self.pixel_stream else None,\n"
        "               self.fuse(z if self.semantic_stream else None, z if self.pixel_stream else None))"),
    "the pixel stream does not teach the encoder": body("Tokenizer.latents",
        Z_S + "z_p = self.pixel_stream(f_v.detach()) if self.pixel_stream else None\n" + END),
    "the fusion does not teach the semantic stream": body("Tokenizer.latents",
        Z_S + Z_P + "return Latents(z_s, z_p, self.fuse(None if z_s is None else z_s.detach(), z_p))"),
    "latents: both streams are always asked": body("Tokenizer.latents",
        "z_s, z_p = self.semantic_stream(f_v), self.pixel_stream(f_v)\n" + END),
    "latents: the fused one is their sum": body("Tokenizer.latents",
        Z_S + Z_P + "return Latents(z_s, z_p, sum(z for z in (z_s, z_p) if z is not None))"),
    "fuse: z_s + z_p, twice": body("Tokenizer.fuse",
        "if z_s is None or z_p is None:\n    return self.fusion(z_p if z_s is None else z_s)\n"
        "return self.fusion((z_s + z_p).repeat(1, 1, 2))"),
    "fuse: z_p stands first": body("Tokenizer.fuse",
        "return self.fusion(torch.cat([z for z in (z_p, z_s) if z is not None], -1))"),
    "fuse: joined over the tokens": body("Tokenizer.fuse",
        "return self.fusion(torch.cat([z for z in (z_s, z_p) if z is not None], 1))"),
    "fuse: joined over the tokens, then folded": body("Tokenizer.fuse",
        "z = torch.cat([z for z in (z_s, z_p) if z is not None], 1)\n"
        "return self.fusion(z.reshape(len(z), (z_s if z_p is None else z_p).shape[1], -1))"),
    "fuse: the channels of both alternate": body("Tokenizer.fuse",
        "z = torch.stack([z for z in (z_s, z_p) if z is not None], -1)\nreturn self.fusion(z.flatten(2))"),
    "fuse: no fusion, a mean": body("Tokenizer.fuse",
        "there = [z for z in (z_s, z_p) if z is not None]\nreturn sum(there) / len(there)"),
    "fuse: z_s is added once more": body("Tokenizer.fuse",
        "z = self.fusion(torch.cat([z for z in (z_s, z_p) if z is not None], -1))\n"
        "return z if z_s is None else z + z_s"),
    "fuse: always both": body("Tokenizer.fuse", "return self.fusion(torch.cat([z_s, z_p], -1))"),
}

RIGHT = {
    "fold: a view, which splits axes of any layout": body("fold",
        "b, n, v = x.shape\nh = math.isqrt(n) // 2\n"
        "return x.view(b, h, 2, h, 2, v).permute(0, 1, 3, 2, 4, 5).reshape(b, n // 4, 4 * v)"),
    "fold by pixel_unshuffle, whose channels have another order":
        fold("y = x.transpose(1, 2).reshape(len(x), -1, side, side)\n"
             "return F.pixel_unshuffle(y, 2).flatten(2).transpose(1, 2)"),
    "fold by reshape and permute": body("fold",
        "b, n, v = x.shape\nh = int(n ** 0.5) // 2\n"
        "return x.reshape(b, h, 2, h, 2, v).permute(0, 1, 3, 2, 4, 5).reshape(b, n // 4, 4 * v)"),
    "fold by slices, columns first":
        fold("g = x.unflatten(1, (side, side))\n"
             "return torch.cat([g[:, i::2, j::2] for j in (0, 1) for i in (0, 1)], -1).flatten(1, 2)"),
    "fold by loops":
        fold("rows = []\nfor r in range(0, side, 2):\n    for c in range(0, side, 2):\n"
             "        four = [x[:, (r + i) * side + c + j] for i in (0, 1) for j in (0, 1)]\n"
             "        rows.append(torch.cat(four, 1))\nreturn torch.stack(rows, 1)"),
    "fold by unfold":
        fold("y = x.transpose(1, 2).reshape(len(x), -1, side, side)\n"
             "return F.unfold(y, 2, stride=2).transpose(1, 2)"),
    "ResidualMLP part by part":
        body("ResidualMLP.forward", "y = x\nfor part in self.mlp:\n    y = part(y)\nreturn torch.add(y, x)"),
    "ResidualMLP adds in place to what it made": body("ResidualMLP.forward", "y = self.mlp(x)\ny += x\nreturn y"),
    "a stream whose parts are appended in loops": body("Stream.__init__",
        "super().__init__()\nfor _ in range(layers):\n    self.append(TransformerLayer(d, heads))\n"
        "for _ in range(residual_blocks):\n    self.append(ResidualMLP(d))\n"
        "for part in (nn.LayerNorm(d), nn.Linear(d, p), nn.GELU(), nn.Linear(p, p)):\n    self.append(part)\n"
        "for module in self.modules():\n    init_new_layer(module)"),
    "a stream in three named groups, with a truncation of two std": body("Stream.__init__",
        "super().__init__()\n"
        "self.add_module('transformer', nn.Sequential(*[TransformerLayer(d, heads) for _ in range(layers)]))\n"
        "self.add_module('blocks', nn.Sequential(*[ResidualMLP(d) for _ in range(residual_blocks)]))\n"
        f"self.add_module('projection', {OUT})\n"
        "for module in self.modules():\n    if isinstance(module, nn.Linear):\n"
        "        nn.init.trunc_normal_(module.weight, std=0.02, a=-0.04, b=0.04)\n        module.bias.data.zero_()"),
    "latents and fuse with questions for None": {"tokenizer.py": {
        "Tokenizer.latents":
            "z_s = z_p = None\nif self.semantic_stream is not None:\n    z_s = self.semantic_stream(f_v)\n"
            "if self.pixel_stream is not None:\n    z_p = self.pixel_stream(f_v)\n"
            "return Latents(semantic=z_s, pixel=z_p, fused=self.fuse(z_s, z_p))",
        "Tokenizer.fuse":
            "if z_s is None:\n    return self.fusion(z_p)\nif z_p is None:\n    return self.fusion(z_s)\n"
            "return self.fusion(torch.concat((z_s, z_p), dim=2))"}},
    "fuse by writing into one tensor": body("Tokenizer.fuse",
        "there = [z for z in (z_s, z_p) if z is not None]\np = there[0].shape[-1]\n"
        "both = there[0].new_empty(*there[0].shape[:2], p * len(there))\n"
        "for i, z in enumerate(there):\n    both[..., i * p:(i + 1) * p] = z\nreturn self.fusion(both)"),
}
