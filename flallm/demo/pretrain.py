"""Pre-trains a small mBART, where no pre-trained model can be had: the demo, a new language.

mBART's recipe (Liu et al. 2020, arXiv 2001.08210) at the size of a laptop: spans of 35 % of the
words are masked, the others are shuffled, and the model writes the sentence. The result is an
ordinary Hugging Face folder.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from flallm.config import Train
from flallm.data.dataset import IGNORE_INDEX
from flallm.distributed.context import precision
from flallm.model.llm import ATTN_IMPL
from flallm.utils import UserError

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
PAD, EOS = 1, 2  # ids in SPECIAL


def pretrain(
    sentences: list[str],
    out: Path,
    *,
    vocabulary: int = 600,
    layers: int = 3,
    width: int = 192,
    heads: int = 6,
    steps: int = 800,
    batch: int = 64,
    seed: int = 0,
) -> None:
    """Trains an encoder and a decoder of `layers` layers each on the sentences.

    Saves the model with its tokenizer to `out`. Raises UserError where that exists.
    """
    if not sentences:
        raise UserError("there is no text to pre-train on")
    if out.exists():
        raise UserError(f"{out} is there already: remove it or name another folder")
    tokenizer = make_tokenizer(sentences, vocabulary)
    torch.manual_seed(seed)
    model = _model(len(tokenizer), layers, width, heads).train()
    print(
        f"language model: {model.num_parameters() / 1e6:.2f} M parameters, "
        f"vocabulary {len(tokenizer)}, {len(sentences)} sentences, {steps} steps",
        flush=True,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, steps, pct_start=0.1)
    rng, began = np.random.default_rng(seed), time.monotonic()
    by_length = sorted(sentences, key=lambda s: (len(s.split()), rng.random()))
    for step in range(1, steps + 1):
        # Neighbours in length need hardly any padding.
        first = rng.integers(0, max(1, len(by_length) - batch))
        loss = _loss(model, tokenizer, by_length[first : first + batch], rng)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 200 == 0 or step == steps:
            left = (time.monotonic() - began) / step * (steps - step)
            print(
                f"language model  step {step}/{steps}  loss {loss.item():.3f}  "
                f"{left // 60:.0f}:{left % 60:02.0f} left",
                flush=True,
            )
    part = out.with_name(out.name + ".part")
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    part.rename(out)


def _model(vocabulary: int, layers: int, width: int, heads: int):
    from transformers import MBartConfig, MBartForConditionalGeneration

    config = MBartConfig(
        vocab_size=vocabulary,
        d_model=width,
        encoder_layers=layers,
        encoder_attention_heads=heads,
        encoder_ffn_dim=4 * width,
        decoder_layers=layers,
        decoder_attention_heads=heads,
        decoder_ffn_dim=4 * width,
        max_position_embeddings=512,
        dropout=0.0,
        scale_embedding=True,
        bos_token_id=0,
        pad_token_id=PAD,
        eos_token_id=EOS,
        decoder_start_token_id=0,
        forced_eos_token_id=None,
        attn_implementation=ATTN_IMPL,
    )
    return MBartForConditionalGeneration(config)


def _loss(model, tokenizer, sentences: list[str], rng: np.random.Generator) -> torch.Tensor:
    """Cross entropy of the sentences, given their noised versions."""
    noised = [noise(sentence, rng) for sentence in sentences]
    source = tokenizer(noised, add_special_tokens=False)["input_ids"]
    target = tokenizer(sentences, add_special_tokens=False)["input_ids"]
    inputs = _padded([[*ids, EOS] for ids in source], PAD)
    labels = _padded([[*ids, EOS] for ids in target], IGNORE_INDEX)
    shifted = labels[:, :-1].masked_fill(labels[:, :-1] == IGNORE_INDEX, PAD)
    decoder_inputs = torch.cat([labels.new_zeros(len(labels), 1), shifted], 1)
    with precision(Train(), torch.device("cpu")):
        logits = model(
            input_ids=inputs,
            attention_mask=(inputs != PAD).long(),
            decoder_input_ids=decoder_inputs,
            use_cache=False,
        ).logits
    return F.cross_entropy(
        logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE_INDEX
    )


def make_tokenizer(sentences: list[str], vocabulary: int):
    """Byte-pair encoding with mBART's first ids. Words of a small language are one token each."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    model = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    model.normalizer = tokenizers.normalizers.NFKC()
    model.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    model.decoder = tokenizers.decoders.Metaspace()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=SPECIAL, show_progress=False
    )
    model.train_from_iterator(sentences, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=model,
        bos_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        mask_token="<mask>",
    )


def noise(sentence: str, rng: np.random.Generator) -> str:
    """Shuffles the words half the time, then masks spans of about 35 % of them."""
    words = sentence.split()
    if rng.random() < 0.5:
        places = np.arange(len(words)) + rng.uniform(0, len(words), len(words))
        words = [words[i] for i in np.argsort(places)]
    masked, i = [], 0
    while i < len(words):
        if rng.random() < 0.35 / 2:
            span = max(1, rng.poisson(2))
            masked.append("<mask>")
            i += span
        else:
            masked.append(words[i])
            i += 1
    return " ".join(masked)


def _padded(rows: list[list[int]], value: int) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(r) for r in rows], True, value)
