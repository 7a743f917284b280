"""The entry of ``python -m netslim.launch.inspect PRESET [flags]``: the processes that look into a sparse model."""

import os
import sys
from functools import partial
from pathlib import Path

from netslim.launch.inspect.sparse import OUT_VARIABLE, inspect_sparse
from netslim.launch.mistakes import guarded
from netslim.launch.run import enter

if __name__ == "__main__":
    work = partial(inspect_sparse, out=Path(os.environ.get(OUT_VARIABLE, ".")))
    sys.exit(guarded(lambda: enter("netslim.launch.inspect", __doc__ or "", work, reads_only=True)))
