"""The only importer of FFCV: the parts that netslim uses, kept from touching torch's threads.

FFCV sets torch's thread count, process-wide, on import and again for every epoch. Raises ImportError (or OSError,
for a system library) where FFCV is not installed.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch

_threads = torch.get_num_threads()
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it imports distutils, deprecated
    import numba
    import numba.typed

    # FFCV fills a typed dictionary of two entries on import and reads it from Python only. A plain one serves as
    # well, and saves each process five seconds of compilation.
    _typed_dict = numba.typed.Dict
    numba.typed.Dict = dict
    from ffcv.fields import IntField, RGBImageField
    from ffcv.fields.rgb_image import SimpleRGBImageDecoder
    from ffcv.loader import Loader
    from ffcv.loader.epoch_iterator import EpochIterator
    from ffcv.memory_allocator import MemoryAllocator
    from ffcv.pipeline.allocation_query import AllocationQuery
    from ffcv.pipeline.compiler import Compiler
    from ffcv.pipeline.operation import Operation
    from ffcv.transforms import ToTensor, ToTorchImage
    from ffcv.writer import DatasetWriter, handle_sample
numba.typed.Dict = _typed_dict
torch.set_num_threads(_threads)

__all__ = [
    "AllocationQuery",
    "DatasetWriter",
    "EpochIterator",
    "IntField",
    "Loader",
    "MemoryAllocator",
    "Operation",
    "RGBImageField",
    "SimpleRGBImageDecoder",
    "ToTensor",
    "ToTorchImage",
    "handle_sample",
]


def most_threads() -> int:
    """The most threads that numba has, and so FFCV."""
    return int(numba.config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]


def _set_num_threads(num: int) -> None:
    """FFCV's own, without torch, and without an error for more threads than numba has."""
    Compiler.num_threads = min(max(1, num), most_threads())
    numba.set_num_threads(Compiler.num_threads)


_compile = Compiler.compile
_compiled: dict[Any, Any] = {}


def _compile_once(code: Callable[..., Any], signature: Any = None) -> Any:
    """FFCV's own, but the same code over the same values is compiled once, not once per loader and epoch."""
    cells = tuple(cell.cell_contents for cell in code.__closure__ or ())
    key = (code.__module__, code.__code__, signature, cells, Compiler.num_threads > 1)
    try:
        known = key in _compiled
    except TypeError:  # closes over an array, as some of FFCV's random crops do
        return _compile(code, signature)
    if not known:
        _compiled[key] = _compile(code, signature)
    return _compiled[key]


Compiler.set_num_threads = _set_num_threads
Compiler.compile = _compile_once
