from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from flallm import config as cfg
from flallm.data.dataset import Batch, ClipDataset
from flallm.data.tokenizer import TranslationTokenizer
from flallm.evaluation.decode import decode_split
from flallm.model.light_t import light_t
from flallm.model.translator import Translator
from flallm.model.visual_encoder import VisualEncoder


@pytest.fixture
def setting(small):
    torch.manual_seed(0)
    config = small("stage1")
    text = TranslationTokenizer(config.llm)
    model = Translator(config, text).eval()
    clips = ClipDataset("train", config.data, 0)
    return config, model, clips


def batch_of(model: Translator, clips: ClipDataset, *numbers: int) -> Batch:
    return clips.batch(model.text, [(None, n) for n in numbers])


def test_the_result_of_a_clip_does_not_depend_on_its_batch(setting):
    config, model, clips = setting
    numbers = range(8)
    together = batch_of(model, clips, *numbers)
    assert len(set(together.lengths.tolist())) > 2  # or padding is not tested
    alone = [batch_of(model, clips, n) for n in numbers]
    with torch.no_grad():
        features = torch.cat([model.features(b) for b in alone])
        torch.testing.assert_close(model.features(together), features, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model(together)[0], sum(model(b)[0] for b in alone), rtol=1e-5, atol=1e-4)
    assert model.translate(together, config.decode) == [model.translate(b, config.decode)[0] for b in alone]


def test_beam_search_is_transformers_own(setting):
    config, model, clips = setting
    batch = batch_of(model, clips, 0, 1, 2)
    embeddings = model.adapter(model.features(batch)).split(batch.lengths.tolist())
    model.language.final_logits_bias[0, model.text.end] = 3.0  # or no sentence ends before it has to, and all are of one length
    found = [model.translate(batch, replace(config.decode, length_penalty=penalty)) for penalty in (-3.0, 3.0)]
    assert found[0] != found[1]
    for penalty, ours in zip((-3.0, 3.0), found):
        options = GenerationConfig(
            num_beams=5,
            max_new_tokens=config.decode.max_tokens,
            length_penalty=penalty,
            decoder_start_token_id=model.text.start[0],
            eos_token_id=2,
            pad_token_id=1,
        )
        for clip, sentence in zip(embeddings, ours):
            ids = model.language.generate(inputs_embeds=clip[None], generation_config=options)[0]
            assert model.text.decode(ids) == sentence


def test_the_loss_is_what_it_is_defined_to_be(small):
    """Cross-entropy with label smoothing over the tokens of each text and the end after it, and IBM Model 1 over the tokens without the end, word by word."""
    config = small("stage1", {"train.word_loss": 0.5, "train.label_smoothing": 0.2})
    model = Translator(config, TranslationTokenizer(config.llm)).eval()
    batch = batch_of(model, ClipDataset("train", config.data, 0), 0, 1)
    with torch.no_grad():
        features = model.features(batch)
        said = model.lm_adapter.logits(model._read(features, batch.lengths), batch.labels).log_softmax(-1)  # (B, L, V)
        seen = model.words(features).softmax(-1).split(batch.lengths.tolist())  # B of (frames, V)
        cross_entropy, explained = 0.0, 0.0
        for text, frames, logs in zip(batch.texts, seen, said):
            for token, log in zip(model.text.encode(text), logs):
                cross_entropy -= 0.8 * log[token].item() + 0.2 * log.mean().item()
            for token in model.text.encode(text)[:-1]:
                explained -= frames[:, token].mean().log().item()
        objective, loss = model(batch)
    assert loss.item() == pytest.approx(cross_entropy, rel=1e-5)
    assert objective.item() == pytest.approx(cross_entropy + 0.5 * explained, rel=1e-5)


def test_the_backbone_sees_red_green_and_blue_as_imagenets_weights_want_them(small):
    encoder = VisualEncoder(small("stage1").encoder).eval()
    frames = torch.randint(256, (2, 32, 32, 3), dtype=torch.uint8)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])  # of red, green, blue
    with torch.no_grad():
        theirs = encoder.backbone(((frames / 255 - mean) / std).permute(0, 3, 1, 2)).pooler_output.flatten(1)
        torch.testing.assert_close(encoder.frame_wise(frames), theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("everywhere", [False, True])
def test_a_clip_of_a_single_frame_may_be_a_batch_of_its_own(small, everywhere):
    encoder = VisualEncoder(replace(small("stage1").encoder, global_batch_norm=everywhere)).train()
    frames = torch.randint(256, (5, 64, 64, 3), dtype=torch.uint8)
    encoder(frames, torch.tensor([5]))
    feature = encoder(frames[:1], torch.tensor([1]))
    feature.sum().backward()
    assert feature.isfinite().all() and all(t.isfinite().all() for t in (encoder.temporal.weight.grad, *encoder.buffers()))


@pytest.mark.parametrize(
    "layers,heads,width,ffn,millions", [(1, 4, 256, 1024, 3.61), (2, 4, 512, 2048, 18.25), (3, 8, 512, 2048, 25.61), (4, 8, 1024, 4096, 124.66)]
)
def test_light_t_has_the_sizes_of_the_papers_table_7(layers, heads, width, ffn, millions):
    class Vocabulary:
        pad, end, start = 1, 2, [0]

        def __len__(self):
            return 2429

    with torch.device("meta"):
        model = light_t(cfg.LightT(layers, heads, width, ffn), Vocabulary())
    assert abs(sum(p.numel() for p in model.parameters()) / 1e6 - millions) < 0.006


def test_resnet18_is_torchvisions(tmp_path):
    """A checkpoint with torchvision's names and shapes loads; its number of parameters is ResNet18's without the classifier."""
    encoder = VisualEncoder(cfg.Encoder(global_batch_norm=False))
    assert sum(p.numel() for p in encoder.backbone.parameters()) == 11_176_512
    weights, names = {}, {}  # names: ours -> torchvision's
    for name, tensor in encoder.backbone.state_dict().items():
        parts = name.split(".")
        kind = "conv" if parts[-2] == "convolution" else "bn"
        if parts[0] == "embedder":
            new = f"{kind}1"
        elif "shortcut" in parts:
            new = f"layer{int(parts[2]) + 1}.{parts[4]}.downsample.{'0' if kind == 'conv' else '1'}"
        else:
            new = f"layer{int(parts[2]) + 1}.{parts[4]}.{kind}{int(parts[6]) + 1}"
        names[name] = f"{new}.{parts[-1]}"
        weights[names[name]] = torch.randn_like(tensor.float()).to(tensor.dtype) if tensor.is_floating_point() else tensor
    assert {"conv1.weight", "bn1.running_mean", "layer1.0.conv2.weight", "layer4.1.bn2.bias", "layer2.0.downsample.1.weight"} <= set(weights)
    path = tmp_path / "resnet18.pth"
    torch.save(weights | {"fc.weight": torch.zeros(1000, 512), "fc.bias": torch.zeros(1000)}, path)
    loaded = VisualEncoder(cfg.Encoder(weights=str(path), global_batch_norm=False))
    state = loaded.backbone.state_dict()
    assert len(names) == len(weights) == len(state) and all(torch.equal(state[ours], weights[theirs]) for ours, theirs in names.items())


def test_stage_2_loads_the_pretrained_model_and_keeps_its_encoder_frozen(small):
    config = small("stage2")
    model = Translator(config, TranslationTokenizer(config.llm)).train()
    assert not model.encoder.training and not any(p.requires_grad for p in model.encoder.parameters())
    from transformers import MBartForConditionalGeneration

    theirs = MBartForConditionalGeneration.from_pretrained(config.llm.path).state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in model.language.state_dict().items())


def test_the_language_model_reads_frames_or_hidden_states_of_light_t_where_it_is_told_to(small):
    """Table 8: each is what stage 1 has there, of every clip by itself."""
    wide = {"encoder.widths": "8,16,16,24"}  # others than the 32 channels of a sign-wise feature
    first = Translator(small("stage1", wide), TranslationTokenizer(small("stage1").llm)).eval()
    models = {name: Translator(small("stage2", wide | {"llm.input": name}), first.text).eval() for name in ("frames", "light_t")}
    for model in models.values():
        model.encoder.load_state_dict(first.encoder.state_dict())
    models["light_t"].light_t.adapter.load_state_dict(first.adapter.state_dict())
    models["light_t"].light_t.encoder.load_state_dict(first.language.get_encoder().state_dict(), strict=False)
    clips = ClipDataset("train", small("stage2").data, 0)
    batch = batch_of(first, clips, 0, 1, 2, 3)
    assert len(set(batch.lengths.tolist())) > 1
    with torch.no_grad():
        for number, (frames, hidden) in enumerate(zip(*(m.features(batch).split(batch.lengths.tolist()) for m in models.values()))):
            clip = batch_of(first, clips, number)
            images = (clip.frames.permute(0, 3, 1, 2) - first.encoder.mean) / first.encoder.std
            torch.testing.assert_close(frames, first.encoder.backbone(images).pooler_output[:, :, 0, 0], rtol=1e-4, atol=1e-5)
            read = first.language.get_encoder()(inputs_embeds=first.adapter(first.features(clip))[None]).last_hidden_state[0]
            torch.testing.assert_close(hidden, read, rtol=1e-4, atol=1e-5)
    assert frames.shape[1] == models["frames"].adapter[0].in_features == 24


def test_a_bad_clip_in_a_batch_is_named_and_the_rest_goes_on(setting):
    _config, model, clips = setting
    clips.shards.index["checksum"][1] += np.uint64(1)
    (whole,), batch = (batch_of(model, clips, 0).keys, batch_of(model, clips, 0, 1))
    assert batch.keys == [whole] and torch.equal(batch.frames, batch_of(model, clips, 0).frames)
    assert [b["key"] for b in batch.bad] == ["train sample 1"] and "altered" in batch.bad[0]["cause"]
    empty = batch_of(model, clips, 1)
    loss, _ = model.train()(empty)
    assert empty.tokens == 0 and loss.item() == 0


def test_a_look_at_some_clips_takes_them_from_all_over_the_split(setting):
    config, model, clips = setting
    alone = SimpleNamespace(rank=0, world_size=1, first=True, device=torch.device("cpu"), gather=lambda value: [value])
    said, bad = decode_split(model, config, "train", alone, replace(config.decode, max_tokens=2, beam=1), workers=0, limit=3)
    metas = [clips.shards.meta(n) for n in (0, 11, 23)]
    assert sorted((p.key, p.reference) for p in said) == sorted((meta["key"], meta["text"]) for meta in metas) and not bad
