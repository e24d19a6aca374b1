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

# What the paper states for its three data sets alike, by stage; "" is said of all three.
STATED = {
    "": {
        "data.crop": 224, "data.stride": 4, "encoder.stem": 64, "encoder.widths": (64, 128, 256, 512), "encoder.depths": (2, 2, 2, 2),
        "light_t.layers": 3, "light_t.heads": 8, "light_t.width": 512, "light_t.ffn": 2048, "llm.path": "facebook/mbart-large-cc25", "decode.beam": 5,
        "encoder.weights": "resnet18-f37072fd.pth", "train.warmup": 0, "train.steps": None,
    },
    "stage1": {
        "train.optimizer": "sgd", "train.momentum": 0.9, "train.lr_encoder": 1e-2, "train.lr_adapter": 1e-2, "train.lr_language": 1e-2, "train.batch": 8,
        "train.epochs": 75, "train.label_smoothing": 0.2,
    },
    "stage2": {
        "train.optimizer": "adamw", "train.lr_encoder": 0, "train.lr_adapter": 1e-3, "train.lr_language": 1e-5, "train.batch": 16, "train.label_smoothing": 0.2,
    },
    "joint": {},
}  # fmt: skip
# What the paper leaves open, as GFSLT-VLP and MMTLB have it, or as we choose.
PRACTICE = {
    "": {
        "data.resize": 256, "data.max_frames": 300, "encoder.channels": 1024, "encoder.kernel": 5, "llm.dropout": 0.3, "data.augment.rotate": 30,
        "data.augment.probability": 0.5, "data.augment.scale": 0.2, "data.augment.translate": 10, "light_t.dropout": 0.1, "train.weight_decay": 1e-3,
        "train.max_grad_norm": 1, "decode.max_tokens": 100,
    },
    "stage1": {},
    "stage2": {"train.epochs": 40, "train.betas": (0.9, 0.998)},
    "joint": {
        "train.batch": 16, "train.epochs": 75, "train.optimizer": "adamw", "train.lr_encoder": 1e-3, "train.lr_adapter": 1e-3, "train.lr_language": 1e-5,
        "train.betas": (0.9, 0.998), "train.label_smoothing": 0.2,
    },
}  # fmt: skip
OWN = {
    "phoenix14t": {"convention": "raw", "llm.language": "de_DE"},
    "csl-daily": {"convention": "csl-daily", "llm.language": "zh_CN"},
    "how2sign": {"convention": "raw", "llm.language": "en_XX"},
}


@pytest.mark.parametrize("stage", cfg.STAGES)
@pytest.mark.parametrize("name", PAPER)
def test_a_recipe_of_the_paper_has_its_numbers(name, stage):
    found = cfg.flat(cfg.load(name, stage))
    expected = OWN[name] | STATED[""] | STATED[stage] | PRACTICE[""] | PRACTICE[stage]
    assert {field: found[field] for field in expected} == expected
    # What goes beyond the paper is off, and nothing but the data and the weights is to be filled in.
    assert found["train.word_loss"] == found["train.spike"] == 0 and found["train.pool"] == 1 and found["data.shards"] == f"{name}/shards"
    assert found["convention"] in CONVENTIONS and cfg.CONVENTIONS == tuple(CONVENTIONS)


def tags(recipe: Path) -> dict[tuple[str, str], str]:
    """{(stage or "", field): P or I} as the comments have it: "field [I]" of that one, a tag by itself of all else in its line."""
    found, section = {}, ""
    for line in recipe.read_text().splitlines():
        content, _, comment = line.partition("#")
        if not content.startswith(" "):
            section = content.split(":")[0]
        names = re.findall(r"(\w+):", content.removeprefix(f"{section}:"))
        for name in names:
            tag = re.search(rf"\b{name} \[([PI])\]", comment) or re.search(r"\[([PI])\]", comment)
            field = f"train.{name}" if section in cfg.STAGES else ".".join([section, *names[:1] * (name != names[0] and content.startswith(" ")), name])
            found[section if section in cfg.STAGES else "", field] = tag and tag[1]
    return found


def test_every_number_of_the_papers_recipes_has_its_source_beside_it():
    found = tags(RECIPES / "phoenix14t.yaml")
    for tag, values in (("P", STATED), ("I", PRACTICE)):
        for stage, fields in values.items():
            for field in fields:
                said = {place: found[place, field] for place in ([stage] if stage else ["", *cfg.STAGES]) if (place, field) in found}
                assert (said or field in ("train.warmup", "train.steps")) and set(said.values()) <= {tag}, (field, said)
    checked = {field for values in (STATED, PRACTICE) for fields in values.values() for field in fields}
    free = {"data.shards", "data.workers", "data.augment", "decode.batch", "llm.language"}
    assert {field for _, field in found if "." in field and not field.endswith(".")} - checked - free == set()
    for name in PAPER[1:]:  # and these have no number of their own
        own = cfg.read_yaml(RECIPES / f"{name}.yaml")
        assert own.pop("base") == "phoenix14t" and own.keys() <= {"name", "convention", "data", "llm"}
        assert own["data"].keys() == {"shards"} and own["llm"].keys() == {"language"}


def test_a_recipe_has_what_its_base_has_and_its_own_fields(tmp_path):
    (tmp_path / "ours.yaml").write_text("base: csl-daily\nname: ours\ndata: {augment: {rotate: 5}}\nstage2: {epochs: 3}\n")
    (tmp_path / "more.yaml").write_text("base: ours.yaml\nllm: {path: mine}\n")  # beside it, wherever the command runs
    for stage in cfg.STAGES:
        base, ours, more = (cfg.flat(cfg.load(str(name), stage)) for name in ("csl-daily", tmp_path / "ours.yaml", tmp_path / "more.yaml"))
        differ = {"name": "ours", "data.augment.rotate": 5} | ({"train.epochs": 3} if stage == "stage2" else {})
        assert ours == base | differ and more == ours | {"name": "", "llm.path": "mine"}


def test_epochs_take_the_place_of_steps_and_a_mistake_in_a_base_is_said_of_its_file(tmp_path):
    (tmp_path / "long.yaml").write_text("base: demo\nstage1: {epochs: 3}\n")
    stage1, stage2 = (cfg.load(str(tmp_path / "long.yaml"), stage).train for stage in ("stage1", "stage2"))
    assert (stage1.steps, stage1.epochs, stage2.steps) == (None, 3, 400)
    assert cfg.load("demo", "stage1", {"train.epochs": "3"}).train.steps is None
    assert cfg.load("demo", "stage1", {"train.epochs": "3", "train.steps": "5"}).train.steps == 5
    (tmp_path / "wrong.yaml").write_text("base: demo\ndata: {augment: {rot: 3}}\n")
    (tmp_path / "right.yaml").write_text("base: wrong.yaml\n")
    with pytest.raises(cfg.UserError, match=r"wrong\.yaml: data: augment: there is no field 'rot'"):
        cfg.load(str(tmp_path / "right.yaml"), "stage1")


@pytest.mark.parametrize(
    ("base", "said"),
    [
        ("a.yaml", "a.yaml: its base leads back to itself"),
        ("nosuch", "a.yaml: base: no recipe 'nosuch'"),
        ("[1]", "a.yaml: base: \\[1\\] is not text"),
        ("x/../a.yaml", "its base leads back"),
        ("a" * 300, "no recipe 'aaa"),
    ],
)
def test_a_base_that_is_none_is_refused(tmp_path, base, said):
    (tmp_path / "x").mkdir()
    (tmp_path / "a.yaml").write_text(f"base: {base}\n")
    (tmp_path / "b.yaml").write_text("base: a.yaml\n")
    with pytest.raises(cfg.UserError, match=said):
        cfg.load(str(tmp_path / "b.yaml"), "stage1")


# Tables 4 to 10 of the paper: BLEU-4, and with more than one number ROUGE-L, BLEU-1 to BLEU-4, or BLEU-4 and hours.
TABLES = {
    "4": {"joint": (32.52, 31.96, 21.96, 16.32, 12.90), "factorised": (45.27, 46.29, 35.33, 28.03, 23.09)},
    "5": {
        "LLM fine-tuning only": (17.33, 17.64, 10.51, 7.37, 5.62), "visual initialing only": (38.67, 39.09, 28.20, 21.83, 17.69),
        "both": (45.27, 46.29, 35.33, 28.03, 23.09),
    },
    "6": {"100 %": (22.96, 17.90), "50 %": (23.04, 9.85), "25 %": (23.09, 4.75), "12.5 %": (20.02, 3.55)},
    "7": {"tiny": (22.52,), "small": (22.36,), "base": (23.09,), "large": (22.49,)},
    "8": {"frame-wise": (20.30,), "sign-wise": (23.09,), "hidden states of Light-T": (22.60,)},
    "9": {"nothing": (17.86,), "backbone": (20.40,), "backbone + temporal": (23.09,)},
    "10": {"mBART random": (16.19,), "mT5-Base random": (7.39,), "mBART": (23.09,), "mT5-Base": (19.71,)},
}  # fmt: skip


@pytest.mark.parametrize("table", TABLES)
def test_the_tables_have_the_numbers_of_the_paper(table):
    rows = cfg.read_yaml(RECIPES.parent / "ablation/tables.yaml")[table]["rows"]
    assert {row["name"]: tuple(row["paper"].values()) for row in rows} == TABLES[table]
    names = {5: ["rouge_l", "bleu1", "bleu2", "bleu3", "bleu4"], 2: ["bleu4", "hours"], 1: ["bleu4"]}
    assert all(list(row["paper"]) == names[len(row["paper"])] for row in rows)


def test_the_learning_rate_falls_along_a_cosine_from_the_first_step():
    from flallm.training.optim import schedule

    train = cfg.load("phoenix14t", "stage1").train
    assert [round(schedule(train, step, 100), 6) for step in (0, 50, 100)] == [1, 0.5, 0]


@pytest.mark.parametrize(
    "settings,said",
    [
        ({"bf16": {"enabled": True}, "zero_optimization": {"stage": 2}}, "bf16 in .* would be filled in from the recipe: leave it out"),
        ({"gradient_clipping": 5}, "gradient_clipping in .* would be filled in from the recipe: leave it out"),
        ({"zero_optimization": {"stage": 0}}, "stage is 0 in .*; 1, 2 and 3 are supported"),
        ({"zero_optimization": 2}, "holds no settings of DeepSpeed"),
    ],
)
def test_settings_of_deepspeed_that_are_not_its_files_to_make_are_refused(tmp_path, settings, said):
    from flallm.distributed.deepspeed_config import deepspeed_config

    (tmp_path / "own.json").write_text(json.dumps(settings))
    with pytest.raises(cfg.UserError, match=said):
        deepspeed_config(cfg.load("demo", "stage1", {"train.deepspeed": str(tmp_path / "own.json")}).train, "cpu")


def test_a_run_of_a_version_with_more_fields_is_read_unless_it_used_them(tmp_path):
    sections = yaml.safe_load(cfg.dump(cfg.load("demo", "stage1")))
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(sections | {"train": sections["train"] | {"mask_frames": 0, "one_pass": False, "lr_first": 0.5}}))
    assert cfg.from_dict(cfg.Config, cfg.read_run(tmp_path), "") == cfg.load("demo", "stage1")
    path.write_text(yaml.safe_dump(sections | {"train": sections["train"] | {"mask_frames": 5}}))
    with pytest.raises(UserError, match=r"was trained with train.mask_frames=5, which this version no longer has"):
        cfg.read_run(tmp_path)
