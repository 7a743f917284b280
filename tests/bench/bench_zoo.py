"""Every file of timm, and torchvision beyond its classifiers: cut by netslim, and by Torch-Pruning 1.6.1 beside it.

python tests/bench/bench_zoo.py --out zoo.jsonl [--names regnetx_002 fcn_resnet50] [--limit-seconds 600] [--no-peer]

Of each file of timm the smallest network that has a BatchNorm, at its own size of images. Each network is measured in a
process of its own. What is measured is appended to a file, line by line, and not measured again when it is there.
"""

import json
import math
import multiprocessing
import os
import resource
import signal
import statistics
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from results import Cell, Results, new_parser

sys.path.insert(0, str(Path(__file__).parents[1]))  # where the tests have the same networks

from zoo_exact import RATIO, SINGLE, TOLERANCE, called, is_exact, measured, num_params
from zoo_networks import TORCHVISION, Network, network_of, smallest, timm_files

COUPLINGS = ("group", "select")
COMMIT = subprocess.run(
    ("git", "rev-parse", "--short", "HEAD"), capture_output=True, text=True, check=False
).stdout.strip()
PEER_SECONDS = 60
MEMORY = 12 << 30
FEW = 0.1
"""Share of the parameters: of networks that lose no more the reason is told."""
ABOUT = f"""Of every file of timm the smallest network that has a BatchNorm, at its own size of images, and
torchvision's networks for other tasks than classification, detectors with their losses; random weights, {RATIO:.0%} of
the removable channels by one threshold. A cut is exact if its outputs equal those of the whole network with the removed
gammas and betas at zero, in eval and in training mode, to {TOLERANCE:g} in float64, or {SINGLE:g} where it runs in
float32 alone; then it is trained for a step, and saved and loaded, bit for bit. Torch-Pruning prunes by BNScalePruner,
the same ratio by one threshold, and has worked if the network runs afterwards and its outputs have the shapes that they
had; it has {PEER_SECONDS} seconds. Seconds are the processor's, on one thread."""

Found = dict[str, Any]


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--out", type=Path, required=True, help="file of JSON lines, gone on with if it is there")
    parser.add_argument("--names", nargs="+", help="networks, instead of all")
    parser.add_argument("--limit-seconds", type=float, default=900, help="of one network under one coupling")
    parser.add_argument("--no-peer", action="store_true", help="without Torch-Pruning")
    options = parser.parse_args()
    torch.set_num_threads(1)
    known = {row["of"]: row for row in read(options.out)}
    wanted = options.names or [*(f"timm/{file}" for file in timm_files()), *TORCHVISION]
    for of in wanted:
        if of not in known:
            known[of] = row = measure(of, options.limit_seconds, not options.no_peer)
            with options.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(line(row), flush=True)
    report([known[of] for of in wanted], options.json)


def read(file: Path) -> list[Found]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def measure(of: str, limit: float, with_peer: bool) -> Found:
    """Measure a network, or of a file of timm its smallest one."""
    started = time.perf_counter()
    row: Found = {"of": of, "name": of, "commit": COMMIT}
    if of.startswith("timm/"):
        names = timm_files()[of.removeprefix("timm/")]
        found = apart(limit, lambda found: found.update(name=smallest(names)))
        row["name"] = found.get("name")
        if "error" in found:
            row["failed"] = found["error"]
        if row["name"] is None:
            return row  # no network with a BatchNorm
    network = network_of(row["name"])
    row["file"] = network.file
    for coupling in COUPLINGS:
        row[coupling] = apart(limit, lambda found, coupling=coupling: measured(network, coupling, found))
    if with_peer:
        row["peer"] = apart(PEER_SECONDS, lambda found: peer(network, found))
    row["seconds"] = time.perf_counter() - started
    return row


def peer(network: Network, found: Found) -> None:
    """Prune by Torch-Pruning, and see whether the network runs afterwards."""
    from bench_prune import torch_pruning_  # here: the rest needs no Torch-Pruning

    model = network.build()
    example = network.example(model)
    with torch.no_grad():
        before = [output.shape for output in called(model, example)]
    whole = num_params(model)
    found["at"] = "prune"
    started = time.process_time()
    torch_pruning_(model, example)
    found["took"] = time.process_time() - started
    found["gone"] = 1 - num_params(model) / whole
    found["at"] = "forward"
    with torch.no_grad():
        after = [output.shape for output in called(model, example)]
    if network.file == "detection":  # of another number of things
        before, after = ([shape[1:] for shape in shapes] for shapes in (before, after))
    assert after == before, "outputs of other shapes"
    found["at"] = "done"


def apart(limit: float, work: Callable[[Found], object]) -> Found:
    """Do it in a process of its own, with a limit of its seconds and memory; keep what was found before an error."""
    ours, theirs = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_child, args=(theirs, limit, work))
    process.start()
    theirs.close()
    found: Found = {}
    deadline = time.monotonic() + 10 * limit  # of a busy machine
    try:
        while ours.poll(max(0.0, deadline - time.monotonic())):
            found = ours.recv()
            if found.pop("over", False):
                break
        else:
            found["error"] = f"not done after {10 * limit:g} seconds"
    except EOFError:
        process.join()
        late = process.exitcode == -signal.SIGXCPU
        found["error"] = f"more than {limit:g} seconds" if late else f"the process ended with {process.exitcode}"
    process.kill()
    process.join()
    return found


class _Told(dict[str, Any]):
    """What is found, told as it comes: the process may be ended."""

    def __init__(self, pipe: Connection) -> None:
        super().__init__()
        self._pipe = pipe

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        self._pipe.send(dict(self))


def _child(pipe: Connection, limit: float, work: Callable[[Found], object]) -> None:
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(limit), math.ceil(limit) + 5))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    found = _Told(pipe)
    try:
        work(found)
    except BaseException as error:
        found["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:600]}"
        found["where"] = [f"{f.filename}:{f.lineno} {f.name}" for f in traceback.extract_tb(error.__traceback__)[-6:]]
    pipe.send({**found, "over": True})
    pipe.close()
    os._exit(0)


def line(row: Found) -> str:
    """A network, in one line for who waits."""
    if row["name"] is None:
        return f"{row['of']}: {row.get('failed', 'no BatchNorm')}"
    parts = [f"{row['of']:<32} {row['name']:<32}"]
    for who in (*COUPLINGS, "peer"):
        if found := row.get(who, {}):
            modes = " ".join(f"{found[mode]:.0e}" for mode in ("eval", "training") if mode in found)
            ends = found.get("error") or found.get("held", "")
            seconds = found.get("took", took(found)) or 0
            parts.append(f"{who} {share(found)} {modes} {seconds:.1f}s {found.get('at')} {ends[:200]}".rstrip())
    return " | ".join(parts)


def share(found: Found) -> str:
    return f"-{found['gone']:.0%}" if "gone" in found else "-"


def took(found: Found) -> float | None:
    """Seconds of map, plan and cut."""
    return sum(found.get(part, 0) for part in ("map", "plan", "cut")) if "cut" in found else None


def said(found: Found) -> str:
    """What came of a cut, in a word or two."""
    if "error" in found:
        return f"failed: {found.get('at', 'build')}"
    if "held" in found:
        return "nothing removable"
    if is_exact(found):
        return "exact" + " in float32" * ("single" in found)
    return f"differs by {max(found['eval'], found['training']):.1g}"


def reason(row: Found) -> str:
    """Why there is no cut, or a small one, under group."""
    found = row["group"]
    if "error" in found:
        return str(found["error"])
    if found.get("gone", 1) > FEW:
        return ""
    kept = str(found.get("held", found.get("why"))).removeprefix("no channel of the network is prunable: ")
    return kept.partition("; ")[0]


def has_no_norm(row: Found) -> bool:
    """Tell whether a network, or each of a file, has no BatchNorm."""
    return row["name"] is None or "has no BatchNorm layer" in row["group"].get("error", "")


def without_norms(without: list[str], failed: list[str]) -> str:
    """Say which files are not in the table."""
    said = f" Without BatchNorm: {', '.join(without)}." if without else ""
    return said + (f" Not built: {', '.join(failed)}." if failed else "")


def report(rows: list[Found], file: Path | None) -> None:
    failed = [row["of"] for row in rows if "failed" in row]
    without = [row["of"] for row in rows if row["of"] not in failed and has_no_norm(row)]
    rows = [row for row in rows if row["of"] not in (*failed, *without)]
    results = Results("Networks of timm and torchvision", ABOUT)
    table: list[list[Cell]] = []
    for row in rows:
        group, select, other = row["group"], row["select"], row.get("peer", {})
        table.append(
            [
                row["name"],
                row["file"],
                said(group),
                group.get("gone"),
                said(select),
                select.get("gone"),
                took(group),
                "not asked" if not other else "worked" if other.get("at") == "done" else "failed",
                other.get("gone") if other.get("at") == "done" else None,
                other.get("took"),
                reason(row),
            ]
        )
    columns = (
        "network",
        "file",
        "group",
        "gone",
        "select",
        "gone",
        "seconds",
        "Torch-Pruning",
        "gone",
        "seconds",
        "why",
    )
    results.table(columns, table, f"Gone: the share of the parameters.{without_norms(without, failed)}")
    for coupling in COUPLINGS:
        each = [row[coupling] for row in rows]
        counts = {
            "mapped": sum("map" in found for found in each),
            "cut": sum("cut" in found for found in each),
            "exact in both modes": sum(map(is_exact, each)),
            "trained, saved and loaded too": sum(is_exact(found) and found.get("at") == "done" for found in each),
            f"more than {FEW:.0%} of the parameters gone": sum(found.get("gone", 0) > FEW for found in each),
        }
        for what, count in counts.items():
            results.headline(f"{what}, {coupling}", f"{count} of {len(each)}")
        times = [seconds for found in each if (seconds := took(found)) is not None] or [math.nan]
        results.headline(f"seconds of map, plan and cut, {coupling}, median", statistics.median(times))
        results.headline(f"seconds of map, plan and cut, {coupling}, most", max(times))
    others = [row["peer"] for row in rows if "peer" in row]
    if others:
        done = [found for found in others if found.get("at") == "done"]
        results.headline("Torch-Pruning worked", f"{len(done)} of {len(others)}")
        gone = sum(found["gone"] > FEW for found in done)
        results.headline(f"Torch-Pruning: more than {FEW:.0%} of the parameters gone", f"{gone} of {len(others)}")
        times = [found["took"] for found in done] or [math.nan]
        results.headline("Torch-Pruning, seconds, median", statistics.median(times))
        results.headline("Torch-Pruning, seconds, most", max(times))
    results.finish(file)


if __name__ == "__main__":
    main()
