"""Images to .beton files, once: written beside their place, renamed when complete, found again by a key."""

import hashlib
import json
import shutil
import sys
import uuid
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from errno import EACCES, EEXIST, ENOSPC, ENOTDIR, ENOTEMPTY, EPERM, EROFS
from pathlib import Path
from typing import Any

from tqdm import tqdm

from netslim.base import exclusive, flush
from netslim.data.pixels import Reading, UnreadableError
from netslim.data.sources import DataConfig, open_source, spare_cache
from netslim.data.splits import Source, Split
from netslim.data.store.findings import Findings
from netslim.data.store.info import SPLITS, DataInfo, LoaderName, read_info, sha256, verify
from netslim.data.store.older import RULES, choose_place
from netslim.data.store.scan import Statistics, decoded

_FORMAT = 1  # raise when the same settings give other bytes
_NOT_TO_BE_WRITTEN = (EACCES, EPERM, EROFS, ENOTDIR, EEXIST)
_REMEDY = "pip install 'netslim[ffcv]' after pkg-config, libopencv-dev and libturbojpeg0-dev"


def prepare(config: DataConfig, *, quiet: bool, check: bool = True) -> DataInfo:
    """The data that `config` names, written where it is not there yet.

    Any number of processes may call it at once: one writes, the others wait. With `check` every file is read to its
    end and compared with its hash; one process of a node is enough for that. Raises ValueError for bad images,
    settings or damaged files, OSError when there is no room or no permission; by then nothing half written is left.
    """
    loader = choose_loader(config)
    source = open_source(config)
    directory = _place(config, source, loader, quiet)
    with _explained(config.cache):
        if not directory.is_dir():
            config.cache.mkdir(parents=True, exist_ok=True)
            with exclusive(config.cache / f"{directory.name}.lock") as alone:
                if not directory.is_dir():
                    if alone:
                        _sweep(directory)
                    _write(directory, source, config, loader, quiet)
    info = verify(directory) if check else read_info(directory)[0]
    return replace(info, notes=(*source.notes, *info.notes, *notes_here(config)))


def prepared(config: DataConfig) -> DataInfo | None:
    """What is known of the data that `config` names, where it was written before; None where it was not."""
    try:
        directory, _ = stored(config, open_source(replace(config, download=False)))
        return read_info(directory)[0] if directory.is_dir() else None
    except (ValueError, OSError):  # the images may be gone
        return None


def stored(config: DataConfig, source: Source) -> tuple[Path, int]:
    """Where `prepare` writes, or has written, what it keeps of the images, and about how many bytes of .beton files."""
    loader = choose_loader(config)
    num = len(source.train) + len(source.test)
    return _place(config, source, loader, quiet=True), _room(config, num) if loader == "ffcv" else 0


def choose_loader(config: DataConfig) -> LoaderName:
    """The loader that "auto" stands for here: the slower one where ffcv cannot be imported, as `prepare` notes.

    Raises ValueError when ffcv is asked for by name and cannot be imported.
    """
    if config.loader == "torch" or config.loader == "device":
        return config.loader
    why = _why_no_ffcv()
    if why is not None and config.loader == "ffcv":
        raise ValueError(f"ffcv cannot be imported ({why}); {_REMEDY}, or --data.loader torch")
    return "ffcv" if why is None else "torch"


def _why_no_ffcv() -> str | None:
    try:
        from netslim.data import ffcv_door  # noqa: F401
    except (ImportError, OSError) as error:
        return str(error)
    return None


def notes_here(config: DataConfig) -> list[str]:
    """What of the configuration cannot be had on this machine, in a line each."""
    loader, lines = choose_loader(config), []
    if config.loader == "auto" and loader == "torch":
        unread = f", and data.quality {config.quality} is not read" * (config.quality is not None)
        lines.append(f"ffcv cannot be imported ({_why_no_ffcv()}): images load slower, by torch{unread}; {_REMEDY}")
    if loader == "ffcv":
        from netslim.data.ffcv_door import most_threads

        if config.num_workers > most_threads():
            threads = f"{most_threads()} threads decode"
            lines.append(f"data.num_workers {config.num_workers} is more than there are: {threads}")
    if config.cache == spare_cache():
        lines.append(f"nobody knows a home of this user, so that {config.cache} is the cache; name one by --data.cache")
    return lines


def _place(config: DataConfig, source: Source, loader: str, quiet: bool) -> Path:
    first, second = (
        config.cache / f"{config.source}-{_key(config, source, loader, rules)}" for rules in ([], [{"rules": RULES}])
    )
    return choose_place(first, second, source, quiet) if config.source == "folder" else first


def _key(config: DataConfig, source: Source, loader: str, rules: list[Any]) -> str:
    """Names everything that the stored pixels and figures depend on."""
    quality = config.quality if loader == "ffcv" else None
    usual = vars(Reading(config.size))
    # only what differs, so that what was written before there were these fields is found again
    changed = {name: value for name, value in vars(config.reading).items() if value != usual[name]}
    if config.source != "folder":
        changed = {name: value for name, value in changed.items() if name == "fit"}
    parts = [_FORMAT, config.source, source.fingerprint, config.size, quality, loader, *rules]
    return hashlib.sha256(json.dumps([*parts, *([changed] if changed else [])]).encode()).hexdigest()[:12]


@contextmanager
def _explained(cache: Path) -> Iterator[None]:
    """Adds what to do to the errors of a cache that cannot be written."""
    try:
        yield
    except OSError as error:
        if error.errno in _NOT_TO_BE_WRITTEN:
            why = f"{cache} cannot be written ({error.strerror}); name another folder with --data.cache"
            raise OSError(error.errno, why) from error
        if error.errno != ENOSPC or "--data.cache" in str(error):
            raise
        raise _no_room(cache, "it filled up while the data was written") from error


def _no_room(cache: Path, why: str) -> OSError:
    return OSError(ENOSPC, f"no room in {cache}: {why}; free some or name another folder with --data.cache")


def _sweep(directory: Path) -> None:
    """Removes what killed writers left; only under the lock, when no writer can be alive."""
    for left in directory.parent.glob(f".{directory.name}.*"):
        shutil.rmtree(left, ignore_errors=True)


def _write(directory: Path, source: Source, config: DataConfig, loader: str, quiet: bool) -> None:
    scratch = directory.parent / f".{directory.name}.{uuid.uuid4().hex[:8]}"
    scratch.mkdir()
    try:
        statistics, findings = Statistics(), Findings()
        files: dict[str, dict[str, Any]] = {}
        bad: list[tuple[str, str]] = []
        num = len(source.train) + len(source.test)
        if loader == "ffcv":
            _check_room(config, num)
        for name in SPLITS:
            split: Split = getattr(source, name)
            images = _counted(name, split, statistics if name == "train" else None, findings, quiet)
            try:
                with closing(images):
                    if loader == "ffcv" and not bad:
                        files |= _write_split(scratch / f"{name}.beton", images, len(split), config)
                    else:  # for the other loaders only the figures, and whether all can be read
                        deque(images, maxlen=0)
            except UnreadableError as error:
                bad += error.files
        if bad:
            raise UnreadableError(bad, num)
        mean, std = statistics.mean_std()
        info = {
            "loader": loader,
            "classes": source.classes,
            "num_train": len(source.train),
            "num_test": len(source.test),
            "mean": mean,
            "std": std,
            "size": config.size,
            "files": files,
        }
        if config.source == "folder":  # not of the others, which an older netslim shall go on reading
            info |= {"reading": RULES, "notes": findings.notes(config.fit)}
        (scratch / "info.json").write_text(json.dumps(info, indent=1) + "\n")
        flush(scratch / "info.json")
        flush(scratch)
        try:
            scratch.rename(directory)
        except OSError as error:  # without locks another writer may be first: the same key, the same content
            if error.errno not in (EEXIST, ENOTEMPTY):
                raise
        flush(directory.parent)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _write_split(
    path: Path, images: Iterator[tuple[Any, int]], num: int, config: DataConfig
) -> dict[str, dict[str, Any]]:
    """The file's size and hash, by its name."""
    from netslim.data.store.beton import write_beton  # here: ffcv may be missing

    write_beton(path, images, num, config.size, config.quality)
    flush(path)
    return {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)}}


def _counted(
    name: str, split: Split, statistics: Statistics | None, findings: Findings, quiet: bool
) -> Generator[tuple[Any, int]]:
    """The images of a split in order, with a progress bar, added to `statistics` and `findings` on their way."""
    hidden = quiet or not sys.stderr.isatty()
    bar = tqdm(total=len(split), desc=f"writing {name}", unit=" images", disable=hidden)
    with bar, closing(decoded(split, with_sums=statistics is not None)) as found:
        for each in found:
            if statistics is not None:
                statistics.add(each.sums)
            findings.add(each.seen)
            yield each.image, each.label
            bar.update()


def _room(config: DataConfig, num: int) -> int:
    """About how many bytes the files of so many images take."""
    per_image = 3 * config.size**2
    if config.quality is not None:
        per_image //= 8  # typical of JPEG; a wrong guess is found when the disk is full
    return num * (per_image + 64) + 8 * 2**20  # with the index and the pages' rest


def _check_room(config: DataConfig, num: int) -> None:
    """Raises OSError when the disk cannot hold the files: now rather than an hour later."""
    need, free = _room(config, num), shutil.disk_usage(config.cache).free
    if free < need:
        raise _no_room(config.cache, f"about {need / 2**20:,.0f} MiB are needed, {free / 2**20:,.0f} MiB are free")
