"""Models by their hub name: from a hub, from its cache, and one line where neither has them."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import pytest
from models import save

REPOS, NOWHERE = (
    ("org/tiny", "org/half"),
    "http://127.0.0.1:9",
)  # the discard port, on which nothing listens
LOAD = """
from flallm.data import hub
from flallm.utils import UserError
from flallm.config import LLM
from flallm.model.llm import load_llm
from flallm.data.tokenizer import TranslationTokenizer

for path in ("org/tiny", "org/half"):
    print(TranslationTokenizer(LLM(path=path)).encode("we saw"))
print(load_llm(LLM(path="org/tiny")).num_parameters())
"""
WITHOUT_NETWORK = """
import sys
from flallm import cli

hub.check_weights("org/tiny")
try:
    hub.check_weights("org/half")
except UserError as error:
    print(error, file=sys.stderr)
sys.argv = ["flallm", "stage1", "demo", "--llm.path=org/other", *sys.argv[1:]]
cli.main()
"""


class Hub(http.server.BaseHTTPRequestHandler):
    """The files of one model under two names, with the headers that huggingface_hub asks for."""

    def __init__(self, folder: Path, *arguments):
        self.folder = folder
        super().__init__(*arguments)

    def do_HEAD(self):
        self._send(body=False)

    def do_GET(self):
        self._send(body=True)

    def _send(self, body: bool):
        repo, _, name = self.path.removeprefix("/").partition("/resolve/main/")
        file = self.folder / name
        content = file.read_bytes() if repo in REPOS and name and file.is_file() else b""
        if repo.startswith("api/models/org/"):
            content = (
                b"[]"
                if "/tree/" in repo
                else json.dumps(
                    {"id": repo.removeprefix("api/models/"), "siblings": [], "tags": []}
                ).encode()
            )
        self.send_response(200 if content else 404)
        self.send_header("Content-Length", str(len(content)))
        if content:
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", "0" * 40)
        else:
            self.send_header("X-Error-Code", "EntryNotFound" if repo in REPOS else "RepoNotFound")
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def endpoint(tmp_path):
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), partial(Hub, save("llama", tmp_path / "model"))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def python(code: str, home: Path, endpoint: str, *arguments: str) -> subprocess.CompletedProcess:
    """Runs code in a new process, because huggingface_hub reads the environment on import."""
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    environment |= {
        "HF_HOME": str(home),
        "HF_ENDPOINT": endpoint,
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
    }
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=environment,
        cwd=home.parent,
        capture_output=True,
        text=True,
    )


def test_a_hub_name_loads_from_the_hub_then_from_its_cache_and_else_is_one_line_at_once(
    endpoint, shards, tmp_path
):
    home = tmp_path / "home"
    fetched = python(LOAD, home, endpoint)
    assert fetched.returncode == 0, fetched.stderr
    without_network = python(
        LOAD + WITHOUT_NETWORK,
        home,
        NOWHERE,
        f"--data.shards={shards}",
        f"--run_dir={tmp_path / 'run'}",
    )
    assert without_network.stdout == fetched.stdout != ""
    assert without_network.returncode == 2 and not (tmp_path / "run").exists()
    half, other = without_network.stderr.splitlines()  # and no line of a retry
    place = f"the hub's cache {home / 'hub'}, and {NOWHERE} cannot be reached"
    assert half.startswith(
        f"llm.path: org/half is no folder here, its weights cannot be found in {place}"
    )
    assert other.startswith(
        f"flallm: llm.path: org/other is no folder here, its tokenizer cannot be found in {place}"
    )
    assert (
        "`hf download org/other`" in other
        and "`flallm trim org/other --shards=DIR --out=DIR`" in other
    )
