"""Exercise 3: softmax in one pass over tiles of keys, the forward of the fused path."""

import weakref
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from exercises.checks.plots import log_log
from exercises.checks.tools import demand, same, same_shape

TITLE, MINUTES = "Softmax in one pass", 40
CUT = {"attention.py": ["Tiled.forward"]}
PREDICT = ["4096 queries, 4096 keys, heads of width 32, tiles of 64: how many numbers has the largest tensor of one "
           "head, written plainly, and written in tiles?",
           "What must become of the running sum when a later tile holds a larger maximum?",
           "What comes out for a query that may see no key at all?"]
ANSWERS = ["Plainly the scores, 4096 × 4096 = 16.8 million; in tiles of 64 by 64 no tensor of scores is larger than "
           "4096, and the largest of all is the output, 4096 × 32.",
           "It shrinks by exp(old maximum − new maximum), and so do the values summed so far.",
           "Zeros: nothing was summed, and dividing by that nothing must not give NaN."]
ABOUT = """`forward` gets q `b (a g) n e`, k and v `b a m e`, key_mask `b m` or None; it gives out like q, and leaves
what `backward` reads: `ctx.save_for_backward(q, k, v, key_mask, out, lse)` and `ctx.causal`. lse `b (a g) n` is log2
Σ_j 2^score, where a score is q·k log2 e / √(width of a head), and −∞, or any number, for a query that sees no key. It,
and all that is summed, weights too, is float64 where q is and else float32. What a tile needs stands in the file, use
it or not: `TILE`, `visible`, `wide`, `for_each_query_head`, `hide`, `tiles_of_keys`, `LOWEST`. Any way is right whose
memory does not grow with n·m."""
MASKS = ("random", "left", "right", "one key", "one row")


def inputs(n, m, heads=(4, 2), b=3, e=6, dtype=torch.float64):
    """q, k and v as a model hands them over: heads beside the width in memory, so that they are not contiguous."""
    shapes = ((n, heads[0]), (m, heads[1]), (m, heads[1]))
    return [torch.randn(b, length, a, e, dtype=dtype).transpose(1, 2) for length, a in shapes]


def mask_of(kind: str, b: int, m: int):
    """`b m`, true where a key may be seen. "left": the first tile and more is hidden for all; "one row": all keys are
    hidden for all but the first of the batch."""
    place, first = torch.arange(m).expand(b, m), torch.arange(b)[:, None] == 0
    if kind == "one key":
        return place == torch.randint(0, m, (b, 1))
    return {"random": torch.rand(b, m) < 0.7, "left": place >= m // 2, "right": place < m // 2 + 1,
            "one row": first.expand(b, m)}[kind]


def seen_by(n, m, causal, key_mask):
    """Which query sees which key: `b|1 1 n m`."""
    seen = torch.ones(1, 1, n, m, dtype=torch.bool)
    if causal:
        seen = torch.ones(n, m, dtype=torch.bool).tril(m - n)[None, None]
    return seen if key_mask is None else seen & key_mask[:, None, None]


def plainly(q, k, v, causal=False, key_mask=None):
    """Attention with the whole matrix, in float64; rows that see nothing give zeros."""
    q, k, v = q.double(), k.double(), v.double()
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    seen = seen_by(q.shape[2], k.shape[2], causal, key_mask)
    score = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).masked_fill(~seen, -1e300)
    return (score.softmax(-1) * seen) @ v


@contextmanager
def unwritten_is_nan():
    """Memory that nobody wrote to holds no numbers by chance."""
    before, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn)
        torch.utils.deterministic.fill_uninitialized_memory = fill


def tiled(version, q, k, v, causal=False, key_mask=None):
    with unwritten_is_nan():
        return version.attention.attention(q, k, v, causal=causal, key_mask=key_mask, backend="tiled")


def compare(own, given, causal, key_mask, what, tolerance=1e-9):
    wanted, before = plainly(*given, causal, key_mask), [x.clone() for x in given]
    same(tiled(own, *given, causal, key_mask), wanted, what, tolerance)
    demand(all(x.equal(y) for x, y in zip(given, before)), "the inputs q, k, v were written over")


def values(own, real):
    """out = softmax(q kᵀ / √e) v, for any number of queries and keys"""
    for n, m, heads, b, e in ((100, 150, (2, 2), 3, 6), (150, 100, (3, 3), 2, 5), (64, 128, (2, 2), 1, 4),
                              (1, 130, (2, 2), 3, 6), (70, 1, (1, 1), 2, 3), (4, 4, (4, 4), 4, 4)):
        compare(own, inputs(n, m, heads, b, e), False, None, f"out for {n} queries and {m} keys, in float64")


def shared(own, real):
    """neighbouring heads of queries share a head of keys"""
    for n, m, heads in ((70, 90, (4, 2)), (30, 140, (6, 2)), (65, 66, (3, 1))):
        compare(own, inputs(n, m, heads), False, None, f"out for {heads[0]} heads of queries, {heads[1]} of keys")


def causal(own, real):
    """under a causal mask, query i sees keys up to i + m − n"""
    for n, m in ((130, 130), (70, 200), (1, 90), (150, 100), (5, 5)):
        compare(own, inputs(n, m), True, None, f"out under a causal mask for {n} queries and {m} keys")


def hidden(own, real):
    """a key that the mask hides counts for nothing, even where a whole tile is hidden"""
    for n, m in ((100, 170), (7, 5)):
        for kind in MASKS:
            for is_causal in (False, True):
                key_mask, words = mask_of(kind, 3, m), f"{kind}{', causal' if is_causal else ''}"
                before = key_mask.clone()
                compare(own, inputs(n, m), is_causal, key_mask, f"out for {n} queries, {m} keys, a mask ({words})")
                demand(key_mask.equal(before), "the mask was written over")


def maxima(own, real):
    """a larger maximum may come late or early, at scores of ten thousand and of minus ten thousand"""
    n, m = 70, 200
    for words, scores in (("growing from tile to tile", torch.linspace(-3e4, 3e4, m)),
                          ("falling from tile to tile", torch.linspace(3e4, -3e4, m)),
                          ("slowly growing", torch.linspace(0, 9, m)), ("slowly falling", torch.linspace(9, 0, m)),
                          ("all far below 0", torch.linspace(-3e4, -2.9e4, m)),
                          ("far apart without order", 1e4 * torch.randn(m))):
        q, k, v = inputs(n, m)
        q[..., 0], k[..., 0] = 6 ** 0.5, scores.double()  # q kᵀ / √e is `scores` and what the other channels add
        compare(own, (q, k, v), False, None, f"out with scores {words}", 1e-8)
        q[..., 0] *= torch.randint(0, 2, q.shape[:-1]) * 2 - 1
        compare(own, (q, k, v), False, None, f"out with scores {words}, for some queries −1 times these", 1e-8)
        for is_causal, kind in ((True, None), (False, "random"), (True, "random")):
            key_mask, what = None if kind is None else mask_of(kind, 3, m), ["under a causal mask"] * is_causal
            what += ["with a key mask"] * (kind is not None)
            compare(own, (q, k, v), is_causal, key_mask, f"out with scores {words}, {' and '.join(what)}", 1e-8)


def blind(own, real):
    """a query that sees nothing gives zeros, and no gradient flows through it"""
    for n, m, kind in ((150, 100, "one row"), (200, 20, "random"), (90, 130, "one row")):
        given = [x.requires_grad_() for x in inputs(n, m)]
        key_mask = mask_of(kind, 3, m)
        nothing = ~seen_by(n, m, True, key_mask).any(-1, keepdim=True).expand(3, 4, n, 6)
        out = tiled(own, *given, True, key_mask)
        same_shape(out, nothing.shape, "out")
        same(out[nothing], torch.zeros_like(out[nothing]), "out of the queries that see nothing", 0)
        for name, gradient in zip("qkv", torch.autograd.grad(out[nothing].sum(), given, retain_graph=True)):
            same(gradient, torch.zeros_like(gradient), f"the gradient of {name} through queries that see nothing", 0)
        dq, = torch.autograd.grad(out.square().sum(), given[:1])
        same(dq[nothing], torch.zeros_like(dq[nothing]), "the gradient of queries that see nothing", 0)


def gradients(own, real):
    """backward finds what it reads, whichever of q, k and v learn: its gradients are autograd's"""
    exactly, plain = torch.float64, torch.float32
    for n, m, heads, is_causal, kind, names, large, dtype in (
            (100, 150, (4, 2), True, "random", "qkv", 1, exactly), (150, 100, (2, 1), True, None, "qkv", 1, exactly),
            (70, 130, (3, 3), False, None, "qkv", 1, exactly), (66, 140, (2, 2), False, "left", "qkv", 1, exactly),
            (70, 130, (2, 1), False, None, "q", 1, exactly), (70, 130, (2, 1), True, "random", "kv", 1, exactly),
            (66, 140, (2, 2), True, "random", "qkv", 2000, exactly),
            (66, 140, (2, 2), True, "random", "qkv", 1, plain)):
        given = inputs(n, m, heads, dtype=dtype)
        given[0] *= large
        learning = [x.requires_grad_() for name, x in zip("qkv", given) if name in names]
        key_mask = None if kind is None else mask_of(kind, 3, m)
        out, wanted = tiled(own, *given, is_causal, key_mask), plainly(*given, is_causal, key_mask)
        exact = dtype == exactly
        same(out, wanted, f"out in {dtype}", 1e-9 if exact and large == 1 else 1e-5)
        demand(out.dtype == dtype, f"out of {dtype} is {out.dtype}")
        probe = torch.randn_like(out)
        ours, theirs = torch.autograd.grad(out, learning, probe), torch.autograd.grad(wanted, learning, probe.double())
        for name, one, other in zip(names, ours, theirs):
            same(one, other, "out is right, not all that backward reads (q, k, v, key_mask, out, lse; ctx.causal; "
                 f"lse is log2 Σ 2^score): the gradient of {name}" + " with large scores" * (large > 1) +
                 f", where {', '.join(names)} learn" * (names != "qkv") + f" in {dtype}" * (not exact),
                 1e-8 if exact and large == 1 else 1e-4)


class Alive(TorchDispatchMode):
    """How many numbers the results of operations held at one time, at most, and how many the largest one alone."""

    def __init__(self):
        super().__init__()
        self.known, self.most, self.largest = {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor):
                self.known[id(x)] = weakref.ref(x)
        self.known = {key: ref for key, ref in self.known.items() if ref() is not None}
        held = [ref() for ref in self.known.values()]
        sizes = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() // x.itemsize for x in held}
        self.most, self.largest = max(self.most, sum(sizes.values())), max([self.largest, *sizes.values()])
        return result


def memory(own, real):
    """memory grows with the number of tokens, not with its square"""
    for is_causal, share in ((True, 0.9), (False, None), (True, None), (False, 0.9)):
        held = {}

        def grows(few: int) -> float:
            for n in (few, 3 * few):
                if n not in held:
                    q, k, v = inputs(n, n, (2, 1), 1, 4)
                    with Alive() as alive:
                        own.attention.attention(q, k, v, causal=is_causal, backend="tiled",
                                                key_mask=None if share is None else torch.rand(1, n) < share)
                    held[n] = alive.most
            return held[3 * few] / held[few]

        if (times := grows(384)) > 3.2:
            times = grows(1152)  # tiles may be larger than 384
        demand(times <= 3.2, f"three times as many queries and keys take {times:.1f} times the memory"
               f"{', under a causal mask' * is_causal}{', with a key mask' * (share is not None)}: somewhere all "
               "queries meet all keys at once (tiles of more than 1152 are not told from that)")


def half(own, real):
    """in half precision out stays half, while maxima, weights and sums are float32"""
    for dtype in (torch.bfloat16, torch.float16):
        given = [x.requires_grad_() for x in inputs(90, 1000, dtype=dtype)]
        out, wanted = tiled(own, *given), plainly(*given)
        demand(out.dtype == dtype, f"out of {dtype} inputs is {out.dtype}")
        same_shape(out, wanted.shape, f"out in {dtype}")
        exactly = (out == wanted.to(dtype)).double().mean().item()
        demand(exactly > 0.98, f"{1 - exactly:.0%} of out in {dtype} are not the nearest number: weights and sums are "
                               "float32, and out is rounded once, at its end")
        probe = torch.randn_like(wanted).to(dtype)
        pairs = [("out", out, wanted)]
        pairs += zip(("its gradient of q", "its gradient of k", "its gradient of v"),
                     torch.autograd.grad(out, given, probe), torch.autograd.grad(wanted, given, probe.double()))
        for name, ours, theirs in pairs:
            off = ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()
            demand(off < 0.0035, f"{name} in {dtype} is off by {off:.1%}, more than its last digit: sum in float32")


CLAIMS = [values, shared, causal, hidden, maxima, blind, gradients, memory, half]


def fingerprint(version) -> dict:

    def forward():
        found = []
        for n, m, is_causal, kind in ((70, 150, True, "left"), (150, 70, True, "random"), (66, 70, False, "one row")):
            given = [(3 * x).requires_grad_() for x in inputs(n, m)]
            out = tiled(version, *given, is_causal, mask_of(kind, 3, m))
            found += [out, *torch.autograd.grad(out.square().sum(), given)]
        return torch.cat([x.detach().reshape(-1) for x in found])

    return {"Tiled.forward": forward}


def picture(own, path):
    """Numbers in the largest tensor against the number of tokens, written plainly and in the learner's tiles."""
    curves = {"plainly": [], "yours": []}
    for n in (128, 256, 512, 1024, 2048):
        q, k, v = inputs(n, n, (1, 1), 1, 32, torch.float32)
        for name, compute in (("plainly", lambda: (q @ k.mT / 32**0.5).softmax(-1) @ v),
                              ("yours", lambda: own.attention.attention(q, k, v, backend="tiled"))):
            with Alive() as alive:
                compute()
            curves[name].append((n, alive.largest))
    return log_log(path, "The largest tensor that attention makes", "queries and keys", "numbers", curves)
