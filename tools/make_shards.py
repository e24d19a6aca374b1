"""`flallm shards` as a script: `python tools/make_shards.py CORPUS … --out DIR`."""

import sys

from flallm.commands.shards import run

if __name__ == "__main__":
    sys.exit(run(sys.argv[1:], "make_shards.py"))
