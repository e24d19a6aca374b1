"""What the scripts here have in common: each prints figures, a JSON object a line, by functions that are given an empty folder."""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path


def figure(name: str, value: float | None, unit: str, detail, **more) -> None:
    value = value if value is None else round(float(value), 4)
    print(
        json.dumps({"figure": name, "value": value, "unit": unit, "detail": detail, **more}),
        flush=True,
    )


def chosen(figures: dict[str, Callable]) -> Iterable[str]:
    """Those that the command line names, else all."""
    if unknown := set(sys.argv[1:]) - figures.keys():
        sys.exit(f"no figure {', '.join(sorted(unknown))}; there are {', '.join(figures)}")
    return sys.argv[1:] or figures


def main(figures: dict[str, Callable[[Path], None]]) -> None:
    for name in chosen(figures):
        with tempfile.TemporaryDirectory() as folder:
            figures[name](Path(folder))


def small_llm(out: Path, **shape: int) -> None:
    """A language model that has learnt nothing, as good as any where time is measured."""
    from flallm.data.corpora import synthetic
    from flallm.demo.pretrain import pretrain

    with contextlib.redirect_stdout(sys.stderr):
        pretrain([text for _, text in synthetic.sentences("text", 3000)], out, **shape)


def peak_bytes() -> int:
    """The most memory that this process has held."""
    return (
        int(
            next(
                line
                for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
                if line.startswith("VmHWM")
            ).split()[1]
        )
        * 1024
    )
