"""Where a bundle's SAEs are on this machine; brings those that live on the Hugging Face hub.

An SAE is in the bundle's folder, at a path that bundles share, in a repository of the hub, or in
the repository that a release of SAELens means. What is not in the bundle is compared with the
sha256 that sealing wrote down, file by file; `hash_cache` keeps a start from reading gigabytes for
that, and `again=True` reads them all the same.
"""

from __future__ import annotations

import difflib
import glob
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import structlog

from monitor.bundle import Bundle
from monitor.bundle_spec import HubRef, SAERef, Scalar
from monitor.errors import BundleError, SAEStoreError
from monitor.hash_cache import HashCache
from monitor.hub import HubAccess, Snapshot, cached, download, siblings
from monitor.model_store import Progress
from monitor.sae_releases import PublishedSAE, find_published, hints_of
from sae_core.errors import HookPointError
from sae_core.hook_points import HookPoint, parse_hook_point

log = structlog.get_logger(__name__)

SUFFIXES = (".json", ".safetensors", ".npz", ".pt", ".pth", ".yaml")
"""What SAE checkpoints are made of; cards, plots and code beside them are left where they are."""
WEIGHTS = (".safetensors", ".npz", ".pt", ".pth")
"""Of those, what holds tensors; without one there is no SAE."""
HASHES = "sae_hashes.json"
"""In the cache folder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SAEFiles:
    """One SAE on this machine."""

    path: Path
    """The folder or file that `load_sae` takes."""
    hints: Mapping[str, Scalar]
    """What `load_sae` must be told besides."""
    origin: str
    """Where it comes from, for a person: a path, or repository@commit and path."""
    commit: str | None
    """Of the repository; None for a path."""
    files: Mapping[str, Path]
    """By the name that the bundle lists: relative to `path`, or the file's own."""


def find_saes(
    bundle: Bundle,
    *,
    cache: Path,
    hub: HubAccess | None = None,
    is_local_only: bool = False,
    again: bool = False,
    progress: Progress = lambda what, share: None,
) -> dict[str, SAEFiles]:
    """The SAEs of the bundle by id, downloaded where they lack and compared with their sha256.

    Args:
        cache: where hashes are kept between starts.
        is_local_only: takes what is on this machine and asks no hub.
        again: hashes files even where they seem unchanged since the last time.

    Raises:
        SAEStoreError: nowhere to be found, or not the files that the bundle was sealed with.
        BundleError: the bundle reads another hook point than the release was trained on.
    """
    hashes = HashCache(cache / HASHES)
    found = {}
    for sae_id, ref in bundle.spec.saes.items():
        try:
            _check_published(sae_id, ref, bundle.spec.model.id)
            files = locate(
                ref,
                bundle.folder,
                hub=hub or HubAccess(),
                is_local_only=is_local_only,
                progress=progress,
            )
            verify(ref, files, hashes, again=again, progress=progress)
        except SAEStoreError as error:
            raise SAEStoreError(f"saes.{sae_id}: {error}") from error
        if not ref.is_fixed:
            log.warning(
                "sae_not_pinned",
                sae=sae_id,
                revision=ref.revision,
                commit=files.commit,
                consequence="the repository may change under it; sealing the bundle pins it",
            )
        found[sae_id] = files
    return found


def locate(
    ref: SAERef,
    bundle_folder: Path,
    *,
    hub: HubAccess,
    is_local_only: bool = False,
    progress: Progress = lambda what, share: None,
) -> SAEFiles:
    """The files of one SAE, downloaded where they lack; not compared with anything.

    Raises:
        SAEStoreError: nowhere to be found.
    """
    if ref.path is not None:
        path = bundle_folder / ref.path
        return SAEFiles(
            path=path,
            hints=ref.hints,
            origin=ref.path,
            commit=None,
            files=_files_of(path, _subfolder(ref.hints), is_deep=True),
        )
    place, hints = hub_place(ref)
    snapshot = _fetch(ref, place, _subfolder(hints), hub, is_local_only, progress)
    path = snapshot.folder if place.path == "." else snapshot.folder / place.path
    files = _files_of(path, _subfolder(hints), is_deep=place.path != ".")
    if not any(file.suffix in WEIGHTS for file in files.values()):
        raise _not_there(place, snapshot, hub, is_local_only)
    return SAEFiles(
        path=path,
        hints=hints,
        origin=f"{place.repo}@{snapshot.commit}:{place.path}",
        commit=snapshot.commit,
        files=files,
    )


def verify(
    ref: SAERef,
    found: SAEFiles,
    hashes: HashCache,
    *,
    again: bool = False,
    progress: Progress = lambda what, share: None,
) -> None:
    """Compares the files with the sha256 that the bundle lists, if it lists any.

    Raises:
        SAEStoreError: a file differs or is missing; or one has come to a path that bundles share,
            where no commit says what belongs there.
    """
    for name, expected in ref.files.items():
        if name not in found.files:
            fetch = "" if found.commit is None else " (`sae-monitor bundle fetch` brings it)"
            raise SAEStoreError(
                f"{found.origin}: {name}: found no such file in {found.path}, expected the one of "
                f"sha256 {expected[:16]}... that the bundle was sealed with{fetch}"
            )
        digest = hash_file(found.files[name], hashes, again=again, progress=progress)
        if digest != expected:
            raise SAEStoreError(
                f"{found.origin}: {name}: found sha256 {digest[:16]}..., expected "
                f"{expected[:16]}... that the bundle was sealed with; restore "
                f"{found.files[name].resolve()} (of the hub's cache: delete it, then "
                "`sae-monitor bundle fetch`), or take `files` out of bundle.yaml and seal again "
                "to accept what is there"
            )
    for name in found.files:
        if ref.files and found.commit is None and name not in ref.files:
            raise SAEStoreError(
                f"{found.origin}: {name}: found a file that the bundle was not sealed with in "
                f"{found.path}, expected {', '.join(ref.files)}"
            )


def hash_file(file: Path, hashes: HashCache, *, again: bool = False, progress: Progress) -> str:
    """sha256 of a file of an SAE; SAEStoreError where it cannot be read."""
    try:
        return hashes.sha256(
            file, again=again, report=lambda share: progress(f"checking {file.name}", share)
        )
    except OSError as error:
        raise SAEStoreError(f"{file}: cannot be read ({error.strerror})") from error


def hub_place(ref: SAERef) -> tuple[HubRef, dict[str, Scalar]]:
    """Repository, revision and path of an SAE on the hub, and the hints that go with it.

    Raises:
        SAEStoreError: an unknown release or id.
    """
    if ref.hub is not None:
        return ref.hub, {**hints_of(ref.hub.repo, ref.hub.path), **ref.hints}
    published = _published(ref)
    assert published is not None and ref.saelens is not None, "neither hub nor saelens"
    place = HubRef(repo=published.repo, path=published.path, revision=ref.saelens.revision)
    return place, {**published.hints, **ref.hints}


def _published(ref: SAERef) -> PublishedSAE | None:
    return None if ref.saelens is None else find_published(ref.saelens.release, ref.saelens.id)


def _check_published(sae_id: str, ref: SAERef, model_id: str) -> None:
    """Compares what the bundle says of a released SAE with what its release says."""
    published = _published(ref)
    if published is None or ref.saelens is None:
        return
    expected = ref.hints.get("hook_point", published.hook_point)
    if expected is not None and not _same_place(ref.hook_point, str(expected)):
        raise BundleError(
            f"saes.{sae_id}.hook_point: found {ref.hook_point}, expected {expected}, where the "
            f"SAEs of {ref.saelens.release} were trained (hints.hook_point overrules it)"
        )
    model = published.model
    if model is not None and "/" in model and model.lower() != model_id.lower():
        log.warning(
            "sae_of_another_model",
            sae=sae_id,
            found=model_id,
            expected=model,
            consequence="it may explain this model's stream less well; see its fidelity",
        )


def _same_place(a: str, b: str) -> bool:
    try:
        return _stream(parse_hook_point(a)) == _stream(parse_hook_point(b))
    except HookPointError:
        return a == b


def _stream(point: HookPoint) -> tuple[int, str]:
    """What leaves a block enters the next one: the same stream under two names."""
    if point.site == "resid_post":
        return point.layer + 1, "resid_pre"
    return point.layer, point.site


def _subfolder(hints: Mapping[str, Scalar]) -> str | None:
    value = hints.get("subfolder")
    return None if value is None else str(value).strip("/")


def _fetch(
    ref: SAERef,
    place: HubRef,
    subfolder: str | None,
    hub: HubAccess,
    is_local_only: bool,
    progress: Progress,
) -> Snapshot:
    if ref.is_fixed and ref.files:
        # Sealed: if the files are here, nobody needs to be asked.
        names = _in_repository(place.path, ref.files)
        if (snapshot := cached(place.repo, place.revision, names, hub)) is not None:
            return snapshot
    allow, ignore = _patterns(place.path, subfolder)
    return download(
        place.repo,
        place.revision,
        allow=allow,
        ignore=ignore,
        access=hub,
        is_local_only=is_local_only,
        progress=progress,
    )


def _in_repository(path: str, listed: Mapping[str, str]) -> list[str]:
    """Full paths of the listed files: below the folder `path`, or beside the file `path`."""
    # A checkpoint that is one file lists its own name; a folder's name tells nothing: some end
    # in .pt.
    is_file = path.rpartition("/")[2] in listed
    folder = path.rpartition("/")[0] if is_file else path.removeprefix(".")
    return [f"{folder}/{name}" if folder else name for name in listed]


def _patterns(path: str, subfolder: str | None) -> tuple[list[str], list[str]]:
    """What to download of a repository, and what not although it matches that."""
    if path == ".":
        allow = [f"*{suffix}" for suffix in SUFFIXES]
        if subfolder is None:
            return allow, ["*/*"]
        below = glob.escape(subfolder)
        return [f"{below}/*{suffix}" for suffix in SUFFIXES], []
    exact = glob.escape(path)
    below = exact if subfolder is None else f"{exact}/{glob.escape(subfolder)}"
    allow = [exact, *(f"{below}/*{suffix}" for suffix in SUFFIXES)]
    return [*allow, *(glob.escape(name) for name in _companions(path))], []


def _companions(path: str) -> tuple[str, ...]:
    """Files that may lie beside a single-file checkpoint and say how it is read."""
    if Path(path).suffix not in SUFFIXES:
        return ()
    parent = path.rpartition("/")[0]
    beside = f"{parent}/" if parent else ""
    return (path.removesuffix(Path(path).suffix) + "_cfg.json", f"{beside}config.yaml")


def _files_of(path: Path, subfolder: str | None, *, is_deep: bool) -> dict[str, Path]:
    """The files at `path` that make an SAE, in order of name; empty where there are none."""
    if path.is_file():
        beside = (path.with_name(Path(name).name) for name in _companions(path.name))
        return {file.name: file for file in (path, *beside) if file.is_file()}
    root = path if subfolder is None else path / subfolder
    below = root.rglob("*") if is_deep or subfolder is not None else root.glob("*")
    return {
        file.relative_to(path).as_posix(): file
        for file in sorted(below)
        if file.suffix in SUFFIXES and file.is_file()
    }


def _not_there(
    place: HubRef, snapshot: Snapshot, hub: HubAccess, is_local_only: bool
) -> SAEStoreError:
    where = f"{place.repo}@{snapshot.commit}"
    names: Sequence[str] = []
    if not is_local_only:
        names = siblings(place.repo, snapshot.commit, place.path, hub)
        if place.path in names:
            return SAEStoreError(
                f"{where}: {place.path}: found no tensors in it, expected a file that ends in one "
                f"of {', '.join(WEIGHTS)}"
            )
    if names:
        near = difflib.get_close_matches(place.path, names, n=5, cutoff=0.3) or names[:5]
        return SAEStoreError(f"{where}: found no {place.path}, near: {', '.join(near)}")
    held = sorted(
        file.relative_to(snapshot.folder).as_posix()
        for file in snapshot.folder.rglob("*")
        if file.is_file()
    )
    near = difflib.get_close_matches(place.path, held, n=5, cutoff=0.3) or held[:5]
    return SAEStoreError(
        f"{where}: found no {place.path} in the hub's cache, which holds "
        f"{', '.join(near) or 'nothing'} of this commit; expected `sae-monitor bundle fetch` once "
        "with access to the hub"
    )
