"""One page to explore a run: its losses, its four uses, what each stream and each layer carries, the path from noise to
picture. A single file for any browser, which fetches nothing.

    python sample.py page --run runs/toy --out page.html

Here the model computes what the page shows; page.html beside this file is the page without its data. A section is there
as far as the run's finished stages allow.
"""

import html
import io
import json
import math
from base64 import b64encode
from contextlib import ExitStack, contextmanager
from pathlib import Path
from string import Template

import torch
from einops import rearrange, repeat
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from parts.metrics import psnr
from parts.positions import rotate
from plumbing.command import UserError, write_text
from plumbing.pictures import to_image
from plumbing.run_folder import config_diff, load_run, read_lines
from spar import NAMES, SPAR, Config
from world.drawing import draw
from world.edits import EDIT_KINDS
from world.judge import detect, fulfils, succeeds
from world.language import MEASURED, QUESTION_KINDS, DrawnWorld

ROOT = Path(__file__).resolve().parent.parent
COUNT = 12  # samples of each use
PATHS, DRAWN = 8, 32  # paths that are shown, and those that the curves are of
READ, LARGEST = 6, 1 << 20  # requests, and edits, whose routing is shown; bytes of attention: what is more is left out
POINTS = 300  # of a curve


class Page(Template):
    delimiter = "§"  # $ is JavaScript's


# ---------------------------------------------------------------- pictures and readings


def strip(*sets: Tensor) -> dict:
    """Pictures `b 3 H W`, of several sets in turn, side by side as one that stands in the page itself: exact up to 32
    pixels, else smaller."""
    pictures, file = torch.stack([one.cpu() for one in sets], 1).flatten(0, 1), io.BytesIO()
    image, side, form = to_image(torch.cat(list(pictures), 2)), pictures.shape[-1], "png"
    if side > 32:
        image, form = image.resize((len(pictures) * min(side, 64), min(side, 64)), Image.Resampling.BOX), "webp"
    image.save(file, form, quality=80)
    return {"src": f"data:image/{form};base64,{b64encode(file.getvalue()).decode()}", "n": len(pictures)}


def facts(objects) -> list[tuple]:
    return sorted(thing.facts for thing in objects)


def reads(picture: Tensor, scene) -> bool:
    """Whether the judge reads in a picture `3 H W` the objects of its scene, and no others."""
    return facts(detect(picture[None], scene.style)[0]) == facts(scene.objects)


def short(value: float) -> float:
    return float(f"{value:.4g}")


def share(verdicts) -> float:
    return short(sum(verdicts) / len(verdicts))


@contextmanager
def calls_of(module: nn.Module):
    """-> a list that fills with (inputs, output) of every call of `module`."""
    calls = []
    handle = module.register_forward_hook(lambda _, inputs, output: calls.append((inputs, output)))
    try:
        yield calls
    finally:
        handle.remove()


# ---------------------------------------------------------------- losses


def points(lines: list[dict], term: str) -> list:
    pairs = [(line["step"], line.get("held_out", line).get(term)) for line in lines]
    return [[step, short(value)] for step, value in pairs if value and math.isfinite(value)]  # 0 has no logarithm


def losses(run: Path, config: Config) -> list[dict]:
    """Each stage's terms over its steps, since its last beginning; "held": of held-out samples."""
    lines, stages = read_lines(run / "log.jsonl"), []
    for name in NAMES:
        own, looks = ([line for line in lines if line["stage"] == name and kind in line]
                      for kind in ("loss", "held_out"))
        own = own[max([i for i, line in enumerate(own) if line["step"] == 0], default=0):]
        own = own[:-1:math.ceil(len(own) / POINTS) or 1] + own[-1:]
        symbols = dict.fromkeys(key for line in own for key in line if key.startswith("L_") and points(own, key))
        if symbols:
            steps = {"steps": own[-1]["step"] + 1, "of": config.of_stage("steps", name)}
            stages.append({"stage": name} | steps | {"seconds": own[-1].get("seconds"), "terms": [
                {"name": term, "points": points(own, term), "held": points(looks, term)} for term in symbols]})
    return stages


# ---------------------------------------------------------------- the four uses


def reconstructed(model: SPAR, world: DrawnWorld) -> dict:
    scenes = [world.styled_scene(i) for i in range(COUNT)]
    images = draw(scenes, world.side)
    results = model.reconstruct(images.to(model.device)).cpu()
    return {"strip": strip(images, results), "cards": [
        {"text": f"PSNR {decibels:.1f} dB", "right": reads(result, scene)}
        for decibels, result, scene in zip(psnr(images, results).tolist(), results, scenes)]}


def asked(model: SPAR, world: DrawnWorld) -> dict:
    samples = [world.questions([i], QUESTION_KINDS[i % len(QUESTION_KINDS)]) for i in range(COUNT)]
    scenes, questions, answers = ([sample[part][0] for sample in samples] for part in range(3))
    images = draw(scenes, world.side)
    return {"strip": strip(images), "cards": [
        {"text": f"{question}?", "said": reply, "wanted": answer, "right": reply == answer} for question, reply, answer
        in zip(questions, model.answer(images.to(model.device), questions), answers)]}


def requests_for(model: SPAR, world: DrawnWorld, count: int) -> tuple[list, list[str]]:
    """Requests whose combinations no training text has, and each as the LLM writes it out."""
    kinds = MEASURED["untaught"]
    requests = [world.measured_prompts([i // len(kinds)], kinds[i % len(kinds)])[0] for i in range(count)]
    return requests, model.rewrite([request.text for request in requests])


def edits_for(model: SPAR, world: DrawnWorld, count: int) -> tuple[list, Tensor, list[str]]:
    """Edits of all kinds, the pictures before them, and each as the LLM writes it out."""
    edits = [world.edits([i // len(EDIT_KINDS)], EDIT_KINDS[i % len(EDIT_KINDS)])[0] for i in range(count)]
    images = draw([edit.source for edit in edits], world.side).to(model.device)
    return edits, images, model.rewrite([edit.instruction for edit in edits], images)


def drawn(model: SPAR, world: DrawnWorld) -> dict:
    requests, written = requests_for(model, world, COUNT)
    results = model.generate(written, text_only="U1" not in model.finished_stages)[0].cpu()
    return {"strip": strip(results), "cards": [
        {"text": request.text, "written": text, "right": fulfils(objects, request)}
        for request, text, objects in zip(requests, written, detect(results))]}


def edited(model: SPAR, world: DrawnWorld) -> dict:
    edits, images, written = edits_for(model, world, COUNT)
    results = model.generate(written, images)[0].cpu()
    return {"strip": strip(images, results), "cards": [
        {"text": edit.instruction, "written": text.removeprefix(edit.instruction).strip(),
         "right": succeeds(edit, result[None])[0]}
        for edit, text, result in zip(edits, written, results)]}


# ---------------------------------------------------------------- inside: streams, path, layers


@torch.no_grad()
def streams(model: SPAR, world: DrawnWorld) -> dict | None:
    """Pictures decoded from a·z_s and c·z_p, with (a, c) from (1, 0) over (1, 1) to (0, 1)."""
    scenes = [world.styled_scene(i) for i in range(COUNT)]
    images = draw(scenes, world.side)
    z_s, z_p, _ = model.tokenizer.latents(model.tokenizer.features(images.to(model.device)))
    if z_s is None or z_p is None:
        return None
    shares = [(1.0, i / 5) for i in range(5)] + [(1 - i / 5, 1.0) for i in range(6)]
    frames = torch.stack([model.tokenizer.decode(model.tokenizer.fuse(a * z_s, c * z_p), world.side).clamp(-1, 1).cpu()
                          for a, c in shares])
    right = [[reads(picture, scene) for picture, scene in zip(pictures, scenes)] for pictures in frames]
    return {"shares": [[round(a, 1), round(c, 1)] for a, c in shares], "source": strip(images),
            "strips": [strip(frames[:, i]) for i in range(COUNT)], "right": right, "read": [*map(share, right)],
            "psnr": [short(psnr(pictures, images).clamp(max=99).mean().item()) for pictures in frames]}


@torch.no_grad()
def path(model: SPAR, world: DrawnWorld) -> dict:
    """With guidance and without: of every step the latent x_t, and the clean latent x_t − σ v that the DiT expects
    there, both decoded; and what the judge reads in the latter."""
    requests, written = requests_for(model, world, DRAWN)
    arms = []
    for guidance in dict.fromkeys([model.config.guidance, 1.0]):
        with calls_of(model.dit) as calls:
            states = model.generate(written, guidance=guidance, text_only="U1" not in model.finished_stages)[1]
        sigmas, clean = [], []
        for (x, sigma, *_), (velocity, _) in calls:
            if guidance != 1:  # `guided` asks for both at once
                with_words, without = velocity.chunk(2)
                velocity = without + guidance * (with_words - without)
            sigmas.append(sigma[0].item())
            clean.append(x[:DRAWN] - sigmas[-1] * velocity)
        noisy = torch.stack([model.decode(z[:PATHS]).cpu() for z in states])
        frames = torch.stack([model.decode(z).cpu() for z in [*clean, states[-1]]])  # steps + 1 of them, as of `states`
        seen = [detect(pictures) for pictures in frames]
        right = [[fulfils(objects, request) for objects, request in zip(row, requests)] for row in seen]
        read = [[*map(facts, row)] for row in seen]
        settled = [[all(later[i] == read[-1][i] for later in read[step:]) for i in range(DRAWN)]
                   for step in range(len(read))]
        moved = (frames[1:-1] - frames[:-2]).abs().mean((1, 2, 3, 4))  # the last is the one before: no step leads there
        arms.append({"guidance": guidance, "sigmas": [round(sigma, 3) for sigma in [*sigmas, 0.0]],
                     "states": [strip(noisy[:, i]) for i in range(PATHS)],
                     "clean": [strip(frames[:, i]) for i in range(PATHS)], "right": [row[:PATHS] for row in right],
                     "share": [*map(share, right)], "settled": [*map(share, settled)],
                     "moved": [short(part) for part in (moved / moved.sum().clamp(min=1e-9)).tolist()]})
    return {"texts": [request.text for request in requests[:PATHS]], "written": written[:PATHS], "count": DRAWN,
            "arms": arms}


def attention_weights(attn: nn.Module, inputs: tuple, output: tuple) -> Tensor:
    """The softmax `b a l m` that a `CausalSelfAttention` never holds, from what it was given and what it returned."""
    x, cos, sin, mask, causal, _ = inputs
    q = rotate(rearrange(attn.q(x), "b l (a e) -> b a l e", a=attn.heads), cos, sin)
    k = repeat(output[1][0], "b a m e -> b (a g) m e", g=attn.heads // attn.kv_heads)
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    l, m = scores.shape[-2:]
    seen = torch.ones(l, m, dtype=torch.bool, device=x.device)
    seen = seen.tril(m - l) if causal else seen
    seen = seen if mask is None else seen & rearrange(mask, "b m -> b 1 1 m")
    return scores.masked_fill(~seen, -torch.inf).softmax(-1)


@torch.no_grad()
def read_one(model: SPAR, text: str, picture: Tensor | None = None) -> dict:
    """One prompt through LLM, router and connector: each token's layers, and what each query attends to, its square
    root as a byte."""
    mllm, queries = model.mllm, model.config.queries
    f_v = None if picture is None else model.tokenizer.features(picture[None])
    ids, mask = model.encode_prompts([text], picture is not None, to_draw=True)
    layers = {f"{name}, layer {i}": layer.attn for name, part in (("LLM", mllm.llm), ("connector", mllm.connector))
              for i, layer in enumerate(part.layers, 1)}
    with ExitStack() as stack:
        watched = [stack.enter_context(calls_of(attn)) for attn in layers.values()]
        weights = mllm.condition(ids, mask, f_v).weights[0]
    attended = [attention_weights(attn, *calls[-1])[0].mean(0)[-queries:]  # the last call has the queries
                for attn, calls in zip(layers.values(), watched)]
    levels, ids = (torch.stack(attended).sqrt() * 255).round().byte(), ids[0].tolist()
    kinds = ["b" if i == model.words.bos_id else "p" if i == model.words.image_id else "w" for i in ids]
    return {"text": text, "picture": None if picture is None else strip(picture[None]),
            "words": model.words.pieces([i for i, kind in zip(ids, kinds) if kind == "w"]),
            "kinds": "".join(kinds) + "q" * queries, "names": list(layers),
            "weights": [[round(part, 3) for part in row] for row in weights.tolist()],
            "attention": b64encode(levels.cpu().numpy().tobytes()).decode()}


def reading(model: SPAR, world: DrawnWorld) -> dict:
    """Routing and attention of requests and, where the run edits, of edits."""
    samples = [{"use": "draw", "asked": request.text} | read_one(model, text)
               for request, text in zip(*requests_for(model, world, READ))]
    if "U2" in model.finished_stages:
        samples += [{"use": "edit", "asked": edit.instruction} | read_one(model, text, image)
                    for edit, image, text in zip(*edits_for(model, world, READ))]
    room = LARGEST // len(samples)
    samples = [sample | ({} if len(sample["attention"]) <= room else {"attention": ""}) for sample in samples]
    return {"layers": model.mllm.choice, "router": model.config.router, "samples": samples}


# ---------------------------------------------------------------- the page


def write_page(model: SPAR, run: Path, out: Path) -> None:
    """What is drawn before U1 is drawn as P3 left it, for whose latents the tokenizer of T1 to T3 is no decoder. Raises
    UserError for a run whose data the judge cannot read."""
    if model.config.data:
        raise UserError(f"{run} learned from data on disk, which the judge cannot read: look into {run / 'report'}")
    done, world = set(model.finished_stages), DrawnWorld(model.config.side, model.config.seed, "test")
    draws, claims = {"P1", "P2", "P3"} <= done, ROOT / "results" / "claims.json"
    painter = load_run(run, model.device.type, upto="P3") if draws and "U1" not in done else model
    parts = {"reconstruct": (reconstructed, done & {"T1", "T2"}), "ask": (asked, "P1" in done), "draw": (drawn, draws),
             "edit": (edited, "U2" in done), "streams": (streams, done & {"T1", "T2"}), "path": (path, draws),
             "reading": (reading, "U1" in done)}
    data = {"run": run.resolve().name, "stages": model.finished_stages, "preset": model.config.preset,
            "skipped": model.config.skip_stage, "changed": config_diff(model.config), "seed": model.config.seed,
            "losses": losses(run, model.config),
            "claims": json.loads(claims.read_text(encoding="utf-8"))["rows"] if claims.exists() else []}
    for name, (compute, possible) in (bar := tqdm(parts.items(), desc="page")):
        bar.set_postfix_str(name)
        data[name] = compute(painter if name in ("draw", "path") else model, world) if possible else None
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")  # so that no text ends the script that the data stands in
    template = Page(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    write_text(out, template.substitute(run=html.escape(data["run"]), data=text))
    print(out)
