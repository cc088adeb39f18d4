"""Every figure of a run that learned from data on disk, on the samples held out, each beside a trivial baseline.

Reconstruction against the mean picture, answers against the most frequent one, retrieval and drawing against chance,
edits against leaving the picture as it is. Names that end in `_baseline` are these. `model` is the run's, `before` the
same as P1 left it; `how` is an evaluate.Protocol. A table is figure -> value, a section what the report shows of it.
"""

from collections import Counter, defaultdict

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from disk.files import BadFile, read_picture
from disk.reading import DiskData, as_tensor
from disk.samples import DESCRIBE, DataFolder, Sample, Samples, some_of
from parts.metrics import frechet_distance, psnr, share, ssim
from parts.words import Turns, dialogue

USUAL = 20_000  # of training's samples, whose answers tell what is usual
Table = dict[str, float]
Cell = tuple[list[Tensor], str, bool | None]  # pictures side by side, the words under them, whether it is right
Section = tuple[str, list[Cell]]  # its heading, its cells


def measure(model, before, folder: DataFolder, how, figures: bool = True) -> tuple[dict[str, Table], list[Section]]:
    """-> (a table of all that the finished stages allow for each use, sections of pictures). Without `figures` only
    what the sections need is computed: a report while training goes on reads no training sample but eight."""
    config, stages = model.config, set(model.finished_stages)
    test, train = (DiskData(folder, config.side, config.seed, 0, split, mirror="none") for split in ("test", "train"))
    kind = "described" if test.kinds["described"] else "pictures"
    samples, pictures = readable(test.kinds[kind], "image", config.side, how.count)
    pictures, tables, sections = pictures.to(model.device), {}, []
    if stages & {"T1", "T2"}:
        if figures:
            tables["reconstruction"] = reconstruction(model, before, pictures, train)
        sections.append(reconstruction_section(model, pictures))
    if kind == "described":
        if figures:
            tables["understanding"] = understanding(model, samples, pictures, train)
            tables["understanding"]["before_t3"] = understanding(before, samples, pictures, train)["overall"]
        sections.append(answer_section(model, samples, pictures))
    if test.kinds["captions"]:
        samples, pictures = readable(test.kinds["captions"], "image", config.side, 100 if figures else how.count)
        captions = [sample.caption() for sample in samples]
        if figures:
            tables["retrieval"] = retrieval(model, pictures, captions)
        if "U1" in stages:
            sections.append(training_caption_section(model, train, how))
            tables["generation"], section = generation(model, before, pictures, captions, how)
            sections.append(section)
    if test.kinds["edits"] and "U2" in stages:
        tables["editing"], section = editing(model, test.kinds["edits"], config.side, how)
        sections.append(section)
    return {name: {key: round(value, 4) for key, value in table.items()} for name, table in tables.items()}, sections


def readable(samples: Samples, role: str, side: int, count: int) -> tuple[list[Sample], Tensor]:
    """`count` samples, by chance, whose pictures can be read, and these. Raises BadFile for none."""
    sound, pictures = [], []
    for sample in (samples[i] for i in some_of(samples, 2 * count)):
        try:
            pictures.append(as_tensor(read_picture(sample.has[role]), side, None))
            sound.append(sample)
        except (BadFile, KeyError):  # a sample may have no such picture
            pass
    if not sound:
        raise BadFile("no sample is held out to be measured on: put some into a folder named test")
    return sound[:count], torch.stack(pictures[:count])


def evenly_spread(items, count: int = 8) -> list:
    """`count` of the items, from the first on in equal steps."""
    return list(items)[::max(1, len(items) // count)][:count]


def generate(model, prompts: list[str], how, references: Tensor | None = None) -> Tensor:
    return model.generate(prompts, references, how.seed, how.steps, how.guidance, how.sampler)[0]


# ---------------------------------------------------------------- reconstruction


def reconstruction(model, before, pictures: Tensor, train: DiskData) -> Table:
    """Baseline: the mean of 512 of training's pictures. `rfd`: Fréchet distance on features of P1's encoder."""
    copies = model.reconstruct(pictures)
    with torch.no_grad():
        features, of_copies = (before.tokenizer.features(x).mean(1) for x in (pictures, copies))
    mean = train.pictures(range(512)).mean(0).to(pictures.device).expand_as(pictures)
    table = {"psnr": psnr(pictures, copies).mean().item(), "psnr_baseline": psnr(pictures, mean).mean().item(),
             "ssim": ssim(pictures, copies).mean().item(), "ssim_baseline": ssim(pictures, mean).mean().item()}
    return table | {"rfd": frechet_distance(features, of_copies)} if len(pictures) > 1 else table  # one has no spread


def reconstruction_section(model, pictures: Tensor) -> Section:
    pairs = evenly_spread(list(zip(pictures, model.reconstruct(pictures))), 4)
    return "reconstruct: held out, reconstruction", [([picture, copy], "", None) for picture, copy in pairs]


# ---------------------------------------------------------------- answers


def understanding(model, samples: list[Sample], pictures: Tensor, train: DiskData) -> Table:
    """Exact match of the greedy answer, question by question; of captions also the share of their words that are said.
    Baseline: training's most frequent answer to that question."""
    usual, scores = defaultdict(Counter), defaultdict(list)
    for i in sorted(some_of(train.kinds["described"], USUAL)):
        for question, answer in train.kinds["described"][i].turns_and_caption():
            usual[question][answer] += 1
    rows = [(i, *pair) for i, sample in enumerate(samples) for pair in sample.turns_and_caption()]
    replies = model.answer(pictures[[i for i, *_ in rows]], [question for _, question, _ in rows], max_new=48)
    for (_, question, answer), reply in zip(rows, replies):
        guess = usual[question].most_common(1)[0][0] if usual[question] else ""
        name = "caption" if question == DESCRIBE else question.replace(" ?", "").replace(" ", "_")[:40]
        scores[name].append(reply == answer)
        scores[f"{name}_baseline"].append(guess == answer)
        if name == "caption":
            scores["caption_words"].append(share_of_words(answer, reply))
            scores["caption_words_baseline"].append(share_of_words(answer, guess))
    table = {key: share(values) for key, values in scores.items()}
    kinds = [key for key in table if not key.endswith("_baseline") and not key.startswith("caption")] or ["caption"]
    baseline = share(table[f"{key}_baseline"] for key in kinds)
    return {"overall": share(table[key] for key in kinds), "overall_baseline": baseline} | table


def share_of_words(answer: str, reply: str) -> float:
    """Of the answer's different words those that the reply has, in any order."""
    wanted = set(answer.split())
    return len(wanted & set(reply.split())) / len(wanted)


def answer_section(model, samples: list[Sample], pictures: Tensor) -> Section:
    rows = evenly_spread(list(zip(samples, pictures)))
    turns = [sample.turns_and_caption()[0] for sample, _ in rows]
    pictures = torch.stack([picture for _, picture in rows])
    replies = model.answer(pictures, [question for question, _ in turns], max_new=48)
    cells = [([picture], f"{question} {reply}", reply == answer)
             for picture, (question, answer), reply in zip(pictures, turns, replies)]
    return "ask: held out, the model's answer", cells


# ---------------------------------------------------------------- retrieval


def retrieval(model, pictures: Tensor, captions: list[str]) -> Table:
    """Of all captions, is a picture's own the one that it speaks for most?"""
    return ranks(likelihoods(model, pictures.to(model.device), captions).cpu(), equal_captions(captions))


@torch.no_grad()
def likelihoods(model, pictures: Tensor, captions: list[str]) -> Tensor:
    """log p(caption | picture) − log p(caption), `pictures captions`: how much a picture speaks for each caption."""
    turns = dialogue(model.words, [("", text) for text in captions], [0] * len(captions))
    turns = Turns(*(part if part is None else part.to(model.device) for part in turns))

    def score(f_v=None):
        start, _ = model.encode_prompts([DESCRIBE], has_image=f_v is not None)
        losses = model.mllm.text_losses(turns, model.mllm.read_prefix(start, f_v))
        return losses.new_zeros(len(captions)).index_add(0, turns.rows, -losses)

    alone, pictures = score(), tqdm(pictures, desc="retrieval", leave=False)
    return torch.stack([score(model.tokenizer.features(picture[None])) - alone for picture in pictures])


def equal_captions(captions: list[str]) -> Tensor:
    """`n n`, true where two captions are the same."""
    return torch.tensor([[a == b for b in captions] for a in captions])


def ranks(scores: Tensor, same: Tensor) -> Table:
    """`n n` scores, rows' right columns on the diagonal; columns that are `same` as the right one do not count against
    it. Baseline: chance."""
    right, n = scores.diagonal()[:, None], len(scores)
    better = ((scores > right) & ~same).sum(1)
    return {"at_1": share((better < 1).tolist()), "at_1_baseline": round(1 / n, 4),
            "at_5": share((better < 5).tolist()), "at_5_baseline": round(min(1, 5 / n), 4), "among": n}


# ---------------------------------------------------------------- drawing and editing


def generation(model, before, pictures: Tensor, captions: list[str], how) -> tuple[Table, Section]:
    """Of all captions' pictures, is a caption's own the nearest to what it made the model draw? By P1's features."""
    results = generate(model, captions, how)
    with torch.no_grad():
        features = [before.tokenizer.features(x.to(model.device)).mean(1) for x in (results, pictures)]
    a, b = (F.normalize(x, dim=1) for x in features)
    cells = [([pictures[i], results[i]], captions[i], None) for i in evenly_spread(range(len(captions)))]
    return ranks((a @ b.T).cpu(), equal_captions(captions)), ("draw a caption held out: its picture, drawn", cells)


def training_caption_section(model, train: DiskData, how) -> Section:
    samples, pictures = readable(train.kinds["captions"], "image", model.config.side, 8)
    captions = [sample.caption() for sample in samples]
    rows = zip(pictures, generate(model, captions, how), captions)
    return "draw a caption that training had: its picture, drawn", [([a, b], text, None) for a, b, text in rows]


def editing(model, samples: list[Sample], side: int, how) -> tuple[Table, Section]:
    """Success: among the picture before and all its true variants, the wanted one is nearest to what was drawn."""
    samples, before = readable(samples, "source", side, how.count)
    after = torch.stack([as_tensor(read_picture(sample.has["target"]), side, None) for sample in samples])
    words = [sample.instruction() for sample in samples]
    results = generate(model, words, how, before.to(model.device)).cpu()
    variants = defaultdict(list)  # picture before -> all pictures that an edit makes of it
    for source, target in zip(before, after):
        variants[source.numpy().tobytes()].append(target)
    hits, chances = [], []
    for source, target, result in zip(before, after, results):
        others = [source, *(x for x in variants[source.numpy().tobytes()] if not torch.equal(x, target))]
        errors = [(result - other).square().mean() for other in (target, *others)]
        hits.append(bool(errors[0] < min(errors[1:])))
        chances.append(1 / len(errors))
    table = {"overall": share(hits), "overall_baseline": 0.0, "overall_chance": share(chances), "of": len(samples),
             "psnr": psnr(after, results).mean().item(),
             "psnr_baseline": psnr(after, before).clamp(max=60).mean().item()}  # infinite where an edit changes nothing
    cells = [([source, result, target], text, hit)
             for source, result, target, text, hit in zip(before, results, after, words, hits)]
    return table, ("edit: held out, drawn, wanted", evenly_spread(cells))
