"""Training by real ranks. Starting a process group is what costs, so one group of two runs many scenarios, one of one the rest."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from faults import ZERO3
from safetensors.torch import load_file, save_file

import flallm
from flallm import config as cfg
from flallm.data.corpora import synthetic
from flallm.data.dataset import ClipDataset
from flallm.data.encode import EncodeOptions
from flallm.data.reader import Shards
from flallm.data.sampler import make_sampler
from flallm.data.shards import make_shards
from flallm.data.tokenizer import TranslationTokenizer
from flallm.distributed.context import computes_in_bf16, init_distributed, precision
from flallm.distributed.launch import spawn
from flallm.distributed.zero import batchnorm_buffers, gathered_parameters
from flallm.evaluation import decode as evaluate
from flallm.model.translator import Translator
from flallm.model.weights import best_checkpoint, manifest_digest
from flallm.report.report import report
from flallm.training.step import start_engine, train_step
from flallm.training.train import train

PLAIN_SGD = {
    "train.optimizer": "sgd",
    "train.momentum": 0,
    "train.lr_encoder": 0.1,
    "train.lr_adapter": 0.1,
    "train.lr_language": 0.1,
}
STEPS = ("step1", "step4", "joint1", "bf16", "zero3")
WORDS_STEPS = 100
GLOBAL = {"encoder.global_batch_norm": True, "train.batch": 12}


def model_and_clips(config):
    torch.manual_seed(0)
    model = Translator(config, TranslationTokenizer(config.llm)).train()
    return model, ClipDataset("train", config.data, 0)


def one_step(config, out: Path) -> None:
    ranks = init_distributed()
    model, clips = model_and_clips(config)
    zero = start_engine(model, config.train, ranks)
    bucket = config.train.deepspeed_overrides.get("zero_optimization", {}).get("reduce_bucket_size")
    assert bucket is None or zero.optimizer.reduce_bucket_size == bucket
    plan = make_sampler(config, clips.used, clips.shards.index["text_length"], ranks.world_size)
    batches = [
        clips.batch(model.text, [(0, int(n)) for n in part[ranks.rank]]) for part in plan.step(0, 0)
    ]
    step = train_step(zero, batches, ranks, norms=True)
    with gathered_parameters(zero):
        if ranks.is_main:
            out.with_suffix(".json").write_text(json.dumps(step.norms))
            save_file({k: v.clone() for k, v in model.state_dict().items()}, out)


def with_statistics_of_their_own(config, ranks) -> None:
    """Ranks whose BatchNorms differ look at dev with the model that the checkpoint holds, rank 0's, and train on with their own."""
    model, clips = model_and_clips(config)
    zero = start_engine(model, config.train, ranks)
    train_step(zero, [clips.batch(model.text, [(0, 4 * ranks.rank + n) for n in range(4)])], ranks)
    own = [t.tolist() for t in batchnorm_buffers(model)]
    with gathered_parameters(zero):
        inside = ranks.gather([t.tolist() for t in batchnorm_buffers(model)])
    theirs = ranks.gather(own)
    assert theirs[0] != theirs[1] and inside == [theirs[0]] * 2
    assert own == [t.tolist() for t in batchnorm_buffers(model)]


def with_a_rank_that_can_read_nothing(local, everywhere, ranks) -> None:
    """Frames that stand in for clips that cannot be read leave no trace in BatchNorm's statistics, those of all ranks or its own, nor in gradients."""
    found, gradients = [], []
    for config in (local, everywhere):
        model, clips = model_and_clips(config)
        fresh = [t.clone() for t in batchnorm_buffers(model)]
        if ranks.rank == 1:
            clips.shards.index["checksum"] += np.uint64(1)
        model(clips.batch(model.text, [(0, n) for n in range(4)]))[0].backward()
        found.append(batchnorm_buffers(model))
        gradients.append(torch.cat([p.grad.flatten() for p in model.encoder.parameters()]))
    own, common = found
    alone, theirs = gradients
    assert ranks.rank == 0 or not theirs.any()
    assert ranks.rank or torch.allclose(theirs, alone, rtol=1e-3, atol=1e-4 * alone.abs().max())
    assert ranks.rank == 0 or all(torch.equal(a, b) for a, b in zip(own, fresh))
    torch.testing.assert_close(
        [t.tolist() for t in common],
        ranks.gather([t.tolist() for t in own])[0],
        rtol=1e-4,
        atol=1e-5,
    )


def with_the_optimizer_of_the_recipe(config, kind: type, settings: dict, ranks) -> None:
    found = start_engine(model_and_clips(config)[0], config.train, ranks).optimizer
    assert type(found.optimizer) is kind and [group["name"] for group in found.param_groups] == [
        "encoder",
        "adapter",
        "language",
    ]
    assert all(settings.items() <= group.items() for group in found.param_groups)


def two_ranks(configs: dict, out: Path) -> None:
    for name in STEPS:
        one_step(configs[name], out / f"{name}.safetensors")
    ranks = init_distributed()
    with_statistics_of_their_own(configs["local"], ranks)
    with_a_rank_that_can_read_nothing(configs["local"], configs["step1"], ranks)
    train(configs["stage1"], out / "stage1", ranks)
    train(configs["stage2"], out / "stage2", ranks, out / "stage1")
    evaluate.evaluate(out / "stage2", "test", ranks)


def as_an_older_version_left_it(run: Path, old: Path) -> None:
    """A copy of a run before its last checkpoint, with BLEU-4 alone."""
    shutil.copytree(run, old, ignore=shutil.ignore_patterns("scores", "predictions"))
    shutil.rmtree(old / "checkpoints" / f"step-{WORDS_STEPS}")
    for path in (old / "checkpoints").glob("*/manifest.json"):
        manifest = json.loads(path.read_text())
        for values, name in (
            (manifest, "sha256"),
            (manifest, "dev_bleu1"),
            (manifest["state"], "leading"),
        ):
            values.pop(name)
        path.write_text(json.dumps(manifest | {"sha256": manifest_digest(manifest)}))


def one_rank(configs: dict, out: Path) -> None:
    ranks = init_distributed()
    with_the_optimizer_of_the_recipe(
        configs["stage1"], torch.optim.AdamW, {"betas": (0.9, 0.98), "weight_decay": 0.02}, ranks
    )
    with_the_optimizer_of_the_recipe(
        configs["momentum"], torch.optim.SGD, {"momentum": 0.8, "weight_decay": 0.01}, ranks
    )
    train(configs["stage1"], out / "alone", ranks)
    train(configs["overfit"], out / "overfit", ranks)
    evaluate.evaluate(out / "overfit", "dev", ranks)
    train(configs["words"], out / "words", ranks)
    evaluate.evaluate(out / "words", "dev", ranks)
    as_an_older_version_left_it(out / "words", out / "older")
    (out / "older-best.txt").write_text(best_checkpoint(out / "older").name)
    train(configs["words"], out / "older", ranks)


@pytest.fixture(scope="module")
def runs(shards, llm, tmp_path_factory):
    from conftest import SMALL

    out = tmp_path_factory.mktemp("runs")
    clips = list(synthetic.clips(train=8, dev=0, test=0, size=36))
    make_shards(
        [*clips, *(replace(c, split="dev") for c in clips)],
        out / "eight",
        EncodeOptions(),
        {"name": "eight"},
    )
    # What is learnt of these words does not hold on dev, where the score falls once the model tells clips apart.
    signs = [
        replace(c, text=word)
        for c, word in zip(
            clips, ["maria", "shop", "letters", "school", *["maria"] * 4], strict=True
        )
    ]
    make_shards(
        [*signs, *(replace(c, split="dev", text="maria") for c in signs[:4])],
        out / "signs",
        EncodeOptions(),
        {"name": "signs"},
    )

    def make(stage, shards=shards, **overrides):
        return cfg.load(
            "demo", stage, {"data.shards": str(shards), "llm.path": str(llm), **SMALL, **overrides}
        )

    rates = {
        "train.lr_encoder": 1e-3,
        "train.lr_adapter": 2e-3,
        "train.lr_language": 4e-3,
        "train.warmup": 0.5,
        "train.weight_decay": 0.02,
    }
    short = {"train.steps": 6, "train.log_every": 1, "train.dev_every": 6, **GLOBAL, **rates}
    overfit = {
        "train.steps": 160,
        "train.batch": 8,
        "light_t.width": 128,
        "encoder.widths": [16, 32, 32, 64],
        "data.augment.probability": 0,
        "train.label_smoothing": 0,
    }
    configs = {
        "step1": make("stage1", **PLAIN_SGD, **GLOBAL),
        "step4": make(
            "stage1",
            **PLAIN_SGD,
            **GLOBAL,
            **{
                "train.micro_batches": 4,
                "train.deepspeed_overrides.zero_optimization.reduce_bucket_size": "5e3",
            },
        ),
        "joint1": make("joint", **PLAIN_SGD, **GLOBAL, **{"llm.dropout": 0}),
        "bf16": make("stage1", **PLAIN_SGD, **GLOBAL, **{"train.precision": "bf16"}),
        "momentum": make("stage1", **PLAIN_SGD | {"train.momentum": 0.8}),
        "local": make("stage1", **PLAIN_SGD),
        "zero3": make(
            "joint",
            **PLAIN_SGD,
            **GLOBAL,
            **{"llm.dropout": 0, "train.micro_batches": 2, "train.deepspeed": ZERO3},
        ),
        "stage1": make("stage1", **short),
        "stage2": make("stage2", **short),
        "overfit": make("stage1", out / "eight", **overfit, **{"train.dev_every": 160}),
        "words": make(
            "stage1",
            out / "signs",
            **overfit | {"train.steps": WORDS_STEPS, "train.dev_every": 20, "checkpoint.last": 2},
        ),
    }
    spawn(two_ranks, 2, configs, out)
    spawn(one_rank, 1, configs, out)
    return configs, out


@pytest.mark.parametrize("name", STEPS)
def test_weights_after_a_step_on_two_ranks_are_those_of_plain_pytorch_on_the_global_batch(
    runs, name
):
    configs, out = runs
    model, clips = model_and_clips(configs[name])
    micro_batches = make_sampler(
        configs[name], clips.used, clips.shards.index["text_length"], 1
    ).step(0, 0)
    batches = [clips.batch(model.text, [(0, int(n)) for n in part[0]]) for part in micro_batches]
    tokens, half = (
        sum(batch.tokens for batch in batches),
        computes_in_bf16(configs[name].train, "cpu"),
    )
    if name == "bf16" and not half:
        pytest.skip("this CPU has no instructions for bf16")
    for batch in batches:
        with precision(configs[name].train, torch.device("cpu")):
            loss = model(batch)[0] / tokens
        loss.backward()
    norms = {}
    for part, layer in (
        ("encoder", model.encoder.temporal),
        ("llm", model.language.get_decoder().layers[-1]),
    ):
        for kind in ("grad", "param"):
            tensors = [p.grad if kind == "grad" else p for p in layer.parameters()]
            norms[f"{kind}_norm/{part}"] = (
                torch.cat([t.detach().flatten().double() for t in tensors]).norm().item()
            )
    assert json.loads((out / f"{name}.json").read_text()) == pytest.approx(
        norms, rel=2e-2 if half else 1e-5
    )
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None:
                p -= 0.1 * (p.grad + 0.01 * p)  # weight decay of the recipe
    zero2 = load_file(out / f"{name}.safetensors")
    error, step = (
        torch.cat([(x[k] - y[k]).flatten() for k, _ in model.named_parameters()]).norm()
        for x, y in ((zero2, model.state_dict()), (zero2, before))
    )
    assert (
        error < (0.15 if half else 1e-4) * step
    )  # bf16 has 8 bits, and BatchNorm after BatchNorm on so few frames magnifies what they leave out
    changed = 0
    for key, tensor in model.state_dict().items():
        if not half:
            torch.testing.assert_close(
                zero2[key], tensor, rtol=1e-4, atol=2e-6, msg=lambda m, key=key: f"{key}: {m}"
            )
        changed += not torch.equal(tensor, before[key])
    assert changed > 50


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_losses_are_the_same_on_one_and_two_ranks(runs):
    _, out = runs
    alone, two = (
        [x["loss"] for x in lines(out / run / "metrics.jsonl") if "loss" in x]
        for run in ("alone", "stage1")
    )
    assert len(alone) == 6 and alone[0] != alone[5]
    assert two == pytest.approx(alone, rel=1e-4)


def test_rates_rise_over_the_warm_up_and_fall_as_a_cosine_each_part_with_its_own(runs):
    _, out = runs
    shape = [
        1 / 4,
        2 / 4,
        3 / 4,
        1,
        3 / 4,
        1 / 4,
    ]  # 3 steps of 6 up to 1; then (1 + cos(pi n / 3)) / 2 for n = 0, 1, 2
    for run, parts in (
        ("stage1", {"encoder": 1e-3, "adapter": 2e-3, "language": 4e-3}),
        ("stage2", {"encoder": 0, "adapter": 2e-3, "language": 4e-3}),
    ):
        rows = [row for row in lines(out / run / "metrics.jsonl") if "loss" in row]
        for part, rate in parts.items():
            assert [row[f"lr_{part}"] for row in rows] == pytest.approx(
                [rate * share for share in shape]
            ), (run, part)


def test_stage_2_leaves_every_tensor_and_buffer_of_the_encoder_as_it_was(runs):
    _, out = runs
    before, after = (
        load_file(best_checkpoint(out / run) / "model.safetensors") for run in ("stage1", "stage2")
    )
    names = [name for name in before if name.startswith("encoder.")]
    assert any("running_var" in name for name in names)
    assert all(torch.equal(before[name], after[name]) for name in names)
    assert {n for n in after if n.startswith("encoder.")} == set(names)


def test_a_run_logs_how_the_last_layers_of_encoder_and_language_model_learn(runs):
    _, out = runs
    norms = {f"{kind}_norm/{part}" for kind in ("grad", "param") for part in ("encoder", "llm")}
    assert all(
        norms <= row.keys() and min(row[n] for n in norms) > 0
        for row in lines(out / "stage1/metrics.jsonl")
        if "loss" in row
    )
    frozen = [row for row in lines(out / "stage2/metrics.jsonl") if "loss" in row]
    assert all(row["grad_norm/llm"] > 0 and "grad_norm/encoder" not in row for row in frozen)


def test_every_clip_is_evaluated_once_and_the_run_folder_is_whole(runs):
    configs, out = runs
    predictions = lines(out / "stage2/predictions/test.jsonl")
    shards = Shards(configs["stage2"].data.shards, "test")
    metas = [shards.read(i)[1] for i in range(len(shards))]
    assert [(p["key"], p["reference"]) for p in predictions] == [
        (m["key"], m["text"]) for m in metas
    ]
    scores = json.loads((out / "stage2/scores/test.json").read_text())
    assert (
        scores["raw"]["num_samples"] == 7
        and "tok:none" in scores["raw"]["signature"]["bleu"]
        and "tok:13a" in scores["13a"]["signature"]["bleu"]
    )
    assert {
        "config.yaml",
        "command.txt",
        "environment.json",
        "metrics.jsonl",
        "tensorboard",
        "checkpoints",
    } <= {p.name for p in (out / "stage2").iterdir()}


def test_a_split_that_is_not_there_leaves_nothing_behind(runs, flallm, tmp_path):
    _, out = runs
    result = flallm("evaluate", out / "alone", "--split=nosuch", cwd=tmp_path)
    assert (
        result.returncode == 2 and "nosuch" in result.stderr and not (out / "alone/scores").exists()
    )


def test_eight_clips_are_learnt_by_heart(runs):
    _, out = runs
    assert json.loads((out / "overfit/scores/dev.json").read_text())["raw"]["bleu4"][
        "value"
    ] == pytest.approx(100)


def test_of_isolated_signs_the_best_checkpoint_is_that_of_the_best_bleu_1(runs):
    _, out = runs
    looks = [row for row in lines(out / "words/metrics.jsonl") if "dev_bleu1" in row]
    scores = {row["step"]: row["dev_bleu1"] for row in looks}
    assert (
        len(scores) == 5
        and {row["dev_bleu4"] for row in looks} == {0}
        and all("dev_bleu1_swapped" in row for row in looks)
    )
    best = max(scores, key=lambda step: (scores[step], step))
    assert (
        scores[best] > scores[WORDS_STEPS] and best_checkpoint(out / "words").name == f"step-{best}"
    )
    assert {path.name for path in (out / "words/checkpoints").iterdir()} == {
        f"step-{n}" for n in (best, WORDS_STEPS - 20, WORDS_STEPS)
    }
    manifest = json.loads((best_checkpoint(out / "words") / "manifest.json").read_text())
    assert (manifest["dev_bleu4"], manifest["dev_bleu1"], manifest["state"]["leading"]) == (
        0,
        scores[best],
        "bleu1",
    )
    ordinary = json.loads((best_checkpoint(out / "alone") / "manifest.json").read_text())
    assert ordinary["state"]["leading"] == "bleu4" and [
        name for name in ordinary if name.startswith("dev_")
    ] == ["dev_bleu4"]


def test_of_isolated_signs_scores_and_page_are_led_by_bleu_1(runs):
    _, out = runs
    scores = json.loads((out / "words/scores/dev.json").read_text())
    assert (
        scores["leading"] == scores["raw"]["leading"] == "bleu1"
        and scores["csl-daily"]["leading"] == "bleu4"
    )  # of whose characters there are enough
    assert scores["reachable_bleu4"] == scores["swapped_bleu4"] == 0 and scores[
        "reachable_bleu1"
    ] == pytest.approx(100)
    page = report(out / "words", "dev", 2).read_text()
    assert (
        "BLEU-1 leads in place of BLEU-4" in page
        and "BLEU-1, swapped videos" in page
        and "most the tokenizer can say" not in page
    )
    assert "BLEU-1 on dev" in page


def test_a_run_begun_by_an_older_version_goes_on_and_its_best_is_by_the_leading_score(runs):
    _, out = runs
    assert (
        out / "older-best.txt"
    ).read_text() == f"step-{WORDS_STEPS - 20}"  # all have the same BLEU-4: the last one
    manifest = json.loads((best_checkpoint(out / "older") / "manifest.json").read_text())
    assert (manifest["step"], manifest["state"]["leading"]) == (WORDS_STEPS, "bleu1")
    losses = [
        [row["loss"] for row in lines(out / run / "metrics.jsonl") if "loss" in row]
        for run in ("words", "older")
    ]
    assert losses[0] == losses[1]


def test_a_video_file_is_translated(runs, tmp_path):
    _, out = runs
    eight = Shards(out / "eight", "dev")
    paths, texts = [], []
    for i in range(2):
        video, meta = eight.read(i)
        (tmp_path / f"{i}.mp4").write_bytes(video)
        paths.append(str(tmp_path / f"{i}.mp4"))
        texts.append(meta["text"])
    model = flallm.load(out / "overfit")
    assert [model.translate(path) for path in paths] == texts
