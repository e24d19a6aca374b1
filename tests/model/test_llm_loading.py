"""Loading language models: what trains, what is refused, and what a checkpoint holds."""

import io
import json
import shutil

import pytest
import torch
from safetensors.torch import save_file
from transformers import CONFIG_MAPPING, AutoModelForSeq2SeqLM, AutoTokenizer, BertConfig

from flallm import config as cfg
from flallm.data.tokenizer import TranslationTokenizer
from flallm.model.llm import load_llm, untie
from flallm.model.weights import load_weights, unique_tensors
from flallm.planning import doctor
from flallm.utils import UserError

REFUSED = [
    "mamba",
    "mamba2",
    "falcon_mamba",
    "rwkv",
    "xlstm",
    "openai-gpt",
    "ctrl",
    "xlnet",
    "bamba",
    "minimax",
    "gemma3",
    "whisper",
]


@pytest.mark.parametrize("kind", REFUSED)
def test_a_family_without_attention_maps_or_beam_search_is_refused(small, folders, kind, tmp_path):
    CONFIG_MAPPING[kind]().save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folders["llama"] / name, tmp_path)
    message = (
        f"{tmp_path} is a {kind} model; stage 2 takes mbart, t5, mt5 and decoder-only models "
        "with attention maps and beam search, such as llama"
    )
    with pytest.raises(UserError, match=message):
        load_llm(cfg.LLM(path=str(tmp_path)))
    [(state, _, finding)] = doctor._models([small("stage2", {"llm.path": str(tmp_path)})])
    assert state == "MISS"
    assert message in finding


def test_an_untied_head_stays_untied_in_a_checkpoint(built, folders, tmp_path):
    """As in mT5's published weights; transformers' own config says that it is tied."""
    model = AutoModelForSeq2SeqLM.from_pretrained(folders["mt5"])
    untie(model, "lm_head.weight")
    model.lm_head.weight.data.mul_(2)
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(folders["mt5"]).save_pretrained(tmp_path)
    _, trained = built("mt5", {"llm.path": str(tmp_path), "llm.random": False})
    _, fresh = built("mt5", {"llm.path": str(tmp_path), "llm.random": True})
    assert (trained.language.lm_head.weight != trained.language.shared.weight).all()
    assert fresh.language.lm_head.weight is fresh.language.shared.weight
    save_file(unique_tensors(trained), tmp_path / "model.safetensors")
    load_weights(tmp_path, fresh)
    loaded = fresh.state_dict()
    for name, tensor in trained.state_dict().items():
        assert torch.equal(tensor, loaded[name])


@pytest.mark.parametrize("embeddings", [None, True, False])
@pytest.mark.parametrize("rank", [0, 4])
def test_what_trains_is_what_the_recipe_says(folders, rank, embeddings):
    path, lora = str(folders["llama"]), cfg.LoRA(rank=rank)
    model = load_llm(cfg.LLM(path=path, lora=lora, train_embeddings=embeddings))
    names = {name for name, _ in model.named_parameters()}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    tables = {name for name in names if "embed_tokens" in name or "lm_head" in name}
    expected = names - tables
    if rank:
        expected = {name for name in expected if ".lora_" in name}
    if embeddings or (embeddings is None and not rank):
        expected |= tables
    assert trained == expected
    if rank:
        assert {name.split(".")[-4] for name in trained - tables} == {"q_proj", "v_proj"}
        matrices = [p for p in model.parameters() if p.requires_grad and p.ndim == 2]
        assert sum(p.numel() for p in matrices) >= 2 * 4 * (2 * 32 + 32 + 16)


def test_code_in_a_model_folder_does_not_run(folders, tmp_path, monkeypatch):
    folder, mark = shutil.copytree(folders["llama"], tmp_path / "llm"), tmp_path / "ran"
    (folder / "theirs.py").write_text(f"open({str(mark)!r}, 'w')\nclass C: pass\n")
    content = json.loads((folder / "config.json").read_text())
    content["model_type"] = "theirs"
    content["auto_map"] = {"AutoConfig": "theirs.C", "AutoModelForCausalLM": "theirs.C"}
    (folder / "config.json").write_text(json.dumps(content))
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))  # "yes" to every question
    for load in (TranslationTokenizer, load_llm):
        with pytest.raises(UserError, match="can be loaded from"):
            load(cfg.LLM(path=str(folder)))
    assert not mark.exists()


def test_an_encoder_alone_is_refused(tmp_path):
    BertConfig(hidden_size=32, num_attention_heads=2).save_pretrained(tmp_path)
    message = "is a bert model; stage 2 takes mbart, t5, mt5 and decoder-only models"
    with pytest.raises(UserError, match=message):
        load_llm(cfg.LLM(path=str(tmp_path)))


def test_folders_that_lack_files_are_refused(folders, tmp_path):
    for name in ("tokenizer.json", "config.json"):
        shutil.copy(folders["llama"] / name, tmp_path)
    with pytest.raises(UserError, match="no model can be loaded from"):
        load_llm(cfg.LLM(path=str(tmp_path)))
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="no tokenizer"):
        TranslationTokenizer(cfg.LLM(path=str(tmp_path)))


def test_unknown_targets_of_lora_are_refused(folders):
    lora = cfg.LoRA(rank=2, targets=("nosuch",))
    with pytest.raises(UserError, match=r"llm.lora: .*nosuch"):
        load_llm(cfg.LLM(path=str(folders["llama"]), lora=lora))
