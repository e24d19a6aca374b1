"""`flallm pretrain` as a script: `python tools/make_llm.py TEXT --out DIR`."""

import sys

from flallm.commands.data import pretrain
from flallm.commands.parse import run_command, write_utf8

if __name__ == "__main__":
    write_utf8()
    words = sys.argv[1:]
    if words[:1] == ["pretrain"]:
        words = words[1:]
    sys.exit(run_command(pretrain, words or ["--help"], "make_llm.py"))
