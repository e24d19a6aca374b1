import pickle
from pathlib import Path

import pytest
from videos import images, numbered, numbers

from flallm.data.clips import MISSING, Clip, SkippedClip
from flallm.data.corpora import csl_daily
from flallm.data.encode import EncodeOptions, encode
from flallm.utils import UserError


def csl_tree(root: Path) -> None:
    (root / "sentence_label").mkdir()
    (root / "sentence_label/split_1.txt").write_text(
        "name|split\nS000000_P0000_T00|train\nS000001_P0003_T00|dev\nS000005_P0004_T00|train\nS000002_P0001_T00|test\n"
    )
    for name in ("S000000_P0000_T00", "S000001_P0003_T00"):
        images(root / "sentence/frames_512x512" / name, 4, "{:06d}.jpg")


CSL_ROWS = [
    {
        "name": f"S00000{i}_P000{p}_T00",
        "signer": p,
        "length": 4,
        "label_gloss": ["今天", "天气", "好"],
        "label_char": [*"今天天气很好,真的?"],
        "label_word": (),
        "label_postag": [],
    }
    for i, p in ((0, 0), (1, 3), (2, 1))
]


@pytest.mark.parametrize("source", ["pickle", "table"])
def test_csl_daily_official_tree(tmp_path, source):
    csl_tree(tmp_path)
    if source == "pickle":
        (tmp_path / "sentence_label/csl2020ct_v2.pkl").write_bytes(
            pickle.dumps({"info": CSL_ROWS, "gloss_map": {"a": [(1, 2)]}})
        )
    else:
        lines = [
            f"{i}|{r['name']}|4|{' '.join(r['label_gloss'])}|{' '.join(r['label_char'])}|x|x"
            for i, r in enumerate(CSL_ROWS)
        ]
        (tmp_path / "sentence_label/video_map.txt").write_text(
            "\n".join(["index|name|length|gloss|char|word|postag", *lines])
        )
    train, dev, *skipped = csl_daily.clips(tmp_path)
    assert (train.key, train.split, train.text, train.gloss, train.signer) == (
        "S000000_P0000_T00",
        "train",
        "今天天气很好,真的?",
        "今天 天气 好",
        "0",
    )
    assert (
        dev.split,
        dev.signer,
        encode(dev, EncodeOptions())[1]["fps"],
        len(list(dev.media.frames()[1])),
    ) == ("dev", "3", 30, 4)
    assert [(x.key, x.split, x.cause) for x in skipped] == [
        ("S000005_P0004_T00", "train", "is in the split file but has no label"),
        ("S000002_P0001_T00", "test", MISSING),
    ]


def test_names_of_csl_daily_without_a_split_or_with_an_unknown_one_are_left_out(tmp_path):
    csl_tree(tmp_path)
    split = tmp_path / "sentence_label/split_1.txt"
    split.write_text("name|split\nS000000_P0000_T00|trian\nS000001_P0003_T00|dev\n")
    (tmp_path / "sentence_label/csl2020ct_v2.pkl").write_bytes(pickle.dumps({"info": CSL_ROWS}))
    skipped = [x for x in csl_daily.clips(tmp_path) if isinstance(x, SkippedClip)]
    assert [(x.key, x.cause) for x in skipped] == [
        ("S000000_P0000_T00", "its split is none of train, dev, test"),
        ("S000002_P0001_T00", "has a label but is not in the split file"),
    ]


def test_different_labels_of_one_name_are_all_named(tmp_path):
    csl_tree(tmp_path)
    changed = [{**row, "label_char": [*"不好"]} for row in CSL_ROWS[:2]]
    (tmp_path / "sentence_label/csl2020ct_v2.pkl").write_bytes(
        pickle.dumps({"info": [*CSL_ROWS, CSL_ROWS[2], *changed]})
    )
    with pytest.raises(
        UserError,
        match=r"different labels have one name, .*: S000000_P0000_T00, S000001_P0003_T00$",
    ):
        list(csl_daily.clips(tmp_path))


def test_csl_daily_videos(tmp_path):
    csl_tree(tmp_path)
    (tmp_path / "sentence").rename(tmp_path / "elsewhere")
    (tmp_path / "sentence_label/csl2020ct_v2.pkl").write_bytes(pickle.dumps({"info": CSL_ROWS}))
    with pytest.raises(UserError, match="sentence-crop does not exist"):
        list(csl_daily.clips(tmp_path))
    (tmp_path / "sentence-crop").mkdir()
    with pytest.raises(UserError, match="no other clip has a video either"):
        list(csl_daily.clips(tmp_path))
    numbered(tmp_path / "sentence-crop/S000001_P0003_T00.mp4", 30, 6)
    (clip,) = (c for c in csl_daily.clips(tmp_path) if isinstance(c, Clip))
    assert clip.key == "S000001_P0003_T00" and numbers(clip.media) == list(range(6))
