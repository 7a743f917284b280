"""The command ``netslim inspect``: what can be slimmed, and, once there is a sparse model, what that can bear."""

from collections.abc import Sequence
from pathlib import Path

from netslim.launch.inspect.describe import describe
from netslim.launch.inspect.sparse import INSPECTION, PICTURE, format_inspection, inspect_sparse, largest_ratio
from netslim.launch.presets import PRESETS
from netslim.launch.run import SPARSE, is_complete, read_json, read_target, start


def inspect_run(target: str, flags: Sequence[str]) -> int:
    """Print the channels of a preset's or a run's network; of a run also what its sparse model bears, and draw it."""
    preset, config, flags = read_target("netslim inspect", target, flags)
    run = Path(target)
    is_trained = target not in PRESETS and is_complete(SPARSE.directory(run))
    print(describe(config, is_trained=is_trained), flush=True)
    if not is_trained:
        return 0
    code = start("netslim.launch.inspect", preset, flags, config, inspect_sparse, lambda: "inspect")
    if not code:
        from netslim.launch.pictures import draw_inspection  # here: matplotlib is imported only to draw

        found = read_json(run / INSPECTION)
        best = largest_ratio(found, config.inspect.loss)
        print(f"\n{format_inspection(found, config.inspect.loss)}\n{run / INSPECTION}")
        draw_inspection(found, best, run / PICTURE)
        print(run / PICTURE)
    return code
