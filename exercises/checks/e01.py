"""Exercise 1: two streams, one latent (claim 1, Sec. 3.1)."""

import torch
import torch.nn.functional as F
from torch import nn

from exercises.checks.tools import Wrong, demand, gradients, same, same_shape

TITLE, MINUTES = "Two streams, one latent", 25
CUT = {"tokenizer.py": ["fold", "ResidualMLP.forward", "Stream.__init__", "Tokenizer.latents", "Tokenizer.fuse"]}
PREDICT = ["Token 5 of f_v changes: how many of the 16 tokens of z_s move, how many of z_p?",
           "Which stream of the toy has more parameters, and how many times as many?",
           "z_p is set to 0: what is left in the picture, the colours, the places or the stripes?"]
ANSWERS = ["One of z_s, all 16 of z_p: the semantic stream has no attention.",
           "The pixel stream, by its Transformer layers: 697,248 against 102,432 numbers, 6.8 times as many.",
           "The places, and the colours, somewhat off; the stripes in some runs and not in others. Look at yours: "
           "python exercises/run.py 1 sample.py streams --image scene.png --run RUN draws each stream alone; "
           "sample.py generate \"a large red circle\" --run RUN --out scene.png makes the picture."]
ABOUT = """`fold`: InternVL's pixel unshuffle, four patches of a square become one token, their channels in one order
for pictures of every size. A stream is its Transformer layers, its residual blocks, and a projection: LayerNorm(d),
Linear(d, p), GELU, Linear(p, p), as torch makes them; they are made in this order, and every Linear in it starts as
`init_new_layer` says. `latents` gives z_s, z_p and z_f, None where the variant has no such stream; `fuse` reads [z_s ;
z_p], along the channels. All runs on the device and in the kind of numbers that it is given, and in use (`eval`, no
gradient) as in training."""
FINGERS = [(2, 2, 2), (0, 3, 1), (0, 1, 1)]  # layers, heads, residual blocks


def fill(*modules: nn.Module, std: float = 0.4) -> None:
    """Gives the parameters of the first module random numbers, and the others the same, one after the other."""
    first, *others = ([*module.parameters()] for module in modules)
    with torch.no_grad():
        for i, parameter in enumerate(first):
            parameter.copy_(torch.randn_like(parameter) * std + (parameter.ndim == 1) * 0.3)
            for other in others:
                other[i].copy_(parameter)


def same_parameters(ours: nn.Module, theirs: nn.Module, what: str) -> None:
    mine, wanted = ([tuple(p.shape) for p in module.parameters()] for module in (ours, theirs))
    count, right = (sum(p.numel() for p in module.parameters()) for module in (ours, theirs))
    demand(count == right, f"{what} has {count} parameters, wanted {right}: one of its parts is missing, is too much, "
                           "or stands in it several times with the same weights")
    for i, (one, other) in enumerate(zip(mine, wanted)):
        demand(one == other, f"{what}: in the order in which they are made, parameter {i} has the shape {one}, wanted "
                             f"{other}: Transformer layers first, then residual blocks, then the projection")
    demand(all(p.requires_grad for p in ours.parameters()), f"{what}: some of its parameters cannot learn")


def streams(own, real, d: int, p: int, layers: int, heads: int, blocks: int):
    """A Stream of both versions with the same random weights, in float64."""
    ours, theirs = (version.tokenizer.Stream(d, p, layers, heads, blocks).double() for version in (own, real))
    same_parameters(ours, theirs, f"a stream of {layers} Transformer layers and {blocks} residual blocks")
    fill(theirs, ours)
    return ours, theirs


class Bystander(nn.Module):
    """In the place of encoder and decoder."""

    def forward(self, x):
        raise Wrong("Tokenizer.latents and Tokenizer.fuse ask neither the encoder nor the decoder")


def tokenizers(own, real, d=12, p=5, variant="dual", heads=3):
    """A Tokenizer of both versions, without encoder and decoder."""
    ours, theirs = (version.tokenizer.Tokenizer(Bystander(), Bystander(), d, p, 2, heads, 2, variant).double()
                    for version in (own, real))
    same_parameters(ours, theirs, f"the tokenizer ({variant})")
    fill(theirs, ours)
    return ours, theirs


def tokens(b=3, n=8, d=12):
    return torch.randn(b, n, d, dtype=torch.float64)


def neighbours(own, real):
    """fold: a token holds the 2×2 patches of its place, each of their numbers once"""
    known = {}
    for b, side, v in ((3, 6, 5), (1, 2, 5), (3, 4, 5), (2, 4, 3), (1, 6, 3), (4, 2, 4), (4, 4, 4), (1, 8, 1)):
        half = side // 2
        x = torch.randperm(b * (side**2 + 1) * v).view(b, side**2 + 1, v).double()[:, 1:]  # behind a CLS token
        x = x.mT.contiguous().mT if side == 4 else x  # or with the tokens side by side in memory
        grid = x.reshape(b, half, 2, half, 2, v)  # b h s1 w s2 v
        places = torch.stack([grid[:, :, s1, :, s2] for s1 in (0, 1) for s2 in (0, 1)], 3).reshape(b, half**2, 4 * v)
        before = x.clone()
        out = own.tokenizer.fold(x)
        same_shape(out, (b, half**2, 4 * v), "fold")
        demand(x.equal(before), "fold changes the tensor that it is given")
        demand(out.flatten().sort()[0].equal(places.flatten().sort()[0]), "fold: some numbers are lost or changed")
        demand(out.sort(-1)[0].equal(places.sort(-1)[0]),
               "fold: a token does not hold the 2×2 patches of its place, token (row, column) those of the rows "
               "2·row and 2·row + 1 and of the columns 2·column and 2·column + 1")
        order = out.argsort(-1).gather(-1, places.argsort(-1).argsort(-1))  # where each number has gone to
        demand((order == order[:1, :1]).all(), "fold: the channels of one token have another order than another's")
        demand(known.setdefault(v, order[0, 0]).equal(order[0, 0]), f"fold: the channels of {b} pictures of {side} × "
               f"{side} patches have another order than those of another size")
        for kind in (torch.float64, torch.float32, torch.bfloat16):
            again = own.tokenizer.fold(x.to(kind).flip(0))
            demand(again.dtype == kind, f"fold makes another kind of number of {kind}")
            demand(again.equal(out.to(kind).flip(0)), "fold: the channels have another order at another call, or in "
                                                      f"{kind}")
        x.requires_grad_()
        out = own.tokenizer.fold(x)
        demand(out.requires_grad, "fold hands on no gradient: the encoder could not learn")
        probe = torch.randn_like(out)
        same(own.tokenizer.fold(torch.autograd.grad(out, x, probe)[0]), probe, "the gradient of fold, folded again,")


def residual(own, real):
    """ResidualMLP: x goes on as it is, and what the MLP makes of it is added"""
    for b, n, d in ((3, 7, 6), (4, 4, 4)):
        ours, theirs = (version.tokenizer.ResidualMLP(d).double() for version in (own, real))
        fill(theirs, ours)
        x = tokens(b, n, d)
        given, used = x.clone(), x.clone()
        out = ours(given)
        with torch.no_grad():
            same(ours.eval()(used), out, "ResidualMLP in use (after eval, without gradient)")
        ours.train()
        demand(given.equal(x) and used.equal(x), "ResidualMLP changes the tensor that it is given: f_v is read by "
               "others too")
        norm, up, _, down = theirs.mlp
        inner = F.linear(F.gelu(F.linear(F.layer_norm(x, (d,), norm.weight, norm.bias), up.weight, up.bias)),
                         down.weight, down.bias)
        same(out, x + inner, "ResidualMLP")
        x.requires_grad_()
        probe = torch.randn_like(x)
        pairs = [torch.autograd.grad((block(x) * probe).sum(), [x, *block.parameters()], allow_unused=True)
                 for block in (ours, theirs)]
        for one, other in zip(*pairs):
            demand(one is not None, "ResidualMLP: a parameter or x gets no gradient")
            same(one, other, "a gradient of ResidualMLP")


def start(own, real):
    """a stream starts with a truncated normal of std 0.02 and biases of zero, all of it"""
    for layers, blocks in ((0, 3), (2, 1), (1, 0)):
        seed, made = int(torch.randint(2**31, ())), []
        for _ in range(2):
            torch.manual_seed(seed)
            made.append(own.tokenizer.Stream(48, 40, layers, 4, blocks))
        stream, again = made
        demand(all(a.equal(b) for a, b in zip(stream.parameters(), again.parameters())), "two streams of one "
               "torch.manual_seed start with other numbers")
        demand({p.dtype for p in stream.parameters()} == {torch.float32}, "a stream does not start in float32")
        linear = [module for module in stream.modules() if isinstance(module, nn.Linear)]
        demand(linear, "a stream has no Linear")
        for module in linear:
            weight, what = module.weight.detach().double(), f"a Linear of {tuple(module.weight.shape)}"
            margin = 6 / (2 * weight.numel()) ** 0.5  # six standard errors, as a share of the std
            std = weight.std().item()
            demand(0.0176 * (1 - margin) < std < 0.02 * (1 + margin), f"{what} starts with std {std:.3f}, wanted 0.02")
            demand(abs(weight.mean()) < 6 * 0.02 / weight.numel() ** 0.5, f"{what}: its mean is {weight.mean():.2g}")
            demand(module.bias is not None and module.bias.abs().max() == 0, f"{what}: its biases are not zero")
        weights = torch.cat([module.weight.detach().flatten() for module in linear])
        demand((weights.abs() > 0.035).double().mean() > 0.01, "the start is not normal: it has no tails")
        for module in stream.modules():
            if isinstance(module, nn.LayerNorm):
                demand((module.weight == 1).all() and (module.bias == 0).all(), "a LayerNorm starts scaled or shifted")


def apart(own, real):
    """every block has weights of its own, and so has every stream"""
    kept = []
    for d, p, layers, heads, blocks in ((12, 5, 0, 3, 3), (12, 5, 3, 3, 2), (8, 4, 1, 2, 1), (12, 5, 0, 3, 3)):
        ours, theirs = (version.tokenizer.Stream(d, p, layers, heads, blocks) for version in (own, real))
        same_parameters(ours, theirs, f"a stream of {layers} Transformer layers and {blocks} residual blocks")
        kept.append(ours)
    homes = [p.untyped_storage().data_ptr() for module in kept for p in module.parameters()]
    demand(len(set(homes)) == len(homes), "two blocks or two streams keep their weights in the same place")
    matrices = [p.detach() for module in kept for p in module.parameters() if p.ndim > 1]
    alike = any(a.shape == b.shape and a.equal(b) for i, a in enumerate(matrices) for b in matrices[:i])
    demand(not alike, "two blocks or two streams start with the same numbers")


def in_order(own, real):
    """a stream is its Transformer layers, then its residual blocks, then the projection"""
    for b, n, d, p, layers, heads, blocks in ((3, 7, 12, 5, 2, 3, 2), (3, 7, 12, 5, 0, 3, 3), (2, 5, 12, 4, 1, 1, 1),
                                              (2, 5, 12, 3, 1, 6, 0), (4, 4, 4, 4, 1, 2, 1)):
        ours, theirs = streams(own, real, d, p, layers, heads, blocks)
        x = tokens(b, n, d)
        given = x.clone()
        out = ours(given)
        demand(given.equal(x), "a stream changes the f_v that it is given")
        same_shape(out, (b, n, p), "a stream's latent")
        same(out, theirs(x), f"a stream of {layers} Transformer layers with {heads} heads and {blocks} residual blocks")
        out = ours.float()(x.float())
        demand(out.dtype == torch.float32, f"a stream of float32 weights makes {out.dtype} of float32 tokens")


def reach(own, real, p: int = 5, n: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    """How far token i of z_s, and of z_p, moves with token j of f_v: two tables `n n`."""
    tokenizer = tokenizers(own, real, p=p)[0]
    f_v = tokens(1, n).requires_grad_()
    latents, tables = tokenizer.latents(f_v), []
    for z in (latents.semantic, latents.pixel):
        same_shape(z, (1, n, p), "a latent")
        demand(z.requires_grad, "a latent has no gradient: its stream could not learn")
        rows = [torch.autograd.grad((z[0, i] * torch.randn_like(z[0, i])).sum(), f_v, retain_graph=True)[0][0].norm(
            dim=-1) for i in range(n)]
        tables.append(torch.stack(rows))
    return tables


def local(own, real):
    """in z_s each token is changed by itself; in z_p all tokens hear of each other"""
    semantic, pixel = reach(own, real)
    itself = torch.eye(len(semantic), dtype=torch.bool)
    demand(semantic[~itself].max() == 0, "a token of z_s moves with another token of f_v: the semantic stream has no "
                                         "attention")
    demand(semantic[itself].min() > 0, "a token of z_s does not move with its own token of f_v")
    demand(pixel.min() > 0, "a token of z_p does not move with every token of f_v: the pixel stream has attention")


def equations(own, real):
    """z_s = P_s(f_v), z_p = P_p(T_p(f_v)), z_f = F([z_s ; z_p])"""
    for b, n, d, p, heads in ((3, 8, 12, 5, 3), (4, 4, 4, 4, 2)):
        ours, theirs = tokenizers(own, real, d, p, heads=heads)
        f_v = tokens(b, n, d)
        given = f_v.clone()
        latents = ours.latents(given)
        demand(given.equal(f_v), "Tokenizer.latents changes f_v, which others read too")
        semantic, pixel = theirs.semantic_stream(f_v), theirs.pixel_stream(f_v)
        for name, wanted in (("semantic", semantic), ("pixel", pixel),
                             ("fused", theirs.fusion(torch.cat([semantic, pixel], -1)))):
            demand(isinstance(latents, tuple) and hasattr(latents, name), "Tokenizer.latents returns no Latents: a "
                   f"{type(latents).__name__}")
            same(getattr(latents, name), wanted, f"the latent .{name}")


def joined(own, real):
    """the fusion reads z_s and z_p side by side, along the channels, z_s first"""
    for b, n, p in ((3, 7, 5), (4, 4, 4), (1, 1, 3)):
        ours, _ = tokenizers(own, real, p=p)
        z_s, z_p = (tokens(b, n, p).requires_grad_() for _ in range(2))
        norm, up, _, down = ours.fusion
        both = torch.stack([torch.cat([a, c]) for a, c in zip(z_s.flatten(0, 1), z_p.flatten(0, 1))]).view(b, n, 2 * p)
        inner = F.gelu(F.linear(F.layer_norm(both, (2 * p,), norm.weight, norm.bias), up.weight, up.bias))
        wanted, out = F.linear(inner, down.weight, down.bias), ours.fuse(z_s, z_p)
        same(out, wanted, "Tokenizer.fuse")
        probe = torch.randn_like(wanted)
        inputs = [z_s, z_p, *ours.fusion.parameters()]
        grads = [torch.autograd.grad((z * probe).sum(), inputs, allow_unused=True) for z in (out, wanted)]
        for one, other in zip(*grads):
            demand(one is not None, "Tokenizer.fuse: a stream or the fusion gets no gradient")
            same(one, other, "a gradient of Tokenizer.fuse")


def learns(own, real):
    """a loss on one latent teaches its own stream alone, a loss on z_f teaches both"""
    ours, theirs = tokenizers(own, real)
    f_v = tokens().requires_grad_()
    for name, teaches in (("semantic", "semantic"), ("pixel", "pixel"), ("fused", "semantic pixel fusion")):
        found = []
        for tokenizer in (ours, theirs):
            groups = {"semantic": tokenizer.semantic_stream, "pixel": tokenizer.pixel_stream,
                      "fusion": tokenizer.fusion}
            z = getattr(tokenizer.latents(f_v), name)
            torch.manual_seed(0)
            probe = torch.randn_like(z)
            inputs = [f_v, *(p for group in groups.values() for p in group.parameters())]
            grads = iter(torch.autograd.grad((z * probe).sum(), inputs, allow_unused=True))
            found.append((next(grads), {group: [next(grads) for _ in module.parameters()]
                                        for group, module in groups.items()}))
        (into_f_v, ours_of), (wanted, theirs_of) = found
        for group, grads in ours_of.items():
            moved = any(grad is not None and grad.abs().max() > 0 for grad in grads)
            demand(moved == (group in teaches.split()),
                   f"a loss on .{name} {'teaches' if moved else 'does not teach'} the part \"{group}\"")
            for one, other in zip(grads, theirs_of[group]):
                demand(one is not None or other is None, f"a loss on .{name}: a part of \"{group}\" learns nothing")
                if other is not None:
                    same(one, other, f"a gradient of a loss on .{name} in \"{group}\"", 1e-8)
        demand(into_f_v is not None, f"a loss on .{name} does not reach f_v: the encoder could not learn from it")
        same(into_f_v, wanted, f"the gradient of a loss on .{name} in f_v", 1e-8)


def alone(own, real):
    """a tokenizer with one stream has no other latent, and fuses the one that it has"""
    for variant, there in (("semantic-only", "semantic"), ("pixel-only", "pixel")):
        ours, theirs = tokenizers(own, real, variant=variant)
        f_v = tokens().requires_grad_()
        latents, wanted = ours.latents(f_v), theirs.latents(f_v)
        missing = {"semantic": "pixel", "pixel": "semantic"}[there]
        demand(getattr(latents, missing) is None, f"{variant}: .{missing} is not None")
        same(getattr(latents, there), getattr(wanted, there), f"{variant}: .{there}")
        same(latents.fused, wanted.fused, f"{variant}: .fused")
        one, other = (gradients(z.square().sum(), [f_v])[0] for z in (latents.fused, wanted.fused))
        same(one, other, f"{variant}: the gradient of .fused in f_v", 1e-8)
        pair = (wanted.semantic, wanted.pixel)
        same(ours.fuse(*pair), theirs.fuse(*pair), f"{variant}: Tokenizer.fuse")
        pair = [z if z is None else z.detach().requires_grad_() for z in pair]
        z = next(z for z in pair if z is not None)
        one, other = (torch.autograd.grad(version.fuse(*pair).square().sum(), z, allow_unused=True)[0]
                      for version in (ours, theirs))
        demand(one is not None, f"{variant}: a loss on z_f does not reach the stream")
        same(one, other, f"{variant}: the gradient of Tokenizer.fuse", 1e-8)


def in_use(own, real):
    """with one stream or with two: in use as in training, and every part learns"""
    for variant in ("dual", "semantic-only", "pixel-only"):
        ours, f_v = tokenizers(own, real, variant=variant)[0], tokens()
        given, first = f_v.clone(), ours.latents(f_v)
        streams = {"semantic": ours.semantic_stream, "pixel": ours.pixel_stream}
        there = {name: [*stream.parameters()] for name, stream in streams.items() if stream is not None}
        for name, taught in (*there.items(), ("fused", [p for one in there.values() for p in one] + [
                *ours.fusion.parameters()])):
            z = getattr(first, name)
            demand(z is not None and z.requires_grad, f"{variant}: .{name} has no gradient")
            grads = torch.autograd.grad((z * torch.randn_like(z)).sum(), taught, retain_graph=True, allow_unused=True)
            demand(all(g is not None and g.any() for g in grads), f"{variant}: a loss on .{name} does not teach all "
                   "that makes it")
        with torch.no_grad():
            used = ours.eval().latents(f_v)
            light = ours.float().latents(f_v.float())
        for name, z, other, small in zip(first._fields, first, used, light):
            demand((z is None) == (other is None), f"{variant}: .{name} is there in training or in use alone")
            if z is not None:
                same(other, z, f"{variant}: .{name} in use (after eval, without gradient)")
                demand(small.dtype == torch.float32, f"{variant}: .{name} of float32 tokens is {small.dtype}")
        demand(f_v.equal(given), "Tokenizer.latents changes f_v, which others read too")


def device(own, real):
    """all is made and computed on the device that it is given"""
    with torch.device("meta"):
        stream = own.tokenizer.Stream(12, 5, 1, 3, 2)
        f_v = torch.empty(2, 16, 12)
        made = [("a stream", p) for p in stream.parameters()] + [("a stream's latent", stream(f_v)), (
            "ResidualMLP", own.tokenizer.ResidualMLP(12)(f_v))]
        tokenizers = [own.tokenizer.Tokenizer(Bystander(), Bystander(), 12, 5, 1, 3, 1, variant)
                      for variant in ("dual", "semantic-only", "pixel-only")]
    made += [("fold", own.tokenizer.fold(f_v)), *(("a latent", z) for tokenizer in tokenizers
                                                  for z in tokenizer.latents(f_v) if z is not None)]
    for what, x in made:
        demand(x.device.type == "meta", f"{what} is on {x.device.type} where its input is on another device")


CLAIMS = [neighbours, residual, apart, start, in_order, joined, equations, local, learns, alone, in_use, device]


def fingerprint(version) -> dict:
    x, weights = tokens(2, 16, 12), int(torch.randint(2**31, ()))

    def filled(module):
        torch.manual_seed(weights)  # however much chance it began with
        fill(module.double())
        return module

    def block():
        module = filled(version.tokenizer.ResidualMLP(12))
        given = (x + 0).requires_grad_()
        out = module(given)
        grad, = torch.autograd.grad(out.square().sum(), given)
        return torch.stack([out, grad, given])

    def stream():
        seen = []
        for layers, heads, blocks in FINGERS:
            module = version.tokenizer.Stream(12, 5, layers, heads, blocks)
            linear = [part for part in module.modules() if isinstance(part, nn.Linear)]
            std = torch.stack([part.weight.detach().std() for part in linear]) > 0.05
            biased = torch.stack([part.bias.detach().abs().max() for part in linear if part.bias is not None]) > 0
            seen += [filled(module)(x.clone()).flatten(), std, biased]
        return torch.cat([part.double() for part in seen])

    def one(variant="dual"):
        return filled(version.tokenizer.Tokenizer(nn.Identity(), nn.Identity(), 12, 5, 1, 3, 1, variant))

    def latents():
        f_v = (x + 0).requires_grad_()
        found = [*one().latents(f_v)]
        grads = [torch.autograd.grad(z.square().sum() + 0 * f_v.sum(), f_v, retain_graph=True)[0] for z in found]
        for variant in ("semantic-only", "pixel-only"):
            try:
                found.append(one(variant).latents(x).fused)
            except Exception:  # asked for a stream that is not there
                found.append(x)
        return torch.cat(found + grads, -1)

    def fuse():
        found = []
        for variant, pair in (("dual", (x[..., :5], x[..., 5:10])), ("semantic-only", (x[..., :5], None))):
            try:
                found.append(one(variant).fuse(*pair))
            except Exception:  # shapes that do not fit
                found.append(x)
        return torch.cat(found, -1)

    return {"fold": lambda: version.tokenizer.fold(x), "ResidualMLP.forward": block, "Stream.__init__": stream,
            "Tokenizer.latents": latents, "Tokenizer.fuse": fuse}


def picture(own, path):
    """Which token of f_v moves which of z_s and of z_p: two tables, one below the other."""
    from PIL import Image

    from plumbing.pictures import heat_map
    torch.manual_seed(0)
    names = [f"f_v {j}" for j in range(9)]
    maps = [heat_map((table / table.max()).sqrt(), [f"{z} {i}" for i in range(9)], names,
                     f"which token of f_v moves which of {z} (square root, the largest is 1)")
            for z, table in zip(("z_s", "z_p"), reach(own, own))]
    sheet = Image.new("RGB", (max(m.width for m in maps), sum(m.height for m in maps)), "white")
    for place, one in enumerate(maps):
        sheet.paste(one, (0, place * maps[0].height))
    sheet.save(path)
    return path
