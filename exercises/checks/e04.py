"""Exercise 4: the straight path from noise to picture (flow matching, Sec. 3.3)."""

import math

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import nn

from exercises.checks.tools import demand, gradients, same, same_shape

TITLE, MINUTES = "The straight path", 25
CUT = {"diffusion.py": ["logit_normal_times", "add_noise", "flow_matching_loss"]}
PREDICT = ["z = 2, ε = 0.5, σ = 0.25: where is x_t, and what is v there? Which way does it point?",
           "What is the least loss that any model can reach: is it 0?",
           "Where do most of the times σ lie with shift 1, where with shift 3?"]
ANSWERS = ["x_t = 0.75 · 2 + 0.25 · 0.5 = 1.625; v = ε − z = −1.5: from the clean point towards the noise, as σ grows.",
           "No: many pairs of z and ε lead through one x_t; the variance of ε − z among them is left.",
           "Around 1/2 with shift 1; the median with shift 3 is 3/(1 + 3) = 0.75, nearer to the noise."]
ABOUT = """z and ε are `b p h w`, not always in one piece in memory, σ is `b`. Times need not be one from each slice:
independent ones are right too, if their distribution is."""
SHAPES = ((3, 4, 5, 2), (4, 4, 4, 4), (2, 3, 5, 2), (1, 2, 3, 4))  # all different, all equal, b = w, b = 1
MARGIN = 3.3  # of √n times the distance between two distribution functions: by chance once in 10⁹


def turned(shape, dtype=torch.float64):
    """Random numbers whose channels lie side by side in memory, as the DiT's velocity has them."""
    b, p, h, w = shape
    return torch.randn(b, h, w, p, dtype=dtype).permute(0, 3, 1, 2)


def latents(shape, dtype=torch.float64):
    return turned(shape, dtype), torch.randn(shape, dtype=dtype), torch.rand(shape[0], dtype=dtype)


def untouched(function, *given, what: str):
    before = [x.detach().clone() for x in given]
    result = function(*given)
    demand(all(x.equal(y) for x, y in zip(given, before)), f"{what} writes over its inputs")
    return result


def ends(own, real):
    """at σ = 1 all is noise, at σ = 0 all is picture, and each row has its own σ"""
    for shape in SHAPES:
        z, noise, _ = latents(shape)
        sigma = torch.arange(shape[0], dtype=z.dtype) % 2
        wanted = torch.stack([noise[i] if i % 2 else z[i] for i in range(shape[0])])
        same(own.diffusion.add_noise(z, noise, sigma), wanted, f"add_noise of {shape} with σ = 0, 1, 0, …")


def straight(own, real):
    """between them x_t walks straight: (1 − σ) z + σ ε"""
    for shape in SHAPES:
        for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
            z, noise, sigma = latents(shape, dtype)
            wanted = torch.stack([(1 - sigma[i]) * z[i] + sigma[i] * noise[i] for i in range(shape[0])])
            x_t = untouched(own.diffusion.add_noise, z, noise, sigma, what="add_noise")
            same(x_t, wanted, f"add_noise of {shape}", tolerance)
            demand(x_t.dtype == dtype, f"add_noise of {dtype} gives {x_t.dtype}")


def squares(own, real):
    """L_fm is the mean of the squared differences from ε − z, over all numbers"""
    for shape in SHAPES:
        for dtype in (torch.float32, torch.float64):
            z, noise, _ = latents(shape, dtype)
            for velocity in (turned(shape, dtype), 3 * torch.randn(shape, dtype=dtype), 100 * turned(shape, dtype)):
                pairs = zip(velocity.flatten().tolist(), (noise - z).flatten().tolist())
                wanted = torch.tensor(sum((a - b) ** 2 for a, b in pairs) / velocity.numel(), dtype=torch.float64)
                loss = untouched(own.diffusion.flow_matching_loss, velocity, z, noise, what="flow_matching_loss")
                same(loss, wanted, f"the loss of {shape}", 1e-5)


def gradient(own, real):
    """and its gradient tells the velocity where to go"""
    for shape in SHAPES:
        z, noise, _ = latents(shape)
        velocity = torch.randn(shape, dtype=z.dtype, requires_grad=True)
        loss = own.diffusion.flow_matching_loss(velocity, z, noise)
        same_shape(loss, (), "the loss")
        demand(loss.requires_grad, "no gradient flows from the loss to the velocity")
        found, = torch.autograd.grad(loss, velocity)
        same(found, 2 * (velocity - (noise - z)) / velocity.numel(), "the gradient of the loss", 1e-6)


def along(own, real):
    """the loss is 0 at the velocity of the path that add_noise walks, for growing σ"""
    for shape in SHAPES:
        z, noise, sigma = latents(shape)
        sigma = 0.75 * sigma
        early, late = own.diffusion.add_noise(z, noise, sigma), own.diffusion.add_noise(z, noise, sigma + 0.25)
        same_shape(late, shape, "add_noise")
        loss = own.diffusion.flow_matching_loss((late - early) / 0.25, z, noise)
        same(loss, torch.zeros(()), "the loss at the path's own velocity", 1e-9)


def least(own, real):
    """for a cloud of points the least loss is not 0: it is what x_t cannot tell about ε − z"""
    clouds, points = 1000, (4, 5, 5)
    n = clouds * math.prod(points)
    for mean, std in ((1.5, 0.3), (-0.5, 2.0)):
        for at in (0.1, 0.5, 0.9):
            z = mean + std * torch.randn(clouds, *points, dtype=torch.float64)
            noise, sigma = torch.randn_like(z), torch.full((clouds,), at, dtype=z.dtype)
            x_t = own.diffusion.add_noise(z, noise, sigma)
            same_shape(x_t, z.shape, "add_noise")
            spread = (1 - at) ** 2 * std**2 + at**2
            best = -mean + (at - (1 - at) * std**2) / spread * (x_t - (1 - at) * mean)  # E[ε − z | x_t]
            loss, wanted = own.diffusion.flow_matching_loss(best, z, noise), std**2 / spread
            same_shape(loss, (), "the loss")
            demand(abs(loss.item() - wanted) < 6 * wanted * (2 / n) ** 0.5,
                   f"the loss of the best guess for N({mean}, {std}²) at σ = {at}: {loss.item():.3f}, not {wanted:.3f}")
            for change in ((x_t - x_t.mean()) / spread**0.5, torch.ones_like(x_t)):
                for size in (-0.3, 0.3):
                    worse = own.diffusion.flow_matching_loss(best + size * wanted**0.5 * change, z, noise)
                    demand(worse > loss + 0.5 * size**2 * wanted,
                           f"a guess beside the best one is no worse for N({mean}, {std}²) at σ = {at}")


def distance(sigma, shift=1.0):
    """√n times the largest gap between σ's distribution function and that of the sigmoid of N(log shift, 1)."""
    share = torch.special.ndtr(torch.logit(sigma.double()) - math.log(shift)).sort().values
    n = len(share)
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    return max((share - steps[:-1]).max().item(), (steps[1:] - share).max().item()) * n**0.5


def times_of(own, b, *given, **named):
    sigma = own.diffusion.logit_normal_times(b, *given, **named)
    same_shape(sigma, (b,), f"logit_normal_times({b})")
    demand(sigma.is_floating_point() and ((sigma >= 0) & (sigma <= 1)).all(), "some times are not in [0, 1]")
    return sigma


def has_its_ends(sigma, shift=1.0):
    low, high = (torch.logit(sigma.double()) - math.log(shift)).aminmax()
    demand(low < -3.3 and high > 3.3, f"of {len(sigma)} times with shift {shift} none lies below {sigma.min():.3f}, or "
           f"none above {sigma.max():.3f}: the ends are cut off")  # of 50,000 by chance once in 10¹⁰


def bell(own, real):
    """a time σ is the sigmoid of a standard normal: half lie below ½, most near it"""
    sigma = times_of(own, 50_000)
    demand(abs(sigma.median().item() - 0.5) < 0.01, f"the median of σ is {sigma.median():.3f}, not 0.5")
    above = sigma.quantile(0.8413).item()
    demand(abs(above - 0.7311) < 0.01, f"84.13 % of σ lie below {above:.3f}, not below sigmoid(1) = 0.731")
    width = sigma.double().logit().std().item()
    demand(abs(width - 1) < 6 / (2 * len(sigma)) ** 0.5, f"log(σ / (1 − σ)) has a standard deviation of {width:.3f}")
    demand(distance(sigma) < MARGIN, "the times σ are not distributed as the sigmoid of a standard normal")
    has_its_ends(sigma)


def shifted(own, real):
    """a shift s moves it to s σ / (1 + (s − 1) σ): above 1 towards the noise"""
    for shift in (3.0, 0.5, 1.7):
        sigma, wanted = times_of(own, 50_000, shift=shift), shift / (1 + shift)
        demand(abs(sigma.median().item() - wanted) < 0.02,
               f"with shift {shift} the median of σ is {sigma.median():.3f}, not {wanted:.3f}")
        demand(distance(sigma, shift) < MARGIN, f"with shift {shift} the times σ are not distributed as they should be")
        has_its_ends(sigma, shift)


def any_place(own, real):
    """every place of a batch may get any time, whatever the size of the batch and the shift"""
    for shift in (1.0, 3.0):
        for b in (1, 3):
            batches = torch.stack([times_of(own, b, shift=shift) for _ in range(1000)])
            for place in range(b):
                demand(distance(batches[:, place], shift) < MARGIN,
                       f"place {place} in batches of {b} with shift {shift} does not get all times")
        sigma = times_of(own, 20_000, shift=shift).double()
        demand(len(sigma.unique()) > 19_000, f"of 20,000 times only {len(sigma.unique())} differ")
        for what, other in (("its place in the batch", torch.arange(20_000.)), ("its neighbour's", sigma.roll(1)),
                            ("that half a batch away", sigma.roll(10_000))):
            demand(abs(torch.corrcoef(torch.stack([sigma, other.double()]))[0, 1]) < 6 / 20_000**0.5,
                   f"with shift {shift} a time σ can be told from {what}")


def drawn(own, real):
    """the generator alone decides which times are drawn, and without one torch's own"""
    for shift in (1.0, 3.0):
        def draw(generator=None):
            return times_of(own, 7, torch.Generator().manual_seed(generator) if isinstance(generator, int) else
                            generator, shift)

        state, with_shift = torch.get_rng_state(), f"with shift {shift} "
        demand(draw(1).equal(draw(1)) and not draw(1).equal(draw(2)),
               with_shift + "not the generator decides which times are drawn")
        one = torch.Generator().manual_seed(1)
        demand(not draw(one).equal(draw(one)), with_shift + "a generator's next times are the same")
        demand(torch.get_rng_state().equal(state), with_shift + "torch's own generator was used, too, or set")
        demand(not draw().equal(draw()), with_shift + "and without a generator, all times drawn are the same")
        torch.set_rng_state(state)
        again = draw()
        torch.set_rng_state(state)
        demand(draw().equal(again), with_shift + "and without a generator, torch.manual_seed does not decide")


def light(own, real):
    """times are float32, as the latents of which they make x_t"""
    for shift in (1.0, 3.0):
        z, noise, _ = latents((3, 4, 5, 2), torch.float32)
        x_t = own.diffusion.add_noise(z, noise, times_of(own, 3, shift=shift))
        demand(x_t.dtype == z.dtype, f"z is {z.dtype}, and x_t, with the times drawn, {x_t.dtype}: the DiT refuses it")


CLAIMS = [ends, straight, squares, gradient, along, least, bell, shifted, any_place, drawn, light]


def fingerprint(version) -> dict:
    (z, noise, sigma), velocity = latents((4, 3, 2, 4)), torch.randn(4, 3, 2, 4, dtype=torch.float64)
    module = version.diffusion

    def loss():
        given = velocity.clone().requires_grad_()
        value = module.flow_matching_loss(given, z.clone(), noise.clone())
        return torch.cat([value.flatten(), *(g.flatten() for g in gradients(value.sum(), [given]))])

    return {"add_noise": lambda: module.add_noise(z.clone(), noise.clone(), sigma.clone()),
            "flow_matching_loss": loss,
            "logit_normal_times": lambda: module.logit_normal_times(50, torch.Generator().manual_seed(1), 3.0)}


# ---------------------------------------------------------------- the picture: noise to eight dots


class Guess(nn.Module):
    """(x `b 2`, σ `b`) -> velocity `b 2`."""

    def __init__(self, width: int = 128):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(10, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
                                    nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2))

    def forward(self, x, sigma):
        angles = sigma[:, None] * torch.tensor([1.0, 2.0, 4.0, 8.0])
        return self.layers(torch.cat([x, angles.cos(), angles.sin()], -1))


def walk(guess, noise, steps=50):
    """Euler's way from noise `b 2` to points: `steps + 1` places."""
    places = [noise]
    for i in range(steps):
        sigma = torch.full((len(noise),), 1 - i / steps)
        places.append(places[-1] - guess(places[-1], sigma) / steps)
    return torch.stack(places)


def picture(own, path):
    """Noise becomes eight dots: where 300 points arrive and how 20 of them go, after 0, 200 and 2000 steps."""
    torch.manual_seed(0)
    guess, noise, panels = Guess(), torch.randn(300, 2), []
    optimizer = torch.optim.Adam(guess.parameters(), 2e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2000)
    for step in range(2001):
        if step in (0, 200, 2000):
            with torch.no_grad():
                panels.append((step, walk(guess, noise)))
        angle = torch.randint(8, (256,)) * math.pi / 4
        z = 2 * torch.stack([angle.cos(), angle.sin()], -1)[..., None, None] + 0.05 * torch.randn(256, 2, 1, 1)
        epsilon, sigma = torch.randn_like(z), own.diffusion.logit_normal_times(256)
        x_t = own.diffusion.add_noise(z, epsilon, sigma)
        velocity = guess(x_t[..., 0, 0], sigma)[..., None, None]
        loss = own.diffusion.flow_matching_loss(velocity, z, epsilon)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
    side, margin = 300, 10
    image = Image.new("RGB", (len(panels) * (side + margin) + margin, side + 40), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(13)
    for column, (step, places) in enumerate(panels):
        left = margin + column * (side + margin)
        pen.text((left, 8), f"after {step} steps", (30, 30, 35), font)
        pen.rectangle([left, 30, left + side, 30 + side], outline=(200, 200, 205))
        on_sheet = (side / 2 + side / 7 * places.clamp(-3.4, 3.4) + torch.tensor([left, 30.0])).tolist()
        for i in range(20):
            pen.line([tuple(place[i]) for place in on_sheet], (150, 180, 210), 1)
        for place, colour in ((0, (190, 190, 195)), (-1, (214, 90, 20))):
            for x, y in on_sheet[place]:
                pen.ellipse([x - 1.5, y - 1.5, x + 1.5, y + 1.5], colour)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return path
