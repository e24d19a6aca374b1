"""A run that is stopped goes on as if it had not been. One process group of two plays many scenarios; in others, from `make faults`, processes die."""

import contextlib
import io
import json
import re
import shutil
from fnmatch import fnmatch
from pathlib import Path

import faults
import pytest
import torch
from faults import DAMAGE, SHORT, ZERO3, Lab, Skip, damage, rows, same
from models import save
from safetensors.torch import load_file

from flallm import config as cfg
from flallm.config import Checkpoint
from flallm.data.corpora import synthetic
from flallm.data.encode import EncodeOptions
from flallm.data.shards import make_shards
from flallm.data.tokenizer import TranslationTokenizer
from flallm.distributed.context import init_distributed
from flallm.distributed.failures import EXIT_REQUEUE, PreemptionHandler
from flallm.distributed.launch import spawn
from flallm.evaluation.decode import load_run
from flallm.model.translator import Translator
from flallm.model.weights import best_checkpoint, checkpoint_steps, load_best, manifest_digest
from flallm.training import train as training
from flallm.training.checkpoint import _remove_old
from flallm.training.resume import MUTABLE_ON_RESUME
from flallm.training.train import train
from flallm.utils import UserError


def stop_at(step: int):
    """The next run of this process is asked to stop during that step."""

    class At(PreemptionHandler):
        calls = 0

        @property
        def stop(self):
            self.calls += 1
            return self.calls == step

        @stop.setter
        def stop(self, value):
            pass

    return At


def run_until(step: int, *arguments) -> None:
    """A run that rank 1 alone is told to stop, in its `step`-th step."""
    before = training.PreemptionHandler
    if arguments[2].rank == 1:
        training.PreemptionHandler = stop_at(step)
    try:
        with pytest.raises(SystemExit) as left:
            train(*arguments)
    finally:
        training.PreemptionHandler = before
    assert left.value.code == EXIT_REQUEUE


def two_ranks(configs: dict, out: Path) -> None:
    ranks = init_distributed()

    def stop_three_times(name: str) -> None:
        arguments = configs[name], out / f"{name}-again", ranks, out / "stage1"
        train(configs[name], out / name, ranks, out / "stage1")
        for steps in (1, 2, 1):
            run_until(steps, *arguments)
        if name == "joint":
            arguments = configs["other words"], *arguments[1:]
        if name == "stage1" and ranks.is_main:
            shutil.copytree(arguments[1], out / "unfinished")
            for how in DAMAGE:
                shutil.copytree(arguments[1], out / how)
                damage(how, out / how / "checkpoints/step-4")
        train(*arguments)

    for name in ("stage1", "stage2", "joint", "offload", "lora"):
        stop_three_times(name)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        run_until(1, configs["stage2"], out / "early", ranks, out / "unfinished")
    assert (
        "warning: " in said.getvalue() and "unfinished has got to step 4 of 6" in said.getvalue()
    ) is ranks.is_main
    for how in DAMAGE:
        train(configs["stage1"], out / how, ranks)
    train(configs["few"], out / "few", ranks)
    with pytest.raises(UserError) as refused:
        train(configs["other"], out / "stage1", ranks)
    train(configs["clock"], out / "clock", ranks)
    for name, said in (
        ("elsewhere", "begun with other data: data.shards had 24 clips and has 8"),
        ("stride", "data.stride is 8 here but 4 in .*stage1"),
    ):
        with pytest.raises(UserError, match=said):
            train(
                configs[name],
                out / ("stage1" if name == "elsewhere" else name),
                ranks,
                out / "stage1",
            )
    with pytest.raises(UserError, match="begun with the encoder of another stage 1"):
        train(configs["stage2"], out / "stage2", ranks, out / "few")
    with pytest.raises(UserError, match="reduce_bucket_sze in "):
        train(configs["typo"], out / "typo", ranks)
    (out / "refused.txt").write_text(str(refused.value))
    stop_three_times(
        "zero3"
    )  # last: for good, DeepSpeed puts its own function in the place of F.linear


@pytest.fixture(scope="module")
def runs(shards, llm, tmp_path_factory):
    from conftest import SMALL

    out = tmp_path_factory.mktemp("runs")

    make_shards(
        synthetic.clips(train=8, dev=2, test=1, size=36),
        out / "shards",
        EncodeOptions(),
        {"name": "synthetic"},
    )

    def make(stage, **overrides):
        return cfg.load(
            "demo", stage, {"data.shards": str(shards), "llm.path": str(llm), **SMALL, **overrides}
        )

    words = TranslationTokenizer(cfg.LLM(path=str(llm)))  # as when a model is trimmed anew
    words.tokenizer.add_tokens(["the"])
    shutil.copytree(llm, out / "words")
    words.tokenizer.save_pretrained(out / "words")
    configs = {
        "other words": make(
            "joint", **SHORT, **{"train.optimizer": "sgd", "llm.path": str(out / "words")}
        ),
        "stage1": make("stage1", **SHORT, **{"light_t.dropout": 0.1}),
        "stage2": make("stage2", **SHORT),
        "joint": make("joint", **SHORT, **{"train.optimizer": "sgd"}),
        "offload": make(
            "stage1",
            **SHORT
            | {"train.deepspeed": str(Path(__file__).parents[2] / "ds_configs/zero2_offload.json")},
        ),
        "zero3": make("joint", **SHORT | {"train.deepspeed": ZERO3}),
        "lora": make(
            "stage2",
            **SHORT,
            **{
                "llm.path": str(save("llama", out / "llama")),
                "llm.lora.rank": 4,
                "llm.prompt": "we saw {video} and",
            },
        ),
        "few": make(
            "stage1",
            **SHORT | {"checkpoint.every": 1, "checkpoint.last": 1, "checkpoint.every_nth": 4},
        ),
        "clock": make(
            "stage1",
            **SHORT | {"checkpoint.every": 0, "checkpoint.minutes": 1e-6, "checkpoint.last": 10},
        ),
        "elsewhere": make(
            "stage1", **SHORT, **{"light_t.dropout": 0.1, "data.shards": str(out / "shards")}
        ),
        "stride": make("stage2", **SHORT | {"data.stride": 8}),
        "other": make(
            "stage1",
            **SHORT | {"train.log_every": 2, "train.lr_encoder": 0.5, "checkpoint.last": 1},
        ),
        "typo": make(
            "stage1", **{"train.deepspeed_overrides.zero_optimization.reduce_bucket_sze": "2e8"}
        ),
    }
    spawn(two_ranks, 2, configs, out)
    return configs, out


@pytest.mark.parametrize("stage", ["stage1", "stage2", "joint", "offload", "zero3", "lora"])
def test_a_run_stopped_three_times_is_bit_equal_to_one_never_stopped(runs, stage):
    _, out = runs
    assert same(out / stage, out / f"{stage}-again")


def test_with_lora_a_checkpoint_holds_the_updates_and_the_run_what_is_under_them(runs):
    _, out = runs
    held = load_file(best_checkpoint(out / "lora") / "model.safetensors")
    assert all(".lora_" in name for name in held if name.startswith("language.")) and any(
        ".lora_B" in name and t.any() for name, t in held.items()
    )
    before, after = (
        load_file(folder / "model.safetensors") for folder in (out / "llama", out / "lora/llm")
    )
    assert before.keys() == after.keys() and all(
        torch.equal(before[name], after[name]) for name in before
    )
    model, _ = load_run(out / "lora", torch.device("cpu"))
    assert torch.equal(
        model.language.get_base_model().model.norm.weight, before["model.norm.weight"]
    )
    assert all(torch.equal(model.state_dict()[name], value) for name, value in held.items())


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_checkpoint_is_noticed_and_the_one_before_it_serves(runs, how):
    _, out = runs
    assert same(out / "stage1", out / how)


def test_the_last_the_best_and_every_nth_checkpoint_are_kept(runs):
    _, out = runs
    scores = {
        x["dev_bleu4"]: x["step"] for x in rows(out / "few/metrics.jsonl") if "dev_bleu4" in x
    }
    assert {p.name for p in (out / "few/checkpoints").iterdir()} == {
        "step-4",
        "step-6",
        f"step-{scores[max(scores)]}",
    }


def test_a_copy_of_a_checkpoint_is_none_and_is_kept(tmp_path):
    for name in ("step-3", "step-10", "step-10.bak", "step-²", "step-"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert checkpoint_steps(tmp_path) == [3, 10]


def test_a_checkpoint_is_written_when_its_time_has_come(runs):
    _, out = runs
    assert {p.name for p in (out / "clock/checkpoints").iterdir()} == {
        f"step-{n}" for n in range(1, 7)
    }


def test_a_changed_recipe_is_refused_with_what_differs_and_matters(runs):
    _, out = runs
    said = (out / "refused.txt").read_text()
    assert (
        "train.lr_encoder was 0.002 and is 0.5" in said
        and "log_every" not in said
        and "checkpoint" not in said
    )


def test_the_docs_name_every_field_that_may_change():
    docs = (Path(__file__).parents[2] / "docs/training.md").read_text()
    listed = docs.split("What may change: ")[1].split("`train.steps` and `train.epochs` may not")[0]
    names = re.findall(r"`([\w.*]+)`", listed)
    fields = cfg.flat(cfg.Config())
    in_docs = {field for field in fields if any(fnmatch(field, name) for name in names)}
    assert in_docs == {field for field in fields if field.startswith(MUTABLE_ON_RESUME)}
    assert all(any(fnmatch(field, name) for field in fields) for name in names)


def test_the_best_weights_come_back_and_altered_ones_are_refused(runs, tmp_path):
    configs, out = runs
    model = Translator(configs["stage1"], TranslationTokenizer(configs["stage1"].llm))
    run = shutil.copytree(out / "stage1", tmp_path / "run")
    load_best(run, model)
    saved = load_file(best_checkpoint(run) / "model.safetensors")
    assert all(
        torch.equal(saved[name], tensor)
        for name, tensor in model.state_dict().items()
        if name in saved
    )
    # The best one is neither the first nor the last.
    path = run / "checkpoints/step-3/manifest.json"
    manifest = json.loads(path.read_text()) | {"dev_bleu4": 5.0}
    del manifest["sha256"]
    path.write_text(json.dumps(manifest | {"sha256": manifest_digest(manifest)}))
    assert best_checkpoint(run).name == "step-3"
    load_best(run, model)
    best, name = load_file(run / "checkpoints/step-3/model.safetensors"), "encoder.temporal.weight"
    assert torch.equal(best[name], model.state_dict()[name]) and not torch.equal(
        best[name], saved[name]
    )
    _remove_old(run / "checkpoints", Checkpoint(last=1))
    assert {p.name for p in (run / "checkpoints").glob("step-*")} == {"step-3", "step-6"}
    damage("flipped", best_checkpoint(run))
    with pytest.raises(UserError, match="altered"):
        load_best(run, model)


@pytest.fixture(scope="module")
def lab(shards, llm, tmp_path_factory):
    return Lab(tmp_path_factory.mktemp("lab"), shards, llm)


@pytest.mark.parametrize(
    "scenario",
    [
        lambda lab: faults.all_ranks_killed(lab, times=1),
        faults.one_rank_killed,
        lambda lab: faults.killed_while_saving(lab, ("before the manifest",)),
        faults.not_finite,
        faults.loss_spike,
        faults.clips_gone,
        faults.one_rank_signalled,
        lambda lab: faults.other_world_sizes(lab, ("stage2",)),
        faults.two_runs_in_one_folder,
        lambda lab: faults.torchrun_restarts(lab, nodes=2),
    ],
    ids=[
        "all killed",
        "one killed",
        "killed while saving",
        "not finite",
        "loss spike",
        "clips gone",
        "SIGTERM to one",
        "other world sizes",
        "two runs",
        "torchrun restarts",
    ],
)
def test_faults(lab, scenario):
    try:
        scenario(lab)
    except Skip as reason:
        pytest.skip(str(reason))
