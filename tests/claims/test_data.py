"""The drawn world keeps its promises: same index, same bits; and its words are true of its pictures."""

import itertools
import random
import re
from collections import Counter
from dataclasses import fields, replace

import pytest
import torch

from data import Batches, language_batch, of_like_length, text_to_image_batch
from parts.words import TEXT_LOSSES, Turns
from plumbing.run_folder import build
from spar import Config
from tests.tools.limits import objects_said
from world import language
from world.language import (FACTS, MADE_UP, PROMPT_KINDS, QUESTION_KINDS, WORDS, DrawnWorld, caption, dressed,
                            grounding, prompt, question, twin, with_made_up_words)
from world.judge import fulfils
from world.drawing import (COLOURS, FACT_WORDS, HELD_OUT_PAIRS, NUMBERS, PAIRS, PLACES, SHAPES, Background, Object,
                           Scene, draw)
from world.scenes import (UNTAUGHT, all_combinations, implied, may_meet, options, position, random_scene,
                          repeated_scene)

KINDS_OF_SAMPLE = ("pictures", "conversations", "prompts", "texts", "edits")
PLAIN_NAMES = {(1.0, 1.0, 1.0): "white", (0.55, 0.55, 0.55): "gray", (0.05, 0.05, 0.05): "black"}
PLURALS = {"circles": "circle", "squares": "square", "triangles": "triangle", "crosses": "cross"}


def ask(world, what, indices):
    """One comparable thing per index, pictures as bytes."""
    got = getattr(world, what)(indices)
    if what == "conversations":
        return [(picture.numpy().tobytes(), talk) for picture, talk in zip(*got)]
    return [picture.numpy().tobytes() for picture in got] if what == "pictures" else got


def some_scenes(count):
    rngs = [random.Random(f"test {i}") for i in range(count)]
    return [(repeated_scene(rng, rng.randint(2, 3)) if i % 6 == 0 else random_scene(rng), rng)
            for i, rng in enumerate(rngs)]


def said_pairs(text):
    """Every colour × shape pair that the words tell, told facts and plurals undone."""
    text = re.sub(r"(\w+) in the colour of (\w+)", lambda m: f"{FACTS[m[2]]} {m[1]}", text)
    text = re.sub(r"object shaped like a (\w+)", lambda m: FACTS[m[1]], text)
    words = [PLURALS.get(word, word) for word in text.split()]
    return {(a, b) for a, b in zip(words, words[1:]) if a in COLOURS and b in SHAPES}


def pairs_of(*scenes):
    return {(thing.colour, thing.shape) for scene in scenes for thing in scene.objects}


@pytest.mark.parametrize("what", KINDS_OF_SAMPLE)
def test_the_same_index_gives_the_same_bits_in_any_order(what):
    first = ask(DrawnWorld(seed=3, epoch=1), what, list(range(24)))
    random.seed(9)  # neither global generator has a say
    torch.manual_seed(9)
    order = random.Random(0).sample(range(24), 24)
    again = ask(DrawnWorld(seed=3, epoch=1), what, order)
    assert again == [first[i] for i in order]
    assert ask(DrawnWorld(seed=3, epoch=1), what, [7]) == [first[7]]


@pytest.mark.parametrize("what", KINDS_OF_SAMPLE)
def test_another_seed_split_epoch_or_index_gives_others(what):
    indices = list(range(24))
    first = ask(DrawnWorld(), what, indices)
    others = [ask(DrawnWorld(**key), what, indices) for key in ({"seed": 1}, {"split": "test"}, {"epoch": 1})]
    for other in [*others, ask(DrawnWorld(), what, range(100, 124))]:
        assert sum(a != b for a, b in zip(first, other)) > 20


def test_no_training_picture_text_prompt_or_edit_has_a_held_out_pair(monkeypatch):
    drawn = []
    nothing = lambda scenes, side=32: drawn.extend(scenes) or torch.zeros(len(scenes), 3, 1, 1)
    monkeypatch.setattr(language, "draw", nothing)
    world, indices = DrawnWorld(), range(3000)
    world.pictures(indices)
    _, talks = world.conversations(indices)
    prompts = [p for kind in ("", "knowledge") for p in world.prompts(indices, kind)]
    edits, twins = world.edits(indices), [twin(world.scene(i), random.Random(i))[0] for i in indices]
    texts = [" ".join(pair) for talk in talks for pair in talk] + [" ".join(pair) for pair in world.texts(indices)]
    texts += [p.text for p in prompts] + [e.instruction for e in edits]
    scenes = drawn + twins + [p.scene for p in prompts] + [s for e in edits for s in (e.source, e.target)]
    assert pairs_of(*scenes) == set(PAIRS) == set().union(*map(said_pairs, texts))  # all others do occur
    assert len(drawn) == 6000 and not HELD_OUT_PAIRS & set(PAIRS)


@pytest.mark.parametrize("kind", (*PROMPT_KINDS, "full", "part", "knowledge"))
def test_prompts_of_held_out_pairs_have_only_those(kind):
    requests = [prompt(kind, random.Random(i), tuple(HELD_OUT_PAIRS), taught=False) for i in range(200)]
    assert pairs_of(*(r.scene for r in requests)) == HELD_OUT_PAIRS
    assert set().union(*(said_pairs(r.text) for r in requests)) <= HELD_OUT_PAIRS
    assert {r.kind for r in requests} == {kind}


def test_every_word_is_in_the_vocabulary_and_none_is_there_twice():
    world, indices = DrawnWorld(), range(1500)
    texts = [text for talk in world.conversations(indices)[1] for pair in talk for text in pair]
    texts += [text for pair in world.texts(indices) for text in pair] + [e.instruction for e in world.edits(indices)]
    texts += [p.text for kind in ("", "knowledge") for p in world.prompts(indices, kind)]
    assert {word for text in texts for word in text.split(" ")} <= set(WORDS) and len(WORDS) == len(set(WORDS))


@pytest.mark.parametrize("side", (32, 56))
def test_pictures_lie_between_minus_one_and_one(side):
    pictures = DrawnWorld(side).pictures(range(300))
    assert pictures.shape == (300, 3, side, side) and pictures.dtype == torch.float32
    assert pictures.min() >= -1 and pictures.max() <= 1 and pictures.min() < -0.8 and pictures.max() > 0.8


def test_facts_that_no_caption_tells_change_the_pixels_and_not_the_caption():
    thing, ground = Object("triangle", "red", "large", 1), Background((0.8, 0.7, 0.8), 0.05, 0.3, 2.0, 1.0)
    scene = Scene((thing,), ground)
    grounds = [{"tint": (0.7, 0.7, 0.8)}, {"amplitude": 0.1}, {"angle": 1.0}, {"cycles": 3.0}, {"phase": 2.0}]
    others = [replace(scene, background=replace(ground, **change)) for change in grounds]
    others += [scene.with_objects([replace(thing, **change)]) for change in ({"offset": (0.5, 0)}, {"turn": 0.2})]
    for other in others:
        assert caption(other.objects) == caption(scene.objects) == "a large red triangle top-right"
        assert (draw([other]) - draw([scene])).abs().max() > 0.05


def right_answers(scene, text):
    """Every right answer, read off the words and the scene without world/language.py's own reading."""
    things, words = scene.objects, text.split()

    def named(label):  # "green", "circle", "object", "top-left" in any order
        return [t for t in things if all(word in ("object", t.colour, t.shape, PLACES[t.place]) for word in label)]

    if found := re.fullmatch(r"what (colour|shape|size) is the (.+)", text):
        return [getattr(t, found[1]) for t in named(found[2].split())]
    if found := re.fullmatch(r"where is the (.+)", text):
        return [PLACES[t.place] for t in named(found[1].split())]
    if found := re.fullmatch(r"how many (\w+) are there", text):
        return [NUMBERS[sum(found[1] in ("objects", t.shape + "s", t.shape + "es") for t in things)]]
    if found := re.fullmatch(r"which way is the (.+) from the (.+)", text):
        (first,), (second,) = (named(label.split()) for label in found.groups())
        (up, side), (other_up, other_side) = (PLACES[t.place].split("-") for t in (first, second))
        words = [side] * (side != other_side) + [{"top": "above", "bottom": "below"}[up]] * (up != other_up)
        return [f"{PLACES[first.place]} , {PLACES[second.place]} , {' '.join(words)}"]
    if " and " in text:
        return [" and ".join(answer for part in text.split(" and ") for answer in right_answers(scene, part))]
    if found := re.fullmatch(r"how is the (picture|background)", text):
        return [scene.style if found[1] == "picture" else PLAIN_NAMES.get(scene.background.tint, "")]
    of_the_whole = words[0] == "add" or words[2] in ("background", "picture")
    return [what_changes(words, t) for t in things if of_the_whole
            or f"the {t.colour} {t.shape}" in text][:1 if of_the_whole else 3]


def what_changes(words, thing):
    """The answer to an instruction that names `thing`, read off its words."""
    told = {"size": thing.size, "colour": thing.colour, "shape": thing.shape, "place": PLACES[thing.place]}
    if words[0] == "add":
        return f"{words[-1]} , {' '.join(words[1:])}"
    if words[2] in ("background", "picture"):
        return f"{words[2]} , {words[3]}"
    if words[0] == "remove":
        return told["place"]
    new = dict(told)
    if words[0] == "make":
        new["size" if words[-1] in ("small", "large") else "colour"] = words[-1]
    if words[0] == "replace":
        new["colour"], new["shape"] = words[-2:]
    if words[0] == "move":
        new["place"] = words[-1]
    return f"{told['place']} , a {' '.join(new.values())}"


@pytest.mark.parametrize("kind", QUESTION_KINDS)
def test_a_question_has_exactly_one_right_answer(kind):
    scenes = [(dressed(scene, rng), rng) for scene, rng in some_scenes(3000 if kind == "appearance" else 1500)]
    asked = [(scene, question(scene, kind, rng)) for scene, rng in scenes]
    asked = [(scene, *pair) for scene, pair in asked if pair]
    assert len(asked) > 600
    for scene, text, answer in asked:
        assert right_answers(scene, text) == [answer], (text, caption(scene.objects))


def test_no_answer_to_a_relation_is_given_much_more_often_than_another():
    asked = [question(scene, "relation", rng) for scene, rng in some_scenes(4000)]
    counts = Counter(pair[1].split(" , ")[2] for pair in asked if pair)
    assert len(counts) == 8 and max(counts.values()) < 0.2 * sum(counts.values())


def test_an_instruction_as_a_question_is_answered_by_what_it_changes_and_into_what():
    asked = [(scene, grounding(scene, rng)) for scene, rng in some_scenes(1500)]
    asked = [(scene, *pair) for scene, pair in asked if pair]
    assert len(asked) > 1000 and sum(" and " in text for _, text, _ in asked) > 50
    assert {text.split()[0] for _, text, _ in asked} == {"add", "make", "extract", "replace", "remove", "move"}
    for scene, text, answer in asked:
        assert right_answers(scene, text) == [answer], (text, caption(scene.objects))


def test_a_conversation_is_about_its_picture_and_ends_with_the_caption():
    world = DrawnWorld()
    pictures, talks = world.conversations(range(100))
    assert torch.equal(pictures, draw([world.styled_scene(i) for i in range(100)]))
    assert 10 < sum(world.styled_scene(i) != world.scene(i) for i in range(100)) < 40
    for i, talk in enumerate(talks):
        assert all(right_answers(world.styled_scene(i), text) == [answer] for text, answer in talk[:-1])
        told = [f"a {t.size} {t.colour} {t.shape} {PLACES[t.place]}" for t in world.scene(i).objects]
        assert talk[-1] == ("describe the picture", " , ".join(told))


def test_a_twin_differs_in_one_fact_and_in_the_answer():
    kinds = set()
    for scene, rng in some_scenes(600):
        second, text, answer, other = twin(scene, rng)
        changed = [(a, b) for a, b in zip(scene.objects, second.objects) if a != b]
        (a, b), = changed
        differing = [f.name for f in fields(a) if getattr(a, f.name) != getattr(b, f.name)]
        assert len(scene.objects) == len(second.objects) and second.background == scene.background
        assert differing == [text.split()[1]] and answer != other
        assert right_answers(scene, text) == [answer] and right_answers(second, text) == [other]
        kinds |= set(differing)
    assert kinds == {"colour", "shape", "size"}


def test_facts_told_in_words_alone_are_never_shown():
    world, indices = DrawnWorld(), range(1500)
    shown = [text for talk in world.conversations(indices)[1] for pair in talk for text in pair]
    shown += [p.text for kind in ("", "full", *PROMPT_KINDS) for p in world.prompts(indices, kind)]
    shown += [e.instruction for e in world.edits(indices)]
    told = [given for given, _ in world.texts(indices)] + [p.text for p in world.prompts(indices, "knowledge")]
    assert not {word for text in shown for word in text.split()} & set(FACTS)
    assert all(set(p.text.split()) & set(FACTS) for p in world.prompts(indices, "knowledge"))
    assert {word for text in told for word in text.split()} >= set(FACTS)


@pytest.mark.parametrize("kind", (*PROMPT_KINDS, "full", "part", "knowledge"))
def test_a_request_is_fulfilled_by_its_scene_and_by_what_it_is_written_out_as(kind):
    for request in DrawnWorld().prompts(range(300), kind):
        written = objects_said(caption(request.things))
        assert fulfils(written, request) and fulfils(list(request.scene.objects), request)
        assert all(wish in ("", None, fact) for thing, wanted in zip(written, request.wanted)
                   for wish, fact in zip(wanted.facts, thing.facts))  # in the order of the words
        assert {thing.facts for thing in written} == {thing.facts for thing in request.scene.objects}


def test_a_text_without_a_picture_is_a_fact_or_a_request_written_out():
    kinds = Counter()
    for given, answer in DrawnWorld().texts(range(1500)):
        if found := re.fullmatch(r"what (colour|shape) is (\w+)", given):
            assert FACTS[found[2]] == answer and (answer in COLOURS) == (found[1] == "colour")
            kinds["fact"] += 1
            continue
        if set(answer.split()) & set(MADE_UP):
            kinds["made up"] += 1
            continue
        things = objects_said(answer)
        assert given.startswith("describe ") and 1 <= len(things) <= 3
        assert {thing.place for thing in things} and len({thing.place for thing in things}) == len(things)
        kinds["copied"] += given == f"describe {answer}"
    assert kinds["fact"] > 100 and kinds["copied"] > 50 and 300 < kinds["made up"] < 600


def test_made_up_words_stand_for_the_same_facts_in_both_texts_and_nothing_else_changes():
    for i in range(500):
        rng = random.Random(i)
        request = prompt(rng.choice(("single", "part", "two", "position", "counting", "knowledge")), rng)
        texts = request.text, caption(request.things)
        changed = with_made_up_words(*texts, rng)
        new = {a: b for before, after in zip(texts, changed) for a, b in zip(before.split(), after.split()) if a != b}
        assert changed == tuple(" ".join(new.get(word, word) for word in text.split()) for text in texts)
        assert len(set(new.values())) == len(new) and set(new.values()) <= set(MADE_UP)
        facts = {word for words in FACT_WORDS.values() for word in words}
        assert set(new) <= facts & set(texts[0].split()) & set(texts[1].split())
        assert new or request.kind in ("part", "counting", "knowledge")


def test_texts_of_like_length_stand_together_and_none_is_lost():
    rng = random.Random(0)
    for count in (0, 1, 2, 3, 50):
        rows = sorted((rng.randrange(5, 40), i) for i in range(count))
        groups = of_like_length(rows)
        assert [row for group in groups for row in group] == rows and all(groups) and len(groups) <= 4
        padded = sum(len(group) * group[-1][0] for group in of_like_length(rows, 1))
        assert all(i * rows[i - 1][0] + (count - i) * rows[-1][0] >= padded for i in range(1, count))
    real = {kind: 0 for kind in TEXT_LOSSES}
    batch = Batches(Config(), "P1", language_batch, {})[0]
    turns = [part for part in batch.values() if isinstance(part, Turns)]
    for part in turns:
        assert (part.ids[part.rows, part.columns] > 0).all() and part.kind.shape == part.rows.shape
        for kind, symbol in enumerate(TEXT_LOSSES):
            real[symbol] += (part.kind == kind).sum().item()
            alone = part.owner[part.rows[part.kind == kind]] == len(batch["images"])
            assert (alone == (symbol == "L_text")).all()  # behind <bos> alone
    source = Batches(Config(), "P1", language_batch, {})
    _, talks, captions = source.world.dialogue_samples(range(24))
    words = lambda pairs: sum(len(source.words.encode(answer)) + 1 for _, answer in pairs)
    assert real == {"L_lm": words(pair for talk in talks for pair in talk), "L_caption": words(captions),
                    "L_text": words(source.world.texts(range(48)))}  # two for each picture


def test_a_request_is_the_same_ids_where_p1_writes_it_out_where_training_draws_it_and_in_use(tiny, monkeypatch):
    source, model, read = Batches(tiny(), "P3", text_to_image_batch, {"captions": 0.5}), build(tiny(), "cpu"), []
    unspied = model.mllm.condition
    monkeypatch.setattr(model.mllm, "condition", lambda ids, *rest: read.append(ids[0].tolist()) or unspied(ids, *rest))
    requests = [given for given, _ in source.world.texts(range(60)) if given.startswith("describe ")]
    for given in requests:
        text, in_p1 = given.removeprefix("describe "), [source.words.bos_id, *source.words.encode(given)]
        read.clear()
        model.generate([text], steps=1)
        assert in_p1 == source.prompts([text])[0][0].tolist() == read[0]
    assert len(requests) > 40


# ---------------------------------------------------------------- what no training text says

EVERY = all_combinations()
WHAT = re.compile(r"(?:(large|small) )?(?:(red|green|blue|yellow|purple|orange) )?"
                  r"(circle|square|triangle|cross)s?(?:es)?(?: ((?:top|bottom)-(?:left|right)))?\b")


def read_from(text):
    """Every combination that the words of one sentence imply, read without world/language.py's own reading. What an
    instruction names and what comes of it are two sentences: they are never in one picture."""
    text, combinations = re.sub(r"\breplace (.+) with ", "", text), set()  # what goes is not beside the new
    spoken = [match.groups() for match in WHAT.finditer(text)]
    for size, colour, shape, place in spoken:
        combinations |= {("single", size, shape, place)} if size and place else set()
        combinations |= {("colours", size, colour, shape)} if size and colour else set()
    for (s1, c1, a, p1), (s2, c2, b, p2) in itertools.combinations(spoken, 2):
        combinations |= {("two", *sorted((f"{s1} {a}", f"{s2} {b}")))} if s1 and s2 else set()
        combinations |= {("binding", *sorted((f"{c1} {a}", f"{c2} {b}")))} if c1 and c2 else set()
        for first, second, one, other in ((a, b, p1, p2), (b, a, p2, p1)):
            if one and other and first != second:
                combinations |= {("position", first, "left", second)} if "left" in one and "right" in other else set()
                combinations |= {("position", first, "above", second)} if "top" in one and "bottom" in other else set()
    for number, colour, shapes in re.findall(r"(two|three) (\w+) (\w+s)\b", text):
        combinations |= {("counting", number, colour, PLURALS[shapes])} if shapes in PLURALS else set()
    relations = r"(\w+) (left of|right of|above|below) an? (?:\w+ )?(\w+)"
    for first, relation, second in re.findall(relations, text):
        combinations.add(position(first, relation.split()[0], second))
    for other, word in re.findall(r"(\w+) in the colour of (\w+)", text):
        combinations.add(("knowledge", word, other))
    for other, word in re.findall(r"(\w+) object shaped like a (\w+)", text):
        combinations.add(("knowledge", word, other))
    return combinations & {one for every in EVERY.values() for one in every}


def test_one_combination_in_five_is_untaught_and_every_word_is_taught_beside_every_other():
    for kind, every in EVERY.items():
        hidden = [one for one in every if one in UNTAUGHT]
        assert 0.15 <= len(hidden) / len(every) <= 0.2, kind
        words = Counter(word for one in every for word in one[1:])
        assert all(sum(word in one for one in hidden) <= 0.5 * count for word, count in words.items()), kind


def test_the_whole_support_of_scenes_implies_no_untaught_combination():
    """Every object, every pair and every repeated set that `random_scene` and `repeated_scene` can choose from."""
    things = [thing for place in range(4) for thing in options(place, tuple(PAIRS), True)]
    pairs = [(a, b) for a, b in itertools.combinations(things, 2) if a.place != b.place and may_meet(a, b)]
    assert len(things) > 80 and len(pairs) > 500
    said = set().union(*(implied(pair) - {one for one in implied(pair) if one[0] == "counting"} for pair in pairs))
    assert not said & UNTAUGHT
    for kind in ("single", "colours", "two", "binding", "position"):  # nearly all of the rest can be shown
        assert len([one for one in EVERY[kind] if one in said]) >= 0.6 * len(EVERY[kind])
    scenes = [repeated_scene(random.Random(i), 2 + i % 2) for i in range(2000)]
    assert not set().union(*(implied(scene.objects) for scene in scenes)) & UNTAUGHT


def training_texts(count):
    world = DrawnWorld()
    yield from (text for talk in world.conversations(range(count))[1] for pair in talk for text in pair)
    yield from (text for pair in world.texts(range(3 * count)) for text in pair)
    yield from (request.text for request in world.prompts(range(2 * count)))
    yield from (text for edit in world.edits(range(count)) for text in (edit.instruction, edit.outcome))


def test_no_training_text_implies_what_is_untaught_but_all_else_is_said():
    said = Counter(one for text in training_texts(3000) for one in read_from(text))
    assert not set(said) & UNTAUGHT
    for kind in ("single", "colours", "two", "position", "counting", "knowledge"):
        assert len([one for one in EVERY[kind] if said[one]]) >= 0.6 * len(EVERY[kind]), kind


@pytest.mark.parametrize("kind", (*PROMPT_KINDS, "knowledge"))
def test_measured_prompts_are_untaught_or_taught_as_asked_and_say_so_themselves(kind):
    world = DrawnWorld(split="test")
    untaught = world.measured_prompts(range(200), kind)
    assert {request.combination for request in untaught} <= UNTAUGHT
    assert all(read_from(request.text) & UNTAUGHT >= {request.combination} for request in untaught)
    assert len({request.text for request in untaught}) >= (30 if kind == "counting" else 80)
    taught = world.measured_prompts(range(200), kind, "taught")
    assert not set().union(*(read_from(request.text) for request in taught)) & UNTAUGHT


def test_held_out_pairs_are_asked_in_many_ways():
    requests = DrawnWorld(split="test").measured_prompts(range(200), "held_out")
    assert pairs_of(*(r.scene for r in requests)) == HELD_OUT_PAIRS and len({r.text for r in requests}) >= 80
