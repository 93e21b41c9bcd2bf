"""Files from a URL, kept where torch.hub keeps its own, so that both find them."""

from __future__ import annotations

import hashlib
import http.client
import os
import re
import urllib.error
import urllib.parse
import urllib.request
import uuid
from pathlib import Path

import torch

_TIMEOUT_S = 20
_CHUNK_BYTES = 1 << 20
# As for torch.hub: `name-<first digits of the SHA-256>.pth`, eight digits or more.
_HASH_IN_NAME = re.compile(r"-([a-f0-9]{8,64})\.")


def download_url(url: str | tuple[str, str], cache_dir: str | Path | None = None) -> Path:
    """The file behind `url`, fetched unless it is in the cache already; a bar on a terminal shows the progress.

    Args:
        url: http(s), or (url, name of the file in the cache). A SHA-256 prefix in the name is checked.
        cache_dir: None is torch.hub's folder `checkpoints`.

    Raises:
        RuntimeError: it cannot be fetched, is cut off, is a web page, or has another hash; nothing is kept then.
        ValueError: there is no name for it in the cache.
    """
    url, filename = (url, urllib.parse.urlparse(url).path) if isinstance(url, str) else url
    filename = os.path.basename(filename)
    if not filename:
        raise ValueError(f"url={url!r} ends in no file's name; give (url, name)")
    folder = Path(torch.hub.get_dir(), "checkpoints") if cache_dir is None else Path(cache_dir).expanduser()
    path = folder / filename
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{filename}.{uuid.uuid4().hex}.partial"
    try:
        digest = _fetch(url, partial, filename)
        expected = _HASH_IN_NAME.search(filename)
        if expected and not digest.startswith(expected[1]):
            raise ValueError(f"its SHA-256 begins with {digest[: len(expected[1])]} instead of {expected[1]}")
        partial.replace(path)
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise RuntimeError(f"{url} could not be fetched: {_reason(error)}") from error
    finally:
        partial.unlink(missing_ok=True)
    return path


def _fetch(url: str, path: Path, title: str) -> str:
    """Writes the body to `path` and returns its SHA-256."""
    from huggingface_hub.utils import tqdm  # obeys HF_HUB_DISABLE_PROGRESS_BARS, as the hub's own downloads do

    digest, received = hashlib.sha256(), 0
    request = urllib.request.Request(url, headers={"User-Agent": "bbfast"})
    with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as response, open(path, "wb") as file:
        if response.headers.get_content_type() == "text/html":
            raise ValueError("the answer is a web page, not a file of weights")
        length = response.headers.get("Content-Length")
        total = None if length is None else int(length)
        with tqdm(total=total, unit="B", unit_scale=True, desc=title, disable=None) as bar:
            while chunk := response.read(_CHUNK_BYTES):
                file.write(chunk)
                digest.update(chunk)
                received += len(chunk)
                bar.update(len(chunk))
    if total is not None and received != total:
        raise ValueError(f"the connection ended after {received} of {total} bytes")
    return digest.hexdigest()


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"the server answers {error.code} {error.reason}"
    if isinstance(error, urllib.error.URLError):
        return str(error.reason)
    return str(error) or type(error).__name__
