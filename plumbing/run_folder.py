"""A run folder: what it holds, whether it fits, and the model in it.

    config.json      every number of the run
    log.jsonl        a line for every tenth step
    machine.jsonl    how fast the machine was between the stages (benchmarks/yardstick.py)
    <stage>.pt       what the stage trained, once it is finished
    resume/          the stage in progress, as PyTorch's distributed checkpoints: two, until the next stage ends
    replay/          a step whose loss was not finite
    bad.jsonl, vocabulary.json     with data on disk: samples that others stood in for; its byte pairs
    data.json        and what it held when the run began
    tokenizer.json   of a run from a folder of InternVL3: that model's text tokenizer
    results.json, report/        written by the evaluation
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from disk.bytepair import load_vocabulary, write_vocabulary
from disk.samples import DataFolder
from parts.backend import use_backend
from parts.words import TextTokenizer, WordTokenizer
from plumbing.checkpoints import BrokenCheckpoint, load_stage, read_stage
from plumbing.command import UserError, write_beside, write_text
from plumbing.devices import compile_parts, set_up_torch
from plumbing.processes import first_process, gather
from public.qwen import keep_tokenizer, load_qwen
from router import is_uneven, layer_choice
from spar import HOW, NAMES, PER_STAGE, SPAR, Config, make_config
from world.language import WORDS

# ---------------------------------------------------------------- a run folder


def stage_names(config: Config) -> list[str]:
    return [name for name in NAMES if name != config.skip_stage]


def config_diff(config: Config) -> dict:
    """The fields in which a configuration differs from its preset."""
    preset = asdict(make_config(preset=config.preset))
    return {key: value for key, value in asdict(config).items() if value != preset[key] and key not in ("seed", *HOW)}


def load_config(run: Path) -> Config:
    try:
        path = run / "config.json"
        if path.stat().st_size > 1 << 20:
            raise TypeError("it is larger than 1 MB")
        fields = json.loads(path.read_text(encoding="utf-8"))
        config = Config(**{key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()})
        check_numbers(config)
        return config
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"no run in {run}: train one with `python train.py --out {run}`") from None
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{run / 'config.json'} is not from this train.py ({error}): "
                        "train again into another --out") from None


def check_numbers(config: Config) -> None:
    """Raises ValueError for values of another kind, or of a size that no model has or that would be refused late."""
    for key, value in asdict(config).items():
        usual = getattr(Config, key)
        if isinstance(value, tuple) != isinstance(usual, tuple):
            raise ValueError(f"{key} is a {type(value).__name__}")
        if key in PER_STAGE and len(value) != len(NAMES) or key == "betas" and len(value) != 2:
            raise ValueError(f"{key} has {len(value)} numbers, {len(usual)} are wanted")
        usual = usual if isinstance(usual, tuple) else (usual,)
        least = int(type(usual[0]) is int and 0 not in usual and key not in MAY_BE_0)
        largest = 1 if key in SHARES else 512 if any(word in key for word in MANY_MAKE_MODULES) else 10**9
        for one in value if isinstance(value, tuple) else (value,):
            if isinstance(usual[0], (bool, str)):
                fits = type(one) is type(usual[0])
            else:
                fits = type(one) in (int, float) and least <= one <= largest and (one or key not in ABOVE_0) and \
                    (isinstance(usual[0], float) or one == int(one))
            if not fits:
                raise ValueError(f"{key} is {one!r}"[:100] + f": {'above' if key in ABOVE_0 else 'at least'} {least}, "
                                f"at most {largest}" * isinstance(one, (int, float)))
    if len(config.ae_widths) > 10 or config.side > 4096:
        raise ValueError(f"side is {config.side}, ae_widths {config.ae_widths}"[:100])


MANY_MAKE_MODULES = ("layers", "blocks", "depths", "stages", "noises", "heads")  # fields that count what is built
SHARES = "early connector_share gan_start betas warmup final_lr ema drop_words edits max_bad".split()
MAY_BE_0 = ("pixel_layers", "stream_blocks", "ae_vit_stages", "connector_layers")  # and counts whose default is 0
ABOVE_0 = ("shift", "sampling_shift", "clip")


def text_tokenizer(config: Config, run: Path | None = None) -> TextTokenizer:
    """The drawn world's words, with data on disk the byte pairs that the run learned from it, or those of InternVL3.
    Before there is a run: of the public folder, else the drawn world's."""
    if config.internvl:
        return load_qwen(run or Path(config.internvl), config.longest)
    if not config.data or run is None:
        return WordTokenizer(WORDS)
    return load_vocabulary(run / "vocabulary.json", config.longest)


def build(config: Config, device: str, words: TextTokenizer | None = None, run: Path | None = None,
          stages: Sequence[str] = ()) -> SPAR:
    """The model as a stage finds it, after `stages` of `run`. It is made on its device, never on the host beside it."""
    set_up_torch(device)
    use_backend(config.attention)
    torch.manual_seed(config.training_seed)
    with torch.device(device):
        model = SPAR(config, words or text_tokenizer(config, run))
    for name in stages:
        load_stage(model, run, name)
    if device.startswith("cuda"):
        model.to(memory_format=torch.channels_last)
    if config.compile:
        compile_parts(model)
    return model


def load_run(run: Path, device: str = "cpu", upto: str = NAMES[-1]) -> SPAR:
    """The model of a run folder after its finished stages (at most `upto`), which `model.finished_stages` names.
    Raises UserError where the folder is missing, is another's or holds no finished stage."""
    config = load_config(run)
    if config.attention != "triton" or device.startswith("cuda"):  # a run of a GPU may be used without one
        use_backend(config.attention)
    names = [name for name in stage_names(config) if NAMES.index(name) <= NAMES.index(upto)]
    names = [name for name in names if (run / f"{name}.pt").exists()]
    if not names:
        raise UserError(f"{run} holds no finished stage: go on with `python train.py --out {run}`")
    words = text_tokenizer(config, run)
    with torch.device("meta"):
        size = sum(p.numel() for p in SPAR(config, words).parameters())
    if 4 * size > 100 * sum((run / f"{name}.pt").stat().st_size for name in names) + (64 << 20):
        raise UserError(f"{run / 'config.json'} describes {size} parameters, far more than its checkpoints hold: "
                        "it is another run's")
    with torch.device(device):
        model = SPAR(config, words).eval()
    model.finished_stages = names
    for name in names:
        load_stage(model, run, name)
    if device.startswith("cuda"):
        set_up_torch(device)
        model.half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.precision)
    return model


def finished_stages(run: Path, config: Config) -> set[str]:
    """The stages whose files are whole and fit; of a broken or foreign one it is said that it is trained again."""
    sound = []
    with torch.device("meta"):
        model = SPAR(config, text_tokenizer(config, run))
    for name in stage_names(config) if first_process() else ():  # it reads every byte, and tells the others
        if (run / f"{name}.pt").exists():
            try:
                read_stage(model, run / f"{name}.pt", checksums=True)
                sound.append(name)
            except BrokenCheckpoint as broken:
                print(f"{run / name}.pt {broken}: {name} is trained again, from its last progress where there is some")
    return set(gather(sound))


def has_begun(run: Path) -> bool:
    return any(run.glob("*.pt")) or any(run.glob("resume/*"))


def check_same_run(config: Config, run: Path) -> None:
    """Writes config.json, or finds the same one there; only how it is computed (`HOW`) may have changed since. A run
    that has computed nothing yet may become another."""
    path = run / "config.json"
    if path.exists() and has_begun(run):
        before = asdict(load_config(run))
        config.public = config.public or before["public"]
        now = asdict(config)
        moved = [key for key in ("data", "data_u3") if before[key] and now[key]]  # compared by content, `changed_data`
        differing = [key for key in now if before[key] != now[key] and key not in (*HOW, *moved)]
        if differing:
            key = differing[0]
            raise UserError(f"{run} was begun with {key} = {before[key]!r}, not {now[key]!r}: choose another --out")
    write_config(config, run)


def write_config(config: Config, run: Path) -> None:
    write_text(run / "config.json", json.dumps(asdict(config), indent=1) + "\n")


FIRST_TOUCHED = {key: stage for stage, keys in {  # field -> the first stage that it touches; any other: P1
    "P2": "dc_ae", "P3": "sana k router connector_layers shift noises_per_picture",
    "T1": "lambda_mse lambda_lpips vgg lpips convnext lambda_p lambda_f tokenizer symmetric pixel_layers pixel_heads "
          "stream_blocks",
    "T3": "lambda_s lambda_gan gan_start gan_width lecam encoder_rate early gan_as_stage anchor freeze_encoder",
    "U1": "queries", "U2": "lambda_a align teacher align_hidden", "U3": "data_u3"}.items() for key in keys.split()}
NEEDED = {"P1": "", "P2": "", "P3": "P1 P2", "T1": "P1 P2", "T2": "T1", "T3": "T2",
          "U1": "P3 T3", "U2": "U1", "U3": "U2"}  # stage -> those that it builds on


def changed_data(run: Path, held: dict[str, dict]) -> dict[str, str]:
    """"" or U3, if that has data of its own -> what is not as data.json of `run` has it. `held`: what there is now."""
    path = run / "data.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    found = {}
    for stages in known.keys() | held.keys():
        before, now = known.get(stages, {}), held.get(stages, {})
        parts = [f"{name}: {(now.get(name) or ['no'])[0]} samples, were {(before.get(name) or ['no'])[0]}"
                 for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)]
        if parts:
            found[stages] = "; ".join(parts[:3]) + (f"; {len(parts) - 3} more" if len(parts) > 3 else "")
    return found


def take_over(config: Config, run: Path, source: Path, held: dict[str, dict] = {}) -> None:
    """Copies from `source` the stages that no differing field touches, nor a stage that they need (`NEEDED`), and the
    vocabulary that they learned with."""
    before, now, touched = asdict(load_config(source)), asdict(config), set()
    for stages, what in changed_data(source, held).items():
        print(f"{source} was trained on other data ({what}): nothing that reads it is taken over")
        touched |= {"U3"} if stages == "U3" else {"P1", "P2"}
    for key in (x for x in set(now) - {"preset", "skip_stage", "public", "reseed", "data", "data_u3", *HOW}
                if before[x] != now[x]):
        if key in PER_STAGE:
            touched |= {name for name, old, new in zip(NAMES, before[key], now[key]) if old != new}
        else:
            alike = key == "router" and "last" not in (before[key], now[key])  # P3 knows their start alone: the mean
            touched |= {"U1"} if alike else {FIRST_TOUCHED[key]} if key in FIRST_TOUCHED else {"P1", "P2"}
    if before["skip_stage"] != now["skip_stage"]:
        touched |= {before["skip_stage"], now["skip_stage"]}
    for name in NAMES:
        touched |= {name} if touched & {*NEEDED[name].split()} else set()
    for name in (name for name in NAMES if name not in touched):
        if name != config.skip_stage and (source / f"{name}.pt").exists() and not (run / f"{name}.pt").exists():
            write_beside(run / f"{name}.pt", partial(shutil.copyfile, source / f"{name}.pt"))
    if (source / "vocabulary.json").exists() and "P1" not in touched:
        write_beside(run / "vocabulary.json", partial(shutil.copyfile, source / "vocabulary.json"))


def open_run(config: Config, run: Path, stages: list[str], source: Path | None, resume: bool,
             data: dict[str, DataFolder | None], changed: bool = False) -> None:
    """Makes the folder, or finds the same run there. `data`: stage -> what its folder holds; `changed`: it may be other
    than when the run began. Prints a warning where the layers to choose from are uneven."""
    held = {"": data.get("P1"), "U3": data.get("U3") if config.data_u3 else None}
    for folder in filter(None, held.values()):
        faults = [f"not read: {file}{f' [{key}]' if key else ''}: {why}" for file, key, why in folder.faults]
        more = [f"not read: {len(faults) - 5} more; `python data.py --check {folder.root}` lists them"]
        for line in [*folder.notes, *faults[:5], *more * (len(faults) > 5)]:
            print(line)
        bad_samples(None, folder, config.max_bad)  # before anything is learned from it
    held = {key: folder.summary() for key, folder in held.items() if folder}
    if is_uneven(choice := layer_choice(config.llm_layers, config.k)):
        print(f"--k {config.k} of {config.llm_layers} layers: the router chooses from layers {choice}, an uneven menu")
    if source:  # a wrong folder is told before anything is written
        before = load_config(source)
        same = all(getattr(before, model) == getattr(config, model) for model in ("internvl", "dc_ae", "sana"))
        config.public = before.public if same else ""
    run.mkdir(parents=True, exist_ok=True)
    if has_begun(run) and not changed and (changes := changed_data(run, held)):
        raise UserError(f"{run} was begun on other data ({next(iter(changes.values()))}): put it back, choose another "
                        "--out, or go on with --changed-data")
    check_same_run(config, run)
    if held:
        write_text(run / "data.json", json.dumps(held) + "\n")
    if source:
        take_over(config, run, source, held)
    if not resume:
        shutil.rmtree(run / "resume", ignore_errors=True)
        for name in stages:
            (run / f"{name}.pt").unlink(missing_ok=True)
    if config.internvl and not all((run / name).exists() for name in ("P1.pt", "tokenizer.json")):
        keep_tokenizer(Path(config.internvl), run)
    if held and not config.internvl and not (run / "vocabulary.json").exists():
        folder = data["P1"]
        write_vocabulary(folder.root, folder.texts(), config.tokens, config.longest, run / "vocabulary.json")


# ---------------------------------------------------------------- logs


def read_lines(path: Path) -> list[dict]:
    """The lines of a .jsonl, none where there is no such file; a torn one is passed over."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            pass
    return lines


def cut_logs(run: Path, stage: str, first: int) -> None:
    """Forgets what was logged of steps that are done again."""
    for name in ("log.jsonl", "bad.jsonl"):
        if (run / name).exists():
            kept = [line for line in read_lines(run / name) if line["stage"] != stage or line["step"] < first]
            write_text(run / name, "".join(json.dumps(line) + "\n" for line in kept))


def bad_samples(run: Path | None, data_folder: DataFolder | None, max_bad: float):
    """-> a function of the bad samples of a step: writes them to bad.jsonl, stops the run above `max_bad`; faults that
    were found while looking count. Raises UserError where they are too many already; without `run`: they alone."""
    path, faults = run and run / "bad.jsonl", data_folder.faults if data_folder else []
    sound = sum(len(data_folder.of("any", split)) for split in ("train", "test")) if data_folder else 0
    allowed = max_bad * (sound + len(faults))
    lines = read_lines(path) if run else ()
    known = {(line["file"], line["key"]) for line in lines} | {fault[:2] for fault in faults}
    if len(known) > allowed:
        raise UserError(f"{len(known)} bad samples are more than --max-bad {max_bad} of the data ({allowed:.1f}): mend "
                        f"them, `python data.py --check {data_folder.root}`")

    def count(stage: str, step: int, bad: list[tuple[str, str, str]]) -> None:
        if first_process():
            with path.open("a", encoding="utf-8") as file:
                for name, key, why in bad:
                    file.write(json.dumps({"stage": stage, "step": step, "file": name, "key": key, "why": why}) + "\n")
        known.update((name, key) for name, key, _ in bad)
        if len(known) > allowed:
            raise UserError(f"{stage} step {step}: {len(known)} bad samples are more than --max-bad {max_bad} of the "
                            f"data ({allowed:.1f}): mend those that {path} lists, the last one: {bad[-1][-1]}")

    return count
