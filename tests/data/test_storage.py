"""Shards at an address: a web server with ranges and an S3-compatible server.

Both are real and local, and fail when told to.
"""

import http.server
import os
import re
import socket
import threading
from pathlib import Path

import numpy as np
import pytest

from flallm.config import Data
from flallm.data import dataset as loader
from flallm.data import storage as store
from flallm.data.corpora import synthetic
from flallm.data.encode import EncodeOptions
from flallm.data.reader import BadSample, Shards
from flallm.data.shards import make_shards
from flallm.utils import UserError


class Server(http.server.ThreadingHTTPServer):
    """Serves the files of a folder, entire or by range.

    The next requests fail as `failures` says: a status, or None for a dropped connection.
    """

    daemon_threads = True

    def __init__(self, folder: Path):
        self.folder, self.requests, self.failures = folder, [], []
        super().__init__(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server_port}/shards"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.requests.append((self.path, self.headers["Range"]))
        if self.server.failures and (status := self.server.failures.pop(0)) != 200:
            if status:
                self.send_error(status)
            else:
                self.connection.shutdown(socket.SHUT_RDWR)
            return
        file = self.server.folder / self.path.rpartition("/")[2]
        if not file.is_file():
            self.send_error(404)
            return
        content = file.read_bytes()
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["Range"] or "")
        if asked:
            first, last = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
            content = content[first : last + 1]
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(shards, monkeypatch):
    monkeypatch.setattr(store, "BACKOFF_S", 0.01)
    with Server(shards) as server:
        yield server
        server.shutdown()


def assert_the_same(remote: Shards, local: Shards):
    assert len(remote) == len(local) and all(
        np.array_equal(remote.index[name], local.index[name]) for name in local.index
    )
    assert [remote.read(i) for i in range(len(local))] == [local.read(i) for i in range(len(local))]


def test_shards_on_a_web_server_give_the_bytes_of_those_on_disk(server, shards):
    assert_the_same(Shards(server.address, "dev"), Shards(shards, "dev"))
    tars = [asked for path, asked in server.requests if path.endswith(".tar")]
    assert len(tars) == 8 and all(tars)  # one request a sample, and none for a whole shard


def test_shards_in_an_object_store_give_the_bytes_of_those_on_disk(shards, monkeypatch):
    boto3, moto_server = pytest.importorskip("boto3"), pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    for name, value in (
        ("AWS_ACCESS_KEY_ID", "test"),
        ("AWS_SECRET_ACCESS_KEY", "test"),
        ("AWS_DEFAULT_REGION", "us-east-1"),
    ):
        monkeypatch.setenv(name, value)
    server = moto_server.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        client = boto3.client("s3")
        client.create_bucket(Bucket="corpora")
        for path in shards.iterdir():
            client.upload_file(str(path), "corpora", f"small/{path.name}")
        remote, local = Shards("s3://corpora/small", "dev"), Shards(shards, "dev")
        assert_the_same(remote, local)
        assert list(remote.metas()) == [local.meta(i) for i in range(len(local))]
        with pytest.raises(UserError, match="holds no finished shards"):
            Shards("s3://corpora/other", "dev")
    finally:
        server.stop()


def test_the_loader_reads_from_an_address(server, shards, tmp_path):
    """Its workers too: two processes that share a cache."""

    class Letters:
        def encode(self, text):
            return [*map(ord, text), 0]

    def frames(workers, **data):
        clips = loader.ClipDataset("dev", Data(resize=36, crop=32, **data), 0)
        return [
            b.frames.tolist()
            for b in loader.batches(clips, Letters(), [[(0, n)] for n in range(8)], workers)
        ]

    local = frames(0, shards=str(shards))
    assert frames(2, shards=server.address, cache=str(tmp_path)) == local
    asked = len(server.requests)
    assert frames(2, shards=server.address, cache=str(tmp_path)) == local
    assert not [path for path, _ in server.requests[asked:] if path.endswith(".tar")]


@pytest.mark.parametrize("failure", [503, 500, 429, None])
def test_a_server_that_fails_for_a_while_is_asked_again(server, shards, failure):
    dev = Shards(server.address, "dev")
    server.failures = [failure] * 3
    assert dev.read(2) == Shards(shards, "dev").read(2)
    assert server.failures == []


def test_a_server_that_is_down_gives_a_cause_and_one_that_comes_back_is_used_again(server):
    dev = Shards(server.address, "dev")
    server.failures = [503] * 4
    with pytest.raises(
        BadSample, match=r"dev-000000\.tar: .*cannot be read after 4 tries: .*503"
    ) as caught:
        dev.read(0)
    assert "\n" not in str(caught.value)
    assert dev.read(0)
    server.failures = [
        200,
        *[None] * 9,
    ]  # the client itself asks again when a connection is dropped
    with pytest.raises(
        UserError, match=r"dev\.index\.safetensors cannot be read: .* after 4 tries"
    ) as caught:
        Shards(server.address, "dev")
    assert "\n" not in str(caught.value)
    server.failures = []
    address = server.address
    server.shutdown()
    server.server_close()
    for attempt in (lambda: dev.read(1), lambda: Shards(address, "dev")):
        with pytest.raises((BadSample, UserError), match="after 4 tries") as caught:
            attempt()
        assert "\n" not in str(caught.value)


def test_a_shard_that_is_missing_or_short_at_an_address_gives_a_cause(server, shards, tmp_path):
    for path in shards.glob("d*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    server.folder = tmp_path
    dev, shard = Shards(server.address, "dev"), tmp_path / "dev-000000.tar"
    os.truncate(shard, int(dev.index["video_offset"][3]) + 5)
    assert dev.read(2)
    for sample in (3, 4, 7):  # cut within, at the end, beyond
        with pytest.raises(BadSample, match=r"dev-000000\.tar"):
            dev.read(sample)
    shard.unlink()
    with pytest.raises(BadSample, match=r"dev-000000\.tar"):
        dev.read(2)
    (tmp_path / "dataset.json").unlink()
    with pytest.raises(UserError, match="holds no finished shards"):
        Shards(server.address, "dev")


def test_an_address_of_a_kind_that_does_not_exist_is_the_users_mistake():
    with pytest.raises(UserError, match="nothing://there cannot be opened: Protocol not known"):
        Shards("nothing://there", "dev")


def test_the_cache_spares_requests_and_an_altered_entry_is_noticed_and_dropped(
    server, shards, tmp_path
):
    local = Shards(shards, "dev")
    remote = Shards(server.address, "dev", str(tmp_path))
    assert_the_same(remote, local)
    asked = len(server.requests)
    assert_the_same(remote, local)
    assert len(server.requests) == asked
    for entry in tmp_path.rglob("*"):
        if entry.is_file():
            content = bytearray(entry.read_bytes())
            content[len(content) // 2] ^= 1
            entry.write_bytes(content)
    for _ in range(2):
        assert_the_same(remote, local)
        assert len(server.requests) == asked + len(local)  # each is asked for once more


def test_two_addresses_in_one_cache_are_not_taken_for_each_other(server, tmp_path):
    for name in ("first", "other"):
        server.folder = tmp_path / name
        server.folder.mkdir()
        (server.folder / "dev-000000.tar").write_text(name)
        assert (
            store.Storage(f"{server.address}/{name}", str(tmp_path / "cache")).read(
                "dev-000000.tar", 0, 5
            )
            == name.encode()
        )


def test_a_cache_that_cannot_be_written_costs_no_clip(server, shards, tmp_path):
    (tmp_path / "cache").write_text("a file where a folder should be")
    assert_the_same(Shards(server.address, "dev", str(tmp_path / "cache")), Shards(shards, "dev"))


def test_shards_that_are_made_anew_at_the_same_address_are_seen(server, shards, tmp_path):
    Shards(server.address, "dev", str(tmp_path / "cache")).read(0)
    make_shards(
        synthetic.clips(train=1, dev=3, test=1, size=36),
        tmp_path / "new",
        EncodeOptions(),
        {"name": "synthetic"},
        1,
    )
    server.folder = tmp_path / "new"
    assert_the_same(
        Shards(server.address, "dev", str(tmp_path / "cache")), Shards(tmp_path / "new", "dev")
    )


def test_the_cache_keeps_within_its_size(server, tmp_path):
    train = Shards(
        server.address, "train", str(tmp_path), cache_gib=256 * 6000 / 2**30
    )  # 6000 bytes a folder: a sample or two
    for i in range(len(train)):
        train.read(i)
    folders = {
        folder: sum(p.stat().st_size for p in folder.iterdir()) for folder in tmp_path.iterdir()
    }
    assert len(folders) > 5 and max(folders.values()) <= 6000


def test_of_a_full_cache_the_oldest_goes_first(server, tmp_path):
    for n in range(store.FOLDERS):
        old = tmp_path / f"{n:02x}/old"
        old.parent.mkdir()
        old.touch()
        os.truncate(old, 100_000)
        os.utime(old, (0, 0))
    train = Shards(
        server.address, "train", str(tmp_path), cache_gib=store.FOLDERS * 100_000 / 2**30
    )  # of some 10 kB a sample
    first = [train.read(i) for i in range(len(train))]
    asked = len(server.requests)
    assert [train.read(i) for i in range(len(train))] == first and len(server.requests) == asked
