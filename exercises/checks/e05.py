"""Exercise 5: from noise to picture: samplers and classifier-free guidance."""

import itertools
import math

import torch

from exercises.checks.plots import log_log
from exercises.checks.tools import demand, raises_value_error, same, same_shape

TITLE, MINUTES = "From noise to picture", 40
CUT = {"diffusion.py": ["guided", "sample"]}
PREDICT = ["8, 64, 512 steps: by which factor does the error of euler fall each time, by which that of dpm?",
           "What does one step of euler from pure noise draw, before any second one?",
           "What becomes of a picture at guidance 0, 1, 1.5 and 8?"]
ANSWERS = ["Euler's by about 8 each time (order 1); dpm's by 30 to 50, nearer to 64 the more steps (order 2), until "
           "rounding ends it.",
           "The mean of all pictures that fit the words: at σ = 1 x_t tells nothing of z.",
           "0: drawn without the words. 1: as the model learned. 1.5: a little beyond. 8: far beyond what it has seen. "
           "A trained run's path, by your sampler: python exercises/run.py 5 sample.py page --run RUN"]
ABOUT = """σ goes from 1 to 0 in equal steps, which `shift` then moves. A multistep sampler knows one estimate alone in
its first step, and log-SNR is infinite at σ = 1 and at σ′ = 0: dpm's first and last steps are of first order. Any
sampler of second order is right that asks for the velocity once a step, and errs less than Euler by 20 steps. What
`velocity` gives is the caller's and is left as it is; so are the conditions. `renoise` goes on in the generator."""
SAMPLERS = ("euler", "dpm", "renoise")
MARGIN = 6  # standard errors


def schedule(steps, shift=1.0):
    """σ from 1 to 0, steps + 1 of them."""
    return [shift * s / (1 + (shift - 1) * s) for s in (1 - i / steps for i in range(steps + 1))]


def column(sigma):
    return sigma.double()[:, None, None, None]


def curved(x, sigma):
    """A velocity that is no line in x, and another one in each channel."""
    return (torch.sin(2 * x) + column(sigma) * torch.arange(1, x.shape[1] + 1)[:, None, None] - 0.3 * x).to(x.dtype)


def gaussian(mean, std):
    """-> (the velocity E[ε − z | x_t] for z from N(mean, std²), what its flow makes of a noise)"""
    def velocity(x, sigma):
        s = column(sigma)
        spread = (1 - s) ** 2 * std**2 + s**2
        return -mean + (s - (1 - s) * std**2) / spread * (x - (1 - s) * mean)

    return velocity, lambda noise: mean + std * noise


def two_hills(centre, std):
    """The same for z from N(−centre, std²) and N(centre, std²), half each."""
    def velocity(x, sigma):
        s = column(sigma)
        spread = (1 - s) ** 2 * std**2 + s**2
        pull = torch.tanh((1 - s) * centre * x / spread) * centre  # E[the hill's centre | x_t]
        clean = pull + (1 - s) * std**2 / spread * (x - (1 - s) * pull)
        return (x - clean) / s

    def flow(noise):  # the quantile that the noise has, by bisection
        low, high = torch.full_like(noise, -20), torch.full_like(noise, 20)
        for _ in range(60):
            middle = (low + high) / 2
            share = (torch.special.ndtr((middle - centre) / std) + torch.special.ndtr((middle + centre) / std)) / 2
            below = share < torch.special.ndtr(noise)
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return middle

    return velocity, flow


def noise_of(*shape, dtype=torch.float64):
    return torch.randn(*(shape or (3, 4, 5, 2)), dtype=dtype)


def walk(own, velocity, noise, *given, **named):
    """`sample`, its path looked at: from the noise itself to z."""
    before = noise.clone()
    result = own.diffusion.sample(velocity, noise, *given, **named)
    demand(isinstance(result, (tuple, list)) and len(result) == 2, "sample returns two things: z, and the path")
    z, path = result
    same_shape(z, noise.shape, "z")
    demand(len(path) > 0, "the path is empty")
    for latent in path:
        same_shape(latent, noise.shape, "a latent of the path")
    demand(noise.equal(before), "the noise was written over")
    return z, path


def places(own, real):
    """the path begins with the noise, has one latent more than steps, and ends with z"""
    for sampler, steps, dtype in itertools.product(SAMPLERS, (1, 2, 7), (torch.float32, torch.float64)):
        for noise in (noise_of(dtype=dtype), noise_of(4, 4, 4, 4, dtype=dtype)):
            z, path = walk(own, curved, noise, steps, sampler)
            what = f"{sampler} with {steps} steps"
            demand(len(path) == steps + 1, f"{what}: a path of {len(path)} latents, not {steps + 1}")
            demand(path[0].equal(noise), f"{what}: the path does not begin with the noise")
            demand(path[-1].equal(z), f"{what}: the path does not end with z")
            for one, other in zip(path, path[1:]):
                demand(torch.isfinite(other).all(), f"{what}: not all numbers are finite")
                demand(not one.equal(other), f"{what}: two latents of the path are the same")
                demand(other.dtype == dtype, f"{what}: the noise is {dtype}, a later latent {other.dtype}")


def asks(own, real):
    """a step asks for the velocity once, at the σ where it begins; a shift above 1 spends more steps near the noise"""
    for sampler, steps, shift in itertools.product(SAMPLERS, (1, 2, 7), (1.0, 3.0, 0.5)):
        asked, noise = [], noise_of()

        def velocity(x, sigma):
            same_shape(x, noise.shape, "the latent that the velocity is asked of")
            same_shape(sigma, (len(noise),), "the σ that the velocity is asked at")
            asked.append(sigma.clone())
            return curved(x, sigma)

        walk(own, velocity, noise, steps, sampler, shift)
        what = f"{sampler} with {steps} steps and shift {shift}"
        demand(len(asked) == steps, f"{what} asks for the velocity {len(asked)} times")
        wanted = torch.tensor(schedule(steps, shift)[:-1], dtype=torch.float64)[:, None].expand(steps, len(noise))
        same(torch.stack(asked), wanted, f"{what}: the σ asked for", 1e-6)


def line(own, real):
    """a straight way is walked without error, with any number of steps and any shift"""
    for sampler, steps, shift in itertools.product(("euler", "dpm"), (1, 2, 3, 6), (1.0, 3.0, 0.5)):
        far = 1 if steps < 6 else 100
        noise, goal = noise_of(), far * noise_of()
        _, path = walk(own, lambda x, sigma: (x - goal) / column(sigma), noise, steps, sampler, shift)
        demand(len(path) == steps + 1, f"a path of {len(path)} latents for {steps} steps")
        for sigma, latent in zip(schedule(steps, shift), path):
            same(latent, (1 - sigma) * goal + sigma * noise,
                 f"{sampler} with {steps} steps and shift {shift} on a straight way, at σ = {sigma:.2f}", 1e-6 * far)
    for sampler in SAMPLERS:
        noise, field = noise_of(), noise_of()
        kept = field.clone()
        z, _ = walk(own, lambda x, sigma: field, noise, 5, sampler)
        demand(field.equal(kept), f"{sampler} writes over the velocity that it is given")
        if sampler != "renoise":
            same(z, noise - field, f"{sampler} by one velocity that is everywhere the same", 1e-6)
        walk(own, lambda x, sigma: x, noise, 5, sampler)  # its velocity is the latent itself


def euler(own, real):
    """euler: x ← x + (σ' − σ) v"""
    for steps, shift in ((1, 1.0), (5, 1.0), (4, 3.0)):
        noise = noise_of()
        wanted, sigmas = [noise], schedule(steps, shift)
        for now, after in zip(sigmas, sigmas[1:]):
            wanted.append(wanted[-1] + (after - now) * curved(wanted[-1], torch.full((3,), now)))
        _, path = walk(own, curved, noise, steps, "euler", shift)
        demand(len(path) == steps + 1, f"a path of {len(path)} latents for {steps} steps")
        for i, (latent, there) in enumerate(zip(path, wanted)):
            same(latent, there, f"euler's latent after {i} of {steps} steps, shift {shift}", 1e-5)


def is_normal(sample, what):
    n = sample.numel()
    for power, wanted, error in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):  # its variance: E x^2k − (E x^k)²
        off = (sample.double() ** power).mean().item() - wanted
        demand(abs(off) < MARGIN * (error / n) ** 0.5,
               f"{what} is not from N(0, 1): its {power}. moment is off by {off:.2g}")


def unlike(a, b, what):
    demand(abs((a * b).mean().item()) < MARGIN / a.numel() ** 0.5, f"{what} are not independent")


def renoise(own, real):
    """renoise: x ← (1 − σ') x₀ + σ' ε', with noise ε' that no one has seen before"""
    for steps, shift in ((1, 1.0), (5, 1.0), (4, 3.0)):
        given, sigmas = torch.Generator().manual_seed(int(torch.randint(2**31, ()))), schedule(steps, shift)
        noise = torch.randn(3, 3, 60, 50, generator=given, dtype=torch.float64)  # from it too, as in `generate`
        _, path = walk(own, curved, noise, steps, "renoise", shift, given)
        demand(len(path) == steps + 1, f"a path of {len(path)} latents for {steps} steps")
        drawn = [noise]
        for i, (now, after) in enumerate(zip(sigmas, sigmas[1:])):
            clean = path[i] - now * curved(path[i], torch.full((3,), now, dtype=noise.dtype))
            if after == 0:
                same(path[i + 1], clean, "renoise's last step", 1e-6)
                continue
            drawn.append((path[i + 1] - (1 - after) * clean) / after)
            what = f"renoise's ε' in step {i + 1} of {steps}, shift {shift},"
            is_normal(drawn[-1], what)
            for a, b in itertools.combinations(range(3), 2):
                unlike(drawn[-1][a], drawn[-1][b], f"{what} for two rows of the batch")
                unlike(drawn[-1][:, a], drawn[-1][:, b], f"{what} for two channels")
        for a, b in itertools.combinations(drawn, 2):
            unlike(a, b, "the noises of two steps of renoise, or one and the first noise,")


def generator(own, real):
    """the generator alone decides what renoise draws, and without one torch's own"""
    noise = noise_of()

    def draw(seed=None):
        given = None if seed is None else torch.Generator().manual_seed(seed)
        return walk(own, curved, noise, 4, "renoise", generator=given)[0]

    state = torch.get_rng_state()
    demand(draw(0).equal(draw(0)), "renoise draws something else with the same generator")
    demand(not draw(0).equal(draw(1)), "renoise draws the same with another generator")
    one = torch.Generator().manual_seed(0)
    first, second = (walk(own, curved, noise, 4, "renoise", generator=one)[0] for _ in range(2))
    demand(not first.equal(second), "renoise draws the same again from a generator that it has drawn from")
    demand(torch.get_rng_state().equal(state), "with a generator given, renoise used or set torch's own, too")
    demand(not draw().equal(draw()), "without a generator, renoise draws the same each time")
    torch.set_rng_state(state)
    again = draw()
    torch.set_rng_state(state)
    demand(draw().equal(again), "without a generator, torch.manual_seed does not decide what renoise draws")


def refuses(own, real):
    """an unknown sampler, or fewer than one step, raises ValueError"""
    for sampler, steps in (("heun", 5), ("Euler", 5), ("dpm", 0), ("euler", -1), ("renoise", 0), ("heun", 1), ("", 5),
                           ("eul", 5), ("euler_a", 5), ("dpm++", 5)):
        raises_value_error(lambda: own.diffusion.sample(curved, noise_of(), steps, sampler),
                           f"sampler {sampler!r} with {steps} steps")


class Reader:
    """In place of a DiT: x, σ, the tokens and the mask of a row all count, tokens that the mask hides do not."""

    def __init__(self):
        self.rows = 0

    def __call__(self, x, sigma, tokens, mask, /):  # as `SPAR.generate` hands it over, without names
        demand(mask.dtype == torch.bool, f"the mask that the DiT gets is {mask.dtype}, not bool")
        lengths = {len(x), len(sigma), len(tokens), len(mask)}
        demand(len(lengths) == 1, f"the DiT gets {len(x)} latents, {len(sigma)} σ, {len(tokens)} conditions")
        same_shape(mask, tokens.shape[:2], "the mask that the DiT gets")
        self.rows += len(x)
        weights = tokens.sum(-1).masked_fill(~mask, -math.inf).softmax(-1)
        read = (weights[..., None] * tokens).sum(1)  # b u
        return (torch.sin(x * read[:, :1, None, None]) + column(sigma) * read[:, 1, None, None, None] ** 2).to(x.dtype)


def requests(b, lengths, u=6, dtype=torch.float64):
    """Tokens and mask of a condition and of nothing, some of them hidden."""
    pairs = []
    for length in lengths:
        mask = torch.rand(b, length) < 0.7
        mask[:, 0] = True
        pairs.append((torch.randn(b, length, u, dtype=dtype), mask))
    return pairs


def guided_velocity(own, guidance, b=3, lengths=(7, 7)):
    """-> (own velocity at some x and σ, that of the condition, that of nothing, how many rows the DiT was asked for)"""
    dit, (condition, nothing) = Reader(), requests(b, lengths)
    before = [part.clone() for part in (*condition, *nothing)]
    velocity = own.diffusion.guided(dit, condition, nothing, guidance)
    for _ in range(2):  # it is asked once a step
        x, sigma = noise_of(b, 4, 5, 2), torch.rand(b, dtype=torch.float64)
        given, dit.rows = (x.clone(), sigma.clone()), 0
        found = velocity(x, sigma)
    demand(x.equal(given[0]) and sigma.equal(given[1]), "x or σ was written over")
    demand(all(a.equal(c) for a, c in zip(before, (*condition, *nothing))), "the conditions were written over")
    return found, Reader()(x, sigma, *condition), Reader()(x, sigma, *nothing), dit.rows


def once(own, real):
    """at guidance 1 the condition alone is asked, once"""
    for guidance in (1, 3.0):
        x, (condition, nothing) = noise_of(dtype=torch.float32), requests(3, (7, 5), dtype=torch.float32)
        kind = own.diffusion.guided(Reader(), condition, nothing, guidance)(x, torch.rand(3)).dtype
        demand(kind == x.dtype, f"at guidance {guidance} the velocity of {x.dtype} is {kind}")
    for guidance in (1, 1.0):
        found, with_words, _, rows = guided_velocity(own, guidance)
        same(found, with_words, "the velocity at guidance 1")
        demand(rows == len(found), f"at guidance 1, {rows} latents are given to the DiT for a batch of {len(found)}")


def on_their_line(own, real):
    """at others, the velocity lies on the line from what nothing says to what the condition says"""
    for guidance, b in itertools.product((0.0, 0.5, 0.9, 1.2, 1.5, 4.5, 8.0, -1.0), (3, 5, 1)):
        found, with_words, without, rows = guided_velocity(own, guidance, b)
        same(found, without + guidance * (with_words - without), f"the velocity at guidance {guidance}")
        demand(rows <= 2 * b, f"at guidance {guidance}, {rows} latents are given to the DiT for a batch of {b}")


def padded(own, real):
    """condition and nothing may differ in length: what is filled up is hidden by the mask"""
    for lengths in ((7, 2), (2, 9), (1, 8), (5, 5)):
        found, with_words, without, _ = guided_velocity(own, 2.5, 3, lengths)
        same(found, without + 2.5 * (with_words - without),
             f"the velocity for a condition of {lengths[0]} tokens and {lengths[1]} of nothing")


def errors(version, velocity, flow, noise, sampler, counts, shift=1.0):
    """The largest distance from where the exact flow leads, for each number of steps."""
    given = torch.Generator().manual_seed(0)  # as `SPAR.generate` hands one to every sampler
    return [(walk(version, velocity, noise, steps, sampler, shift, given)[0] - flow(noise)).abs().max().item()
            for steps in counts]


def orders(own, real):
    """8 times as many steps make the error of euler 8 times smaller (order 1), that of dpm about 64 times (order 2)"""
    one, other, hills = gaussian(1.5, 1.3), gaussian(-0.5, 2.0), two_hills(1.5, 0.8)
    noise = noise_of(5, 2, 2, 3)
    for sampler, what, (velocity, flow), shift, few in (
            ("euler", "N(1.5, 1.7)", one, 1.0, 64), ("euler", "two hills", hills, 1.0, 64),
            ("dpm", "N(1.5, 1.7)", one, 1.0, 64), ("dpm", "two hills", hills, 1.0, 64),
            ("dpm", "two hills", hills, 1.0, 63), ("dpm", "N(−0.5, 4)", other, 1.0, 64),
            ("dpm", "N(−0.5, 4)", other, 3.0, 64)):  # 63: a step across σ = 1/2, where log-SNR changes its sign
        coarse, fine = errors(own, velocity, flow, noise, sampler, (few, 8 * few), shift)
        demand(math.isfinite(coarse) and math.isfinite(fine), f"{sampler} on {what}: not all numbers are finite")
        order, (least, most) = math.log(coarse / max(fine, 1e-15), 8), {"euler": (0.9, 1.1), "dpm": (1.4, 9)}[sampler]
        demand(least < order < most, f"{sampler} on {what} with shift {shift}: from {few} to {8 * few} steps the error "
               f"falls from {coarse:.1e} to {fine:.1e}, which is order {order:.2f}")
    for what, (velocity, flow), shift in (
            ("N(1.5, 1.7)", one, 1.0), ("two hills", hills, 1.0), ("N(−0.5, 4)", other, 1.0), ("two hills", hills, 3.0),
            ("N(−0.5, 4)", other, 3.0)):
        first, second = (errors(own, velocity, flow, noise, sampler, (20,), shift)[0] for sampler in ("euler", "dpm"))
        demand(second < first, f"by 20 steps with shift {shift} dpm errs more than Euler on {what}: {second:.2g}, "
               f"{first:.2g}")


CLAIMS = [places, asks, line, euler, renoise, generator, refuses, once, on_their_line, padded, orders]


def fingerprint(version) -> dict:
    noise = noise_of(2, 3, 2, 5)

    def samples():
        for sampler, steps, shift in (("euler", 5, 1.0), ("euler", 3, 3.0), ("dpm", 6, 1.0), ("renoise", 3, 1.0)):
            yield from version.diffusion.sample(curved, noise.clone(), steps, sampler, shift,
                                                torch.Generator().manual_seed(1))[1]

    def velocities():
        for guidance, lengths in ((3.0, (7, 4)), (0.0, (3, 5))):
            yield guided_velocity(version, guidance, 3, lengths)[0]

    def in_a_row(tensors):
        return torch.cat([x.detach().reshape(-1) for x in tensors])

    return {"sample": lambda: in_a_row(samples()), "guided": lambda: in_a_row(velocities())}


def picture(own, path):
    """The error of the samplers against the number of steps: slopes of −1 and −2."""
    torch.manual_seed(0)
    (velocity, flow), noise, counts = gaussian(1.5, 1.0), noise_of(40, 1, 1, 1), (16, 32, 64, 128, 256, 512)
    return log_log(path, "Distance from the exact flow to N(1.5, 1)", "steps", "error",
                   {name: list(zip(counts, errors(own, velocity, flow, noise, name, counts))) for name in SAMPLERS[:2]})
