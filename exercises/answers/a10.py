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
    results = {"eval_id": evaluation_id(run, how), "preset": config.preset, "seed": config.seed, "data": config.data,
               "stages": sorted(path.stem for path in run.glob("[PTU][123].pt")), "protocol": vars(how)} | tables
    (run / "results.json").write_text(json.dumps(results | {"ablation": config_diff(config)}), encoding="utf-8")


def make(folder: Path) -> tuple[Path, dict, Path]:
    """-> (the arm, its sheet, the folder of the control's three runs)"""
    control = folder / "control"
    for seed, (psnr, understanding) in enumerate(CONTROL):
        make_run(control / f"seed{seed}", psnr, understanding, seed=seed)
    run = make_run(folder / "mine", 31.4321, 0.75, lambda_s=0.0)
    (folder / "predictions.md").write_text("# What I expect\n\n## 10 Does it hold here?\n\n> lower\n", encoding="utf-8")
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


def field(flag: str, **changes):
    """The arm has other fields, and the sheet this flag."""
    def change(run, sheet, control):
        configured(**{"lambda_s": 0.05} | changes)(run, sheet, control)
        sheet.update(flag=flag)
    return change


def figures(arm: float, held: tuple, verdict: str, sign: str = "+", digits: int = 4, **fields):
    """Understanding of the arm and of the control's runs, written with so many digits."""
    def change(run, sheet, control):
        for folder in (run, control):
            shutil.rmtree(folder)
        for seed, value in enumerate(held):
            make_run(control / f"seed{seed}", 30.0 + seed, value, seed=seed)
        make_run(run, 31.0, arm, lambda_s=0.0)
        mean = sum(held) / len(held)
        spread = (sum((value - mean) ** 2 for value in held) / (len(held) - 1)) ** 0.5
        sheet.update(control=round(mean, digits), mine=round(arm, digits), spread=round(spread, digits),
                     difference=round(round(arm, digits) - round(mean, digits), digits), verdict=verdict)
        sheet["prediction"]["sign"] = sign
        sheet.update(fields)
    return change


def measured_again(run: Path, **tables) -> None:
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    kept = {key: results[key] for key in ("reconstruction", "understanding")}
    measure(run, kept | tables, Protocol(**results["protocol"]))


def lost_t3(run: Path) -> None:
    (run / "T3.pt").rename(run / "T2.pt")
    measured_again(run)


def reseeded_control(control: Path) -> None:
    shutil.rmtree(control)
    for k, pair in enumerate(CONTROL):
        make_run(control / f"control-{k + 1}", *pair, reseed=k + 1)


def control_of_one_seed(run, sheet, control):
    shutil.rmtree(control)
    for k, pair in enumerate(CONTROL):
        make_run(control / f"again{k}", *pair, seed=0)


def shifted_sampler(run, sheet, control):
    """Pictures are judged, and the sampler's shift was changed beside the router."""
    configured(lambda_s=0.05, router="last", sampling_shift=1.0)(run, sheet, control)
    for one, value in zip((*sorted(control.iterdir()), run), (0.70, 0.72, 0.74, 0.50)):
        measured_again(one, generation_direct={"overall": value})
    sheet.update(flag="--router last", figure="generation_direct.overall", control=0.72, mine=0.5, difference=-0.22,
                 spread=0.02)


def any_value(run, sheet, control):
    """The control was trained with another λ_s, the arm with the preset's 0.05."""
    shutil.rmtree(control)
    for seed, pair in enumerate(CONTROL):
        make_run(control / f"seed{seed}", *pair, seed=seed, lambda_s=0.0)
    configured(lambda_s=0.05)(run, sheet, control)
    sheet.update(flag="--lambda-s 7")


def before_the_arm(run, sheet, control):
    for one in (*control.iterdir(), run):
        results = json.loads((one / "results.json").read_text(encoding="utf-8"))
        results["understanding"]["before_t3"] = 0.9943
        (one / "results.json").write_text(json.dumps(results), encoding="utf-8")
    sheet.update(figure="understanding.before_t3", control=0.9943, mine=0.9943, difference=0.0, spread=0.0,
                 verdict="does not hold")


def the_same_weights_again(run, sheet, control):
    again = shutil.copytree(run, run.parent / "again")
    for name in ("config.json", "results.json"):
        content = json.loads((again / name).read_text(encoding="utf-8")) | {"seed": 5}
        (again / name).write_text(json.dumps(content), encoding="utf-8")
    sheet.update(seeds=["again"])


def one_sentence(run, sheet, control):
    sheet.update(question="the anchor matters", hides="the anchor matters")
    sheet["prediction"]["why"] = "the anchor matters"


def reseeded(run, sheet, control):
    """The README's own way: arm and control from one shared run, by --reseed."""
    reseeded_control(control)
    configured(reseed=7)(run, sheet, control)
    make_run(run.parent / "again", 31.0, 0.77, lambda_s=0.0, reseed=8)
    sheet.update(seeds=["again"], mine=0.76, difference=-0.16)


def in_another_folder(run, sheet, control):
    def at(one, *pair, data, **changes):
        make_run(one, *pair, data=data, **changes)
        results = json.loads((one / "results.json").read_text(encoding="utf-8"))
        (one / "results.json").write_text(json.dumps(results | {"data": data}), encoding="utf-8")
    for folder in (run, control):
        shutil.rmtree(folder)
    for seed, pair in enumerate(CONTROL):
        at(control / f"seed{seed}", *pair, seed=seed, data="/home/teacher/pictures/openmoji-32")
    at(run, 31.4321, 0.75, lambda_s=0.0, data="/home/ada/pictures/openmoji-32")


def goes_on(control: Path) -> None:
    for one in control.iterdir():
        shutil.copy(one / "T3.pt", one / "U1.pt")
        measured_again(one)


NEAR = (0.9841, 0.9849, 0.9845)  # mean 0.9845, spread 0.0004: as the understanding of results/class.json

WRONG = {
    "another preset, and one flag": configured(preset="small"),
    "the sampler's shift was changed too, and pictures are judged": shifted_sampler,
    "an unfinished arm: T2's weights were measured": lambda run, sheet, control: lost_t3(run),
    "an unfinished run in the control": lambda run, sheet, control: lost_t3(control / "seed1"),
    "a control of one seed, repeated": control_of_one_seed,
    "a figure of the encoder before T3": before_the_arm,
    "a repeat with the same weights": the_same_weights_again,
    "holds: everything rounded until the spread is 0": figures(0.9851, NEAR, "holds", "+", 2),
    "does not hold: everything rounded until the spread is 0": figures(0.9847, NEAR, "does not hold", "+", 2),
    "0 holds: everything rounded until the spread is 0": figures(0.9847, NEAR, "holds", "0", 2),
    "holds: the control rounded, mine not": figures(0.9845, NEAR, "holds", "+", control=0.98, difference=0.0045),
    "0 holds, where nothing varies": figures(0.9, (0.9, 0.9, 0.9), "holds", "0"),
    "the flag of a boolean the other way round": field("--anchor", anchor=False),
    "any value of the flag, where the arm has the preset's": any_value,
    "the flag without its value": says(flag="--lambda-s"),
    "the flag without its choice": field("--router", router="last"),
    "hides: nothing.": says(hides="nothing."),
    "hides: dots": says(hides="........"),
    "the handout's blank is still in the question": says(question="Does ______________________________ matter?"),
    "one sentence for question, why and hides": one_sentence,
    "one decimal": psnr(control=30.3, mine=31.4, difference=1.2, spread=0.2),
    "does not hold, where nothing varies": figures(0.9, (0.9, 0.9, 0.9), "does not hold", "0"),
    "two fields were changed": configured(router="last"),
    "nothing was changed": lambda run, sheet, control: configured(lambda_s=0.05)(run, sheet, control),
    "only the steps were changed": configured(lambda_s=0.05, steps=(20,) * 8 + (10,)),
    "only the seed was changed": configured(lambda_s=0.05, seed=7),
    "other steps than the control": configured(steps=(20,) * 5 + (10,) + (20,) * 3),
    "another flag on the sheet than was changed": says(flag="--no-anchor"),
    "another value of the flag than the run has": says(flag="--lambda-s 1"),
    "no flag": says(flag=""),
    "a flag that asks for help": says(flag="--help"),
    "a flag whose quotation does not end": says(flag='--router "last'),
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
    "a control that goes on to U1, where it moves nothing of the figure": lambda run, sheet, control: goes_on(control),
    "cannot be told, where nothing varies": figures(0.9, (0.9, 0.9, 0.9), "cannot be told", "0"),
    "an arm repeated with another --reseed, from one shared run": reseeded,
    "rounded half up: 0.985 as 0.99": figures(0.985, (0.991, 0.993, 0.992), "holds", "-", mine=0.99,
                                              difference=-0.007),
    "rounded half up: 0.995 as 1.00": figures(0.995, (0.91, 0.93, 0.92), "holds", "+", mine=1.0, difference=0.08),
    "the flag with the one that it asks for": field("--align external --teacher runs/other", align="external",
                                                    teacher="runs/other"),
    "one number for all nine stages": field("--lr 0.001", lr=(0.001,) * 9),
    "a number for one stage": field("--batch T3=8", batch=(24, 16, 32, 16, 16, 8, 32, 32, 32)),
    "nine numbers with blanks": field("--lr " + ", ".join(["0.001"] * 9), lr=(0.001,) * 9),
    "nine numbers as 1e-3": field("--lr " + ",".join(["1e-3"] * 9), lr=(0.001,) * 9),
    "LPIPS, which needs two flags": field("--vgg vgg.pt --lpips lpips.pt", vgg="vgg.pt", lpips="lpips.pt"),
    "the same pictures in another folder": in_another_folder,
    "the sign as ABOUT's own words": lambda run, sheet, control: (
        inside("cannot be told")(run, sheet, control), predicts(sign="the same")(run, sheet, control)),
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
