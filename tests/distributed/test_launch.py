"""How ranks find each other and what a process may use: environments of launchers, ports, cores."""

import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
from noted import Noted

import flallm as package
from flallm.data.clips import Clip
from flallm.data.encode import EncodeOptions
from flallm.data.shards import make_shards
from flallm.distributed.rendezvous import SIZES, _store_of_this_start, rendezvous
from flallm.utils import cpu_quota, usable_cpus

RANK = {
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}
TASK = {
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "0",
}


@pytest.fixture
def environment(monkeypatch, tmp_path):
    """Sets variables in an environment that no launcher has made, and in which there is no scontrol."""
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in os.environ:
        if name.startswith(("SLURM_", "TORCHELASTIC_")) or name in (*RANK, *SIZES):
            monkeypatch.delenv(name)

    def change(variables: dict[str, str]) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return change


@pytest.mark.parametrize(
    "variables, message",
    [
        (TASK, "set MASTER_ADDR to the address of its first node"),
        (TASK | {"SLURM_LAUNCH_NODE_IPADDR": "192.0.2.1"}, "srun was called on 192.0.2.1, but"),
        (TASK | {"SLURM_STEP_ID": "", "MASTER_ADDR": "127.0.0.1"}, "set MASTER_PORT to a free"),
        ({"SLURM_STEP_NUM_TASKS": "2"}, "has no SLURM_PROCID: set RANK"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_SIZE is 2 but RANK is not set"),
        ({"RANK": "0"}, "LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT is not"),
        (RANK | {"WORLD_SIZE": "2(x2)"}, "WORLD_SIZE: '2(x2)' is not a whole number"),
        (RANK | {"RANK": "2"}, "RANK: 2 is not below WORLD_SIZE 2"),
        (RANK | {"MASTER_PORT": "70000"}, "MASTER_PORT: 70000 is over 65535"),
        (RANK | {"MASTER_ADDR": "node.invalid"}, "does not know 'node.invalid'"),
    ],
)
def test_a_rank_that_cannot_join_says_in_one_line_what_to_set(
    variables, message, environment, flallm, tmp_path
):
    environment(variables)
    result = flallm("evaluate", "run", cwd=tmp_path)
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and message in result.stderr, (
        result.stderr
    )


def test_a_port_that_is_taken_is_named_with_what_to_set(environment, flallm, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        environment(RANK | {"MASTER_PORT": str(port)})
        result = flallm("evaluate", "run", cwd=tmp_path)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert f"MASTER_PORT: rank 0 cannot open port {port}" in result.stderr
    assert "address already in use" in result.stderr and "set it to a free port" in result.stderr


def test_a_rank_whose_first_rank_does_not_come_ends_with_one_line_and_may_be_tried_again(
    environment, flallm, capsys, shards, tmp_path
):
    environment(RANK | {"RANK": "1", "MASTER_PORT": rendezvous()["MASTER_PORT"]})
    with pytest.raises(SystemExit) as left:
        flallm("stage1", "demo", f"--data.shards={shards}", "--train.timeout=1", cwd=tmp_path)
    said = capsys.readouterr().err
    assert (
        left.value.code == 1
        and "rank 1 does not reach rank 0 at 127.0.0.1" in said
        and "Traceback" not in said
    )


def test_a_number_of_tasks_that_slurm_shortens_is_no_mistake(environment, flallm, tmp_path):
    environment(RANK | {"WORLD_SIZE": "1", "MASTER_PORT": "0"})
    environment({"SLURM_NTASKS_PER_NODE": "8(x2)", "SLURM_TASKS_PER_NODE": "8(x2)"})
    result = flallm("evaluate", "run", cwd=tmp_path)
    assert "run is no run folder" in result.stderr  # so it has joined


def test_ranks_that_start_again_meet_each_other_and_not_those_that_are_dead():
    server = dist.TCPStore("127.0.0.1", 0, is_master=True)
    wait = timedelta(seconds=30)

    def start(rank: int, greeting: str) -> list[str]:
        """What the three ranks of a start say to each other."""
        client = dist.TCPStore("127.0.0.1", server.port, is_master=False, timeout=wait)
        store = _store_of_this_start(client, rank, 3, wait)
        store.set(str(rank), f"{greeting} {rank}")
        return [store.get(str(other)).decode() for other in range(3)]

    server.set("flallm/asks/1", "the name of a rank that died before rank 0 came")
    for greeting in ("first", "second"):
        with ThreadPoolExecutor(3) as ranks:
            heard = [*ranks.map(start, range(3), [greeting] * 3)]
        assert heard == [[f"{greeting} {rank}" for rank in range(3)]] * 3


def test_the_cores_of_a_process_are_those_that_it_may_use():
    core = str(min(os.sched_getaffinity(0)))
    program = [sys.executable, "-c", "from flallm.utils import usable_cpus; print(usable_cpus())"]
    environment = {**os.environ, "PYTHONPATH": str(Path(package.__file__).parents[1])}
    bound = subprocess.run(["taskset", "-c", core, *program], env=environment, capture_output=True)
    asked = subprocess.run(
        program, env=environment | {"SLURM_CPUS_PER_TASK": "1"}, capture_output=True
    )
    assert bound.stdout == asked.stdout == b"1\n"
    assert usable_cpus(10_000) == 1


@pytest.mark.parametrize(
    "membership, limits, cores",
    [
        ("0::/job/step", {"job/cpu.max": "250000 100000", "job/step/cpu.max": "max 100000"}, 2.5),
        ("0::/", {"cpu.max": "400000 100000"}, 4),  # of a container that sees its own group alone
        (
            "5:memory:/a\n3:cpu,cpuacct:/docker/1",
            {"cpu/cpu.cfs_quota_us": "150000", "cpu/cpu.cfs_period_us": "50000"},
            3,
        ),
        (
            "1:cpu:/\n0::/x",
            {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"},
            float("inf"),
        ),
    ],
)
def test_the_quota_of_control_groups_is_the_smallest_on_the_way_up(
    membership, limits, cores, tmp_path
):
    (tmp_path / "membership").write_text(f"{membership}\n")
    for name, value in limits.items():
        path = tmp_path / "mount" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{value}\n")
    assert cpu_quota(tmp_path / "membership", tmp_path / "mount") == cores


def test_there_is_one_encoder_for_each_core_that_the_process_may_use(tmp_path):
    (tmp_path / "encoders").mkdir()
    clips = [Clip(str(n), "train", "text", Noted(tmp_path / "encoders")) for n in range(16)]
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        dataset = make_shards(clips, tmp_path / "shards", EncodeOptions(), {"name": "test"})
    finally:
        os.sched_setaffinity(0, cores)
    assert dataset["splits"]["train"]["clips"] == 16
    assert len([*(tmp_path / "encoders").iterdir()]) == 1
