"""The entry of ``python -m netslim.launch.inspect PRESET [flags]``: the processes that look into a sparse model."""

import sys

from netslim.launch.inspect.sparse import inspect_sparse
from netslim.launch.mistakes import guarded
from netslim.launch.run import enter

if __name__ == "__main__":
    sys.exit(guarded(lambda: enter("netslim.launch.inspect", __doc__ or "", inspect_sparse)))
