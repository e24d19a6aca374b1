"""What `flallm plan` says, against what a model is and does."""

import itertools
import json
from dataclasses import replace

import pytest
from faults import ZERO3

from flallm import config as cfg
from flallm.data.tokenizer import TranslationTokenizer
from flallm.model.translator import Translator
from flallm.planning import devices
from flallm.planning.devices import DEVICES, GIB, Device
from flallm.planning.estimate import estimate, memory
from flallm.planning.memory import StubTokenizer, dry_step, tokenizer_and_shape
from flallm.planning.rows import advice, rows
from flallm.utils import UserError

A100 = DEVICES["a100-80"]


def figures(
    config: cfg.Config, world_size: int, device: Device = A100, **options
) -> dict[str, float]:
    return {
        f"{f.section}/{f.name}": f.value
        for f in rows(estimate(config, world_size, device, **options))
    }


def recipe(stage: str, **overrides) -> cfg.Config:
    return cfg.load("phoenix14t", stage, overrides)


def test_a_dry_step_has_the_models_parameters_and_the_operations_of_its_layers():
    config = recipe("stage1")
    config.encoder = replace(config.encoder, weights=None)
    text = StubTokenizer(2429)
    step = dry_step(config, text, [20, 12], 16)
    model = Translator(config, text)
    assert step.parts == {
        part: (sum(p.numel() for p in getattr(model, part).parameters()), 0)
        for part in ("encoder", "adapter", "language")
    }
    # ResNet18 has 1.81 G multiplications a 224-pixel frame (He et al. 2016, Table 1: 1.8), forward once and backward twice, without the first layer's input.
    assert 3 * 2 * 1.81e9 * 32 * 0.97 < step.encoder_flops < 3 * 2 * 1.9e9 * 32
    twice = dry_step(config, text, [40, 24], 16)
    assert twice.encoder_flops == pytest.approx(2 * step.encoder_flops, rel=1e-3)
    assert twice.activations == pytest.approx(
        2 * step.activations, rel=0.15
    )  # what grows with frames is nearly all


@pytest.mark.parametrize(
    "stage,options",
    [
        ("stage1", {}),
        ("joint", {}),
        ("stage2", {"llm.input": "words"}),
        ("stage2", {"llm.input": "light_t"}),
    ],
)
def test_every_parameter_is_counted(small, stage, options):
    config = small(stage, options)
    model = Translator(config, TranslationTokenizer(config.llm))
    parts = dry_step(config, model.text, [20, 12], 8).parts.values()
    for i, trains in enumerate((True, False)):
        assert sum(part[i] for part in parts) == sum(
            p.numel() for p in model.parameters() if p.requires_grad is trains
        )


def test_a_frozen_encoder_keeps_no_activations_and_has_no_backward_pass():
    config = recipe("stage2", **{"llm.path": "google/mt5-base"})
    with tokenizer_and_shape(config) as (text, config):
        few, many = (dry_step(config, text, [n], 4) for n in (30, 60))
        from_features = dry_step(config, text, [60], 4, features=True)
    assert few.encoder_flops == pytest.approx(30 * 2 * 1.83e9, rel=0.04)
    assert few.parts["encoder"][0] == 0 and few.parts["language"][1] == 0
    assert few.parts["language"][0] == pytest.approx(
        582.4e6, rel=1e-3
    )  # mT5-base's published 580 M
    assert from_features.encoder_flops == 0 and from_features.activations <= many.activations


def test_with_lora_only_the_updates_have_states():
    config = recipe(
        "stage2",
        **{
            "llm.path": "meta-llama/Llama-2-7b-hf",
            "llm.lora.rank": 16,
            "llm.lora.targets": ["q_proj", "v_proj"],
        },
    )
    with tokenizer_and_shape(config) as (text, config):
        step = dry_step(config, text, [20], 8, features=True)
    assert step.parts["language"] == (
        32 * 2 * 2 * 16 * 4096,
        6_738_415_616,
    )  # 32 layers, two matrices of 4096 x 4096; LLaMA 2 as published


def test_with_checkpointing_one_layer_is_alive_at_a_time(tmp_path):
    most = {}
    for layers in (4, 16):
        folder = tmp_path / str(layers)
        folder.mkdir()
        shape = {
            "model_type": "llama",
            "vocab_size": 1000,
            "hidden_size": 1024,
            "intermediate_size": 2816,
            "num_attention_heads": 16,
            "num_hidden_layers": layers,
        }
        (folder / "config.json").write_text(json.dumps(shape))
        config = recipe(
            "stage2",
            **{"llm.path": str(folder), "llm.lora.rank": 16, "llm.gradient_checkpointing": True},
        )
        most[layers] = dry_step(
            config, StubTokenizer(1000), [20, 12], 8, features=True, kind="cuda"
        ).activations
    # What a layer keeps is its input: 2 clips of 38 positions. Its weights in bf16, 25 MB, are not kept.
    assert most[16] - most[4] < 12 * 2 * 38 * 1024 * 4 * 2 < 12 * 25e6 / 10


def test_zero_shares_states_out_and_the_run_is_the_same_run():
    one, eight = (figures(recipe("stage2", **{"train.batch": 32}), n) for n in (1, 8))
    for name in ("memory/master weights", "memory/moments", "memory/gradients"):
        assert eight[name] == one[name] / 8
    assert (
        eight["memory/weights"]
        == one["memory/weights"]
        == 4 * (one["parameters/trained"] + one["parameters/frozen"])
    )
    assert one["parameters/trained"] == pytest.approx(
        610.9e6 + 2.1e6, rel=1e-3
    )  # mBART-large as published, and the adapter
    assert one["communication/gradients"] == 0 < eight["communication/gradients"]
    assert eight["data/steps"] == one["data/steps"]
    three = figures(recipe("stage2", **{"train.batch": 32, "train.deepspeed": ZERO3}), 8)
    assert (
        three["memory/weights"] == one["memory/weights"] / 8 and three["memory/master weights"] == 0
    )
    assert three["memory/weights"] + three["memory/other ranks'"] == one["memory/weights"]
    assert (
        three["memory/peak"] < eight["memory/peak"]
        and three["communication/weights"] > 2 * eight["communication/weights"]
    )
    given = figures(recipe("stage2", **{"train.batch": 32}), 8, clips_per_s=100.0)
    assert given["time/run"] == pytest.approx(7096 * 40 / 100, rel=0.01)
    assert given["time/run"] == pytest.approx(given["time/step"] * given["data/steps"])


def test_what_does_not_fit_is_said_with_the_field_to_change(tmp_path, flallm):
    done = flallm(
        "plan",
        "phoenix14t",
        "--world_size=1",
        "--stage=stage2",
        "--llm.path=meta-llama/Llama-2-7b-hf",
        cwd=tmp_path,
    )
    assert done.returncode == 1 and "does not fit" in done.stdout and "llm.lora.rank" in done.stdout


def test_what_ranks_send_is_that_of_theory(small):
    config = small("stage2", {"train.batch": 24})
    eight, sixteen = (figures(config, n) for n in (8, 16))
    for n, found in (
        (8, eight),
        (16, sixteen),
    ):  # in a ring each sends (n - 1) / n of the gradients twice, of four bytes in fp32
        assert found["communication/gradients"] == pytest.approx(
            2 * (n - 1) / n * 4 * found["parameters/trained"]
        )
    # Eight ranks are one node, more a network; gradients are sent behind the backward pass, and weights after it.
    assert sixteen["communication/exposed"] == pytest.approx(
        eight["communication/exposed"] * (15 / 16) / (7 / 8) * A100.node / A100.network
    )


def test_a_cpu_has_hours_by_what_its_cores_multiply(small, monkeypatch):
    """With a clock that goes on by a second whenever it is looked at."""
    devices.core_tflops.cache_clear()
    monkeypatch.setattr(devices.time, "thread_time", itertools.count().__next__)
    monkeypatch.setattr(devices.os, "sched_getaffinity", lambda _: range(4))
    config, rates = small("stage2"), {}
    for world_size in (1, 2, 3, 8):  # of four cores
        device = devices.device("cpu", world_size, config.train)
        rates[world_size] = device.tflops * 1e12 / (2 * 512**3)
        found = figures(config, world_size, device)
        seconds = (
            found["computation/operations"]
            * 1e12
            / (device.reached * device.tflops * 1e12)
            / found["data/balance"]
        )
        assert found["time/step"] == pytest.approx(seconds) and found["time/run"] == pytest.approx(
            seconds * found["data/steps"]
        )
        assert "communication/exposed" not in found and device.reached == devices.CPU_SHARE["fp32"]
    devices.core_tflops.cache_clear()
    assert rates == pytest.approx({1: 4, 2: 2, 3: 1, 8: 0.5})


def test_features_leave_out_the_encoder_and_decoding(small):
    video, features = (figures(small("stage2"), 1, cached=cached) for cached in (False, True))
    assert (
        video["computation/operations"] > 1.2 * features["computation/operations"]
        and "reading/decoding cores" not in features
    )
    with pytest.raises(UserError, match=r"llm\.input=frames needs shards of video"):
        figures(small("stage2", {"llm.input": "frames"}), 1, cached=True)


@pytest.mark.parametrize(
    ("activations", "weights", "field"),
    [(90, 5, "train.micro_batches"), (5, 90, "llm.lora.rank"), (5, 5, "")],
)
def test_advice_depends_on_what_takes_most_memory(activations, weights, field):
    config = recipe("stage1", **{"encoder.weights": "none"})
    step = dry_step(config, StubTokenizer(100), [2], 4)
    sizes = replace(
        memory(config, step, 1, A100),
        weights=weights * GIB,
        activations=activations * GIB,
    )
    text = advice(sizes, A100)
    assert field in text and bool(text) is bool(field)


def test_without_shards_and_published_lengths_there_is_no_plan():
    with pytest.raises(UserError, match="Lengths without shards are known of phoenix14t"):
        estimate(cfg.load("demo", "stage1", {"data.shards": "nowhere"}), 1, A100)
    with pytest.raises(UserError, match="too few for 64 ranks"):
        estimate(recipe("stage1"), 64, A100)


@pytest.mark.parametrize("name", ["phoenix14t", "csl-daily", "how2sign"])
def test_a_recipe_of_the_paper_has_a_plan_without_shards_and_weights(name, tmp_path, flallm):
    done = flallm("plan", name, "--world_size=8", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (
        f"{name} stage1 on 8 x A100 80 GB" in done.stdout
        and f"{name} stage2 on 8 x" in done.stdout
        and done.stdout.count("run  ") == 2
    )
