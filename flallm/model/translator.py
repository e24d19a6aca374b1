"""`Translator`: visual encoder -> adapter -> language model. Stage 1, stage 2 and the joint baseline are three of these."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationConfig

from flallm.config import Config, Decode
from flallm.loader import IGNORE, Batch
from flallm.model.light_t import light_t
from flallm.model.llm import load_llm
from flallm.model.visual_encoder import VisualEncoder
from flallm.text import Text


class Translator(nn.Module):
    """Sign language video in, text out. `weights=False` leaves the LLM random, for a checkpoint to fill."""

    def __init__(self, config: Config, text: Text, weights: bool = True):
        super().__init__()
        self.text, self.label_smoothing = text, config.train.label_smoothing
        self.encoder = VisualEncoder(config.encoder)
        self.language = light_t(config.light_t, text) if config.stage == "stage1" else load_llm(config.llm, weights)
        C, D = config.encoder.channels, self.language.config.d_model
        # The adapter's output takes the place of the word embeddings, which mBART scales before it adds positions.
        self.scale = math.sqrt(D) if self.language.config.scale_embedding else 1.0
        self.adapter = nn.Sequential(nn.Linear(C, D), nn.ReLU(), nn.Linear(D, D))  # [P] one hidden layer, C -> D
        if config.stage == "stage2":
            self.encoder.freeze()

    def features(self, batch: Batch) -> torch.Tensor:
        """Sign-wise features (F, C)."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.encoder.frozen):
            return self.encoder(batch.frames, batch.lengths)

    def _inputs(self, batch: Batch) -> dict[str, torch.Tensor]:
        """What the language model reads: embeddings (B, N, D), and a mask (B, N) of those that are not padding."""
        embeddings = self.adapter(self.features(batch)) * self.scale  # (F, D)
        padded = nn.utils.rnn.pad_sequence(embeddings.split(batch.lengths.tolist()), batch_first=True)
        mask = torch.arange(padded.shape[1])[None] < batch.lengths[:, None]
        return {"inputs_embeds": padded, "attention_mask": mask.to(padded.device, torch.long)}

    def forward(self, batch: Batch) -> torch.Tensor:
        """The sum of the cross-entropies of all target tokens, with label smoothing."""
        labels = batch.labels
        before = torch.where(labels == IGNORE, self.text.pad, labels)[:, :-1]
        start = before.new_full((len(labels), 1), self.text.start)
        logits = self.language(**self._inputs(batch), decoder_input_ids=torch.cat([start, before], 1), use_cache=False).logits  # (B, L, V)
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE, label_smoothing=self.label_smoothing, reduction="sum")

    @torch.no_grad()
    def translate(self, batch: Batch, decode: Decode) -> list[str]:
        """A sentence for each clip, by transformers' beam search."""
        options = GenerationConfig(
            num_beams=decode.beam,
            max_new_tokens=decode.max_tokens,
            length_penalty=decode.length_penalty,
            decoder_start_token_id=self.text.start,
            eos_token_id=self.text.end,
            pad_token_id=self.text.pad,
        )
        return [self.text.decode(ids) for ids in self.language.generate(**self._inputs(batch), generation_config=options)]
