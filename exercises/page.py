"""One page to explore a run: its losses, its four uses, what each stream and each layer carries, the path from noise to
picture. A single file, for any browser, that fetches nothing.

    python sample.py page --run runs/toy --out page.html

The model computes here what the page shows; page.html beside this file is the page without its data. A section is there
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
from plumbing.run_folder import read_lines
from spar import NAMES, SPAR
from world.drawing import draw
from world.edits import EDIT_KINDS
from world.judge import detect, fulfils, succeeds
from world.language import MEASURED, QUESTION_KINDS, DrawnWorld

ROOT = Path(__file__).resolve().parent.parent
COUNT = 12  # samples of each use
PATHS, DRAWN = 8, 32  # paths that are shown, and those that the curves are of
READ = 6  # requests, and as many edits, whose routing and attention are shown
LARGEST = 1 << 20  # bytes of attention weights; what is more is left out
POINTS = 300  # of a curve


class Page(Template):
    delimiter = "§"  # $ is JavaScript's


# ---------------------------------------------------------------- pictures and readings


def strip(pictures: Tensor) -> dict:
    """Pictures `b 3 H W` side by side, as one that stands in the page itself: exact up to 32 pixels, else smaller."""
    side, file = pictures.shape[-1], io.BytesIO()
    image = to_image(torch.cat(list(pictures.cpu()), 2))
    if side > 32:
        shown = min(side, 64)
        image = image.resize((len(pictures) * shown, shown), Image.Resampling.BOX)
    image.save(file, "PNG" if side <= 32 else "WEBP", quality=80)
    kind = "png" if side <= 32 else "webp"
    return {"src": f"data:image/{kind};base64,{b64encode(file.getvalue()).decode()}", "n": len(pictures)}


def pairs(before: Tensor, after: Tensor) -> dict:
    return strip(torch.stack([before.cpu(), after.cpu()], 1).flatten(0, 1))


def facts(objects) -> list[tuple]:
    return sorted(thing.facts for thing in objects)


def reads(picture: Tensor, scene) -> bool:
    """Whether the judge reads in a picture `3 H W` the objects of its scene, and no others."""
    return facts(detect(picture[None].cpu(), scene.style)[0]) == facts(scene.objects)


def short(value: float) -> float:
    return float(f"{value:.4g}")


# ---------------------------------------------------------------- what the sections show


def losses(run: Path) -> list[dict]:
    """Each stage's terms over its steps, since its last beginning; "held": of held-out samples."""
    lines, stages = read_lines(run / "log.jsonl"), []
    for name in NAMES:
        own = [line for line in lines if line["stage"] == name and "loss" in line]
        own = own[max([i for i, line in enumerate(own) if line["step"] == 0], default=0):]
        if not own:
            continue
        every = math.ceil(len(own) / POINTS)
        own, looks = own[:-1:every] + own[-1:], [line for line in lines if line["stage"] == name and "held_out" in line]
        terms = [{"name": term, "points": points(own, term), "held": points(looks, term, "held_out")}
                 for term in dict.fromkeys(key for line in own for key in line) if term.startswith("L_")]
        stages.append({"stage": name, "steps": own[-1]["step"] + 1, "seconds": own[-1].get("seconds"),
                       "terms": [term for term in terms if term["points"]]})
    return stages


def points(lines: list[dict], term: str, within: str = "") -> list:
    pairs = [(line["step"], (line[within] if within else line).get(term)) for line in lines]
    return [[step, short(value)] for step, value in pairs if value is not None and math.isfinite(value) and value != 0]


def reconstructed(model: SPAR, world: DrawnWorld) -> dict:
    scenes = [world.styled_scene(i) for i in range(COUNT)]
    images = draw(scenes, world.side)
    results = model.reconstruct(images.to(model.device)).cpu()
    return {"strip": pairs(images, results), "each": 2,
            "cards": [{"text": f"{decibels:.1f} dB", "right": reads(result, scene)}
                      for decibels, result, scene in zip(psnr(images, results).tolist(), results, scenes)]}


def asked(model: SPAR, world: DrawnWorld) -> dict:
    samples = [world.questions([i], QUESTION_KINDS[i % len(QUESTION_KINDS)]) for i in range(COUNT)]
    scenes, questions, answers = ([sample[part][0] for sample in samples] for part in range(3))
    images = draw(scenes, world.side)
    replies = model.answer(images.to(model.device), questions)
    return {"strip": strip(images), "each": 1,
            "cards": [{"text": f"{question}?", "said": reply, "wanted": answer, "right": reply == answer}
                      for question, reply, answer in zip(questions, replies, answers)]}


def requests_for(model: SPAR, world: DrawnWorld, count: int) -> tuple[list, list[str]]:
    """Requests whose combinations no training text has, and each as the LLM writes it out."""
    kinds = MEASURED["untaught"]
    requests = [world.measured_prompts([i // len(kinds)], kinds[i % len(kinds)])[0] for i in range(count)]
    return requests, model.rewrite([request.text for request in requests])


def drawn(model: SPAR, world: DrawnWorld) -> dict:
    requests, written = requests_for(model, world, COUNT)
    results = model.generate(written, text_only="U1" not in model.finished_stages)[0].cpu()
    return {"strip": strip(results), "each": 1,
            "cards": [{"text": request.text, "written": text, "right": fulfils(objects, request)}
                      for request, text, objects in zip(requests, written, detect(results))]}


def edited(model: SPAR, world: DrawnWorld) -> dict:
    edits = [world.edits([i // len(EDIT_KINDS)], EDIT_KINDS[i % len(EDIT_KINDS)])[0] for i in range(COUNT)]
    images = draw([edit.source for edit in edits], world.side)
    written = model.rewrite([edit.instruction for edit in edits], images.to(model.device))
    results = model.generate(written, images.to(model.device))[0].cpu()
    return {"strip": pairs(images, results), "each": 2,
            "cards": [{"text": edit.instruction, "written": text, "right": succeeds(edit, result[None])[0]}
                      for edit, text, result in zip(edits, written, results)]}


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
    read = [[reads(picture, scene) for picture, scene in zip(pictures, scenes)] for pictures in frames]
    return {"shares": [[round(a, 1), round(c, 1)] for a, c in shares], "source": strip(images),
            "strips": [strip(frames[:, i]) for i in range(COUNT)], "right": read,
            "psnr": [short(psnr(pictures, images).mean().item()) for pictures in frames],
            "read": [short(sum(row) / COUNT) for row in read]}


@contextmanager
def calls_of(module: nn.Module):
    """-> a list that fills with (inputs, output) of every call of `module`."""
    calls = []
    handle = module.register_forward_hook(lambda _, inputs, output: calls.append((inputs, output)))
    try:
        yield calls
    finally:
        handle.remove()


@torch.no_grad()
def path(model: SPAR, world: DrawnWorld) -> dict:
    """With guidance and without: of every step the latent x_t, and the clean latent x₀ = x_t − σ v that the DiT expects
    there, both decoded; and what the judge reads in the latter."""
    requests, written = requests_for(model, world, DRAWN)
    arms = []
    for guidance in dict.fromkeys([model.config.guidance, 1.0]):
        with calls_of(model.dit) as calls:
            _, states, _ = model.generate(written, guidance=guidance, text_only="U1" not in model.finished_stages)
        sigmas, clean = [], []
        for (x, sigma, *_), (velocity, _) in calls:
            x, sigma = x[:DRAWN], sigma[0].item()
            if guidance != 1:
                with_words, without = velocity.chunk(2)
                velocity = without + guidance * (with_words - without)
            sigmas.append(sigma)
            clean.append(x - sigma * velocity)
        frames = torch.stack([model.decode(z).cpu() for z in [*clean, states[-1]]])  # `steps+1 b 3 H W`
        seen = [detect(pictures) for pictures in frames]
        right = [[fulfils(objects, request) for objects, request in zip(row, requests)] for row in seen]
        read = [[facts(objects) for objects in row] for row in seen]
        same = [sum(all(row[i] == read[-1][i] for row in read[step:]) for i in range(DRAWN)) for step in range(len(read))]
        moved = (frames[1:] - frames[:-1]).abs().mean((1, 2, 3, 4))
        arms.append({"guidance": guidance, "sigmas": [round(sigma, 3) for sigma in [*sigmas, 0.0]],
                     "states": [strip(torch.cat([model.decode(z[i:i + 1]) for z in states])) for i in range(PATHS)],
                     "clean": [strip(frames[:, i]) for i in range(PATHS)], "right": [row[:PATHS] for row in right],
                     "share": [short(sum(row) / DRAWN) for row in right],
                     "settled": [short(count / DRAWN) for count in same],
                     "moved": [short(share) for share in (moved / moved.sum().clamp(min=1e-9)).tolist()]})
    return {"texts": [request.text for request in requests[:PATHS]], "count": DRAWN, "arms": arms}


def attention_weights(attn: nn.Module, inputs: tuple, output: tuple) -> Tensor:
    """The softmax that a `CausalSelfAttention` never holds, `b a l m`, from what it was given and what it returned."""
    x, cos, sin, mask, causal, _ = inputs
    q, k = rotate(rearrange(attn.q(x), "b l (a e) -> b a l e", a=attn.heads), cos, sin), output[1][0]
    k = repeat(k, "b a m e -> b (a g) m e", g=attn.heads // attn.kv_heads)
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    l, m = scores.shape[-2:]
    hidden = torch.ones(l, m, dtype=torch.bool, device=x.device).triu(1 + m - l) if causal else scores.new_zeros(l, m) > 0
    hidden = hidden if mask is None else hidden | rearrange(~mask, "b m -> b 1 1 m")
    return scores.masked_fill(hidden, -torch.inf).softmax(-1)


@torch.no_grad()
def read_one(model: SPAR, text: str, picture: Tensor | None) -> dict:
    """One prompt through LLM, router and connector: each token's layers, and what each query attends to, as bytes."""
    mllm, queries = model.mllm, model.config.queries
    f_v = None if picture is None else model.tokenizer.features(picture[None].to(model.device))
    ids, mask = model.encode_prompts([text], picture is not None, to_draw=True)
    named = {f"LLM, layer {i}": layer.attn for i, layer in enumerate(mllm.llm.layers, 1)}
    named |= {f"connector, layer {i}": layer.attn for i, layer in enumerate(mllm.connector.layers, 1)}
    with ExitStack() as stack:
        watched = [stack.enter_context(calls_of(attn)) for attn in named.values()]
        weights = mllm.condition(ids, mask, f_v).weights[0]
    last = [attention_weights(attn, *calls[-1])[0].mean(0)[-queries:] for attn, calls in zip(named.values(), watched)]
    kinds = ["b" if i == model.words.bos_id else "p" if i == model.words.image_id else "w" for i in ids[0].tolist()]
    words = model.words.pieces([i for i, kind in zip(ids[0].tolist(), kinds) if kind == "w"])
    levels = (torch.stack(last) * 255).round().byte().cpu()
    return {"text": text, "picture": None if picture is None else strip(picture[None]), "words": words,
            "kinds": "".join(kinds) + "q" * queries, "names": list(named),
            "weights": [[round(share, 3) for share in row] for row in weights.tolist()],
            "attention": b64encode(levels.numpy().tobytes()).decode()}


def reading(model: SPAR, world: DrawnWorld) -> dict:
    """For the routing and the attention of requests and, where the run edits, of edits."""
    requests, written = requests_for(model, world, READ)
    prompts = [("draw", request.text, text, None) for request, text in zip(requests, written)]
    if "U2" in model.finished_stages:
        edits = [world.edits([i], EDIT_KINDS[i])[0] for i in range(READ)]
        images = draw([edit.source for edit in edits], world.side)
        written = model.rewrite([edit.instruction for edit in edits], images.to(model.device))
        prompts += [("edit", edit.instruction, *rest) for edit, *rest in zip(edits, written, images)]
    samples, size = [], 0
    for use, short_text, text, picture in prompts:
        sample = read_one(model, text, picture)
        size += len(sample["attention"])
        samples.append({"use": use, "asked": short_text} | sample | ({} if size <= LARGEST else {"attention": ""}))
    return {"layers": model.mllm.choice, "router": model.config.router, "samples": samples}


def claims() -> list[dict] | None:
    file = ROOT / "results" / "claims.json"
    return json.loads(file.read_text())["rows"] if file.exists() else None


# ---------------------------------------------------------------- the page


def write_page(model: SPAR, run: Path, out: Path) -> None:
    """Raises UserError for a run whose data the judge cannot read."""
    if model.config.data:
        raise UserError(f"{run} learned from data on disk, which no judge can read: its pictures are in {run / 'report'}")
    done, world = set(model.finished_stages), DrawnWorld(model.config.side, model.config.seed, "test")
    parts = {"reconstruct": (reconstructed, done & {"T1", "T2"}), "ask": (asked, "P1" in done),
             "draw": (drawn, {"P1", "P2", "P3"} <= done), "edit": (edited, "U2" in done),
             "streams": (streams, done & {"T1", "T2"}), "path": (path, {"P1", "P2", "P3"} <= done),
             "reading": (reading, "U1" in done)}
    data = {"run": run.resolve().name, "stages": model.finished_stages, "preset": model.config.preset,
            "seed": model.config.seed, "losses": losses(run), "claims": claims()}
    for name, (compute, possible) in (bar := tqdm(parts.items(), desc="page")):
        bar.set_postfix_str(name)
        data[name] = compute(model, world) if possible else None
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")  # so that no text ends the script that the data stands in
    template = Page(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    write_text(out, template.substitute(run=html.escape(data["run"]), data=text))
    print(out)
