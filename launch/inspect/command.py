"""The command ``netslim inspect``: what can be slimmed, and, once there is a sparse model, what that can bear."""

import os
from collections.abc import Sequence
from errno import EACCES
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from netslim.launch.inspect.describe import describe
from netslim.launch.inspect.sparse import (
    INSPECTION,
    OUT_VARIABLE,
    PICTURE,
    format_inspection,
    inspect_sparse,
    largest_ratio,
)
from netslim.launch.mistakes import naming, warn
from netslim.launch.presets import PRESETS
from netslim.launch.reading import take_path
from netslim.launch.run import SPARSE, is_complete, read_json, read_target, start


def inspect_run(target: str, flags: Sequence[str]) -> int:
    """Print the channels of a preset's or a run's network; of a run also what its sparse model bears, and draw it.

    What was found goes into ``--out``, by default the run's own directory. Where that cannot be written, it is printed
    alone, with a warning.
    """
    rest, out = take_path(flags, "--out", "a folder")
    run = Path(target)
    is_run = target not in PRESETS and run.is_dir()
    if out is not None and not is_run:
        raise ValueError("--out is for what is found in a run; name a run directory, or leave it out")
    preset, config, own = read_target("netslim inspect", target, rest)
    is_trained = is_run and is_complete(SPARSE.directory(run))
    print(describe(config, is_trained=is_trained), flush=True)
    if not is_trained:
        return 0
    if out is not None:
        with naming("--out", out):
            out.mkdir(parents=True, exist_ok=True)
            if not os.access(out, os.W_OK):  # now rather than at the end
                raise PermissionError(EACCES, os.strerror(EACCES), str(out))
    with TemporaryDirectory() as spare:
        is_kept = out is not None or os.access(run, os.W_OK)
        place = (out or run) if is_kept else Path(spare)
        work, environment = partial(inspect_sparse, out=place), {OUT_VARIABLE: str(place)}
        code = start(
            "netslim.launch.inspect", preset, own, config, work, lambda: "inspect", environment, reads_only=True
        )
        if not code:
            _show(place, config.inspect.loss, is_kept=is_kept)
    if not code and not is_kept:
        warn(
            f"{run} cannot be written, so that {INSPECTION} and {PICTURE} are not kept; "
            "name a folder for them with --out"
        )
    return code


def _show(place: Path, loss: float, *, is_kept: bool) -> None:
    found = read_json(place / INSPECTION)
    print(f"\n{format_inspection(found, loss)}")
    if is_kept:
        from netslim.launch.pictures import draw_inspection  # here: matplotlib is imported only to draw

        print(place / INSPECTION)
        draw_inspection(found, largest_ratio(found, loss), place / PICTURE)
        print(place / PICTURE)
