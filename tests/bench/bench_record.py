"""What Weights & Biases costs a run whose W&B server cannot be reached, from the command to the end of its process.

    python tests/bench/bench_record.py [--repeats 1] [flags of `netslim run digits`]

The same short run with W&B disabled, offline, and online at an address that refuses connections and at one that
accepts them and is silent. Repetitions are interleaved, so that a busy machine slows all alike.
"""

import argparse
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SHORT = "--sparsify.epochs 2 --finetune.epochs 1 --prune.ratio 0.5 --model.width 0.125 --data.size 16 --num-processes 1"


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
        seconds = time.perf_counter() - started
    assert done.returncode == 0, done.stderr
    return seconds, "; ".join(line for line in done.stderr.splitlines() if "W&B" in line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=1)
    options, flags = parser.parse_known_args()
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
        seconds: dict[str, list[float]] = {case: [] for case in cases}
        for _ in range(options.repeats):
            for case, (mode, url) in cases.items():
                found, said = measure(mode, url, flags, Path(name))
                seconds[case].append(found)
                print(f"{case:16} {found:7.1f} s  {said}", flush=True)
    base = statistics.median(seconds["offline"])
    for case, found_seconds in seconds.items():
        median = statistics.median(found_seconds)
        print(f"{case:16} median {median:7.1f} s  {median - base:+6.1f} s against offline")


if __name__ == "__main__":
    main()
