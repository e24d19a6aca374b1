"""`flallm demo`, the README's first command, on fewer clips and for a few steps."""

import re
import shutil

import pytest
from conftest import SMALL

from flallm.data.corpora import synthetic
from flallm.demo.demo import demo
from flallm.utils import UserError


def test_the_demo_goes_from_shards_to_a_page_with_scores(llm, tmp_path, capsys):
    out = tmp_path / "demo"
    shutil.copytree(llm, out / "llm")
    demo(
        out,
        synthetic.clips(train=24, dev=4, test=6, size=36),
        {**SMALL, "train.steps": 2, "train.dev_every": 2, "decode.max_tokens": 8},
    )
    said = capsys.readouterr().out
    assert (
        "train 24 clips, dev 4 clips, test 6 clips" in said
        and "6 test sentences by signers that training has not seen" in said
    )
    assert (
        re.findall(r"\n(stage.) +[\d.]+ \[", said) == ["stage1", "stage2"]
        and said.count("  hypothesis  ") == 5
    )
    assert "<video" in (out / "stage2/report.html").read_text()
    with pytest.raises(UserError, match="stage1 is there already"):
        demo(out)
