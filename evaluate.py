"""Every figure of a run, from its folder: reconstruction, understanding, generation, editing.

    python evaluate.py runs/toy              prints the tables, writes results.json and the pictures of report/
    python evaluate.py runs/toy --count 50   fewer samples for each figure; --only reconstruction,editing: those tables
    python evaluate.py results/toy-seed*.json      the mean over runs, or over their results.json, and its interval

Prompts are those that no training text implies (world/scenes.py); the tables `_taught` are beside them. Each is drawn
twice: `direct`, as the paper does it, and rewritten, the LLM writing the prompt out first; P3 alone too. Pictures are
judged by arithmetic (world/judge.py), answers by exact match. Test scenes come from seeds of their own. Each table has
its `interval`s, 95 %, over samples and texts of one run; those of several runs are over their means.
The same weights, seed, sampler and counts give the same `eval_id` and the same figures. Of a run with some stages only
what is there is measured; one that learned from data on disk is measured on its held-out samples (disk/measure.py).
"""

import hashlib
import json
import time
from functools import partial
from pathlib import Path

import plumbing.command  # before torch, whose threads wait as it says
import torch
from tqdm import tqdm

from benchmarks.yardstick import machine
from diffusion import SAMPLERS
from disk.index import open_data
from disk.layouts import data_path
from disk.measure import measure
from parts.metrics import frechet_distance, mean_interval, psnr, share, share_interval, ssim
from plumbing.command import Parser, UserError, run_command, write_text
from plumbing.devices import best_device
from plumbing.pictures import draw_report
from plumbing.run_folder import config_diff, load_run
from public.writers import write_for
from spar import SPAR, Protocol
from world.drawing import draw
from world.edits import EDIT_KINDS
from world.judge import detect, fulfils, succeeds
from world.language import MEASURED, PROMPT_KINDS, QUESTION_KINDS, DrawnWorld, twin

TABLES = ("reconstruction", "understanding", "retrieval", "generation", "generation_direct", "generation_taught",
          "generation_direct_taught", "p3_generation", "p3_generation_direct", "editing", "editing_direct")
Verdicts = dict[str, list[tuple[str, bool]]]  # kind -> (text, right) of each sample


def table_of(verdicts: Verdicts, kinds, pictures: bool = False) -> dict:
    """Shares that are right, `overall` the mean of those of `kinds`; `texts`: distinct ones; `interval`: [low,
    high]. `pictures`: each sample is about another picture."""
    shares = {kind: share(right for _, right in samples) for kind, samples in verdicts.items()}
    intervals = {kind: share_interval(samples, pictures) for kind, samples in verdicts.items()}
    if set(kinds) <= set(shares):
        shares["overall"] = share(shares[kind] for kind in kinds)
        half = sum(((intervals[kind][1] - intervals[kind][0]) / 2) ** 2 for kind in kinds) ** 0.5 / len(kinds)
        intervals["overall"] = [round(max(0, shares["overall"] - half), 4), round(min(1, shares["overall"] + half), 4)]
    texts = {kind: len({text for text, _ in samples}) for kind, samples in verdicts.items()}
    return shares | {"texts": texts, "interval": intervals}


def reconstruction(model: SPAR, before: SPAR, world: DrawnWorld, how: Protocol) -> dict:
    """`rfd`: Fréchet distance on features of P1's encoder (`before`), mean over tokens; it is not FID."""
    images = world.pictures(range(how.count)).to(model.device)
    copies = model.reconstruct(images)
    with torch.no_grad():
        features, of_copies = (before.tokenizer.features(x).mean(1) for x in (images, copies))
    values = {"psnr": psnr(images, copies), "ssim": ssim(images, copies)}
    return {key: round(value.mean().item(), 4) for key, value in values.items()} | {
        "rfd": round(frechet_distance(features, of_copies), 5),
        "interval": {key: mean_interval(value) for key, value in values.items()}}


def understanding(model: SPAR, world: DrawnWorld, how: Protocol) -> dict:
    """Exact match of the greedy answer, kind by kind; `twins`: both pictures of a pair right."""
    verdicts = {}
    for kind in QUESTION_KINDS:
        scenes, questions, answers = world.questions(range(how.count), kind)
        replies = model.answer(draw(scenes, world.side).to(model.device), questions)
        verdicts[kind] = [(question, reply == answer) for question, reply, answer in zip(questions, replies, answers)]
    scenes = [world.scene(index) for index in range(how.count)]
    pairs = [twin(scene, world.rng("twin", index)) for index, scene in enumerate(scenes)]
    pictures = draw(scenes + [pair[0] for pair in pairs], world.side).to(model.device)
    replies = model.answer(pictures, [pair[1] for pair in pairs] * 2)
    verdicts["twins"] = [(pair[1], replies[i] == pair[2] and replies[how.count + i] == pair[3])
                         for i, pair in enumerate(pairs)]
    return table_of(verdicts, QUESTION_KINDS, pictures=True)


def generation(model: SPAR, world: DrawnWorld, how: Protocol, rewrite: bool = True, which: str = "untaught",
               text_only: bool = False) -> dict:
    """GenEval's six kinds, combinations held out of training, prompts that need a fact told in words. `rewrite`: the
    LLM first writes the prompt out as a caption (a departure); without, the paper's path. `text_only`: P3 alone."""
    verdicts, count = {}, how.count // 2 if text_only or which == "taught" else how.count
    for kind in MEASURED[which]:
        requests = world.measured_prompts(range(count), kind, which)
        texts = [request.text for request in requests]
        written = model.rewrite(texts, seed=how.seed) if rewrite else texts
        drawn = model.generate(written, None, how.seed, how.steps, how.guidance, how.sampler, text_only)[0]
        verdicts[kind] = [(request.text, fulfils(seen, request))
                          for seen, request in zip(detect(drawn.cpu()), requests)]
    return table_of(verdicts, PROMPT_KINDS)


def editing(model: SPAR, world: DrawnWorld, how: Protocol, rewrite: bool = True) -> dict:
    """ImgEdit's nine kinds. `rewrite`: the LLM first says what the instruction changes, and into what; without, the
    paper's path. `preservation_psnr`: against the source, where the instruction changes nothing."""
    verdicts, kept = {}, []
    for kind in EDIT_KINDS:
        edits = world.edits(range(how.count // 2), kind)
        sources, targets = (draw([getattr(e, side) for e in edits], world.side) for side in ("source", "target"))
        texts, given = [edit.instruction for edit in edits], sources.to(model.device)
        written = model.rewrite(texts, given) if rewrite else texts
        drawn = model.generate(written, given, how.seed, how.steps, how.guidance, how.sampler)[0].cpu()
        verdicts[kind] = [(edit.instruction, succeeds(edit, picture[None])[0]) for edit, picture in zip(edits, drawn)]
        same = (sources - targets).abs().amax(1) < 1e-4  # pixels that the instruction leaves alone
        enough = same.float().mean((1, 2)) > 0.05
        kept.append(psnr(sources[enough], drawn[enough], same[enough]))
    table, kept = table_of(verdicts, EDIT_KINDS, pictures=True), torch.cat(kept)
    table["interval"]["preservation_psnr"] = mean_interval(kept)
    return table | {"preservation_psnr": round(kept.mean().item(), 3)}


def evaluation_id(run: Path, how: Protocol) -> str:
    asked = {key: value for key, value in vars(how).items() if (key, value) != ("shift", Protocol.shift)}
    digest = hashlib.sha256(json.dumps([asked, "ema"]).encode())
    for path in sorted(run.glob("[PTU][123].pt")):
        content = torch.load(path, map_location="cpu", weights_only=True)
        for name, value in sorted(content["ema"].items()):
            digest.update(name.encode() + value.numpy().tobytes())
    return digest.hexdigest()[:16]


# ---------------------------------------------------------------- a whole run


def evaluate(run: Path, how: Protocol = Protocol(), device: str = "cpu", only: str = ",".join(TABLES),
             data: str = "") -> dict:
    """All measures that the finished stages allow, written to results.json. Deterministic on CPU. `data`: where the
    folder of a run on disk has moved to."""
    if set(only.split(",")) - {*TABLES}:
        raise UserError(f"--only {only}: tables are {', '.join(TABLES)}")
    start = time.time()
    model, before = load_run(run, device), load_run(run, device, upto="P1")
    how = how.of(model.config)
    if model.config.data:
        tables = measure(model, before, open_data(Path(data or model.config.data)), how)[0]
    else:
        tables = drawn_tables(run, model, before, how, only.split(","))
    seconds = time.time() - start
    results = {"eval_id": evaluation_id(run, how), "preset": model.config.preset, "seed": model.config.seed,
               "stages": model.finished_stages, "seconds": round(seconds, 1), "data": model.config.data,
               "protocol": vars(how)} | machine(run, seconds)
    results |= {name: table for name, table in tables.items() if name in only.split(",")}
    results["ablation"] = config_diff(model.config)
    write_text(run / "results.json", json.dumps(results, indent=1) + "\n")
    return results


def drawn_tables(run: Path, model: SPAR, before: SPAR, how: Protocol, only: list[str]) -> dict[str, dict]:
    """`before`: the model as P1 left it."""
    world, done, jobs = DrawnWorld(model.config.side, model.config.seed, "test"), set(model.finished_stages), {}
    if done & {"T1", "T2"}:
        jobs["reconstruction"] = lambda: reconstruction(model, before, world, how)
    jobs["understanding"] = lambda: understanding(model, world, how)
    if "P3" in done:  # P3 alone: no queries, no U stages
        for name, rewrite in (("", True), ("_direct", False)):
            jobs["p3_generation" + name] = lambda rewrite=rewrite: generation(
                load_run(run, str(model.device), upto="P3"), world, how, rewrite, text_only=True)
    if "U1" in done:
        for name, which in (("", "untaught"), ("_taught", "taught")):
            jobs["generation" + name] = partial(generation, model, world, how, True, which)
            jobs["generation_direct" + name] = partial(generation, model, world, how, False, which)
    if "U2" in done:
        jobs["editing"] = lambda: editing(model, world, how)
        jobs["editing_direct"] = lambda: editing(model, world, how, rewrite=False)
    results, jobs = {}, {name: job for name, job in jobs.items() if name in only}
    for name, job in (bar := tqdm(jobs.items(), desc="evaluation", dynamic_ncols=True)):
        bar.set_postfix_str(name)
        results[name] = job()
    if "understanding" in results:
        results["understanding"]["before_t3"] = understanding(before, world, how)["overall"]
    return results


def print_tables(results: dict) -> None:
    for name in TABLES:
        table = results.get(name, {})
        for key, value in table.items():
            if not isinstance(value, dict):
                interval, texts = table.get("interval", {}).get(key), table.get("texts", {}).get(key)
                between = f"   {interval[0]:.3f} to {interval[1]:.3f}" if interval else ""
                print(f"{name:24} {key:18} {value:8.3f}{between}{f'   {texts} texts' if texts else ''}")
    if "eval_id" in results:
        print(f"eval_id {results['eval_id']}   seed {results['seed']}   {results['seconds']:.0f} s")


def asked_alike(results: dict) -> tuple:
    """What the results of runs that are compared have in common: on which data they were measured, and how."""
    return results.get("data"), vars(Protocol()) | results.get("protocol", {})


def over_runs(several: list[dict]) -> dict[str, dict]:
    """Results of runs -> the tables that all have: of each figure the mean over runs and the 95 % interval of it."""
    if any(asked_alike(one) != asked_alike(several[0]) for one in several):
        raise UserError("these runs were measured by other protocols or on other data: measure them alike first")
    means = {}
    for name in (name for name in TABLES if all(name in one for one in several)):
        tables = [{key: value for key, value in one[name].items() if not isinstance(value, dict)} for one in several]
        values = {key: torch.tensor([float(table[key]) for table in tables]) for key in tables[0]}
        means[name] = {key: round(value.mean().item(), 4) for key, value in values.items()}
        means[name]["interval"] = {key: mean_interval(value) for key, value in values.items()}
    return means


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", help="run folders, as train.py wrote them, or their results.json")
    parser.add_argument("--count", type=int, default=Protocol.count, help="samples of each figure")
    parser.add_argument("--seed", type=int, default=0, help="of the sampler's noise")
    parser.add_argument("--steps", type=int, default=Protocol.steps)
    parser.add_argument("--guidance", type=float, default=Protocol.guidance)
    parser.add_argument("--sampler", choices=SAMPLERS, default=Protocol.sampler)
    parser.add_argument("--write", nargs=3, metavar=("KIND", "PROMPTS", "DIR"), help="instead: pictures for an "
                        "official evaluator: geneval, wise, imgedit (and its prompts), reconstruction (and pictures)")
    parser.add_argument("--only", default=",".join(TABLES), help="tables: " + ", ".join(TABLES))
    parser.add_argument("--data", default=None, help="where what the run was trained on has moved to")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    given = vars(parser.read())
    runs, device, write = given.pop("runs"), best_device(given.pop("device")), given.pop("write")
    moved = given.pop("data")
    data = "" if moved is None else data_path(moved)
    if given["count"] < 2 or given["steps"] is not None and given["steps"] < 1:
        raise UserError("--count must be at least 2 and --steps at least 1")
    only, several = given.pop("only"), []
    if write:
        return write_for(write[0], load_run(runs[0], device), Path(write[1]), Path(write[2]), Protocol(**given))
    for run in runs:
        read = run.suffix == ".json"
        several.append(json.loads(run.read_text(encoding="utf-8")) if read else
                       evaluate(run, Protocol(**given), device, only, data))
        print_tables(several[-1])
        print(run if read else draw_report(run, device, open_data(Path(data)) if data else None))
    if len(several) > 1:
        print(f"\nmean of {len(several)} runs, its 95 % interval over them")
        print_tables(over_runs(several))


if __name__ == "__main__":
    run_command(main)
