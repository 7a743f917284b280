"""What Weights & Biases costs a run whose W&B server cannot be reached.

python tests/bench/bench_record.py [--repeats 3] [flags of `netslim run digits`]
"""

import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from results import Cell, Results, new_parser, take_turns

SHORT = "--sparsify.epochs 2 --finetune.epochs 1 --prune.ratio 0.5 --model.width 0.125 --data.size 16 --num-processes 1"
ABOUT = f"""The same short run, from the command to the end of its process, with W&B disabled, offline, and online at an
address that refuses connections and at one that accepts them and is silent: `netslim run digits {SHORT}`."""


def measure(mode: str, url: str, flags: list[str], directory: Path) -> tuple[float, str]:
    """Seconds, and what the run said of W&B."""
    environment = {
        **os.environ,
        "WANDB_API_KEY": "a" * 40,
        "WANDB_BASE_URL": url,
        "WANDB_CONFIG_DIR": str(directory),
        "NETRC": str(directory / "netrc"),
    }
    netslim = [sys.executable, "-c", "import sys; from netslim.launch.cli import main; sys.exit(main())"]
    command = [*netslim, "run", "digits", *SHORT.split(), *flags]
    with tempfile.TemporaryDirectory(dir=directory) as runs:
        started = time.perf_counter()
        done = subprocess.run(
            [*command, "--run-dir", f"{runs}/run", "--record.wandb", mode],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        took = time.perf_counter() - started
    assert done.returncode == 0, done.stderr
    said = "; ".join(line for line in done.stderr.splitlines() if "W&B" in line)
    return took, said.replace(url, "URL").replace(str(runs), "DIR")


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    options, flags = parser.parse_known_args()
    results = Results("Weights & Biases", ABOUT)
    with tempfile.TemporaryDirectory() as name, socket.socket() as silent, socket.socket() as refusing:
        silent.bind(("127.0.0.1", 0))
        silent.listen(128)
        refusing.bind(("127.0.0.1", 0))  # and not listening
        here = [f"http://127.0.0.1:{server.getsockname()[1]}" for server in (refusing, silent)]
        cases = {
            "disabled": ("disabled", here[0]),
            "offline": ("offline", here[0]),
            "online, refused": ("online", here[0]),
            "online, silent": ("online", here[1]),
        }
        flags = [*flags, *([] if "--data.cache" in flags else ["--data.cache", f"{name}/cache"])]
        measure(*cases["disabled"], flags, Path(name))  # writes the images
        contestants = {case: partial(measure, mode, url, flags, Path(name)) for case, (mode, url) in cases.items()}
        found = take_turns(contestants, options.repeats)
    took = {case: [each for each, _ in runs] for case, runs in found.items()}
    middle = {case: statistics.median(each) for case, each in took.items()}
    base = middle["offline"]
    rows: list[list[Cell]] = [
        [case, middle[case], min(each), max(each), middle[case] / base, middle[case] - base]
        for case, each in took.items()
    ]
    said = " ".join(f"{case}: “{runs[-1][1]}”" for case, runs in found.items() if runs[-1][1])
    results.table(
        ("W&B", "seconds", "least", "most", "time / offline", "s against offline"),
        rows,
        f"Medians of {options.repeats} runs. What they said of W&B: {said or 'nothing'}",
    )
    results.headline("W&B at a silent server / offline, seconds of a short run", middle["online, silent"] / base)
    results.finish(options.json)


if __name__ == "__main__":
    main()
