"""Pre-trains a small mBART on a text file, a sentence a line, for where no pre-trained model can be had: `python tools/make_llm.py TEXT --out DIR`."""

import sys
from pathlib import Path

from flallm import cli
from flallm.data.tables import read_text


def pretrain(text: str, *, out: str, steps: str = "800") -> cli.DeferredCommand:
    """Writes a Hugging Face folder with the model and its tokenizer.

    Args:
        text: a file with a sentence a line
        out: the folder to write
        steps: of 64 sentences
    """
    number = cli.parse_int("steps", steps, 1)

    def work() -> None:
        from flallm.demo.pretrain import pretrain

        sentences = [
            line.strip()
            for line in read_text(Path(text), "a sentence a line was expected there").splitlines()
            if line.strip()
        ]
        pretrain(sentences, Path(out), steps=number)

    return cli.DeferredCommand(work)


if __name__ == "__main__":
    if sys.argv[1:2] != ["pretrain"]:  # which help and errors name
        sys.argv.insert(1, "pretrain")
    sys.exit(cli.run({"pretrain": pretrain}, "make_llm.py"))
