import gzip
import os
import pickle
from pathlib import Path

import cv2
import numpy as np
import pytest

from flallm import UserError
from flallm.corpora import labels, manifest, phoenix14t, synthetic
from flallm.shards import Options, encode


def images(folder: Path, count: int = 5) -> None:
    folder.mkdir(parents=True)
    for i in range(count):
        cv2.imwrite(str(folder / f"images{i + 1:04d}.png"), np.full((260, 210, 3), 10 * i, np.uint8))


def test_synthetic_is_what_it_says():
    train, test = (list(synthetic.sentences(split, n)) for split, n in (("train", 2400), ("test", 250)))
    assert len(synthetic.GLOSSES) >= 60 and len({w for _, text in train for w in text.split()}) >= 120
    assert len(set(map(str, synthetic.lexicon().values()))) == len(synthetic.GLOSSES)
    lengths = [len(glosses) for glosses, _ in train]
    assert min(lengths) == 1 and max(lengths) == 8
    seen = {text for _, text in train}
    assert sum(text in seen for _, text in test) < len(test) / 2
    assert not {tuple(g) for g, _ in train if len(g) > 2} & {tuple(g) for g, _ in test}
    signers = {split: set(numbers) for split, numbers in synthetic.SIGNERS.items()}
    assert not signers["train"] & (signers["dev"] | signers["test"])
    a, b = (encode(next(synthetic.clips(seed=3, train=1, dev=0, test=0)), Options()) for _ in range(2))
    assert a == b


@pytest.mark.parametrize(
    "glosses,text",
    [
        ("TOMORROW SHOP MOTHER APPLE RED 2 BUY", "tomorrow my mother will buy two red apples in the shop"),
        ("YESTERDAY FATHER COFFEE DRINK NOT", "my father did not drink any coffee yesterday"),
        ("TODAY EVENING DOG BIG SEE", "they see a huge dog tonight"),
        ("ANNA TEACHER SEE QUESTION", "does anna meet the teacher"),
    ],
)
def test_grammar(glosses, text):
    g = glosses.split()
    slots = {"time": synthetic.TIMES, "part": synthetic.PARTS, "place": synthetic.PLACES, "adjective": synthetic.ADJECTIVES, "number": synthetic.NUMBERS}
    parts = {slot: next((x for x in g if x in members), None) for slot, members in slots.items()}
    people = [x for x in g if x in synthetic.NAMES | synthetic.PEOPLE]
    thing = next((x for x in g if x in synthetic.NOUNS), None)
    parts |= {"subject": people[0] if people else None, "object": thing or (people[1] if len(people) > 1 else None)}
    parts |= {"negated": "NOT" in g, "question": "QUESTION" in g}
    assert synthetic._translate(next(x for x in g if x in synthetic.VERBS), **parts) == text


def test_phoenix14t_official_tree(tmp_path):
    root = tmp_path / "PHOENIX-2014-T-release-v3/PHOENIX-2014-T"
    (root / "annotations/manual").mkdir(parents=True)
    header = "name|video|start|end|speaker|orth|translation\n"
    for split, name in (("train", "01April_2010_Thursday_heute-6694"), ("dev", "11August_2010"), ("test", "25October_2010")):
        row = f'{name}|{name}/1/*.png|-1|-1|Signer04|JETZT WETTER|und nun "die wettervorhersage\n'
        (root / f"annotations/manual/PHOENIX-2014-T.{split}.corpus.csv").write_text(header + row)
        folder = root / "features/fullFrame-210x260px" / split / name
        images(folder / "1" if split == "dev" else folder)  # some trees still have the 1/
    (root / "features/fullFrame-210x260px/train/01April_2010_Thursday_heute-6694/x.lprof").write_text("stray")
    clips = list(phoenix14t.clips(tmp_path / "PHOENIX-2014-T-release-v3"))
    assert [(c.split, c.text, c.gloss, c.signer) for c in clips] == [
        (s, 'und nun "die wettervorhersage', "JETZT WETTER", "Signer04") for s in ("train", "dev", "test")
    ]
    for clip in clips:
        _, meta = encode(clip, Options())
        assert (meta["num_frames"], meta["fps"], meta["width"], meta["height"]) == (5, 25.0, 210, 260)
    with pytest.raises(UserError, match="does not exist"):
        list(phoenix14t.clips(tmp_path))


def write_labels(folder: Path, content) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "labels.train").write_bytes(gzip.compress(pickle.dumps(content)))


def test_labels_pickle(tmp_path):
    images(tmp_path / "frames/train/a.b")
    row = {"name": "train/a.b", "gloss": "A B", "text": "ein text", "length": 5, "imgs_path": [f"train/a.b/images{i:04d}.png" for i in range(1, 6)]}
    write_labels(tmp_path / "labels", {"train/a.b": row})
    (clip,) = labels.clips(tmp_path / "labels", tmp_path / "frames")
    assert (clip.key, clip.split, clip.text, clip.gloss) == ("a_b", "train", "ein text", "A B")
    assert encode(clip, Options())[1]["num_frames"] == 5


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_a_hostile_pickle_runs_nothing(tmp_path):
    write_labels(tmp_path / "labels", {"train/x": Hostile(tmp_path / "owned")})
    with pytest.raises(UserError, match="nothing in a label file is ever run"):
        list(labels.clips(tmp_path / "labels", tmp_path))
    assert not (tmp_path / "owned").exists()


def test_manifest(tmp_path):
    images(tmp_path / "frames")
    table = tmp_path / "clips.tsv"
    table.write_text("\ufeffvideo\ttext\tsplit\tfps\tsigner\nframes\tGuten Morgen\ttrain\t12.5\tAnna\n", encoding="utf-8")
    (clip,) = manifest.clips(table, tmp_path)
    assert (clip.text, clip.split, clip.signer, encode(clip, Options())[1]["fps"]) == ("Guten Morgen", "train", "Anna", 12.5)
    for content, message in (
        ("video,text\nframes,x\n", "no split"),
        ("video,text,split,glos\nframes,x,train,y\n", "unknown column 'glos'"),
        ("video,text,split\nnothing.mp4,x,train\n", "does not exist"),
        ("video,text,split,start\nframes,x,train,soon\n", "is not a number"),
    ):
        bad = tmp_path / "bad.csv"
        bad.write_text(content)
        with pytest.raises(UserError, match=message):
            list(manifest.clips(bad, tmp_path))
