"""Every figure of a run that learned from data on disk, on the samples held out, each beside a trivial baseline.

Reconstruction against the mean picture, answers against the most frequent one, retrieval and drawing against chance, edits
against leaving the picture as it is. Names that end in `_baseline` are these. `how` is an evaluate.Protocol.
"""

from collections import Counter, defaultdict

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from disk.files import BadFile, read_picture
from disk.layouts import DESCRIBE, DataFolder, Sample
from disk.reading import DiskData, as_tensor
from parts.metrics import frechet_distance, psnr, share, ssim

Cell = tuple[list[Tensor], str, bool | None]  # pictures side by side, the words under them, whether it is right


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


def reconstruction(model, before, pictures: Tensor, mean: Tensor) -> dict:
    copies = model.reconstruct(pictures)
    with torch.no_grad():
        features, of_copies = (before.tokenizer.features(x).mean(1) for x in (pictures, copies))
    flat = mean.expand_as(pictures)
    return {"psnr": psnr(pictures, copies).mean().item(), "psnr_baseline": psnr(pictures, flat).mean().item(),
            "ssim": ssim(pictures, copies).mean().item(), "ssim_baseline": ssim(pictures, flat).mean().item(),
            "rfd": frechet_distance(features, of_copies)}


def understanding(model, samples: list[Sample], pictures: Tensor, train: list[Sample]) -> dict:
    """Exact match of the greedy answer, question by question; of captions also the share of their words that are said.
    Baseline: training's most frequent answer to that question."""
    usual, table, sums = defaultdict(Counter), {}, defaultdict(list)
    for sample in train:
        for question, answer in sample.turns_and_caption():
            usual[question][answer] += 1
    rows = [(i, *pair) for i, sample in enumerate(samples) for pair in sample.turns_and_caption()]
    replies = model.answer(pictures[[i for i, *_ in rows]], [question for _, question, _ in rows], max_new=48)
    for (_, question, answer), reply in zip(rows, replies):
        guess = usual[question].most_common(1)[0][0] if usual[question] else ""
        name = "caption" if question == DESCRIBE else question.replace(" ?", "").replace(" ", "_")[:40]
        sums[name].append(reply == answer)
        sums[f"{name}_baseline"].append(guess == answer)
        if name == "caption":
            for key, words in (("caption_words", reply), ("caption_words_baseline", guess)):
                sums[key].append(len(set(answer.split()) & set(words.split())) / len(set(answer.split())))
    table = {key: share(values) for key, values in sums.items()}
    kinds = [key for key in table if not key.endswith("_baseline") and not key.startswith("caption")] or ["caption"]
    baseline = share(table[f"{key}_baseline"] for key in kinds)
    return {"overall": share(table[key] for key in kinds), "overall_baseline": baseline} | table


@torch.no_grad()
def likelihoods(model, pictures: Tensor, captions: list[str]) -> Tensor:
    """log p(caption | picture) − log p(caption), `pictures captions`: how much a picture speaks for each caption."""
    words, llm = model.words, model.mllm.llm
    question = words.encode(DESCRIBE)
    ids, _ = words.pad([question + words.encode(text) + [words.eos_id] for text in captions], left=False)
    ids = ids.to(model.device)
    answers = (torch.arange(ids.shape[1], device=ids.device) >= len(question)) & (ids != words.pad_id)

    def score(start, f_v=None):
        cache = model.mllm.read_prefix(start, f_v).cache
        rows = len(ids), -1, -1, -1
        hidden, _ = llm(llm.embedding(ids), cache=[(k.expand(rows), v.expand(rows)) for k, v in cache])
        log_p = llm.logits(hidden[-1][:, :-1]).float().log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
        return (log_p * answers[:, 1:]).sum(1)

    start, _ = model.encode_prompts([""], has_image=True)
    alone = score(start[:, :1])
    pictures = tqdm(pictures, desc="retrieval", leave=False)
    return torch.stack([score(start, model.tokenizer.features(picture[None])) - alone for picture in pictures])


def ranks(scores: Tensor, same: Tensor) -> dict:
    """`n n` scores, rows' right columns on the diagonal; columns that are `same` as the right one do not count against it."""
    right = scores.diagonal()[:, None]
    better = ((scores > right) & ~same).sum(1)
    n = len(scores)
    return {"at_1": share((better < 1).tolist()), "at_1_baseline": round(1 / n, 4), "at_5": share((better < 5).tolist()),
            "at_5_baseline": round(min(1, 5 / n), 4), "among": n}


def editing(model, samples: list[Sample], side: int, how) -> tuple[dict, list[Cell]]:
    """Success: among the picture before and all its true variants, the wanted one is nearest to what was drawn."""
    samples, before = readable(samples, "source", side, how.count)
    after = torch.stack([as_tensor(read_picture(sample.has["target"]), side, None) for sample in samples])
    words, device = [sample.instruction() for sample in samples], model.device
    variants = defaultdict(list)
    for source, target in zip(before, after):
        variants[source.numpy().tobytes()].append(target)
    drawn = generate(model, words, how, before.to(device)).cpu()
    hits, chances = [], []
    for source, target, picture in zip(before, after, drawn):
        others = [source, *(other for other in variants[source.numpy().tobytes()] if not torch.equal(other, target))]
        errors = [(picture - other).square().mean() for other in (target, *others)]
        hits.append(bool(errors[0] < min(errors[1:])))
        chances.append(1 / len(errors))
    table = {"overall": share(hits), "overall_baseline": 0.0, "overall_chance": share(chances), "of": len(samples),
             "psnr": psnr(after, drawn).mean().item(), "psnr_baseline": psnr(after, before).clamp(max=60).mean().item()}
    return table, [(list(row), text, hit) for *row, text, hit in zip(before, drawn, after, words, hits)]


def few(items, count: int = 8) -> list:
    """`count` of them, evenly spread."""
    return list(items)[::max(1, len(items) // count)][:count]


def measure(model, before, found: DataFolder, how) -> tuple[dict[str, dict], list[tuple[str, list[Cell]]]]:
    """-> (tables of all that the finished stages allow, sections of pictures). `before`: the model as P1 left it."""
    config, done = model.config, set(model.finished_stages)
    test, train = (DiskData(found, config.side, config.seed, 0, split, flip=False) for split in ("test", "train"))
    kind = "described" if test.kinds["described"] else "pictures"
    samples, pictures = readable([s for s in test.kinds[kind] if "image" in s.has], "image", config.side, how.count)
    pictures, tables, sections = pictures.to(model.device), {}, []
    if done & {"T1", "T2"}:
        mean = train.pictures(range(512)).mean(0).to(model.device)
        tables["reconstruction"] = reconstruction(model, before, pictures, mean)
        pairs = few(list(zip(pictures, model.reconstruct(pictures))), 4)
        sections.append(("reconstruct: held out, reconstruction", [([a, b], "", None) for a, b in pairs]))
    if kind == "described":
        tables["understanding"] = understanding(model, samples, pictures, train.kinds["described"])
        tables["understanding"]["before_t3"] = understanding(before, samples, pictures, train.kinds["described"])["overall"]
        chosen = few(list(zip(samples, pictures)))
        turns = [sample.turns_and_caption()[0] for sample, _ in chosen]
        replies = model.answer(torch.stack([picture for _, picture in chosen]), [question for question, _ in turns], max_new=48)
        sections.append(("ask: held out, the model's answer", [
            ([picture], f"{question} {reply}", reply == answer)
            for (_, picture), (question, answer), reply in zip(chosen, turns, replies)]))
    if test.kinds["captions"]:
        captioned, shown = readable(test.kinds["captions"], "image", config.side, 100)
        captions = [sample.caption() for sample in captioned]
        same = torch.tensor([[a == b for b in captions] for a in captions])
        tables["retrieval"] = ranks(likelihoods(model, shown.to(model.device), captions).cpu(), same)
        if "U1" in done:
            drawn = generate(model, captions, how)
            with torch.no_grad():
                a, b = (F.normalize(before.tokenizer.features(x.to(model.device)).mean(1), dim=1) for x in (drawn, shown))
            tables["generation"] = ranks((a @ b.T).cpu(), same)
            known, theirs = readable(train.kinds["captions"], "image", config.side, 8)
            names = [sample.caption() for sample in known]
            sections.append(("draw a caption that training had: its picture, drawn",
                             [([a, b], text, None) for a, b, text in zip(theirs, generate(model, names, how), names)]))
            sections.append(("draw a caption held out: its picture, drawn",
                             [([shown[i], drawn[i]], captions[i], None) for i in few(range(len(captions)))]))
    if test.kinds["edits"] and "U2" in done:
        tables["editing"], cells = editing(model, test.kinds["edits"], config.side, how)
        sections.append(("edit: held out, drawn, wanted", few(cells)))
    return {name: {key: round(value, 4) for key, value in table.items()} for name, table in tables.items()}, sections


def generate(model, prompts: list[str], how, references: Tensor | None = None) -> Tensor:
    return model.generate(prompts, references, how.seed, how.steps, how.guidance, how.sampler)[0]
