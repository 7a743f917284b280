"""What every room needs and none owns: files that survive a crash, locks, mistakes in one line, functions by name.

Values, shapes and paths come in, nothing of networks, images, ranks or configurations does. It holds no policy: what to
do about a damaged file or a wrong name is its caller's business.
"""

from netslim.base.files import flush, replace_all, write_flushed
from netslim.base.functions import said, split_function
from netslim.base.lock import exclusive, is_held
from netslim.base.shapes import Shapes, misfits
from netslim.base.validation import complaint, plainly

__all__ = [
    "Shapes",
    "complaint",
    "exclusive",
    "flush",
    "is_held",
    "misfits",
    "plainly",
    "replace_all",
    "said",
    "split_function",
    "write_flushed",
]
