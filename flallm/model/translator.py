"""`Translator`: visual encoder -> adapter -> language model. Stage 1, stage 2 and the joint baseline are three of these."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationConfig

from flallm.config import Config, Decode
from flallm.data.dataset import IGNORE_INDEX, Batch
from flallm.data.tokenizer import TranslationTokenizer
from flallm.model.light_t import HiddenStates, light_t
from flallm.model.llm import embedding_scale, family, load_llm
from flallm.model.visual_encoder import VisualEncoder


def adapter(channels: int, width: int) -> nn.Sequential:
    """[P] One hidden layer."""
    return nn.Sequential(nn.Linear(channels, width), nn.ReLU(), nn.Linear(width, width))


class Translator(nn.Module):
    """Sign language video in, text out. `weights=False` leaves the LLM random, for a checkpoint to fill."""

    def __init__(self, config: Config, text: TranslationTokenizer, weights: bool = True):
        super().__init__()
        self.text, self.label_smoothing = text, config.train.label_smoothing
        self.encoder = VisualEncoder(config.encoder)
        light = config.stage == "stage1"
        self.language = light_t(config.light_t, text) if light else load_llm(config.llm, weights)
        self.family, self.scale = family(self.language, text), embedding_scale(self.language)
        self.stack, self.prompt = (1, ([], [])) if light else (config.llm.stack, (text.before, text.after))
        self.input = config.llm.input if config.stage == "stage2" else "signs"
        C = {"frames": config.encoder.widths[-1], "light_t": config.light_t.width}.get(self.input, config.encoder.channels)
        if self.input == "light_t":
            self.light_t = HiddenStates(adapter(config.encoder.channels, C), config.light_t, text)
        self.adapter = adapter(C * self.stack, self.language.get_input_embeddings().embedding_dim)
        self.word_loss = config.train.word_loss
        if self.word_loss or self.input == "words":
            self.words = nn.Linear(C, len(text))
        if self.input == "words":  # nothing but these to begin with
            nn.init.zeros_(self.adapter[-1].weight)
            nn.init.zeros_(self.adapter[-1].bias)
        self.encoder.freeze(config.frozen)
        # The weights under LoRA's: a run writes them once, beside its tokenizer, and its checkpoints hold all others.
        lora = config.llm.lora.rank and not light
        self.base = {f"language.{name}" for name, p in self.language.named_parameters(remove_duplicate=False) if lora and not p.requires_grad}

    def features(self, batch: Batch) -> torch.Tensor:
        """What the adapter reads (F, C): sign-wise features, unless `llm.input` says otherwise."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.encoder.frozen != "encoder"):
            if self.input == "frames":
                return self.encoder.frame_wise(batch.frames, not batch.is_placeholder)
            made = batch.frames.ndim == 2  # before, by `flallm features`
            signs = batch.frames.float() if made else self.encoder(batch.frames, batch.lengths, not batch.is_placeholder)
            return self.light_t(signs, batch.lengths) if self.input == "light_t" else signs

    def _read(self, features: torch.Tensor, lengths: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the language model reads: embeddings (B, N, D) of features between the prompt's words, and a mask (B, N) of those that are not padding."""
        if self.stack > 1:  # a clip's last features may lack neighbours: zeros
            clips = [F.pad(f, (0, 0, 0, -len(f) % self.stack)).view(-1, self.stack * f.shape[1]) for f in features.split(lengths.tolist())]
            features, lengths = torch.cat(clips), torch.tensor([len(f) for f in clips])
        embed = self.language.get_input_embeddings()
        embeddings = self.adapter(features) * self.scale  # (F, D)
        if self.input == "words":  # which word a frame shows is not certain: the mean of all, as likely as each is
            seen = self.words(features)[:, : self.text.rows]  # a token without an embedding is in no text
            every = embed(torch.arange(seen.shape[1], device=features.device))  # (V, D)
            embeddings = embeddings + seen.softmax(-1).to(every.dtype) @ every
        before, after = (embed(torch.tensor(ids, dtype=torch.long, device=features.device)) for ids in self.prompt)
        clips = [torch.cat([before, clip, after]) for clip in embeddings.split(lengths.tolist())]
        padded = nn.utils.rnn.pad_sequence(clips, batch_first=True, padding_side=self.family.side)
        mask = nn.utils.rnn.pad_sequence([torch.ones(len(clip), dtype=torch.long) for clip in clips], batch_first=True, padding_side=self.family.side)
        return {"inputs_embeds": padded, "attention_mask": mask.to(padded.device)}

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """(what is minimised, the cross-entropies of all target tokens with label smoothing), both summed over tokens."""
        features, labels = self.features(batch), batch.labels
        logits = self.family.logits(self._read(features, batch.lengths), labels)  # (B, L, V)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE_INDEX, label_smoothing=self.label_smoothing, reduction="sum")
        if not self.word_loss:
            return loss, loss.detach()
        return loss + self.word_loss * self._word_loss(features, batch), loss.detach()

    def _word_loss(self, features: torch.Tensor, batch: Batch) -> torch.Tensor:
        """IBM Model 1 (Brown et al. 1993) from frames to words: each token of the text is explained by some frame,
        p(token | clip) = mean over its frames of p(token | frame), whatever the order. It needs no gloss, and it
        gives the encoder a gradient that does not pass through a language model which can do without looking."""
        words = self.words(features).float().log_softmax(-1)  # (F, V)
        total = words.new_zeros(())
        for frames, tokens in zip(words.split(batch.lengths.tolist()), batch.labels):
            tokens = tokens[(tokens != IGNORE_INDEX) & (tokens != self.text.end)]
            total = total - (frames[:, tokens].logsumexp(0) - math.log(len(frames))).sum()
        return total

    def last_layers(self) -> dict[str, nn.Module]:
        """The last layer of the encoder and of the language model, where anything of it trains."""
        stacks = [m for name, m in self.language.named_modules() if isinstance(m, nn.ModuleList) and not any(part.isdigit() for part in name.split("."))]
        layers = {"encoder": self.encoder.temporal, "llm": stacks[-1][-1]}  # of a decoder, where there is an encoder before it
        return {name: layer for name, layer in layers.items() if any(p.requires_grad for p in layer.parameters())}

    @torch.no_grad()
    def attention(self, batch: Batch, sentence: str) -> list[tuple[str, torch.Tensor]]:
        """Each word of a sentence with how much of it looks at each part (N,) of the batch's one clip: a feature, or `llm.stack` of them."""
        ids, before = self.text.encode(sentence), self.language.config._attn_implementation
        self.language.set_attn_implementation("eager")  # the fused kernel keeps no weights
        inputs = self._read(self.features(batch), batch.lengths)
        weights = self.family.attention(inputs, torch.tensor([ids], device=inputs["attention_mask"].device))[0]  # (L, N)
        self.language.set_attn_implementation(before)
        weights = weights[:, len(self.prompt[0]) : weights.shape[1] - len(self.prompt[1])].float().cpu()
        return [(word, weights[tokens].mean(0)) for word, tokens in self.text.words(ids)]

    @torch.no_grad()
    def translate(self, batch: Batch, decode: Decode) -> list[str]:
        """A sentence for each clip, by transformers' beam search."""
        return self._generate(self._read(self.features(batch), batch.lengths), decode, 1)

    @torch.no_grad()
    def generate_with_scores(self, batch: Batch, decode: Decode, count: int) -> list[list[tuple[str, float]]]:
        """For each clip its `count` best sentences, and how sure the model is of each: the geometric mean of the probabilities of
        the text's tokens and of the end after them."""
        inputs = self._read(self.features(batch), batch.lengths)
        texts = self._generate(inputs, decode, count)
        labels = nn.utils.rnn.pad_sequence([torch.tensor(self.text.encode(text)) for text in texts], True, IGNORE_INDEX).to(inputs["attention_mask"].device)
        inputs = {name: tensor.repeat_interleave(count, 0) for name, tensor in inputs.items()}
        losses = F.cross_entropy(self.family.logits(inputs, labels).float().mT, labels, ignore_index=IGNORE_INDEX, reduction="none")  # (B * count, L)
        sure = (-losses.sum(1) / (labels != IGNORE_INDEX).sum(1)).exp().tolist()
        found = list(zip(texts, sure))
        return [found[i : i + count] for i in range(0, len(found), count)]

    def _generate(self, inputs: dict[str, torch.Tensor], decode: Decode, count: int) -> list[str]:
        options = GenerationConfig(
            num_beams=decode.beam,
            num_return_sequences=count,
            max_new_tokens=decode.max_tokens,
            length_penalty=decode.length_penalty,
            decoder_start_token_id=self.text.start[0],
            eos_token_id=self.text.end,
            pad_token_id=self.text.pad,
        )
        return [self.text.decode(answer) for answer in self.family.generate(inputs, options)]
