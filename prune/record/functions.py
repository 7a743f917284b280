"""Torch's functions by their names: methods, in-place ones and operators alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def words(text: str) -> frozenset[str]:
    """Read a set of names, by spaces."""
    return frozenset(text.split())


# Reading these of a value tells nothing about its channels; what is printed is for people.
METADATA = words(
    "dim ndimension element_size is_floating_point is_complex is_contiguous is_signed is_inference stride "
    "storage_offset get_device data_ptr untyped_storage is_conj is_neg is_nonzero_meta get_ndim get_dtype get_is_cuda "
    "get_is_cpu get_is_meta get_is_mps get_is_xpu get_is_quantized get_is_sparse get_is_nested get_is_leaf "
    "get_is_mkldnn get_is_mtia get_is_maia get_is_vulkan get_is_xla get_is_ipu get_is_ort get_is_sparse_csr "
    "get_nbytes get_itemsize get_requires_grad get_layout get_grad get_grad_fn get_names get_output_nr get__base "
    "get__version get_volatile get_name requires_grad_ set_requires_grad set_grad retain_grad register_hook len "
    "is_tensor is_grad_enabled result_type can_cast promote_types device _cuda_version is_same_size _is_view "
    "is_pinned is_shared broadcast_shapes get_imag _assert is_autocast_enabled get_default_dtype finfo iinfo hash "
    "dim_order repr str format"
)

CONVOLUTIONS = {f"conv{more}{n}d": n for n in (1, 2, 3) for more in ("", "_transpose")}

_ALIASES = {
    "concat": "cat",
    "concatenate": "cat",
    "swapaxes": "transpose",
    "swapdims": "transpose",
    "moveaxis": "movedim",
    "subtract": "sub",
    "multiply": "mul",
    "divide": "div",
    "true_divide": "div",
    "truediv": "div",
    "floordiv": "floor_divide",
    "negative": "neg",
    "absolute": "abs",
    "arctan2": "atan2",
    "clip": "clamp",
    "greater": "gt",
    "greater_equal": "ge",
    "less": "lt",
    "less_equal": "le",
    "not_equal": "ne",
    "upsample": "interpolate",
    "upsample_nearest": "interpolate",
    "upsample_bilinear": "interpolate",
    "feature_dropout": "dropout",
    "column_stack": "hstack",
    "row_stack": "vstack",
    "mm": "matmul",
    "bmm": "matmul",
}
# torch has two of these, whose arguments come in another order
_NAMES: dict[Any, str] = {
    torch.batch_norm: "torch.batch_norm",
    torch.instance_norm: "torch.instance_norm",
}


def name_of(function: Callable[..., Any]) -> str:
    """Name a function as torch's overrides see it: `relu_`, `Tensor.relu` and `F.relu` are all "relu".

    A function of another library keeps its full name, which no rule knows.
    """
    name = _NAMES.get(function)
    if name is None:
        name = _NAMES[function] = _spelt(function)
    return name


def is_inplace(function: Callable[..., Any]) -> bool:
    """Tell whether a function writes into its first argument, by the name torch gives it."""
    name = getattr(function, "__name__", "")
    return name in ("__setitem__", "__set__") or (name.endswith("_") and not name.endswith("__"))


def _spelt(function: Any) -> str:
    name = str(getattr(function, "__name__", function))
    if name in ("__get__", "__set__", "__delete__"):
        return f"{name.strip('_')}_{getattr(function.__self__, '__name__', function.__self__)}"
    home = getattr(function, "__module__", None) or "torch"
    if home.startswith("torch._ops") and "torchvision" not in home and not home.endswith(".aten"):
        return f"{home.rpartition('.')[2]}::{name}"
    if home.partition(".")[0] != "torch":
        return f"{home}.{name}"
    if home.startswith("torch._ops"):
        name = name.partition(".")[0]
    name = name.strip("_") if name.startswith("__") else name.removesuffix("_")
    return _ALIASES.get(name, name)
