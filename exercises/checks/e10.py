"""Exercise 10: does it hold here? One row of the paper's Table 5 or 6, with a prediction sheet.

    python exercises/grade.py 10 RUN SHEET.json --control CONTROL …

RUN is the folder of the arm, CONTROL that of the run it is compared with, or the results.json of several, one for each
seed. What the sheet's lines want stands in `ABOUT`.
"""

import json
import math
import re
import shlex
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from evaluate import asked_alike, evaluation_id
from exercises.checks.tools import Wrong, demand
from plumbing.command import Parser, UserError
from plumbing.flags import parse
from plumbing.run_folder import config_diff, load_config
from spar import HOW, NAMES, Protocol, make_config

TITLE, MINUTES = "Does it hold here?", 45
PREDICT = ["Will the figure of your arm be higher or lower than the control's, or can it not be told?",
           "How large is the spread of the control over seeds, in units of the difference that you expect?",
           "What will this comparison hide, even if its verdict is right?"]
ABOUT = """The sheet, exercises/work/sheet.json; all down to the prediction is written before the arm is trained:

- `question`: what is asked, in words
- `flag`: what is changed, one thing, as train.py is told: "--router last" (a row of the table that changes two is
  compared with the arm that has one of them; `half_of_U2` is no arm for the sheet)
- `figure`: its place in results.json, such as "reconstruction.psnr"; numbers that follow have two decimals or more
- `prediction`: its `sign` is "+" (the figure becomes higher), "-" (lower) or "0" (the same), its `why` a sentence
- `control`: the control's figure, of several runs their mean
- `mine`: the arm's
- `difference`: mine − control
- `spread`: the control's standard deviation over its runs, of n − 1
- `verdict`: "cannot be told" where |difference| < 2 · spread, or 0, whatever the prediction; else "holds" where the
  difference has the sign of the prediction, and "does not hold" where it has not (so "0" never holds)
- `hides`: one thing that this comparison does not show
- `seeds`: only where the arm was repeated: the folders of the other runs; `mine` is then the mean of all"""
SHEET = {"question": "", "flag": "", "figure": "reconstruction.psnr", "prediction": {"sign": "", "why": ""},
         "control": None, "mine": None, "difference": None, "spread": None, "verdict": "", "hides": ""}  # make.py's
VERDICTS = ("holds", "does not hold", "cannot be told")
SIGNS = {"+": 1, "higher": 1, "up": 1, "more": 1, "-": -1, "−": -1, "–": -1, "lower": -1, "down": -1, "less": -1,
         "0": 0, "=": 0, "same": 0, "the same": 0}
PLACES = ("data", "data_u3", "teacher", "vgg", "lpips", "internvl", "dc_ae", "sana")  # files, at each one's own place
WORK = Path(__file__).resolve().parent.parent / "work"
WITH_ANOTHER = {"teacher": "align", "lpips": "vgg"}  # a field that another one asks for


# ---------------------------------------------------------------- runs and their figures


@dataclass
class Run:
    where: Path
    results: dict
    settings: dict  # field -> value, where it is not the preset's; neither seeds nor how it is computed
    reseed: int = 0

    @property
    def seeds(self) -> tuple:
        """By which runs of one configuration differ."""
        return self.results.get("seed"), self.reseed

    @property
    def preset(self) -> str:
        return self.results.get("preset", "toy")


def read_json(path: Path) -> dict:
    """Raises Wrong."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))  # some editors put a mark before UTF-8
    except OSError:
        raise Wrong(f"there is no {path}") from None
    except (ValueError, RecursionError) as error:
        raise Wrong(f"{path} is no JSON: {error}") from None
    demand(isinstance(content, dict), f"{path} holds no fields")
    return content


def read_run(path: Path) -> Run:
    """A run folder, or a results.json; beside a config.json its settings are read from that."""
    results = read_json(path / "results.json" if path.is_dir() else path)
    demand(isinstance(results.get("protocol"), dict), f"{path}: evaluate.py wrote no such results: no protocol")
    settings, folder = results.get("ablation", {}), path if path.is_dir() else path.parent
    if (folder / "config.json").exists() and (path.is_dir() or path.name == "results.json"):
        try:
            config = load_config(folder)
        except UserError as error:
            raise Wrong(str(error)) from None
        settings = config_diff(config)
        recorded = results.get("ablation", {})
        changed = differing(json.loads(json.dumps(settings)) | {"preset": config.preset}, recorded | {
            "preset": results.get("preset", config.preset)})
        demand(not changed, f"{folder}: config.json and results.json differ in {', '.join(changed)}: the results are "
                            "another run's, or config.json was changed since")
    reseed = settings.get("reseed", 0)
    settings = {key: value for key, value in json.loads(json.dumps(settings)).items()
                if key not in ("seed", "reseed", *HOW)}
    for content in (settings, results):  # the same pictures may lie in another folder
        if content.get("data"):
            content["data"] = Path(content["data"]).name
    return Run(path, results, settings, reseed)


def read_control(paths: list[Path]) -> list[Run]:
    """Folders of runs, folders that hold several, results.json files."""
    found = []
    for path in paths:
        inside = [] if not path.is_dir() or (path / "results.json").exists() else sorted(
            one for one in (*path.glob("*/results.json"), *path.glob("*.json")) if one.name[0] != ".")  # macOS's notes
        found += [read_run(one.parent if one.name == "results.json" else one) for one in inside or [path]]
    return found


def differing(a: dict, b: dict) -> list[str]:
    return sorted(key for key in {*a, *b} if a.get(key) != b.get(key))


def figure(results: dict, path: str) -> float:
    """The number at a dotted path, such as reconstruction.psnr. Raises Wrong."""
    keys, value = str(path).split("."), results
    demand(keys[-1] != "before_t3", f"{path} is the encoder's as P1 left it, which the arm does not change")
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    told = f"results.json has no figure {path!r}: it is one such as reconstruction.psnr (a training loss is none)"
    demand(len(keys) == 2 and isinstance(value, (int, float)) and not isinstance(value, bool), told)
    demand(keys[0] not in ("protocol", "machine", "ablation"), told)
    demand(math.isfinite(value), f"{path} is {value}")
    return float(value)


def spread_of(values: list[float]) -> float:
    """Standard deviation over seeds, of n − 1."""
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))


def rule(difference: float, spread: float, sign: int) -> str:
    if abs(difference) < 2 * spread or difference == 0:
        return "cannot be told"
    return "holds" if (difference > 0) - (difference < 0) == sign else "does not hold"


# ---------------------------------------------------------------- the sheet


@dataclass
class Case:
    run: Run
    control: list[Run]
    sheet: dict
    sheet_path: Path
    repeats: list[Run]  # the arm with other seeds

    @property
    def arms(self) -> list[Run]:
        return [self.run, *self.repeats]


def number(sheet: dict, key: str) -> float:
    value = sheet.get(key)
    demand(isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value),
           f"{key} on the sheet is {value!r}: a number is wanted")
    return float(value)


def digits_of(written: float) -> int:
    """Decimals that a number on the sheet has, two at least."""
    return max(2, len(f"{written:.9f}".rstrip("0").partition(".")[2]))


def rounds_to(value: float, written: float) -> bool:
    """Whether this was written for that, with two decimals or more, halves rounded either way."""
    return abs(value - written) <= 0.5 * 10.0 ** -digits_of(written) + 1e-9


def sign_of(prediction) -> int:
    sign = prediction.get("sign") if isinstance(prediction, dict) else None
    if isinstance(sign, (int, float)) and not isinstance(sign, bool) and math.isfinite(sign):
        return (sign > 0) - (sign < 0)
    found = SIGNS.get(str(sign).strip().lower())
    demand(found is not None, f"prediction has the sign {sign!r}: write + (higher), - (lower) or 0 (the same)")
    return found


def fields_of(flag, run: Run) -> dict:
    """Which fields the sheet's flag names, and what train.py makes of them: "--router last" or "router=last". Raises
    Wrong."""
    text = re.sub(r",\s+", ",", str(flag).strip())
    if not text.startswith("-"):
        text = "--" + text.replace("=", " ", 1)
    try:
        words = [word.replace("_", "-") if word.startswith("--") else word for word in shlex.split(text)]
        demand(words[0] != "--", "flag on the sheet is empty: what was changed?")
        demand(not {"-h", "--help", "--help-all"} & {*words}, f"flag on the sheet, {flag!r}, changes nothing")
        asked = [word[2:].partition("=")[0] for word in words if word.startswith("--")]
        for field in WITH_ANOTHER:  # which train.py asks for beside the other
            if WITH_ANOTHER[field] in asked and field not in asked and run.settings.get(field):
                words += [f"--{field}", str(run.settings[field])]
        config, _ = parse(arguments=["--preset", run.preset, *words])
    except (UserError, ValueError, TypeError) as error:
        raise Wrong(f"flag on the sheet, {flag!r}: {error}") from None
    names = [field for one in asked for name in [one.replace("-", "_")] for field in (name, name.removeprefix("no_"))]
    return {name: getattr(config, name) for name in names if hasattr(config, name)}


def words_of(key: str, value) -> None:
    letters = sum(sign.isalpha() for sign in value) if isinstance(value, str) else 0
    demand(letters >= 8 and "__" not in value, f"{key} on the sheet {'says too little' if letters else 'is empty'}: "
                                               f"{value!r}")


# ---------------------------------------------------------------- claims


def complete(case: Case) -> None:
    """the sheet says what is asked, what is expected and why, and what the comparison hides"""
    prediction = case.sheet.get("prediction")
    demand(isinstance(prediction, dict), "prediction on the sheet wants a sign and a why")
    sign_of(prediction)
    said = {"question": case.sheet.get("question"), "prediction: why": prediction.get("why"),
            "hides": case.sheet.get("hides")}
    for key, value in said.items():
        words_of(key, value)
    demand(len({" ".join(value.lower().split()) for value in said.values()}) == 3,
           "question, why and hides say the same on the sheet")


def one_change(case: Case) -> None:
    """the arm differs from the control in one field, the flag on the sheet, and in nothing else"""
    for other in case.control[1:]:
        changed = differing(other.settings, case.control[0].settings)
        demand(not changed, f"the control's runs differ in {', '.join(changed)}: {other.where}, "
                            f"{case.control[0].where}")
    for other in case.repeats:
        changed = differing(other.settings, case.run.settings)
        demand(not changed, f"the arm's runs differ in {', '.join(changed)}: {other.where}, {case.run.where}")
    for other in (*case.control, *case.repeats):
        demand(other.preset == case.run.preset, f"{other.where} has the preset {other.preset}, {case.run.where} "
               f"{case.run.preset}: there every number differs")
    changed = differing(case.run.settings, case.control[0].settings)
    changed = [key for key in changed if key != "steps" and WITH_ANOTHER.get(key) not in changed]
    demand(changed, "no field of the configuration differs from the control's: other steps or another seed are no "
                    "question")
    demand(len(changed) == 1, f"{len(changed)} fields differ from the control's: {', '.join(changed)}: which of them "
                              "made the difference?")
    named, plain = fields_of(case.sheet.get("flag", ""), case.run), asdict(make_config(preset=case.run.preset))
    demand(changed[0] in named, f"the sheet's flag names {', '.join(named) or 'no field'}, not {changed[0]}, which "
           "differs")
    for name, value in named.items():
        has = case.run.settings.get(name, plain[name])
        if name not in ("seed", "reseed", "steps", *HOW):
            demand(value == (tuple(has) if isinstance(value, tuple) else has) or name in PLACES,
                   f"the sheet says {name} {value}, the run has {has}")


def same_terms(case: Case) -> None:
    """arm and control trained for the same steps and were measured by the same protocol"""
    for other in [*case.control, *case.repeats]:
        demand(case.run.settings.get("steps") == other.settings.get("steps"),
               f"other steps: {case.run.where} {case.run.settings.get('steps', 'as the preset')}, "
               f"{other.where} {other.settings.get('steps', 'as the preset')}")
        (data, how), (other_data, other_how) = asked_alike(case.run.results), asked_alike(other.results)
        changed = differing(how, other_how)
        demand(not changed, f"measured by other protocols: {', '.join(changed)} of {case.run.where} and {other.where}")
        demand(data == other_data, f"measured on other data: {other.where}")
        if "stages" in case.run.results and "stages" in other.results:
            left_out = {one.settings.get("skip_stage") for one in (case.run, other)}
            read = str(case.sheet.get("figure")).partition(".")[0] in ("reconstruction", "understanding")
            counted = {*(NAMES[:NAMES.index("U1")] if read else NAMES)} - left_out  # U stages move neither
            missing = sorted(counted & ({*case.run.results["stages"]} ^ {*other.results["stages"]}))
            demand(not missing, f"measured after other stages: {', '.join(missing)} is finished in one alone of "
                   f"{case.run.where} and {other.where}")


def own_weights(case: Case) -> None:
    """the results name the arm's own weights, and no run is there twice"""
    ids = [one.results.get("eval_id") for one in case.control]
    for arm in case.arms:
        folder = arm.where if arm.where.is_dir() else arm.where.parent
        demand(any(folder.glob("[PTU][123].pt")),
               f"{folder} holds no finished stage: which weights are these figures of?")
        found = evaluation_id(folder, Protocol(**arm.results["protocol"]))
        demand(found == arm.results.get("eval_id"), f"{folder}: its weights give eval_id {found}, results.json has "
               f"{arm.results.get('eval_id')}: measure the run again, or take its own results")
        demand(found not in ids, f"{folder} is the control itself: the same weights")
    for who, runs in (("the arm", case.arms), ("the control", case.control)):
        weights = [one.results.get("eval_id") for one in runs]
        demand(len({*weights}) == len(weights), f"a run of {who} is there twice: the same weights")
        demand(len({one.seeds for one in runs}) == len(runs), f"{who}, when it is repeated, needs another --seed or "
                                                             "--reseed each time")


def numbers(case: Case) -> None:
    """the numbers on the sheet are those of the results"""
    path = case.sheet.get("figure")
    for key, runs in (("mine", case.arms), ("control", case.control)):
        written, values = number(case.sheet, key), [figure(one.results, path) for one in runs]
        mean = sum(values) / len(values)
        what = f"the mean of {path} over {len(values)} runs" if len(values) > 1 else f"{path} of {runs[0].where}"
        demand(rounds_to(mean, written), f"{key} on the sheet is {written}, {what} is {mean:.4f}: two decimals or more")


def arithmetic(case: Case) -> None:
    """difference and spread are computed rightly"""
    path, sheet = case.sheet.get("figure"), case.sheet
    mine, control = number(sheet, "mine"), number(sheet, "control")
    exact = [sum(values) / len(values) for values in ([figure(one.results, path) for one in runs]
                                                      for runs in (case.arms, case.control))]
    written = number(sheet, "difference")
    demand(rounds_to(exact[0] - exact[1], written) or rounds_to(mine - control, written),
           f"difference on the sheet is {written}, mine − control is {mine - control:.4f}")
    spread = number(sheet, "spread")
    demand(spread >= 0, f"spread on the sheet is {spread}: it is never negative")
    if len(case.control) > 1:
        right = spread_of([figure(one.results, path) for one in case.control])
        demand(rounds_to(right, spread), f"spread on the sheet is {spread}, the standard deviation (n − 1) of the "
                                         f"control's {len(case.control)} runs is {right:.4g}")
        demand(spread or not right, f"spread on the sheet is 0, that of the control {right:.2g}: write more digits")
    else:
        demand(spread > 0, "spread on the sheet is 0: one run has none of its own; take the one that was given")


def verdict_follows(case: Case) -> None:
    """the verdict follows: inside twice the spread nothing can be told"""
    sheet, said = case.sheet, " ".join(str(case.sheet.get("verdict")).lower().split()).rstrip(".")
    demand(said in VERDICTS, f"verdict on the sheet is {sheet.get('verdict')!r}: one of {', '.join(VERDICTS)}")
    difference, spread, path = number(sheet, "difference"), number(sheet, "spread"), sheet.get("figure")
    means = [sum(figure(one.results, path) for one in runs) / len(runs) for runs in (case.arms, case.control)]
    exact = spread_of([figure(one.results, path) for one in case.control]) if len(case.control) > 1 else spread
    sign = sign_of(sheet.get("prediction"))
    allowed, apart = {rule(means[0] - means[1], exact, sign)}, abs(abs(means[0] - means[1]) - 2 * exact)
    if apart <= 0.5 * 10.0 ** -digits_of(difference) + 10.0 ** -digits_of(spread):  # by rounding on the sheet
        allowed.add(rule(difference, spread, sign))
    expected = {1: "higher", 0: "the same", -1: "lower"}[sign]
    demand(said in allowed, f"verdict on the sheet is {said!r}: the difference is {difference:+.4g}, twice the spread "
                            f"{2 * spread:.4g}, and {expected!r} was expected of {path}")


def written_before(case: Case) -> str:
    """the prediction is older than the results"""
    folder = case.run.where if case.run.where.is_dir() else case.run.where.parent
    measured = (folder / "results.json").stat().st_mtime
    notes = [folder / "predictions.md" for folder in (case.sheet_path.parent, WORK)]
    notes = [note for note in notes if note.exists() and "\n## 10 " in note.read_text(encoding="utf-8-sig")]
    written = min(path.stat().st_mtime for path in (case.sheet_path, *notes))
    if written < measured:
        return ""
    day = "%Y-%m-%d %H:%M"
    return (f"only a remark: the oldest note of it ({time.strftime(day, time.localtime(written))}) is younger than the "
            f"results ({time.strftime(day, time.localtime(measured))}); next time write predictions.md first")


CLAIMS = [complete, one_change, same_terms, own_weights, numbers, arithmetic, verdict_follows, written_before]


# ---------------------------------------------------------------- what grade.py calls


def read_case(arguments: list[str]) -> Case:
    """Raises UserError where the command is wrong, Wrong where a file is."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of the arm")
    parser.add_argument("sheet", type=Path, help="the filled-in sheet, JSON")
    parser.add_argument("--control", type=Path, nargs="+", action="extend", required=True,
                        help="run folder, or results.json of its seeds")
    given = parser.read(arguments)
    sheet = read_json(given.sheet)
    if not given.run.is_dir():
        raise Wrong(f"{given.run} is no run folder")
    control = read_control(given.control)
    demand(control, f"no results in {', '.join(map(str, given.control))}")
    named = sheet.get("seeds") or []
    demand(isinstance(named, list) and all(isinstance(one, str) for one in named),
           f"seeds on the sheet is {named!r}: a list of run folders is wanted, those of the arm with other seeds")
    repeats = []
    for name in named:
        places = [place for place in (Path(name), given.sheet.parent / name, given.run.parent / name) if place.is_dir()]
        demand(places, f"seeds on the sheet names {name}: there is no such run folder")
        if places[0].resolve() != given.run.resolve():
            repeats.append(read_run(places[0]))
    return Case(read_run(given.run), control, sheet, given.sheet, repeats)


def verdicts(arguments: list[str]) -> list[dict]:
    """A row for each claim: {"claim", "ok", "why"}. Raises UserError where the command is wrong."""
    try:
        case = read_case(arguments)
    except Wrong as wrong:
        return [{"claim": "the sheet, the arm and the control can be read", "ok": False, "why": str(wrong)}]
    rows = []
    for claim in CLAIMS:
        try:
            why, ok = claim(case) or "", True
        except Wrong as wrong:
            why, ok = str(wrong), False
        except Exception as error:  # files that are not what they should be
            why, ok = f"{type(error).__name__}: {error}".splitlines()[0][:200], False
        rows.append({"claim": claim.__doc__.splitlines()[0], "ok": ok, "why": why})
    return rows
