"""Claims about the nine stages: what each trains, from which losses, and that each ablation is one."""

from dataclasses import replace

import pytest
import torch

import train
from mllm import naming_loss
from plumbing.run_folder import build
from plumbing.training import schedule
from router import ROUTERS
from spar import NAMES, Config
from tests.tools.models import model_of, run_stage, state
from world.drawing import FACT_WORDS, Object
from world.language import DrawnWorld

TRAINS = {  # README and paper: what each stage trains, as name prefixes
    "P1": ("tokenizer.vision", "mllm.llm"), "P2": ("pixel_encoder", "tokenizer.decoder"),
    "P3": ("dit", "mllm.connector"),
    "T1": ("tokenizer.semantic_stream", "tokenizer.pixel_stream", "tokenizer.fusion"),
    "T2": ("tokenizer.semantic_stream", "tokenizer.pixel_stream", "tokenizer.fusion", "tokenizer.decoder"),
    "T3": ("tokenizer",), "U1": ("mllm.queries", "mllm.router", "mllm.connector"),
    "U2": ("mllm.queries", "mllm.router", "mllm.connector", "dit", "align_head"),
    "U3": ("mllm.queries", "mllm.router", "mllm.connector", "dit", "align_head")}


@pytest.mark.parametrize("name", NAMES)
def test_exactly_the_listed_modules_train(name, tiny, tmp_path):
    model = model_of(tiny())
    before = state(model)
    if name == "P3":  # its start copies LLM layers into the connector; only training is of interest here
        model.mllm.connector.copy_layers(model.mllm.llm)
        before = state(model)
    run_stage(model, name, tmp_path)
    moved = {key for key, value in state(model).items() if not torch.equal(value, before[key])}
    listed = {key for key in before if any(key == prefix or key.startswith(prefix + ".") for prefix in TRAINS[name])}
    assert moved <= listed, f"moved though frozen: {sorted(moved - listed)}"
    for prefix in TRAINS[name]:
        assert any(key.startswith(prefix) for key in moved), f"{prefix} did not move"


def test_with_a_frozen_encoder_t3_leaves_it_alone_to_the_bit(tiny, tmp_path):
    model = model_of(tiny(freeze_encoder=True))
    before = state(model)
    run_stage(model, "T3", tmp_path)
    after = state(model)
    assert all(torch.equal(after[key], before[key]) for key in before if key.startswith("tokenizer.vision"))
    assert not torch.equal(after["tokenizer.decoder.out.conv.weight"], before["tokenizer.decoder.out.conv.weight"])


def test_a_frozen_encoder_is_frozen_however_finely_a_stage_names_it():
    t3 = train.stage_named("T3")
    finer = replace(t3, trains=t3.trains | {"tokenizer.vision.projector": "encoder_rate"})
    for stage in (t3, finer):
        for frozen in (True, False):
            rates = stage.rates(Config(freeze_encoder=frozen))
            assert all((rate == 0) == (frozen and key.startswith("tokenizer.vision")) for key, rate in rates.items())


@pytest.mark.parametrize("name, field, symbol", [
    ("T1", "lambda_lpips", "L_lpips"), ("T1", "lambda_p", "L_p"), ("T3", "lambda_s", "L_s"),
    ("T3", "lambda_gan", "L_gan"),
    ("U2", "lambda_a", "L_align"), ("P2", "lambda_z", "L_z"), ("T2", "lambda_f", "L_f")])
def test_a_term_with_weight_zero_leaves_no_trace(name, field, symbol, tiny, tmp_path):
    logs = {}
    for weight in (0.0, 0.5):
        folder = tmp_path / str(weight)
        torch.manual_seed(0)
        model = model_of(tiny(**{field: weight}))
        logs[weight] = run_stage(model, name, folder), state(model)
    assert symbol not in logs[0.0][0][-1] and symbol in logs[0.5][0][-1]
    assert any(not torch.equal(a, b) for a, b in zip(logs[0.0][1].values(), logs[0.5][1].values()))


def test_the_teachers_get_no_gradient(tiny, tmp_path):
    stage, kept = train.stage_named("T3"), []

    def watched(model, batch, weights, extras):
        kept.append(extras)
        return stage.compute(model, batch, weights, extras)

    run_stage(model_of(tiny()), replace(stage, compute=watched), tmp_path)
    for teacher in (kept[0].encoder_before, kept[0].perceptual):
        assert teacher is not None
        assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())


def test_a_thing_is_named_by_the_visual_tokens_of_its_quarter_and_by_no_others(tiny):
    model = model_of(tiny())
    thing = Object("cross", "blue", "small", 1)
    words = [model.words.ids[thing.word(fact)] for fact in FACT_WORDS]
    embedding = model.mllm.llm.embedding.weight
    names = tuple(torch.tensor([model.words.ids[word] for word in options]) for options in FACT_WORDS.values())
    with torch.no_grad():
        said = 100 * torch.nn.functional.normalize(embedding, dim=1)[words].sum(0)
    right = torch.tensor([[options.index(thing.word(fact)) for fact, options in FACT_WORDS.items()]])
    found = []
    for place in range(4):
        f_v = torch.zeros(1, 4, 4, len(said))
        f_v[:, place // 2 * 2:place // 2 * 2 + 2, place % 2 * 2:place % 2 * 2 + 2] = said
        things = torch.tensor([0]), torch.tensor([thing.place]), right
        found.append(naming_loss(f_v.flatten(1, 2), embedding, things, names).item())
    assert found[1] < 0.2 * min(found[0], *found[2:])


def test_every_ablation_trains_and_differs_from_the_standard(tiny, tmp_path):
    def end(**change):
        torch.manual_seed(0)
        model = model_of(tiny(**change))
        folder = tmp_path / "-".join(change)
        for name in ("T1", "T3", "U1", "U2"):
            run_stage(model, name, folder)
        return state(model)

    teacher = tmp_path / "teacher"
    torch.manual_seed(5)
    run_stage(model_of(tiny()), "P1", teacher)
    standard = end()
    for change in ({"tokenizer": "semantic-only"}, {"tokenizer": "pixel-only"}, {"anchor": False},
                   {"freeze_encoder": True}, {"align": "none"}, {"router": "last"}, {"router": "mean"},
                   {"router": "concat"}, {"router": "static"},
                   {"symmetric": "with"}, {"symmetric": "without"},
                   {"align": "external", "teacher": str(teacher)}):
        other = end(**change)
        same = [key for key in standard if key in other and torch.equal(standard[key], other[key])]
        assert len(same) < len(standard), f"{change} changed nothing"
        moved = [key for key in standard if key not in other or not torch.equal(standard[key], other[key])]
        assert moved or set(other) != set(standard), change


def test_all_but_the_router_starts_with_the_same_bits_whichever_router_it_is(tiny):
    starts = {}
    for name in ROUTERS:
        model = build(tiny(router=name), "cpu")
        starts[name] = {key: value for key, value in state(model).items() if not key.startswith("mllm.router.")}
    for name, start in starts.items():
        different = [key for key in starts["dtr"] if not torch.equal(start[key], starts["dtr"][key])]
        assert start.keys() == starts["dtr"].keys() and different == [], name


def test_u1_starts_from_what_p3_learned_through_the_same_router(tiny, tmp_path):
    """Four routers start as the mean: to them P3 gives one DiT and one connector, and U1's first loss is the same."""
    first = {}
    for name in ROUTERS:
        model = build(tiny(router=name), "cpu")
        before = state(model)
        p3 = run_stage(model, "P3", tmp_path / name)
        assert all(torch.equal(state(model)[key], before[key]) for key in before if key.startswith("mllm.router."))
        first[name] = p3[-1]["L_fm"], run_stage(model, "U1", tmp_path / name)[0]["L_fm"]
    last = first.pop("last")
    for name, losses in first.items():
        assert losses == pytest.approx(first["dtr"], rel=1e-5), name
        assert losses != pytest.approx(last, rel=1e-5), name


@pytest.mark.parametrize("name", ["P3", "U1", "U2"])
def test_what_the_dit_learns_to_draw_is_scaled_to_variance_1_and_nothing_is_decoded_for_it(name, tiny, monkeypatch):
    model, world = model_of(tiny()), DrawnWorld(16)
    monkeypatch.setattr(model.tokenizer.decoder, "forward", None)
    model.latent_scale.fill_(5)
    train.measure_latents(model, train.stage_named(name), world)
    if name == "U2":
        assert model.latent_scale == 5
    else:
        images = world.pictures(range(512))
        t = model.tokenizer
        z = model.pixel_latent(images) if name == "P3" else t.latents(t.features(images)).fused
        assert (z * model.latent_scale).std().item() == pytest.approx(1, abs=1e-4)


def test_the_schedule_warms_up_and_ends_where_it_says():
    rates = [schedule(step, 100, 0.1, 0.05) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == pytest.approx(1.0) and rates.index(max(rates)) in (9, 10)
    assert rates[-1] == pytest.approx(0.05, abs=0.01) and rates[10:] == sorted(rates[10:], reverse=True)
