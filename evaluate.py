"""Every figure of a run, from its folder: reconstruction, understanding, generation, editing, routing.

    python evaluate.py runs/toy              prints the tables, writes results.json
    python evaluate.py runs/toy --count 50   fewer samples for each figure

The same weights, seed, sampler and counts give the same `eval_id` and the same figures. Pictures are judged by
arithmetic (judge.py), answers by exact match. Test scenes come from seeds of their own.
"""

import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from tqdm import tqdm

from data import EDIT_KINDS, PROMPT_KINDS, QUESTION_KINDS, DrawnWorld, twin
from judge import detect, fulfils, succeeds
from runs import Parser, UserError, best_device, changes, load_config, load_run, run_command
from spar import SAMPLING, SPAR
from world import HELD_OUT, draw

# ---------------------------------------------------------------- picture metrics, all on pictures in [-1, 1]


def psnr(a: Tensor, b: Tensor, mask: Tensor | None = None) -> Tensor:
    """`b 3 H W` twice -> dB for each picture, peak 2 (the range of [-1, 1]); `mask` `b H W` chooses the pixels.
    Equal pictures give infinity, an empty mask gives NaN."""
    error = (a - b).square().mean(1)
    mask = torch.ones_like(error, dtype=torch.bool) if mask is None else mask
    mse = (error * mask).sum((1, 2)) / mask.sum((1, 2))
    return 10 * torch.log10(4 / mse)


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity of each pair, `b 3 H W` -> `b`: 11×11 Gaussian window, σ 1.5, K = 0.01 and 0.03, mean over
    the windows that lie wholly inside and over channels (Wang et al. 2004)."""
    a, b = (x.cpu().double().add(1).div(2) for x in (a, b))  # mps has no float64
    window = torch.exp(-(torch.arange(11, dtype=torch.float64) - 5).square() / (2 * 1.5**2))
    window = torch.outer(window, window) / window.sum() ** 2

    def blur(x):
        return F.conv2d(rearrange(x, "b c h w -> (b c) 1 h w"), window[None, None])

    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b, cov = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2, blur(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    score = (2 * mean_a * mean_b + c1) * (2 * cov + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return rearrange(score, "(b c) 1 h w -> b (c h w)", b=len(a)).mean(1)


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Between the Gaussians fitted to features `n d` and `m d`: |μ_a − μ_b|² + tr(Σ_a + Σ_b − 2 (Σ_a Σ_b)^½).

    tr (Σ_a Σ_b)^½ is the sum of the singular values of A Bᵀ, with Σ_a = AᵀA and Σ_b = BᵀB the centred features
    over √(n−1): exact for any rank, fewer samples than features included.
    """
    a, b = a.cpu().double(), b.cpu().double()
    mean_a, mean_b = a.mean(0), b.mean(0)
    A, B = (a - mean_a) / (len(a) - 1) ** 0.5, (b - mean_b) / (len(b) - 1) ** 0.5
    cross = torch.linalg.svdvals(A @ B.T).sum()
    return ((mean_a - mean_b).square().sum() + A.square().sum() + B.square().sum() - 2 * cross).item()


# ---------------------------------------------------------------- tables

TABLES = ("reconstruction", "understanding", "retrieval", "generation", "generation_direct", "editing", "editing_direct")
GENERATED = (*PROMPT_KINDS, "held_out", "knowledge")


@dataclass(frozen=True)
class Protocol:
    """How a run is measured; part of `eval_id`."""

    count: int = 200  # samples of each figure
    seed: int = 0  # of the sampler's noise
    steps: int = SAMPLING["steps"]
    guidance: float = SAMPLING["guidance"]
    sampler: str = SAMPLING["sampler"]


def share(verdicts) -> float:
    verdicts = list(verdicts)
    return round(sum(verdicts) / max(1, len(verdicts)), 4)


def reconstruction(model: SPAR, before: SPAR, world: DrawnWorld, how: Protocol) -> dict:
    """`rfd`: Fréchet distance on features of P1's encoder (`before`), mean over tokens; it is not FID."""
    images = world.pictures(range(how.count)).to(model.device)
    copies = model.reconstruct(images)
    with torch.no_grad():
        seen, seen_again = (before.tokenizer.features(x).mean(1) for x in (images, copies))
    return {"psnr": round(psnr(images, copies).mean().item(), 3), "ssim": round(ssim(images, copies).mean().item(), 4),
            "rfd": round(frechet_distance(seen, seen_again), 5)}


def understanding(model: SPAR, world: DrawnWorld, how: Protocol) -> dict:
    """Exact match of the greedy answer, kind by kind; `twins`: both pictures of a pair right."""
    table = {}
    for kind in QUESTION_KINDS:
        scenes, questions, answers = world.questions(range(how.count), kind)
        said = model.answer(draw(scenes, world.side).to(model.device), questions)
        table[kind] = share(a == b for a, b in zip(said, answers))
    table["overall"] = share(table[kind] for kind in QUESTION_KINDS)
    scenes = [world.scene(index) for index in range(how.count)]
    pairs = [twin(scene, world.rng("twin", index)) for index, scene in enumerate(scenes)]
    pictures = draw(scenes + [pair[0] for pair in pairs], world.side).to(model.device)
    said = model.answer(pictures, [pair[1] for pair in pairs] * 2)
    table["twins"] = share(said[i] == pair[2] and said[how.count + i] == pair[3] for i, pair in enumerate(pairs))
    return table


def generation(model: SPAR, world: DrawnWorld, how: Protocol, kinds=GENERATED, rewrite: bool = True, **options) -> dict:
    """GenEval's six kinds, combinations held out of training, prompts that need a fact told in words. `rewrite`: the LLM
    first writes the prompt out as a whole caption (a departure); without, the paper's path."""
    table = {}
    for kind in kinds:
        pairs = {"pairs": sorted(HELD_OUT)} if kind == "held_out" else {}
        requests = world.prompts(range(how.count), "colours" if pairs else kind, **pairs)
        texts = [request.text for request in requests]
        texts = model.rewrite(texts, seed=how.seed) if rewrite else texts
        drawn = model.generate(texts, None, how.seed, how.steps, how.guidance, how.sampler, **options)[0]
        table[kind] = share(fulfils(seen, request) for seen, request in zip(detect(drawn.cpu()), requests))
    if set(PROMPT_KINDS) <= set(table):
        table["overall"] = share(table[kind] for kind in PROMPT_KINDS)
    return table


def editing(model: SPAR, world: DrawnWorld, how: Protocol, rewrite: bool = True) -> dict:
    """ImgEdit's nine kinds. `rewrite`: the LLM first says what the instruction changes, and into what; without, the paper's
    path. `preservation_psnr`: against the source, where the instruction changes nothing."""
    table, kept = {}, []
    for kind in EDIT_KINDS:
        edits = world.edits(range(how.count // 2), kind)
        sources, targets = (draw([getattr(e, side) for e in edits], world.side) for side in ("source", "target"))
        texts, given = [edit.instruction for edit in edits], sources.to(model.device)
        texts = model.rewrite(texts, given) if rewrite else texts
        drawn = model.generate(texts, given, how.seed, how.steps, how.guidance, how.sampler)[0].cpu()
        table[kind] = share(succeeds(edit, drawn[i:i + 1])[0] for i, edit in enumerate(edits))
        same = (sources - targets).abs().amax(1) < 1e-4  # pixels that the instruction leaves alone
        enough = same.float().mean((1, 2)) > 0.05
        kept.append(psnr(sources[enough], drawn[enough], same[enough]))
    table["overall"] = share(table[kind] for kind in EDIT_KINDS)
    table["preservation_psnr"] = round(torch.cat(kept).mean().item(), 3)
    return table


def evaluation_id(run: Path, how: Protocol) -> str:
    digest = hashlib.sha256(json.dumps([vars(how), "ema"]).encode())
    for path in sorted(run.glob("[PTU][123].pt")):
        content = torch.load(path, map_location="cpu", weights_only=True)
        for name, value in sorted(content["ema"].items()):
            digest.update(name.encode() + value.numpy().tobytes())
    return digest.hexdigest()[:16]


# ---------------------------------------------------------------- a whole run


def evaluate(run: Path, how: Protocol = Protocol(), device: str = "cpu") -> dict:
    """All measures that the finished stages allow, written to results.json. Deterministic on CPU."""
    start = time.time()
    model, before = load_run(run, device), load_run(run, device, upto="P1")
    world, f, done = DrawnWorld(model.config.side, model.config.seed, "test"), model.config, set(model.finished)
    jobs = {}  # name -> what to measure
    if "T1" in done or "T2" in done:
        jobs["reconstruction"] = lambda: reconstruction(model, before, world, how)
    if "P1" in done:
        jobs["understanding"] = lambda: understanding(model, world, how)
        jobs["before_t3"] = lambda: understanding(before, world, how)["overall"]
    if "U1" in done:
        jobs["generation"] = lambda: generation(model, world, how)
        jobs["generation_direct"] = lambda: generation(model, world, how, rewrite=False)
        jobs["editing"] = lambda: editing(model, world, how)
        jobs["editing_direct"] = lambda: editing(model, world, how, rewrite=False)
    if "P3" in done:
        p3 = load_run(run, device, upto="P3")
        jobs["p3"] = lambda: generation(p3, world, how, ("knowledge",), rewrite=False, text_only=True)
    found = {}
    for name, job in (bar := tqdm(jobs.items(), desc="evaluation", dynamic_ncols=True)):
        bar.set_postfix_str(name)
        found[name] = job()
    results = {"eval_id": evaluation_id(run, how), "seed": f.seed, "seconds": 0.0, "protocol": vars(how)}
    for name in TABLES:
        if name in found:
            results[name] = found[name]
    if "understanding" in results:
        results["understanding"]["before_t3"] = found["before_t3"]
    if "generation" in results:
        results["generation_direct"]["knowledge_p3"] = found["p3"]["knowledge"]  # P3 alone: no queries, no U stages
    results["ablation"] = changes(f)
    results["seconds"] = round(time.time() - start, 1)
    (run / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    return results


def print_tables(results: dict) -> None:
    for name in TABLES:
        for key, value in results.get(name, {}).items():
            print(f"{name:18} {key:18} {value:8.3f}")
    print(f"eval_id {results['eval_id']}   seed {results['seed']}   {results['seconds']:.0f} s")


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="run folder, as train.py wrote it")
    parser.add_argument("--count", type=int, default=Protocol.count, help="samples of each figure")
    parser.add_argument("--seed", type=int, default=0, help="of the sampler's noise")
    parser.add_argument("--steps", type=int, default=Protocol.steps)
    parser.add_argument("--guidance", type=float, default=Protocol.guidance)
    parser.add_argument("--sampler", choices=("euler", "dpm"), default=Protocol.sampler)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    given = vars(parser.read())
    run, device = given.pop("run"), best_device(given.pop("device"))
    if given["count"] < 2 or given["steps"] < 1:
        raise UserError("--count must be at least 2 and --steps at least 1")
    if load_config(run).data:  # told of the drawn world alone: judge, kinds of requests
        from held_out import evaluate as on_disk  # it reads this file's metrics
        print_tables(on_disk(run, device, Protocol(**given)))
    else:
        print_tables(evaluate(run, Protocol(**given), device))


if __name__ == "__main__":
    run_command(main)
