"""Light-T, the light translation model of stage 1: the shape of mBART with an untied LM head.

With a vocabulary of 2,429 its four sizes have the parameters of the paper's Table 7: 3.61, 18.25,
25.61 and 124.66 M.
"""

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import MBartConfig, MBartForConditionalGeneration

from flallm.config import LightT
from flallm.data.tokenizer import MAX_POSITIONS, TranslationTokenizer
from flallm.model.llm import ATTN_IMPL


def light_t(config: LightT, text: TranslationTokenizer) -> MBartForConditionalGeneration:
    """A randomly initialised Light-T for the tokens of `text`."""
    mbart = MBartConfig(
        vocab_size=len(text),
        d_model=config.width,
        encoder_layers=config.layers,
        decoder_layers=config.layers,
        encoder_attention_heads=config.heads,
        decoder_attention_heads=config.heads,
        encoder_ffn_dim=config.ffn,
        decoder_ffn_dim=config.ffn,
        dropout=config.dropout,
        attention_dropout=0.0,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=False,
        pad_token_id=text.pad,
        eos_token_id=text.end,
        decoder_start_token_id=text.start[-1],
        attn_implementation=ATTN_IMPL,
    )
    model = MBartForConditionalGeneration(mbart)
    # Without a tied head, transformers unties the word embeddings of encoder and decoder as well;
    # the paper counts these once.
    model.model.set_input_embeddings(model.model.shared)
    return model


class HiddenStates(nn.Module):
    """Adapter and encoder of a stage 1's Light-T, frozen.

    Sign-wise features (F, C) of clips with `lengths` frames -> hidden states (F, D).
    """

    def __init__(self, adapter: nn.Module, config: LightT, text: TranslationTokenizer):
        super().__init__()
        self.adapter, self.encoder = adapter, light_t(config, text).get_encoder()
        self.encoder.embed_tokens = None  # it reads no words
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> nn.Module:
        return super().train(False)

    def forward(self, features: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        clips = self.adapter(features).split(lengths.tolist())
        padded = pad_sequence(clips, batch_first=True)  # (B, N, D)
        mask = (torch.arange(padded.shape[1])[None] < lengths[:, None]).to(features.device)
        hidden = self.encoder(inputs_embeds=padded, attention_mask=mask.long()).last_hidden_state
        return torch.cat([clip[:length] for clip, length in zip(hidden, lengths.tolist())])
