"""Images that an older netslim has read by fewer rules: taken as they are where no pixel of theirs differs now."""

import json
import sys
from contextlib import closing
from errno import EACCES, EPERM, EROFS
from functools import partial
from pathlib import Path

from tqdm import tqdm

from netslim.base import exclusive, replace_all
from netslim.data.folder import FolderSplit
from netslim.data.pixels import UnreadableError, look
from netslim.data.splits import Source
from netslim.data.store.findings import Findings
from netslim.data.store.info import read_rules
from netslim.data.store.scan import in_threads

_READ_ONLY = (EACCES, EPERM, EROFS)  # a cache that others share
RULES = 2  # by which image files are read; 1 knew neither orientation nor more than 8 bits


def choose_place(first: Path, second: Path, source: Source, quiet: bool) -> Path:
    """Where image files as they are read now lie, or are to be written: `first`, unless that holds other pixels.

    What an older netslim left in `first` is looked at once, by the headers of all images, and the answer is kept with
    it. Raises UnreadableError.
    """
    rules = read_rules(first) if first.is_dir() else RULES
    if rules is None:
        try:
            with exclusive(first.with_name(f"{first.name}.lock")):
                rules = read_rules(first) or _look(first, source, quiet)
        except OSError as error:
            if error.errno not in _READ_ONLY:
                raise
            rules = _look(first, source, quiet)
    return first if rules == RULES else second


def _look(directory: Path, source: Source, quiet: bool) -> int:
    findings = _findings(source, quiet)
    turned, scaled = findings.traits["turned"], findings.traits["scaled"]
    rules = 1 if turned or scaled else RULES
    if rules != RULES and not quiet:
        print(
            f"netslim: an older netslim wrote {directory} and read {turned + scaled:,} of {findings.num:,} images "
            f"otherwise ({turned:,} lie on their side, {scaled:,} have more than 8 bits): all are written anew",
            file=sys.stderr,
        )
    about = json.loads((directory / "info.json").read_text(encoding="utf-8"))
    about |= {"reading": rules, "notes": findings.notes("crop")}  # as all were, then
    try:
        replace_all(directory, {"info.json": (json.dumps(about, indent=1) + "\n").encode()})
    except OSError as error:  # each start looks again
        if error.errno not in _READ_ONLY:
            raise
    return rules


def _findings(source: Source, quiet: bool) -> Findings:
    findings = Findings()
    splits = [split for split in (source.train, source.test) if isinstance(split, FolderSplit)]
    hidden = quiet or not sys.stderr.isatty()
    with tqdm(total=sum(map(len, splits)), desc="looking at", unit=" images", disable=hidden) as bar:
        for split in splits:
            paths = [split.path(index) for index in range(len(split))]
            with closing(in_threads(partial(look, reading=split.reading), paths)) as found:
                for seen in found:
                    if isinstance(seen, UnreadableError):
                        raise seen
                    findings.add(seen)
                    bar.update()
    return findings
