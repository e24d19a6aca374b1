"""Where the ranks of a launcher meet: torchrun, deepspeed, srun or one process alone."""

from __future__ import annotations

import os
import platform
import re
import socket
import subprocess
import sys
import time
import uuid
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist

from flallm.utils import UserError, first_line

# What tells a process which rank it is and where rank 0 is; of it, what Slurm says of a task.
LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
SLURM = {
    "RANK": "SLURM_PROCID",
    "LOCAL_RANK": "SLURM_LOCALID",
    "WORLD_SIZE": "SLURM_STEP_NUM_TASKS",
}
# Numbers of processes: launchers of MPI set no RANK, and each process would be a group of its own.
SIZES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
# The longest wait for the other ranks at the start. `flallm features` waits a day for their work.
LONGEST_JOIN = timedelta(hours=1)
START = "start the ranks with torchrun, deepspeed, srun or slurm/*.sh"


def complete_environment() -> None:
    """Sets what torchrun would set, `LAUNCHED`, whoever started this process. Raises UserError."""
    env = os.environ
    tasks = env.get("SLURM_STEP_NUM_TASKS", "1")
    if "RANK" not in env and tasks != "1":  # one task alone may be a shell of `srun --pty`
        _read_slurm()
    if "RANK" not in env:
        for name in SIZES:
            if env.get(name, "1") != "1":
                hint = f"{START}, or set {', '.join(LAUNCHED)}"
                raise UserError(f"{name} is {env[name]} but RANK is not set: {hint}")
        # Port 0 is one that is free when it is opened. One asked for earlier can be taken by then.
        env.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", LOCAL_WORLD_SIZE="1")
        env.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    if missing := [name for name in LAUNCHED if name not in env]:
        raise UserError(f"RANK is set but {', '.join(missing)} is not: {START}")
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT"):
        if not env[name].isdecimal():
            raise UserError(f"{name}: {env[name]!r} is not a whole number: {START}")
    if int(env["RANK"]) >= int(env["WORLD_SIZE"]):
        raise UserError(f"RANK: {env['RANK']} is not below WORLD_SIZE {env['WORLD_SIZE']}: {START}")
    if int(env["MASTER_PORT"]) > 65535:
        raise UserError(f"MASTER_PORT: {env['MASTER_PORT']} is over 65535: set it to a free port")


def _read_slurm() -> None:
    """Sets `LAUNCHED` for a task of a Slurm step; an address or port that is set stays."""
    env = os.environ
    for name, source in SLURM.items():
        if source not in env:
            raise UserError(f"this task of a Slurm step has no {source}: set {name}, or {START}")
        env[name] = env[source]
    if "MASTER_ADDR" not in env:
        env["MASTER_ADDR"] = _slurm_address()
    if "MASTER_PORT" not in env:
        env["MASTER_PORT"] = _slurm_port()


def _slurm_address() -> str:
    """The address of the first node of this Slurm step, where rank 0 is. Raises UserError."""
    env = os.environ
    if address := _slurm_node_address(env.get("SLURM_STEP_NODELIST", "")):
        return address
    # As in a container. It is where srun was called: in a batch script that is the first node.
    launched_from = env.get("SLURM_LAUNCH_NODE_IPADDR")
    if not launched_from:
        lacks = "this Slurm step has neither scontrol nor SLURM_LAUNCH_NODE_IPADDR"
        raise UserError(f"{lacks}: set MASTER_ADDR to the address of its first node")
    if env["RANK"] == "0" and not _is_of_this_machine(launched_from):
        first = platform.node()
        elsewhere = f"srun was called on {launched_from}, but rank 0 is on {first}"
        raise UserError(f"{elsewhere}: set MASTER_ADDR to the address of {first}")
    return launched_from


def _slurm_node_address(nodes: str) -> str | None:
    """The address of the first of these nodes as Slurm itself calls it, which names need not be.
    None where scontrol is not there or does not answer."""
    try:
        names = _scontrol("hostnames", nodes).split()
        return re.search(r"NodeAddr=(\S+)", _scontrol("node", names[0]))[1]
    except (OSError, subprocess.SubprocessError, IndexError, TypeError):
        return None


def _scontrol(*words: str) -> str:
    command = ["scontrol", "show", *words]
    return subprocess.run(
        command, check=True, capture_output=True, encoding="utf-8", errors="replace", timeout=60
    ).stdout


def _is_of_this_machine(address: str) -> bool:
    try:
        family, kind, _, _, place = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as s:
            s.bind(place)
        return True
    except OSError:
        return False


def _slurm_port() -> str:
    """A port that two steps do not share, below those that the kernel gives to connections."""
    numbers = [os.environ.get(name, "") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID")]
    if not all(number.isdecimal() for number in numbers):
        lacks = "this Slurm step has no SLURM_JOB_ID and SLURM_STEP_ID"
        raise UserError(f"{lacks}: set MASTER_PORT to a free port")
    job, step = map(int, numbers)
    return str(20000 + (job + 7919 * step) % 12000)


def join_group(rank: int, world_size: int, device: torch.device, timeout: timedelta) -> None:
    """Joins torch's process group. Raises UserError, or SystemExit after a line, if it cannot."""
    store = _open_store(rank, min(timeout, LONGEST_JOIN))
    try:
        if _launcher_has_the_store():
            store = _store_of_this_start(store, rank, world_size, min(timeout, LONGEST_JOIN))
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=store,
            rank=rank,
            world_size=world_size,
            timeout=timeout,
            device_id=device if device.type == "cuda" and world_size > 1 else None,
        )
    except RuntimeError as error:
        gloo = "gloo" in str(error)
        if not gloo and not isinstance(error, (dist.DistStoreError, dist.DistNetworkError)):
            raise
        hint = (
            "; GLOO_SOCKET_IFNAME names the network interface that machines share" if gloo else ""
        )
        exit_with(f"rank {rank} of {world_size} cannot join the others: {first_line(error)}{hint}")


def _open_store(rank: int, timeout: timedelta) -> dist.TCPStore:
    """Where ranks find each other: rank 0 opens it at MASTER_ADDR:MASTER_PORT, or torchrun has."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        socket.getaddrinfo(host, port)
    except OSError as error:
        unknown = f"MASTER_ADDR: {platform.node()} does not know {host!r} ({error.strerror})"
        raise UserError(f"{unknown}: set it to the address of rank 0's machine") from None
    opens = rank == 0 and not _launcher_has_the_store()
    try:
        return dist.TCPStore(host, port, is_master=opens, timeout=timeout, multi_tenant=True)
    except dist.DistNetworkError as error:
        if "failed to listen" in str(error):
            why = first_line(error).rpartition("message: ")[2]
            refused = f"MASTER_PORT: rank 0 cannot open port {port} on {platform.node()} ({why})"
            raise UserError(f"{refused}: set it to a free port, the same for all ranks") from None
        exit_with(
            f"rank {rank} does not reach rank 0 at {host}, port {port}, "
            f"within {timeout.total_seconds():g} s: rank 0 has not started, "
            "or MASTER_ADDR and MASTER_PORT are wrong"
        )


def exit_with(message: str) -> NoReturn:
    """No UserError: another try may do, on other nodes."""
    print(message, file=sys.stderr, flush=True)
    raise SystemExit(1)


def _launcher_has_the_store() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _store_of_this_start(
    store: dist.Storage,
    rank: int,
    world_size: int,
    timeout: timedelta,
) -> dist.Storage:
    """The part of torchrun's store that only the ranks of this start know.

    `torchrun --max-restarts` keeps its store, and in it the addresses of ranks that are dead.
    TORCHELASTIC_RESTART_COUNT does not tell one start from another: each node counts its own. So
    rank 0 draws a name for this start. Each other rank asks for it under a name that it has drawn,
    which no rank of an earlier start has.
    """
    own = uuid.uuid4().hex
    if rank > 0:
        store.set(f"flallm/asks/{rank}", own)
        start = store.get(f"flallm/start of/{own}").decode()
        store.set(f"flallm/{start}/{rank}", "knows")
        return dist.PrefixStore(f"flallm/{start}", store)
    end = time.monotonic() + timeout.total_seconds()
    while missing := [r for r in range(1, world_size) if not store.check([f"flallm/{own}/{r}"])]:
        for other in missing:
            if store.check([f"flallm/asks/{other}"]):  # of this start or of an earlier one
                asks = store.get(f"flallm/asks/{other}").decode()
                store.set(f"flallm/start of/{asks}", own)
        if time.monotonic() > end:
            raise dist.DistStoreError(f"no word from rank {', '.join(map(str, missing))}")
        time.sleep(0.05)
    return dist.PrefixStore(f"flallm/{own}", store)


def rendezvous() -> dict[str, str]:
    """An address on this machine for a group that starts here."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(s.getsockname()[1])}
