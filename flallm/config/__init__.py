"""The recipe: dataclasses <- YAML <- `--a.b=c`; every error names the field.

`sections.py` holds the fields with their defaults and what they allow; `recipe.py` loads and
overrides them.
"""

# ruff: noqa: F401
from flallm.config.fields import from_dict, from_options
from flallm.config.recipe import dump, flat, load, override, read_run, read_yaml
from flallm.config.sections import (
    CONVENTIONS,
    LLM,
    STAGES,
    VIDEO_PLACEHOLDER,
    Augment,
    Checkpoint,
    Config,
    Data,
    Decode,
    Encoder,
    LightT,
    LoRA,
    Train,
)
from flallm.utils import UserError
