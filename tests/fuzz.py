"""Thousands of spoilt inputs: `python tests/fuzz.py [COUNT] [SEED]`, or `make fuzz`.

Each is a good file with a few changes (bits, cuts, pieces swapped or doubled, numbers in headers, hostile words), and each must end
in right data, in a cause for every clip that is not right, or in one UserError; anything else is a failure, and so is code
that a label file made run. What the product does in worker processes may crash or hang here too, for that is a cause there.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import pickle
import random
import struct
import sys
import tarfile
import tempfile
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import av
import cv2
import numpy as np
from every_frame import every_frame
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from flallm.data import decoding as decoder
from flallm.data.clips import Clip, SkippedClip
from flallm.data.corpora import csl_daily, how2sign, labels, manifest, phoenix14t, synthetic
from flallm.data.encode import EncodeOptions, _encode_or_cause, encode
from flallm.data.reader import COLUMNS, Shards, checksum
from flallm.data.shards import make_shards
from flallm.data.transforms import Augment, decode, used_frames
from flallm.data.verify import _verify_shard
from flallm.data.video import DECODE_ERRORS, VideoFile
from flallm.data.worker_pool import TaskFailed, WorkerPool
from flallm.utils import UserError, usable_cpus

COUNT, SEED, TIMEOUT = 4000, 0, 30
WORDS = [
    b"\0",
    b'"',
    b"\n",
    b"|",
    b"\t",
    b"\xff",
    b"\r",
    b"..",
    b"/",
    b",",
    b"\xed\xa0\x80",
    b"nan",
    b"1e400",
    b"-1",
    b"9" * 400,
    b"[" * 9000,
    b"null",
    b"{}",
]
NUMBERS = [0, 1, 7, 2**15, 2**31 - 1, 2**31, 2**32 - 1]
DECODE = decoder.DecodeOptions(36, 32, 4, 300, Augment(), 0)  # a loader's options


# Changes


def spoil(data: bytes, rng: random.Random) -> bytes:
    """The same with a few changes anywhere."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        i = rng.randrange(len(data) + 1)
        j = min(len(data), i + rng.choice((1, 2, 8, 64, 512)))
        match rng.randrange(9):
            case 0 | 1 if i < len(data):
                data[i] ^= 1 << rng.randrange(8)
            case 2:
                del data[i:j]
            case 3:
                data[i:i] = data[i:j]
            case 4:
                data[i:i] = rng.choice(WORDS)
            case 5:
                k = rng.randrange(len(data) + 1)
                data[i:j], data[k : k + j - i] = data[k : k + j - i], data[i:j]
            case 6:
                data[i : i + 4] = rng.choice(NUMBERS).to_bytes(4, rng.choice(("big", "little")))
            case 7:
                data[i:j] = bytes(j - i)
            case 8 if rng.random() < 0.3:
                del data[i:]
    return bytes(data)


def spoil_boxes(data: bytes, rng: random.Random) -> bytes:
    """An MP4 with one of its boxes doubled, removed, moved, renamed or with another size or number in it."""
    boxes, open_boxes = [], [(0, len(data))]
    while open_boxes:
        at, end = open_boxes.pop()
        while at + 8 <= end and 8 <= (size := int.from_bytes(data[at : at + 4], "big")) <= end - at:
            boxes.append((at, at + size))
            if data[at + 4 : at + 8] in (
                b"moov",
                b"trak",
                b"mdia",
                b"minf",
                b"stbl",
                b"udta",
                b"edts",
            ):
                open_boxes.append((at + 8, at + size))
            at += size
    (a, b), (c, d) = rng.choice(boxes), rng.choice(boxes)
    inside = rng.randrange(a, b)
    match rng.randrange(6):
        case 0:
            return data[:b] + data[a:b] + data[b:]
        case 1:
            return data[:a] + data[b:]
        case 2:
            return data[:a] + data[c:d] + data[b:]
        case 3:
            return (
                data[:a]
                + rng.choice([*NUMBERS, b - a - 1, b - a + 1]).to_bytes(4, "big")
                + data[a + 4 :]
            )
        case 4:
            return data[: a + 4] + data[c + 4 : c + 8] + data[a + 8 :]
        case _:
            return data[:inside] + rng.choice(NUMBERS).to_bytes(4, "big") + data[inside + 4 :]


def spoil_tar(data: bytes, rng: random.Random) -> bytes:
    """A tar written anew with a member doubled, removed, moved, renamed, of another kind or of another size."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        members = [(member, tar.extractfile(member).read()) for member in tar]
    i, j = rng.randrange(len(members)), rng.randrange(len(members))
    member, content = members[i]
    match rng.randrange(6):
        case 0:
            members.insert(j, members[i])
        case 1:
            del members[i]
        case 2:
            members[i], members[j] = members[j], members[i]
        case 3:
            member.name = rng.choice(
                [
                    "../" + member.name,
                    "/etc/" + member.name,
                    "a.b.c",
                    "\udcff.mp4",
                    members[j][0].name,
                    "x" * 200,
                ]
            )
        case 4:
            member.type, member.linkname = (
                rng.choice(
                    [
                        tarfile.SYMTYPE,
                        tarfile.LNKTYPE,
                        tarfile.CHRTYPE,
                        tarfile.FIFOTYPE,
                        tarfile.DIRTYPE,
                    ]
                ),
                "/etc/passwd",
            )
        case 5:
            members[i] = member, content + bytes(rng.choice((1, 512, 10**5)))
            member.size = len(members[i][1])
    out = io.BytesIO()
    with tarfile.open(
        fileobj=out,
        mode="w",
        format=rng.choice((tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)),
    ) as tar:
        for member, content in members:
            with contextlib.suppress(ValueError):  # a name that this format cannot hold
                tar.addfile(member, io.BytesIO(content))
    return (
        out.getvalue()[: len(data)].ljust(len(data), b"\0")
        if rng.random() < 0.7
        else out.getvalue()
    )


def spoil_json(data: bytes, rng: random.Random) -> bytes:
    """JSON of which one value is another or gone."""
    value = json.loads(data)
    holders = [value]
    for holder in holders:
        holders += [
            x
            for x in (holder.values() if isinstance(holder, dict) else holder)
            if isinstance(x, dict | list) and x
        ]
    holder = rng.choice(holders)
    place = rng.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
    if rng.random() < 0.2:
        del holder[place]
    else:
        holder[place] = rng.choice(
            [
                None,
                -1,
                0,
                3,
                2**40,
                10**30,
                1e300,
                True,
                "",
                "x",
                "\0",
                "\ud800",
                "../..",
                [],
                [[]],
                {},
                ["x"],
                {"x": 1},
            ]
        )
    return json.dumps(value).encode()


def spoil_safetensors(data: bytes, rng: random.Random) -> bytes:
    """The file with changes anywhere, or in its header alone, or in the header's length."""
    (size,) = struct.unpack("<Q", data[:8])
    match rng.randrange(3):
        case 0:
            return spoil(data, rng)
        case 1:
            header = spoil(data[8 : 8 + size], rng)
            return struct.pack("<Q", len(header)) + header + data[8 + size :]
        case _:
            return (
                struct.pack("<Q", rng.choice([0, 1, size - 1, size + 1, 2**31, 2**63, 2**64 - 1]))
                + data[8:]
            )


def spoil_columns(path: Path, rng: random.Random) -> None:
    """An index in which some values, or a whole column, are others."""
    with safe_open(path, "np") as file:
        rows, notes = {name: file.get_tensor(name) for name in sorted(file.keys())}, file.metadata()
    name = rng.choice(list(rows))
    column = rows[name]
    match rng.randrange(4):
        case 0:
            info = np.iinfo(column.dtype)
            number = rng.choice(
                [
                    0,
                    1,
                    2,
                    100,
                    2**15,
                    2**31 - 1,
                    2**40,
                    2**62,
                    -1,
                    -(2**31),
                    int(info.min),
                    int(info.max),
                ]
            )
            column[rng.randrange(len(column))] = min(max(number, info.min), info.max)
        case 1:
            rows[name] = column[:: rng.choice((-1, 2))].copy()
        case 2:
            rows[name] = rng.choice(
                [
                    column.astype(np.float32),
                    column.astype(np.int16),
                    column[None],
                    column[:0],
                    np.roll(column, 1),
                ]
            )
        case 3:
            del rows[name]
    save_file(rows, path, notes)


# What is spoilt, and what must come out. Each gives a Counter of {"right", "cause"}, or raises UserError.


def samples(folder: Path) -> list:
    """(key, text, frames) or a cause, of every sample of dev."""
    shards, found = Shards(folder, "dev"), []
    for number, length in enumerate(used_frames(shards.index["frames"], 4, 300)):
        out = np.zeros((length, 32, 32, 3), np.uint8)
        key, text, cause = decoder.load(
            shards, DECODE, number, shards.row(number), (0, None)[number % 2], out
        )  # every other one augmented
        (key + text).encode()
        found.append(one_line(cause) if cause else (key, text, out.tobytes()))
    return found


def one_line(text: str) -> str:
    assert "\n" not in text, f"more than a line: {text!r}"
    text.encode()
    return text


def right_or_cause(found: list, right: list) -> Counter:
    assert all(isinstance(x, str) or x in right for x in found), (
        "a sample is neither right nor left out"
    )
    return Counter("cause" if isinstance(x, str) else "right" for x in found)


def linked(good: Path, folder: Path, *but: str) -> None:
    """The good files, but for those that will be written."""
    for path in good.iterdir():
        if path.name in but:
            (folder / path.name).write_bytes(path.read_bytes())
        else:
            (folder / path.name).symlink_to(path)


def shard(good: Path, folder: Path, rng: random.Random) -> Counter:
    linked(good / "shards", folder, name := "dev-000000.tar")
    data = (folder / name).read_bytes()
    change = rng.choice((spoil, spoil, spoil_tar))
    spoilt = change(data, rng)
    if rng.random() < 0.8:  # or it would be refused for its size
        spoilt = spoilt[: len(data)].ljust(len(data), b"\0")
    (folder / name).write_bytes(spoilt)
    found = right_or_cause(samples(folder), right(good))
    rows = [n for n, number in enumerate(Shards(folder, "dev").index["shard"]) if number == 0]
    problems = [one_line(line) for line in _verify_shard(str(folder), "dev", 0, rows)[1]]
    assert bool(problems) >= bool(found["cause"]), "verify finds nothing where samples are lost"
    return found


def sample(good: Path, folder: Path, rng: random.Random) -> Counter:
    """A shard whose maker is hostile: what is in it is spoilt, and the checksums fit."""
    linked(good / "shards", folder, name := "dev-000000.tar", table := "dev.index.safetensors")
    rows, data, n = load_file(folder / table), (folder / name).read_bytes(), rng.randrange(4)
    row = {column: int(rows[column][n]) for column in COLUMNS}
    clip, meta = (
        data[row[f"{what}_offset"] :][: row[f"{what}_size"]] for what in ("video", "json")
    )
    if rng.random() < 0.3:
        meta = rng.choice((spoil, spoil_json))(meta, rng)
    else:
        clip = rng.choice((spoil, spoil_boxes))(clip, rng)
    at = len(data)
    for what, content in (("json", meta), ("video", clip)):
        rows[f"{what}_offset"][n], rows[f"{what}_size"][n], at = at, len(content), at + len(content)
    rows["checksum"][n] = checksum(clip, meta)
    (folder / name).write_bytes(data + meta + clip)
    save_file(rows, folder / table)
    dataset = json.loads((good / "shards/dataset.json").read_text())
    dataset["splits"]["dev"]["shard_bytes"][0] = at
    (folder / "dataset.json").unlink()
    (folder / "dataset.json").write_text(json.dumps(dataset))
    found, known = samples(folder), right(good)
    lost = isinstance(found.pop(n), str)
    del known[n]
    assert found == known, "a sample beside the spoilt one is not right"
    return Counter(right=len(found) + (not lost), cause=int(lost))


def index(good: Path, folder: Path, rng: random.Random) -> Counter:
    linked(good / "shards", folder, name := "dev.index.safetensors")
    if rng.random() < 0.5:
        spoil_columns(folder / name, rng)
    else:
        (folder / name).write_bytes(spoil_safetensors((folder / name).read_bytes(), rng))
    return right_or_cause(samples(folder), right(good))


def dataset(good: Path, folder: Path, rng: random.Random) -> Counter:
    linked(good / "shards", folder, name := "dataset.json")
    (folder / name).write_bytes(rng.choice((spoil, spoil_json))((folder / name).read_bytes(), rng))
    if rng.random() < 0.3:
        make_shards(
            synthetic_clips(), folder, EncodeOptions(per_shard=4), {"name": "fuzz"}, 1
        )  # all are there: nothing is made
    return right_or_cause(samples(folder), right(good))


def unjoined(good: Path, folder: Path, rng: random.Random) -> Counter:
    """What parts leave behind, joined."""
    linked(
        good / "parts",
        folder,
        *(spoilt := [p.name for p in (good / "parts").iterdir() if p.suffix in (".rows", ".part")]),
    )
    path = folder / rng.choice(sorted(spoilt))
    if path.suffix == ".part":
        path.write_bytes(rng.choice((spoil, spoil_json))(path.read_bytes(), rng))
    elif rng.random() < 0.5:
        spoil_columns(path, rng)
    else:
        path.write_bytes(spoil_safetensors(path.read_bytes(), rng))
    make_shards(synthetic_clips(), folder, EncodeOptions(per_shard=4), {"name": "fuzz"}, 1)
    return right_or_cause(samples(folder), right(good))


def media(good: Path, folder: Path, rng: random.Random) -> Counter:
    """A video to make a shard of: whatever is kept of it can be read again, by the short way of the loader and by the long one."""
    source = rng.choice(sorted((good / "videos").iterdir()))
    data = source.read_bytes()
    path = folder / source.name
    path.write_bytes(
        spoil_boxes(data, rng)
        if source.suffix in (".mp4", ".mov") and rng.random() < 0.5
        else spoil(data, rng)
    )
    cut = rng.choice([(), (), (0.2, 0.8), (0.5, None)])
    result = _encode_or_cause(
        Clip("k", "train", "t", VideoFile(str(path), *cut)),
        EncodeOptions(short_side=rng.choice((32, 256)), fps=rng.choice((None, None, 10))),
    )
    if isinstance(result, str):
        one_line(result)
        return Counter(cause=1)
    clip, meta = result
    json.dumps(meta, ensure_ascii=False).encode()
    try:
        frames = decode(clip, 36, 4, 300, meta["num_frames"])
    except DECODE_ERRORS as error:
        one_line(str(error))
        return Counter({"cause, found by the loader": 1})
    assert np.array_equal(frames, every_frame(clip, 36, 4, 300)), (
        "the loader's short way gives other frames"
    )
    return Counter(right=1)


TABLES: dict[str, Callable[[Path], Iterator]] = {
    "csl/sentence_label/csl2020ct_v2.pkl": lambda root: csl_daily.clips(root / "csl"),
    "csl/sentence_label/split_1.txt": lambda root: csl_daily.clips(root / "csl"),
    "csl-map/sentence_label/video_map.txt": lambda root: csl_daily.clips(root / "csl-map"),
    "how2sign/how2sign_realigned_val.csv": lambda root: how2sign.clips(
        root / "how2sign", root / "how2sign", False
    ),
    "phoenix/annotations/manual/PHOENIX-2014-T.dev.corpus.csv": lambda root: phoenix14t.clips(
        root / "phoenix"
    ),
    "labels/labels.train": lambda root: labels.clips(root / "labels", root / "images"),
    "labels-gz/labels.dev": lambda root: labels.clips(root / "labels-gz", root / "images"),
    "labels-0/labels.dev": lambda root: labels.clips(root / "labels-0", root / "images"),
    "labels-hostile/labels.dev": lambda root: labels.clips(
        root / "labels-hostile", root / "images"
    ),
    "manifest.csv": lambda root: manifest.clips(root / "manifest.csv", root),
    "manifest.tsv": lambda root: manifest.clips(root / "manifest.tsv", root),
    "manifest.jsonl": lambda root: manifest.clips(root / "manifest.jsonl", root),
}


def table(good: Path, folder: Path, rng: random.Random) -> Counter:
    name = rng.choice(sorted(TABLES))
    parts = name.split("/")
    for i in range(len(parts)):  # the folders on the way to the table are real, all else is linked
        here = Path(folder, *parts[:i])
        here.mkdir(exist_ok=True)
        for path in Path(good / "tables", *parts[:i]).iterdir():
            if path.name != parts[i]:
                (here / path.name).symlink_to(path)
    data = (good / "tables" / name).read_bytes()
    if name.endswith("-gz/labels.dev") and rng.random() < 0.7:
        data = gzip.compress(spoil(gzip.decompress(data), rng))
    else:
        data = spoil(data, rng)
    (folder / name).write_bytes(data)
    found, lines = Counter(), 0
    with contextlib.redirect_stdout(io.StringIO()):
        rows = list(TABLES[name](folder))
    for row in rows:
        lines += row.split == "dev"
        if isinstance(row, SkippedClip):
            json.dumps(asdict(row), ensure_ascii=False).encode()
            found["cause"] += 1
            continue
        json.dumps([row.key, row.text, row.gloss, row.signer], ensure_ascii=False).encode()
        try:
            count = sum(1 for _ in row.media.frames()[1])
            found["right" if count else "cause"] += 1
        except DECODE_ERRORS as error:
            str(error).encode()
            found["cause"] += 1
    if name.startswith(("how2sign", "phoenix")):
        text = data.decode("utf-8-sig").replace("\r\n", "\n")
        assert lines == sum(bool(line.strip()) for line in text.split("\n")[1:]), (
            "a row gives neither a clip nor a cause"
        )
    return found


KINDS = {f.__name__: f for f in (shard, sample, index, dataset, unjoined, media, table)}
IN_WORKERS = {"sample", "shard", "media"}  # which the product, too, does in processes that may die


# The harness


def synthetic_clips() -> list[Clip]:
    return list(synthetic.clips(train=2, dev=6, test=1, size=36))


_right: list = []


def right(good: Path) -> list:
    if not _right:
        _right.extend(samples(good / "shards"))
    return list(_right)


class Hostile:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def write_video(
    path: Path,
    codec: str,
    size: tuple[int, int] = (64, 48),
    frames: int = 30,
    rate: int = 25,
    **options: str,
) -> None:
    container_options = options.pop("container", {})
    image = (
        np.random.default_rng(0)
        .integers(0, 255, (size[1] // 4, size[0] // 4, 3), np.uint8)
        .repeat(4, 0)
        .repeat(4, 1)
    )
    with av.open(str(path), "w", options=container_options) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height = image.shape[1], image.shape[0]
        stream.pix_fmt, stream.options = (
            {"gif": "rgb8", "mjpeg": "yuvj420p"}.get(codec, "yuv420p"),
            options,
        )
        for i in range(frames):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.roll(image, i, 1), "rgb24")))
        container.mux(stream.encode())


def prepare(good: Path, odd: Path | None = None) -> None:
    """The good files: shards, parts that are not joined, videos of many kinds, tables of every corpus. `odd`: a folder of further videos."""
    make_shards(synthetic_clips(), good / "shards", EncodeOptions(per_shard=4), {"name": "fuzz"}, 2)
    for i in range(2):
        make_shards(
            synthetic_clips(),
            good / "parts",
            EncodeOptions(per_shard=4),
            {"name": "fuzz"},
            1,
            (i, 2),
        )
    videos, tables = good / "videos", good / "tables"
    videos.mkdir()
    (videos / "ours.mp4").write_bytes(encode(synthetic_clips()[1], EncodeOptions())[0])
    write_video(videos / "plain.mp4", "libx264")
    write_video(
        videos / "fragmented.mp4",
        "libx264",
        container={"movflags": "frag_keyframe+empty_moov"},
        g="8",
    )
    write_video(videos / "a.mov", "mpeg4", bf="2")
    write_video(videos / "a.mkv", "libx265", **{"x265-params": "log-level=none"})
    write_video(videos / "a.webm", "libvpx-vp9", **{"deadline": "realtime", "cpu-used": "8"})
    write_video(videos / "a.ts", "libx264")
    write_video(videos / "a.avi", "mjpeg", frames=8)
    write_video(videos / "a.gif", "gif", frames=6)
    for path in sorted(odd.iterdir()) if odd and odd.is_dir() else ():
        (videos / path.name).write_bytes(path.read_bytes())

    csl, maps, h2s, phoenix = (tables / name for name in ("csl", "csl-map", "how2sign", "phoenix"))
    for folder in (
        csl / "sentence_label",
        maps / "sentence_label",
        h2s,
        phoenix / "annotations/manual",
    ):
        folder.mkdir(parents=True)
    for folder in (
        tables / "images/S0_P1",
        csl / "sentence/frames_512x512/S0_P1",
        maps / "sentence/frames_512x512/S0_P1",
        phoenix / "features/fullFrame-210x260px/dev/S0_P1",
    ):
        folder.mkdir(parents=True)
        for i in range(2):
            cv2.imwrite(str(folder / f"{i}.png"), np.full((26, 21, 3), 100 * i, np.uint8))
    for split in ("train", "test"):
        (phoenix / "features/fullFrame-210x260px" / split).mkdir()
    for folder in (csl, maps):
        (folder / "sentence_label/split_1.txt").write_text(
            "name|split\nS0_P1|train\nS1_P3|dev\nS2_P4|train\n"
        )
    info = [
        {"name": name, "signer": 1, "label_gloss": ["今天", "好"], "label_char": [*"今天很好?"]}
        for name in ("S0_P1", "S1_P3", "S3_P3")
    ]
    (csl / "sentence_label/csl2020ct_v2.pkl").write_bytes(
        pickle.dumps({"info": info, "gloss_map": {"a": [(1, 2)]}})
    )
    rows = [f"{i}|{row['name']}|4|今天 好|今 天 很 好|x|x" for i, row in enumerate(info)]
    (maps / "sentence_label/video_map.txt").write_text(
        "\n".join(["index|name|length|gloss|char|word|postag", *rows])
    )
    write_video(h2s / "v-rgb_front.mp4", "libx264")
    rows = [
        f'v\tv-rgb_front\ts\tk{i}\t{i * 0.1}\t{i * 0.1 + 0.2}\tHe said "hi {i}' for i in range(4)
    ]
    for name in ("train", "val", "test"):
        (h2s / f"how2sign_realigned_{name}.csv").write_text(
            "\n".join(["\t".join(how2sign.HEADER), *(rows if name == "val" else [])]) + "\n"
        )
    for split in ("train", "dev", "test"):
        rows = [f"S{i}_P1|x|-1|-1|S|A B|ein text {i}" for i in range(3)] if split == "dev" else []
        (phoenix / f"annotations/manual/PHOENIX-2014-T.{split}.corpus.csv").write_text(
            "\n".join(["|".join(phoenix14t.HEADER), *rows, ""])
        )
    row = {
        "name": "dev/S0_P1",
        "text": "ein text",
        "gloss": "A B",
        "imgs_path": ["S0_P1/0.png", "S0_P1/1.png"],
    }
    for name, data in (
        ("labels/labels.train", pickle.dumps({"train/a": row, "b": {**row, "gloss": ("A",)}})),
        (
            "labels-gz/labels.dev",
            gzip.compress(pickle.dumps([row, {"name": "S0_P1", "text": "x"}], protocol=2)),
        ),
        ("labels-0/labels.dev", pickle.dumps([row, row], protocol=0)),
        (
            "labels-hostile/labels.dev",
            pickle.dumps(
                [row, Hostile(good / "owned"), {Hostile(good / "owned"): row}], protocol=4
            ),
        ),
    ):
        (tables / name).parent.mkdir()
        (tables / name).write_bytes(data)
    columns = ("video", "text", "split", "start", "end", "key", "gloss")
    rows = [
        ("how2sign/v-rgb_front.mp4", "ein text", "dev", "0.1", "0.5", "a", "A B"),
        ("images/S0_P1", "ä", "train", "", "", "b", ""),
    ]
    for suffix, separator in (("csv", ","), ("tsv", "\t")):
        (tables / f"manifest.{suffix}").write_text(
            "".join(separator.join(row) + "\n" for row in [columns, *rows])
        )
    (tables / "manifest.jsonl").write_text(
        "".join(json.dumps({k: v for k, v in zip(columns, row) if v}) + "\n" for row in rows)
    )


def run(kind: str, good: str, seed: int, number: int) -> Counter | str:
    """What one input comes to; a string says how it failed."""
    rng = random.Random(f"{seed} {number}")
    with tempfile.TemporaryDirectory() as folder:
        try:
            return KINDS[kind](Path(good), Path(folder), rng)
        except UserError as error:
            return (
                Counter({"UserError": 1})
                if "\n" not in str(error)
                else f"more than a line: {error}"
            )
        except Exception:
            return traceback.format_exc()


def fuzz(
    count: int, seed: int, good: Path, processes: int = usable_cpus()
) -> tuple[dict[str, Counter], list[str]]:
    """({kind: how many ended how}, failures)"""
    outcomes, failures, names = defaultdict(Counter), [], list(KINDS)
    with WorkerPool(processes, "flallm.data.decoding") as workers:
        waiting = [(n, names[n % len(names)]) for n in range(count)]
        results = [
            workers.submit(run, kind, str(good), seed, n, timeout=TIMEOUT) for n, kind in waiting
        ]
        for (n, kind), result in zip(waiting, results):
            try:
                ended = result()
            except TaskFailed as cause:
                ended = (
                    Counter({"lost its worker": 1})
                    if kind in IN_WORKERS
                    else f"not survived: {cause}"
                )
            if isinstance(ended, str):
                failures.append(f"{kind}, input {n} of seed {seed}: {ended}")
            else:
                outcomes[kind]["inputs"] += 1
                outcomes[kind].update(ended)
    if (good / "owned").exists():
        failures.append("a label file made code run")
    return outcomes, failures


if __name__ == "__main__":
    count, seed = [*map(int, sys.argv[1:]), *(COUNT, SEED)[len(sys.argv) - 1 :]]
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), Path(__file__).parents[2] / "shared/data/odd-videos")
        outcomes, failures = fuzz(count, seed, Path(folder))
    for kind, ended in outcomes.items():
        print(f"{kind}: " + ", ".join(f"{number} {how}" for how, number in ended.items()))
    print(*failures, sep="\n")
    print(
        f"{sum(ended['inputs'] for ended in outcomes.values())} inputs ended as they must, {len(failures)} did not"
    )
    sys.exit(bool(failures))
