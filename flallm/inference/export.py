"""A run's best model as a folder of its own: what `flallm.load` reads, with a card that says what it is.

config.yaml        preprocessing, model and decoding
model.safetensors  all weights, but for those under LoRA's where these are kept apart
llm/               tokenizer and config of the language model, and the weights under LoRA's where these are kept apart
README.md          model card
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from flallm import __version__
from flallm import config as cfg
from flallm.config import Config
from flallm.data.reader import Shards
from flallm.evaluation import metrics
from flallm.evaluation.decode import load_run
from flallm.inference.translate import translate
from flallm.model.weights import unique_tensors
from flallm.utils import UserError, ensure_dir, visible_files


class Model:
    """An exported model, or that of a run folder."""

    def __init__(self, folder: str | Path, device: str | torch.device = "cpu"):
        self.device = torch.device(device)
        self.model, self.config = load_run(Path(folder), self.device)

    def translate(self, video: str | Path) -> str:
        """The sentence of a video file that FFmpeg can read."""
        if not Path(video).is_file():
            raise UserError(f"{video} does not exist")
        (found,) = translate(self.model, self.config, [str(video)], self.device)
        if found.error:
            raise UserError(found.error)
        return found.text


def export(run: Path, out: Path, merge: bool, licence: str, shards: str = "") -> None:
    """Writes the folder. merge: LoRA's updates are added to the weights under them. shards: where
    the run's shards lie now, if not where its config says; the card tells what they are."""
    if out.exists():
        raise UserError(f"{out} exists already")
    model, config = load_run(run, torch.device("cpu"), shards)
    ensure_dir(out.parent)
    apart = model.base and not merge
    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    if apart:
        shutil.copytree(run / "llm", part / "llm")
    else:
        if model.base:
            model.language, model.base = model.language.merge_and_unload(), set()
        config.llm.lora.rank = 0
        model.text.tokenizer.save_pretrained(part / "llm")
        model.text.config.save_pretrained(part / "llm")
    save_file(unique_tensors(model), part / "model.safetensors")
    card = _card(run, config, sum(p.numel() for p in model.parameters()), licence)
    config.llm.path, config.data.shards = "llm", ""
    (part / "config.yaml").write_text(cfg.dump(config), encoding="utf-8")
    (part / "README.md").write_text(card, encoding="utf-8")
    part.replace(out)


def _card(run: Path, config: Config, parameters: int, licence: str) -> str:
    """In the form that model hubs read."""
    path, train = str(cfg.read_yaml(run / "config.yaml")["llm"]["path"]), config.train
    light = config.stage == "stage1"  # Light-T has nothing of the language model but its words
    named = path.count("/") == 1 and not path.startswith((".", "/"))  # as on a hub
    base = f"base_model: {path}\n" if named and not light else ""
    source = "Light-T, trained from nothing" if light else path if named else f"{Path(path).name} (a local copy)"
    try:
        shards = Shards(config.data.shards, "train")
        data = f"{shards.corpus.get('name', 'unnamed')}, {len(shards):,} training clips"
    except UserError:
        data = f"shards that are not at {config.data.shards} any more"
    rows = []
    for path in visible_files(run / "scores", "*.json"):
        for convention, scores in json.loads(path.read_text(encoding="utf-8")).items():
            if isinstance(scores, dict) and "bleu4" in scores:
                leading = scores.get("leading", "bleu4")
                low, high = scores[leading]["ci95"]
                signature = scores["signature"]["bleu"].replace("|", r"\|")  # which would end a cell
                bleu = f"{scores[leading]['value']:.2f} [{low:.2f}, {high:.2f}]"
                if leading != "bleu4":
                    bleu = f"{metrics.LABELS[leading]} in its place: {bleu}"
                rows.append(f"| {path.stem} | {convention} | {bleu} | {scores['rouge_l']['value']:.2f} | {scores['num_samples']} | `{signature}` |")
    table = (
        "\n".join(["| split | convention | BLEU-4 [95 %] | ROUGE-L | sentences | BLEU's signature |", "|---|---|---|---|---|---|", *rows])
        if rows
        else "Not scored yet."
    )
    return f"""---
library_name: flallm
pipeline_tag: video-text-to-text
tags: [sign-language-translation, gloss-free]
license: {licence}
{base}---
# {config.name or "Unnamed"} {config.stage}

Translates a video of one person signing into a sentence. {parameters / 1e6:.1f} M parameters, trained by flallm {__version__}.

```python
import flallm
model = flallm.load("this folder")
print(model.translate("video.mp4"))
```

## Data
{data}. One frame in {config.data.stride}, of at most {config.data.max_frames} of a clip before that, squeezed to {config.data.resize} pixels, {config.data.crop} pixels cut from the middle.
{config.stage}, {train.steps or f"{train.epochs:g} epochs"}{" steps" if train.steps else ""} of {train.batch} clips; language model {source}.

## Scores
{table}

## Licences
This model: {licence}. It comes from {"" if light else f"the weights of {source} and from "}the data above, whose licence{"s bind" if not light else " binds"} whoever passes it on.

## Limits
- It was trained on the signers, subjects and camera positions of its data and says nothing sure outside them.
- It writes fluent sentences whether or not it understands what it sees: without a person who knows the sign language its output is not to be relied on.
- One person, one sentence a video: over {config.data.max_frames} frames it is thinned out evenly, over {2 * config.data.max_frames} refused.
"""
