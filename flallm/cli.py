"""The command line: every command of `flallm`, by what it is for."""

from __future__ import annotations

import os
import sys

from flallm.commands import data, evaluate, parse, plan, shards, train, use
from flallm.utils import usable_cpus

GROUPS = {
    "Data": (data.shards, data.features, data.pretrain, data.trim),
    "Train": (train.demo, train.stage1, train.stage2, train.joint, train.ablate),
    "Evaluate": (
        evaluate.evaluate,
        evaluate.score,
        evaluate.compare,
        evaluate.probe,
        evaluate.report,
    ),
    "Use a model": (use.translate, use.export),
    "Plan": (plan.plan, plan.doctor),
}
COMMANDS: dict[str, parse.Command] = {}
for group in GROUPS.values():
    COMMANDS |= {command.__name__: command for command in group}


def overview() -> str:
    """What `flallm --help` prints."""
    lines = ["flallm COMMAND …: sign language video to sentences. Each command has --help."]
    for title, group in GROUPS.items():
        lines += ["", title]
        lines += [f"  {command.__name__:11} {parse.summary(command)}" for command in group]
    return "\n".join(lines)


def run(commands: dict[str, parse.Command], program: str) -> int:
    """Runs the command of sys.argv; returns the exit code."""
    words = sys.argv[1:]
    if words[:1] == ["shards"]:
        return shards.run(words[1:], f"{program} shards")
    return parse.run(words, commands, program, overview)


def main() -> None:
    # Workers are forked after the tokenizer was used.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("OMP_NUM_THREADS", str(usable_cpus()))  # PyTorch reads no quota
    try:
        code = run(COMMANDS, "flallm")
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has enough, as in `flallm score … | head`
        # Python flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    sys.exit(code)
