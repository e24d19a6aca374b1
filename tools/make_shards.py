"""Makes the WebDataset shards that flallm trains on: `python tools/make_shards.py CORPUS … --out DIR`."""

import sys

from flallm.cli import run
from flallm.make_shards import COMMANDS

sys.exit(run(COMMANDS, "make_shards.py"))
