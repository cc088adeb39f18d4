"""Exercise 4: the straight path."""


def noisy(body: str) -> dict:
    return {"diffusion.py": {"add_noise": body}}


def loss(body: str) -> dict:
    return {"diffusion.py": {"flow_matching_loss": body}}


def times(body: str) -> dict:
    return {"diffusion.py": {"logit_normal_times": body}}


NORMAL = "x = torch.randn(b, generator=generator)\n"

WRONG = {
    "with a shift the generator is not used": times(
        "if shift == 1:\n    return torch.randn(b, generator=generator).sigmoid()\n"
        "return (torch.randn(b) + math.log(shift)).sigmoid()"),
    "with a shift the order does not come from the generator": times(
        NORMAL + "if shift != 1:\n    x = x[torch.randperm(b)]\nreturn (x + math.log(shift)).sigmoid()"),
    "with a shift the times are float64": times(
        NORMAL + "s = x.sigmoid()\nif shift != 1:\n    s = s.double()\n"
        "    s = shift * s / (1 + (shift - 1) * s)\nreturn s"),
    "with a shift the times of a batch are sorted": times(
        NORMAL + "s = x.sigmoid()\nif shift != 1:\n    s = s.sort().values\nreturn shift * s / (1 + (shift - 1) * s)"),
    "the ends are cut off at 0.02 and 0.98": times(NORMAL + "return (x + math.log(shift)).sigmoid().clamp(0.02, 0.98)"),
    "squares cut off at 1000": loss("return (velocity - (noise - z)).square().clamp(max=1000).mean()"),
    "a loss of what lies in one piece alone": loss("return (velocity.view(-1) - (noise - z).view(-1)).square().mean()"),
    "noise added to what lies in one piece alone": noisy(
        "b = len(z)\nreturn ((1 - sigma)[:, None] * z.view(b, -1) + sigma[:, None] * noise.view(b, -1)).view(z.shape)"),
    "every time is drawn for two places": {"diffusion.py": {"logit_normal_times":
        "x = torch.randn(-(-b // 2), generator=generator).repeat(2)[:b]\nreturn (x + math.log(shift)).sigmoid()"}},
    "times rounded to hundredths": {"diffusion.py": {"logit_normal_times":
        "x = torch.randn(b, generator=generator) + math.log(shift)\nreturn (x.sigmoid() * 100).round() / 100"}},
    "σ and 1 − σ are swapped": noisy("s = sigma.view(-1, 1, 1, 1)\nreturn s * z + (1 - s) * noise"),
    "σ runs over the last axis, not over the batch": noisy("return (1 - sigma) * z + sigma * noise"),
    "σ runs over the channels": noisy("s = sigma.view(1, -1, 1, 1)\nreturn (1 - s) * z + s * noise"),
    "σ runs over the last axis where that is as long as the batch":
        noisy("s = sigma if len(sigma) == z.shape[-1] else sigma.view(-1, 1, 1, 1)\nreturn (1 - s) * z + s * noise"),
    "roots as weights, as DDPM has them":
        noisy("s = sigma.view(-1, 1, 1, 1)\nreturn (1 - s).sqrt() * z + s.sqrt() * noise"),
    "weights whose squares sum to 1": noisy("s = sigma.view(-1, 1, 1, 1)\nreturn (1 - s**2).sqrt() * z + s * noise"),
    "noise is added, and the picture does not fade": noisy("return z + sigma.view(-1, 1, 1, 1) * noise"),
    "the noise is taken away": noisy("s = sigma.view(-1, 1, 1, 1)\nreturn (1 - s) * z - s * noise"),
    "one σ for the whole batch": noisy("return (1 - sigma[0]) * z + sigma[0] * noise"),
    "the mean σ for the whole batch": noisy("return torch.lerp(z, noise, sigma.mean())"),
    "new noise is drawn": noisy("s = sigma.view(-1, 1, 1, 1)\nreturn (1 - s) * z + s * torch.randn_like(z)"),
    "z is written over": noisy("s = sigma.view(-1, 1, 1, 1)\nreturn z.mul_(1 - s).add_(s * noise)"),
    "the noise is written over": noisy("s = sigma.view(-1, 1, 1, 1)\nreturn noise.mul_(s).add_((1 - s) * z)"),
    "x_t in double precision": noisy("s = sigma.double().view(-1, 1, 1, 1)\nreturn (1 - s) * z + s * noise"),
    "x_t in single precision, whatever z is":
        noisy("s = sigma.view(-1, 1, 1, 1)\nreturn ((1 - s) * z + s * noise).float()"),
    "v = z − ε: the sign": loss("return (velocity - (z - noise)).square().mean()"),
    "v = z + ε": loss("return (velocity - (noise + z)).square().mean()"),
    "the noise is what is wanted, as DDPM has it": loss("return (velocity - noise).square().mean()"),
    "the clean latent is what is wanted": loss("return (velocity - z).square().mean()"),
    "the sum in place of the mean": loss("return (velocity - (noise - z)).square().sum()"),
    "a sum over each picture, a mean over the batch":
        loss("return (velocity - (noise - z)).square().flatten(1).sum(1).mean()"),
    "a loss for each picture": loss("return (velocity - (noise - z)).square().mean((1, 2, 3))"),
    "absolute differences": loss("return (velocity - (noise - z)).abs().mean()"),
    "Huber's loss": loss("return F.smooth_l1_loss(velocity, noise - z)"),
    "half of the squares": loss("return 0.5 * F.mse_loss(velocity, noise - z)"),
    "the root of the mean": loss("return (velocity - (noise - z)).square().mean().sqrt()"),
    "the square of the mean": loss("return (velocity - (noise - z)).mean().square()"),
    "the median of the squares": loss("return (velocity - (noise - z)).square().median()"),
    "no gradient for the velocity": loss("return (velocity.detach() - (noise - z)).square().mean()"),
    "a number in place of a tensor": loss("return (velocity - (noise - z)).square().mean().item()"),
    "the loss writes over the noise": loss("return (velocity - noise.sub_(z)).square().mean()"),
    "uniform times": times("return torch.rand(b, generator=generator)"),
    "quantiles whose ends are cut off": times("u = (torch.randperm(b, generator=generator) + torch.rand("
                                              "b, generator=generator)) / b\n"
                                              "x = torch.special.ndtri(u.clamp(0.01, 0.99)) + math.log(shift)\n"
                                              "return torch.sigmoid(x)"),
    "uniform times, shifted":
        times("s = torch.rand(b, generator=generator)\nreturn shift * s / (1 + (shift - 1) * s)"),
    "times without a sigmoid": times(NORMAL + "return x + math.log(shift)"),
    "normal times, cut off at 0 and 1": times(NORMAL + "return (0.5 + x / 4 + math.log(shift) / 4).clamp(0, 1)"),
    "the normal's distribution function in place of the sigmoid":
        times(NORMAL + "return torch.special.ndtr(x + math.log(shift))"),
    "the shift is applied as 1 / shift": times(NORMAL + "return (x - math.log(shift)).sigmoid()"),
    "the shift is added, without its logarithm": times(NORMAL + "return (x + shift).sigmoid()"),
    "the shift less 1 is added": times(NORMAL + "return (x + shift - 1).sigmoid()"),
    "the shift multiplies the normal": times(NORMAL + "return (x * shift).sigmoid()"),
    "the shift multiplies the time": times(NORMAL + "return (x.sigmoid() * shift).clamp(max=1)"),
    "the shift is left out": times(NORMAL + "return x.sigmoid()"),
    "the shift is applied twice": times(NORMAL + "return (x + 2 * math.log(shift)).sigmoid()"),
    "the normal is twice as wide": times(NORMAL + "return (2 * x + math.log(shift)).sigmoid()"),
    "the normal is 20 % too narrow": times(NORMAL + "return (0.8 * x + math.log(shift)).sigmoid()"),
    "a tanh, moved into (0, 1)": times(NORMAL + "return (x + math.log(shift)).tanh() / 2 + 0.5"),
    "a logistic in place of a normal":
        times("x = torch.rand(b, generator=generator).clamp(1e-6, 1 - 1e-6).logit()\n"
              "return (x + math.log(shift)).sigmoid()"),
    "one time for the whole batch":
        times("x = torch.randn(1, generator=generator).expand(b)\nreturn (x + math.log(shift)).sigmoid()"),
    "sorted times": times(NORMAL + "return (x.sort().values + math.log(shift)).sigmoid()"),
    "slices without a random order":
        times("share = (torch.arange(b) + torch.rand(b, generator=generator)) / b\n"
              "return (torch.special.ndtri(share.clamp(1e-6, 1 - 1e-6)) + math.log(shift)).sigmoid()"),
    "slices in one half only":
        times("share = (torch.randperm(b, generator=generator) + torch.rand(b, generator=generator)) / (2 * b)\n"
              "return (torch.special.ndtri(share.clamp(1e-6, 1 - 1e-6)) + math.log(shift)).sigmoid()"),
    "the middle of each slice, always":
        times("share = (torch.randperm(b, generator=generator) + 0.5) / b\n"
              "return (torch.special.ndtri(share) + math.log(shift)).sigmoid()"),
    "the generator is not used": times("return (torch.randn(b) + math.log(shift)).sigmoid()"),
    "the order does not come from the generator":
        times("share = (torch.randperm(b) + torch.rand(b, generator=generator)) / b\n"
              "return (torch.special.ndtri(share.clamp(1e-6, 1 - 1e-6)) + math.log(shift)).sigmoid()"),
    "without a generator, always the same times":
        times("generator = generator or torch.Generator()\n" + NORMAL + "return (x + math.log(shift)).sigmoid()"),
    "torch's own generator is set": times("if generator is not None:\n    torch.manual_seed(generator.initial_seed())\n"
                                          "return (torch.randn(b) + math.log(shift)).sigmoid()"),
    "a column of times": times("return (torch.randn(b, 1, generator=generator) + math.log(shift)).sigmoid()"),
    "times in double precision":
        times("x = torch.randn(b, generator=generator, dtype=torch.float64)\nreturn (x + math.log(shift)).sigmoid()"),
    "time runs the other way: 0 is noise": {"diffusion.py": {
        "add_noise": "t = sigma.view(-1, 1, 1, 1)\nreturn t * z + (1 - t) * noise",
        "flow_matching_loss": "return (velocity - (z - noise)).square().mean()"}},
}

RIGHT = {
    "a diagonal matrix": noisy("return torch.tensordot(torch.diag(1 - sigma), z, 1) + "
                               "torch.tensordot(torch.diag(sigma), noise, 1)"),
    "a sum over the rows, one after the other": loss(
        "return sum((v - (n - a)).pow(2).sum() for v, a, n in zip(velocity, z, noise)) / velocity.numel()"),
    "lerp": noisy("return torch.lerp(z, noise, sigma.view(-1, 1, 1, 1))"),
    "from z a part of the way": noisy("return z + sigma[:, None, None, None] * (noise - z)"),
    "einsum": noisy("return torch.einsum('b,bphw->bphw', 1 - sigma, z) + torch.einsum('b,bphw->bphw', sigma, noise)"),
    "a loop over the batch": noisy("return torch.stack([(1 - s) * a + s * n for a, n, s in zip(z, noise, sigma)])"),
    "repeat to the full shape": noisy("s = repeat(sigma, 'b -> b p h w', p=z.shape[1], h=z.shape[2], w=z.shape[3])\n"
                                      "return noise * s + z - z * s"),
    "flat, in place on a copy": noisy("x = z.clone().flatten(1)\nx.mul_(1 - sigma[:, None])\n"
                                      "x += sigma[:, None] * noise.flatten(1)\nreturn x.view_as(z)"),
    "axes turned": noisy("return (z.transpose(0, -1) * (1 - sigma) + noise.transpose(0, -1) * sigma).transpose(0, -1)"),
    "mse_loss": loss("return F.mse_loss(velocity, noise - z)"),
    "the other way round": loss("v = noise - z\nreturn torch.mean((v - velocity.float()) ** 2)"),
    "a sum, divided by the count": loss("d = velocity + z - noise\nreturn (d * d).sum() / d.numel()"),
    "a mean of the pictures' means":
        loss("d = (velocity - (noise - z).detach()).pow(2)\nreturn d.mean((1, 2, 3)).mean()"),
    "a norm": loss("return torch.linalg.vector_norm(velocity.double() - (noise - z).double()) ** 2 / z.numel()"),
    "independent times": times(NORMAL + "return (x + math.log(shift)).sigmoid()"),
    "independent times, moved afterwards":
        times("s = torch.sigmoid(torch.normal(0.0, 1.0, (b,), generator=generator))\n"
              "return shift * s / (1 + (shift - 1) * s)"),
    "one after the other":
        times("x = [torch.randn(1, generator=generator) for _ in range(b)]\n"
              "return torch.sigmoid(torch.cat(x) + math.log(shift))"),
    "the distribution function turned round": times("u = torch.rand(b, generator=generator, dtype=torch.float64)\n"
        "x = math.sqrt(2) * torch.erfinv((2 * u - 1).clamp(-1 + 1e-9, 1 - 1e-9))\n"
        "return (shift / (shift + torch.exp(-x))).float()"),
    "one offset for all slices, in random order": times(
        "u = (torch.arange(b) + torch.rand(1, generator=generator)) / b\n"
        "x = torch.special.ndtri(u.clamp(1e-6, 1 - 1e-6))[torch.randperm(b, generator=generator)]\n"
        "return (x + math.log(shift)).sigmoid()"),
    "exponentials": times(NORMAL + "e = shift * x.exp()\nreturn e / (1 + e)"),
}
