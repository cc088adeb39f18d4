"""Every figure of a run that learned from data on disk, on the samples held out, each beside a trivial baseline.

    python evaluate.py RUN         comes here where the run's config names --data

Reconstruction against the mean picture, answers against the most frequent one, retrieval and drawing against chance, edits
against leaving the picture as it is. Names that end in `_baseline` are these.
"""

import json
import time
from collections import Counter, defaultdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from disk import DESCRIBE, DiskData, Sample, as_tensor, look
from evaluate import Protocol, evaluation_id, frechet_distance, psnr, share, ssim
from files import BadFile, read_picture
from report import INK, RIGHT, WRONG, loss_curves, sheet, streams
from runs import changes, load_run
from spar import SPAR


def readable(samples: list[Sample], role: str, side: int, count: int) -> tuple[list[Sample], Tensor]:
    """`count` samples, spread over the keys, whose pictures can be read, and these."""
    kept, pictures = [], []
    for sample in sorted(samples, key=lambda sample: sample.key)[::max(1, len(samples) // count)]:
        try:
            pictures.append(as_tensor(read_picture(sample.has[role]), side, None))
            kept.append(sample)
        except BadFile:
            pass
    return kept[:count], torch.stack(pictures[:count])


def reconstruction(model: SPAR, before: SPAR, pictures: Tensor, mean: Tensor) -> dict:
    copies = model.reconstruct(pictures)
    with torch.no_grad():
        seen, again = (before.tokenizer.features(x).mean(1) for x in (pictures, copies))
    flat = mean.expand_as(pictures)
    return {"psnr": psnr(pictures, copies).mean().item(), "psnr_baseline": psnr(pictures, flat).mean().item(),
            "ssim": ssim(pictures, copies).mean().item(), "ssim_baseline": ssim(pictures, flat).mean().item(),
            "rfd": frechet_distance(seen, again)}


def understanding(model: SPAR, samples: list[Sample], pictures: Tensor, train: list[Sample]) -> dict:
    """Exact match of the greedy answer, question by question; of captions also the share of their words that are said.
    Baseline: training's most frequent answer to that question."""
    usual, table, sums = defaultdict(Counter), {}, defaultdict(list)
    for sample in train:
        for question, answer in sample.said():
            usual[question][answer] += 1
    rows = [(i, *pair) for i, sample in enumerate(samples) for pair in sample.said()]
    said = model.answer(pictures[[i for i, *_ in rows]], [question for _, question, _ in rows], max_new=48)
    for (_, question, answer), reply in zip(rows, said):
        guess = usual[question].most_common(1)[0][0] if usual[question] else ""
        name = "caption" if question == DESCRIBE else question.replace(" ?", "").replace(" ", "_")[:40]
        sums[name].append(reply == answer)
        sums[f"{name}_baseline"].append(guess == answer)
        if name == "caption":
            for key, words in (("caption_words", reply), ("caption_words_baseline", guess)):
                sums[key].append(len(set(answer.split()) & set(words.split())) / len(set(answer.split())))
    table = {key: share(values) for key, values in sums.items()}
    kinds = [key for key in table if not key.endswith("_baseline") and not key.startswith("caption")] or ["caption"]
    return {"overall": share(table[key] for key in kinds), "overall_baseline": share(table[f"{key}_baseline"] for key in kinds)} | table


@torch.no_grad()
def likelihoods(model: SPAR, pictures: Tensor, captions: list[str]) -> Tensor:
    """log p(caption | picture) − log p(caption), `pictures captions`: how much a picture speaks for each caption."""
    words, llm = model.words, model.mllm.llm
    question = words.encode(DESCRIBE)
    ids, _ = words.pad([question + words.encode(text) + [words.eos_id] for text in captions], left=False)
    ids = ids.to(model.device)
    here = (torch.arange(ids.shape[1], device=ids.device) >= len(question)) & (ids != words.pad_id)

    def score(start, f_v=None):
        _, cache = llm(model.mllm.embed(start, f_v))
        hidden, _ = llm(llm.embedding(ids), cache=[(k.expand(len(ids), -1, -1, -1), v.expand(len(ids), -1, -1, -1)) for k, v in cache])
        log_p = llm.logits(hidden[-1][:, :-1]).float().log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
        return (log_p * here[:, 1:]).sum(1)

    start, _ = model.encode_prompts([""], has_image=True)
    alone = score(start[:, :1])
    return torch.stack([score(start, model.tokenizer.features(picture[None])) - alone for picture in tqdm(pictures, desc="retrieval", leave=False)])


def ranks(scores: Tensor, same: Tensor) -> dict:
    """`n n` scores, rows' right columns on the diagonal; columns that are `same` as the right one do not count against it."""
    right = scores.diagonal()[:, None]
    better = ((scores > right) & ~same).sum(1)
    n = len(scores)
    return {"at_1": share((better < 1).tolist()), "at_1_baseline": round(1 / n, 4), "at_5": share((better < 5).tolist()),
            "at_5_baseline": round(min(1, 5 / n), 4), "among": n}


def editing(model: SPAR, samples: list[Sample], side: int, how: Protocol) -> tuple[dict, tuple]:
    """Success: among the picture before and all its true variants, the wanted one is nearest to what was drawn."""
    samples, before = readable(samples, "source", side, how.count)
    after = torch.stack([as_tensor(read_picture(sample.has["target"]), side, None) for sample in samples])
    words, device = [sample.instruction() for sample in samples], model.device
    variants = defaultdict(list)
    for source, target in zip(before, after):
        variants[source.numpy().tobytes()].append(target)
    drawn = model.generate(words, before.to(device), how.seed, how.steps, how.guidance, how.sampler)[0].cpu()
    hits, chances = [], []
    for source, target, picture in zip(before, after, drawn):
        others = [source, *(other for other in variants[source.numpy().tobytes()] if not torch.equal(other, target))]
        errors = [(picture - other).square().mean() for other in (target, *others)]
        hits.append(bool(errors[0] < min(errors[1:])))
        chances.append(1 / len(errors))
    return ({"overall": share(hits), "overall_baseline": 0.0, "overall_chance": share(chances), "psnr": psnr(after, drawn).mean().item(),
             "psnr_baseline": psnr(after, before).clamp(max=60).mean().item(), "of": len(samples)},
            (before, drawn, after, words, hits))


def evaluate(run: Path, device: str = "cpu", how: Protocol = Protocol(count=150)) -> dict:
    """All measures that the finished stages allow, written to results.json, and report/*.png."""
    start = time.time()
    model, before = load_run(run, device), load_run(run, device, upto="P1")
    f, done = model.config, set(model.finished)
    found = look(Path(f.data))
    test, train = (DiskData(found, f.side, f.seed, 0, split, flip=False) for split in ("test", "train"))
    kind = "described" if test.kinds["described"] else "pictures"
    samples, pictures = readable([s for s in test.kinds[kind] if "image" in s.has], "image", f.side, how.count)
    pictures = pictures.to(device)
    mean = train.pictures(range(512)).mean(0).to(device)
    results, sections, few = {}, [], list(range(0, len(samples), max(1, len(samples) // 8)))[:8]
    if done & {"T1", "T2"}:
        results["reconstruction"] = reconstruction(model, before, pictures, mean)
        copies = model.reconstruct(pictures)
        sections.append(("reconstruct: held out, reconstruction", [([pictures[i], copies[i]], "", INK) for i in few[:4]]))
    if "P1" in done and kind == "described":
        results["understanding"] = understanding(model, samples, pictures, train.kinds["described"])
        results["understanding"]["before_t3"] = understanding(before, samples, pictures, train.kinds["described"])["overall"]
        asked = [sample.said()[0] for sample in samples]
        said = model.answer(pictures[few], [asked[i][0] for i in few], max_new=48)
        sections.append(("ask: held out, the model's answer", [([pictures[i]], f"{asked[i][0]} {reply}", RIGHT if reply == asked[i][1] else WRONG)
                                                               for i, reply in zip(few, said)]))
    told, shown = readable(test.kinds["captions"], "image", f.side, 100) if test.kinds["captions"] else ([], pictures)
    captions = [sample.caption() for sample in told]
    if captions and "P1" in done:
        same = torch.tensor([[a == b for b in captions] for a in captions])
        results["retrieval"] = ranks(likelihoods(model, shown.to(device), captions).cpu(), same)
    if captions and "U1" in done:
        drawn = model.generate(captions, None, how.seed, how.steps, how.guidance, how.sampler)[0]
        with torch.no_grad():
            a, b = (F.normalize(before.tokenizer.features(x.to(device)).mean(1), dim=1) for x in (drawn, shown))
        results["generation"] = ranks((a @ b.T).cpu(), same)
        known, their = readable(train.kinds["captions"], "image", f.side, 8)
        names = [sample.caption() for sample in known]
        again = model.generate(names, None, how.seed, how.steps, how.guidance, how.sampler)[0]
        sections.append(("draw a name that training had: glyph, drawn", [([a, b], words, INK) for a, b, words in zip(their, again, names)]))
        few = list(range(0, len(captions), max(1, len(captions) // 8)))[:8]
        sections.append(("draw a name held out: glyph, drawn", [([shown[i], drawn[i]], captions[i], INK) for i in few]))
    if test.kinds["edits"] and "U2" in done:
        results["editing"], (source, edited, target, words, hits) = editing(model, test.kinds["edits"], f.side, how)
        few = list(range(0, len(words), max(1, len(words) // 8)))[:8]
        sections.append(("edit: held out, drawn, wanted", [([source[i], edited[i], target[i]], words[i], RIGHT if hits[i] else WRONG) for i in few]))
    results = {name: {key: round(value, 4) for key, value in table.items()} for name, table in results.items()}
    results = {"eval_id": evaluation_id(run, how), "seed": f.seed, "seconds": round(time.time() - start, 1), "data": f.data,
               "protocol": vars(how)} | results | {"ablation": changes(f)}
    (run / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (run / "report").mkdir(exist_ok=True)
    sheet(sections).save(run / "report" / "summary.png")
    if done & {"T1", "T2"}:
        streams(model, pictures[:8]).save(run / "report" / "streams.png")
    if (run / "log.jsonl").exists():
        loss_curves(run).save(run / "report" / "losses.png")
    return results
