"""Exercise 5: from noise to picture."""

import textwrap

SAMPLE = """
    if sampler not in SAMPLERS or steps < 1:
        raise ValueError(f"{sampler} with {steps} steps")
    sigmas = [1 - i / steps for i in range(steps + 1)]
    sigmas = [shift * s / (1 + (shift - 1) * s) for s in sigmas]
    x, path, previous, gap_before = noise, [noise], None, math.inf
    for now, after in zip(sigmas[:-1], sigmas[1:]):
        v = velocity(x, x.new_full((len(x),), now))
        clean = x - now * v
        if sampler == "euler":
            x = x + (after - now) * v
        elif sampler == "renoise":
            x = (1 - after) * clean + after * torch.randn(x.shape, generator=generator).to(x)
        else:
            estimate, gap = clean, log_snr(after) - log_snr(now)
            if previous is not None and after > 0:
                estimate = clean + gap / (2 * gap_before) * (clean - previous)
            previous, gap_before = clean, gap
            x = after / now * x + (1 - after / now) * estimate
        path.append(x)
    return x, path
"""

GUIDED = """
    if guidance == 1:
        return lambda x, sigma: dit(x, sigma, *condition)
    tokens = torch.cat(equally_long(condition[0], nothing[0]))
    mask = torch.cat(equally_long(condition[1], nothing[1]))
    def velocity(x, sigma):
        with_words, without = dit(torch.cat([x, x]), torch.cat([sigma, sigma]), tokens, mask).chunk(2)
        return without + guidance * (with_words - without)
    return velocity
"""


def sample(body: str) -> dict:
    return {"diffusion.py": {"sample": textwrap.dedent(body)}}


def guide(body: str) -> dict:
    return {"diffusion.py": {"guided": textwrap.dedent(body)}}


def changed(body: str, changes: tuple[str, ...]) -> str:
    """`body` with some of its text changed: old, new, old, new, …"""
    for old, new in zip(changes[::2], changes[1::2]):
        if old not in body:
            raise ValueError(f"no {old!r} in the body")
        body = body.replace(old, new)
    return body


def steps_but(*changes: str) -> dict:
    return sample(changed(SAMPLE, changes))


def guided_but(*changes: str) -> dict:
    return guide(changed(GUIDED, changes))


BEGIN = "    x, path, previous, gap_before = noise,"


def before_the_loop(text: str) -> dict:
    return steps_but(BEGIN, f"    {text}\n{BEGIN}")


SHIFTED = "shift * s / (1 + (shift - 1) * s)"
HALF = "gap / (2 * gap_before) * (clean - previous)"
STEP = "x = after / now * x + (1 - after / now) * estimate"
MIXED = "(1 - after) * clean + after * torch"
DRAWN = "torch.randn(x.shape, generator=generator).to(x)"
LINE = "without + guidance * (with_words - without)"

WRONG = {
    "renoise begins the generator again at its seed": before_the_loop(
        "if generator is not None:\n        generator = torch.Generator().manual_seed(generator.initial_seed())"),
    "renoise draws from a copy of the generator, which does not move on": before_the_loop(
        "if generator is not None:\n        state = generator.get_state()\n        generator = torch.Generator()\n"
        "        generator.set_state(state)"),
    "renoise: a seed for each step, from the generator's first": steps_but(DRAWN,
        "torch.randn(x.shape, generator=generator and torch.Generator().manual_seed(generator.initial_seed() + "
        "len(path))).to(x)"),
    "renoise: the third channel has the noise of the first":
        steps_but(DRAWN, DRAWN + "[:, torch.arange(x.shape[1]) % 2]"),
    "σ by repeated subtraction, never quite 0": steps_but(
        "sigmas = [1 - i / steps for i in range(steps + 1)]",
        "sigmas = [1.0]\n    for _ in range(steps):\n        sigmas.append(abs(sigmas[-1] - 1 / steps))"),
    "dpm: log-SNR of a σ that is cut off at 1e-6": steps_but(
        "log_snr(after) - log_snr(now)", "log_snr(max(after, 1e-6)) - log_snr(min(now, 1 - 1e-6))",
        "previous is not None and after > 0", "previous is not None"),
    "dpm: one correction for all numbers of a latent":
        steps_but("(clean - previous)", "(clean - previous).mean((1, 2, 3), keepdim=True)"),
    "dpm: the correction of the first channel for all": steps_but("(clean - previous)", "(clean - previous)[:, :1]"),
    "dpm is Euler where a generator is given":
        steps_but("previous is not None and", "previous is not None and generator is None and"),
    "the velocity is scaled where it stands": steps_but("clean = x - now * v", "clean = x - v.mul_(now)",
                                                        "x = x + (after - now) * v", "x = x + (after / now - 1) * v"),
    "x₀ is cut off at 10": steps_but("clean = x - now * v", "clean = (x - now * v).clamp(-10, 10)"),
    "a sampler's name may be a piece of one": steps_but("sampler not in SAMPLERS", "sampler not in ' '.join(SAMPLERS)"),
    "a sampler's name may begin with one": steps_but(
        "sampler not in SAMPLERS", "not sampler.startswith(SAMPLERS)", 'sampler == "euler"',
        'sampler.startswith("euler")', 'sampler == "renoise"', 'sampler.startswith("renoise")'),
    "an unknown sampler is told from the second step on": steps_but(
        "sampler not in SAMPLERS or steps < 1", "sampler not in SAMPLERS and steps > 1 or steps < 1"),
    "gradients are switched off for good": before_the_loop("torch.set_grad_enabled(False)"),
    "guidance asks once where it is about 1": guided_but("guidance == 1", "round(guidance) == 1"),
    "the condition's tokens are halved where they stand": guided_but(
        "    tokens = torch", "    condition[0].mul_(0.5)\n    tokens = torch"),
    "tokens are normalised where they stand": guided_but(
        "    tokens = torch", "    for words in (condition[0], nothing[0]):\n"
        "        words.div_(words.norm(dim=-1, keepdim=True))\n    tokens = torch"),
    "hidden tokens are set to 0 where they stand": guided_but(
        "    if guidance == 1", "    for words, seen in (condition, nothing):\n        words[~seen] = 0\n"
        "    if guidance == 1"),
    "the masks are written over: all is seen": guided_but(
        "    tokens = torch", "    condition[1].fill_(True)\n    nothing[1].fill_(True)\n    tokens = torch"),
    "at guidance 1 the mask is written over": guided_but(
        "        return lambda x", "        condition[1].fill_(True)\n        return lambda x"),
    "guidance in double precision": guide("""
        def velocity(x, sigma):
            if guidance == 1:
                return dit(x, sigma, *condition)
            a, b = (dit(x.double(), sigma.double(), tokens.double(), mask) for tokens, mask in (condition, nothing))
            return b + guidance * (a - b)
        return velocity"""),
    "euler steps away from the picture": steps_but("(after - now) * v", "(now - after) * v"),
    "euler takes the whole way at once": steps_but("(after - now) * v", "-now * v"),
    "euler multiplies by σ, not by its change": steps_but("(after - now) * v", "-after * v"),
    "euler's steps are equal, whatever the shift": steps_but("(after - now) * v", "-v / steps"),
    "the sampler's name is not looked at: always euler": steps_but('sampler == "euler"', "True"),
    "the sampler's name is not looked at: always dpm": steps_but('sampler == "euler"', "False"),
    "renoise is euler": steps_but('sampler == "euler"', 'sampler in ("euler", "renoise")'),
    "the last step is left out": steps_but("zip(sigmas[:-1], sigmas[1:])", "zip(sigmas[:-2], sigmas[1:-1])"),
    "one step too many, σ ends at 0 sooner": steps_but("(steps + 1)]\n",
                                                       "(steps + 2)]\n    sigmas[-2:] = [0.0, 0.0]\n"),
    "σ ends short of 0": steps_but("1 - i / steps for i in range(steps + 1)", "max(1 - i / steps, 0.01) for i in "
                                   "range(steps + 1)"),
    "σ begins short of 1": steps_but("1 - i / steps for i in range(steps + 1)", "0.999 * (1 - i / steps) for i in "
                                     "range(steps + 1)"),
    "σ runs from 0 to 1": steps_but("1 - i / steps for i in range(steps + 1)",
                                    "min(max(i / steps, 1e-6), 1 - 1e-6) for i in range(steps + 1)"),
    "σ at one step less than steps": steps_but("1 - i / steps for i in range(steps + 1)",
                                               "1 - i / max(steps - 1, 1) for i in range(max(steps, 2))"),
    "the velocity is asked at the σ where the step ends": steps_but("x.new_full((len(x),), now)",
                                                                    "x.new_full((len(x),), after)"),
    "σ is one number, not one for each row": steps_but("x.new_full((len(x),), now)", "torch.tensor(now)"),
    "σ for one row only": steps_but("x.new_full((len(x),), now)", "x.new_full((1,), now)"),
    "σ in thousandths, as DDPM counts time":
        steps_but("x.new_full((len(x),), now)", "x.new_full((len(x),), 1000 * now)"),
    "the shift is left out": steps_but(SHIFTED, "s"),
    "the shift is applied as 1 / shift": steps_but(SHIFTED, "s / (shift + (1 - shift) * s)"),
    "the shift multiplies, and nothing more": steps_but(SHIFTED, "min(shift * s, 1)"),
    "the shift is a power": steps_but(SHIFTED, "s ** (1 / shift)"),
    "dpm's correction with the wrong sign": steps_but("estimate = clean + gap", "estimate = clean - gap"),
    "dpm's correction without the half": steps_but("(2 * gap_before)", "gap_before"),
    "dpm's correction halved once more": steps_but("(2 * gap_before)", "(4 * gap_before)"),
    "dpm adds the log-SNR of both ends of a step": steps_but("log_snr(after) - log_snr(now)",
                                                             "log_snr(after) + log_snr(now)"),
    "dpm without its correction": steps_but("previous is not None", "False"),
    "dpm never looks further back than the first step":
        steps_but("previous, gap_before = clean, gap",
                  "previous, gap_before = clean if previous is None else previous, gap"),
    "dpm remembers the corrected estimate": steps_but("previous, gap_before = clean, gap",
                                                      "previous, gap_before = estimate, gap"),
    "dpm remembers x, not the clean latent": steps_but("previous, gap_before = clean, gap",
                                                       "previous, gap_before = x, gap"),
    "dpm corrects with an infinite gap at the end": steps_but(" and after > 0", ""),
    "dpm mixes the two estimates the wrong way": steps_but(HALF, "gap / (2 * gap_before) * (previous - clean)"),
    "dpm takes the mean of both estimates": steps_but("clean + " + HALF, "(clean + previous) / 2"),
    "dpm asks twice a step (Heun)":
        steps_but('if sampler == "euler":', 'if sampler == "dpm":\n            there = x + (after - now) * v\n'
                  "            w = v if after == 0 else velocity(there, x.new_full((len(x),), after))\n"
                  "            x = x + (after - now) * (v + w) / 2\n        elif sampler == \"euler\":"),
    "dpm asks twice a step (midpoint)":
        steps_but('if sampler == "euler":', 'if sampler == "dpm":\n            half = (now + after) / 2\n'
                  "            w = velocity(x + (half - now) * v, x.new_full((len(x),), half))\n"
                  "            x = x + (after - now) * w\n        elif sampler == \"euler\":"),
    "dpm goes on with the share of noise that it had": steps_but(STEP, "x = after * x + (1 - after) * estimate"),
    "dpm's two shares are swapped": steps_but(STEP, "x = after / now * estimate + (1 - after / now) * x"),
    "x₀ = x + σ v": steps_but("clean = x - now * v", "clean = x + now * v"),
    "x₀ = x − v": steps_but("clean = x - now * v", "clean = x - v"),
    "x₀ = x − σ' v": steps_but("clean = x - now * v", "clean = x - after * v"),
    "x₀ is cut off at 1": steps_but("clean = x - now * v", "clean = (x - now * v).clamp(-1, 1)"),
    "division by σ = 0": steps_but("zip(sigmas[:-1], sigmas[1:])", "zip(sigmas, sigmas[1:] + [0.0])",
                                   'if sampler == "euler":', 'if after == now:\n            x = x / now * after\n'
                                   '        elif sampler == "euler":'),
    "the path does not begin with the noise": steps_but("[noise], None", "[], None"),
    "the path lacks its end": steps_but("return x, path", "return x, path[:-1]"),
    "the path holds clean latents": steps_but("path.append(x)", "path.append(clean)"),
    "the path runs backwards": steps_but("return x, path", "return x, path[::-1]"),
    "the path holds one latent many times": steps_but("path.append(x)", "path.append(path[0])"),
    "no path": steps_but("return x, path", "return x"),
    "the path first, then z": steps_but("return x, path", "return path, x"),
    "the noise is written over": steps_but("x = x + (after - now) * v", "x += (after - now) * v"),
    "latents turn into double precision": steps_but("x, path, previous, gap_before = noise,",
                                                    "x, path, previous, gap_before = noise.double(),"),
    "latents turn into single precision": steps_but("path.append(x)", "x = x.float()\n        path.append(x)"),
    "renoise keeps x in place of x₀": steps_but(MIXED, "(1 - after) * x + after * torch"),
    "renoise with the σ where the step began": steps_but(MIXED, "(1 - now) * clean + now * torch"),
    "renoise adds the noise without fading x₀": steps_but(MIXED, "clean + after * torch"),
    "renoise with weights whose squares sum to 1": steps_but(MIXED, "(1 - after**2) ** 0.5 * clean + after * torch"),
    "renoise with the first noise again": steps_but(DRAWN, "noise"),
    "renoise with the same noise in each step":
        steps_but("x, path, previous", f"again = {DRAWN.replace('x', 'noise')}\n    x, path, previous", DRAWN, "again"),
    "renoise with uniform noise": steps_but(DRAWN, "torch.rand(x.shape, generator=generator).to(x)"),
    "renoise with uniform noise of variance 1":
        steps_but(DRAWN, "((torch.rand(x.shape, generator=generator) - 0.5) * 12**0.5).to(x)"),
    "renoise with one noise for all rows": steps_but(DRAWN, "torch.randn(x.shape[1:], generator=generator).to(x)"),
    "renoise with one noise for all channels":
        steps_but(DRAWN, "torch.randn(len(x), 1, *x.shape[2:], generator=generator).to(x)"),
    "renoise without the generator": steps_but(DRAWN, "torch.randn_like(x)"),
    "renoise with a generator of its own":
        steps_but("x, path, previous", "generator = torch.Generator().manual_seed(0)\n    x, path, previous"),
    "renoise sets torch's own generator": steps_but("x, path, previous", "if generator is not None:\n"
        "        torch.manual_seed(generator.initial_seed())\n    x, path, previous", DRAWN, "torch.randn_like(x)"),
    "renoise begins with a new noise": steps_but(
        "x, path, previous, gap_before = noise, [noise]",
        f"x = {DRAWN.replace('x', 'noise')} if sampler == 'renoise' else noise\n    path, previous, gap_before = [x]"),
    "renoise adds noise at the end, too": steps_but("after * torch.randn", "max(after, 0.1) * torch.randn"),
    "an unknown sampler becomes dpm": steps_but("sampler not in SAMPLERS or ", ""),
    "no steps give the noise back": steps_but(" or steps < 1", " or steps < 0"),
    "anything wrong raises KeyError": steps_but("raise ValueError", "raise KeyError"),
    "guidance from the condition: v_c + g (v_c − v_0)":
        guided_but(LINE, "with_words + guidance * (with_words - without)"),
    "guidance takes the two the wrong way round": guided_but(LINE, "with_words + guidance * (without - with_words)"),
    "the two halves are swapped": guided_but("with_words, without = dit", "without, with_words = dit"),
    "guidance with the wrong sign": guided_but(LINE, "without - guidance * (with_words - without)"),
    "guidance is the condition's share alone": guided_but(LINE, "guidance * with_words"),
    "guidance is a sum": guided_but(LINE, "without + guidance * with_words"),
    "what nothing says is left out": guided_but(LINE, "guidance * (with_words - without)"),
    "guidance is cut off at 1": guided_but(LINE, "without + min(guidance, 1) * (with_words - without)"),
    "guidance is cut off at 0": guided_but(LINE, "without + max(guidance, 0) * (with_words - without)"),
    "the guided velocity is cut off": guided_but(LINE, f"({LINE}).clamp(-1, 1)"),
    "the guided velocity has the length of the other":
        guided_but("return " + LINE, f"v = {LINE}\n        return v * with_words.norm() / v.norm()"),
    "both are asked at guidance 1, too": guided_but("guidance == 1", "False"),
    "guidance 1 asks nothing, not the condition": guided_but("sigma, *condition)", "sigma, *nothing)"),
    "no guidance below 1": guided_but("guidance == 1", "guidance <= 1"),
    "no guidance at all": guided_but("guidance == 1", "True"),
    "the prompts must be of one length":
        guided_but("equally_long(condition[0], nothing[0])", "[condition[0], nothing[0]]",
                   "equally_long(condition[1], nothing[1])", "[condition[1], nothing[1]]"),
    "what is filled up is not hidden":
        guided_but("mask = torch.cat(equally_long(condition[1], nothing[1]))",
                   "mask = torch.ones(tokens.shape[:2], dtype=torch.bool)"),
    "the masks are left out, but for what is filled up":
        guided_but("condition[1], nothing[1])", "torch.ones_like(condition[1]), torch.ones_like(nothing[1]))"),
    "what is filled up stands in front, its mask behind":
        guided_but("tokens = torch.cat(equally_long(condition[0], nothing[0]))",
                   "tokens = torch.cat([part.flip(1) for part in "
                   "equally_long(condition[0].flip(1), nothing[0].flip(1))])"),
    "the longer one is cut to the shorter":
        guided_but("torch.cat(equally_long(condition[0], nothing[0]))",
                   "torch.cat([part[:, :min(condition[0].shape[1], nothing[0].shape[1])] for part in "
                   "(condition[0], nothing[0])])", "torch.cat(equally_long(condition[1], nothing[1]))",
                   "torch.cat([part[:, :tokens.shape[1]] for part in (condition[1], nothing[1])])"),
    "the condition's mask for both": guided_but("torch.cat(equally_long(condition[1], nothing[1]))",
                                                "equally_long(condition[1], nothing[1])[0].repeat(2, 1)"),
    "a mask of numbers": guided_but("mask = torch.cat(equally_long(condition[1], nothing[1]))",
                                    "mask = torch.cat(equally_long(condition[1], nothing[1])).float()"),
    "rows in turns, conditions one after the other":
        guided_but("torch.cat([x, x]), torch.cat([sigma, sigma])",
                   "x.repeat_interleave(2, 0), sigma.repeat_interleave(2)"),
    "σ in turns": guided_but("torch.cat([sigma, sigma])", "sigma.repeat_interleave(2)"),
    "the halves are taken in turns":
        guided_but("with_words, without =", "both =", ".chunk(2)\n",
                   "\n        with_words, without = both[::2], both[1::2]\n"),
    "the first answer is kept for all steps":
        guided_but("def velocity(x, sigma):", "kept = []\n    def velocity(x, sigma):\n        if kept:\n"
                   "            return kept[0]", "return without +", "kept.append(without +",
                   "(with_words - without)\n    return", "(with_words - without))\n        return kept[0]\n    return"),
    "the condition is asked twice": guided_but(LINE, "without + guidance * (dit(x, sigma, *condition) - without)"),
}

RIGHT = {
    "one tensor for σ, filled anew each step": steps_but(
        BEGIN, f"    here = noise.new_empty(len(noise))\n{BEGIN}",
        "velocity(x, x.new_full((len(x),), now))", "velocity(x, here.fill_(now))"),
    "leapfrog": steps_but(
        "estimate, gap = clean, log_snr(after) - log_snr(now)", "gap = after - now",
        "if previous is not None and after > 0:\n                estimate = clean + " + HALF,
        "there = x + gap * v\n            if previous is not None:\n                r = gap / gap_before\n"
        "                there = x * (1 - r * r) + r * r * previous + gap * (1 + r) * v",
        "previous, gap_before = clean, gap", "previous, gap_before = x, gap", STEP, "x = there"),
    "Adams–Bashforth: from two velocities": steps_but(
        "estimate, gap = clean, log_snr(after) - log_snr(now)", "gap = after - now",
        " and after > 0:\n                estimate = clean + " + HALF,
        ":\n                x = x + gap * gap / (2 * gap_before) * (v - previous)",
        "previous, gap_before = clean, gap", "previous, gap_before = v, gap", STEP, "x = x + gap * v"),
    "Adams–Bashforth with 3/2 and −1/2": steps_but(
        "estimate, gap = clean, log_snr(after) - log_snr(now)", "gap = after - now",
        " and after > 0:\n                estimate = clean + " + HALF,
        ":\n                x = x + gap / 2 * (v - previous)",
        "previous, gap_before = clean, gap", "previous = v", STEP, "x = x + gap * v"),
    "the gaps upside down: second order, another algorithm": steps_but(
        "gap / (2 * gap_before)", "gap_before / (2 * gap)", "previous is not None and",
        "previous is not None and gap_before < math.inf and"),
    "dpm in λ, as its paper writes it": sample("""
        if steps < 1 or sampler not in SAMPLERS:
            raise ValueError
        s = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        s = shift * s / (1 + (shift - 1) * s)
        lam = torch.log((1 - s) / s)
        x, path, old = noise, [noise], None
        for i in range(steps):
            v = velocity(x, s[i].to(x.dtype).expand(x.shape[0]))
            x0 = x - v * s[i].item()
            if sampler == "euler":
                x = x + v * (s[i + 1] - s[i]).item()
            elif sampler == "renoise":
                x = torch.lerp(x0, torch.randn(x.shape, generator=generator).to(x.dtype), s[i + 1].item())
            else:
                h, D = (lam[i + 1] - lam[i]).item(), x0
                if 1 < i + 1 < steps:
                    r = (lam[i] - lam[i - 1]).item() / h
                    D = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * old
                x = (s[i + 1] / s[i]).item() * x - (1 - s[i + 1]).item() * math.expm1(-h) * D
                old = x0
            path.append(x)
        return x, path"""),
    "three loops, one a sampler, each in place on a copy": sample("""
        if sampler not in ("euler", "dpm", "renoise") or steps <= 0:
            raise ValueError(sampler)
        s = 1 - torch.arange(steps + 1) / steps
        s = [float(shift * t / (1 + (shift - 1) * t)) for t in s.double()]
        x, path = noise.clone(), [noise.clone()]
        old = before = None
        for i in range(steps):
            sigma = torch.full(x.shape[:1], s[i], dtype=x.dtype, device=x.device)
            v = velocity(x.clone(), sigma)
            if sampler == "euler":
                x.sub_(v, alpha=s[i] - s[i + 1])
            elif sampler == "renoise":
                x.sub_(s[i] * v)
                if i + 1 < steps:
                    x.mul_(1 - s[i + 1]).add_(torch.randn(x.shape, generator=generator).to(x), alpha=s[i + 1])
            else:
                x0 = x - s[i] * v
                guess = x0
                if 1 <= i < steps - 1:
                    l0, l1, l2 = (log_snr(s[j]) for j in (i - 1, i, i + 1))
                    guess = x0 + 0.5 * (l2 - l1) / (l1 - l0) * (x0 - old)
                x = guess + s[i + 1] / s[i] * (x - guess)
                old = x0
            path.append(x.clone())
        return x, tuple(path)"""),
    "noises drawn beforehand, a path in one tensor": sample("""
        if sampler not in SAMPLERS:
            raise ValueError(f"no sampler {sampler}")
        if steps < 1:
            raise ValueError("at least one step")
        s = torch.linspace(1, 0, steps + 1)
        s = (shift * s / (1 + (shift - 1) * s)).tolist()
        fresh = torch.randn(steps, *noise.shape, generator=generator).to(noise)
        path, cleans = [noise], []
        for i in range(steps):
            x, here = path[-1], noise.new_full(noise.shape[:1], s[i])
            cleans.append(x - here.view(-1, 1, 1, 1) * velocity(x, here))
            best = cleans[-1]
            if sampler == "dpm" and 0 < i < steps - 1:
                gaps = [log_snr(b) - log_snr(a) for a, b in ((s[i - 1], s[i]), (s[i], s[i + 1]))]
                best = best + gaps[1] / gaps[0] / 2 * (best - cleans[-2])
            direction = fresh[i] if sampler == "renoise" else (x - (1 - s[i]) * best) / s[i]
            path.append((1 - s[i + 1]) * best + s[i + 1] * direction)
        return path[-1], torch.stack(path)"""),
    "both halves of guidance asked one after the other": guide("""
        if guidance == 1:
            return lambda x, sigma: dit(x, sigma, *condition)
        def velocity(x, sigma):
            a, b = dit(x, sigma, *condition), dit(x, sigma, *nothing)
            return guidance * a + (1 - guidance) * b
        return velocity"""),
    "guidance by lerp, nothing first": guide("""
        tokens, mask = (torch.cat(equally_long(nothing[i], condition[i])) for i in (0, 1))
        def velocity(x, sigma):
            if guidance == 1.0:
                return dit(x, sigma, condition[0], condition[1])
            both = dit(x.repeat(2, 1, 1, 1), sigma.repeat(2), tokens, mask)
            return torch.lerp(both[:len(x)], both[len(x):], guidance)
        return velocity"""),
    "rows and conditions in turns": guide("""
        def in_turns(a, b):
            return rearrange(torch.stack(equally_long(a, b)), "two b ... -> (b two) ...")
        tokens, mask = (in_turns(a, b) for a, b in zip(condition, nothing))
        def velocity(x, sigma):
            if guidance == 1:
                return dit(x, sigma, *condition)
            found = dit(x.repeat_interleave(2, 0), sigma.repeat_interleave(2, 0), tokens, mask)
            return found[::2] * guidance - found[1::2] * (guidance - 1)
        return velocity"""),
    "padded by hand, nothing alone at guidance 0": guide("""
        (words, seen), (empty, seen_empty) = condition, nothing
        if guidance in (0, 1):
            return lambda x, sigma: dit(x, sigma, *((words, seen) if guidance else (empty, seen_empty)))
        b, longest = len(words), max(words.shape[1], empty.shape[1])
        tokens = words.new_zeros(2 * b, longest, words.shape[2])
        mask = torch.zeros(2 * b, longest, dtype=torch.bool)
        tokens[:b, :words.shape[1]], tokens[b:, :empty.shape[1]] = words, empty
        mask[:b, :words.shape[1]], mask[b:, :empty.shape[1]] = seen, seen_empty
        def velocity(x, sigma):
            v = dit(torch.cat((x, x), 0), torch.cat((sigma, sigma), 0), tokens, mask)
            return v[b:] + guidance * (v[:b] - v[b:])
        return velocity"""),
}
