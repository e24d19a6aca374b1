"""The project's own scripts on a real Slurm of two nodes, started here. Needs Debian's packages: see CONTRIBUTING.md."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import SMALL

from slurm import PATH, Cluster, missing, wait_for

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(
    bool(missing()),
    reason=f"Slurm is not installed ({', '.join(missing())} missing): see CONTRIBUTING.md",
)

STEPS = 40
ONE_CPU = ("--gpus-per-node=0", "--cpus-per-task=1")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with Cluster(tmp_path_factory.mktemp("slurm") / "cluster") as cluster:
        cluster.env |= {
            "PATH": f"{Path(sys.executable).parent}:{cluster.env['PATH']}",
            "PYTHONPATH": str(ROOT),
        }
        yield cluster


@pytest.fixture(scope="module")
def recipe(shards, llm, tmp_path_factory) -> Path:
    """The demo's at the size of tests; both stages with checkpoints every 5 steps and every loss written down."""
    content: dict = yaml.safe_load((ROOT / "flallm/recipes/demo.yaml").read_text())
    for name, value in SMALL.items():
        section, field = name.split(".")
        for target in ("stage1", "stage2") if section == "train" else (section,):
            content[target][field] = value
    for stage in ("stage1", "stage2"):
        content[stage] |= {"steps": STEPS, "batch": 12, "log_every": 1, "dev_every": STEPS}
    content["encoder"]["global_batch_norm"] = True
    content |= {
        "checkpoint": {"every": 5},
        "data": content["data"] | {"shards": str(shards)},
        "llm": {"path": str(llm), "dropout": 0},
    }
    path = tmp_path_factory.mktemp("recipe") / "small.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def submit(cluster: Cluster, folder: Path, nodes: str, *arguments: str) -> str:
    options = (*ONE_CPU, f"--nodes={nodes}", f"--output={folder}/log.txt", f"--chdir={folder}")
    return cluster.ask(
        "sbatch",
        "--parsable",
        *options,
        str(ROOT / "slurm/stage1.sh"),
        *arguments,
        f"--run_dir={folder}/run",
    ).strip()


@pytest.mark.parametrize("name", ["phoenix14t", "csl-daily", "how2sign"])
def test_slurm_would_take_both_stages_of_a_recipe_of_the_paper(cluster, name):
    for stage, *more in (("stage1",), ("stage2", "--stage1=/run")):
        cluster.ask(
            "sbatch",
            "--test-only",
            "--gpus-per-node=0",
            "--cpus-per-task=16",
            str(ROOT / f"slurm/{stage}.sh"),
            name,
            "--data.shards=/shards",
            *more,
        )


def losses(run: Path) -> dict[int, float]:
    rows = (
        [
            json.loads(line)
            for line in (run / "metrics.jsonl").read_text().splitlines()
            if line.endswith("}")
        ]
        if (run / "metrics.jsonl").exists()
        else []
    )
    assert [r["step"] for r in rows if "loss" in r] == list(
        range(1, 1 + sum("loss" in r for r in rows))
    )  # none twice
    return {r["step"]: r["loss"] for r in rows if "loss" in r}


@pytest.fixture(scope="module")
def unbroken(cluster, recipe, tmp_path_factory) -> dict[int, float]:
    folder = tmp_path_factory.mktemp("unbroken")
    job = cluster.wait_for_job(submit(cluster, folder, "2", str(recipe)))
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "0"), (
        folder / "log.txt"
    ).read_text()
    return losses(folder / "run")


def test_a_job_that_is_signalled_saves_goes_back_into_the_queue_and_ends_as_if_unbroken(
    cluster, recipe, unbroken, tmp_path
):
    number = submit(cluster, tmp_path, "2", str(recipe))
    wait_for(lambda: len(losses(tmp_path / "run")) > 3, "the fourth step", 600)
    cluster.ask(
        "scancel", "--signal=USR1", number
    )  # as --signal=USR1@300 does before the time limit
    job = cluster.wait_for_job(number)
    said = (tmp_path / "log.txt").read_text()
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), said
    assert "asked to stop: all is saved" in said and "going on from the checkpoint of step" in said
    assert losses(tmp_path / "run") == unbroken


def test_a_job_whose_node_dies_goes_on_with_the_node_that_is_left(
    cluster, recipe, unbroken, tmp_path
):
    cluster.wait_until_idle()  # or it begins with one
    number = submit(cluster, tmp_path, "1-2", str(recipe))
    wait_for(lambda: len(losses(tmp_path / "run")) > 7, "the eighth step", 600)
    assert cluster.job(number)["NumNodes"] == "2"
    cluster.kill_node("node2")
    cluster.ask(
        "scontrol", "update", "NodeName=node2", "State=DOWN", "Reason=test"
    )  # Slurm notices by itself after SlurmdTimeout
    job = cluster.wait_for_job(number)
    cluster.start_node("node2")
    said = (tmp_path / "log.txt").read_text()
    assert (job["JobState"], job["Restarts"], job["NumNodes"]) == ("COMPLETED", "1", "1"), said
    assert "on 1 ranks" in said
    after = losses(tmp_path / "run")
    assert after == pytest.approx(
        unbroken, rel=1e-3
    )  # an optimiser of many steps magnifies how sums are rounded
    first = int(said.partition("going on from the checkpoint of step ")[2].split()[0])
    assert first >= 5 and {s: after[s] for s in range(1, first + 1)} == {
        s: unbroken[s] for s in range(1, first + 1)
    }


def test_shards_both_stages_and_scores_in_a_chain_of_jobs_from_a_path_with_a_blank(
    cluster, recipe, tmp_path
):
    (tmp_path / "my repo").symlink_to(ROOT)
    (tmp_path / "run.sh").write_text("exit 9\n")  # what a path cut at its blank would lead to
    out = tmp_path / "my runs"
    options = {
        "SHARDS_OPTIONS": "--array=0-1 --cpus-per-task=1",
        "TRAINING_OPTIONS": " ".join(ONE_CPU),
    }
    arguments = ("synthetic", "--train=24", "--dev=8", "--test=7", "--size=36")
    done = subprocess.run(
        [tmp_path / "my repo/slurm/chain.sh", recipe, out, *arguments],
        env=cluster.env | options,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    last = done.stderr.split()[-1]
    job = cluster.wait_for_job(last)
    assert job["JobState"] == "COMPLETED", [p.read_text() for p in out.glob("*.log")]
    assert json.loads((out / "stage2/scores/test.json").read_text())["raw"]["num_samples"] == 7
    # By hand on two tasks that have no scontrol to say where they meet, as in a container.
    srun = ("env", f"PATH={Path(sys.executable).parent}", shutil.which("srun", path=PATH))
    cluster.ask(*srun, "--ntasks=2", "flallm", "evaluate", str(out / "stage2"), "--split=dev")
    assert json.loads((out / "stage2/scores/dev.json").read_text())["raw"]["num_samples"] == 8


def test_tables_that_share_their_runs_as_arrays_of_jobs(cluster, recipe, tmp_path):
    command = [
        sys.executable,
        "-m",
        "flallm",
        "ablate",
        recipe,
        "--table=words,lora",
        "--rows=features through the adapter,all weights",
        f"--out={tmp_path}/out",
        "--train.steps=2",
        "--train.dev_every=2",
    ]
    options = f"{' '.join(ONE_CPU)} --chdir={tmp_path} --output={tmp_path}/%A_%a.log"
    done = subprocess.run(
        [*command, "--where=slurm", f"--sbatch={options}"],
        env=cluster.env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    stage1, features, stage2 = (
        line.split()[1].rstrip(":") for line in done.stdout.splitlines() if line.startswith("job ")
    )
    assert cluster.wait_for_job(stage2)["JobState"] == "COMPLETED", [
        p.read_text() for p in tmp_path.glob("*.log")
    ]
    assert cluster.job(stage1)["JobState"] == cluster.job(features)["JobState"] == "COMPLETED"
    done = subprocess.run(
        [*command, "--where=nowhere"], env=cluster.env, capture_output=True, text=True
    )
    assert (
        "3 runs, 3 of them done" in done.stdout
        and "| features through the adapter | " in done.stdout
    ), done.stderr
    assert all((tmp_path / f"out/table-{name}.json").exists() for name in ("words", "lora"))
