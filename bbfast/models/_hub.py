"""Files from the Hugging Face hub, through its own client, cache and progress bar.

Where the hub is out of reach, its client asks five times over, for 23 seconds. So it is asked once here, and the client
is called only after an answer.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path


def split_revision(hub_id: str) -> tuple[str, str | None]:
    """`"owner/repository@revision"` as (owner/repository, revision); without `@` the revision is None.

    Raises:
        ValueError: there is more than one `@`, or nothing before it.
    """
    repository, _, revision = hub_id.partition("@")
    if "@" in revision or not repository:
        raise ValueError(f"hf_hub_id {hub_id!r} must be owner/repository or owner/repository@revision")
    return repository, revision or None


def download_from_hub(hub_id: str, filenames: Sequence[str], cache_dir: str | Path | None = None) -> Path:
    """The first of `filenames` that the repository has; from the cache if nothing newer is to be had.

    Args:
        hub_id: `owner/repository`, perhaps `@revision`: a branch, a tag or a commit.
        filenames: names within the repository, the preferred one first.
        cache_dir: None is the hub's own cache, see its HF_HOME and HF_HUB_CACHE.

    Raises:
        RuntimeError: nothing is in the cache, and the hub cannot be reached, HF_HUB_OFFLINE is set, the repository, its
            revision or all of the files are not there, it asks for a token, or what arrived has another SHA-256 than
            the hub says.
        ValueError: hub_id is malformed.
    """
    try:
        import huggingface_hub
        from huggingface_hub.utils import EntryNotFoundError, HFValidationError
    except ModuleNotFoundError as error:
        raise RuntimeError("this needs the package huggingface_hub, which is not installed") from error
    repository, revision = split_revision(hub_id)
    try:
        for filename in filenames:
            url = huggingface_hub.hf_hub_url(repository, filename, revision=revision)
            try:
                found = huggingface_hub.get_hf_file_metadata(url, timeout=huggingface_hub.constants.HF_HUB_ETAG_TIMEOUT)
            except EntryNotFoundError:
                continue
            cached = _cached(repository, [filename], found.commit_hash, cache_dir)
            return cached or _download(repository, filename, revision, cache_dir, found.etag)
    except HFValidationError as error:
        raise ValueError(f"hf_hub_id {hub_id!r} is not allowed: {_first_line(error)}") from error
    except Exception as error:  # the hub's errors and those of its HTTP client have no common base
        cached = _cached(repository, filenames, revision, cache_dir)
        if cached is None:
            raise RuntimeError(_explain(error, hub_id, filenames)) from error
        return cached
    raise RuntimeError(f"the repository {hub_id} on the Hugging Face hub has no file {' or '.join(filenames)}")


def _cached(repository: str, filenames: Sequence[str], revision: str | None, cache_dir) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    for filename in filenames:
        found = try_to_load_from_cache(repository, filename, cache_dir=cache_dir, revision=revision)
        if isinstance(found, str):  # else None, or a mark that the hub has no such file
            return Path(found)
    return None


def _download(repository: str, filename: str, revision: str | None, cache_dir, etag: str | None) -> Path:
    from huggingface_hub import hf_hub_download

    path = Path(hf_hub_download(repository, filename, revision=revision, cache_dir=cache_dir))
    if etag is not None and re.fullmatch("[0-9a-f]{64}", etag):  # the ETag of a large file is its SHA-256
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
        if digest.hexdigest() != etag:
            path.resolve().unlink()
            path.unlink(missing_ok=True)
            raise ValueError(f"what arrived has the SHA-256 {digest.hexdigest()} instead of {etag}")
    return path


def _explain(error: Exception, hub_id: str, filenames: Sequence[str]) -> str:
    from huggingface_hub import constants
    from huggingface_hub.utils import (
        GatedRepoError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    file = f"{filenames[0]} of {hub_id}"
    login = "log in with `hf auth login`, or set HF_TOKEN"
    if isinstance(error, OfflineModeIsEnabled):
        return f"{file} is not in the cache, and HF_HUB_OFFLINE forbids to ask the Hugging Face hub for it"
    if isinstance(error, GatedRepoError):
        return f"the Hugging Face hub gives {file} only to those who accepted its terms; {login}"
    if isinstance(error, RepositoryNotFoundError):
        return f"there is no repository {hub_id} on the Hugging Face hub, or it is private: then {login}"
    if isinstance(error, RevisionNotFoundError):
        return f"the repository on the Hugging Face hub has no such revision: {hub_id}"
    return (
        f"{file} is not in the cache, and could not be fetched from the Hugging Face hub, {constants.ENDPOINT} "
        f"({_first_line(error.__cause__ or error)})"
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
