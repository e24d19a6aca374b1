"""The recipe: dataclasses <- YAML <- `--a.b=c`; every error names the field.

A recipe file holds the sections below, and under `stage1`, `stage2` and `joint` what differs between these: the fields of
`Train`. A run is one of the three, so `load` puts that section in as `train`, and overrides say `--train.lr_encoder=1e-3`
whatever the stage. The sources of the defaults are in the recipes and in the comments here: [P] the paper, [I] the nearest
published practice where the paper is silent (GFSLT-VLP, MMTLB).
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import json
import math
import os
import re
import types
import typing
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path

import yaml

from flallm.utils import UserError, visible_files

STAGES = ("stage1", "stage2", "joint")
CHOICES = {
    "convention": ("raw", "13a", "csl-daily", "zh", "lower"),  # metrics.CONVENTIONS, which take seconds to import
    "train.optimizer": ("sgd", "adamw"),
    "train.precision": ("bf16", "fp32"),
    "train.frozen": ("nothing", "backbone", "encoder", None),
    "llm.input": ("signs", "frames", "light_t", "words"),
}
AT_LEAST_1 = {  # every other number is 0 at the least, but those of SIGNED
    "data.resize", "data.crop", "data.stride", "data.max_frames", "data.prefetch_mib", "encoder.stem", "encoder.widths", "encoder.depths",
    "encoder.channels", "encoder.kernel", "light_t.layers", "light_t.heads", "light_t.width", "light_t.ffn", "llm.stack", "train.steps", "train.batch",
    "train.micro_batches", "train.pool", "train.log_every", "train.max_skipped", "train.timeout", "checkpoint.last", "checkpoint.best", "decode.beam",
    "decode.max_tokens", "decode.batch",
}  # fmt: skip
SIGNED = {"llm.lora.alpha", "decode.length_penalty"}
SHARES = ("train.warmup", "train.label_smoothing", "light_t.dropout", "llm.dropout")  # from 0 to below 1
DATE = "tag:yaml.org,2002:timestamp"
# Fields that earlier versions had, with the values at which they did nothing.
REMOVED = {"train.one_pass": False, "train.lr_first": 1e-2, "train.llm_start": 0.0, "train.mask_frames": 0, "train.mask_channels": 0}
READ_AS_OTHER = ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:int", "tag:yaml.org,2002:float", DATE)  # what YAML can take a text without quotes for
VIDEO_PLACEHOLDER = "{video}"  # where the features stand in a prompt


@dataclass
class Augment:
    """What is drawn once a clip in training. Source: GFSLT-VLP, [I] of flallm/config.py; never a horizontal flip (hands have sides)."""

    probability: float = 0.5  # of each of the three
    rotate: float = 30  # degrees, either way
    scale: float = 0.2  # share, either way
    translate: float = 10  # pixels of a 256-pixel frame, either way


@dataclass
class Data:
    shards: str = ""  # the folder tools/make_shards.py wrote
    resize: int = 256  # [I] frames are squeezed to a square of this many pixels …
    crop: int = 224  # [P] … and cropped to this, at random in training, in the middle otherwise
    stride: int = 4  # [P] every 4th frame: T/4
    max_frames: int = 300  # [I] of the source; longer clips are thinned out evenly
    fps: float = 0.0  # that make_shards.py --fps brought the clips to, and translate brings videos to; 0: none. A run takes it from its shards
    augment: Augment = field(default_factory=Augment)
    workers: int = 4  # decoding processes a rank
    prefetch_mib: int = 512  # how much a rank decodes ahead
    cache: str = ""  # a local folder that keeps what was read of shards at an address such as s3://bucket/shards
    cache_gib: float = 100.0  # its largest size


@dataclass
class Encoder:
    stem: int = 64  # [P] ResNet18
    widths: tuple[int, ...] = (64, 128, 256, 512)
    depths: tuple[int, ...] = (2, 2, 2, 2)
    weights: str | None = None  # torchvision's ResNet18 checkpoint (.pth or .safetensors); [P] ImageNet weights
    channels: int = 1024  # [I] C, the width of the sign-wise features
    kernel: int = 5  # [I] of the temporal convolution
    global_batch_norm: bool = True  # statistics of the global batch; false: of each rank's own, faster


@dataclass
class LightT:
    layers: int = 3  # [P] encoder and decoder layers each: Table 7, "base"
    heads: int = 8
    width: int = 512
    ffn: int = 2048
    dropout: float = 0.1


@dataclass
class LoRA:
    """Low-rank updates of a frozen language model (Hu et al. 2021)."""

    rank: int = 0  # 0: none, the model itself trains
    alpha: float = 32.0  # the updates are multiplied by alpha / rank
    dropout: float = 0.05
    targets: tuple[str, ...] = ("q_proj", "v_proj")  # modules by the end of their names; all-linear: every linear one


@dataclass
class LLM:
    path: str = "facebook/mbart-large-cc25"  # [P] a folder or hub name in Hugging Face layout; its tokenizer serves stage 1 too
    language: str | None = None  # target language code of a multilingual model, such as de_DE
    prompt: str = VIDEO_PLACEHOLDER  # the text around the features, special tokens included
    stack: int = 1  # neighbouring features that are put together into one
    dropout: float = 0.3  # [I] of mBART and T5; decoder-only models have none but LoRA's
    lora: LoRA = field(default_factory=LoRA)
    train_embeddings: bool | None = None  # those of words, and the head; none: as the other weights, with LoRA not
    gradient_checkpointing: bool = False  # a layer's activations are computed again in the backward pass: memory for time
    # What it reads in stage 2: signs (sign-wise features) | frames (the backbone's) | light_t (hidden states of Light-T's encoder) | words (of sign-wise
    # features the words that stage 1's train.word_loss sees in them)
    input: str = "signs"
    random: bool = False  # the model's shape with random weights in place of the pre-trained ones


@dataclass
class Train:
    epochs: float = 75
    steps: int | None = None  # instead of epochs
    batch: int = 8  # clips a step over all ranks
    batch_frames: int = 0  # used frames a step over all ranks at most, which bounds memory; 0: no limit
    pool: int = 1  # steps whose clips are sorted by length together; 2: steps of short clips and steps of long ones
    micro_batches: int = 1  # forward and backward passes a step on each rank
    optimizer: str = "sgd"  # sgd | adamw
    lr_encoder: float = 1e-2
    lr_adapter: float = 1e-2
    lr_language: float = 1e-2
    momentum: float = 0.9  # of sgd
    betas: tuple[float, ...] = (0.9, 0.998)  # of adamw
    weight_decay: float = 1e-3
    warmup: float = 0.0  # share of the steps in which the rates rise from 0; then a cosine falls to 0
    max_grad_norm: float = 1.0  # a gradient with a larger one is scaled down to it
    label_smoothing: float = 0.2  # [P]
    word_loss: float = 0.0  # weight of a loss that ties frames to words, see Translator; not in the paper, 0 leaves it out
    frozen: str | None = None  # nothing | backbone | encoder (that is backbone and temporal module); none: the encoder in stage 2, else nothing
    precision: str = "bf16"  # bf16 (autocast, parameters stay fp32) | fp32
    deepspeed: str | None = None  # a DeepSpeed JSON file; none: ds_configs/zero2.json, without a GPU zero2_cpu.json
    deepspeed_overrides: dict = field(default_factory=dict)  # fields of that file, as in {zero_optimization: {reduce_bucket_size: 2e8}}
    log_every: int = 50  # steps
    dev_every: int = 0  # steps between looks at the dev split; 0: once an epoch
    dev_clips: int = 0  # how many clips of it; 0: all
    spike: float = 0.0  # a step whose loss is over this many times the running mean is left out; 0: none is
    max_skipped: int = 10  # steps in a row left out, for this or for a gradient that is not finite, that end a run
    timeout: float = 600  # seconds without an answer from the other ranks that end a run


@dataclass
class Checkpoint:
    """When one is written besides those at looks at the dev split and at the end, and which are kept."""

    every: int = 0  # steps; 0: by the clock alone
    minutes: float = 15  # since the one before; 0: by steps alone
    last: int = 2  # the newest ones; of two, one is left should the other be damaged
    best: int = 1  # by the leading dev score, BLEU-4 where sentences have four words
    every_nth: int = 0  # those of steps divisible by this, for good; 0: none


@dataclass
class Decode:
    beam: int = 5  # [P]
    max_tokens: int = 100
    length_penalty: float = 1.0
    batch: int = 16  # clips decoded together


@dataclass
class Config:
    name: str = ""
    stage: str = "stage1"
    seed: int = 0
    convention: str = "raw"  # scoring convention that leads
    data: Data = field(default_factory=Data)
    encoder: Encoder = field(default_factory=Encoder)
    light_t: LightT = field(default_factory=LightT)
    llm: LLM = field(default_factory=LLM)
    train: Train = field(default_factory=Train)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    decode: Decode = field(default_factory=Decode)

    @property
    def frozen(self) -> str:
        """What of the encoder does not train: nothing, backbone or encoder."""
        return self.train.frozen or ("encoder" if self.stage == "stage2" else "nothing")


def load(recipe: str, stage: str, overrides: dict[str, object] | None = None) -> Config:
    """The config of one stage of a recipe: a built-in name or the path of a YAML file, which may hold no more than what differs from its `base`."""
    path, sections = _sections(recipe, Path())
    train = {name: _coerce(sections.pop(name, {}), Train, f"{path}: {name}") for name in STAGES}
    config = from_dict(Config, {**sections, "stage": stage}, str(path))
    config.train = train[stage]
    return override(config, overrides or {})


def _sections(recipe: str, beside: Path, above: tuple[Path, ...] = ()) -> tuple[Path, dict]:
    """(a recipe's file, its sections; where it names a `base`, another recipe, these are that one's with its own fields put in). beside: the folder of the
    file that names it; above: those that led here."""
    builtin = {file.stem: file for file in visible_files(Path(__file__).parent / "recipes", "*.yaml")}
    path = builtin.get(recipe, beside / recipe)
    if not os.path.isfile(path):  # which takes a name that is too long for false
        raise UserError("".join(f"{file}: base: " for file in above[-1:]) + f"no recipe {recipe!r}: name a YAML file or one of {', '.join(builtin)}")
    if path.resolve() in above:
        raise UserError(f"{path}: its base leads back to itself")
    sections = read_yaml(path)
    based, base = "base" in sections, sections.pop("base", None)
    if wrong := next((name for name in ("train", "stage") if name in sections), None):
        raise UserError(f"{path}: `{wrong}:` is what a run's config.yaml has; in a recipe stage1, stage2 and joint are sections of their own")
    for name, section in sections.items():  # so that a mistake is said of this file, in whatever stage it is
        if name in STAGES:
            _coerce(section, Train, f"{path}: {name}")
        else:
            from_dict(Config, {name: section}, str(path))
    if based:
        below = _sections(_coerce(base, str, f"{path}: base"), path.parent, (*above, path.resolve()))[1]
        for name in STAGES:
            if "epochs" in sections.get(name, {}):  # not the steps of the other
                below.get(name, {}).pop("steps", None)
        sections = _merged(below | {"name": ""}, sections)  # one without a name of its own is not the other
    return path, sections


def _merged(below: dict, own: dict) -> dict:
    return below | {
        name: _merged(below[name], value) if isinstance(value, dict) and isinstance(below.get(name), dict) else value for name, value in own.items()
    }


class _Loader(yaml.SafeLoader):
    """Refuses a key that is there twice, of which YAML's readers silently drop the first."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():  # what else is tagged as a mapping, the reader itself refuses
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is there twice", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_constructor(DATE, lambda loader, node: node.value)  # no field is a date


def read_run(run: Path, shards: str = "") -> dict:
    """The config.yaml of a run folder, without fields that were removed since it was begun.

    shards: where its shards lie now, if not where it says. Raises UserError for a run that made use of a removed field.
    """
    path = run / "config.yaml"
    if not os.path.isfile(path):
        raise UserError(f"{run} is no run folder (no config.yaml): name the --run_dir of a stage1, stage2 or joint command")
    sections = read_yaml(path)
    for name, default in REMOVED.items():
        section, field = name.split(".")
        fields = sections.get(section)
        value = fields.pop(field, default) if isinstance(fields, dict) else default
        if value != default and name != "train.lr_first":
            raise UserError(f"{run} was trained with {name}={value}, which this version no longer has")
    if shards:
        data = sections.get("data")
        sections["data"] = (data if isinstance(data, dict) else {}) | {"shards": shards}
    return sections


def read_yaml(path: Path) -> dict:
    """The sections of a recipe, of a run's config.yaml, or of another file in YAML. Raises UserError where YAML gives a field of a recipe another value than is written."""
    try:
        loader = _Loader(path.read_text(encoding="utf-8"))
        node = loader.get_single_node()
        content = loader.construct_document(node) if node else None
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:  # ValueError: no UTF-8, or a number of thousands of digits
        raise UserError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no recipe: sections such as `data:` were expected")
    _check_mapping(loader, node, typing.get_type_hints(Config) | dict.fromkeys(STAGES, Train) | {"base": str}, str(path))
    return content


def _check_mapping(loader: _Loader, node: yaml.MappingNode, hints: dict, where: str, section: str = "") -> None:
    """where: the file; section: the dotted name of the mapping, with a dot at its end."""
    for key, value in node.value:
        if isinstance(key, yaml.ScalarNode) and key.value in hints:
            _check_field(loader, value, _kind(hints[key.value]), where, section + key.value)


def _check_field(loader: _Loader, node: yaml.Node, kind, where: str, name: str) -> None:
    """Raises UserError where a text without quotes is read as something else (no as false, 12:30 as 750), or a number as another one (010 as 8)."""
    if is_dataclass(kind) and isinstance(node, yaml.MappingNode):
        _check_mapping(loader, node, typing.get_type_hints(kind), where, f"{name}.")
    elif typing.get_origin(kind) is tuple:
        for item in node.value if isinstance(node, yaml.SequenceNode) else [node]:
            _check_field(loader, item, typing.get_args(kind)[0], where, name)
    elif isinstance(node, yaml.ScalarNode) and node.tag in READ_AS_OTHER:
        text, value = node.value, loader.construct_object(node)
        read_as = str(value)
        if isinstance(value, bool):
            read_as = read_as.lower()
        elif node.tag == DATE:
            read_as = "a date"
        if kind is str and (isinstance(value, bool) or read_as != text):
            raise UserError(f'{where}: {name}: YAML reads {text} as {read_as}; write it in quotes: {name.rpartition(".")[2]}: "{text}"')
        if kind in (int, float) and re.search(r":|^[-+]?0[0-7_]+$", text):
            raise UserError(f"{where}: {name}: YAML reads {text} as {read_as}; write the number that is meant, without a colon and without 0 before it")


def from_dict(cls, values: dict, where: str):
    """A dataclass from nested dicts. Raises UserError for unknown fields and wrong types."""
    hints, kwargs = typing.get_type_hints(cls), {}
    for name, value in values.items():
        if name not in hints:
            raise UserError(f"{where}: there is no field {name!r}{_suggest(str(name), hints)}")
        kwargs[name] = _coerce(value, hints[name], f"{where}: {name}")
    return cls(**kwargs)


def from_options(cls, options: dict[str, str]):
    """A flat dataclass from `--name=value`s."""
    hints = typing.get_type_hints(cls)
    for name in options:
        if name not in hints:
            raise UserError(f"unknown option --{name}{_suggest(name, hints, '--')}")
    return from_dict(cls, options, "options")


def override(config: Config, overrides: dict[str, object]) -> Config:
    """The config with `{"a.b": value}` put in. Epochs take the place of steps that it has."""
    if "train.epochs" in overrides and "train.steps" not in overrides:
        overrides = overrides | {"train.steps": None}
    config = copy.deepcopy(config)
    known = [name for name in flat(config) if name != "stage"]
    for name, value in overrides.items():
        if within := next((k for k in known if name.startswith(k + ".") and isinstance(flat(config)[k], dict)), None):
            _put(flat(config)[within], name[len(within) + 1 :].split("."), value)
            continue
        if name not in known:
            raise UserError(f"unknown option --{name}{_suggest(name, known, '--')}")
        *parents, leaf = name.split(".")
        target = config
        for parent in parents:
            target = getattr(target, parent)
        setattr(target, leaf, _coerce(value, typing.get_type_hints(type(target))[leaf], f"--{name}"))
    values, encoder, light, llm, train = flat(config), config.encoder, config.light_t, config.llm, config.train
    for name, choices in CHOICES.items():
        if values[name] not in choices:
            raise UserError(f"{name}: {values[name]!r} is none of {', '.join(map(str, choices))}")
    for name, value in values.items():
        if name in SHARES and not 0 <= value < 1:
            raise UserError(f"{name}: {value} is no share from 0 to below 1")
        least = 1 if name in AT_LEAST_1 else -math.inf if name in SIGNED else 0
        if below := [n for n in (value if isinstance(value, tuple) else (value,)) if isinstance(n, int | float) and n < least]:
            raise UserError(f"{name}: {below[0]} is less than {least}")
    betas, endless = train.betas, train.steps is None and train.epochs == math.inf
    for wrong, said in (
        (config.seed >= 2**32, f"seed: {config.seed} is not below {2**32}"),
        ("/" in config.name, f"name: {config.name!r} is to be a folder's name, without /"),
        (len(betas) != 2 or max(betas) >= 1, f"train.betas: {', '.join(map(str, betas))}: two numbers from 0 to below 1 are needed"),
        (not encoder.widths, "encoder.widths: one is needed at least"),
        (len(encoder.widths) != len(encoder.depths), f"encoder.depths: {len(encoder.depths)} of them for {len(encoder.widths)} encoder.widths"),
        (light.width % light.heads, f"light_t.heads: {light.heads} heads cannot share a light_t.width of {light.width}"),
        (config.stage == "joint" and llm.input != "signs", f"llm.input: {llm.input} is for stage 2, joint trains on signs"),
        (llm.input == "words" and llm.stack > 1, f"llm.stack: {llm.stack} features are put together into one, llm.input=words gives each its own words"),
        (config.data.crop > config.data.resize, f"data.crop: {config.data.crop} is larger than data.resize, {config.data.resize}"),
        (llm.prompt.count(VIDEO_PLACEHOLDER) != 1, f"llm.prompt: {llm.prompt!r} must hold {VIDEO_PLACEHOLDER} once, the place of the features"),
        (train.steps is None and not train.epochs, f"train.epochs: {train.epochs} is not more than 0"),
        (endless, "train.epochs: a run has to end"),
    ):
        if wrong:
            raise UserError(said)
    return config


def _put(section: dict, names: list[str], value: object) -> None:
    for name in names[:-1]:
        section = section.setdefault(name, {})
        if not isinstance(section, dict):
            raise UserError(f"{'.'.join(names)}: {name} is {section!r} and has no fields")
    with contextlib.suppress(TypeError, ValueError):  # what is no number and no true or false is text
        value = json.loads(value)
    section[names[-1]] = value


def flat(config, prefix: str = "") -> dict[str, object]:
    """{"a.b": value} of every field of a config, or of the dicts in a run's config.yaml: one of an older version may have other fields."""
    out, yaml_of_one = {}, isinstance(config, dict)
    for name, value in (config if yaml_of_one else vars(config)).items():
        section = isinstance(value, dict) if yaml_of_one else is_dataclass(value)
        out |= flat(value, f"{prefix}{name}.") if section else {f"{prefix}{name}": value}
    return out


def dump(config: Config) -> str:
    return yaml.safe_dump(asdict(config), sort_keys=False)


def _suggest(name: str, known, dashes: str = "") -> str:
    """ ", did you mean …?" by the last part of the name, and by the whole of it among those that share one or where none is alike."""
    leaf = difflib.get_close_matches(name.rsplit(".", 1)[-1], {k.rsplit(".", 1)[-1] for k in known}, 1, 0.6)
    alike = [k for k in known if k.rsplit(".", 1)[-1] in leaf]
    match = difflib.get_close_matches(name, alike, 1, 0) or difflib.get_close_matches(name, list(known), 1, 0.6)
    return f": did you mean {dashes}{match[0]}?" if match else f" (it has: {', '.join(known)})" if not dashes else ": see the recipe for its fields"


def _kind(hint):
    """The type of a field without its None."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    return next(option for option in options if option is not type(None))


def _coerce(value, hint, where: str):
    """The value as the field's type: YAML reads 1e-3 as text, and on the command line everything is text."""
    if type(None) in typing.get_args(hint) and (value is None or value in ("null", "none", "None")):
        return None
    kind = _kind(hint)
    try:
        if is_dataclass(kind) and isinstance(value, dict):
            return from_dict(kind, value, where)
        if typing.get_origin(kind) is tuple and isinstance(value, str):
            value = [v for v in value.strip("[]()").split(",") if v.strip()]
        if typing.get_origin(kind) is tuple and isinstance(value, list | tuple):
            item = typing.get_args(kind)[0]
            return tuple(_coerce(v, item, where) for v in value)
        if kind is float and isinstance(value, int | float | str) and not isinstance(value, bool) and not math.isnan(float(value)):
            return float(value)
        if kind is int and isinstance(value, int | float | str) and not isinstance(value, bool) and float(value).is_integer():
            return int(float(value))
        if kind is bool and str(value).lower() in ("true", "false"):
            return str(value).lower() == "true"
        if kind is dict and isinstance(value, dict):
            return value
        if kind is str and isinstance(value, str | int | float):
            return str(value)
    except (ValueError, OverflowError):
        pass
    name = (
        "a list of numbers"
        if typing.get_origin(kind) is tuple
        else {float: "a number", int: "a whole number", bool: "true or false", str: "text"}.get(kind, "a section")
    )
    raise UserError(f"{where}: {value!r} is not {name}")
