"""The translator and its parts: the same result for a clip alone and in a batch, and the paper's
sizes."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import GenerationConfig, MBartForConditionalGeneration

from flallm import config as cfg
from flallm.data.dataset import Batch, ClipDataset
from flallm.data.tokenizer import TranslationTokenizer
from flallm.evaluation.decode import decode_split
from flallm.model.light_t import light_t
from flallm.model.translator import Translator
from flallm.model.visual_encoder import IMAGENET_MEAN, IMAGENET_STD, VisualEncoder


@pytest.fixture
def setting(small):
    torch.manual_seed(0)
    config = small("stage1")
    model = Translator(config, TranslationTokenizer(config.llm)).eval()
    return config, model, ClipDataset("train", config.data, 0)


def batch_of(model: Translator, clips: ClipDataset, *numbers: int) -> Batch:
    return clips.batch(model.text, [(None, number) for number in numbers])


def test_the_result_of_a_clip_does_not_depend_on_its_batch(setting):
    config, model, clips = setting
    together = batch_of(model, clips, *range(8))
    assert len(set(together.lengths.tolist())) > 2  # or padding is not tested
    alone = [batch_of(model, clips, number) for number in range(8)]
    with torch.no_grad():
        features = torch.cat([model.features(batch) for batch in alone])
        torch.testing.assert_close(model.features(together), features, rtol=1e-4, atol=1e-5)
        loss = sum(model(batch)[0] for batch in alone)
        torch.testing.assert_close(model(together)[0], loss, rtol=1e-5, atol=1e-4)
    sentences = [model.translate(batch, config.decode)[0] for batch in alone]
    assert model.translate(together, config.decode) == sentences


def test_beam_search_is_that_of_transformers(setting):
    config, model, clips = setting
    batch = batch_of(model, clips, 0, 1, 2)
    embeddings = model.adapter(model.features(batch)).split(batch.lengths.tolist())
    # Without this no sentence ends before it has to, and all have the same length.
    model.language.final_logits_bias[0, model.text.end] = 3.0
    sentences = {}
    for penalty in (-3.0, 3.0):
        decode = replace(config.decode, length_penalty=penalty)
        sentences[penalty] = model.translate(batch, decode)
        options = GenerationConfig(
            num_beams=5,
            max_new_tokens=decode.max_tokens,
            length_penalty=penalty,
            decoder_start_token_id=model.text.start[0],
            eos_token_id=2,
            pad_token_id=1,
        )
        for clip, sentence in zip(embeddings, sentences[penalty]):
            ids = model.language.generate(inputs_embeds=clip[None], generation_config=options)[0]
            assert model.text.decode(ids) == sentence
    assert sentences[-3.0] != sentences[3.0]


def test_the_loss_is_cross_entropy_and_ibm_model_1(small):
    """Cross-entropy with label smoothing over the tokens of each text and the end after it; IBM
    Model 1 over the tokens without the end. Both are computed token by token here."""
    config = small("stage1", {"train.word_loss": 0.5, "train.label_smoothing": 0.2})
    model = Translator(config, TranslationTokenizer(config.llm)).eval()
    batch = batch_of(model, ClipDataset("train", config.data, 0), 0, 1)
    cross_entropy, word_loss = 0.0, 0.0
    with torch.no_grad():
        features = model.features(batch)
        inputs = model._read(features, batch.lengths)
        log_probs = model.lm_adapter.logits(inputs, batch.labels).log_softmax(-1)  # (B, L, V)
        word_probs = model.words(features).softmax(-1).split(batch.lengths.tolist())
        for text, frames, rows in zip(batch.texts, word_probs, log_probs):
            tokens = model.text.encode(text)
            for token, row in zip(tokens, rows):
                cross_entropy -= 0.8 * row[token].item() + 0.2 * row.mean().item()
            for token in tokens[:-1]:
                word_loss -= frames[:, token].mean().log().item()
        objective, loss = model(batch)
    assert loss.item() == pytest.approx(cross_entropy, rel=1e-5)
    assert objective.item() == pytest.approx(cross_entropy + 0.5 * word_loss, rel=1e-5)


def test_the_backbone_sees_colours_as_imagenets_weights_expect_them(small):
    encoder = VisualEncoder(small("stage1").encoder).eval()
    frames = torch.randint(256, (2, 32, 32, 3), dtype=torch.uint8)
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)  # of red, green, blue
    assert mean.tolist() == pytest.approx([0.485, 0.456, 0.406])
    assert std.tolist() == pytest.approx([0.229, 0.224, 0.225])
    with torch.no_grad():
        images = ((frames / 255 - mean) / std).permute(0, 3, 1, 2)
        expected = encoder.backbone(images).pooler_output.flatten(1)
        torch.testing.assert_close(encoder.frame_wise(frames), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("global_batch_norm", [False, True])
def test_a_clip_of_a_single_frame_can_be_a_batch(small, global_batch_norm):
    config = replace(small("stage1").encoder, global_batch_norm=global_batch_norm)
    encoder = VisualEncoder(config).train()
    frames = torch.randint(256, (5, 64, 64, 3), dtype=torch.uint8)
    encoder(frames, torch.tensor([5]))
    feature = encoder(frames[:1], torch.tensor([1]))
    feature.sum().backward()
    for tensor in (feature, encoder.temporal.weight.grad, *encoder.buffers()):
        assert tensor.isfinite().all()


@pytest.mark.parametrize(
    ("config", "millions"),
    [
        (cfg.LightT(layers=1, heads=4, width=256, ffn=1024), 3.61),
        (cfg.LightT(layers=2, heads=4, width=512, ffn=2048), 18.25),
        (cfg.LightT(layers=3, heads=8, width=512, ffn=2048), 25.61),
        (cfg.LightT(layers=4, heads=8, width=1024, ffn=4096), 124.66),
    ],
)
def test_light_t_has_the_sizes_of_the_papers_table_7(config, millions):
    class Vocabulary:
        pad, end, start = 1, 2, [0]

        def __len__(self):
            return 2429

    with torch.device("meta"):
        model = light_t(config, Vocabulary())
    assert abs(sum(p.numel() for p in model.parameters()) / 1e6 - millions) < 0.006


def torchvision_name(name: str) -> str:
    """The name in torchvision's ResNet18 of a weight of the backbone."""
    parts = name.split(".")
    is_conv, leaf = parts[-2] == "convolution", parts[-1]
    kind = "conv" if is_conv else "bn"
    if parts[0] == "embedder":
        return f"{kind}1.{leaf}"
    block = f"layer{int(parts[2]) + 1}.{parts[4]}"
    if "shortcut" in parts:
        return f"{block}.downsample.{'0' if is_conv else '1'}.{leaf}"
    return f"{block}.{kind}{int(parts[6]) + 1}.{leaf}"


def test_resnet18_loads_a_checkpoint_of_torchvision(tmp_path):
    """Names and shapes are torchvision's; its parameters are ResNet18's without the classifier."""
    encoder = VisualEncoder(cfg.Encoder(global_batch_norm=False))
    assert sum(p.numel() for p in encoder.backbone.parameters()) == 11_176_512
    weights = {}
    for name, tensor in encoder.backbone.state_dict().items():
        value = torch.randn_like(tensor) if tensor.is_floating_point() else tensor
        weights[torchvision_name(name)] = value
    assert weights.keys() >= {
        "conv1.weight",
        "bn1.running_mean",
        "layer1.0.conv2.weight",
        "layer4.1.bn2.bias",
        "layer2.0.downsample.1.weight",
    }
    path = tmp_path / "resnet18.pth"
    classifier = {"fc.weight": torch.zeros(1000, 512), "fc.bias": torch.zeros(1000)}
    torch.save(weights | classifier, path)
    loaded = VisualEncoder(cfg.Encoder(weights=str(path), global_batch_norm=False))
    state = loaded.backbone.state_dict()
    assert len(weights) == len(state)
    assert all(torch.equal(state[name], weights[torchvision_name(name)]) for name in state)


def test_stage_2_loads_the_pretrained_model_and_keeps_its_encoder_frozen(small):
    config = small("stage2")
    model = Translator(config, TranslationTokenizer(config.llm)).train()
    assert not model.encoder.training
    assert not any(p.requires_grad for p in model.encoder.parameters())
    pretrained = MBartForConditionalGeneration.from_pretrained(config.llm.path).state_dict()
    for name, tensor in model.language.state_dict().items():
        assert torch.equal(tensor, pretrained[name])


def test_stage_2_reads_frames_or_hidden_states_as_stage_1_has_them(small):
    """Table 8. Each clip has the same features as by itself."""
    widths = {"encoder.widths": "8,16,16,24"}  # unlike the 32 channels of a sign-wise feature
    config = small("stage1", widths)
    stage1 = Translator(config, TranslationTokenizer(config.llm)).eval()
    models = {}
    for source in ("frames", "light_t"):
        config = small("stage2", widths | {"llm.input": source})
        models[source] = Translator(config, stage1.text).eval()
        models[source].encoder.load_state_dict(stage1.encoder.state_dict())
    stage1_encoder = stage1.language.get_encoder()
    hidden_states = models["light_t"].light_t
    hidden_states.adapter.load_state_dict(stage1.adapter.state_dict())
    hidden_states.encoder.load_state_dict(stage1_encoder.state_dict(), strict=False)
    clips = ClipDataset("train", small("stage2").data, 0)
    batch = batch_of(stage1, clips, 0, 1, 2, 3)
    lengths = batch.lengths.tolist()
    assert len(set(lengths)) > 1
    with torch.no_grad():
        frame_features = models["frames"].features(batch).split(lengths)
        hidden = models["light_t"].features(batch).split(lengths)
        for number in range(4):
            clip = batch_of(stage1, clips, number)
            images = (clip.frames.permute(0, 3, 1, 2) - stage1.encoder.mean) / stage1.encoder.std
            expected = stage1.encoder.backbone(images).pooler_output[:, :, 0, 0]
            torch.testing.assert_close(frame_features[number], expected, rtol=1e-4, atol=1e-5)
            embeddings = stage1.adapter(stage1.features(clip))[None]
            expected = stage1_encoder(inputs_embeds=embeddings).last_hidden_state[0]
            torch.testing.assert_close(hidden[number], expected, rtol=1e-4, atol=1e-5)
    assert frame_features[0].shape[1] == models["frames"].adapter[0].in_features == 24


def test_a_bad_clip_in_a_batch_is_named_and_the_rest_is_used(setting):
    _, model, clips = setting
    clips.shards.index["checksum"][1] += np.uint64(1)
    good, batch = batch_of(model, clips, 0), batch_of(model, clips, 0, 1)
    assert batch.keys == good.keys
    assert torch.equal(batch.frames, good.frames)
    assert [clip["key"] for clip in batch.bad] == ["train sample 1"]
    assert "altered" in batch.bad[0]["cause"]
    empty = batch_of(model, clips, 1)
    loss, _ = model.train()(empty)
    assert empty.tokens == 0
    assert loss.item() == 0


def test_an_evaluation_of_some_clips_takes_them_from_the_entire_split(setting):
    config, model, clips = setting
    alone = SimpleNamespace(
        rank=0,
        world_size=1,
        is_main=True,
        device=torch.device("cpu"),
        gather=lambda value: [value],
    )
    decode = replace(config.decode, max_tokens=2, beam=1)
    predictions, bad = decode_split(model, config, "train", alone, decode, workers=0, limit=3)
    metas = [clips.shards.meta(number) for number in (0, 11, 23)]
    expected = sorted((meta["key"], meta["text"]) for meta in metas)
    assert sorted((p.key, p.reference) for p in predictions) == expected
    assert not bad
