"""A network and a plan in; a smaller network out that equals the masked one, and the proof; an optimizer goes with it.

The network that is given never changes. How a tensor is sliced, and what stands around a BatchNorm whose channels stay,
is known here alone: others find a BatchNorm of a cut network by `norm_of`.
"""

from netslim.prune.cut.optimizer import carry
from netslim.prune.cut.proof import TOLERANCE, largest_difference, proof_of, prove, relative_difference
from netslim.prune.cut.surgery import cut, embed, masked, norm_of, scales_of, silenced

__all__ = [
    "TOLERANCE",
    "carry",
    "cut",
    "embed",
    "largest_difference",
    "masked",
    "norm_of",
    "proof_of",
    "prove",
    "relative_difference",
    "scales_of",
    "silenced",
]
