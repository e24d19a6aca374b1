"""The fields of a recipe: defaults, what values they allow, and where the defaults come from.

[P]: the paper. [I]: the nearest published practice where the paper is silent (GFSLT-VLP, MMTLB).
A section with a `check` method checks there how its fields go together; it raises UserError.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from flallm.config.fields import check_fields, choice, number, share
from flallm.utils import UserError

STAGES = ("stage1", "stage2", "joint")
CONVENTIONS = ("raw", "13a", "csl-daily", "zh", "lower")  # of evaluation.metrics, slow to import
VIDEO_PLACEHOLDER = "{video}"  # where the features stand in a prompt


@dataclass
class Augment:
    """Random changes, drawn once a clip in training. [I] GFSLT-VLP.

    There is no horizontal flip: hands have sides.
    """

    probability: float = 0.5  # of each of the three
    rotate: float = 30  # degrees, either way
    scale: float = 0.2  # share, either way
    translate: float = 10  # pixels of a 256-pixel frame, either way


@dataclass
class Data:
    shards: str = ""  # the folder that tools/make_shards.py writes
    resize: int = number(256, minimum=1)  # [I] pixels: frames are squeezed to a square of this …
    crop: int = number(224, minimum=1)  # [P] … and cropped: training at random, else the middle
    stride: int = number(4, minimum=1)  # [P] every 4th frame: T/4
    max_frames: int = number(300, minimum=1)  # [I] of the source; longer clips are thinned evenly
    # Frames a second of the shards (make_shards.py --fps), to which `translate` brings videos.
    # 0: the videos' own. A run takes it from its shards.
    fps: float = 0.0
    augment: Augment = field(default_factory=Augment)
    workers: int = 4  # decoding processes a rank
    prefetch_mib: int = number(512, minimum=1)  # how much a rank decodes ahead
    cache: str = ""  # a local folder for what is read of remote shards, as of s3://bucket/shards
    cache_gib: float = 100.0  # its largest size

    def check(self) -> None:
        if self.crop > self.resize:
            raise UserError(f"data.crop: {self.crop} is larger than data.resize, {self.resize}")


@dataclass
class Encoder:
    stem: int = number(64, minimum=1)  # [P] ResNet18
    widths: tuple[int, ...] = number((64, 128, 256, 512), minimum=1)  # [P] ResNet18
    depths: tuple[int, ...] = number((2, 2, 2, 2), minimum=1)  # [P] ResNet18
    weights: str | None = None  # [P] ImageNet: torchvision's ResNet18 as .pth or .safetensors
    channels: int = number(1024, minimum=1)  # [I] C, the width of the sign-wise features
    kernel: int = number(5, minimum=1)  # [I] of the temporal convolution
    # BatchNorm statistics of the global batch. false: of each rank's own, which is faster.
    global_batch_norm: bool = True

    def check(self) -> None:
        if not self.widths:
            raise UserError("encoder.widths: one is needed at least")
        if len(self.widths) != len(self.depths):
            counts = f"{len(self.depths)} of them for {len(self.widths)} encoder.widths"
            raise UserError(f"encoder.depths: {counts}")


@dataclass
class LightT:
    """[P] Table 7, "base"."""

    layers: int = number(3, minimum=1)  # of the encoder and of the decoder
    heads: int = number(8, minimum=1)
    width: int = number(512, minimum=1)
    ffn: int = number(2048, minimum=1)
    dropout: float = share(0.1)  # [I] ours

    def check(self) -> None:
        if self.width % self.heads:
            pair = f"{self.heads} heads cannot share a light_t.width of {self.width}"
            raise UserError(f"light_t.heads: {pair}")


@dataclass
class LoRA:
    """Low-rank updates of a frozen language model (Hu et al. 2021)."""

    rank: int = 0  # 0: none, the model itself trains
    alpha: float = number(32.0, minimum=-math.inf)  # the updates are multiplied by alpha / rank
    dropout: float = 0.05
    # Modules by the end of their names. all-linear: every linear module.
    targets: tuple[str, ...] = ("q_proj", "v_proj")


@dataclass
class LLM:
    # [P] A folder or hub name in the Hugging Face layout. Stage 1 uses its tokenizer, too.
    path: str = "facebook/mbart-large-cc25"
    language: str | None = None  # target language code of a multilingual model, such as de_DE
    prompt: str = VIDEO_PLACEHOLDER  # the text around the features, special tokens included
    stack: int = number(1, minimum=1)  # how many neighbouring features become one
    dropout: float = share(0.3)  # [I] of mBART and T5; decoder-only models have LoRA's alone
    lora: LoRA = field(default_factory=LoRA)
    # Whether word embeddings and the head train. none: they train unless LoRA is used.
    train_embeddings: bool | None = None
    # Recompute a layer's activations in the backward pass: less memory, more time.
    gradient_checkpointing: bool = False
    # What the model reads in stage 2. signs: sign-wise features. frames: the backbone's features.
    # light_t: hidden states of Light-T's encoder. words: sign-wise features and the words that
    # stage 1's train.word_loss sees in them.
    input: str = choice("signs", ("signs", "frames", "light_t", "words"))
    random: bool = False  # the model's shape with random weights, not the pre-trained ones

    def check(self) -> None:
        if self.prompt.count(VIDEO_PLACEHOLDER) != 1:
            must = f"must hold {VIDEO_PLACEHOLDER} once, the place of the features"
            raise UserError(f"llm.prompt: {self.prompt!r} {must}")
        if self.input == "words" and self.stack > 1:
            raise UserError(
                f"llm.stack: {self.stack} features are put together into one, "
                "llm.input=words gives each its own words"
            )


@dataclass
class Train:
    epochs: float = 75
    steps: int | None = number(None, minimum=1)  # instead of epochs
    batch: int = number(8, minimum=1)  # clips a step over all ranks
    # Used frames a step over all ranks at most, which bounds memory. 0: no limit.
    batch_frames: int = 0
    # How many steps' clips are sorted by length together. 2: steps of short and of long clips.
    pool: int = number(1, minimum=1)
    micro_batches: int = number(1, minimum=1)  # forward and backward passes a step on each rank
    optimizer: str = choice("sgd", ("sgd", "adamw"))
    lr_encoder: float = 1e-2
    lr_adapter: float = 1e-2
    lr_language: float = 1e-2
    momentum: float = 0.9  # of sgd
    betas: tuple[float, ...] = (0.9, 0.998)  # of adamw
    weight_decay: float = 1e-3
    warmup: float = share(0.0)  # share of the steps: rates rise from 0, then fall along a cosine
    max_grad_norm: float = 1.0  # gradients with a larger norm are scaled down to it
    label_smoothing: float = share(0.2)  # [P]
    # Weight of a loss that ties frames to words, see Translator. 0: none. Not in the paper.
    word_loss: float = 0.0
    # Of the encoder; "encoder" is the backbone and the temporal module. none: the encoder in
    # stage 2, nothing in the others.
    frozen: str | None = choice(None, ("nothing", "backbone", "encoder", None))
    precision: str = choice("bf16", ("bf16", "fp32"))  # bf16: autocast, parameters stay fp32
    # A DeepSpeed JSON file. none: ds_configs/zero2.json, or zero2_cpu.json without a GPU.
    deepspeed: str | None = None
    # Fields of that file, such as {zero_optimization: {reduce_bucket_size: 2e8}}.
    deepspeed_overrides: dict = field(default_factory=dict)
    log_every: int = number(50, minimum=1)  # steps
    dev_every: int = 0  # steps between evaluations on the dev split. 0: once an epoch
    dev_clips: int = 0  # how many clips of the dev split. 0: all
    # A step whose loss exceeds the running mean this many times is skipped. 0: none is.
    spike: float = 0.0
    # So many skipped steps in a row, of this or of a gradient that is not finite, end the run.
    max_skipped: int = number(10, minimum=1)
    timeout: float = number(600, minimum=1)  # seconds without an answer of a rank that end the run

    def check(self) -> None:
        if len(self.betas) != 2 or max(self.betas) >= 1:
            values = ", ".join(map(str, self.betas))
            raise UserError(f"train.betas: {values}: two numbers from 0 to below 1 are needed")
        if self.steps is None and not self.epochs:
            raise UserError(f"train.epochs: {self.epochs} is not more than 0")
        if self.steps is None and self.epochs == math.inf:
            raise UserError("train.epochs: a run has to end")


@dataclass
class Checkpoint:
    """When checkpoints are written, besides those after evaluations and at the end; which stay."""

    every: int = 0  # steps. 0: by the clock alone
    minutes: float = 15  # since the last checkpoint. 0: by steps alone
    last: int = number(2, minimum=1)  # the newest ones; with two, one remains if one is damaged
    best: int = number(1, minimum=1)  # by the leading dev score: BLEU-4 if sentences have 4 words
    every_nth: int = 0  # those of steps divisible by this stay for good. 0: none


@dataclass
class Decode:
    beam: int = number(5, minimum=1)  # [P]
    max_tokens: int = number(100, minimum=1)
    length_penalty: float = number(1.0, minimum=-math.inf)
    batch: int = number(16, minimum=1)  # clips decoded together


@dataclass
class Config:
    """A recipe for one stage."""

    name: str = ""
    stage: str = "stage1"
    seed: int = number(0, below=2**32)
    convention: str = choice("raw", CONVENTIONS)  # the scoring convention that leads
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
        if self.train.frozen:
            return self.train.frozen
        return "encoder" if self.stage == "stage2" else "nothing"

    def check(self) -> None:
        """Raises UserError for the first field with a value that it does not allow."""
        check_fields(self)
        if "/" in self.name:
            raise UserError(f"name: {self.name!r} is to be a folder's name, without /")
        if self.stage == "joint" and self.llm.input != "signs":
            raise UserError(f"llm.input: {self.llm.input} is for stage 2, joint trains on signs")
        for section in (self.data, self.encoder, self.light_t, self.llm, self.train):
            section.check()
