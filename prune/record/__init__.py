"""A network that runs, and an example, in; the record of the run out: which functions it called, on which parameters.

The network is never touched: a copy runs, without numbers where that suffices. Who reads what, and what is called once,
is asked of the record. How a call is seen, and how copies are made, is nobody else's business; torch's own layers and
the names of its functions are known here for all.
"""

from netslim.prune.record.calls import Call, Course, Record, mapped, parts_of, results_of, tensors_of
from netslim.prune.record.copies import replica
from netslim.prune.record.functions import CONVOLUTIONS, is_inplace, name_of, words
from netslim.prune.record.kept import untouched
from netslim.prune.record.kinds import (
    CONVOLVING,
    INSTANCE_NORMALISING,
    NORMALISING,
    PRODUCING,
    WEIGHTED,
    is_plain,
    layers_of,
    tensor_of,
    weight_of,
    widths,
)
from netslim.prune.record.lines import line_of_traceback, line_of_user
from netslim.prune.record.questions import Questions
from netslim.prune.record.recorder import Failed, Recorder
from netslim.prune.record.running import (
    Example,
    arguments,
    call,
    check,
    doubled,
    moved,
    on_a_copy,
    recorded,
    said,
    trains_alike,
)

__all__ = [
    "CONVOLUTIONS",
    "CONVOLVING",
    "INSTANCE_NORMALISING",
    "NORMALISING",
    "PRODUCING",
    "WEIGHTED",
    "Call",
    "Course",
    "Example",
    "Failed",
    "Questions",
    "Record",
    "Recorder",
    "arguments",
    "call",
    "check",
    "doubled",
    "is_inplace",
    "is_plain",
    "layers_of",
    "line_of_traceback",
    "line_of_user",
    "mapped",
    "moved",
    "name_of",
    "on_a_copy",
    "parts_of",
    "recorded",
    "replica",
    "results_of",
    "said",
    "tensor_of",
    "tensors_of",
    "trains_alike",
    "untouched",
    "weight_of",
    "widths",
    "words",
]
