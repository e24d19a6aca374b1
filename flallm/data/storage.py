"""Byte ranges of files on a disk or at any address that fsspec opens (https://, s3://, ...).

Failed requests are retried, and ranges can be cached in a local folder of limited size. Nothing
here checks the bytes: the caller has a checksum.
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

MAX_RETRIES = 4
BACKOFF_S = 0.5  # before the first retry, doubled each time
FOLDERS = 256  # of a cache


def absolute(root: str) -> str:
    """The absolute path of a folder. An address such as s3://bucket/shards is returned as it is."""
    return root if "://" in root else str(Path(root).expanduser().absolute())


class Storage:
    """Reads ranges of the files in a folder or at an address.

    cache: a local folder for ranges that were read, "" for none. It holds up to `cache_gib`; the
    oldest are evicted first. Whole files are not cached: they may be replaced at their address, and
    only the index that is read tells.

    Raises UserError for an address that cannot be opened.
    """

    def __init__(self, root: str, cache: str = "", cache_gib: float = 100.0):
        try:
            self.files, self.root = fsspec.core.url_to_fs(root)
        except (ValueError, ImportError) as error:  # unknown protocol, or its package is missing
            raise UserError(f"{root} cannot be opened: {error}") from None
        protocols = self.files.protocol
        if isinstance(protocols, str):
            protocols = (protocols,)
        self.local = "file" in protocols
        self.cache = None if self.local or not cache else Path(cache)
        self.folder_bytes = cache_gib * 2**30 / FOLDERS

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """The bytes from start to stop. Raises FileNotFoundError, or OSError after all tries."""
        cached = self.cache_path(name, start, stop)
        if cached is None:
            return self._fetch(name, start, stop)
        with contextlib.suppress(OSError):
            return cached.read_bytes()
        content = self._fetch(name, start, stop)
        with contextlib.suppress(OSError):  # a full disk costs the cache, not the clip
            self._write_to_cache(cached, content)
        return content

    def open(self, name: str) -> BinaryIO:
        """A file to read and seek in."""
        return self.files.open(f"{self.root}/{name}", "rb")

    def cache_path(self, name: str, start: int, stop: int | None) -> Path | None:
        """Where the cache holds a range. None without a cache and for a whole file."""
        if self.cache is None or stop is None:
            return None
        address = f"{self.root}/{name}:{start}-{stop}"
        digest = hashlib.blake2b(address.encode(), digest_size=16).hexdigest()
        return self.cache / digest[:2] / digest[2:]

    def evict(self, name: str, start: int, stop: int) -> bool:
        """Removes a corrupt range from the cache. Returns whether the cache held it."""
        cached = self.cache_path(name, start, stop)
        if cached is None or not cached.exists():
            return False
        cached.unlink(missing_ok=True)
        return True

    def _fetch(self, name: str, start: int, stop: int | None) -> bytes:
        path = f"{self.root}/{name}"
        if self.local:
            with open(path, "rb") as file:
                if stop is None:
                    stop = os.fstat(file.fileno()).st_size
                return os.pread(file.fileno(), stop - start, start)
        for attempt in range(MAX_RETRIES):
            try:
                return self.files.cat_file(path, start=start or None, end=stop)
            except (FileNotFoundError, PermissionError):
                raise
            except Exception as error:  # each protocol has its own types
                cause = f"{type(error).__name__}: {error}"
                if attempt == MAX_RETRIES - 1:
                    raise OSError(
                        f"{path} cannot be read after {MAX_RETRIES} tries: {cause}"
                    ) from None
            time.sleep(BACKOFF_S * 2**attempt)
        raise AssertionError

    def _write_to_cache(self, path: Path, content: bytes) -> None:
        """Writes a range, then evicts the oldest files of its folder that are over the limit."""
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
            with contextlib.suppress(FileNotFoundError):  # another worker has evicted it
                stat = file.stat()
                files.append((stat.st_mtime, stat.st_size, file))
        total = sum(size for _, size, _ in files)
        for _, size, file in sorted(files):
            if total <= self.folder_bytes:
                break
            file.unlink(missing_ok=True)
            total -= size
