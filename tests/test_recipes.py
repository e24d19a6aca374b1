"""The recipes of the paper: its numbers, and a source beside each."""

import json
import re
from pathlib import Path

import pytest
import yaml

from flallm import config as cfg
from flallm.evaluation.metrics import CONVENTIONS
from flallm.utils import UserError

RECIPES = Path(cfg.__file__).parents[1] / "recipes"
PAPER = ("phoenix14t", "csl-daily", "how2sign")

# What the paper states, by stage. "" holds for all three.
STATED = {
    "": {
        "data.crop": 224,
        "data.stride": 4,
        "encoder.stem": 64,
        "encoder.widths": (64, 128, 256, 512),
        "encoder.depths": (2, 2, 2, 2),
        "encoder.weights": "resnet18-f37072fd.pth",
        "light_t.layers": 3,
        "light_t.heads": 8,
        "light_t.width": 512,
        "light_t.ffn": 2048,
        "llm.path": "facebook/mbart-large-cc25",
        "decode.beam": 5,
        "train.warmup": 0,
        "train.steps": None,
    },
    "stage1": {
        "train.optimizer": "sgd",
        "train.momentum": 0.9,
        "train.lr_encoder": 1e-2,
        "train.lr_adapter": 1e-2,
        "train.lr_language": 1e-2,
        "train.batch": 8,
        "train.epochs": 75,
        "train.label_smoothing": 0.2,
    },
    "stage2": {
        "train.optimizer": "adamw",
        "train.lr_encoder": 0,
        "train.lr_adapter": 1e-3,
        "train.lr_language": 1e-5,
        "train.batch": 16,
        "train.label_smoothing": 0.2,
    },
    "joint": {},
}
# What the paper leaves open: from GFSLT-VLP and MMTLB, or our choice.
PRACTICE = {
    "": {
        "data.resize": 256,
        "data.max_frames": 300,
        "data.augment.rotate": 30,
        "data.augment.probability": 0.5,
        "data.augment.scale": 0.2,
        "data.augment.translate": 10,
        "encoder.channels": 1024,
        "encoder.kernel": 5,
        "light_t.dropout": 0.1,
        "llm.dropout": 0.3,
        "train.weight_decay": 1e-3,
        "train.max_grad_norm": 1,
        "decode.max_tokens": 100,
    },
    "stage1": {},
    "stage2": {"train.epochs": 40, "train.betas": (0.9, 0.998)},
    "joint": {
        "train.batch": 16,
        "train.epochs": 75,
        "train.optimizer": "adamw",
        "train.lr_encoder": 1e-3,
        "train.lr_adapter": 1e-3,
        "train.lr_language": 1e-5,
        "train.betas": (0.9, 0.998),
        "train.label_smoothing": 0.2,
    },
}
OWN = {
    "phoenix14t": {"convention": "raw", "llm.language": "de_DE"},
    "csl-daily": {"convention": "csl-daily", "llm.language": "zh_CN"},
    "how2sign": {"convention": "raw", "llm.language": "en_XX"},
}


@pytest.mark.parametrize("stage", cfg.STAGES)
@pytest.mark.parametrize("name", PAPER)
def test_a_recipe_of_the_paper_has_its_numbers(name, stage):
    fields = cfg.flat(cfg.load(name, stage))
    expected = OWN[name] | STATED[""] | STATED[stage] | PRACTICE[""] | PRACTICE[stage]
    assert {field: fields[field] for field in expected} == expected
    # What goes beyond the paper is off. The user fills in the data and the weights alone.
    assert fields["train.word_loss"] == 0
    assert fields["train.spike"] == 0
    assert fields["train.pool"] == 1
    assert fields["data.shards"] == f"{name}/shards"


def test_every_convention_can_lead():
    assert tuple(CONVENTIONS) == cfg.CONVENTIONS


def tags(recipe: Path) -> dict[tuple[str, str], str | None]:
    """{(stage or "", field): P or I} from the comments of a recipe.

    "field [I]" tags that field; a tag without a field tags all other fields of its line.
    """
    tag_of, section = {}, ""
    for line in recipe.read_text().splitlines():
        content, _, comment = line.partition("#")
        is_indented = content.startswith(" ")
        if not is_indented:
            section = content.split(":")[0]
        names = re.findall(r"(\w+):", content.removeprefix(f"{section}:"))
        for name in names:
            tag = re.search(rf"\b{name} \[([PI])\]", comment) or re.search(r"\[([PI])\]", comment)
            if section in cfg.STAGES:
                place = section, f"train.{name}"
            elif is_indented and name != names[0]:
                place = "", f"{section}.{names[0]}.{name}"
            else:
                place = "", f"{section}.{name}"
            tag_of[place] = tag[1] if tag else None
    return tag_of


def test_every_number_of_the_papers_recipe_has_its_source_beside_it():
    tag_of = tags(RECIPES / "phoenix14t.yaml")
    checked = set()
    for expected_tag, fields_of in (("P", STATED), ("I", PRACTICE)):
        for stage, fields in fields_of.items():
            checked |= fields.keys()
            for field in fields:
                sections = [stage] if stage else ["", *cfg.STAGES]
                places = [(section, field) for section in sections if (section, field) in tag_of]
                assert places or field in ("train.warmup", "train.steps"), field
                assert all(tag_of[place] == expected_tag for place in places), field
    free = {"data.shards", "data.workers", "data.augment", "decode.batch", "llm.language"}
    fields = {field for _, field in tag_of if "." in field and not field.endswith(".")}
    assert fields - checked - free == set()


@pytest.mark.parametrize("name", ["csl-daily", "how2sign"])
def test_the_other_recipes_of_the_paper_have_no_number_of_their_own(name):
    own = cfg.read_yaml(RECIPES / f"{name}.yaml")
    assert own.pop("base") == "phoenix14t"
    assert own.keys() <= {"name", "convention", "data", "llm"}
    assert own["data"].keys() == {"shards"}
    assert own["llm"].keys() == {"language"}


@pytest.mark.parametrize("stage", cfg.STAGES)
def test_a_recipe_has_what_its_base_has_and_its_own_fields(tmp_path, stage):
    (tmp_path / "ours.yaml").write_text(
        "base: csl-daily\nname: ours\ndata: {augment: {rotate: 5}}\nstage2: {epochs: 3}\n"
    )
    # Its base is beside it, wherever the command runs.
    (tmp_path / "more.yaml").write_text("base: ours.yaml\nllm: {path: mine}\n")
    base = cfg.flat(cfg.load("csl-daily", stage))
    ours = cfg.flat(cfg.load(str(tmp_path / "ours.yaml"), stage))
    more = cfg.flat(cfg.load(str(tmp_path / "more.yaml"), stage))
    own = {"name": "ours", "data.augment.rotate": 5}
    if stage == "stage2":
        own["train.epochs"] = 3
    assert ours == base | own
    assert more == ours | {"name": "", "llm.path": "mine"}


def test_epochs_replace_steps(tmp_path):
    (tmp_path / "long.yaml").write_text("base: demo\nstage1: {epochs: 3}\n")
    stage1 = cfg.load(str(tmp_path / "long.yaml"), "stage1").train
    assert (stage1.steps, stage1.epochs) == (None, 3)
    assert cfg.load(str(tmp_path / "long.yaml"), "stage2").train.steps == 400
    assert cfg.load("demo", "stage1", {"train.epochs": "3"}).train.steps is None
    both = cfg.load("demo", "stage1", {"train.epochs": "3", "train.steps": "5"})
    assert both.train.steps == 5


def test_an_error_in_a_base_names_the_file_of_the_base(tmp_path):
    (tmp_path / "wrong.yaml").write_text("base: demo\ndata: {augment: {rot: 3}}\n")
    (tmp_path / "right.yaml").write_text("base: wrong.yaml\n")
    with pytest.raises(UserError, match=r"wrong\.yaml: data: augment: there is no field 'rot'"):
        cfg.load(str(tmp_path / "right.yaml"), "stage1")


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("a.yaml", "a.yaml: its base leads back to itself"),
        ("nosuch", "a.yaml: base: no recipe 'nosuch'"),
        ("[1]", "a.yaml: base: \\[1\\] is not text"),
        ("x/../a.yaml", "its base leads back"),
        ("a" * 300, "no recipe 'aaa"),
    ],
)
def test_an_invalid_base_is_refused(tmp_path, base, message):
    (tmp_path / "x").mkdir()
    (tmp_path / "a.yaml").write_text(f"base: {base}\n")
    (tmp_path / "b.yaml").write_text("base: a.yaml\n")
    with pytest.raises(UserError, match=message):
        cfg.load(str(tmp_path / "b.yaml"), "stage1")


# Tables 4 to 10 of the paper. One number is BLEU-4, two are BLEU-4 and hours, five are ROUGE-L and
# BLEU-1 to BLEU-4.
FACTORISED = (45.27, 46.29, 35.33, 28.03, 23.09)
TABLES = {
    "4": {"joint": (32.52, 31.96, 21.96, 16.32, 12.90), "factorised": FACTORISED},
    "5": {
        "LLM fine-tuning only": (17.33, 17.64, 10.51, 7.37, 5.62),
        "visual initialing only": (38.67, 39.09, 28.20, 21.83, 17.69),
        "both": FACTORISED,
    },
    "6": {
        "100 %": (22.96, 17.90),
        "50 %": (23.04, 9.85),
        "25 %": (23.09, 4.75),
        "12.5 %": (20.02, 3.55),
    },
    "7": {"tiny": (22.52,), "small": (22.36,), "base": (23.09,), "large": (22.49,)},
    "8": {"frame-wise": (20.30,), "sign-wise": (23.09,), "hidden states of Light-T": (22.60,)},
    "9": {"nothing": (17.86,), "backbone": (20.40,), "backbone + temporal": (23.09,)},
    "10": {
        "mBART random": (16.19,),
        "mT5-Base random": (7.39,),
        "mBART": (23.09,),
        "mT5-Base": (19.71,),
    },
}
FIGURES = {
    1: ["bleu4"],
    2: ["bleu4", "hours"],
    5: ["rouge_l", "bleu1", "bleu2", "bleu3", "bleu4"],
}


@pytest.mark.parametrize("table", TABLES)
def test_the_tables_have_the_numbers_of_the_paper(table):
    rows = cfg.read_yaml(RECIPES.parent / "ablation/tables.yaml")[table]["rows"]
    assert {row["name"]: tuple(row["paper"].values()) for row in rows} == TABLES[table]
    assert all(list(row["paper"]) == FIGURES[len(row["paper"])] for row in rows)


def test_the_learning_rate_falls_along_a_cosine_from_the_first_step():
    from flallm.training.optim import schedule

    train = cfg.load("phoenix14t", "stage1").train
    assert [round(schedule(train, step, 100), 6) for step in (0, 50, 100)] == [1, 0.5, 0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"bf16": {"enabled": True}, "zero_optimization": {"stage": 2}},
            "bf16 in .* would be filled in from the recipe: leave it out",
        ),
        (
            {"gradient_clipping": 5},
            "gradient_clipping in .* would be filled in from the recipe: leave it out",
        ),
        ({"zero_optimization": {"stage": 0}}, "stage is 0 in .*; 1, 2 and 3 are supported"),
        ({"zero_optimization": 2}, "holds no settings of DeepSpeed"),
    ],
)
def test_a_deepspeed_file_does_not_set_what_the_recipe_sets(tmp_path, settings, message):
    from flallm.distributed.deepspeed_config import deepspeed_config

    path = tmp_path / "own.json"
    path.write_text(json.dumps(settings))
    with pytest.raises(UserError, match=message):
        deepspeed_config(cfg.load("demo", "stage1", {"train.deepspeed": str(path)}).train, "cpu")


def test_the_config_of_an_older_run_is_read_unless_it_used_removed_fields(tmp_path):
    sections = yaml.safe_load(cfg.dump(cfg.load("demo", "stage1")))

    def write(removed: dict) -> None:
        content = sections | {"train": sections["train"] | removed}
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))

    write({"mask_frames": 0, "one_pass": False, "lr_first": 0.5})
    config = cfg.from_dict(cfg.Config, cfg.read_run(tmp_path), "")
    assert config == cfg.load("demo", "stage1")
    write({"mask_frames": 5})
    message = "was trained with train.mask_frames=5, which this version no longer has"
    with pytest.raises(UserError, match=message):
        cfg.read_run(tmp_path)
