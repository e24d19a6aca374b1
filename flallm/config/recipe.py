"""Recipes and the config of a run: loaded, overridden, written.

A recipe file holds the sections of `Config`, and under `stage1`, `stage2` and `joint` the fields
of `Train` for each. A run is one of the three: `load` puts that section in as `train`, and
overrides say `--train.lr_encoder=1e-3` whatever the stage.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import typing
from dataclasses import asdict, is_dataclass
from pathlib import Path

import yaml

from flallm.config.fields import coerce, from_dict, suggest
from flallm.config.sections import STAGES, Config, Train
from flallm.config.yaml_file import read_mapping
from flallm.utils import UserError, visible_files

BUILTIN_RECIPES = Path(__file__).parents[1] / "recipes"
# Fields that earlier versions had, with the values at which they did nothing.
REMOVED = {
    "train.one_pass": False,
    "train.lr_first": 1e-2,
    "train.llm_start": 0.0,
    "train.mask_frames": 0,
    "train.mask_channels": 0,
}


def load(recipe: str, stage: str, overrides: dict[str, object] | None = None) -> Config:
    """The checked config of one stage of a recipe.

    recipe: a built-in name or the path of a YAML file. The file may name another recipe as its
    `base` and hold only what differs from it. overrides: as in `override`.
    """
    path, sections = _read_recipe(recipe, Path(), ())
    train = {name: _to_train(sections.pop(name, {}), path, name) for name in STAGES}
    config = from_dict(Config, {**sections, "stage": stage}, str(path))
    config.train = train[stage]
    return override(config, overrides or {})


def _read_recipe(recipe: str, folder: Path, bases: tuple[Path, ...]) -> tuple[Path, dict]:
    """(the path of a recipe, its sections merged into those of its base).

    folder: where relative paths start; bases: the files that led here by their `base`.
    """
    path = _find_recipe(recipe, folder, bases)
    if path.resolve() in bases:
        raise UserError(f"{path}: its base leads back to itself")
    own = read_yaml(path)
    has_base, base = "base" in own, own.pop("base", None)
    _check_sections(own, path)
    if not has_base:
        return path, own
    base = coerce(base, str, f"{path}: base")
    _, inherited = _read_recipe(base, path.parent, (*bases, path.resolve()))
    for stage in STAGES:
        if "epochs" in own.get(stage, {}):  # they replace the steps of the base
            inherited.get(stage, {}).pop("steps", None)
    inherited["name"] = ""  # a recipe without a name does not have that of its base
    return path, _merge(inherited, own)


def _find_recipe(recipe: str, folder: Path, bases: tuple[Path, ...]) -> Path:
    builtin = {path.stem: path for path in visible_files(BUILTIN_RECIPES, "*.yaml")}
    path = builtin.get(recipe, folder / recipe)
    if os.path.isfile(path):  # Path.is_file raises an error if the name is too long
        return path
    where = f"{bases[-1]}: base: " if bases else ""
    names = ", ".join(builtin)
    raise UserError(f"{where}no recipe {recipe!r}: name a YAML file or one of {names}")


def _check_sections(sections: dict, path: Path) -> None:
    """Checks names and types of all sections, so that an error names this file."""
    for name in ("train", "stage"):
        if name in sections:
            raise UserError(
                f"{path}: `{name}:` is what a run's config.yaml has; "
                "in a recipe stage1, stage2 and joint are sections of their own"
            )
    for name, section in sections.items():
        if name in STAGES:
            _to_train(section, path, name)
        else:
            from_dict(Config, {name: section}, str(path))


def _to_train(section: object, path: Path, stage: str) -> Train:
    return coerce(section, Train, f"{path}: {stage}")


def _merge(base: dict, own: dict) -> dict:
    merged = dict(base)
    for name, value in own.items():
        if isinstance(value, dict) and isinstance(base.get(name), dict):
            value = _merge(base[name], value)
        merged[name] = value
    return merged


def read_run(run: Path, shards: str = "") -> dict:
    """The sections of the config.yaml of a run folder, without fields removed since it began.

    shards: the folder of its shards, if it has moved. Raises UserError for a run that used a
    removed field.
    """
    path = run / "config.yaml"
    if not os.path.isfile(path):
        advice = "name the --run_dir of a stage1, stage2 or joint command"
        raise UserError(f"{run} is no run folder (no config.yaml): {advice}")
    sections = read_yaml(path)
    for name, unused in REMOVED.items():
        section_name, field = name.split(".")
        section = sections.get(section_name)
        value = section.pop(field, unused) if isinstance(section, dict) else unused
        if value != unused and name != "train.lr_first":
            fact = f"was trained with {name}={value}"
            raise UserError(f"{run} {fact}, which this version no longer has")
    if shards:
        data = sections.get("data")
        sections["data"] = (data if isinstance(data, dict) else {}) | {"shards": shards}
    return sections


def read_yaml(path: Path) -> dict:
    """The sections of a recipe, of a run's config.yaml, or of another file in YAML.

    Raises UserError where YAML gives a field of a recipe another value than is written.
    """
    hints = typing.get_type_hints(Config) | dict.fromkeys(STAGES, Train) | {"base": str}
    return read_mapping(path, hints)


def override(config: Config, overrides: dict[str, object]) -> Config:
    """A checked copy of the config with `{"a.b": value}` put in.

    Epochs replace the steps of the config. Raises UserError for an unknown field or a value that
    its field does not allow.
    """
    if "train.epochs" in overrides and "train.steps" not in overrides:
        overrides = overrides | {"train.steps": None}
    config = copy.deepcopy(config)
    for name, value in overrides.items():
        _set_field(config, name, value)
    config.check()
    return config


def _set_field(config: Config, name: str, value: object) -> None:
    fields = flat(config)
    del fields["stage"]  # a command sets it
    for field, current in fields.items():
        if isinstance(current, dict) and name.startswith(f"{field}."):
            _set_in_dict(current, name.removeprefix(f"{field}.").split("."), value)
            return
    if name not in fields:
        raise UserError(f"unknown option --{name}{suggest(name, fields, '--')}")
    *parents, leaf = name.split(".")
    section = config
    for parent in parents:
        section = getattr(section, parent)
    hint = typing.get_type_hints(type(section))[leaf]
    setattr(section, leaf, coerce(value, hint, f"--{name}"))


def _set_in_dict(section: dict, names: list[str], value: object) -> None:
    for name in names[:-1]:
        section = section.setdefault(name, {})
        if not isinstance(section, dict):
            raise UserError(f"{'.'.join(names)}: {name} is {section!r} and has no fields")
    with contextlib.suppress(TypeError, ValueError):  # text is no JSON and stays text
        value = json.loads(value)
    section[names[-1]] = value


def flat(config: Config | dict, prefix: str = "") -> dict[str, object]:
    """{"a.b": value} of every field of a config, or of the nested dicts of a run's config.yaml.

    The dicts may have fields that `Config` does not have, of other versions.
    """
    is_yaml = isinstance(config, dict)
    values: dict[str, object] = {}
    for name, value in (config if is_yaml else vars(config)).items():
        is_section = isinstance(value, dict) if is_yaml else is_dataclass(value)
        if is_section:
            values |= flat(value, f"{prefix}{name}.")
        else:
            values[f"{prefix}{name}"] = value
    return values


def dump(config: Config) -> str:
    """The config as YAML, in the order of its fields."""
    return yaml.safe_dump(asdict(config), sort_keys=False)
