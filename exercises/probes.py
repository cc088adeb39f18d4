"""What each stream carries: facts read off f_v, z_s and z_p by ridge regression (method's open question).

    python exercises/probes.py RUN [RUN …]       a table, and with several runs its mean and 95 % interval over them

Pictures of one object at a known place would be too easy; here every picture is any scene of the test seeds, and each
of its objects is one sample: the tokens of its quarter, side by side, are what a probe reads. Captioned facts (shape,
colour, size) are told by the largest of one-hot regressions: share that is right. Facts that no caption tells (offset
across and down, turn, tint of the ground, amplitude of its stripes): R², the share of variance explained, 0 for a probe
that knows nothing, below 0 for a wrong one. λ is chosen on a validation part of the training pictures.

What flatters f_v: it has d numbers a token, the streams p; so f_v is also read through p random axes. What flatters
z_s: tokens outside the quarter are left out, where the pixel stream's attention may have put something. A turn cannot
be seen of a circle, and only up to a quarter of the round of squares and crosses: its R² stays below 1 for any probe.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import plumbing.command  # before torch, whose threads wait as it says
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from parts.metrics import mean_interval
from plumbing.command import Parser, run_command
from plumbing.run_folder import load_run
from spar import SPAR
from world.drawing import COLOURS, SHAPES, SIZES
from world.language import DrawnWorld

CAPTIONED = {"shape": list(SHAPES), "colour": list(COLOURS), "size": list(SIZES)}
UNTOLD = ("offset across", "offset down", "turn", "tint", "stripes")
LAMBDAS = [10.0**k for k in range(-4, 4)]


def quarters(tokens: Tensor, grid: int) -> Tensor:
    """`b n d` -> `b 4 (n/4 · d)`, the tokens of each quarter."""
    return rearrange(tokens, "b (r h c w) d -> b (r c) (h w d)", r=2, c=2, h=grid // 2, w=grid // 2)


@torch.no_grad()
def read(model: SPAR, world: DrawnWorld, count: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """-> (features by name `objects numbers`, facts by name: classes or values)"""
    features, facts = {}, {name: [] for name in (*CAPTIONED, *UNTOLD)}
    owners = []
    for index in range(count):
        scene = world.scene(index)
        for thing in scene.objects:
            owners.append((index, thing.place))
            for fact, words in CAPTIONED.items():
                facts[fact].append(words.index(getattr(thing, fact)))
            for fact, value in zip(UNTOLD, (*thing.offset, thing.turn, sum(scene.background.tint) / 3,
                                            scene.background.amplitude)):
                facts[fact].append(value)
    rows, places = (torch.tensor(numbers) for numbers in zip(*owners))
    pictures = world.pictures_of([world.scene(index) for index in range(count)])
    parts = {"f_v": [], "z_s": [], "z_p": []}
    for images in pictures.split(100):
        f_v = model.tokenizer.features(images.to(model.device))
        latents = model.tokenizer.latents(f_v)
        for name, tokens in (("f_v", f_v), ("z_s", latents.semantic), ("z_p", latents.pixel)):
            if tokens is not None:
                parts[name].append(tokens.cpu())
    for name, tokens in parts.items():
        if tokens:
            tokens = torch.cat(tokens).double()
            features[name] = quarters(tokens, model.config.grid)[rows, places]
            if name == "f_v":
                like = dict(generator=torch.Generator().manual_seed(0), dtype=torch.float64)
                axes = torch.linalg.qr(torch.randn(tokens.shape[-1], model.config.p, **like))[0]
                features["f_v, p axes"] = quarters(tokens @ axes, model.config.grid)[rows, places]
    facts = {name: torch.tensor(values) for name, values in facts.items()}
    return features, facts


def ridge(x: Tensor, y: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    """-> (weights, what is added): least squares plus `penalty` · n times the weights' squares, the mean left free."""
    mean, target = x.mean(0), y.mean(0)
    centred = x - mean
    gram = centred.T @ centred + penalty * len(x) * torch.eye(x.shape[1], dtype=x.dtype)
    weights = torch.linalg.solve(gram, centred.T @ (y - target))
    return weights, target - mean @ weights


def score(x: Tensor, y: Tensor, model: tuple[Tensor, Tensor], classes: bool) -> float:
    guess = x @ model[0] + model[1]
    if classes:
        return (guess.argmax(1) == y.argmax(1)).double().mean().item()
    return 1 - ((guess - y).square().mean() / (y - y.mean(0)).square().mean()).item()


def probe(x: Tensor, y: Tensor, x_test: Tensor, y_test: Tensor, classes: bool) -> float:
    scale = x.std(0).clamp(min=1e-6)
    x, x_test, cut = x / scale, x_test / scale, len(x) * 4 // 5
    best = max(LAMBDAS, key=lambda penalty: score(x[cut:], y[cut:], ridge(x[:cut], y[:cut], penalty), classes))
    return score(x_test, y_test, ridge(x, y, best), classes)


def probes(run: Path, count: int = 2000) -> dict[str, dict[str, float]]:
    """fact -> features' name -> share that is right, or R²"""
    model = load_run(run)
    seed, side = model.config.seed, model.config.side
    (x, y), (x_test, y_test) = (read(model, DrawnWorld(side, seed, split), n)
                                for split, n in (("probe", count), ("test", count // 2)))
    table = {}
    for fact in y:
        classes = fact in CAPTIONED
        targets = [F.one_hot(values).double() if classes else values.double()[:, None]
                   for values in (y[fact], y_test[fact])]
        table[fact] = {name: probe(x[name], targets[0], x_test[name], targets[1], classes) for name in x}
        table[fact]["chance"] = targets[1].mean(0).max().item() if classes else 0.0
    return table


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--count", type=int, default=2000, help="pictures to learn from; half as many test it")
    given = parser.read()
    tables = [probes(run, given.count) for run in given.runs]
    names = list(next(iter(tables[0].values())))
    print("| | " + " | ".join(names) + " |\n|" + "---|" * (len(names) + 1))
    for fact in tables[0]:
        cells = []
        for name in names:
            values = torch.tensor([table[fact][name] for table in tables], dtype=torch.float64)
            half = f" ± {(mean_interval(values)[1] - mean_interval(values)[0]) / 2:.2f}" if len(values) > 1 else ""
            cells.append(f"{values.mean():.2f}{half if name != 'chance' else ''}")
        print(f"| {fact} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    run_command(main)
