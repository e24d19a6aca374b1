"""The paper's tables: which runs they are, that these differ in what they say, and what is written of them."""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SMALL
from models import save
from safetensors.torch import load_file

from flallm import config as cfg
from flallm.ablation import tables
from flallm.ablation.ablate import ablate, train_run
from flallm.ablation.hours import plan
from flallm.ablation.study import SPLIT, TABLES, Sweep
from flallm.ablation.tables import SCORES, Table
from flallm.data.dataset import ClipDataset
from flallm.data.tokenizer import TranslationTokenizer
from flallm.distributed.context import init_distributed
from flallm.distributed.launch import spawn
from flallm.evaluation.decode import load_run
from flallm.evaluation.probe import MeanFeature
from flallm.model.translator import Translator
from flallm.model.weights import best_checkpoint
from flallm.report.report import report
from flallm.training.resume import load_stage1_encoder
from flallm.utils import UserError

T5 = {"llm.path": "google/mt5-base", "llm.language": None}
JOINT_RATE = {"train.lr_encoder": 1e-3}
# table -> row -> (stage that is scored, what differs there from phoenix14t.yaml, what differs in the stage 1 below it)
DIFFERENCES = {
    "4": {"joint": ("joint", {}, None), "factorised": ("stage2", {}, {})},
    "5": {
        "LLM fine-tuning only": ("joint", {"train.frozen": "backbone"}, None),
        "visual initialing only": ("stage1", {}, None),
        "both": ("stage2", {}, {}),
    },
    "6": {
        "100 %": ("stage2", {"data.stride": 1}, {"data.stride": 1}),
        "50 %": ("stage2", {"data.stride": 2}, {"data.stride": 2}),
        "25 %": ("stage2", {}, {}),
        "12.5 %": ("stage2", {"data.stride": 8}, {"data.stride": 8}),
    },
    "7": {
        "tiny": (
            "stage2",
            {},
            {"light_t.layers": 1, "light_t.heads": 4, "light_t.width": 256, "light_t.ffn": 1024},
        ),
        "small": ("stage2", {}, {"light_t.layers": 2, "light_t.heads": 4}),
        "base": ("stage2", {}, {}),
        "large": ("stage2", {}, {"light_t.layers": 4, "light_t.width": 1024, "light_t.ffn": 4096}),
    },
    "8": {
        "frame-wise": ("stage2", {"llm.input": "frames"}, {}),
        "sign-wise": ("stage2", {}, {}),
        "hidden states of Light-T": ("stage2", {"llm.input": "light_t"}, {}),
    },
    "9": {
        "nothing": ("stage2", {"train.frozen": "nothing", **JOINT_RATE}, {}),
        "backbone": ("stage2", {"train.frozen": "backbone", **JOINT_RATE}, {}),
        "backbone + temporal": ("stage2", {}, {}),
    },
    "10": {
        "mBART random": ("stage2", {"llm.random": True}, {}),
        "mT5-Base random": ("stage2", {"llm.random": True, **T5}, T5),
        "mBART": ("stage2", {}, {}),
        "mT5-Base": ("stage2", T5, T5),
    },
    "steps": {
        "joint training": ("joint", {}, None),
        "factorised": ("stage2", {}, {}),
        "factorised with three times the steps of stage 2": ("stage2", {"train.epochs": 120}, {}),
        "stage 1 by itself and a third longer": ("stage1", {"train.epochs": 100}, None),
    },
    "lora": {
        "all weights": ("stage2", {}, {}),
        "LoRA of rank 16": ("stage2", {"llm.lora.rank": 16, "train.lr_language": 2e-4}, {}),
    },
    "words": {
        "features through the adapter": ("stage2", {}, {}),
        "words and what the adapter adds": ("stage2", {"llm.input": "words"}, {}),
    },
    "fig2": {"joint training": ("joint", {}, None), "stage 1": ("stage1", {}, None)},
    "fig4": {
        "1/3": ("stage2", {}, {"train.epochs": 25}),
        "2/3": ("stage2", {}, {"train.epochs": 50}),
        "3/3": ("stage2", {}, {}),
        "4/3": ("stage2", {}, {"train.epochs": 100}),
    },
}


def only(sweep: Sweep) -> Table:
    (name,) = sweep.specs
    return Table(sweep, name)


def differences(config: cfg.Config) -> dict:
    usual = cfg.flat(cfg.load("phoenix14t", config.stage)) | {"train.log_every": 10}
    return {name: value for name, value in cfg.flat(config).items() if usual[name] != value}


def test_every_table_is_listed_here():
    assert not [
        name for rows in DIFFERENCES.values() for name in rows if "," in name
    ]  # --rows parts them by commas
    assert DIFFERENCES.keys() | {"common"} == cfg.read_yaml(TABLES).keys()


@pytest.mark.parametrize("table", DIFFERENCES)
def test_the_runs_of_a_table_differ_from_the_recipe_in_exactly_the_stated_fields(table, tmp_path):
    sweep = Sweep("phoenix14t", [table], 2, [], {}, tmp_path)
    assert list(only(sweep).rows) == list(DIFFERENCES[table])
    for name, (stage, own, below) in DIFFERENCES[table].items():
        for seed, run in enumerate(only(sweep).rows[name]):
            seeded = {"seed": seed} if seed else {}
            config = sweep.config(run)
            assert config.stage == stage and differences(config) == own | seeded, name
            assert (differences(sweep.config(run.stage1)) if run.stage1 else None) == (
                None if below is None else below | seeded
            ), name
            assert bool(run.features) == (
                table in ("words", "lora") or (table == "steps" and stage == "stage2")
            ), name


CONTRASTED = {
    "6": ("data.stride", [1, 2, 4, 8]),
    "9": ("train.frozen", ["nothing", "backbone", "encoder"]),
    "10": ("llm.random", [True, True, False, False]),
    "lora": ("llm.lora.rank", [0, 16]),
}


@pytest.mark.parametrize("table", CONTRASTED)
def test_rows_are_what_they_are_called_on_a_recipe_with_other_defaults_too(table, tmp_path):
    other = {"data.stride": 3, "train.frozen": "backbone", "llm.random": True, "llm.lora.rank": 4}
    field, values = CONTRASTED[table]
    sweep = Sweep("phoenix14t", [table], 1, [], {field: other[field]}, tmp_path)
    assert [cfg.flat(sweep.config(run))[field] for (run,) in only(sweep).rows.values()] == values


def test_a_recipe_that_states_a_default_has_the_same_runs(tmp_path):
    (tmp_path / "stated.yaml").write_text("base: phoenix14t\nstage2: {frozen: encoder}\n")
    ours, theirs = (
        Sweep(str(recipe), ["9"], 1, [], {}, tmp_path)
        for recipe in (tmp_path / "stated.yaml", "phoenix14t")
    )
    assert [run.name for run in ours.runs] == [run.name for run in theirs.runs]


def test_what_the_llm_is_to_read_is_said_of_stage_2_and_joint_training_reads_signs(tmp_path):
    (tmp_path / "words.yaml").write_text("base: demo\nllm: {input: words}\n")
    for recipe, overrides in (("demo", {"llm.input": "words"}), (str(tmp_path / "words.yaml"), {})):
        sweep = Sweep(recipe, ["4"], 1, [], overrides, tmp_path)
        inputs = {run.stage: sweep.config(run).llm.input for run in sweep.runs}
        assert (
            inputs == {"stage1": "words", "joint": "signs", "stage2": "words"}
            and len(sweep.runs) == 3
        )


@pytest.mark.parametrize("field,value", [("llm.input", "frames"), ("train.frozen", "backbone")])
def test_rows_from_cached_features_are_refused_where_video_is_needed(field, value, tmp_path):
    with pytest.raises(UserError, match="row 'all weights' reads features that are written once"):
        Sweep("demo", ["lora"], 1, [], {field: value}, tmp_path)


def test_all_tables_share_the_runs_they_have_in_common_and_no_two_runs_share_a_folder(tmp_path):
    runs = {
        run
        for table in DIFFERENCES
        for run in Sweep("phoenix14t", [table], 2, [], {}, tmp_path).runs
    }
    assert len({run.name for run in runs}) == len(runs)
    plain = [
        run
        for run in runs
        if not run.features
        and run.stage != "features"
        and not run.changes
        and not (run.stage1 and run.stage1.changes)
    ]
    assert sorted((run.stage, run.seed) for run in plain) == [
        (stage, seed) for stage in ("joint", "stage1", "stage2") for seed in (0, 1)
    ]
    for table in DIFFERENCES:
        numbered = Sweep("phoenix14t", [table], 2, [], {}, tmp_path).runs
        assert all(
            numbered.index(below) < numbered.index(run)
            for run in numbered
            for below in (run.stage1, run.features)
            if below
        )


@pytest.fixture(scope="module")
def overrides(shards, llm) -> dict:
    return {
        **SMALL,
        "data.shards": str(shards),
        "llm.path": str(llm),
        "train.steps": 3,
        "train.dev_every": 3,
        "train.log_every": 1,
        "decode.max_tokens": 8,
    }


def test_the_frame_rates_of_table_6_sample_the_frames_they_should(overrides, tmp_path):
    sweep = Sweep("demo", ["6"], 1, [], overrides, tmp_path)
    configs = {name: sweep.config(runs[0]) for name, runs in only(sweep).rows.items()}
    text = TranslationTokenizer(configs["25 %"].llm)
    clips = {
        name: ClipDataset("train", config.data, 0).batch(text, [(None, 3)]).frames
        for name, config in configs.items()
    }
    frames = clips["100 %"]
    assert len(frames) > 30
    for name, stride in (("50 %", 2), ("25 %", 4), ("12.5 %", 8)):
        assert torch.equal(clips[name], frames[::stride])


@pytest.mark.parametrize("family", ["mBART", "mT5-Base"])
def test_a_random_language_model_has_the_tokenizer_and_the_shape_of_the_pretrained_one(
    overrides, tmp_path, monkeypatch, family
):
    save(
        "mt5", tmp_path / "google/mt5-base"
    )  # a folder of that name is taken in place of the hub's
    monkeypatch.chdir(tmp_path)
    sweep = Sweep("demo", ["10"], 1, [f"{family} random", family], overrides, tmp_path)
    (random,), (pretrained,) = (only(sweep).rows[name] for name in (f"{family} random", family))
    assert random.stage1 == pretrained.stage1 and len(sweep.runs) == 3
    models = []
    for run in (random, pretrained):
        config = sweep.config(run)
        torch.manual_seed(config.seed)
        models.append(Translator(config, TranslationTokenizer(config.llm)))
    assert models[0].text.tokenizer.get_vocab() == models[1].text.tokenizer.get_vocab()
    one, other = (model.language.state_dict() for model in models)
    assert {n: t.shape for n, t in one.items()} == {n: t.shape for n, t in other.items()} and type(
        models[0].language
    ) is type(models[1].language)
    weights = [name for name, tensor in one.items() if tensor.ndim > 1 and tensor.any()]
    assert weights and not any(torch.equal(one[name], other[name]) for name in weights)


def train_all(studies: list[Sweep]) -> None:
    ranks = init_distributed()
    for sweep in studies:
        for run in sweep.runs:
            train_run(sweep, run, ranks)


@pytest.fixture(scope="module")
def done(overrides, tmp_path_factory) -> dict[str, Sweep]:
    out = tmp_path_factory.mktemp("ablate")
    studies = {
        table: Sweep("demo", [table], 1, [], overrides, out)
        for table in ("4", "5", "8", "9", "fig2")
    }
    studies["words"] = Sweep("demo", ["words"], 1, [], overrides, out)
    spawn(train_all, 1, list(studies.values()))
    return studies


def changed(sweep: Sweep, row: str, since: str) -> set[str]:
    """Which parts of the encoder have other weights after the run of a row than in its stage 1, or than at the start; all of the other parts is as it was."""
    run = only(sweep).rows[row][0]
    after = load_file(best_checkpoint(sweep.folder(run)) / "model.safetensors")
    if since == "stage1":
        before = load_file(best_checkpoint(sweep.folder(run.stage1)) / "model.safetensors")
    else:
        config = sweep.config(run)
        torch.manual_seed(config.seed)
        before = Translator(config, TranslationTokenizer(config.llm)).state_dict()
    names = [n for n in after if n.startswith("encoder.")]
    parts = {"backbone": [n for n in names if n.startswith("encoder.backbone.")]}
    parts["temporal"] = [n for n in names if n not in parts["backbone"]]
    other = {
        part
        for part in parts
        if any(
            not torch.equal(before[n], after[n])
            for n in parts[part]
            if n.endswith((".weight", ".bias"))
        )
    }
    assert all(
        torch.equal(before[n], after[n]) for part in parts if part not in other for n in parts[part]
    )
    return other


@pytest.mark.parametrize(
    "table,row,since,expected",
    [
        ("9", "nothing", "stage1", {"backbone", "temporal"}),
        ("9", "backbone", "stage1", {"temporal"}),
        ("9", "backbone + temporal", "stage1", set()),
        ("5", "LLM fine-tuning only", "start", {"temporal"}),
        ("4", "joint", "start", {"backbone", "temporal"}),
    ],
)
def test_what_a_row_freezes_is_frozen_to_the_bit_and_the_rest_trains(
    done, table, row, since, expected
):
    assert changed(done[table], row, since) == expected


def test_hidden_states_of_light_t_are_those_of_the_stage_1_below(done):
    sweep = done["8"]
    run = only(sweep).rows["hidden states of Light-T"][0]
    below, above = (
        load_file(best_checkpoint(sweep.folder(r)) / "model.safetensors") for r in (run.stage1, run)
    )
    pairs = {n: f"light_t.{n}" for n in below if n.startswith("adapter.")}
    pairs |= {
        n: n.replace("language.model.", "light_t.")
        for n in below
        if n.startswith("language.model.encoder.") and "embed_tokens" not in n
    }
    assert len(pairs) > 20 and all(torch.equal(below[a], above[b]) for a, b in pairs.items())


def test_a_row_from_cached_features_is_the_stage_2_that_a_user_gets_from_them_and_its_hours_have_their_writing(
    done,
):
    sweep = done["words"]
    (run,) = only(sweep).rows["features through the adapter"]
    config = cfg.read_yaml(sweep.folder(run) / "config.yaml")
    assert (
        config["data"]["shards"] == str(sweep.folder(run.stage1) / "features")
        and json.loads((sweep.folder(run.stage1) / "features/dataset.json").read_text())["features"]
    )
    video = only(done["4"]).rows["factorised"][0]
    assert sweep.folder(video) != sweep.folder(run) and sweep.folder(video.stage1) == sweep.folder(
        run.stage1
    )
    hours = only(sweep).result()["rows"]["features through the adapter"]["hours"]
    assert (
        sweep.seconds(run.features) > 0
        and hours == pytest.approx(sum(map(sweep.seconds, [*sweep.runs[:2], run])) / 3600)
        and sweep.runs[1] == run.features
    )


def test_the_words_that_the_llm_reads_begin_as_those_of_the_stage_1_below(done):
    sweep = done["words"]
    run = only(sweep).rows["words and what the adapter adds"][0]
    config = sweep.config(run)
    model = Translator(config, TranslationTokenizer(config.llm)).eval()
    load_stage1_encoder(model, config, sweep.folder(run.stage1))
    below = load_file(best_checkpoint(sweep.folder(run.stage1)) / "model.safetensors")
    batch = ClipDataset("dev", config.data, 0).batch(model.text, [(None, 0), (None, 1)])
    with torch.no_grad():
        words = (model.features(batch) @ below["words.weight"].T + below["words.bias"]).softmax(-1)
        table = model.language.get_input_embeddings().weight[: len(model.text)] * model.scale
        read = model._read(model.features(batch), batch.lengths)
    torch.testing.assert_close(
        read["inputs_embeds"][0, : batch.lengths[0]], (words @ table)[: batch.lengths[0]]
    )
    above = load_file(best_checkpoint(sweep.folder(run)) / "model.safetensors")
    assert (
        above["words.weight"].ne(below["words.weight"]).any() and above["adapter.2.weight"].any()
    )  # both train


@pytest.mark.parametrize(
    "word_loss,token,said",
    [
        (0.0, [], "words are those of a stage 1 with train.word_loss"),
        (1.0, ["other"], "knows the words of"),
    ],
)
def test_words_of_a_stage_1_that_knows_none_or_others_are_refused(
    done, tmp_path, word_loss, token, said
):
    run = only(done["words"]).rows["words and what the adapter adds"][0]
    other = tmp_path / "stage1"
    shutil.copytree(
        done["words"].folder(run.stage1), other, ignore=shutil.ignore_patterns("features")
    )
    (other / "config.yaml").write_text(
        cfg.dump(cfg.override(done["words"].config(run.stage1), {"train.word_loss": word_loss}))
    )
    text = TranslationTokenizer(replace(done["words"].config(run).llm, path=str(other / "llm")))
    text.tokenizer.add_tokens(token)
    text.tokenizer.save_pretrained(other / "llm")
    config = done["words"].config(run)
    with pytest.raises(UserError, match=said):
        load_stage1_encoder(Translator(config, TranslationTokenizer(config.llm)), config, other)


def test_the_table_stands_beside_the_papers_numbers(done):
    text = only(done["9"]).write()
    rows = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("| ")}
    assert (
        rows["nothing"].rstrip("| ").endswith("17.86")
        and "p = " in rows["nothing"]
        and "p = " not in rows["backbone + temporal"]
    )
    result = json.loads(only(done["9"]).stem.with_suffix(".json").read_text())
    scores = json.loads(
        (done["9"].folder(only(done["9"]).rows["backbone"][0]) / "scores/test.json").read_text()
    )
    assert (
        result["rows"]["backbone"]["bleu4"]["mean"] == scores["raw"]["bleu4"]["value"]
        and not result["missing"]
    )
    below, own = result["rows"]["backbone"]["dev"][
        0
    ]  # one look in each, after 3 steps of 16 clips and 3 of 32
    assert [clips for clips, _ in below] == [48] and [clips for clips, _ in own] == [48 + 96]
    four = only(done["4"]).write().splitlines()
    assert "|  | R | B1 | B2 | B3 | B4 [95 %] | B4 against factorised |" in four[2] and four[
        4
    ].endswith("| 32.52, 31.96, 21.96, 16.32, 12.90 |")
    assert (
        "stage 1, 3 steps: the last layer of the LLM has the larger gradient in "
        in only(done["fig2"]).write()
    )
    dominance = json.loads(only(done["fig2"]).stem.with_suffix(".json").read_text())["rows"][
        "stage 1"
    ]["dominance"][0]["grad"]
    rows = [
        json.loads(line)
        for line in (done["fig2"].folder(only(done["fig2"]).rows["stage 1"][0]) / "metrics.jsonl")
        .read_text()
        .splitlines()
    ]
    larger = [
        row["grad_norm/llm"] > row["grad_norm/encoder"] for row in rows if "grad_norm/llm" in row
    ]
    assert len(larger) == 3 and dominance["larger"] == pytest.approx(sum(larger) / 3)
    assert all(
        only(s).stem.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
        for s in (done["9"], done["fig2"])
    )


def test_a_table_interrupted_and_started_again_is_the_same_and_nothing_runs_twice(
    done, overrides, tmp_path, flallm
):
    row, overrides = "features through the adapter", overrides | {"checkpoint.every": 1}
    command = ["ablate", "demo", "--table=words", f"--rows={row}", f"--out={tmp_path}/out"]
    command += [f"--{name}={value}" for name, value in overrides.items()]
    sweep = Sweep("demo", ["words"], 1, [row], overrides, tmp_path / "out")
    first, features, last = sweep.runs
    drawn = random.Random(time.time_ns())
    moments = {run: f"checkpoints/step-{drawn.randint(1, 2)}" for run in (first, last)} | {
        features: drawn.choice(["train-000000.tar", "dev-000000.tar"])
    }
    print(moments)  # to be seen where it fails
    for run in sweep.runs:  # killed in the midst of each
        with open(tmp_path / "log", "a") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "flallm", *command],
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
            try:
                while not (sweep.folder(run) / moments[run]).exists():
                    assert process.poll() is None, (tmp_path / "log").read_text()
            finally:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        assert not sweep.done(run)
    before = {
        path: path.stat().st_mtime_ns
        for one in (first, features)
        for path in sweep.folder(one).rglob("*")
        if path.is_file()
    }
    again = flallm(*command, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert [
        line.split()[1]
        for line in again.stdout.splitlines()
        if line.endswith((first.name, features.name))
    ] == ["done", "done"]
    assert before and before == {
        path: path.stat().st_mtime_ns
        for one in (first, features)
        for path in sweep.folder(one).rglob("*")
        if path.is_file()
    }
    assert "stage1  going on from the checkpoint of step" in (tmp_path / "log").read_text()
    for run in (first, last):
        steps = [
            row["step"]
            for row in map(
                json.loads, (sweep.folder(run) / "metrics.jsonl").read_text().splitlines()
            )
            if "loss" in row
        ]
        assert steps == [1, 2, 3]
        one, other = (
            load_file(best_checkpoint(s.folder(run)) / "model.safetensors")
            for s in (sweep, done["words"])
        )
        assert one.keys() == other.keys() and all(
            torch.equal(one[name], other[name]) for name in one
        )
    unbroken, result = (
        only(done["words"]).result()["rows"][row],
        json.loads((tmp_path / "out/table-words.json").read_text())["rows"][row],
    )
    assert result.pop("hours") > 0 < unbroken.pop("hours") and result == unbroken


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("train.batch", 8, "train.batch was 16 and is 8"),
        ("llm.path", "other", "llm.path was .* and is other"),
        ("encoder.weights", "resnet18.pth", "encoder.weights was None and is resnet18.pth"),
        ("decode.beam", 1, "decode.beam was 5 and is 1"),
        (
            "train.dev_every",
            2,
            "train.dev_every was 3 and is 2",
        ),  # it decides which checkpoint is the best
        ("decode.batch", 7, None),  # changes no result
    ],
)
def test_runs_of_another_recipe_in_the_same_folder_are_refused(done, overrides, field, value, said):
    sweep = Sweep("demo", ["4"], 1, [], {**overrides, field: value}, done["4"].out)
    refused = (
        pytest.raises(UserError, match=f"begun with another recipe: {said}. Name another --out")
        if said
        else contextlib.nullcontext()
    )
    with refused:
        ablate(sweep, "nowhere", 1, "", [])


def test_a_sweep_goes_on_where_its_shards_are_named_by_a_relative_path(
    done, overrides, shards, monkeypatch
):
    monkeypatch.chdir(shards.parent)
    sweep = Sweep("demo", ["4"], 1, [], {**overrides, "data.shards": shards.name}, done["4"].out)
    ablate(sweep, "nowhere", 1, "", [])


def test_nothing_is_submitted_that_cannot_run(overrides, tmp_path):
    sweep = Sweep(
        "demo", ["4"], 1, [], overrides | {"data.shards": str(tmp_path)}, tmp_path / "out"
    )
    with pytest.raises(UserError, match="holds no finished shards"):
        ablate(sweep, "slurm", 1, "", [])


def test_a_sweep_of_some_rows_shows_all_that_are_done_and_the_page_of_its_run_has_it(
    done, overrides
):
    some = Sweep("demo", ["9"], 1, ["nothing"], overrides, done["9"].out)
    assert [run.name for run in some.runs] == [
        run.name for run in (only(some).rows["nothing"][0].stage1, only(some).rows["nothing"][0])
    ]
    assert only(some).write() == only(done["9"]).write()
    page = report(some.folder(some.runs[1]), SPLIT, 0).read_text()
    assert "What is frozen in stage 2" in page and "backbone + temporal" in page and "20.40" in page


def test_tables_that_are_asked_for_together_are_one_plan_and_each_is_written(
    done, overrides, capsys
):
    single = [done[name] for name in ("4", "9", "fig2")]
    several = Sweep("demo", ["4", "9", "fig2"], 1, [], overrides, done["9"].out)
    assert sorted(run.name for run in several.runs) == sorted(
        {run.name for sweep in single for run in sweep.runs}
    )
    assert all(
        several.runs.index(run.stage1) < several.runs.index(run)
        for run in several.runs
        if run.stage1
    )
    ablate(several, "nowhere", 1, "", [])
    said = capsys.readouterr().out
    assert said.startswith(
        "Table 4. Factorised learning; Table 9. What is frozen in stage 2; Figure 2. Dominance"
    )
    assert f"{len(several.runs)} runs, {len(several.runs)} of them done" in said and all(
        only(sweep).write() in said for sweep in single
    )
    some = Sweep("demo", ["4", "9"], 1, ["joint", "nothing"], overrides, done["9"].out)
    assert [run.stage for run in some.runs] == ["stage1", "joint", "stage2"]


def test_hours_are_those_of_finished_runs_or_of_flallm_plan(done, overrides, tmp_path):
    known = plan(done["9"], "cpu", 1).splitlines()
    assert all("done" in line for line in known[1:]) and not any(
        line.startswith("left") for line in known
    )
    more = Sweep("demo", ["9"], 2, [], overrides, done["9"].out)
    hours = [
        json.loads(line)["seconds"]
        for line in (done["9"].folder(done["9"].runs[0]) / "metrics.jsonl").read_text().splitlines()
    ][-1] / 3600
    said = plan(more, "cpu", 1)
    assert (
        f"{hours:.2f} h   stage1/seed1" in said
        and said.splitlines()[-1].startswith("left: ")
        and "unknown" not in said
    )
    half = plan(
        Sweep("demo", ["6"], 1, ["50 %"], overrides, done["9"].out), "cpu", 1
    )  # twice the frames take twice the time
    slow = float(re.search(r"([\d.]+) h   stage1\+stride=2/seed0", half)[1])
    assert slow == pytest.approx(2 * hours, abs=0.006)
    new = Sweep("demo", ["4"], 1, [], overrides, tmp_path)
    for gpu, name, about in (("h200", "H200", "~"), ("cpu", "this CPU", ">")):
        said = plan(new, gpu, 2)
        assert (
            all(about in line for line in said.splitlines()[1:])
            and f"on 2 x {name} by flallm plan" in said
        )
    cached = plan(
        Sweep("demo", ["words"], 1, ["features through the adapter"], overrides, tmp_path), "cpu", 1
    )
    assert "? h   stage1/seed0/features" in cached and re.search(
        r">[\d.]+ h   stage2\+cached/seed0", cached
    )
    assert cached.endswith("unknown hours of 1: no features have been written yet")
    lost = plan(
        Sweep("demo", ["4"], 1, [], overrides | {"llm.path": "/nowhere/llm"}, tmp_path), "cpu", 1
    )
    assert "unknown hours of 3: llm.path: /nowhere/llm is no folder" in lost


def finished(sweep: Sweep, row: str, hypotheses: list[str], references: list[str]) -> None:
    """What a run of the row leaves behind that a table is made of."""
    for run in only(sweep).rows[row]:
        folder = sweep.folder(run)
        for below in (folder / "predictions", folder / "scores"):
            below.mkdir(parents=True)
        scores = {
            name: {
                "value": 100 * sum(h == r for h, r in zip(hypotheses, references)) / len(references)
            }
            for name in SCORES
        }
        (folder / "scores/test.json").write_text(json.dumps({"raw": scores, "swapped_bleu4": 0.0}))
        rows = [
            {"key": str(n), "reference": r, "hypothesis": h}
            for n, (h, r) in enumerate(zip(hypotheses, references))
        ]
        (folder / "predictions/test.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows)
        )
        for one in (run, run.stage1):
            if one:
                sweep.folder(one).mkdir(parents=True, exist_ok=True)
                (sweep.folder(one) / "metrics.jsonl").write_text(
                    json.dumps({"step": 3, "dev_bleu4": 1.0, "seconds": 7200.0}) + "\n"
                )


def test_rows_that_were_scored_on_other_sentences_are_not_compared(tmp_path):
    references = [f"the sentence {n} is said in full{' and again' * (n % 7)}" for n in range(40)]
    sweep = Sweep("demo", ["4"], 1, [], {}, tmp_path)
    finished(sweep, "factorised", references, references)
    finished(
        sweep, "joint", [r if n % 2 else "nothing" for n, r in enumerate(references)], references
    )
    rows = only(sweep).result()["rows"]
    assert (
        rows["joint"]["hours"] == 2
        and rows["factorised"]["hours"] == 4
        and rows["factorised"]["bleu4"]["ci95"] == [100, 100]
    )
    draws = tables.bootstrap(
        [([r if n % 2 else "nothing" for n, r in enumerate(references)], references)], "raw"
    )
    low, high = rows["joint"]["bleu4"][
        "ci95"
    ]  # outside of which is a fortieth of the draws at either end
    assert all(
        np.mean(outside) == pytest.approx(0.025, abs=0.003)
        for outside in (draws < low, draws > high)
    )
    shutil.rmtree(tmp_path / "runs/joint")
    finished(sweep, "joint", references, [*references[:-1], "another sentence"])
    with pytest.raises(UserError, match="were scored on other sentences: they cannot be compared"):
        only(sweep).result()


def test_tables_of_isolated_signs_are_led_by_the_score_that_they_have(tmp_path):
    references = [f"sign{n % 11}" for n in range(44)]  # the second half of the list is the first
    sweep = Sweep("demo", ["4"], 1, [], {}, tmp_path)
    finished(sweep, "factorised", references, references)
    finished(
        sweep, "joint", [r if n % 2 else "sign0" for n, r in enumerate(references)], references
    )
    text = only(sweep).write()
    assert (
        "B1 [95 %] | B1 against factorised | B1, swapped videos |" in text
        and "BLEU-1 leads in place of BLEU-4" in text
    )
    result = only(sweep).result()
    joint = result["rows"]["joint"]
    low, high = joint["bleu1"]["ci95"]
    assert result["leading"] == "bleu1" and 0 < low < joint["bleu1"]["mean"] < high < 100
    assert joint["against_choice"]["bleu1"] < -10 and joint["against_choice"]["p"] < 0.01
    # Scores of an older version have swapped_bleu4 alone.
    assert (
        result["rows"]["factorised"]["swapped_bleu1"]["mean"]
        == result["rows"]["factorised"]["swapped_bleu4"]["mean"]
        == 0
    )
    assert only(sweep).stem.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"


def test_dominance_is_of_the_language_model_over_the_encoder():
    curves = [
        {
            "grad_norm/llm": g,
            "grad_norm/encoder": 1.0,
            "param_norm/llm": 1.0,
            "param_norm/encoder": 4.0,
        }
        for g in (3.0, 0.5, 2.0)
    ]
    found = tables.dominance(curves)
    assert found == {
        "steps": 3,
        "grad": {"larger": pytest.approx(2 / 3), "median": 2.0},
        "param": {"larger": 0.0, "median": 0.25},
    }


def test_of_several_seeds_a_table_has_mean_and_standard_deviation():
    row = {score: tables.spread([10.0, 13.0, 16.0]) for score in (*SCORES, "swapped_bleu4")} | {
        "hours": 1.0,
        "paper": {"bleu4": 23.09},
    }
    row["bleu4"]["ci95"] = [9.0, 17.0]
    sweep = {
        "title": "T",
        "recipe": "demo",
        "sentences": 5,
        "seeds": 3,
        "convention": "raw",
        "leading": "bleu4",
        "choice": None,
        "missing": ["other"],
        "rows": {"one": row},
    }
    text = tables.markdown(sweep)
    assert (
        "| one | 13.00 ± 3.00 | 13.00 ± 3.00 [9.00, 17.00] | 13.00 ± 3.00 | 1.00 | 23.09 |" in text
        and "over 3 seeds" in text
        and "finished yet: other" in text
    )


def test_under_the_mean_feature_an_llm_that_reads_words_sees_nothing_of_the_video(done):
    run = only(done["words"]).rows["words and what the adapter adds"][0]
    model, config = load_run(done["words"].folder(run), torch.device("cpu"))
    batch = ClipDataset(
        "dev", replace(config.data, shards=done["words"].overrides["data.shards"]), 0
    ).batch(model.text, [(None, 0)])
    mean = MeanFeature(model)
    with torch.no_grad(), mean.taken():
        seen = model._read(model.features(batch), batch.lengths)["inputs_embeds"][0]
    given = {}
    with (
        torch.no_grad(),
        mean.put_in(SimpleNamespace(sum=lambda *values: list(values), device="cpu")),
    ):
        for name in ("adapter", "words"):  # after the hooks that put the mean in
            model.get_submodule(name).register_forward_pre_hook(
                lambda _, inputs, name=name: given.update({name: inputs[0]})
            )
        read = model._read(model.features(batch), batch.lengths)["inputs_embeds"][0]
    assert given.keys() == {"adapter", "words"} and all(
        torch.equal(features, features[:1].expand_as(features)) for features in given.values()
    )
    assert (
        len(read) > 3
        and torch.allclose(read, read[:1].expand_as(read))
        and not torch.allclose(seen, seen[:1].expand_as(seen))
    )


def test_seeds_are_averaged_and_a_difference_that_chance_explains_has_a_high_p():
    rng = np.random.default_rng(0)
    references = [" ".join(f"w{i}" for i in rng.integers(0, 50, 8)) for _ in range(100)]
    spoiled = [
        [r if rng.random() < share else r.replace("w1", "x") + " y" for r in references]
        for share in (0.9, 0.9, 0.2)
    ]
    good, alike, bad = (tables.bootstrap([(s, references)], "raw") for s in spoiled)
    both = tables.bootstrap([(spoiled[0], references), (spoiled[2], references)], "raw")
    assert both == pytest.approx((good + bad) / 2)
    assert (
        tables.paired(bad, good, bad.mean() - good.mean())["p"]
        < 0.01
        < 0.05
        < tables.paired(alike, good, alike.mean() - good.mean())["p"]
    )
