"""Random folders of all layouts and faults, which know how many samples, faults and files that are no data they hold.

    python -m tests.tools.strange_folders FOLDER [SEED]       one of them, to look at
"""

import json
import random
import sys
from collections import Counter
from functools import cache
from pathlib import Path

from tests.tools.planted import TALK, noise, picture, shard

WORDS = ["a red disc", "ein Kreis links", "左边的圆", "a cat", "круг", "two things, one large"]


@cache
def image(number: int) -> bytes:
    return noise(number, 4)


class Strange:
    """A folder that is being written; `there`: sample, fault or passed -> how many."""

    def __init__(self, root: Path, seed: int):
        self.root, self.rng, self.there, self.number = root, random.Random(seed), Counter(), 0
        self.files, self.tar = {}, None
        for _ in range(self.rng.randint(1, 3)):
            self.place = self.rng.choice(["", "v1.5/", "deep/er/", "Größe 左/"])
            for _ in range(self.rng.randint(1, 5)):
                self.rng.choice(LOOSE)(self)
        for number in range(self.rng.randint(0, 3)):
            self.tar, self.place = {}, self.rng.choice(["", "inside/", "./"])
            for _ in range(self.rng.randint(1, 5)):
                self.rng.choice(IN_SHARDS)(self)
            shard(root / self.rng.choice(["", "shards/"]) / f"{number:03}.tar", list(self.tar.items()))
            self.tar = None
        if self.rng.random() < 0.2:
            self.place = "test/"
            for _ in range(self.rng.randint(1, 3)):
                self.rng.choice(SOUND)(self)
        for name, content in self.files.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(content)

    def write(self, name: str, content: bytes | str) -> None:
        content = content if isinstance(content, bytes) else content.encode()
        (self.files if self.tar is None else self.tar)[self.place + name] = content

    def key(self) -> str:
        """A new one; some have dots, spaces or capitals."""
        self.number += 1
        return self.rng.choice(["{:04}", "shot 12.30.{}", "X{}", "größe-{}", "{}"]).format(self.number)

    def image(self) -> bytes:
        return image(self.rng.randrange(14))

    def words(self) -> str:
        return self.rng.choice(WORDS)

    def ending(self, name: str) -> str:
        return self.rng.choice([name, name, name.upper(), name.title()])

    def count(self, what: str, number: int = 1) -> None:
        self.there[what] += number


def captioned(s: Strange) -> None:
    key = s.key()
    s.write(f"{key}.{s.ending('png')}", s.image())
    s.write(f"{key}.{s.ending('txt')}", s.words())
    s.count("sample")


def alone(s: Strange) -> None:
    s.write(f"{s.key()}.{s.ending('png')}", s.image())
    s.count("sample")


def with_record(s: Strange) -> None:
    key = s.key()
    s.write(f"{key}.png", s.image())
    s.write(f"{key}.{s.ending('json')}", json.dumps(s.rng.choice([{"conversations": TALK}, {"caption": s.words()}])))
    s.count("sample")


def edit(s: Strange) -> None:
    key, names = s.key(), s.rng.choice([("source", "target", "instruction.txt"), ("input", "output", "txt")])
    s.write(f"{key}.{names[0]}.png", s.image())
    s.write(f"{key}.{names[1]}.png", s.image())
    s.write(f"{key}.{names[2]}", s.words())
    s.count("sample")


def of_a_list(s: Strange) -> None:
    """Records that name pictures of their own, some that are none, some that lack a part."""
    records, number = [], s.key()
    for i in range(s.rng.randint(1, 4)):
        kind = s.rng.choice(["talk", "words", "edit", "lost", "broken"])
        if kind in ("talk", "edit"):
            s.write(f"of {number}/{i}.png", s.image())
        records.append({"talk": {"image": f"of {number}/{i}.png", "conversations": TALK},
                        "words": {"image": s.rng.choice([None, "", []]), "conversations": TALK},
                        "edit": {"source": f"of {number}/{i}.png", "target": f"of {number}/{i}.png",
                                 "instruction": s.words()},
                        "lost": {"image": f"of {number}/none.png", "conversations": TALK},
                        "broken": {"conversations": TALK[:1]}}[kind])
        s.count("fault" if kind in ("lost", "broken") else "sample")
    lines = s.rng.random() < 0.5
    s.write(f"list {number}.json{'l' * lines}", "\n".join(map(json.dumps, records)) if lines else json.dumps(records))


def metadata(s: Strange) -> None:
    before, s.place = s.place, f"{s.place}m{s.key()}/"
    rows = [(f"{i}.png", s.words()) for i in range(s.rng.randint(1, 3))]
    for name, _ in rows:
        s.write(name, s.image())
    if s.rng.random() < 0.5:
        s.write("metadata.csv", "file_name,text\n" + "".join(f'{name},"{text}"\n' for name, text in rows))
    else:
        s.write("metadata.jsonl", "".join(json.dumps({"file_name": n, "text": text}) + "\n" for n, text in rows))
    s.count("sample", len(rows))
    s.place = before


def lonely_words(s: Strange) -> None:
    s.write(f"lonely{s.key()}.txt", s.words())
    s.count("fault")


def empty(s: Strange) -> None:
    key = s.key()
    s.write(f"{key}.png", s.image())
    s.write(f"{key}.txt", "")
    s.count("fault")


def half_an_edit(s: Strange) -> None:
    key = f"half{s.key()}"
    s.write(f"{key}.source.png", s.image())
    s.write(f"{key}.instruction.txt", s.words())
    s.count("fault")


def another_kind(s: Strange) -> None:
    s.write(f"{s.key()}.{s.rng.choice(['gif', 'jfif', 'heic', 'zip'])}", picture())
    s.count("fault")


def left_behind(s: Strange) -> None:
    name = s.rng.choice(["._{}.png", "Thumbs.db", ".DS_Store", "{}.parquet", "{}_stats.json", "{}.md", ".hidden{}"])
    name = name.format(s.key())
    if s.place + name not in (s.files if s.tar is None else s.tar):
        s.write(name, b"?")
        s.count("passed")


SOUND = [captioned, alone, with_record, edit, of_a_list, metadata]
LOOSE = [*SOUND, *SOUND, lonely_words, empty, half_an_edit, another_kind, left_behind]
IN_SHARDS = [captioned, alone, with_record, edit] * 2 + [lonely_words, empty, half_an_edit, another_kind, left_behind]


if __name__ == "__main__":
    print(dict(Strange(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0).there))
