"""Exercise 6: each token picks its layers (claim 3, Sec. 3.3)."""

from collections.abc import Sequence
from copy import deepcopy

import torch

from exercises.checks.tools import demand, gradients, raises_value_error, same, same_shape

TITLE, MINUTES = "Each token picks its layers", 25
CUT = {"router.py": ["layer_choice", "DTR.weights", "DTR.mix", "Static.weights"]}
PREDICT = ["What does the map of a fresh router look like, whose gate ends in zeros?",
           "What becomes of the weights when the temperature τ goes to 0?",
           "Which of the words of \"a red circle\" will listen to deep layers, which to shallow ones?"]
ANSWERS = ["1/K everywhere: a gate that gives zeros gives all layers the same.",
           "One layer takes all: softmax becomes the argmax.",
           "The method does not say. Look at a trained run: "
           "python exercises/run.py 6 sample.py route \"a red circle\" --run RUN"]
ABOUT = """`layer_choice` raises ValueError for K below 1 and for K above L. `mix` mixes by the weights that it is
given, whatever they are. In use (`eval`, no gradient) a router computes what it computes in training, and nothing is
kept from call to call. The checks compute in float64, where what you compute in another precision is off, and once in
float32 and bfloat16: what comes out has the kind of numbers that went in."""


def pair(own, real, name: str, d: int, k: int, temperature: float = 1.0):
    """A router of both versions with the same random weights, in float64."""
    arguments = (d, k, temperature) if name == "DTR" else (d, k)
    ours, theirs = (getattr(version.router, name)(*arguments).double() for version in (own, real))
    with torch.no_grad():
        for mine, other in zip(ours.parameters(), theirs.parameters()):
            other.copy_(torch.randn_like(other))
            mine.copy_(other)
    return ours, theirs


def states(b=3, l=7, k=4, d=10):
    return torch.randn(b, l, k, d, dtype=torch.float64)


def shares(own, real):
    """the weights of a token are shares that sum to 1"""
    for b, l, k, d in ((3, 7, 4, 10), (4, 4, 4, 4)):
        for name in ("DTR", "Static"):
            w = pair(own, real, name, d, k)[0].weights(states(b, l, k, d))
            same_shape(w, (b, l, k), f"{name}.weights")
            demand((w >= 0).all(), f"{name}.weights: some are negative")
            same(w.sum(-1), torch.ones(b, l, dtype=w.dtype), f"the sum of {name}.weights over the layers")


def soft(own, real):
    """and are soft: τ sharpens them, a large τ makes them even"""
    for b, l, k in ((3, 7, 4), (1, 5, 7), (4, 1, 1), (1, 1, 4)):
        for temperature in (0.03, 0.5, 1.0, 1e6):
            for size in (1, 1000):
                H = size * states(b, l, k)
                ours, theirs = (router.weights(H) for router in pair(own, real, "DTR", 10, k, temperature))
                same(ours, theirs, f"DTR.weights of {b} × {l} tokens{' with large states' * (size > 1)}, "
                                   f"τ = {temperature:g}")


def gate_learns(own, real):
    """the gate learns by the softmax's own gradient, whatever τ"""
    for temperature in (1e-4, 0.03, 0.5, 1e6):
        for size in (1, 1000):
            for scale in (1, temperature):  # with τ itself, g / τ is of the size of 1: no softmax at its ends
                routers, H = pair(own, real, "DTR", 10, 4, temperature), size * states()
                probe = states(d=1)[..., 0]
                found = []
                for router in routers:
                    with torch.no_grad():
                        router.gate[-1].weight.mul_(scale / size)
                        router.gate[-1].bias.mul_(scale)
                    w = router.weights(H)
                    found.append([w, *gradients((w * probe).sum(), [*router.gate.parameters()])])
                same(found[0][0], found[1][0], f"DTR.weights, τ = {temperature:g}")
                for mine, right in zip(found[0][1:], found[1][1:]):
                    same(mine, right, f"the gradient of the gate{' with large states' * (size > 1)}, "
                                      f"τ = {temperature:g}", 1e-8)


def anew(own, real):
    """asked again they answer anew: in use as in training, for any number of tokens, after a step"""
    for name in ("DTR", "Static"):
        router, H = pair(own, real, name, 10, 4, 0.5)[0], states()
        untouched, start = deepcopy(router), [parameter.clone() for parameter in router.parameters()]
        first = router.weights(H)
        for training, graph, b, l in ((True, False, 3, 7), (False, True, 1, 5), (False, False, 3, 7),
                                      (False, False, 2, 1)):
            router.train(training)
            with torch.set_grad_enabled(graph):
                same(router.weights(H[:b, :l]), first[:b, :l], f"{name}.weights of {b} × {l} of the same tokens, in " +
                     ("training" if training else "use (after eval)") + ", without gradient" * (not graph))
                same(router.mix(H[:b, :l], first[:b, :l]), untouched.mix(H[:b, :l], first[:b, :l]), f"{name}.mix of "
                     f"{b} × {l} of the same tokens, in " + ("training" if training else "use (after eval)"))
        demand(all(a.equal(b) for a, b in zip(start, router.parameters())), f"{name} changes its parameters when asked")
        same(router.train().weights(H), first, f"{name}.weights, asked again")
        with torch.no_grad():
            for parameter, other in zip(router.parameters(), untouched.parameters()):
                parameter.add_(torch.randn_like(parameter))
                other.copy_(parameter)
        same(router.weights(H), untouched.weights(H), f"{name}.weights of the same states after a step")


def deepest(own, real):
    """they are asked of the deepest state alone"""
    router, H = pair(own, real, "DTR", 10, 4)[0], states().requires_grad_()
    w = router.weights(H)
    same_shape(w, H.shape[:3], "DTR.weights")
    grad, = torch.autograd.grad((w * torch.randn_like(w)).sum(), H)
    demand(grad[:, :, :-1].abs().max() == 0, "DTR.weights depends on a state that is not the deepest")
    demand(grad[:, :, -1].abs().amax(-1).min() > 0, "DTR.weights does not depend on the deepest state of every token")


def each_for_itself(own, real):
    """every token chooses for itself"""
    router, H = pair(own, real, "DTR", 10, 4)[0], states()
    before = router.weights(H)
    changed = H.clone()
    changed[1, 2] += 1
    moved = (router.weights(changed) - before).abs().amax(-1) > 0
    wanted = torch.zeros(3, 7, dtype=torch.bool)
    wanted[1, 2] = True
    same_shape(moved, wanted.shape, "DTR.weights")
    demand(moved.equal(wanted), "one token's state was changed, and the weights of others moved, or its own did not")


def as_loops(own, real):
    """Ĥ_i = W_p Σ_k w_k α_k H_k, written as loops: values and gradients"""
    for b, l, k, d in ((3, 7, 4, 10), (2, 2, 2, 2), (1, 5, 3, 6), (3, 1, 4, 6), (1, 1, 1, 4)):
        router, H = pair(own, real, "DTR", d, k)[0], states(b, l, k, d).requires_grad_()
        given = H.detach().clone()
        g, norm, W_p, alpha, tau = router.gate, router.norm, router.W_p, router.alpha, router.temperature
        rows, shares_of = [], []
        for i in range(b):
            for j in range(l):
                w = torch.softmax(g(H[i, j, -1]) / tau, 0)
                shares_of.append(w)
                rows.append(W_p(norm(sum(w[n] * alpha[n] * H[i, j, n] for n in range(k)))))
        wanted = torch.stack(rows).view(b, l, d)
        out, w = router(H)
        demand(H.detach().equal(given), "H was written over: it is read again")
        same(out, wanted, "the router's output")
        same(w, torch.stack(shares_of).view(b, l, k), "the weights that the router returns beside it")
        probe = torch.randn_like(wanted)
        parameters = [H, *router.parameters()]
        ours, loops = (torch.autograd.grad((value * probe).sum(), parameters, allow_unused=True)
                       for value in (out, wanted))
        for one, other in zip(ours, loops):
            demand(one is not None or other is None, "H or a parameter of the router gets no gradient")
            if other is not None and one is not None:
                same(one, other, "the gradient of H or of a parameter", 1e-8)


def given_weights(own, real):
    """mix takes the weights that it is given, and leaves them as they are"""
    for b, l, k, d in ((3, 7, 4, 10), (1, 1, 4, 10), (4, 4, 4, 4)):
        ours, theirs = pair(own, real, "DTR", d, k)
        H, w = states(b, l, k, d), 2 * torch.randn(b, l, k, dtype=torch.float64)
        given = H.clone(), w.clone()
        same(ours.mix(H, w), theirs.mix(*given), f"DTR.mix of {b} × {l} tokens")
        demand(H.equal(given[0]) and w.equal(given[1]), "DTR.mix writes over H or over the weights")


def kinds(own, real):
    """what comes out has the kind of numbers that went in"""
    for name in ("DTR", "Static"):
        router, H = pair(own, real, name, 10, 4)[0], states()
        exact = router(H)
        for kind in (torch.float32, torch.bfloat16):
            router.to(kind)
            for what, x, wanted in zip(("output", "weights"), router(H.to(kind)), exact):
                demand(x.dtype == kind, f"{name} makes {what} of {x.dtype} from {kind}")
                if kind == torch.float32:
                    same(x, wanted, f"{name}'s {what} in {kind}", 1e-4)


def alpha_scales(own, real):
    """α scales what is mixed and takes no part in choosing"""
    router, H = pair(own, real, "DTR", 10, 4)[0], states()
    w = router.weights(H)
    with torch.no_grad():
        router.alpha.mul_(-3)
    same(router.weights(H), w, "DTR.weights after α was changed")
    with torch.no_grad():
        router.alpha.zero_()
        router.alpha[2] = 1
    changed = H.clone()
    changed[:, :, :2] += 5  # layers that α silences, none of them the deepest
    same(router(changed)[0], router(H)[0], "the output, when layers that α silences were changed")


def static(own, real):
    """Static has one choice for all tokens, and learns it"""
    router, theirs = pair(own, real, "Static", 10, 4)
    H = states()
    w = router.weights(H)
    same(w, theirs.weights(H), "Static.weights")
    probe = torch.randn(4, dtype=w.dtype)
    grad, right = (gradients((one.weights(H) * probe).sum(), [one.logits])[0] for one in (router, theirs))
    demand(grad.abs().max() > 0, "Static's logits get no gradient")
    same(grad, right, "the gradient of Static's logits", 1e-8)
    with torch.no_grad():
        for one in (router, theirs):
            one.logits.add_(torch.arange(4))
    same(router.weights(H), theirs.weights(H), "Static.weights after its logits have moved")
    for k, size in ((7, 1), (1, 1), (4, 1e5)):
        H, (router, theirs) = states(2, 3, k), pair(own, real, "Static", 10, k)
        with torch.no_grad():
            for one in (router, theirs):
                one.logits.mul_(size)
        same(router.weights(H), theirs.weights(H), f"Static.weights of {k} layers" + " with large logits" * (size > 1))


def choice(own, real):
    """layer_choice: every ⌊L/K⌋-th, the last one L"""
    for layers, k in ((24, 4), (28, 4), (26, 4), (6, 4), (5, 2), (6, 3), (7, 1), (4, 4)):
        got, right = own.router.layer_choice(layers, k), real.router.layer_choice(layers, k)
        demand(isinstance(got, Sequence), f"layer_choice returns a {type(got).__name__}: a list is wanted, which is "
               "read several times")
        demand(list(got) == right, f"layer_choice({layers}, {k}) is {got}, wanted {right}")
        demand(all(hasattr(one, "__index__") for one in got), f"layer_choice({layers}, {k}) is {got}: whole numbers "
               "are wanted, which can count layers")
    for layers, k in ((6, 0), (6, 7), (6, -1), (24, 25)):
        raises_value_error(lambda: own.router.layer_choice(layers, k), f"layer_choice({layers}, {k}), which cannot be,")


CLAIMS = [shares, soft, gate_learns, deepest, each_for_itself, as_loops, given_weights, kinds, alpha_scales, static,
          anew, choice]


def fingerprint(version) -> dict:
    H, w = states().requires_grad_(), torch.rand(3, 7, 4, dtype=torch.float64, requires_grad=True)
    router, static = pair(version, version, "DTR", 10, 4, 0.7)[0], pair(version, version, "Static", 10, 4)[0]

    def and_gradients(value, *given):
        probe = torch.linspace(-1, 1, value.numel(), dtype=value.dtype).view(value.shape)
        return torch.cat([x.flatten() for x in (value, *gradients((value * probe).sum(), given))])

    return {"DTR.weights": lambda: and_gradients(router.weights(H), H, *router.gate.parameters()),
            "DTR.mix": lambda: and_gradients(router.mix(H, w), H, w, router.alpha),
            "Static.weights": lambda: and_gradients(static.weights(H), static.logits),
            "layer_choice": lambda: torch.tensor(version.router.layer_choice(26, 4))}
