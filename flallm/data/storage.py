"""Bytes of a range of a file, wherever it lies: a disk, or any address that fsspec opens with range reads (https://, s3://, …).

Reads are tried again when the other side fails, and can be kept in a local folder of limited size. Nothing here trusts what
comes back: whoever asks has a checksum.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from pathlib import Path
from typing import BinaryIO

import fsspec

from flallm.utils import UserError

MAX_RETRIES, BACKOFF_S = 4, 0.5  # seconds, doubled each time
FOLDERS = 256  # of a cache


def absolute(root: str) -> str:
    """A folder's path for use from any folder; an address such as s3://bucket/shards stays."""
    return root if "://" in root else str(Path(root).expanduser().absolute())


class Storage:
    """Ranges of the files in one folder or under one address.

    cache: a local folder that keeps what was read ("" for none), up to cache_gib; the oldest go first. Whole files are not kept:
    what lies at an address may be made anew, and its index tells.
    """

    def __init__(self, root: str, cache: str = "", cache_gib: float = 100.0):
        try:
            self.files, self.root = fsspec.core.url_to_fs(root)
        except (ValueError, ImportError) as error:  # no such protocol, or its package is not there
            raise UserError(f"{root} cannot be opened: {error}") from None
        self.local = "file" in (self.files.protocol if isinstance(self.files.protocol, tuple) else (self.files.protocol,))
        self.cache, self.folder_bytes = None if self.local or not cache else Path(cache), cache_gib * 2**30 / FOLDERS

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """The bytes from start to stop. Raises FileNotFoundError, or OSError when all tries have failed."""
        kept = self._kept(name, start, stop)
        if kept:
            try:
                return kept.read_bytes()
            except OSError:
                pass
        content = self._fetch(name, start, stop)
        if kept:
            with contextlib.suppress(OSError):  # a full disk costs the cache, not the clip
                self._keep(kept, content)
        return content

    def open(self, name: str) -> BinaryIO:
        """A file to read and seek in."""
        return self.files.open(f"{self.root}/{name}", "rb")

    def forget(self, name: str, start: int, stop: int) -> bool:
        """Drops a range from the cache, because it is not what it should be; whether it was there."""
        kept = self._kept(name, start, stop)
        if not kept or not kept.exists():
            return False
        kept.unlink(missing_ok=True)
        return True

    def _fetch(self, name: str, start: int, stop: int | None) -> bytes:
        path = f"{self.root}/{name}"
        if self.local:
            with open(path, "rb") as file:
                return os.pread(file.fileno(), (os.fstat(file.fileno()).st_size if stop is None else stop) - start, start)
        wait = BACKOFF_S
        for attempt in range(MAX_RETRIES):
            try:
                return self.files.cat_file(path, start=start or None, end=stop)
            except (FileNotFoundError, PermissionError):
                raise
            except Exception as error:  # each protocol has its own
                if attempt == MAX_RETRIES - 1:
                    raise OSError(f"{path} cannot be read after {MAX_RETRIES} tries: {type(error).__name__}: {error}") from None
            time.sleep(wait)
            wait *= 2
        raise AssertionError

    def _kept(self, name: str, start: int, stop: int | None) -> Path | None:
        if self.cache is None or stop is None:
            return None
        digest = hashlib.blake2b(f"{self.root}/{name}:{start}-{stop}".encode(), digest_size=16).hexdigest()
        return self.cache / digest[:2] / digest[2:]

    def _keep(self, path: Path, content: bytes) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.part")
        try:
            part.write_bytes(content)
            part.rename(path)
        except OSError:
            part.unlink(missing_ok=True)
            raise
        files = []
        for file in path.parent.iterdir():
            try:
                files.append((file.stat().st_mtime, file.stat().st_size, file))
            except FileNotFoundError:  # another worker was quicker
                continue
        size = sum(s for _, s, _ in files)
        for _, s, file in sorted(files):
            if size <= self.folder_bytes:
                break
            file.unlink(missing_ok=True)
            size -= s
