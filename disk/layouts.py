"""Data on disk: what a path holds, found out by looking at names, headers and records.

    x.jpg|png|webp + x.txt   a caption; x.json may hold {"conversations": …} or {"caption": …}
    x.source.png + x.target.png + x.instruction.txt      an edit (BLIP3o: x.input.jpg, x.output.jpg, x.txt)
    000.tar 001.tar …        the same names inside (WebDataset)
    *.json|jsonl             LLaVA: [{"image": …, "conversations": [{"from": "human", "value": …}, {"from": "gpt", …}]}
    *.json|jsonl             edits: [{"source": …, "target": …, "instruction": …}, …]
    metadata.jsonl|csv       captions: {"file_name": …, "text": …}

All of it may stand in one folder, and in folders inside. Each sample is read, or a fault, or passed over and counted.
"""

import os
import re
import stat
from pathlib import Path

from disk.files import BadFile, Blob, check_name, inside, members, printable, read_record, records
from disk.samples import DataFolder, Sample, Unit, hold_out

PICTURES = ("jpg", "jpeg", "png", "webp")
ROLES = {  # ending of a file -> what it is to its key
    "txt": "words", "json": "record", "instruction.txt": "instruction", **{ending: "image" for ending in PICTURES},
    **{f"{name}.{ending}": role for role, names in (("source", ("source", "input")), ("target", ("target", "output")))
       for name in names for ending in PICTURES}}
OTHER_PICTURES = ("gif", "bmp", "tif", "tiff", "heic", "avif", "svg", "jp2", "ico", "psd", "jfif")
MOST_SHARDS = 1_000_000  # of a pattern
INDEX = ".index"  # where index.py keeps its own
PACKED = re.compile(r"\.(tar\.\w+|tgz|zip|7z|rar|arrow)$")
LEFT_BEHIND = {re.compile(pattern, re.I): what for pattern, what in {r"(^|/)(thumbs\.db|desktop\.ini)$": "of Windows",
    r"(^|/)(\._[^/]*|__MACOSX|\.DS_Store)(/|$)": "of a Mac", r"(\.parquet|_stats\.json)$": "of a downloader",
    r"(^|/)\.": "hidden", r"(^|/)vocabulary\.json$": "vocabularies"}.items()}  # what stands beside the data


# ---------------------------------------------------------------- names


def readings(name: str) -> list[tuple[str, str]]:
    """(key, role) in which a file's name can be read, the likeliest first: by its last two parts, as those of an edit;
    by its last; by all behind its first dot, as WebDataset does. Only the last part of a path has an ending."""
    parent, slash, base = name.rpartition("/")
    *parts, last = base.split(".")
    role, of_two = ROLES.get(last.lower()), ROLES.get(".".join([*parts[1:], last][-2:]).lower())
    ways = [(parts[:-1], of_two)] if of_two not in (None, role) else []
    ways += [(parts, role), (parts[:1], role)] if role else []
    return list(dict.fromkeys((parent + slash + ".".join(stem), way) for stem, way in ways if "".join(stem)))


def left_behind(name: str) -> str:
    """Of what a file or folder is that is no data, "" for data."""
    return next((what for pattern, what in LEFT_BEHIND.items() if pattern.search(name)), "")


def place(unit: Unit, samples: dict[str, Sample], name: str, blob: Blob) -> None:
    """One file into its key's sample; `samples`: those of a folder or of a shard, by key."""
    last = name.rpartition(".")[2].lower()
    if what := left_behind(name):
        return unit.pass_over(name, what)
    if last in OTHER_PICTURES or PACKED.search(name.lower()):
        mend = "is packed: unpack it, or store it as a plain .tar" if last not in OTHER_PICTURES else \
            f"is a {last}: save it as png, jpg or webp"
        return unit.faults.append((name, mend))
    ways = readings(name)
    if not ways:
        return unit.pass_over(name, "of other kinds")
    key, role = ways[0]
    sample = samples.setdefault(key, Sample(unit.name, key))
    if role in sample.has:
        unit.faults.append((name, f"its key {printable(key)} has its {role} twice: give each sample a key of its own"))
    else:
        sample.has[role] = blob


def join(samples: dict[str, Sample]) -> None:
    """A file that stands alone goes to the sample that lacks it, where another reading of its name finds one."""
    for key, sample in list(samples.items()):
        if len(sample.has) == 1:
            (_, blob), = sample.has.items()
            for other, role in readings(blob.name)[1:]:
                has = samples[other].has if other in samples else {}
                pictures = has.keys() & {"image", "source", "target"}
                if has and (not pictures if role == "image" else pictures and role not in has):
                    samples[other].has[role] = blob
                    del samples[key]
                    break


# ---------------------------------------------------------------- a path and what is there


def files_of(path: Path) -> list[Path] | None:
    """Where a path names shards, `x.tar` or `{000..012}.tar`, these; None for a folder. Raises BadFile for all else."""
    pattern = re.search(r"\{(\d+)\.\.(\d+)\}", path.name)
    if path.is_dir():
        return None
    if pattern:
        first, last = pattern.groups()
        if int(last) - int(first) > MOST_SHARDS:
            raise BadFile(f"--data {path}: more than {MOST_SHARDS} shards: give their folder")
        names = [f"{number:0{len(first)}}" for number in range(int(first), int(last) + 1)]
        paths = [path.with_name(path.name[:pattern.start()] + name + path.name[pattern.end():]) for name in names]
    else:
        paths = [path]
    missing = [one for one in paths if not one.is_file()]
    if missing and not pattern:
        raise BadFile(f"--data {path}: no such folder")
    if missing or not paths:
        raise BadFile(f"--data {path}: {missing[0] if missing else 'not one shard'} is not there")
    if any(one.suffix.lower() != ".tar" for one in paths):
        raise BadFile(f"--data {path} is a file: give the folder that it is in, or a shard, x.tar or {{000..012}}.tar")
    return paths


def data_path(text: str) -> str:
    """What a run keeps of --data: absolute, so that one folder is one folder however it is spelled. Raises BadFile."""
    if not text.strip():
        raise BadFile("--data is empty: give a folder, or a shard, x.tar or {000..012}.tar")
    path = Path(os.path.abspath(os.path.expanduser(text)))
    files_of(path)
    return str(path)


def look(root: Path) -> tuple[DataFolder, list[tuple[Path, str]]]:
    """-> (what a path holds beside its shards, these: path, name). Raises BadFile where there is nothing to look at."""
    shards, units, lists, samples = files_of(root), [Unit("")], [], {}
    folder = DataFolder(root if shards is None else root.parent, units)
    if shards is not None:
        return folder, [(path, path.name) for path in shards]
    shards = []
    for path in plain_files(root, units[0]):
        name, ending = path.relative_to(root).as_posix(), path.suffix.lower()
        is_list = ending in (".json", ".jsonl") or path.name.lower() == "metadata.csv"
        if ending == ".tar" and not left_behind(name):
            shards.append((path, name))
        elif is_list and not left_behind(name):
            lists.append((path, name))
        else:
            place(units[0], samples, name, whole_file(path, name))
    for path, name in lists:  # last: only now is it known which pictures there are
        if path.suffix.lower() == ".json" and any(key in samples for key, _ in readings(name)):  # a picture's own
            place(units[0], samples, name, whole_file(path, name))
        else:
            units.append(scan_list(root, samples, path, name))
    add_sound(units[0], samples, "folder")
    return folder, shards


def scan(root: Path) -> DataFolder:
    """Finds the samples of a path. Reads names, headers, records and the beginnings of pictures, which tell what is
    held out. Raises BadFile where there is nothing to look at; any other fault is listed in the result."""
    folder, shards = look(root)
    folder.units += [scan_tar(*shard) for shard in shards]
    hold_out(folder)
    if not any(unit.samples for unit in folder.units):
        passed = ", ".join(f"{count} {what} ({first})" for what, (count, first) in folder.counted("passed").items())
        folder.units[0].faults.append(("", f"holds no sample that can be read{passed and '; passed over: '}{passed}"))
    return folder


def plain_files(root: Path, unit: Unit) -> list[Path]:
    """Sorted by name; links, no plain files, names not in UTF-8 and what may not be read are faults of `unit`; folders
    of runs, hidden ones and what programs leave behind are passed over."""
    files = []

    def unreadable(error: OSError) -> None:
        name = Path(error.filename).relative_to(root).as_posix()
        unit.faults.append((name, f"cannot be read ({error.strerror}): give the right to read it, or remove it"))

    for parent, folders, names in os.walk(root, onerror=unreadable):
        folders[:] = [name for name in folders if name != INDEX]
        for name in sorted(folders + names):
            path = Path(parent) / name
            full, mode = path.relative_to(root).as_posix(), path.lstat().st_mode
            try:
                check_name(full)
                if stat.S_ISLNK(mode):
                    raise BadFile("is a link: put the file itself there")
                if not (stat.S_ISDIR(mode) or stat.S_ISREG(mode)):
                    raise BadFile("is no plain file: remove it")
                if stat.S_ISDIR(mode):
                    if what := left_behind(full) or is_run(path) * "runs":
                        unit.pass_over(full + "/", what)
                        folders.remove(name)
                else:
                    files.append(path)
            except BadFile as bad:
                unit.faults.append((full, str(bad)))
                folders[:] = [other for other in folders if other != name]
    return sorted(files)


def is_run(path: Path) -> bool:
    """Whether a folder is a run's (plumbing/run_folder.py), whose pictures are no data."""
    return all((path / name).is_file() for name in ("config.json", "log.jsonl"))


def whole_file(path: Path, name: str) -> Blob:
    return Blob(str(path), 0, path.lstat().st_size, name)


def scan_tar(path: Path, name: str) -> Unit:
    """The samples of a shard; of one that stops being a tar those before the break."""
    unit, samples = Unit(name), {}
    try:
        for inner, member in members(path, name):
            if isinstance(member, Blob):
                inner = inner.removeprefix("./")
                place(unit, samples, inner, member._replace(name=inner))
            else:
                unit.faults.append((inner, str(member)))
    except BadFile as bad:
        unit.faults.append(("", str(bad)))
    add_sound(unit, samples, "shards")
    return unit


def scan_list(root: Path, samples: dict[str, Sample], path: Path, name: str) -> Unit:
    """The records of a JSON list, of JSON lines or of a table. A picture that a record names leaves the folder's own
    `samples`."""
    unit, blobs = Unit(name), []
    try:
        for blob in records(path, name):
            blobs.append(blob)
        if not blobs:
            raise BadFile("has no records: a list of objects is wanted, [{…}, {…}]")
    except BadFile as bad:  # what came before is read
        unit.faults.append(("", str(bad)))
    except OSError as error:
        unit.faults.append(("", f"cannot be read ({error.strerror}): give the right to read it, or remove it"))
    for number, blob in enumerate(blobs):
        sample = Sample(name, str(number), {"record": blob})
        try:
            unit.add(sample, find_pictures(root, samples, path.parent, sample))
        except BadFile as bad:
            unit.faults.append((str(number), str(bad)))
    return unit


def find_pictures(root: Path, samples: dict[str, Sample], parent: Path, sample: Sample) -> str:
    """Gives a record's sample the pictures that it names, by their paths from the list's own folder `parent` on, and
    reads its words once; -> which layout it has. Raises BadFile."""
    blob = sample.has["record"]
    record = read_record(blob)
    for role in ("source", "target") if "instruction" in record else ("image", "images", "file_name"):
        name = record.get(role)
        name = name[0] if isinstance(name, list) and len(name) == 1 else name
        if isinstance(name, list) and name:
            raise BadFile(f"{blob.shown}: {role!r} names {len(name)} pictures: one is read, so make a record of each")
        if not name and role not in ("source", "target"):  # missing, null, "" or []: words alone
            continue
        if not isinstance(name, str):
            raise BadFile(f"{blob.shown}: {role!r} is {'missing' if name is None else 'a ' + type(name).__name__}, "
                          "where a picture's name is wanted")
        name = name if (parent / name).exists() else name.replace("\\", "/")  # a list from Windows
        sample.has[role if "instruction" in record else "image"] = inside(parent, name)
        for key, _ in readings(Path(os.path.relpath(parent / name, root)).as_posix()):
            if key in samples and set(samples[key].has) == {"image"}:  # it stands in the folder: no sample of its own
                del samples[key]
                break
    if "instruction" in record:
        sample.instruction()
        return "instruction triples"
    if "conversations" in record:
        sample.turns()
        return "LLaVA records"
    if "image" not in sample.has:
        raise BadFile(f"{blob.shown} names no picture and has no 'conversations': remove it, or fill it in")
    sample.caption()
    return "captions in a list"


def add_sound(unit: Unit, samples: dict[str, Sample], layout: str) -> None:
    """What each key of a folder or shard is good for; what lacks a part is a fault."""
    join(samples)
    for sample in samples.values():
        try:
            check_parts(sample)
            unit.add(sample, layout)
        except BadFile as bad:
            unit.faults.append((sample.key, str(bad)))


def check_parts(sample: Sample) -> None:
    """Raises BadFile where a sample lacks a part, has an empty one or a record that cannot be read."""
    has = sample.has
    if "source" in has or "target" in has:
        if not {"source", "target"} <= has.keys() or not {"instruction", "words", "record"} & has.keys():
            raise BadFile("an edit needs key.source.png, key.target.png and key.instruction.txt; this has "
                          f"{', '.join(has)}")
    elif "image" not in has:
        raise BadFile(f"{next(iter(has.values())).shown} has no picture: add key.png (or jpg, webp) or remove it")
    for part in has.values():
        if part.size == 0:
            raise BadFile(f"{part.shown} has 0 bytes: write it again or remove it")
    if "record" in has and "source" not in has:
        record = sample.record()
        if "conversations" in record:
            sample.turns()
        elif {"caption", "text"} & record.keys() and "words" not in has:
            sample.caption()
