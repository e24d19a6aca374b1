"""What a GPU computes is what the CPU computes, and a stopped run goes on as it would have, but for rounding: attention's backward pass adds
up in any order there. Skipped where there is no GPU."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import SMALL

pytestmark = pytest.mark.skipif(not shutil.which("nvidia-smi"), reason="there is no GPU here")
VISIBLE = {
    name: value
    for name, value in os.environ.items()
    if name not in ("CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR")
}
DEVICES = {"cpu": dict(os.environ), "gpu": VISIBLE}


def flallm(*commands: tuple[list[str], dict]) -> list[str]:
    """What commands print that run side by side, each (arguments, environment)."""
    begun = [
        subprocess.Popen(
            [sys.executable, "-m", "flallm", *arguments], env=env, stdout=-1, stderr=-1, text=True
        )
        for arguments, env in commands
    ]
    said = [process.communicate() for process in begun]
    for process, (_, errors) in zip(begun, said):
        assert process.returncode == 0, errors[-3000:]
    return [out for out, _ in said]


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.fixture(scope="module")
def runs(shards, llm, tmp_path_factory):
    out = tmp_path_factory.mktemp("gpu")
    options = [
        f"--{name}={json.dumps(value) if isinstance(value, list) else value}"
        for name, value in SMALL.items()
        if name != "train.precision"
    ]
    options += [
        f"--data.shards={shards}",
        f"--llm.path={llm}",
        "--train.steps=12",
        "--train.log_every=1",
        "--train.batch=8",
        "--checkpoint.every=6",
    ]
    flallm(*(
        (["stage1", "demo", f"--run_dir={out}/{device}-{precision}", f"--train.precision={precision}", *options], env)
        for device, env in DEVICES.items()
        for precision in ("fp32", "bf16")
    ))  # fmt: skip
    stage2 = ["stage2", "demo", f"--stage1={out}/gpu-bf16", "--train.precision=bf16", *options]
    zero3 = f"--train.deepspeed={Path(__file__).parents[2]}/ds_configs/zero3.json"
    flallm(
        ([*stage2, f"--run_dir={out}/stage2"], VISIBLE),
        ([*stage2, f"--run_dir={out}/stage2-zero3", zero3], VISIBLE),
    )
    for run in ("gpu-bf16", "stage2"):
        shutil.copytree(out / run, out / f"{run}-again")
        shutil.rmtree(out / f"{run}-again/checkpoints/step-12")
    stage1 = [
        "stage1",
        "demo",
        f"--run_dir={out}/gpu-bf16-again",
        "--train.precision=bf16",
        *options,
    ]
    flallm((stage1, VISIBLE), ([*stage2, f"--run_dir={out}/stage2-again"], VISIBLE))
    return out


def test_the_run_was_on_a_gpu(runs):
    assert json.loads((runs / "gpu-bf16/environment.json").read_text())["device"] != "cpu"
    assert json.loads((runs / "cpu-bf16/environment.json").read_text())["device"] == "cpu"


@pytest.mark.parametrize("precision, tolerance", [("fp32", 2e-3), ("bf16", 3e-2)])
def test_losses_are_those_of_the_cpu(runs, precision, tolerance):
    # Differences of rounding grow from step to step.
    assert losses(runs / f"gpu-{precision}")[:3] == pytest.approx(
        losses(runs / f"cpu-{precision}")[:3], rel=tolerance
    )


@pytest.mark.parametrize("run", ["gpu-bf16", "stage2"])
def test_a_run_goes_on_as_it_would_have(runs, run):
    assert losses(runs / f"{run}-again") == pytest.approx(losses(runs / run), rel=1e-3)


def test_zero3_has_the_losses_of_zero2(runs):
    assert losses(runs / "stage2-zero3") == pytest.approx(losses(runs / "stage2"), rel=3e-2)


def test_a_run_made_on_a_gpu_translates_on_either(runs):
    shutil.copytree(runs / "stage2", runs / "on-cpu")
    said = flallm(
        (["evaluate", f"{runs}/stage2"], VISIBLE), (["evaluate", f"{runs}/on-cpu"], DEVICES["cpu"])
    )
    gpu, cpu = (json.loads(text)["raw"] for text in said)
    assert gpu["num_samples"] == cpu["num_samples"] == 7
    assert gpu["chrf"]["value"] == pytest.approx(cpu["chrf"]["value"], abs=5)
