"""Forecasts say what really happens, and cost nothing themselves."""

import json
import re
import resource
import time
from dataclasses import replace

import pytest
import torch
from torch import nn

import train
from attention import attention
from benchmarks.attention import compare
from benchmarks import cost, yardstick
from plumbing.training import Training
from spar import NAMES, make_config
from tests.conftest import TINY
from tests.tools.commands import ROOT
from tests.tools.models import model_of
from train import one_batch, stage_named, step_module, train_stage


SHALLOW = dict(llm_layers=2, k=2, vision_layers=1)  # a forecast takes as long as there are layers


def forecast(config, name) -> dict[str, float]:
    return cost.forecast(config, stage_named(name), one_batch, step_module)


def really_kept(config, which) -> int:
    """Bytes that autograd keeps of a forward on real tensors."""
    torch.manual_seed(0)
    module = step_module(model_of(config), which)
    own, seen = {p.untyped_storage().data_ptr() for p in module.parameters()}, {}

    def pack(x):
        seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        losses = module(one_batch(config, which), which.loss_weights(config))[0]
    assert losses
    return sum(size for key, size in seen.items() if key not in own)


@pytest.mark.parametrize("name, precision", [*((name, "fp32") for name in NAMES),
                                             *((name, "bf16") for name in ("P1", "T3", "U2"))])
def test_the_forecast_of_activations_is_what_a_real_step_keeps(name, precision, tiny):
    config = tiny(batch=(cost.PROBE,) * 9, precision=precision, **SHALLOW)
    kept = really_kept(config, stage_named(name))
    assert forecast(config, name)["activations"] == pytest.approx(kept, rel=0.02)


def test_t3_is_forecast_with_the_pictures_that_take_most_not_with_its_first_smaller_ones(tiny):
    smaller = dict(sides=(0,) * 4 + (8,) + (0,) * 4, **SHALLOW)
    late, early = (forecast(tiny(early=share, **smaller), "T3") for share in (0.0, 0.5))
    assert early == late and forecast(tiny(**smaller), "T2")["flops"] < 0.5 * late["flops"]
    plans = [cost.plan(tiny(early=share, **smaller), [stage_named("T3")], one_batch, step_module, ROOT)
             for share in (0.0, 0.5)]
    days, memory = zip(*(map(float, re.search(r"([\d.]+) TFLOP.* ([\d.]+) GiB =", plan).groups()) for plan in plans))
    assert memory[0] == memory[1] and days[0] >= days[1]


def test_memory_grows_with_the_batch_and_recomputing_layers_saves_it(tiny):
    deep = tiny(**SHALLOW | {"dit_layers": 8}, batch=(8,) * 9)
    one, more, less = (forecast(config, "U2")["activations"] for config in (
        deep, replace(deep, batch=(16,) * 9), replace(deep, checkpointing=True)))
    assert more == 2 * one and less < 0.6 * one


def test_the_arithmetic_of_a_step_is_that_of_its_products(tiny):
    """The DiT's matrices on its tokens, forward and twice backward, by hand, are most of what a deep one costs."""
    config = tiny(dit_layers=8)
    found, twice = forecast(config, "P3"), forecast(replace(config, batch=(16,) * 9), "P3")
    tokens = config.noises_per_picture * 8 * config.grid**2
    matrices = 4 + 2 + 7.5  # of self-attention, cross-attention and Mix-FFN, in c²
    by_hand = 3 * 2 * tokens * config.dit_layers * config.c**2 * matrices
    assert by_hand < found["dit_flops"] < found["flops"] and twice["flops"] == 2 * found["flops"]
    assert forecast(replace(config, checkpointing=True), "P3")["flops"] == found["flops"]  # twice is no progress


def test_a_forecast_for_a_billion_parameters_takes_no_memory_for_them():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = forecast(make_config(preset="full"), "U1")
    assert found["all"] == pytest.approx(2011.2e6, rel=1e-4)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1.5e6  # KiB; the weights alone have 8 GB


def test_a_bench_times_steps_and_what_alignment_and_routing_cost(tiny, tmp_path):
    stages = [stage_named("P2"), stage_named("U2")]
    result = cost.bench(tiny(**SHALLOW), "cpu", tmp_path / "out", stages, one_batch, step_module,
                        train_stage, rounds=1, steps=6)
    assert json.loads((tmp_path / "out" / "bench.json").read_text()) == result
    assert set(result["stages"]) == {"P2", "U2"} and result["L_align"] > 0 and result["DTR"] > 0
    for found in result["stages"].values():
        assert found["step"] > 0 and 0 <= found["waiting"] < 1 and found["flops"] > 0
        assert found["images_per_second"] == pytest.approx(8 / found["step"])
        assert set(found["parts"]) == {"waiting", "forward", "backward", "optimizer"}
        assert found["step"] == pytest.approx(sum(found["parts"].values()))
        assert found["data"] == found["parts"]["waiting"] == pytest.approx(found["waiting"] * found["step"])


@pytest.mark.parametrize("part, slow", [
    ("waiting", (train.Batches, "__getitem__")), ("forward", (train.StepModule, "forward")),
    ("backward", (torch.amp.GradScaler, "scale")), ("optimizer", (nn.utils, "clip_grad_norm_")),
    ("optimizer", (train, "adversary_step")), ("optimizer", (Training, "move_average"))])
def test_a_part_of_a_step_that_takes_longer_is_seen_in_that_part_alone(part, slow, tiny, monkeypatch):
    where, name = slow
    before = getattr(where, name)

    def slower(*given, **options):
        time.sleep(0.3)
        return before(*given, **options)

    monkeypatch.setattr(where, name, slower)
    parts = cost.timed(tiny(**SHALLOW, steps=(3,) * 9), stage_named("T3"), train_stage)
    assert {name for name, seconds in parts.items() if seconds > 0.3} == {part}


def test_steps_until_all_is_warm_do_not_count(tiny):
    def train_stage(model, stage, folder, keep, clock):
        for step in range(6):
            for part in ("waiting", "forward", "backward", "optimizer"):
                time.sleep(0.1 if step < 2 else 0.001)
                clock(part)

    assert sum(cost.timed(tiny(), stage_named("P2"), train_stage).values()) < 0.05


# ---------------------------------------------------------------- the machine


def test_a_reading_is_the_median_of_its_steps_and_leaves_the_random_state(monkeypatch):
    monkeypatch.setattr(yardstick, "STEPS", 3)
    times = iter([0, 9, 0, 9, 0, 9, 0, 5, 0, 1, 0, 2])  # three warm up
    monkeypatch.setattr(yardstick.time, "perf_counter", lambda: next(times))
    before = torch.get_rng_state()
    assert yardstick.reading() == 2
    assert torch.equal(torch.get_rng_state(), before)


def test_the_minutes_of_a_run_are_those_of_its_stages_and_evaluation_at_the_yardsticks_speed(tmp_path, monkeypatch):
    assert yardstick.machine(tmp_path, 60.0) == {}
    for name, seconds in (("P1", 300.0), ("U3", 240.0)):
        torch.save({"seconds": seconds}, tmp_path / f"{name}.pt")
    for after, factor in (("start", 9), ("P1", 2), ("U3", 2)):  # somebody was in the way at first
        monkeypatch.setattr(yardstick, "reading", lambda: factor * yardstick.CALIBRATION)
        yardstick.take_reading(tmp_path, "cpu", after)
    yardstick.take_reading(tmp_path, "cuda", "none")
    found = yardstick.machine(tmp_path, 60.0)
    assert found["normalised_minutes"] == 5.0 and found == yardstick.machine(tmp_path, 60.0)
    assert found["machine"] == {"processor": yardstick.processor(), "threads": torch.get_num_threads(),
                                "torch": torch.__version__, "yardstick": 2 * yardstick.CALIBRATION}


def test_readings_are_taken_at_the_start_and_after_each_stage_and_not_of_a_finished_run(whole_run):
    lines = [json.loads(line) for line in (whole_run / "machine.jsonl").read_text().splitlines()]
    assert [line["after"] for line in lines] == ["start", *NAMES]
    train.train(make_config(**TINY), whole_run, list(NAMES), "cpu")
    assert len((whole_run / "machine.jsonl").read_text().splitlines()) == len(lines)


def test_the_attention_bench_compares_what_can_run_and_names_what_cannot():
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = compare(attention, (1, 2, 1, 33, 33, 32, True), device, torch.float32, rounds=1, repeats=1)
    assert found["ours"]["error"] < 1e-5 and found["ours"]["forward"] > 0 and found["math"]["both_tflops"] > 0
    assert all("refused" in r or r["error"] < 1e-5 for r in found.values())
