"""Images to .beton files, once: written beside their place, renamed when complete, found again by a key."""

import hashlib
import json
import shutil
import sys
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from errno import EEXIST, ENOSPC, ENOTEMPTY
from pathlib import Path
from typing import Any

from tqdm import tqdm

from netslim.base import exclusive, flush
from netslim.data.sources import DataConfig, Source, Split, open_source
from netslim.data.store.info import SPLITS, DataInfo, LoaderName, read_info, sha256, verify
from netslim.data.store.scan import Statistics, decoded

_FORMAT = 1  # raise when the same settings give other bytes


def prepare(config: DataConfig, *, quiet: bool, check: bool = True) -> DataInfo:
    """The data that `config` names, written where it is not there yet.

    Any number of processes may call it at once: one writes, the others wait. With `check` every file is read to its
    end and compared with its hash; one process of a node is enough for that. Raises ValueError for bad images,
    settings or damaged files, OSError when there is no room or no permission; by then nothing half written is left.
    """
    loader = choose_loader(config)
    source = open_source(config)
    directory = _directory(config, source, loader)
    if not directory.is_dir():
        with _explained(config.cache):
            config.cache.mkdir(parents=True, exist_ok=True)
            with exclusive(config.cache / f"{directory.name}.lock") as alone:
                if not directory.is_dir():
                    if alone:
                        _sweep(directory)
                    _write(directory, source, config, loader, quiet)
    return verify(directory) if check else read_info(directory)[0]


def prepared(config: DataConfig) -> DataInfo | None:
    """What is known of the data that `config` names, where it was written before; None where it was not."""
    try:
        source = open_source(replace(config, download=False))
        directory = _directory(config, source, choose_loader(config))
        return read_info(directory)[0] if directory.is_dir() else None
    except (ValueError, OSError):  # the images may be gone
        return None


def _directory(config: DataConfig, source: Source, loader: LoaderName) -> Path:
    return config.cache / f"{config.source}-{_key(config, source, loader)}"


def choose_loader(config: DataConfig) -> LoaderName:
    """The loader that "auto" stands for here; warns when it is the slower one.

    Raises ValueError when ffcv is asked for by name and cannot be imported.
    """
    if config.loader == "torch" or config.loader == "device":
        return config.loader
    try:
        from netslim.data import ffcv_door  # noqa: F401
    except (ImportError, OSError) as error:
        remedy = "pip install 'netslim[ffcv]' after pkg-config, libopencv-dev and libturbojpeg0-dev"
        if config.loader == "ffcv":
            raise ValueError(f"ffcv cannot be imported ({error}); {remedy}, or --data.loader torch") from error
        warnings.warn(f"ffcv cannot be imported ({error}): images load slower, by torch; {remedy}", stacklevel=3)
        return "torch"
    return "ffcv"


def _key(config: DataConfig, source: Source, loader: str) -> str:
    """Names everything that the stored pixels and figures depend on."""
    quality = config.quality if loader == "ffcv" else None
    parts = [_FORMAT, config.source, source.fingerprint, config.size, quality, loader]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


@contextmanager
def _explained(cache: Path) -> Iterator[None]:
    """Adds what to do to the errors of a cache that cannot be written."""
    try:
        yield
    except (PermissionError, NotADirectoryError, FileExistsError) as error:
        raise OSError(
            error.errno, f"{cache} cannot be written ({error.strerror}); name another folder with --data.cache"
        ) from error
    except OSError as error:
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
        statistics = Statistics()
        files: dict[str, dict[str, Any]] = {}
        if loader == "ffcv":
            _check_room(config, len(source.train) + len(source.test))
        for name in SPLITS:
            split: Split = getattr(source, name)
            images = _counted(name, split, statistics if name == "train" else None, quiet)
            if loader == "ffcv":
                from netslim.data.store.beton import write_beton

                path = scratch / f"{name}.beton"
                write_beton(path, images, len(split), config.size, config.quality)
                files[path.name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
                flush(path)
            elif name == "train":  # the other loaders read the images themselves: only the figures are needed
                for _ in images:
                    pass
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


def _counted(name: str, split: Split, statistics: Statistics | None, quiet: bool) -> Iterator[tuple[Any, int]]:
    """The images of a split in order, with a progress bar, added to `statistics` on their way."""
    hidden = quiet or not sys.stderr.isatty()
    with tqdm(total=len(split), desc=f"writing {name}", unit=" images", disable=hidden) as bar:
        for image, label, sums in decoded(split, with_sums=statistics is not None):
            if statistics is not None:
                statistics.add(sums)
            yield image, label
            bar.update()


def _check_room(config: DataConfig, num: int) -> None:
    """Raises OSError when the disk cannot hold the files: now rather than an hour later."""
    per_image = 3 * config.size**2
    if config.quality is not None:
        per_image //= 8  # typical of JPEG; a wrong guess is found when the disk is full
    need = num * (per_image + 64) + 8 * 2**20  # with the index and the pages' rest
    free = shutil.disk_usage(config.cache).free
    if free < need:
        raise _no_room(config.cache, f"about {need / 2**20:,.0f} MiB are needed, {free / 2**20:,.0f} MiB are free")
