"""Flags -> a configuration. Every field of spar.Config is a flag, its comment in the source that flag's help."""

import argparse
import inspect
import re
from dataclasses import fields
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from disk.layouts import data_path
from public import openmoji
from public.folders import SIZES, sizes_of
from plumbing.command import Parser, UserError
from plumbing.devices import best_device, default_precision
from plumbing.run_folder import check_numbers
from spar import CHOICES, NAMES, PER_STAGE, PRESETS, Config, make_config

FIRST_DAY = ("seed", "steps", "batch", "lr", "router", "tokenizer", "align", "teacher", "anchor", "skip_stage", "data",
             "edits", "internvl", "dc_ae", "sana", "precision", "attention", "workers")  # --help-all shows every field


def field_help() -> dict[str, tuple[str, str]]:
    """field -> (its group, its comment), read from the source of Config."""
    group, helps = "", {}
    for line in inspect.getsource(Config).splitlines():
        if heading := re.match(r"    # (.*)", line):
            group = heading[1]
        if field := re.match(r"    (\w+):.*?  # (.*)", line):
            helps[field[1]] = group, field[2]
    return helps


def parser_of_train(description: str, every_field: bool) -> Parser:
    parser = Parser(description=description, argument_default=argparse.SUPPRESS,
                    epilog=None if every_field else "python train.py --help-all shows every number of a run, by groups")
    parser.add_argument("--help-all", action="store_true", default=False,
                        help="show every field of the configuration and stop")
    parser.add_argument("--preset", choices=list(PRESETS), default="toy", help="which set of numbers to start from")
    parser.add_argument("--stages", default=",".join(NAMES), help="P1,P2,…: which to train (default: all not finished)")
    parser.add_argument("--out", type=Path, default=None, help="run folder (default runs/<preset>)")
    parser.add_argument("--from", dest="source", type=Path, default=None, help="run whose untouched stages are reused")
    parser.add_argument("--steps-scale", type=float, default=1.0, help="multiplies every stage's steps")
    parser.add_argument("--resume", choices=("auto", "never"), default="auto",
                        help="auto: go on with what --out holds; never: train the named stages anew")
    parser.add_argument("--changed-data", action="store_true", default=False,
                        help="go on although what --data holds has changed since the run began")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"), help="auto: cuda or cpu")
    parser.add_argument("--only", default=None, help="tables that the evaluation measures (evaluate.py --help)")
    parser.add_argument("--replay", type=Path, default=None,
                        help="RUN/replay: compute a step again that was not finite, and stop")
    parser.add_argument("--plan", action="store_true", default=False, help="print the stages in figures and stop")
    parser.add_argument("--bench", action="store_true", default=False,
                        help="time a step of each stage, write OUT/bench.json and stop")
    helps, groups = field_help(), {}
    for field in fields(Config):
        if field.name == "preset":
            continue
        group, comment = helps[field.name]
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        like, flag = field.default, "--" + field.name.replace("_", "-")
        default = ",".join(map(str, like)) if isinstance(like, tuple) else like
        text = f"{comment} (toy: {default})".replace("%", "%%")
        text = text if every_field or field.name in FIRST_DAY else argparse.SUPPRESS
        if isinstance(like, bool):
            groups[group].add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
        elif isinstance(like, tuple):
            groups[group].add_argument(flag, type=partial(numbers, type(like[0])), metavar="A,B,…", help=text)
        else:
            groups[group].add_argument(flag, type=type(like), choices=CHOICES.get(field.name), help=text,
                                       metavar=None if field.name in CHOICES else type(like).__name__.upper())
    return parser


def numbers(kind: type, text: str) -> tuple | dict:
    """"1,2,3" -> (1, 2, 3); "T3=390,U2=400" -> {"T3": 390, "U2": 400}"""
    if "=" in text:
        return {name: kind(number) for name, number in (pair.split("=") for pair in text.split(","))}
    return tuple(kind(number) for number in text.split(","))


def parse(description: str = "", arguments: list[str] | None = None) -> tuple[Config, argparse.Namespace]:
    """-> (configuration, the rest). Raises UserError, ValueError; a wrong flag names the nearest."""
    given = vars(parser_of_train(description, every_field=False).read(arguments))
    if given.pop("help_all"):
        parser_of_train(description, every_field=True).print_help()
        raise SystemExit
    scale = given.pop("steps_scale")
    rest = ("stages", "out", "source", "device", "plan", "bench", "resume", "replay", "only", "changed_data")
    rest = argparse.Namespace(**{key: given.pop(key) for key in rest})
    if scale <= 0:
        raise UserError(f"--steps-scale {scale}: above 0 is wanted")
    rest.out, rest.stages = rest.out or Path("runs") / given["preset"], rest.stages.split(",")
    for name in rest.stages:
        if name not in NAMES:
            raise UserError(f"unknown stage {name!r} in --stages: they are {','.join(NAMES)}")
    rest.device = best_device(rest.device)
    defaults = {"precision": default_precision(rest.device), "workers": 4 if rest.device == "cuda" else 0}
    if defaults["precision"] == "fp16":  # a GPU from before Ampere
        defaults["attention"] = "sdpa"
    preset = PRESETS[given["preset"]]
    if defaults["precision"] != "bf16" and rest.plan:
        defaults.pop("precision")  # a forecast is of the machine that the preset is for
    elif defaults["precision"] != "bf16":
        preset = {key: value for key, value in preset.items() if key != "precision"}  # bf16 is for where it is fast
    whole = make_config(preset=given["preset"])
    for key, some in [(key, some) for key, some in given.items() if isinstance(some, dict)]:  # of some stages alone
        if key not in PER_STAGE or set(some) - {*NAMES}:
            raise UserError(f"--{key}: NAME=NUMBER is for {', '.join(PER_STAGE)}, and names are {','.join(NAMES)}")
        given[key] = tuple(some.get(name, usual) for name, usual in zip(NAMES, getattr(whole, key)))
    given |= {model: str(Path(given[model]).absolute()) for model in SIZES if given.get(model)}
    config = make_config(**defaults | preset | given | sizes_of(given))
    for key in PER_STAGE:
        setattr(config, key, getattr(config, key) * (len(NAMES) if len(getattr(config, key)) == 1 else 1))
        if len(getattr(config, key)) != len(NAMES):
            raise UserError(f"--{key} takes one number, or {len(NAMES)}, one for each of {','.join(NAMES)}")
    check_numbers(config)
    config.edits = (0.0,) * 7 + config.edits[7:]
    if wrong := [side for side in config.sides if side % (2 * config.patch)]:
        raise UserError(f"--sides {wrong[0]} is no multiple of a token's {2 * config.patch} pixels")
    if config.data_u3 and not config.data:
        raise UserError("--data-u3 PATH needs --data PATH for the other stages")
    if bool(config.vgg) != bool(config.lpips):
        raise UserError("--vgg and --lpips go together: VGG16's weights, and LPIPS's heads on them")
    if config.align == "external" and not config.teacher:
        raise UserError("--align external needs --teacher RUN, a run folder whose P1 encoder teaches")
    if config.board and find_spec("tensorboard") is None:
        raise UserError("--board needs TensorBoard: pip install tensorboard")
    if config.shard and (config.optimizer == "muon" or config.precision == "fp16"):
        raise UserError("--shard goes with --optimizer adamw (Muon turns whole matrices) and --precision bf16 or fp32")
    config.steps = tuple(max(1, round(steps * scale)) for steps in config.steps)
    for key in {"data", "data_u3"} & given.keys():
        openmojis = key == "data" and given[key] == "openmoji"
        setattr(config, key, str(openmoji.folder(config.side)) if openmojis else data_path(given[key]))
    return config, rest
