"""Small language models of each family in Hugging Face's layout, random, with a tokenizer of the embedded corpus' words."""

from pathlib import Path

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MBartConfig,
    MBartForConditionalGeneration,
    MT5Config,
    MT5ForConditionalGeneration,
)

from flallm.data.corpora import synthetic
from flallm.demo.pretrain import make_tokenizer

ENDS = {"bos_token_id": 0, "eos_token_id": 2}
HALF = {
    f"{side}_{what}": n
    for side in ("encoder", "decoder")
    for what, n in (("layers", 2), ("attention_heads", 2), ("ffn_dim", 64))
}
KINDS = {
    "mbart": (MBartForConditionalGeneration, MBartConfig, {"d_model": 32, "scale_embedding": True, "pad_token_id": 1, "decoder_start_token_id": 0, **HALF}),
    "mt5": (MT5ForConditionalGeneration, MT5Config, {"d_model": 32, "d_ff": 64, "d_kv": 16, "num_layers": 2, "num_heads": 2, "pad_token_id": 1, "decoder_start_token_id": 1}),
    "llama": (LlamaForCausalLM, LlamaConfig, {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}),
}  # fmt: skip


def save(kind: str, folder: Path) -> Path:
    model, config, shape = KINDS[kind]
    tokenizer = make_tokenizer([text for _, text in synthetic.sentences("text", 3000)], 600)
    if kind == "llama":
        tokenizer.pad_token = None  # LLaMA has none
    torch.manual_seed(0)
    made = model(config(vocab_size=len(tokenizer), forced_eos_token_id=None, **ENDS, **shape))
    with torch.no_grad():  # far from uniform, so that answers differ
        for p in made.parameters():
            p.mul_(4 if p.ndim > 1 and kind != "mt5" else 1)
    made.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
