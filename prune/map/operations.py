"""What the channel map knows about torch's functions, by the names of the record."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from netslim.prune.record import is_inplace, parts_of, words

RESHAPING = words("view reshape flatten unflatten expand view_as reshape_as expand_as")
# By where a channel stands: what stood there is another one once some are gone.
CHOOSING = words(
    "chunk split split_with_sizes tensor_split getitem select narrow unbind index_select roll hsplit vsplit "
    "dsplit take_along_dim"
)
ORDERING = words(
    "permute transpose t get_T get_mT movedim flip fliplr flipud rot90 cat stack hstack vstack dstack "
    "squeeze unsqueeze repeat tile repeat_interleave broadcast_to ravel channel_shuffle native_channel_shuffle"
)
MOVING = RESHAPING | CHOOSING | ORDERING

COPYING = words(
    "detach clone contiguous to float double half bfloat16 cpu cuda type type_as get_data get_real alias dropout "
    "dropout1d dropout2d dropout3d feature_dropout native_dropout identity get_H"
)
# f(0) = 0 whatever the other arguments are.
KEEPING = COPYING | words(
    "relu relu6 leaky_relu silu gelu hardswish tanh elu selu celu mish softsign abs neg square sqrt"
)
ELEMENTWISE = KEEPING | words(
    "rrelu prelu hardsigmoid hardtanh softshrink hardshrink tanhshrink sigmoid softplus logsigmoid threshold clamp "
    "clamp_min clamp_max positive "
    "rsqrt reciprocal exp exp2 expm1 log log2 log10 log1p sin cos tan asin acos atan sinh cosh asinh acosh "
    "atanh erf erfc erfinv sign sgn floor ceil round trunc frac nan_to_num pow rpow add sub rsub mul div rdiv rtruediv "
    "floor_divide remainder fmod maximum minimum fmax fmin max min atan2 hypot lerp addcmul addcdiv where masked_fill "
    "eq ne lt le gt ge isnan isinf isfinite logical_and logical_or logical_not logical_xor bitwise_not xlogy "
    "and or xor invert bitwise_and bitwise_or bitwise_xor log_sigmoid "
    "alpha_dropout feature_alpha_dropout zeros_like ones_like full_like rand_like randn_like empty_like zero fill "
    "float_power copysign heaviside deg2rad rad2deg logit sinc dequantize int long bool"
)
# Random, so that trying them on a zero tells nothing.
RANDOM = words("alpha_dropout feature_alpha_dropout rand_like randn_like empty_like rrelu")
SAMPLING = words("bernoulli normal uniform exponential random randint_like geometric cauchy log_normal")
FACTORIES = words(
    "zeros ones empty full rand randn randint new_zeros new_ones new_empty new_full new_tensor arange linspace tensor "
    "as_tensor eye empty_strided randperm scalar_tensor from_numpy range logspace tril_indices triu_indices "
    "get_default_device meshgrid empty_permuted new_empty_strided sparse_coo_tensor"
)
# name -> number of trailing dimensions over which places are mixed, each channel by itself
LOCAL = {
    f"{kind}_pool{n}d{more}": n
    for kind in ("max", "avg", "adaptive_avg", "adaptive_max", "lp")
    for n in (1, 2, 3)
    for more in ("", "_with_indices")
}
REDUCING = words("mean sum amax amin max min norm std var linalg_vector_norm count_nonzero nansum nanmean")


@dataclass(frozen=True)
class Step:
    """One call of a function without weights, with labels in place of the values that went in."""

    name: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    kinds: Sequence[torch.dtype]
    """Of the values that went in."""
    shapes: Sequence[torch.Size]
    """Of the values that came out."""
    place: str
    """The module, and file:line of the network's code."""
    home: str
    """The module in whose forward it was called."""

    @property
    def shape(self) -> torch.Size:
        """Of the first value that came out."""
        return self.shapes[0]

    @property
    def operands(self) -> list[Tensor]:
        """The labels of all values that went in."""
        found: list[Tensor] = parts_of((self.args, self.kwargs), Tensor)
        return found

    def given(self, *names: str) -> dict[str, Any]:
        """Name the arguments."""
        given = dict(zip(names, self.args, strict=False)) | self.kwargs
        return given | ({"dim": given["axis"]} if "axis" in given else {})


Labelled = tuple[Tensor | None, str | None]
"""The labels of a result, and why what went in has to stay; None = known, and need not."""


def to_labels(step: Step) -> Any:
    """Execute a moving function on labels in place of values; nothing is written in place."""
    if step.name in ("view", "reshape"):  # labels are stored expanded, which view refuses
        return Tensor.reshape(*step.args, **step.kwargs)
    if step.name == "view_as":
        return Tensor.reshape_as(*step.args, **step.kwargs)
    if is_inplace(step.function):
        return getattr(Tensor, step.name)(*step.args, **step.kwargs)
    return step.function(*step.args, **step.kwargs)
