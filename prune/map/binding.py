"""Layers, known by the parameters that go into a convolution, a linear function or a batch normalisation."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from netslim.prune.map.classes import CONSTANT, UNNORMALISED, Classes, along, line, tight, varying
from netslim.prune.map.counts import Count, plain
from netslim.prune.map.layers import Bond, Dims, Use, few
from netslim.prune.map.operations import Labelled
from netslim.prune.record import (
    CONVOLUTIONS,
    INSTANCE_NORMALISING,
    NORMALISING,
    WEIGHTED,
    Call,
    layers_of,
    tensor_of,
    widths,
)

_MOST = 1 << 21
"""Elements of a parameter up to which each gets a label."""

_CONVOLUTION = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
LAYERS = {name: _TRANSPOSED if "transpose" in name else _CONVOLUTION for name in CONVOLUTIONS} | {
    "linear": ("input", "weight", "bias"),
    "batch_norm": ("input", "running_mean", "running_var", "weight", "bias"),
}
"""Functions with weights -> the names of their arguments."""


class Binding:
    """The layers of a network, and what binds their channels."""

    def __init__(self, model: nn.Module, classes: Classes) -> None:
        self.model, self.classes = model, classes
        self.uses: dict[str, Use] = {}
        """By weight; a BatchNorm without one by its name."""
        self.held: dict[str, str] = {}
        """Parameter or buffer -> why it cannot be resized."""
        self.notes: list[str] = []
        """What the user should know, in one line each."""
        self._elements: dict[str, Tensor] = {}
        self._told: dict[str, Tensor] = {}
        self._forms: dict[str, str] = {}
        """Weight -> the function that it goes into."""
        self._odd: set[str] = set()
        """Weights that go into functions of different forms."""
        self._homes: dict[str, list[str]] = {}
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        for name, module in model.named_modules():
            own = module._parameters  # of a scripted module it is no dictionary
            weight = own.get("weight") if isinstance(own, dict) else dict(module.named_parameters()).get("weight")
            if weight is not None:
                self._homes.setdefault(names[id(weight)], []).append(name)

    def elements(self, name: str, shape: torch.Size) -> Tensor:
        """Label each element of a parameter or buffer that is read outside a layer."""
        if name not in self._elements:
            few = shape.numel() <= _MOST
            self._elements[name] = (
                self.classes.of_parameter(shape) if few else torch.tensor(CONSTANT, device="cpu").expand(shape)
            )
        return self._elements[name]

    def bind(self, step: Bond) -> Labelled:
        """Let a layer with weights read its input's labels and make new ones for its output."""
        call, given, own = step.call, step.given, step.own
        if call.name == "batch_norm":
            return self._batch_norm(step)
        rank = CONVOLUTIONS.get(call.name, 0)
        dim, groups = len(step.shape) - rank - 1, plain(given.get("groups", 1))
        if not own["weight"]:
            return self._fixed(step, dim, groups)
        names = self._modules(own["weight"], given.get("bias"))
        label = f"'{names[0] if names else own['weight']}'"
        features, why = self._line(step.labels["input"], dim, label)
        deep = groups > 1 and groups == len(features)
        is_transposed = "transpose" in call.name
        if groups > 1 and is_transposed:
            why = f"grouped transposed convolution {label}"
        elif deep and not names and not isinstance(given["groups"], Count):
            why = f"the number of groups is written into '{call.name}' at {step.place()}"
        elif not deep and isinstance(given.get("groups"), Count):
            why = f"'{call.name}' counts its groups at {step.place()}"
        bias = own.get("bias", "")
        if given.get("bias") is not None and not bias:
            why = f"{label} computes its bias from other tensors"
        outputs = self._made(features, step.shape[dim], groups, label, has_bias=given.get("bias") is not None)
        use = Use(names or (own["weight"],), self._kind(names, call), False, features, outputs)
        use = self._used(own["weight"], use, call.name)
        if not names:
            reads = None if deep else features[: len(features) // groups]
            use.tensors[own["weight"]] = (reads, outputs) if is_transposed else (outputs, reads)
            if bias:
                use.tensors[bias] = (outputs,)
        if why:
            self._freeze(why, features, outputs)
        return along(outputs, dim, step.shape), None

    def _fixed(self, step: Bond, dim: int, groups: int) -> Labelled:
        """Follow a layer whose weight is no parameter: one filter for each channel, or any other."""
        inputs, weight = step.labels["input"], step.labels["weight"]
        where = f"'{step.call.home}'" if step.call.home else step.place()
        is_single = groups > 1 and groups == inputs.shape[dim] == step.shape[dim]
        if not is_single or step.given.get("bias") is not None:
            return None, f"{where} computes its weight from other tensors"
        if not varying(inputs) <= {dim} or not varying(weight) <= {0}:
            return None, f"{where} computes its weight from other tensors"
        features = line(inputs, dim)
        if 0 not in varying(weight):
            self._freeze(f"a filter for a fixed number of channels at {step.place()}", features)
        else:
            self.classes.join(features, line(weight, 0))
        return along(features, dim, step.shape), None

    def _batch_norm(self, step: Bond) -> Labelled:
        call, given, own = step.call, step.given, step.own
        gamma = own.get("weight", "")
        if given.get("weight") is not None and not gamma:
            return None, f"'{call.home}' computes its gamma from other tensors"
        names = self._modules(gamma, given.get("bias")) if gamma else (call.home,)
        name = names[0] if names else gamma
        features, why = self._line(step.labels["input"], 1, f"'{name}'")
        outputs = self.classes.fresh(len(features))  # zero once gamma and beta are
        shift = own.get("bias", "") or None
        use = Use(names or (gamma,), self._kind(names, call), True, features, outputs)
        if not gamma:
            why = f"BatchNorm '{name}' has no gamma (affine=False)"
        use = self._used(gamma or name, use, call.name)
        if not names:
            use.shift, use.is_selectable = shift, False
        for key in ("running_mean", "running_var", "weight", "bias"):
            if given.get(key) is None:
                continue
            if not own.get(key):
                why = f"'{name}' computes its {key} from other tensors"
            elif own[key].rpartition(".")[0] not in names:
                use.tensors[own[key]] = (outputs,)
        if why:
            use.is_selectable = False
            self._freeze(why, features, outputs)
        return along(outputs, 1, step.shape), None

    def _modules(self, weight: str, bias: Tensor | None) -> tuple[str, ...]:
        """Name the modules whose weight and bias these are, and which a cut can resize as a whole."""
        modules = ((name, self.model.get_submodule(name)) for name in self._homes.get(weight, ()))
        return tuple(
            name
            for name, module in modules
            if getattr(module, "bias", None) is bias
            and (isinstance(module, WEIGHTED) or hasattr(module, "running_mean"))
        )

    def _kind(self, names: tuple[str, ...], call: Call) -> str:
        return type(self.model.get_submodule(names[0])).__name__ if names else call.name

    def _used(self, key: str, use: Use, form: str) -> Use:
        """Keep a layer by its first call; join the labels of a further one."""
        first = self.uses.setdefault(key, use)
        if self._forms.setdefault(key, form) != form:
            self._odd.add(key)
        if first is not use:  # in the other mode, or once more in this one
            first.names = tuple(dict.fromkeys((*first.names, *use.names)))
            self.classes.join(first.inputs, use.inputs)
            self.classes.join(first.outputs, use.outputs)
        return first

    def _line(self, inputs: Tensor, dim: int, label: str) -> tuple[Tensor, str]:
        """Read off the features that a layer reads; all of the input stays where they are not one dimension's."""
        if varying(inputs) <= {dim}:
            return line(inputs, dim).clone(), ""
        why = f"{label} reads several channels as one"
        self._freeze(why, inputs)
        return torch.full((inputs.shape[dim],), CONSTANT, device="cpu"), ""

    def _made(self, features: Tensor, count: int, groups: int, label: str, *, has_bias: bool) -> Tensor:
        """Make the labels of a layer's output (count,), and bind what its groups bind."""
        classes = self.classes
        if groups > 1 and groups == len(features):
            sources = features.repeat_interleave(count // groups)
            raw = classes.raw(sources)
            made = classes.fresh(
                count, np.where(raw > 0, raw, classes.cause(f"{label} adds a bias") if has_bias else 0)
            )
            classes.join(sources, made)
            return made
        classes.read(features, label)
        made = classes.fresh(count, UNNORMALISED)
        if groups > 1:  # the groups stay, and stay equal
            for ends in (features, made):
                parts = ends.view(groups, -1)
                classes.join(parts, parts[:1].expand_as(parts))
        return made

    def _freeze(self, why: str, *labels: Tensor) -> None:
        for each in labels:
            self.classes.freeze(each, why)

    def tell(self, name: str, labels: Tensor) -> None:
        """Remember a module of torch's without parameters that is told how many channels it sees."""
        module = self.model.get_submodule(name)
        if isinstance(module, INSTANCE_NORMALISING) and not module.affine and varying(labels) == {1}:
            first = self._told.setdefault(name, line(labels, 1))
            self.classes.join(first, line(labels, 1))

    def settle(self) -> dict[str, Dims]:
        """Say which channels lie along the dimensions of the tensors that no layer of torch's form resizes.

        A layer whose parameter is read elsewhere too stays, as does a parameter with channels in two dimensions, and a
        layer that was never called.
        """
        self._keep_unused()
        self._keep_shared()
        for key, use in self.uses.items():
            for own in self._tensors_of(use, key):
                if own in self._elements and own not in self.held:
                    self.held[own] = f"a parameter of '{use.names[0]}' is read outside it"
                if own in self.held:
                    use.is_selectable = False
                    self._freeze(self.held[own], use.inputs, use.outputs)
        shrinking: dict[str, Dims] = {name: (labels,) for name, labels in self._told.items()}
        shrinking |= {name: ends for use in self.uses.values() for name, ends in use.tensors.items()}
        for name, labels in self._elements.items():
            ends = None if name in self.held else self._ends_of(labels)
            if ends is None:
                self._freeze(self.held.get(name, f"'{name}' has channels in two dimensions"), labels)
            elif name not in shrinking and any(end is not None for end in ends):
                shrinking[name] = ends
        return shrinking

    def _keep_shared(self) -> None:
        """Keep the layers that share a tensor which is not the same to them: a bias, or a scale with two shifts."""
        owners: dict[int, set[str]] = {}
        for key, use in self.uses.items():
            for own in self._tensors_of(use, key):
                tensor = tensor_of(self.model, own)
                if tensor is not None:
                    owners.setdefault(id(tensor), set()).add(key)
        shared = {key for keys in owners.values() if len(keys) > 1 for key in keys}
        shared |= {key for key, use in self.uses.items() if use.normalises and len(use.names) > 1}
        shared |= self._odd
        for key in shared:
            use = self.uses[key]
            use.is_selectable = False
            self._freeze(f"'{use.names[0]}' shares a parameter with a layer of another form", use.inputs, use.outputs)

    def _tensors_of(self, use: Use, key: str) -> list[str]:
        keys = ("weight", "bias", "running_mean", "running_var")
        own = [f"{name}.{tensor}" for name in use.names for tensor in keys]
        return list(dict.fromkeys([key, *own, *use.tensors]))

    def _ends_of(self, labels: Tensor) -> Dims | None:
        """Find the one dimension of a parameter along which its channels lie; None where they lie along several."""
        roots = tight(torch.from_numpy(np.asarray(self.classes.roots()[labels.numpy()])))
        vary = varying(roots)
        if len(vary) > 1:
            is_own = np.array_equal(roots.numpy(), labels.numpy())
            return tuple(None for _ in labels.shape) if is_own else None
        return tuple(line(labels, dim) if dim in vary else None for dim in range(labels.dim()))

    def _keep_unused(self) -> None:
        known = {name for use in self.uses.values() for name in use.names}
        unused = []
        for name, layer in layers_of(self.model).items():
            if name in known or any(name in self._homes.get(key, ()) for key in self.uses):
                continue  # the latter: its weight, in a function that its module's form does not say
            inputs, outputs = (self.classes.fresh(width, UNNORMALISED) for width in widths(layer))
            parameters = (f"{name}.{key}" for key in layer._parameters)
            why = next((self.held[key] for key in parameters if key in self.held), "")
            if not why and any(f"{name}.{key}" in self._elements for key in layer._parameters):
                why = f"what is computed with the parameters of '{name}' is not known"
            elif not why:
                unused.append(f"'{name}'")
                why = f"'{name}' is never called"
            use = Use(
                (name,), type(layer).__name__, isinstance(layer, NORMALISING), inputs, outputs, is_selectable=False
            )
            self.uses[f"{name} (unused)"] = use
            self._freeze(why, inputs, outputs)
        if unused:
            self.notes.append(f"{few(unused)} never called, neither in eval nor in training mode: left whole")
