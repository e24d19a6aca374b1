"""Exports a run's best model as a folder that `flallm.load` reads, with a model card.

config.yaml        preprocessing, model and decoding
model.safetensors  all weights, except those under LoRA's if these are separate
llm/               tokenizer and config of the language model, and the weights under LoRA's if
                   these are separate
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
from flallm.inference.translate import MAX_LENGTH_RATIO, translate
from flallm.model.translator import Translator
from flallm.model.weights import unique_tensors
from flallm.utils import UserError, ensure_dir, visible_files

TABLE_HEAD = """\
| split | convention | BLEU-4 [95 %] | ROUGE-L | sentences | BLEU's signature |
|---|---|---|---|---|---|"""
CARD = """\
---
library_name: flallm
pipeline_tag: video-text-to-text
tags: [sign-language-translation, gloss-free]
license: {licence}
{base_model}---
# {name} {config.stage}

Translates a video of one person signing into a sentence. {parameters:.1f} M parameters, trained by
flallm {version}.

```python
import flallm
model = flallm.load("this folder")
print(model.translate("video.mp4"))
```

## Data
{shards}. Of each clip at most {config.data.max_frames} frames, one in {config.data.stride} of them,
resized to {config.data.resize} pixels, of which the central {config.data.crop} are used.
{config.stage}, {duration} of {config.train.batch} clips; language model {llm}.

## Scores
{scores}

## Licences
This model: {licence}. It comes from {origins} whoever passes it on.

## Limits
- It was trained on the signers, subjects and camera positions of its data. Do not expect it to work
  outside them.
- It writes fluent sentences whether or not it understands the video. Do not rely on its output
  without a person who knows the sign language.
- One person, one sentence a video. Of over {config.data.max_frames} frames it uses some, evenly
  spread; over {limit} frames it refuses.
"""


class Model:
    """The model of an export or of a run folder."""

    def __init__(self, folder: str | Path, device: str | torch.device = "cpu"):
        self.device = torch.device(device)
        self.model, self.config = load_run(Path(folder), self.device)

    def translate(self, video: str | Path) -> str:
        """The sentence of a video file that FFmpeg can read. Raises UserError if it has none."""
        if not Path(video).is_file():
            raise UserError(f"{video} does not exist")
        (translation,) = translate(self.model, self.config, [str(video)], self.device)
        if translation.error:
            raise UserError(translation.error)
        return translation.text


def export(run: Path, out: Path, merge: bool, licence: str, shards: str = "") -> None:
    """Writes the folder of a run's best model.

    merge: adds LoRA's updates to the weights under them.
    licence: name of this model's licence, for the card.
    shards: where the run's shards are now, if not where its config says; the card describes them.
    """
    if out.exists():
        raise UserError(f"{out} exists already")
    model, config = load_run(run, torch.device("cpu"), shards)
    ensure_dir(out.parent)
    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    if model.base and not merge:
        shutil.copytree(run / "llm", part / "llm")
    else:
        if model.base:
            model.language, model.base = model.language.merge_and_unload(), set()
        config.llm.lora.rank = 0
        model.text.tokenizer.save_pretrained(part / "llm")
        model.text.config.save_pretrained(part / "llm")
    save_file(unique_tensors(model), part / "model.safetensors")
    card = _card(run, config, model, licence)
    config.llm.path, config.data.shards = "llm", ""
    (part / "config.yaml").write_text(cfg.dump(config), encoding="utf-8")
    (part / "README.md").write_text(card, encoding="utf-8")
    part.replace(out)


def _card(run: Path, config: Config, model: Translator, licence: str) -> str:
    """The model card, with the front matter that model hubs read."""
    llm_path = str(cfg.read_yaml(run / "config.yaml")["llm"]["path"])
    is_on_hub = llm_path.count("/") == 1 and not llm_path.startswith((".", "/"))
    base_model = ""
    if config.stage == "stage1":  # of the language model Light-T has the word embeddings alone
        llm = "Light-T, trained from scratch"
        origins = "the data above, whose licence binds"
    else:
        llm = llm_path if is_on_hub else f"{Path(llm_path).name} (a local copy)"
        origins = f"the weights of {llm} and from the data above, whose licences bind"
        if is_on_hub:
            base_model = f"base_model: {llm_path}\n"
    steps, epochs = config.train.steps, config.train.epochs
    return CARD.format(
        config=config,
        name=config.name or "Unnamed",
        version=__version__,
        licence=licence,
        base_model=base_model,
        parameters=sum(p.numel() for p in model.parameters()) / 1e6,
        shards=_describe_shards(config.data.shards),
        duration=f"{steps} steps" if steps else f"{epochs:g} epochs",
        llm=llm,
        scores=_score_table(run),
        origins=origins,
        limit=MAX_LENGTH_RATIO * config.data.max_frames,
    )


def _describe_shards(folder: str) -> str:
    try:
        shards = Shards(folder, "train")
    except UserError:
        return f"shards that are not at {folder} any more"
    return f"{shards.corpus.get('name', 'unnamed')}, {len(shards):,} training clips"


def _score_table(run: Path) -> str:
    rows = []
    for path in visible_files(run / "scores", "*.json"):
        for convention, scores in json.loads(path.read_text(encoding="utf-8")).items():
            if isinstance(scores, dict) and "bleu4" in scores:
                rows.append(_score_row(path.stem, convention, scores))
    if not rows:
        return "Not scored yet."
    return "\n".join([TABLE_HEAD, *rows])


def _score_row(split: str, convention: str, scores: dict) -> str:
    leading = scores.get("leading", "bleu4")
    low, high = scores[leading]["ci95"]
    bleu = f"{scores[leading]['value']:.2f} [{low:.2f}, {high:.2f}]"
    if leading != "bleu4":
        bleu = f"{metrics.LABELS[leading]} in its place: {bleu}"
    signature = scores["signature"]["bleu"].replace("|", r"\|")  # | would end the cell
    rouge_l = f"{scores['rouge_l']['value']:.2f}"
    cells = [split, convention, bleu, rouge_l, str(scores["num_samples"]), f"`{signature}`"]
    return f"| {' | '.join(cells)} |"
