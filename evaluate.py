"""Every figure of a run, from its folder: reconstruction, understanding, generation, editing, routing.

    python evaluate.py runs/toy              prints the tables, writes results.json and the pictures of report/
    python evaluate.py runs/toy --count 50   fewer samples for each figure

The same weights, seed, sampler and counts give the same `eval_id` and the same figures. Pictures are judged by
arithmetic (world/judge.py), answers by exact match. Test scenes come from seeds of their own.
Of a run with some stages only what is there is measured; one that learned from data on disk is measured on its held-out
samples (disk/measure.py).
"""

import hashlib
import json
import time
from pathlib import Path

import torch
from tqdm import tqdm

from disk.layouts import scan
from disk.measure import measure
from parts.metrics import frechet_distance, psnr, share, ssim
from plumbing.command import Parser, UserError, run_command, write_text
from plumbing.devices import best_device
from plumbing.pictures import draw_report
from plumbing.run_folder import config_diff, load_run
from spar import SPAR, Protocol
from world.drawing import HELD_OUT_PAIRS, draw
from world.edits import EDIT_KINDS
from world.judge import detect, fulfils, succeeds
from world.language import PROMPT_KINDS, QUESTION_KINDS, DrawnWorld, twin

TABLES = ("reconstruction", "understanding", "retrieval", "generation", "generation_direct", "editing",
          "editing_direct")
GENERATED = (*PROMPT_KINDS, "held_out", "knowledge")


def reconstruction(model: SPAR, before: SPAR, world: DrawnWorld, how: Protocol) -> dict:
    """`rfd`: Fréchet distance on features of P1's encoder (`before`), mean over tokens; it is not FID."""
    images = world.pictures(range(how.count)).to(model.device)
    copies = model.reconstruct(images)
    with torch.no_grad():
        features, of_copies = (before.tokenizer.features(x).mean(1) for x in (images, copies))
    return {"psnr": round(psnr(images, copies).mean().item(), 3), "ssim": round(ssim(images, copies).mean().item(), 4),
            "rfd": round(frechet_distance(features, of_copies), 5)}


def understanding(model: SPAR, world: DrawnWorld, how: Protocol) -> dict:
    """Exact match of the greedy answer, kind by kind; `twins`: both pictures of a pair right."""
    table = {}
    for kind in QUESTION_KINDS:
        scenes, questions, answers = world.questions(range(how.count), kind)
        replies = model.answer(draw(scenes, world.side).to(model.device), questions)
        table[kind] = share(reply == answer for reply, answer in zip(replies, answers))
    table["overall"] = share(table[kind] for kind in QUESTION_KINDS)
    scenes = [world.scene(index) for index in range(how.count)]
    pairs = [twin(scene, world.rng("twin", index)) for index, scene in enumerate(scenes)]
    pictures = draw(scenes + [pair[0] for pair in pairs], world.side).to(model.device)
    replies = model.answer(pictures, [pair[1] for pair in pairs] * 2)
    table["twins"] = share(replies[i] == pair[2] and replies[how.count + i] == pair[3] for i, pair in enumerate(pairs))
    return table


def generation(model: SPAR, world: DrawnWorld, how: Protocol, kinds=GENERATED, rewrite: bool = True,
               **options) -> dict:
    """GenEval's six kinds, combinations held out of training, prompts that need a fact told in words. `rewrite`: the
    LLM first writes the prompt out as a whole caption (a departure); without, the paper's path."""
    table = {}
    for kind in kinds:
        pairs = {"pairs": sorted(HELD_OUT_PAIRS)} if kind == "held_out" else {}
        requests = world.prompts(range(how.count), "colours" if pairs else kind, **pairs)
        texts = [request.text for request in requests]
        texts = model.rewrite(texts, seed=how.seed) if rewrite else texts
        drawn = model.generate(texts, None, how.seed, how.steps, how.guidance, how.sampler, **options)[0]
        table[kind] = share(fulfils(seen, request) for seen, request in zip(detect(drawn.cpu()), requests))
    if set(PROMPT_KINDS) <= set(table):
        table["overall"] = share(table[kind] for kind in PROMPT_KINDS)
    return table


def editing(model: SPAR, world: DrawnWorld, how: Protocol, rewrite: bool = True) -> dict:
    """ImgEdit's nine kinds. `rewrite`: the LLM first says what the instruction changes, and into what; without, the
    paper's path. `preservation_psnr`: against the source, where the instruction changes nothing."""
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
    if model.config.data:
        tables = measure(model, before, scan(Path(model.config.data)), how)[0]
    else:
        tables = drawn_tables(run, model, before, how, device)
    results = {"eval_id": evaluation_id(run, how), "seed": model.config.seed, "seconds": round(time.time() - start, 1),
               "data": model.config.data, "protocol": vars(how)} | tables | {"ablation": config_diff(model.config)}
    write_text(run / "results.json", json.dumps(results, indent=1) + "\n")
    return results


def drawn_tables(run: Path, model: SPAR, before: SPAR, how: Protocol, device: str) -> dict[str, dict]:
    """`before`: the model as P1 left it."""
    world, done, jobs = DrawnWorld(model.config.side, model.config.seed, "test"), set(model.finished_stages), {}
    if done & {"T1", "T2"}:
        jobs["reconstruction"] = lambda: reconstruction(model, before, world, how)
    jobs["understanding"] = lambda: understanding(model, world, how)
    jobs["before_t3"] = lambda: understanding(before, world, how)["overall"]
    if "U1" in done:
        jobs["generation"] = lambda: generation(model, world, how)
        jobs["generation_direct"] = lambda: generation(model, world, how, rewrite=False)
    if "U2" in done:
        jobs["editing"] = lambda: editing(model, world, how)
        jobs["editing_direct"] = lambda: editing(model, world, how, rewrite=False)
    if "P3" in done:
        p3 = load_run(run, device, upto="P3")
        jobs["p3"] = lambda: generation(p3, world, how, ("knowledge",), rewrite=False, text_only=True)
    results = {}
    for name, job in (bar := tqdm(jobs.items(), desc="evaluation", dynamic_ncols=True)):
        bar.set_postfix_str(name)
        results[name] = job()
    tables = {name: results[name] for name in TABLES if name in results}
    tables["understanding"]["before_t3"] = results["before_t3"]
    if "P3" in done:  # P3 alone: no queries, no U stages
        tables.setdefault("generation_direct", {})["knowledge_p3"] = results["p3"]["knowledge"]
    return tables


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
    print_tables(evaluate(run, Protocol(**given), device))
    print(draw_report(run, device))


if __name__ == "__main__":
    run_command(main)
