"""A network as files that run elsewhere: ONNX, torch.export's pt2, or weights that `load` takes alone."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from netslim.base import replace_all
from netslim.prune.choose import Origin, Plan
from netslim.prune.cut import relative_difference
from netslim.prune.record import replica, tensors_of, untouched
from netslim.prune.ship.artefact import load, save
from netslim.prune.ship.fold import folded

if TYPE_CHECKING:
    from torch.export import ExportedProgram

Format = Literal["onnx", "pt2", "weights"]
"""onnx: one file for any runtime of that format; pt2: for torch.export.load; weights: a directory for `load`."""

ABOUT = "about.json"
"""What a user should know of exported weights, and of a pt2 file in that."""
TOLERANCE = 1e-4
"""Largest accepted difference between an exported network and torch, relative to max(1, largest |logit|)."""

Run = Callable[[Tensor], list[Tensor]]

_NEEDED = ("onnx", "onnxscript", "onnxruntime")
_LARGEST = 2**31 - 1  # bytes, what protobuf can hold in one message


def export(
    model: nn.Module,
    example: Tensor,
    path: str | os.PathLike[str],
    format: Format,
    plan: Plan | None = None,
    *,
    origin: Origin | None = None,
    about: Mapping[str, Any] | None = None,
) -> float:
    """Write a network as one file that runs without this library, or as a directory for `load`; the model is unchanged.

    ONNX and pt2 files take batches of any size, in eval mode, and have every BatchNorm folded into the layer before it
    where that can be; pt2 runs on the CPU. "weights" makes a directory that `load` accepts alone, so the plan needs an
    origin, and a network that is whole one without a plan. What was made is run at two batch sizes and compared with
    torch before anything is put at the path.

    Args: example (n, 3, height, width), float32, or uint8 for a network that takes bytes, as `Normalise` can; images,
    or noise: of zeros, the comparison proves little. About: what a user of the file should know, as class names and
    normalisation, values for JSON; it goes into the file's metadata and into a JSON file beside it, PATH.json, or for
    "weights" into about.json.
    Returns: the largest difference from torch, relative to max(1, largest |logit|).
    Raises: ValueError for a wrong argument, a missing package or a network that cannot be exported, OSError if the path
    cannot be written, RuntimeError if what was exported differs from torch by more than 1e-4; then nothing is left.
    """
    path = Path(path)
    origin = origin or (None if plan is None else plan.origin)
    _check(model, example, path, format, origin)
    note = None if about is None else json.dumps(about, indent=2, ensure_ascii=False)
    if format == "weights":
        difference = _export_weights(model, plan, origin, _batches(example), path)
        if note is not None:
            replace_all(path, {ABOUT: note.encode()})
        return difference
    twin, batches = _not_in_place(replica(model, {}).cpu().eval()), _batches(example.detach().cpu())
    program = _program(folded(twin, batches[0]), batches[0])
    content, run = (_to_onnx if format == "onnx" else _to_pt2)(program, batches[0], note)
    difference = _compare(run, twin, batches)
    beside = {} if note is None else {f"{path.name}.json": note.encode()}
    replace_all(path.parent, {path.name: content, **beside})
    return difference


def _check(model: nn.Module, example: Tensor, path: Path, format: str, origin: Origin | None) -> None:
    """Refuse what cannot work, before any work."""
    if format not in get_args(Format):
        raise ValueError(f"there is no export format {format!r}; the formats are {', '.join(get_args(Format))}")
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None] if format == "onnx" else []
    if missing:
        raise ValueError(f"export to ONNX needs {', '.join(missing)}: pip install {' '.join(_NEEDED)}")
    if example.dim() < 2 or not example.numel():
        raise ValueError(f"an example of shape {tuple(example.shape)} is no batch of images (n, 3, height, width)")
    if format == "weights":
        if origin is None:
            raise ValueError("stand-alone weights need an origin that says how their network is built: Plan.origin")
    elif example.dtype not in (torch.float32, torch.uint8):
        raise ValueError(f"{format} files are made of float32 networks, the example is {example.dtype}; use .float()")
    size = sum(t.nbytes for t in model.state_dict().values() if isinstance(t, Tensor))
    if format == "onnx" and size >= _LARGEST:
        raise ValueError(f"one ONNX file holds less than 2 GiB, and the weights are {size} bytes; use pt2")
    _check_place(path, is_directory=format == "weights")


def _check_place(path: Path, *, is_directory: bool) -> None:
    if path.exists() and path.is_dir() != is_directory:
        kinds = ("a file", "a directory") if is_directory else ("a directory", "a file")
        raise ValueError(f"{path} is {kinds[0]}; name {kinds[1]}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no directory {path.parent} to write {path.name} into; make it first")
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"{path.parent} cannot be written; name another place")


def _batches(example: Tensor) -> list[Tensor]:
    """Two batches of different size with the example's images in them, the larger one, of at least two, first."""
    if len(example) == 1:
        return [torch.cat([example, example.flip(-1), -example]), example]
    return [example, example[:1]]


def _not_in_place(model: nn.Module) -> nn.Module:
    """Let activations give new tensors: torch takes those in place apart for ONNX, most of an export's time."""
    for module in model.modules():
        if isinstance(getattr(module, "inplace", None), bool):
            setattr(module, "inplace", False)  # noqa: B010 (to mypy a module's attributes are tensors)
    return model


def _program(model: nn.Module, images: Tensor) -> ExportedProgram:
    """Export with torch.export, for a batch of any size."""
    from torch.export import export  # here: it takes a second, and few processes need it

    try:
        with torch.no_grad():
            program = export(model, (images,), dynamic_shapes=_any_batch())
    except Exception as error:  # it runs the network's own code, which may raise anything
        raise ValueError(
            f"torch.export cannot export the network: {_first_line(error)}; its forward must take images alone, "
            "and neither branch on their values nor fix their number"
        ) from error
    # what would go into the file, and is no one's business there: images, and the source code's paths on this machine
    program.example_inputs = None
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    return program


def _any_batch() -> tuple[dict[int, Any]]:
    from torch.export import Dim

    return ({0: Dim("batch")},)


def _to_pt2(program: ExportedProgram, images: Tensor, note: str | None) -> tuple[bytes, Run]:
    file = io.BytesIO()
    torch.export.save(program, file, extra_files=None if note is None else {ABOUT: note})
    content = file.getvalue()
    module = torch.export.load(io.BytesIO(content)).module()
    return content, lambda batch: tensors_of(module(batch))


def _to_onnx(program: ExportedProgram, images: Tensor, note: str | None) -> tuple[bytes, Run]:
    import onnxruntime

    names = ["logits"] if len(program.graph_signature.user_outputs) == 1 else None
    options: dict[str, Any] = {"dynamic_shapes": _any_batch(), "input_names": ["images"], "output_names": names}
    try:
        made = torch.onnx.export(program, (images,), dynamo=True, verbose=False, **options)
    except Exception as error:  # many kinds, of two packages
        raise ValueError(f"torch.onnx cannot export the network: {_first_line(error)}; use pt2") from error
    assert made is not None, "so it is with dynamo"
    model = made.model_proto
    for key, value in json.loads(note or "{}").items():
        model.metadata_props.add(key=key, value=value if isinstance(value, str) else json.dumps(value))
    content = _stripped(model)
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return content, lambda batch: [torch.from_numpy(t) for t in session.run(None, {"images": batch.numpy()})]


def _stripped(model: Any) -> bytes:
    """The ONNX model without the exporter's notes, which are as long as the graph itself."""
    graph = model.graph
    for part in (*graph.node, *graph.value_info, *graph.initializer, *graph.input, *graph.output):
        part.ClearField("metadata_props")
    content: bytes = model.SerializeToString()
    return content


def _export_weights(
    model: nn.Module, plan: Plan | None, origin: Origin | None, batches: Sequence[Tensor], path: Path
) -> float:
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as draft:
        save(model, plan, draft, origin)
        again = load(draft).to(batches[0].device, batches[0].dtype).eval()
    difference = _compare(lambda batch: tensors_of(again(batch)), replica(model, {}).eval(), batches)
    save(model, plan, path, origin)
    return difference


def _compare(run: Run, model: nn.Module, batches: Sequence[Tensor]) -> float:
    with torch.no_grad(), untouched(model):
        difference = max(relative_difference(run(batch), tensors_of(model(batch))) for batch in batches)
    if not difference <= TOLERANCE:
        raise RuntimeError(
            f"the exported network differs from torch by {difference:.2g}, more than {TOLERANCE:g}, "
            "so it was not written; please report it with the network"
        )
    return difference


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
