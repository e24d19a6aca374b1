import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest

from flallm import cli, config
from flallm.commands import shards as shard_commands
from flallm.commands.parse import Count, PositiveFloat, PositiveInt, Seconds, parse_value
from flallm.data.corpora import synthetic
from flallm.data.encode import EncodeOptions, encode
from flallm.data.reader import Shards
from flallm.utils import UserError


def options(commands) -> dict[str, list[str]]:
    return {name: list(inspect.signature(f).parameters) for name, f in commands.items()}


def test_names_and_options_are_frozen():
    """People script against these: a change here is a change of the contract."""
    assert options(cli.COMMANDS) == {
        "shards": [],
        "pretrain": ["text", "out", "steps"],
        "demo": ["out"],
        "stage1": ["recipe", "run_dir", "overrides"],
        "stage2": ["recipe", "stage1", "run_dir", "overrides"],
        "joint": ["recipe", "run_dir", "overrides"],
        "evaluate": ["run", "split", "shards"],
        "features": ["run", "out", "dtype", "copies", "shards"],
        "export": ["run", "out", "lora", "license", "shards"],
        "trim": ["llm", "shards", "out", "text", "most"],
        "plan": ["recipe", "world_size", "gpu", "stage", "clips_per_s", "overrides"],
        "score": ["hypotheses", "references", "convention"],
        "compare": ["run_a", "run_b", "split"],
        "ablate": [
            "recipe",
            "table",
            "seeds",
            "rows",
            "out",
            "ranks",
            "where",
            "sbatch",
            "run",
            "overrides",
        ],
        "probe": ["run", "split", "shards"],
        "report": ["run", "split", "clips", "shards"],
        "doctor": ["recipe", "run_dir", "overrides"],
        "translate": ["run", "videos", "format", "segments", "window", "alternatives"],
    }
    assert options(shard_commands.COMMANDS) == {
        "synthetic": ["out", "preset", "dials", "seed", "train", "dev", "test", "size", "options"],
        "manifest": ["table", "out", "root", "options"],
        "phoenix14t": ["release", "out", "options"],
        "csl-daily": ["root", "out", "options"],
        "how2sign": ["tables", "out", "videos", "precut", "options"],
        "labels": ["folder", "root", "out", "options"],
        "verify": ["folder", "split", "processes"],
    }


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["stage1", "demo", "--stesp=5"], "did you mean --train.steps?"),
        (["stage1", "demo", "--train.lr_encodr=5"], "did you mean --train.lr_encoder?"),
        (["stage1", "demo", "--train.bacth=5"], "did you mean --train.batch?"),
        (["stage1", "demo", "--train.steps=many"], "--train.steps: 'many' is not a whole number"),
        (["stage1", "demo", "--train.steps=0"], "train.steps: 0 is less than 1"),
        (["stage1", "demo", "--train.lr_encoder=-1"], "train.lr_encoder: -1.0 is less than 0"),
        (["stage1", "demo", "--train.warmup=5"], "train.warmup: 5.0 is no share from 0 to below 1"),
        (
            ["stage1", "demo", "--train.betas=0.9"],
            "train.betas: 0.9: two numbers from 0 to below 1 are needed",
        ),
        (
            ["stage1", "demo", "--train.betas=2,3"],
            "train.betas: 2.0, 3.0: two numbers from 0 to below 1",
        ),
        (["stage1", "demo", "--train.epochs=nan"], "--train.epochs: 'nan' is not a number"),
        (["stage1", "demo", "--convention=rwa"], "convention: 'rwa' is none of raw, 13a"),
        (["stage1", "demo", "--seed=-1"], "seed: -1 is less than 0"),
        (["stage1", "demo", "--seed=1e30"], "is not below 4294967296"),
        (["stage1", "demo", "--light_t.heads=0"], "light_t.heads: 0 is less than 1"),
        (["stage1", "demo", "--encoder.widths=8,0,8,8"], "encoder.widths: 0 is less than 1"),
        (
            ["stage1", "demo", "--encoder.widths=64,128"],
            "encoder.depths: 4 of them for 2 encoder.widths",
        ),
        (
            [
                "stage1",
                "demo",
                "--train.deepspeed_overrides.a=1",
                "--train.deepspeed_overrides.a.b=2",
            ],
            "a.b: a is 1 and has no fields",
        ),
        (["stage1", "demo", "--light_t.heads=3"], "3 heads cannot share a light_t.width of 128"),
        (["stage1", "phoenix14t", "--train.epochs=0"], "train.epochs: 0.0 is not more than 0"),
        (["stage1", "demo", "--data.workers=-1"], "data.workers: -1 is less than 0"),
        (
            ["plan", "phoenix14t", "--world_size=8", "--stage=stage1", "--clips_per_s=fast"],
            "--clips_per_s: 'fast' is not a number above 0",
        ),
        (
            ["plan", "phoenix14t", "--world_size=8", "--gpu=a100"],
            "--gpu: 'a100' is none of a100-40, a100-80, h100-80, h200, cpu",
        ),
        (["stage1", "nosuch"], "no recipe 'nosuch'"),
        (["stage1", "bad.yaml"], "bad.yaml: data: workers: 'two' is not a whole number"),
        (["stage1", "demo", "stray"], "stray"),
        (["stage2", "demo"], "stage1"),
        (["evaluate", "."], "is no run folder"),
        (["features", ".", "--out=f", "--dtype=int8"], "none of bf16, fp16, fp32"),
        (["features", ".", "--out=f", "--copies=²"], "--copies: '²' is not a whole number"),
        (
            ["ablate", "demo", "--table=4", "--seeds=0"],
            "--seeds: '0' is not a whole number from 1 on",
        ),
        (["score", "bad.yaml"], "bad.yaml holds no references"),
        (
            ["score", "bad.yaml", "bad.yaml", "--convention=14a"],
            "no convention '14a', but raw, 13a",
        ),
        (["compare", ".", "."], "has no config.yaml"),
        (["ablate", "demo", "--table=4", "--seed=3"], "a table has --seeds=n of them"),
        (["ablate", "demo", "--table=3"], "no table '3' but 4, 5"),
        (["ablate", "demo", "--table=4", "--rows=jiont"], "no row 'jiont' but joint, factorised"),
        (["ablate", "demo", "--table=4"], "make them with tools/make_shards.py"),
        (["translate", ".", "none.mp4"], "none.mp4 is no file"),
        (["translate", ".", "bad.yaml", "--segments="], "--segments: . cannot be read"),
        (["export", ".", "new/x"], "is no run folder"),
        (["nosuch"], "nosuch"),
        (
            ["stage1", "demo", "--train.deepspeed_override.x=1"],
            "did you mean --train.deepspeed_overrides?",
        ),
        (
            ["stage1", "demo", "--data.shards=~/none"],
            f"{Path.home()}/none holds no finished shards",
        ),
        (
            ["stage1", "demo", "--llm.language"],
            "--llm.language has no value: write --llm.language=VALUE",
        ),
        (["stage1", "demo", "--name", "--train.steps=5"], "--name has no value"),
        (["stage1", "demo", "--data.shards=none"], "make them with tools/make_shards.py"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, message, tmp_path, flallm):
    (tmp_path / "bad.yaml").write_text("data: {workers: two}\n")
    result = flallm(*arguments, cwd=tmp_path)
    assert result.returncode == 2, result.stderr
    assert (
        result.stderr.count("\n") == 1
        and result.stderr.startswith("flallm: ")
        and message in result.stderr
    )
    assert [p.name for p in tmp_path.iterdir()] == ["bad.yaml"]  # nothing written


@pytest.mark.parametrize("part", ["3/3", "-1/3", "1", "a/b", "0/0"])
def test_a_part_that_is_none_is_refused(part):
    with pytest.raises(UserError, match="with i from 0 to n - 1"):
        shard_commands.parse_part(part)


def test_the_frame_rate_is_chosen_when_shards_are_made(shards, tmp_path, flallm):
    result = flallm("stage1", "demo", f"--data.shards={shards}", "--data.fps=12.5", cwd=tmp_path)
    assert (
        result.returncode == 2
        and "make_shards.py --fps=12.5" in result.stderr
        and not any(tmp_path.iterdir())
    )


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_names_every_option(command, tmp_path, flallm):
    result = flallm(command, "--help", cwd=tmp_path)
    assert result.returncode == 0
    usage, _, text = result.stdout.partition("\n\n")
    assert usage.startswith(f"flallm {command}")
    for option in options(cli.COMMANDS)[command]:
        assert f"    {option}: " in text, option


def test_flallm_alone_prints_the_commands_by_what_they_are_for(tmp_path, flallm):
    alone, helped = (flallm(*words, cwd=tmp_path) for words in ([], ["--help"]))
    assert alone.returncode == helped.returncode == 0 and alone.stdout == helped.stdout
    titles = [line for line in alone.stdout.splitlines()[1:] if line and line[0] != " "]
    assert titles == ["Data", "Train", "Evaluate", "Use a model", "Plan"]
    commands = [line.split()[0] for line in alone.stdout.splitlines() if line.startswith("  ")]
    assert sorted(commands) == sorted(cli.COMMANDS)


@pytest.mark.parametrize("words", [["--help"], ["stage1", "--help"], ["shards", "--help"]])
def test_help_imports_neither_torch_nor_cv2(words, tmp_path):
    command = [sys.executable, "-X", "importtime", "-m", "flallm", *words]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    modules = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert result.returncode == 0 and "flallm.cli" in modules
    assert not modules & {"torch", "cv2"}


def test_flallm_shards_and_the_tool_are_the_same_commands(tmp_path):
    rows = "video,text,split\ngone.mp4,hello,train\n"
    (tmp_path / "clips.csv").write_text(rows, encoding="utf-8")
    tool = Path(__file__).parents[1] / "tools/make_shards.py"
    outputs = []
    for program in ([tool], ["-m", "flallm", "shards"]):
        for words in (["manifest", "clips.csv", "--out=new"], ["verify", "--help"], ["nosuch"]):
            command = [sys.executable, *map(str, program), *words]
            result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
            text = result.stdout + result.stderr
            text = text.replace("flallm shards", "PROGRAM").replace("make_shards.py", "PROGRAM")
            outputs.append((result.returncode, text))
    assert outputs[:3] == outputs[3:]
    assert [code for code, _ in outputs[:3]] == [2, 0, 2]


def test_values_are_parsed_by_their_annotation():
    assert parse_value("a", "007", Count) == 7 and parse_value("a", "007", str) == "007"
    assert parse_value("a", "1.5", PositiveFloat | None) == 1.5
    assert parse_value("a", "b/c", Path | None) == Path("b/c")
    for text, kind in (("-1", Count), ("0", PositiveInt), ("0", PositiveFloat), ("x", Seconds)):
        with pytest.raises(UserError, match=f"--a: '{text}' is not "):
            parse_value("a", text, kind)
    with pytest.raises(UserError, match="--a: 'c' is none of a, b"):
        parse_value("a", "c", Literal["a", "b"])


@pytest.mark.parametrize(
    "content, message",
    [
        ("train: {batch: 64}\n", "`train:` is what a run's config.yaml has"),
        (
            "stage2: {stesp: 5}\n",
            "own.yaml: stage2: there is no field 'stesp': did you mean steps?",
        ),
        ("stage1:\n", "own.yaml: stage1: None is not a section"),
        ("stage1: {steps: 4}\nstage1: {batch: 8}\n", "'stage1' is there twice"),
        ("data: !!map [a, b]\n", "own.yaml cannot be read as YAML"),
        (
            "llm: {language: no}\n",
            'own.yaml: llm.language: YAML reads no as false; write it in quotes: language: "no"',
        ),
        (
            "base: demo\nllm:\n  language: On\n",
            'llm.language: YAML reads On as true; write it in quotes: language: "On"',
        ),
        (
            "llm: {lora: {targets: [q_proj, off]}}\n",
            'llm.lora.targets: YAML reads off as false; write it in quotes: targets: "off"',
        ),
        (
            "defaults: &x {language: y, path: yes}\nllm: {<<: *x}\n",
            "llm.path: YAML reads yes as true",
        ),
        (
            "stage2: {optimizer: true}\n",
            'stage2.optimizer: YAML reads true as true; write it in quotes: optimizer: "true"',
        ),
        ("name: 0123\n", 'name: YAML reads 0123 as 83; write it in quotes: name: "0123"'),
        ("name: 12:30\n", "name: YAML reads 12:30 as 750"),
        ("name: 1.0e+3\n", "name: YAML reads 1.0e+3 as 1000.0"),
        (
            "name: 2024-01-02\n",
            'name: YAML reads 2024-01-02 as a date; write it in quotes: name: "2024-01-02"',
        ),
        ("name: 2024-13-45\n", "name: YAML reads 2024-13-45 as a date"),
        ("base: no\n", "own.yaml: base: YAML reads no as false"),
        (
            "data: {workers: 010}\n",
            "data.workers: YAML reads 010 as 8; write the number that is meant",
        ),
        ("stage1: {timeout: 1:30}\n", "stage1.timeout: YAML reads 1:30 as 90"),
        ("name: a/b\n", "name: 'a/b' is to be a folder's name"),
    ],
)
def test_a_mistake_in_any_section_of_a_recipe_is_said(content, message, tmp_path, flallm):
    (tmp_path / "own.yaml").write_text(content)
    result = flallm("stage1", "own.yaml", cwd=tmp_path)
    assert result.returncode == 2 and message in result.stderr and result.stderr.count("\n") == 1


def test_a_text_is_what_is_written(shards, llm, tmp_path, flallm):
    given = [f"--data.shards={shards}", f"--llm.path={llm}", "--world_size=1", "--stage=stage1"]
    (tmp_path / "own.yaml").write_text("base: demo\nname: 'no'\n", encoding="utf-8")
    for recipe, option in (
        ("demo", "--name=no"),
        ("demo", "--name=0123"),
        ("own.yaml", "--seed=1"),
    ):
        planned = flallm("plan", recipe, *given, option, cwd=tmp_path)
        name = option.removeprefix("--name=") if recipe == "demo" else "no"
        assert planned.returncode == 0 and planned.stdout.startswith(f"{name} stage1 on 1 x"), (
            planned.stderr
        )
    for text in (
        "no",
        "1e3",
        "0123",
        "12:30",
        "2024-01-02",
        "1.10",
        "5",
    ):  # in a run's config.yaml too
        (tmp_path / "config.yaml").write_text(
            config.dump(config.load("demo", "stage2", {"llm.language": text})), encoding="utf-8"
        )
        assert config.from_dict(config.Config, config.read_run(tmp_path), "").llm.language == text


def test_text_is_utf8_whatever_the_locale_is(tmp_path):
    """In processes whose locale knows ASCII alone."""
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    environment.pop("PYTHONIOENCODING", None)
    (tmp_path / "clip.mp4").write_bytes(
        encode(next(synthetic.clips(train=1, dev=0, test=0, size=36)), EncodeOptions())[0]
    )
    rows = [
        ("video", "text", "split", "key"),
        ("clip.mp4", "schöne Grüße 你好", "train", "grün"),
        ("gone.mp4", "x", "train", "fünf"),
    ]
    (tmp_path / "clips.tsv").write_text(
        "".join("\t".join(row) + "\n" for row in rows), encoding="utf-8"
    )
    tool = Path(__file__).parents[1] / "tools/make_shards.py"
    made = subprocess.run(
        [sys.executable, tool, "manifest", "clips.tsv", "--out=shards"],
        capture_output=True,
        env=environment,
        cwd=tmp_path,
    )
    assert made.returncode == 0 and "train fünf: its video" in made.stdout.decode(), made.stderr
    meta = Shards(tmp_path / "shards", "train").read(0)[1]
    assert (meta["key"], meta["text"]) == ("grün", "schöne Grüße 你好")
    assert (
        json.loads((tmp_path / "shards/dataset.json").read_bytes())["left_out"][0]["key"] == "fünf"
    )
    (tmp_path / "own.yaml").write_text("# für Grüße\nconvention: größer\n", encoding="utf-8")
    refused = subprocess.run(
        [sys.executable, "-m", "flallm", "stage1", "own.yaml"],
        capture_output=True,
        env=environment,
        cwd=tmp_path,
    )
    assert refused.returncode == 2 and "convention: 'größer' is none of" in refused.stderr.decode()
