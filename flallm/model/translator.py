"""`Translator`: visual encoder -> adapter -> language model, for stage 1, stage 2 and joint.

The stages differ in what follows the visual encoder: see `build_stage1`, `build_stage2` and
`build_joint`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedModel

from flallm.config import Config, Decode
from flallm.data.dataset import IGNORE_INDEX, Batch
from flallm.data.tokenizer import TranslationTokenizer
from flallm.model.light_t import HiddenStates, light_t
from flallm.model.llm import embedding_scale, load_llm, make_lm_adapter
from flallm.model.visual_encoder import VisualEncoder


@dataclass
class LanguageParts:
    """What follows the visual encoder.

    input: what the adapter reads, a value of `llm.input`. stack: how many neighbouring features
    become one. prompt: the token ids before and after the features.
    """

    language: PreTrainedModel
    adapter: nn.Sequential
    words: nn.Linear | None  # logits (F, V) of the words that each feature shows
    light_t: HiddenStates | None = None
    input: str = "signs"
    stack: int = 1
    prompt: tuple[list[int], list[int]] = ([], [])


def build_stage1(config: Config, text: TranslationTokenizer) -> LanguageParts:
    """Visual initialing: sign-wise features -> Light-T, without a prompt."""
    language = light_t(config.light_t, text)
    adapter = make_adapter(config.encoder.channels, _embedding_dim(language))
    words = _word_head(config, config.encoder.channels, text)
    return LanguageParts(language, adapter, words)


def build_joint(config: Config, text: TranslationTokenizer, weights: bool) -> LanguageParts:
    """The end-to-end baseline: sign-wise features -> the pre-trained model."""
    language, stack = load_llm(config.llm, weights), config.llm.stack
    adapter = make_adapter(config.encoder.channels * stack, _embedding_dim(language))
    words = _word_head(config, config.encoder.channels, text)
    prompt = text.before, text.after
    return LanguageParts(language, adapter, words, stack=stack, prompt=prompt)


def build_stage2(config: Config, text: TranslationTokenizer, weights: bool) -> LanguageParts:
    """LLM fine-tuning: the features of `llm.input` -> the pre-trained model."""
    language, source, stack = load_llm(config.llm, weights), config.llm.input, config.llm.stack
    channels, hidden_states = config.encoder.channels, None
    if source == "frames":
        channels = config.encoder.widths[-1]
    elif source == "light_t":
        channels = config.light_t.width
        stage1_adapter = make_adapter(config.encoder.channels, channels)
        hidden_states = HiddenStates(stage1_adapter, config.light_t, text)
    adapter = make_adapter(channels * stack, _embedding_dim(language))
    words = _word_head(config, channels, text)
    if source == "words":  # training starts from the words alone
        nn.init.zeros_(adapter[-1].weight)
        nn.init.zeros_(adapter[-1].bias)
    prompt = text.before, text.after
    return LanguageParts(language, adapter, words, hidden_states, source, stack, prompt)


def make_adapter(channels: int, width: int) -> nn.Sequential:
    """[P] One hidden layer."""
    return nn.Sequential(nn.Linear(channels, width), nn.ReLU(), nn.Linear(width, width))


def _embedding_dim(language: PreTrainedModel) -> int:
    return language.get_input_embeddings().embedding_dim


def _word_head(config: Config, channels: int, text: TranslationTokenizer) -> nn.Linear | None:
    reads_words = config.stage == "stage2" and config.llm.input == "words"
    if config.train.word_loss or reads_words:
        return nn.Linear(channels, len(text))
    return None


class Translator(nn.Module):
    """Sign language video in, text out.

    weights: whether to load the pre-trained weights of the language model. Without them it is
    random, for a checkpoint to fill.

    Names in `state_dict`: encoder, language, adapter, and where they are used light_t and words.
    """

    def __init__(self, config: Config, text: TranslationTokenizer, weights: bool = True):
        super().__init__()
        self.text, self.label_smoothing = text, config.train.label_smoothing
        self.word_loss = config.train.word_loss
        self.encoder = VisualEncoder(config.encoder)
        if config.stage == "stage1":
            parts = build_stage1(config, text)
        elif config.stage == "stage2":
            parts = build_stage2(config, text, weights)
        else:
            parts = build_joint(config, text, weights)
        self.input, self.stack, self.prompt = parts.input, parts.stack, parts.prompt
        self.language = parts.language
        self.lm_adapter = make_lm_adapter(parts.language, text)
        self.scale = embedding_scale(parts.language)
        if parts.light_t is not None:
            self.light_t = parts.light_t
        self.adapter = parts.adapter
        if parts.words is not None:
            self.words = parts.words
        self.encoder.freeze(config.frozen)
        # The names of the weights under LoRA's. A run writes these weights once, beside its
        # tokenizer; its checkpoints hold the others.
        self.base: set[str] = set()
        if config.llm.lora.rank and config.stage != "stage1":
            for name, parameter in self.language.named_parameters(remove_duplicate=False):
                if not parameter.requires_grad:
                    self.base.add(f"language.{name}")

    def features(self, batch: Batch) -> torch.Tensor:
        """What the adapter reads (F, C): sign-wise features, unless `llm.input` says otherwise.

        The frames of the batch are video, or features that `flallm features` wrote.
        """
        encoder_trains = self.encoder.frozen != "encoder"
        with torch.set_grad_enabled(torch.is_grad_enabled() and encoder_trains):
            update_stats = not batch.is_placeholder
            if self.input == "frames":
                return self.encoder.frame_wise(batch.frames, update_stats)
            if batch.frames.ndim == 2:
                signs = batch.frames.float()
            else:
                signs = self.encoder(batch.frames, batch.lengths, update_stats)
            if self.input == "light_t":
                return self.light_t(signs, batch.lengths)
            return signs

    def _read(self, features: torch.Tensor, lengths: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the language model reads of features (F, C) of clips with `lengths` features.

        inputs_embeds (B, N, D): the features between the words of the prompt, padded;
        attention_mask (B, N): 1 where there is no padding.
        """
        if self.stack > 1:
            features, lengths = self._stack(features, lengths)
        embeddings = self.adapter(features) * self.scale  # (F, D)
        if self.input == "words":
            embeddings = embeddings + self._mean_word(features)
        before, after = (self._embed_prompt(ids, features.device) for ids in self.prompt)
        clips = [torch.cat([before, clip, after]) for clip in embeddings.split(lengths.tolist())]
        masks = [torch.ones(len(clip), dtype=torch.long) for clip in clips]
        side = self.lm_adapter.side
        padded = pad_sequence(clips, batch_first=True, padding_side=side)
        mask = pad_sequence(masks, batch_first=True, padding_side=side).to(padded.device)
        return {"inputs_embeds": padded, "attention_mask": mask}

    def _stack(
        self, features: torch.Tensor, lengths: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Each `stack` neighbouring features of a clip as one, and how many each clip then has.

        Zeros stand for the neighbours that the last features of a clip lack.
        """
        clips = []
        for clip in features.split(lengths.tolist()):
            padded = F.pad(clip, (0, 0, 0, -len(clip) % self.stack))
            clips.append(padded.view(-1, self.stack * clip.shape[1]))
        return torch.cat(clips), torch.tensor([len(clip) for clip in clips])

    def _mean_word(self, features: torch.Tensor) -> torch.Tensor:
        """The mean (F, D) of all word embeddings, weighted by how likely each feature shows the
        word. Tokens without an embedding are in no text."""
        logits = self.words(features)[:, : self.text.rows]  # (F, V)
        ids = torch.arange(logits.shape[1], device=features.device)
        embeddings = self.language.get_input_embeddings()(ids)  # (V, D)
        return logits.softmax(-1).to(embeddings.dtype) @ embeddings

    def _embed_prompt(self, ids: list[int], device: torch.device) -> torch.Tensor:
        tokens = torch.tensor(ids, dtype=torch.long, device=device)
        return self.language.get_input_embeddings()(tokens)

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """(the objective, the cross-entropy with label smoothing), both summed over all target
        tokens."""
        features, labels = self.features(batch), batch.labels
        logits = self.lm_adapter.logits(self._read(features, batch.lengths), labels)  # (B, L, V)
        loss = F.cross_entropy(
            logits.flatten(0, 1).float(),
            labels.flatten(),
            ignore_index=IGNORE_INDEX,
            label_smoothing=self.label_smoothing,
            reduction="sum",
        )
        if not self.word_loss:
            return loss, loss.detach()
        return loss + self.word_loss * self._word_loss(features, batch), loss.detach()

    def _word_loss(self, features: torch.Tensor, batch: Batch) -> torch.Tensor:
        """IBM Model 1 (Brown et al. 1993) from frames to words, summed over target tokens.

        Some frame explains each token of the text, whatever the order:
        p(token | clip) = mean over its frames of p(token | frame). The loss needs no gloss. Its
        gradient reaches the encoder without passing through a language model, which can do without
        the features.
        """
        log_probs = self.words(features).float().log_softmax(-1)  # (F, V)
        total = log_probs.new_zeros(())
        for frames, tokens in zip(log_probs.split(batch.lengths.tolist()), batch.labels):
            tokens = tokens[(tokens != IGNORE_INDEX) & (tokens != self.text.end)]
            total = total - (frames[:, tokens].logsumexp(0) - math.log(len(frames))).sum()
        return total

    def last_layers(self) -> dict[str, nn.Module]:
        """The last layer of the encoder and of the language model, where anything of it trains."""
        stacks = []  # of layers: of a decoder last, where there is an encoder before it
        for name, module in self.language.named_modules():
            inside_a_layer = any(part.isdigit() for part in name.split("."))
            if isinstance(module, nn.ModuleList) and not inside_a_layer:
                stacks.append(module)
        layers = {"encoder": self.encoder.temporal, "llm": stacks[-1][-1]}
        return {name: layer for name, layer in layers.items() if _trains(layer)}

    @torch.no_grad()
    def attention(self, batch: Batch, sentence: str) -> list[tuple[str, torch.Tensor]]:
        """Each word of a sentence with its attention (N,) to the inputs of the batch's one clip.

        An input is a feature, or `llm.stack` of them.
        """
        ids, implementation = self.text.encode(sentence), self.language.config._attn_implementation
        self.language.set_attn_implementation("eager")  # the fused kernel keeps no weights
        inputs = self._read(self.features(batch), batch.lengths)
        labels = torch.tensor([ids], device=inputs["attention_mask"].device)
        weights = self.lm_adapter.attention(inputs, labels)[0]  # (L, N and the prompt)
        self.language.set_attn_implementation(implementation)
        before, after = map(len, self.prompt)
        weights = weights[:, before : weights.shape[1] - after].float().cpu()
        return [(word, weights[tokens].mean(0)) for word, tokens in self.text.words(ids)]

    @torch.no_grad()
    def translate(self, batch: Batch, decode: Decode) -> list[str]:
        """A sentence for each clip, by transformers' beam search."""
        return self._generate(self._read(self.features(batch), batch.lengths), decode, 1)

    @torch.no_grad()
    def generate_with_scores(
        self, batch: Batch, decode: Decode, count: int
    ) -> list[list[tuple[str, float]]]:
        """For each clip its `count` best sentences with their confidence.

        Confidence: the geometric mean of the probabilities of the text's tokens and of the end
        after them.
        """
        inputs = self._read(self.features(batch), batch.lengths)
        texts = self._generate(inputs, decode, count)
        ids = [torch.tensor(self.text.encode(text)) for text in texts]
        labels = pad_sequence(ids, batch_first=True, padding_value=IGNORE_INDEX)
        labels = labels.to(inputs["attention_mask"].device)
        repeated = {name: tensor.repeat_interleave(count, 0) for name, tensor in inputs.items()}
        logits = self.lm_adapter.logits(repeated, labels).float()
        losses = F.cross_entropy(
            logits.mT, labels, ignore_index=IGNORE_INDEX, reduction="none"
        )  # (B * count, L)
        confidences = (-losses.sum(1) / (labels != IGNORE_INDEX).sum(1)).exp().tolist()
        sentences = list(zip(texts, confidences))
        return [sentences[i : i + count] for i in range(0, len(sentences), count)]

    def _generate(self, inputs: dict[str, torch.Tensor], decode: Decode, count: int) -> list[str]:
        """The `count` best sentences of each clip, one clip after the other."""
        options = GenerationConfig(
            num_beams=decode.beam,
            num_return_sequences=count,
            max_new_tokens=decode.max_tokens,
            length_penalty=decode.length_penalty,
            decoder_start_token_id=self.text.start[0],
            eos_token_id=self.text.end,
            pad_token_id=self.text.pad,
        )
        return [self.text.decode(ids) for ids in self.lm_adapter.generate(inputs, options)]


def _trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())
