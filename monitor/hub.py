"""Files of a repository of the Hugging Face hub, from its cache on this machine or from the hub.

Which files, the caller says: never a whole repository. The hub's own cache and its environment
(HF_HOME, HF_HUB_CACHE, HF_HUB_OFFLINE, HF_ENDPOINT, HF_TOKEN) are huggingface_hub's matter.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

# Base of what its HTTP client raises, httpx or httpx2 by its version; not in its public list.
from huggingface_hub.errors import HTTPError as HTTPError  # type: ignore[attr-defined]
from tqdm.std import tqdm

from monitor.errors import SAEStoreError

Progress = Callable[[str, float], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class HubAccess:
    """Where the hub and its cache are, where not where the environment says."""

    cache: Path | None = None
    endpoint: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """A repository's files at one commit, as far as they are on this machine."""

    folder: Path
    commit: str


def cached(repo: str, commit: str, names: Sequence[str], access: HubAccess) -> Snapshot | None:
    """The snapshot where all of `names` are on this machine; asks nobody else."""
    folder = None
    for name in names:
        found = huggingface_hub.try_to_load_from_cache(
            repo, name, cache_dir=access.cache, revision=commit
        )
        if not isinstance(found, str):
            return None
        folder = Path(found).parents[name.count("/")]
    return None if folder is None else Snapshot(folder=folder, commit=commit)


def download(
    repo: str,
    revision: str,
    *,
    allow: Sequence[str],
    ignore: Sequence[str],
    access: HubAccess,
    is_local_only: bool,
    progress: Progress,
) -> Snapshot:
    """Brings the files that match `allow` and not `ignore` to this machine, as far as they lack.

    Where the hub cannot be reached, what the cache holds of the revision is taken.

    Args:
        allow, ignore: fnmatch patterns of paths in the repository; `*` crosses slashes.
        is_local_only: looks in the cache and nowhere else.

    Raises:
        SAEStoreError: no such repository or revision, no access, or offline and not in the cache.
    """
    where = f"{repo}@{revision}"
    try:
        folder = huggingface_hub.snapshot_download(
            repo,
            revision=revision,
            cache_dir=access.cache,
            endpoint=access.endpoint,
            allow_patterns=list(allow),
            ignore_patterns=list(ignore),
            local_files_only=is_local_only,
            tqdm_class=_bars(f"downloading {repo}", progress),
        )
    except GatedRepoError as error:
        raise SAEStoreError(
            f"{where}: found a gated repository, expected access to it: accept its terms on its "
            "page of the hub, then `hf auth login` or HF_TOKEN"
        ) from error
    except RepositoryNotFoundError as error:
        raise SAEStoreError(
            f"{where}: found no such repository on the hub, expected another spelling, or access "
            "if it is private (`hf auth login` or HF_TOKEN)"
        ) from error
    except RevisionNotFoundError as error:
        raise SAEStoreError(
            f"{where}: found the repository without revision {revision!r}, expected a branch, tag "
            f"or commit of it{_branches(repo, access)}"
        ) from error
    except LocalEntryNotFoundError as error:
        if is_local_only:
            why = "the hub was not asked"
        elif constants.HF_HUB_OFFLINE:
            why = "HF_HUB_OFFLINE is set"
        else:
            why = f"the hub cannot be reached ({_reason(error)})"
        raise SAEStoreError(
            f"{where}: not complete in the hub's cache {_cache(access)}, and {why}; expected "
            "`sae-monitor bundle fetch` once with access to the hub, or that cache copied here"
        ) from error
    except (HTTPError, OSError, ValueError) as error:
        raise SAEStoreError(
            f"{where}: not to be had from the hub: {type(error).__name__}: {_reason(error)}"
        ) from error
    return Snapshot(folder=Path(folder), commit=Path(folder).name)


def siblings(repo: str, commit: str, path: str, access: HubAccess) -> list[str]:
    """What the repository has in the deepest folder of `path` that exists, by full path.

    Empty where the hub does not answer.
    """
    api = huggingface_hub.HfApi(endpoint=access.endpoint)
    parent: str | None = path
    while parent is not None:
        parent = parent.rpartition("/")[0] or None
        try:
            return [entry.path for entry in api.list_repo_tree(repo, parent, revision=commit)]
        except EntryNotFoundError:
            continue
        except (HTTPError, OSError, ValueError):
            break
    return []


def _branches(repo: str, access: HubAccess) -> str:
    try:
        refs = huggingface_hub.HfApi(endpoint=access.endpoint).list_repo_refs(repo)
    except (HTTPError, OSError, ValueError):
        return ""
    names = sorted(ref.name for ref in [*refs.branches, *refs.tags])
    return f"; it has {', '.join(names[:8])}" if names else ""


def _cache(access: HubAccess) -> str:
    return str(access.cache or constants.HF_HUB_CACHE)


def _reason(error: BaseException) -> str:
    cause = error.__cause__ or error
    return (str(cause).strip().splitlines() or [type(cause).__name__])[0]


def _bars(what: str, progress: Progress) -> type[tqdm]:
    """A class of progress bars that draw nothing and report to `progress` instead.

    huggingface_hub opens one that counts files and, in newer versions, others that count bytes,
    which say more.
    """
    shares: dict[str, float] = {}

    class Bar(tqdm):  # type: ignore[misc]  # tqdm has no types
        monitor_interval = 0  # no thread of tqdm's own

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "file": io.StringIO(), "disable": False})

        def display(self, msg: str | None = None, pos: int | None = None) -> bool:
            return True

        def __iter__(self) -> Iterator[Any]:
            # tqdm's own counts without `update` while too little time has passed to draw.
            for item in self.iterable:
                yield item
                self.update()
            self.close()

        def update(self, n: float | None = 1) -> bool | None:
            drawn: bool | None = super().update(n)
            # An unknown total is shown as a beginning. A small file that comes before the others'
            # sizes are known may be shown as all, for a moment.
            shares[self.unit] = min(1.0, self.n / self.total) if self.total else 0.0
            progress(what, shares.get("B", shares.get("it", 0.0)))
            return drawn

    return Bar
