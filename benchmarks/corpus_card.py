"""What a text-to-text model gets on a corpus with glosses, a JSON object a line.

    python benchmarks/corpus_card.py card SHARDS LLM    both bounds
    python benchmarks/corpus_card.py dials LLM          the upper one, with each dial of make_shards.py --preset=bench turned back

glossed_bleu4 is an upper bound, from gold signs to text: what would be translated if every sign were seen. blind_bleu4 is a lower bound, from nothing to
text: what a language model says that knows the sentences and sees no video. Both fine-tune the language model of stage 2 on train and score test.
"""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from figures import figure

from flallm.commands import parse
from flallm.commands.parse import Count
from flallm.data.corpora import synthetic
from flallm.data.dataset import IGNORE_INDEX
from flallm.data.reader import Shards
from flallm.evaluation import metrics

BATCH, RATE, BEAM, TOKENS = 32, 5e-4, 5, 48
# Few signs have none that join clauses. Assimilation is a matter of video alone.
DIALS = (
    (),
    ("many", "joined"),
    ("tail",),
    ("short",),
    ("joined",),
    ("paraphrase",),
    ("again",),
    ("held_out",),
)


def rows(shards: str, split: str) -> list[tuple[str, str]]:
    """(glosses, text) of each clip."""
    read = Shards(shards, split)
    metas = [read.read(i)[1] for i in range(len(read))]
    return [(meta["gloss"].lower(), meta["text"]) for meta in metas]


def bleu4(train: list[tuple[str, str]], test: list[tuple[str, str]], llm: str, steps: int) -> float:
    """The language model fine-tuned from the first of each pair to the second, and scored on test."""
    from transformers import AutoTokenizer, MBartForConditionalGeneration

    torch.manual_seed(0)
    tokenizer, model = (
        AutoTokenizer.from_pretrained(llm),
        MBartForConditionalGeneration.from_pretrained(llm),
    )
    optimizer = torch.optim.AdamW(model.parameters(), RATE, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps, pct_start=0.05)
    rng = np.random.default_rng(0)

    def padded(texts: list[str], value: int) -> torch.Tensor:
        ids = [
            torch.tensor(
                [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
            )
            for text in texts
        ]
        return torch.nn.utils.rnn.pad_sequence(ids, True, value)

    def read(sources: list[str]) -> dict[str, torch.Tensor]:
        ids = padded(sources, tokenizer.pad_token_id)
        return {"input_ids": ids, "attention_mask": (ids != tokenizer.pad_token_id).long()}

    model.train()
    for _ in range(steps):
        picked = [train[i] for i in rng.integers(len(train), size=BATCH)]
        labels = padded([text for _, text in picked], IGNORE_INDEX)
        before = torch.cat(
            [
                labels.new_full((len(labels), 1), model.config.decoder_start_token_id),
                labels[:, :-1],
            ],
            1,
        )
        logits = model(
            **read([source for source, _ in picked]),
            decoder_input_ids=before.masked_fill(before == IGNORE_INDEX, tokenizer.pad_token_id),
        ).logits
        torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX
        ).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.eval()
    said = []
    for i in range(0, len(test), BATCH):
        ids = model.generate(
            **read([source for source, _ in test[i : i + BATCH]]),
            num_beams=BEAM,
            max_new_tokens=TOKENS,
        )
        said += [tokenizer.decode(answer, skip_special_tokens=True).strip() for answer in ids]
    return metrics.bleu4(said, [text for _, text in test], "raw")


def card(shards: str, llm: str, *, steps: Count = 800) -> None:
    """Prints both bounds.

    Args:
        shards: a folder of shards whose clips have glosses
        llm: the folder of a small mBART
        steps: of fine-tuning
    """
    train, test = rows(shards, "train"), rows(shards, "test")
    for name, blind in (("glossed_bleu4", False), ("blind_bleu4", True)):
        pairs = [[("" if blind else gloss, text) for gloss, text in part] for part in (train, test)]
        figure(
            name,
            round(bleu4(*pairs, llm, steps), 2),
            "BLEU-4",
            f"{len(test)} sentences, {steps} steps",
        )


def dials(llm: str, *, steps: Count = 800) -> None:
    """Prints the upper bound of bench, and with one dial after the other at the demo's value. Sentences are drawn, nothing is rendered.

    Args:
        llm: the folder of a small mBART, of bench's text
        steps: of fine-tuning
    """
    bench, demo = synthetic.PRESETS["bench"], synthetic.DEMO
    for names in DIALS:
        back = {name: getattr(demo, name) for name in names}
        turned = replace(bench, **back)
        drawn = {
            split: synthetic.sentences(split, count, 0, turned)
            for split, count in zip(("train", "dev", "test"), turned.clips)
        }
        train, test = (
            [(" ".join(glosses).lower(), text) for glosses, text in drawn[split]]
            for split in ("train", "test")
        )
        signs, words = (sum(len(pair[i].split()) for pair in test) / len(test) for i in (0, 1))
        detail = f"{len(test)} sentences of {signs:.1f} signs and {words:.1f} words, {steps} steps"
        said = ",".join(f"{name}={value}" for name, value in back.items())
        figure(
            "glossed_bleu4", round(bleu4(train, test, llm, steps), 2), "BLEU-4", detail, dials=said
        )


if __name__ == "__main__":
    commands = {"card": card, "dials": dials}
    sys.exit(parse.run(sys.argv[1:], commands, Path(__file__).name, lambda: __doc__))
