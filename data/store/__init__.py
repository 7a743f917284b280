"""Images of a named source in; what is kept of them on disk out, written once and verified before it is used.

That is their figures, and with FFCV the .beton files. How files are written, found again and found damaged is nobody
else's business.
"""

from netslim.data.store.info import SPLITS, DataInfo, check_sizes, damaged
from netslim.data.store.scan import decoded
from netslim.data.store.write import notes_here, prepare, prepared, stored

__all__ = ["SPLITS", "DataInfo", "check_sizes", "damaged", "decoded", "notes_here", "prepare", "prepared", "stored"]
