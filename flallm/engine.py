"""Ranks and DeepSpeed's ZeRO. The only module that knows launchers, devices and DeepSpeed."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import platform
import re
import signal
import socket
import subprocess
import sys
import time
import uuid
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
from safetensors import safe_open

from flallm import UserError, first_line, usable_cpus
from flallm.config import Train
from flallm.loader import Batch
from flallm.model.translator import Translator

# What of a DeepSpeed config follows from the recipe or the plan. Parameters stay fp32, and train.precision=bf16 computes with autocast.
OURS = {
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping", "optimizer", "scheduler", "bf16", "fp16",
    "torch_autocast",
}  # fmt: skip
if not torch.cuda.is_available():  # before anything imports DeepSpeed, which would warn of it
    os.environ["DS_ACCELERATOR"] = "cpu"
# What tells a process which rank it is and where rank 0 is; of it, what Slurm says of a task.
LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
SLURM = {
    "RANK": "SLURM_PROCID",
    "LOCAL_RANK": "SLURM_LOCALID",
    "WORLD_SIZE": "SLURM_STEP_NUM_TASKS",
}
# Numbers of processes: launchers of MPI set no RANK, and each process would be a group of its own.
SIZES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
START = "start the ranks with torchrun, deepspeed, srun or slurm/*.sh"
JOINING = timedelta(hours=1)  # the longest wait for the others at the start; features have a day
AGAIN = 75  # exit code of a run that was asked to stop and has saved all: start it again (EX_TEMPFAIL)


@dataclass(frozen=True)
class Ranks:
    """This process among all: one process is one rank, one rank is one GPU where there are any."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0

    def gather(self, value) -> list:
        """The values of all ranks, in the order of ranks, on every rank."""
        values = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def sum(self, *values: float) -> list[float]:
        """Each value summed over ranks."""
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()


def join(timeout: float = 600) -> Ranks:
    """Joins the process group that torchrun, deepspeed or srun describes in the environment; alone: a group of one.

    timeout: seconds without an answer from the others after which a rank gives up.
    """
    env = os.environ
    _complete_environment()
    rank, world_size = int(env["RANK"]), int(env["WORLD_SIZE"])
    if torch.cuda.is_available():
        env.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # clips differ in length, and so do the blocks of every step
        # A run that goes on is to differ from one never stopped as little as kernels allow; this costs no time (docs/gpu.md).
        env.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # DeepSpeed calls what torch renames
    import deepspeed

    if hasattr(deepspeed.ops, "__compatible_ops__"):  # else every start on a CPU compiles it (79 s), and a killed build locks the next
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        # With --gpus-per-task Slurm shows a task its own GPU alone, which then has the number 0.
        device = torch.device("cuda", int(env["LOCAL_RANK"]) % torch.cuda.device_count())
        env["LOCAL_RANK"] = str(device.index)  # DeepSpeed takes it for the number of the GPU
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        _join_group(rank, world_size, device, timedelta(seconds=timeout))
    deepspeed.init_distributed(dist.get_backend(), verbose=False)  # takes the group that is there
    ranks = Ranks(rank, world_size, device)
    if device.type == "cpu":
        _share_cores(ranks)
    return ranks


def _complete_environment() -> None:
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
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout


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


def _join_group(rank: int, world_size: int, device: torch.device, timeout: timedelta) -> None:
    """Joins torch's process group. Raises UserError, or SystemExit after a line, if it cannot."""
    opened = store = _open_store(rank, min(timeout, JOINING))
    try:
        if _launcher_has_the_store():
            store = _store_of_this_start(store, rank, world_size, min(timeout, JOINING))
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=store,
            rank=rank,
            world_size=world_size,
            timeout=timeout,
            device_id=device if device.type == "cuda" and world_size > 1 else None,
        )
        opened.set_timeout(timeout)
    except RuntimeError as error:
        gloo = "gloo" in str(error)
        if not gloo and not isinstance(error, (dist.DistStoreError, dist.DistNetworkError)):
            raise
        hint = "; GLOO_SOCKET_IFNAME names the network interface that machines share" if gloo else ""
        _give_up(f"rank {rank} of {world_size} cannot join the others: {first_line(error)}{hint}")


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
        _give_up(
            f"rank {rank} does not reach rank 0 at {host}, port {port}, "
            f"within {timeout.total_seconds():g} s: rank 0 has not started, "
            "or MASTER_ADDR and MASTER_PORT are wrong"
        )


def _give_up(message: str) -> NoReturn:
    """No UserError: another try may do, on other nodes."""
    print(message, file=sys.stderr, flush=True)
    raise SystemExit(1)


def _launcher_has_the_store() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _store_of_this_start(
    store: dist.Store,
    rank: int,
    world_size: int,
    timeout: timedelta,
) -> dist.Store:
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


def _share_cores(ranks: Ranks) -> None:
    """Ranks that may run on the same cores share them, whatever launcher has started them."""
    machine, cores = platform.node(), os.sched_getaffinity(0)
    sharing = 0
    for other_machine, other_cores in ranks.gather((machine, cores)):
        sharing += machine == other_machine and not cores.isdisjoint(other_cores)
    torch.set_num_threads(usable_cpus(sharing))


def leave() -> None:
    """Ranks that end without this die with SIGABRT under gloo, after correct work."""
    if dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def last_words(ranks: Ranks) -> Iterator[None]:
    """Ranks tell each other why they end, so that each can name the one that ended first: the others only see a connection break
    or run into the time-out. A rank with nothing to say was killed or hangs."""
    try:
        yield
    except Exception as error:
        if ranks.world_size == 1:
            raise
        lost = not isinstance(error, UserError) and ("gloo" in str(error) or isinstance(error, dist.DistError) or "Connection" in type(error).__name__)
        mine = "" if lost else f"{type(error).__name__}: {error}"
        words = _exchange_last_words(ranks, mine)
        if isinstance(error, UserError) and mine in [said for rank, said in words.items() if rank < ranks.rank]:
            raise SystemExit(2) from None  # it is said
        if not lost:
            raise
        causes = [f"rank {rank}: {said}" for rank, said in words.items() if said] or [
            f"no word from rank {rank}: it was killed or hangs" for rank in range(ranks.world_size) if rank not in words
        ]
        print(f"rank {ranks.rank} ends because another did: {'; '.join(causes) or error}", file=sys.stderr, flush=True)
        raise SystemExit(1) from None


def _exchange_last_words(ranks: Ranks, said: str) -> dict[int, str]:
    """{rank: what it said} of those that say something within some seconds."""
    words = {ranks.rank: said}
    with contextlib.suppress(RuntimeError):  # rank 0 keeps them; without it there are none
        store = dist.PrefixStore("last words", dist.distributed_c10d._get_default_store())
        store.set(str(ranks.rank), said)
        for _ in range(25):  # even one who has all waits: the others may not have read yet
            time.sleep(0.2)
            words |= {r: store.get(str(r)).decode() for r in range(ranks.world_size) if r not in words and store.check([str(r)])}
    return words


def rendezvous() -> dict[str, str]:
    """An address on this machine for a group that starts here."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(s.getsockname()[1])}


def launch(function: Callable, world_size: int, *args) -> None:
    """Runs `function(*args)` on `world_size` ranks of this machine; the first to fail ends all."""
    if torch.cuda.is_available() and world_size > torch.cuda.device_count():
        have = torch.cuda.device_count()
        raise UserError(f"{world_size} ranks need a GPU each, and this machine has {have}")
    where = rendezvous()
    torch.multiprocessing.spawn(_run_rank, (function, world_size, where, args), world_size)


def _run_rank(rank: int, function: Callable, world_size: int, where: dict[str, str], args: tuple) -> None:
    os.environ.update(where, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size))
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"  # should this be below a torchrun
    try:
        function(*args)
    finally:
        leave()


def computes_in_bf16(config: Train, kind: str) -> bool:
    """Whether the recipe says so and a device of that kind, cpu or cuda, is fit for it. A CPU without instructions for it takes 40 times
    as long as for fp32 (matrices of 512 x 512, AVX2 alone)."""
    return config.precision == "bf16" and (kind == "cuda" or getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)())


def precision(config: Train, device: torch.device) -> torch.autocast:
    """The context in which a model computes outside training."""
    return torch.autocast(device.type, torch.bfloat16, enabled=computes_in_bf16(config, device.type))


def parameter_groups(model: Translator, config: Train) -> list[dict]:
    """One group for each part that trains, with its own learning rate."""
    groups = []
    for part in ("encoder", "adapter", "language"):
        modules = [getattr(model, part)] + ([model.words] if part == "adapter" and hasattr(model, "words") else [])
        params = [p for module in modules for p in module.parameters() if p.requires_grad]
        if params:
            start = config.llm_start if model.one_pass and part != "encoder" else 0.0
            groups.append({"name": part, "params": params, "lr": getattr(config, f"lr_{part}"), "start": start})
    if model.one_pass:
        groups.append({"name": "first", "params": list(model.first.parameters()), "lr": config.lr_first, "start": 0.0})
    return groups


def start_engine(model: Translator, config: Train, ranks: Ranks):
    """A DeepSpeed engine around the model, from a file of ds_configs/ with the batch arithmetic filled in."""
    import deepspeed

    groups, fused = parameter_groups(model, config), ranks.device.type == "cuda"
    if config.optimizer == "sgd":
        optimizer = torch.optim.SGD(groups, momentum=config.momentum, weight_decay=config.weight_decay, fused=fused)
    else:  # a torch object: naming AdamW in the JSON would compile DeepSpeed's own
        optimizer = torch.optim.AdamW(groups, betas=config.betas, weight_decay=config.weight_decay, fused=fused)
    settings = deepspeed_config(config, ranks.device.type) | {
        # The plan deals in clips; to DeepSpeed a micro-batch on a rank is one unit.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": config.micro_batches,
        "gradient_clipping": config.max_grad_norm,
    }
    if computes_in_bf16(config, ranks.device.type):  # fp32 parameters; bf16 ones would cast them but not BatchNorm's buffers
        settings["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)
    return engine


@contextlib.contextmanager
def whole(engine) -> Iterator[None]:
    """Every rank has the model of the checkpoint, and it computes on each of them by itself: all weights, which ZeRO-3 brings together here, and
    rank 0's statistics where BatchNorm's are each rank's own. All ranks enter together."""
    moving = moving_statistics(engine.module)
    own = [t.clone() for t in moving]
    for tensor in moving:
        dist.broadcast(tensor, 0)
    try:
        if engine.zero_optimization_stage() < 3:
            yield
        else:
            from deepspeed.runtime.zero.stage3 import unwrap_model_for_generation

            with unwrap_model_for_generation(engine):
                yield
    finally:
        for tensor, value in zip(moving, own):
            tensor.copy_(value)


def optimizer_pieces(engine) -> dict[str, torch.Tensor]:
    """This rank's share of the optimiser's state, in a form that does not depend on the number of ranks: "exp_avg|<parameter>|<offset>"
    is a stretch of that parameter's values, laid out flat, and "step|<group>" a number that a group has once."""
    pieces = {}
    for group, flat, parameters in _partitions(engine):
        for key, value in engine.optimizer.state[flat].items():
            if value.shape == flat.shape:
                pieces |= {f"{key}|{name}|{at.start}": value[here.start : here.start + at.numel] for name, at, here in parameters}
            else:
                pieces[f"{key}|{group}"] = value
    return pieces


def load_optimizer_pieces(engine, files: list[Path]) -> None:
    """Puts this rank's share together from the files of any number of ranks, whose tensors are called "optimizer|<piece>"."""
    with contextlib.ExitStack() as stack:
        pieces = defaultdict(list)  # (key, parameter or group) -> (offset, where it lies)
        for file in [stack.enter_context(safe_open(path, "pt")) for path in files]:
            for name in file.keys():  # noqa: SIM118 - it is no dict
                kind, _, piece = name.partition("|")
                if kind == "optimizer":
                    key, owner, *offset = piece.split("|")
                    pieces[key, owner].append((int(offset[0]) if offset else None, file, name))
        keys = {key for key, _ in pieces}
        for group, flat, parameters in _partitions(engine):
            state = engine.optimizer.state[flat]
            for key in keys:
                if (key, group) in pieces:
                    _, file, name = pieces[key, group][0]
                    state[key] = file.get_tensor(name).to(flat.device if engine.optimizer.optimizer.defaults.get("fused") else "cpu")
                    continue
                state[key] = torch.zeros_like(flat, requires_grad=False)
                for parameter, at, here in parameters:
                    missing = at.numel
                    for offset, file, name in pieces[key, parameter]:
                        stretch = file.get_slice(name)
                        first, last = max(at.start, offset), min(at.start + at.numel, offset + stretch.get_shape()[0])
                        if first < last:
                            values = stretch[first - offset : last - offset]
                            state[key][here.start + first - at.start : here.start + last - at.start] = values.to(flat.device)
                            missing -= last - first
                    if missing:
                        raise UserError(f"{files[0].parent} does not fit the recipe: it lacks {key} of {parameter}")


def begin_anew(engine, groups: tuple[str, ...]) -> None:
    """Takes AdamW's count of steps back to 0 in these groups, which have had no gradient so far: it would leave their first moments uncorrected."""
    for group, flat, _ in _partitions(engine):
        if group in groups and "step" in engine.optimizer.state[flat]:
            engine.optimizer.state[flat]["step"].zero_()


def _partitions(engine) -> Iterator[tuple[str, torch.Tensor, list[tuple]]]:
    """(name, this rank's flat share, [(parameter, where in the parameter, where in the share)]) of each group; under ZeRO-3 of each part of one."""
    names = {id(p): name for name, p in engine.module.named_parameters()}
    zero = engine.optimizer
    if engine.zero_optimization_stage() == 3:  # each rank has a share of every parameter; the last ranks' may end in padding
        from deepspeed.utils.tensor_fragment import fragment_address

        for part, (flat, parameters) in enumerate(zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups)):
            mapped = []
            for p in parameters:
                _, offset, size = zero.grad_position[zero.get_param_id(p)]
                start = dist.get_rank() * size
                here = max(0, min(size, p.ds_numel - start))
                mapped.append((names[id(p)], fragment_address(here, start), fragment_address(here, offset)))
            yield zero.param_groups[zero.sub_group_to_group_id[part]]["name"], flat, [m for m in mapped if m[1].numel]
        return
    for group, flat, parameters in zip(zero.param_groups, zero.single_partition_of_fp32_groups, zero.bit16_groups):
        mapped = [(names[id(p)], p._hp_mapping) for p in parameters if p._hp_mapping is not None]
        yield group["name"], flat, [(name, m.lp_fragment_address, m.hp_fragment_address) for name, m in mapped]


def deepspeed_config(config: Train, device: str) -> dict:
    """The content of the recipe's file for cuda or cpu, with the overrides put in."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    here = Path(__file__).parent
    folder = next(f for f in (here / "ds_configs", here.parent / "ds_configs") if f.is_dir())  # installed, or in the repo
    path = Path(config.deepspeed) if config.deepspeed else folder / ("zero2.json" if device == "cuda" else "zero2_cpu.json")
    if not path.exists() and path.parent.name in ("", "ds_configs"):  # ours, by its name, from any working folder
        path = folder / path.name
    try:
        settings = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"train.deepspeed: {path} cannot be read as JSON: {error}") from None
    if not isinstance(settings, dict) or not isinstance(settings.get("zero_optimization", {}), dict):
        raise UserError(f"train.deepspeed: {path} holds no settings of DeepSpeed: an object with sections such as zero_optimization was expected")
    for name, value in config.deepspeed_overrides.items():
        if name not in settings:
            raise UserError(f"train.deepspeed_overrides: {path} has no field {name!r} but {', '.join(settings)}")
        if isinstance(settings[name], dict) is not isinstance(value, dict):
            raise UserError(f"train.deepspeed_overrides: {name} is {settings[name]} in {path} and cannot be {value}")
        settings[name] = settings[name] | value if isinstance(value, dict) else value
    if ours := settings.keys() & OURS:
        raise UserError(f"train.deepspeed: {', '.join(sorted(ours))} in {path} would be filled in from the recipe: leave it out of the file")
    try:
        stage = DeepSpeedZeroConfig(**settings.get("zero_optimization", {})).stage
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"train.deepspeed: zero_optimization.{'.'.join(map(str, first['loc']))} in {path}: {first['msg']}") from None
    if stage not in (1, 2, 3):
        raise UserError(f"train.deepspeed: zero_optimization.stage is {stage} in {path}; 1, 2 and 3 are supported")
    return settings


def on_the_way(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """The batches, each sent to the GPU while the step before it is computed: by a thread of its own, for a copy out of memory that is
    not pinned holds up who asks for it, and on a stream of its own."""
    with contextlib.closing(batches):
        if device.type == "cpu":
            yield from batches
            return
        stream = torch.cuda.Stream(device)

        def send() -> Batch | None:
            if batch := next(batches, None):
                with torch.cuda.stream(stream):
                    batch = batch.to(device)
                stream.synchronize()
            return batch

        with ThreadPoolExecutor(1) as sender:
            coming = sender.submit(send)
            while batch := coming.result():
                coming = sender.submit(send)
                for tensor in (batch.frames, batch.labels):
                    tensor.record_stream(torch.cuda.current_stream())
                yield batch


def set_learning_rates(engine, config: Train, factor: Callable[[float], float]) -> dict[str, float]:
    """The rates of the groups by their names. factor: what those of a group are multiplied by that begins to learn after a share of the steps."""
    for group in engine.optimizer.param_groups:
        group["lr"] = factor(group["start"]) * getattr(config, f"lr_{group['name']}")
    return {group["name"]: group["lr"] for group in engine.optimizer.param_groups}


@dataclass(frozen=True)
class Step:
    """What an optimiser step gave. loss, tokens: this rank's sum over its target tokens, and their number; applied: whether the
    weights were changed, on every rank the same; flags: those given to `train_step`, summed over ranks."""

    loss: float
    tokens: float
    mean: float  # loss of a token over all ranks; only known where `most` is given
    applied: bool
    flags: list[float]
    seconds: float  # that this rank computed without waiting for others, as far as can be told: the forward passes
    norms: dict[str, float]  # see `layer_norms`; only where they are asked for


def train_step(engine, batches: list[Batch], ranks: Ranks, *flags: float, most: float | None = None, norms: bool = False) -> Step:
    """One optimiser step on this rank's micro-batches.

    The gradient is that of the mean over all target tokens of the step, wherever they are: DeepSpeed averages over
    ranks and micro-batches, so every sum of losses is multiplied by their number and divided by all tokens. A step whose
    gradient is not finite on some rank is left out on all of them, and leaves no trace; so is one whose loss of a token is over `most`, and
    one without a token on any rank, because none of its clips could be read.
    """
    tokens, moving = sum(batch.tokens for batch in batches), moving_statistics(engine.module)
    before = [t.clone() for t in moving]
    all_tokens, *flags = ranks.sum(tokens, *flags)
    if not all_tokens:
        return Step(0.0, 0, math.nan, False, flags, 0.0, {})
    factor = ranks.world_size * len(batches) / all_tokens
    total, seconds, mean, found = 0.0, 0.0, math.nan, {}
    for number, batch in enumerate(batches, 1):
        began = time.monotonic()
        objective, loss = engine(batch.to(ranks.device))
        seconds += time.monotonic() - began
        total += loss
        if most is not None and number == len(batches):
            mean = ranks.sum(total)[0] / all_tokens
            if mean > most:
                factor = math.nan  # and so every rank leaves the step out
        engine.backward(objective * factor)
        if norms and number == len(batches):
            found = layer_norms(engine, ranks)
        engine.step()
    applied = not engine.optimizer.overflow
    if not applied:
        for tensor, value in zip(moving, before):
            tensor.copy_(value)
    return Step(float(total), tokens, mean, applied, flags, seconds, found)


def layer_norms(engine, ranks: Ranks) -> dict[str, float]:
    """Norms of gradient and parameters of the last layer of the encoder and of the language model, between backward and step: the paper's
    analysis of which of the two dominates (Fig. 2). Under ZeRO each rank holds a share of both, so it is their squares that are added up."""
    from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_grad

    layers = engine.module.last_layers()
    squares = []
    for layer in layers.values():
        trained = [p for p in layer.parameters() if p.requires_grad]
        if engine.zero_optimization_stage() == 3:
            shares = [(safe_get_local_grad(p), safe_get_local_fp32_param(p), p.ds_numel - ranks.rank * p.partition_numel()) for p in trained]
            shares = [(grad[: max(0, left)], value[: max(0, left)]) for grad, value, left in shares]  # without padding
        else:
            mapped = [(p._hp_mapping, p._index_in_param_group) for p in trained if p._hp_mapping is not None]
            shares = [(m.get_lp_grad_fragment(i), m.get_hp_fragment()) for m, i in mapped]
        squares += [sum(float(share[kind].detach().double().square().sum()) for share in shares) for kind in (0, 1)]
    names = [f"{what}_norm/{part}" for part in layers for what in ("grad", "param")]
    return {name: math.sqrt(square) for name, square in zip(names, ranks.sum(*squares))}


def moving_statistics(model: torch.nn.Module) -> list[torch.Tensor]:
    """What a forward pass in training changes: the buffers of BatchNorms that train."""
    norms = [m for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm) and m.training]
    return [t for m in norms for t in m.buffers(recurse=False)]


class Asked:
    """Whether SIGTERM or SIGUSR1 has asked this process to stop. SIGTERM to all processes ends decoding workers: their clips are decoded again."""

    def __init__(self):
        self.stop = False

    def __enter__(self) -> Asked:
        self.before = {number: signal.signal(number, self._hear) for number in (signal.SIGTERM, signal.SIGUSR1)}
        return self

    def _hear(self, *_) -> None:
        self.stop = True

    def __exit__(self, _, error, __) -> None:
        # A launcher ends all ranks once the first has left with a code other than 0; those a moment behind are to leave with theirs.
        again = isinstance(error, SystemExit) and error.code == AGAIN
        for number, handler in self.before.items():
            signal.signal(number, signal.SIG_IGN if again else handler)
