"""How much memory each stage of a run takes at its peak, in one process and in two.

python tests/bench/bench_memory.py [--repeats 3] [--processes 1 2] [flags of `netslim sparsify digits`]
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import psutil
from results import Cell, Results, new_parser, take_turns

NETSLIM = (sys.executable, "-c", "import sys; from netslim.launch.cli import main; sys.exit(main())")
STAGES = ("sparsify", "prune", "repair", "finetune")
SHORT = "--sparsify.epochs 2 --finetune.epochs 1 --prune.ratio 0.5 --record.wandb disabled"
SAMPLING_SECONDS = 0.02
ABOUT = f"""Each stage of `netslim run digits` by a command of its own (`netslim sparsify digits` and so on), in one
process and in two, beside a process that only imports netslim. Biggest process: the system's own record of the largest
resident size (ru_maxrss of the command and all that it waited for). All processes: the largest sum of resident sizes
over the command and its descendants, launcher included, sampled every {1e3 * SAMPLING_SECONDS:.0f} ms; libraries that
processes share are counted in each. Few epochs, since a peak needs no more: `{SHORT}`."""


def peaks(command: Sequence[str]) -> tuple[float, float, float]:
    """MB of the biggest process, MB of all processes together, and seconds of a command."""
    started = time.perf_counter()
    process = psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    together = 0
    while True:
        ended, status, usage = os.wait4(process.pid, os.WNOHANG)
        if ended:
            break
        together = max(together, resident(process))
        time.sleep(SAMPLING_SECONDS)
    code = os.waitstatus_to_exitcode(status)
    if code:
        sys.exit(f"{' '.join(command)} ended with exit code {code}")
    return usage.ru_maxrss * 1024 / 1e6, together / 1e6, time.perf_counter() - started


def resident(process: psutil.Popen) -> int:
    """Bytes of a process and its descendants now; of those that end meanwhile, none."""
    total = 0
    for each in (process, *process.children(recursive=True)):
        try:
            total += each.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total


def run_stages(num_processes: int, flags: Sequence[str], cache: Path) -> dict[str, tuple[float, float, float]]:
    """The peaks of every stage of one run."""
    with tempfile.TemporaryDirectory() as runs:
        where = ["--run-dir", f"{runs}/run", "--data.cache", str(cache), "--num-processes", str(num_processes)]
        return {stage: peaks([*NETSLIM, stage, "digits", *SHORT.split(), *where, *flags]) for stage in STAGES}


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    options, flags = parser.parse_known_args()
    results = Results("Memory", ABOUT)
    with tempfile.TemporaryDirectory() as name:
        cache = Path(name)
        contestants = {count: lambda count=count: run_stages(count, flags, cache) for count in options.processes}
        peaks([*NETSLIM, "data", "digits", "--data.cache", str(cache)])  # which is none of the stages
        found = take_turns(contestants, options.repeats)
        imported = [peaks([sys.executable, "-c", "import netslim.launch.cli"]) for _ in range(options.repeats)]
    base, together, took = (median(values) for values in zip(*imported, strict=True))
    rows: list[list[Cell]] = [["import netslim", 1, base, 0, 1.0, together, took]]
    for count, runs in found.items():
        for stage in STAGES:
            biggest, together, took = (median(values) for values in zip(*(run[stage] for run in runs), strict=True))
            rows.append([stage, count, biggest, biggest - base, biggest / base, together, took])
    results.table(
        (
            "stage",
            "processes",
            "biggest process, MB",
            "above the import, MB",
            "/ import",
            "all processes, MB",
            "seconds",
        ),
        rows,
        f"Medians of {options.repeats} runs.",
    )
    for row in rows:
        if row[0] == "sparsify":
            results.headline(f"sparsify / import alone, biggest of {row[1]} process(es)", row[4])
    results.finish(options.json)


if __name__ == "__main__":
    main()
