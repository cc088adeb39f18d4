"""Exercise 10: does it hold here? A maker of small runs whose files fit one another, and what can be done to them.

Each answer is a function (run, sheet, control) that changes files of the run or of the control, or the sheet.
"""

import json
import os
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import torch

from evaluate import evaluation_id
from plumbing.run_folder import config_diff, load_config
from spar import Protocol, make_config

CONTROL = ((30.1, 0.91), (30.4, 0.93), (30.3, 0.92))  # PSNR and understanding for the seeds 0, 1, 2


def make_run(run: Path, psnr: float, understanding: float, count: int = 50, **changes) -> Path:
    """A run folder with weights of no use, and results that say they were measured on them."""
    run.mkdir(parents=True)
    config = make_config(**{"steps": (20,) * 9} | changes)
    (run / "config.json").write_text(json.dumps(asdict(config)), encoding="utf-8")
    generator = torch.Generator().manual_seed(hash((psnr, understanding, config.seed)) % 2**31)
    for name in ("P1", "T3"):
        weight = torch.randn(3, 4, generator=generator)
        torch.save({"weights": {"w": weight}, "ema": {"w": weight / 2}, "latent_scale": torch.ones(())},
                   run / f"{name}.pt")
    (run / "log.jsonl").write_text(json.dumps({"stage": "T3", "step": 19, "loss": 0.0123}) + "\n", encoding="utf-8")
    measure(run, {"reconstruction": {"psnr": psnr, "ssim": 0.9, "interval": {"psnr": [psnr - 0.4, psnr + 0.4]}},
                  "understanding": {"overall": understanding}}, Protocol(count=count).of(config))
    return run


def measure(run: Path, tables: dict, how: Protocol) -> None:
    config = load_config(run)
    results = {"eval_id": evaluation_id(run, how), "seed": config.seed, "data": "", "protocol": vars(how)} | tables
    (run / "results.json").write_text(json.dumps(results | {"ablation": config_diff(config)}), encoding="utf-8")


def make(folder: Path) -> tuple[Path, dict, Path]:
    """-> (the arm, its sheet, the folder of the control's three runs)"""
    control = folder / "control"
    for seed, (psnr, understanding) in enumerate(CONTROL):
        make_run(control / f"seed{seed}", psnr, understanding, seed=seed)
    run = make_run(folder / "mine", 31.4321, 0.75, lambda_s=0.0)
    (folder / "predictions.md").write_text("lower, since nothing holds the encoder\n", encoding="utf-8")
    os.utime(folder / "predictions.md", (1e9, 1e9))
    return run, sheet_of("understanding.overall", 0.75, "-", "holds"), control


def sheet_of(figure: str, mine: float, sign: str, verdict: str) -> dict:
    values = [pair[figure.startswith("u")] for pair in CONTROL]
    mean = sum(values) / 3
    spread = (sum((value - mean) ** 2 for value in values) / 2) ** 0.5
    return {"question": "Does understanding fall when nothing holds the encoder in T3?", "flag": "--lambda-s 0",
            "figure": figure, "prediction": {"sign": sign, "why": "the LLM reads tokens that it has never seen"},
            "control": round(mean, 4), "mine": mine, "difference": round(mine - mean, 4), "spread": round(spread, 4),
            "verdict": verdict, "hides": "three seeds of T3 upon one and the same P1 to P3"}


def says(**fields):
    """A sheet with other entries."""
    return lambda run, sheet, control: sheet.update(fields)


def predicts(**fields):
    return lambda run, sheet, control: sheet["prediction"].update(fields)


def lacks(key: str):
    return lambda run, sheet, control: sheet.pop(key)


def configured(**changes):
    """The arm, trained with other fields too, and measured so."""
    def change(run, sheet, control):
        shutil.rmtree(run)
        make_run(run, 31.4321, 0.75, **{"lambda_s": 0.0} | changes)
    return change


def results(**changes):
    """Other entries in the arm's results.json."""
    def change(run, sheet, control):
        path = run / "results.json"
        path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")
    return change


def other_numbers(run, sheet, control):
    shutil.copy(control / "seed1" / "results.json", run / "results.json")
    sheet.update(mine=0.93, difference=0.01, verdict="cannot be told")


def trained_on(run, sheet, control):
    content = torch.load(run / "T3.pt", weights_only=True)
    content["ema"]["w"] += 0.1
    torch.save(content, run / "T3.pt")


def edited_config(run, sheet, control):
    """Two fields were changed; config.json is mended afterwards."""
    configured(router="last")(run, sheet, control)
    config = replace(load_config(run), router="dtr")
    (run / "config.json").write_text(json.dumps(asdict(config)), encoding="utf-8")


def without_weights(run, sheet, control):
    for path in run.glob("*.pt"):
        path.unlink()


def control_itself(run, sheet, control):
    shutil.rmtree(run)
    shutil.copytree(control / "seed0", run)
    sheet.update(mine=0.91, difference=-0.01, verdict="cannot be told")


def control_of_two_kinds(run, sheet, control):
    shutil.rmtree(control / "seed2")
    make_run(control / "seed2", *CONTROL[2], seed=2, encoder_rate=0.5)


def control_measured_otherwise(run, sheet, control):
    shutil.rmtree(control / "seed2")
    make_run(control / "seed2", *CONTROL[2], count=30, seed=2)


def measured_otherwise(run, sheet, control):
    shutil.rmtree(run)
    make_run(run, 31.4321, 0.75, count=20, lambda_s=0.0)


def repeated(first: float, second: float, seed: int = 5, **fields):
    """The arm, and the arm with another seed; the sheet holds their mean."""
    def change(run, sheet, control):
        make_run(run.parent / "again", 31.0, second, lambda_s=0.0, seed=seed)
        mean = (first + second) / 2
        sheet.update({"seeds": ["again"], "mine": mean, "difference": round(mean - sheet["control"], 4)} | fields)
    return change


def in_percent(run, sheet, control):
    for key in ("control", "mine", "difference", "spread"):
        sheet[key] = 100 * sheet[key]


def psnr(mine: float = 31.4321, sign: str = "+", verdict: str = "holds", **fields):
    return lambda run, sheet, control: sheet.update(sheet_of("reconstruction.psnr", mine, sign, verdict) | fields)


def inside(verdict: str, sign: str = "-"):
    """The arm's understanding lies inside the spread."""
    def change(run, sheet, control):
        shutil.rmtree(run)
        make_run(run, 31.4321, 0.905, lambda_s=0.0)
        sheet.update(sheet_of("understanding.overall", 0.905, sign, verdict))
    return change


def first_seed_as_control(run, sheet, control):
    sheet.update(control=0.91, difference=-0.16)


WRONG = {
    "two fields were changed": configured(router="last"),
    "nothing was changed": lambda run, sheet, control: configured(lambda_s=0.05)(run, sheet, control),
    "only the steps were changed": configured(lambda_s=0.05, steps=(20,) * 8 + (10,)),
    "only the seed was changed": configured(lambda_s=0.05, seed=7),
    "other steps than the control": configured(steps=(20,) * 5 + (10,) + (20,) * 3),
    "another flag on the sheet than was changed": says(flag="--no-anchor"),
    "another value of the flag than the run has": says(flag="--lambda-s 1"),
    "no flag": says(flag=""),
    "measured by another protocol": measured_otherwise,
    "a control measured by another protocol": control_measured_otherwise,
    "a control of runs that differ": control_of_two_kinds,
    "results of another run": other_numbers,
    "trained on since it was measured": trained_on,
    "config.json mended afterwards": edited_config,
    "results that weights cannot be told of": without_weights,
    "the control compared with itself": control_itself,
    "a better number on the sheet": says(mine=0.71, difference=-0.21),
    "a number of another figure": says(mine=31.4321, difference=30.5121),
    "the training loss as evidence": says(figure="loss", mine=0.0123),
    "a line of the log as evidence": says(figure="log.loss", mine=0.0123),
    "an interval as evidence": says(figure="reconstruction.interval"),
    "the control's first seed in place of the mean": first_seed_as_control,
    "in percent, as nothing else is": in_percent,
    "the difference the other way round": says(difference=0.17),
    "a difference that is none": says(difference=-0.2),
    "a spread that is half as large": says(spread=0.005),
    "the spread of n, not of n − 1": says(spread=0.0082),
    "a negative spread": says(spread=-0.01),
    "holds inside the spread": inside("holds"),
    "does not hold inside the spread": inside("does not hold", "+"),
    "cannot be told outside the spread": says(verdict="cannot be told"),
    "holds, though the sign is the other one": predicts(sign="+"),
    "does not hold, though it was expected": says(verdict="does not hold"),
    "a verdict of its own": says(verdict="nearly significant"),
    "an empty prediction": lambda run, sheet, control: sheet.update(prediction={}),
    "a prediction without a sign": predicts(sign=""),
    "a prediction that covers everything": predicts(sign="+ or -"),
    "a prediction without a reason": predicts(why=" "),
    "no question": lacks("question"),
    "nothing hidden": says(hides=""),
    "numbers as text": says(mine="0.75"),
    "a repeat with the same seed": repeated(0.75, 0.77, seed=0),
    "a repeat that is left out of the mean": repeated(0.75, 0.85, mine=0.75, difference=-0.17),
    "a repeat that is not there": says(seeds=["nowhere"]),
}

RIGHT = {
    "as it should be": lambda run, sheet, control: None,
    "does not hold, by another figure and its sign": psnr(sign="-", verdict="does not hold"),
    "holds, and higher": psnr(),
    "cannot be told, inside the spread": inside("cannot be told"),
    "cannot be told, though it was expected to stay": inside("cannot be told", "0"),
    "does not hold: expected to stay": lambda run, sheet, control: (
        sheet["prediction"].update(sign="0"), sheet.update(verdict="does not hold")),
    "an arm repeated with another seed, and averaged": repeated(0.75, 0.77),
    "two decimals": says(control=0.92, difference=-0.17, spread=0.01),
    "the flag with an equals sign, the verdict with a capital": says(flag="lambda_s=0.0", verdict="Holds."),
    "the sign as a number": predicts(sign=-1),
    "the sign in a word": predicts(sign="lower"),
    "another seed beside the change": configured(seed=3),
    "computed in another way: more workers": configured(workers=2, save_minutes=3.0),
    "a boolean flag": lambda run, sheet, control: (
        configured(lambda_s=0.05, anchor=False)(run, sheet, control), sheet.update(flag="--no-anchor")),
    "a stage left out": lambda run, sheet, control: (
        configured(lambda_s=0.05, skip_stage="T2")(run, sheet, control), sheet.update(flag="--skip-stage T2")),
    "an external teacher and its folder": lambda run, sheet, control: (
        configured(lambda_s=0.05, align="external", teacher="runs/other")(run, sheet, control),
        sheet.update(flag="--align external")),
    "the prediction written late: a remark": lambda run, sheet, control: (
        (run.parent / "predictions.md").unlink(), None)[1],
}
