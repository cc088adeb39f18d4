"""Qwen2.5's text tokenizer and InternVL3's templates: what a run that starts from such a folder reads and writes.

    ask    <|im_start|>user\\n<img>{picture}</img>\\nQUESTION<|im_end|>\\n<|im_start|>assistant\\n
    draw   <|im_start|>user\\nGenerate an image: WORDS<|im_end|>\\n<|im_start|>assistant\\n<img>, then the queries
    edit   <|im_start|>user\\nEdit the image: WORDS\\n<img>{picture}</img><|im_end|>\\n<|im_start|>assistant\\n<img>

To ask is InternVL3's own template in transformers; to draw and to edit are those of UniLIP (arXiv 2507.23278), on which
the paper builds: in an edit the words come before the picture. An emptied prompt, for guidance, is "Generate an image."
or "Edit the image.".

The byte pairs are run by the package `tokenizers`, an optional extra that is imported here alone.
"""

import json
from pathlib import Path

from torch import Tensor

from parts.words import TextTokenizer
from plumbing.command import UserError, write_text

FILE = "tokenizer.json"  # in a run folder
MAX_BYTES = 64 << 20  # of one of a tokenizer's files; the published ones have 11 MB
# How a text falls into words before bytes are joined: Qwen2.5's own expression, as its tokenizer.json has it.
SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
         r"\s+(?!\S)|\s+")
SIGNS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<IMG_CONTEXT>", "<img>", "</img>")


class QwenTokenizer(TextTokenizer):
    """`state`: the content of a tokenizer.json. `longest`: tokens of a text that are kept. A sign inside a user's text
    is read as plain words. Raises ValueError where a sign is missing."""

    def __init__(self, state: str, longest: int):
        try:
            import tokenizers
        except ImportError:
            raise UserError("InternVL3's text tokenizer needs an extra: pip install tokenizers") from None
        self.state, self.longest = state, longest
        try:
            content = json.loads(state)
            for entry in (added := content["added_tokens"]):  # then a user's words never become one
                entry["special"] = entry["special"] or entry["content"] in SIGNS
            if content["model"]["dropout"]:
                raise ValueError("its dropout makes other ids each time")
            self.pairs = tokenizers.Tokenizer.from_str(json.dumps(content))
        except Exception as error:  # the package raises plain Exceptions
            raise ValueError(f"it is no tokenizer ({type(error).__name__}: {error})") from None
        self.pairs.no_padding(), self.pairs.no_truncation()
        self.pairs.encode_special_tokens = True
        ids = {sign: self.pairs.token_to_id(sign) for sign in SIGNS}
        for entry in added:  # the package counts on from the words, whatever the file says
            if self.pairs.token_to_id(entry["content"]) != entry["id"]:
                raise ValueError(f"{entry['content']} has the id {entry['id']}, which leaves a gap behind the words")
        if missing := [sign for sign in SIGNS if ids[sign] is None]:
            raise ValueError(f"it has no {missing[0]}")
        self.pad_id, self.bos_id, self.eos_id, self.image_id = (ids[sign] for sign in SIGNS[:4])
        self.begin_image, self.end_image = [ids["<img>"]], [ids["</img>"]]
        self.user, self.assistant = ([self.bos_id, *self.encode(f"{who}\n")] for who in ("user", "assistant"))
        self.line = self.encode("\n")

    def __len__(self) -> int:
        return max(self.pairs.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str) -> list[int]:
        """Raises ValueError for half a character."""
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise ValueError(f"{text!r} holds half a character: write it anew, in UTF-8")
        return self.pairs.encode(text, add_special_tokens=False).ids[:self.longest]

    def decode(self, ids: list[int]) -> str:
        return self.pairs.decode(ids, skip_special_tokens=True).strip()

    def turn(self, content: list[int]) -> list[int]:
        """A user's turn, up to where the assistant begins to speak."""
        return [*self.user, *content, self.eos_id, *self.line, *self.assistant]

    def picture(self, visual_tokens: int) -> list[int]:
        return [*self.begin_image, *[self.image_id] * visual_tokens, *self.end_image] if visual_tokens else []

    def prompts(self, texts: list[str], visual_tokens: int = 0) -> tuple[Tensor, Tensor]:
        """Questions, behind the picture that they are about."""
        picture = [*self.picture(visual_tokens), *self.line] if visual_tokens else []
        return self.pad([self.turn([*picture, *self.encode(text)]) for text in texts])

    def requests(self, texts: list[str], visual_tokens: int = 0) -> tuple[Tensor, Tensor]:
        """Requests to draw, or instructions with the picture that they change behind them; the queries come next."""
        task = "Edit the image" if visual_tokens else "Generate an image"
        picture = [*self.line, *self.picture(visual_tokens)] if visual_tokens else []
        tasks = [self.encode(f"{task}: {text}" if text else f"{task}.") for text in texts]
        return self.pad([[*self.turn([*ids, *picture]), *self.begin_image] for ids in tasks])

    def __getstate__(self) -> dict:  # to other processes it travels as text
        return {"state": self.state, "longest": self.longest}

    def __setstate__(self, given: dict) -> None:
        self.__init__(**given)


def read_text(path: Path) -> str:
    """Raises ValueError for what is missing, no plain file, too large or not UTF-8."""
    try:
        if not path.is_file():
            raise ValueError("it is no plain file")
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"it is larger than {MAX_BYTES >> 20} MB")
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}): fetch the folder again") from None


def read_json(path: Path) -> dict:
    """Raises ValueError, also for what is no JSON object."""
    text = read_text(path)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read ({error}): fetch the folder again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is no JSON object: fetch the folder again")
    return content


def tokenizer_state(folder: Path) -> str:
    """The text of a tokenizer.json for a public folder: its own, or one made of vocab.json, merges.txt and
    added_tokens.json. Raises UserError, ValueError."""
    if (folder / FILE).exists():
        return json.dumps(read_json(folder / FILE), ensure_ascii=False)
    if missing := [name for name in ("vocab.json", "merges.txt") if not (folder / name).exists()]:
        raise UserError(f"{folder} has neither {FILE} nor {missing[0]}: fetch the folder's text tokenizer too")
    merges = read_text(folder / "merges.txt").splitlines()
    merges = [line for number, line in enumerate(merges) if line and not (number == 0 and line.startswith("#version"))]
    added = read_json(folder / "added_tokens.json") if (folder / "added_tokens.json").exists() else {}
    if not all(type(i) is int for i in added.values()):
        raise ValueError(f"{folder / 'added_tokens.json'} maps signs to what is no number: fetch it again")
    split = {"type": "Split", "pattern": {"Regex": SPLIT}, "behavior": "Isolated", "invert": False}
    by_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    return json.dumps({
        "version": "1.0", "truncation": None, "padding": None, "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, by_bytes]}, "post_processor": None,
        "decoder": by_bytes | {"use_regex": True},
        "added_tokens": [dict(id=i, content=sign, single_word=False, lstrip=False, rstrip=False, normalized=False,
                              special=True) for sign, i in sorted(added.items(), key=lambda pair: pair[1])],
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "",
                  "end_of_word_suffix": "", "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                  "vocab": read_json(folder / "vocab.json"), "merges": merges}}, ensure_ascii=False)


def load_qwen(folder: Path, longest: int) -> QwenTokenizer:
    """The text tokenizer of a public folder, or of a run that started from one."""
    try:
        return QwenTokenizer(tokenizer_state(folder), longest)
    except ValueError as error:
        raise UserError(f"{folder}: the text tokenizer does not fit ({str(error)[:200]})") from None


def keep_tokenizer(folder: Path, run: Path) -> None:
    """Into the run folder, which then needs the public one no more."""
    write_text(run / FILE, load_qwen(folder, 1).state)
