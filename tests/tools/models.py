"""Models and stages for the tests."""

import json
from pathlib import Path

import torch

import train
from parts.words import TextTokenizer
from plumbing.run_folder import text_tokenizer
from spar import SPAR, Config


def words_of(config: Config) -> TextTokenizer:
    """The drawn world's words."""
    return text_tokenizer(config)


def model_of(config: Config) -> SPAR:
    return SPAR(config, words_of(config))


def run_stage(model: SPAR, stage: str | train.Stage, folder: Path) -> list[dict]:
    """Trains one stage, a train.Stage or its name; -> its lines of the log."""
    stage = train.stage_named(stage) if isinstance(stage, str) else stage
    folder.mkdir(exist_ok=True)
    train.train_stage(model, stage, folder)
    return [line for line in map(json.loads, (folder / "log.jsonl").read_text().splitlines())
            if line["stage"] == stage.name]


def state(model: SPAR) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
