import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from flallm import cli, config
from flallm.data.corpora import synthetic
from flallm.data.encode import EncodeOptions, encode
from flallm.data.reader import Shards
from flallm.utils import UserError

sys.path.append(str(Path(__file__).parents[1] / "tools"))


def options(commands) -> dict[str, list[str]]:
    return {name: list(inspect.signature(f).parameters) for name, f in commands.items()}


def test_names_and_options_are_frozen():
    """People script against these: a change here is a change of the contract."""
    import make_shards

    assert options(cli.COMMANDS) == {
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
    assert options(make_shards.COMMANDS) == {
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
    import make_shards

    with pytest.raises(UserError, match="with i from 0 to n - 1"):
        make_shards._part(part)


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
    assert result.returncode == 0 and "GROUP" not in result.stdout and "FIRE" not in result.stdout
    for option in options(cli.COMMANDS)[command]:
        assert option.upper() in result.stdout or (
            option == "overrides" and "Additional flags are accepted" in result.stdout
        ), option


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
