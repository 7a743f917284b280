"""What repair, balance and folding ask of a record: who reads what, followed by which function, called how often."""

from __future__ import annotations

from collections import Counter, defaultdict
from functools import cached_property

from torch import nn

from netslim.prune.record.calls import Call, Record
from netslim.prune.record.functions import CONVOLUTIONS, words
from netslim.prune.record.kinds import NORMALISING, PRODUCING, is_plain

BatchNorm = nn.modules.batchnorm._BatchNorm


class Questions:
    """Questions to the record of a network, answered by its modules."""

    def __init__(self, model: nn.Module, record: Record) -> None:
        self._model, self._record = model, record
        self._weights = {number: name.rpartition(".")[0] for number, name in record.parameters.items()}
        self._readers: defaultdict[int, list[Call]] = defaultdict(list)
        for call in record.calls:
            for number in dict.fromkeys(call.inputs):
                self._readers[number].append(call)
        self._maker = {number: call for call in record.calls for number in call.outputs}

    @cached_property
    def called_once(self) -> dict[str, nn.Module]:
        """The layers that are called just once, and that compute what torch's own do, in the order of execution."""
        return {name: self._model.get_submodule(name) for name in self._calls}

    @cached_property
    def norms_after(self) -> dict[str, BatchNorm]:
        """The BatchNorm that alone reads what a layer gives, by the layer's name."""
        found = {}
        for name, call in self._calls.items():
            reader = self._only_reader(call)
            norm = self._layer_of.get(id(reader)) if reader is not None and reader.name == "batch_norm" else None
            module = self._model.get_submodule(norm) if norm else None
            reads = reader is not None and reader.inputs[0] == call.outputs[0]
            if reads and isinstance(module, NORMALISING) and module.running_mean is not None:
                found[name] = module
        return found

    @cached_property
    def rectified(self) -> set[nn.Module]:
        """The layers whose result a ReLU alone reads."""
        found = set()
        for name, call in self._calls.items():
            reader = self._only_reader(call)
            if reader is not None and reader.name in ("relu", "relu6"):
                found.add(self.called_once[name])
        return found

    @cached_property
    def readers_of_norms(self) -> dict[BatchNorm, list[nn.Module]]:
        """The layers that alone read a BatchNorm, at most through operations that a scale passes."""
        found = {}
        for name, call in self._calls.items():
            norm = self.called_once[name]
            if isinstance(norm, NORMALISING):
                readers = self._read_by(call.outputs[0])
                if readers is not None:
                    found[norm] = readers
        return found

    @cached_property
    def _calls(self) -> dict[str, Call]:
        """The one call of each layer that is called once: by its weight, or by its module's name where it has none."""
        by_name: dict[str, list[Call]] = defaultdict(list)
        for call in self._record.calls:
            if call.name in _LAYERS:
                name = next((self._weights[n] for n in call.inputs if n in self._weights), call.home)
                by_name[name].append(call)
        uses = Counter(number for call in self._record.calls for number in call.inputs if number in self._weights)
        names = {name: number for number, name in self._record.parameters.items()}
        found = {}
        for name, calls in by_name.items():
            passages = self._record.passages.get(name, ())
            weight = names.get(f"{name}.weight")
            if len(calls) > 1 or len(passages) > 1 or (weight is not None and uses[weight] > 1):
                continue
            if passages and (
                is_plain(self._model.get_submodule(name)) or calls[0].inputs[:1] == passages[0].inputs[:1]
            ):
                found[name] = calls[0]
        return found

    @cached_property
    def _layer_of(self) -> dict[int, str]:
        return {id(call): name for name, call in self._calls.items()}

    def _only_reader(self, call: Call) -> Call | None:
        readers = self._readers[call.outputs[0]]
        return readers[0] if len(readers) == 1 and call.outputs[0] not in self._record.results else None

    def _read_by(self, number: int) -> list[nn.Module] | None:
        if number in self._record.results:
            return None
        found: list[nn.Module] = []
        for reader in self._readers[number]:
            name = self._layer_of.get(id(reader))
            module = self.called_once[name] if name is not None else None
            if isinstance(module, PRODUCING) and reader.inputs[0] == number:
                found.append(module)
                continue
            further = self._read_by(reader.outputs[0]) if reader.name in _HOMOGENEOUS and reader.outputs else None
            if further is None:
                return None
            found += further
        return found


_LAYERS = {*CONVOLUTIONS, "linear", "batch_norm"}
# f(s x) = s f(x) for s > 0.
_HOMOGENEOUS = words(
    "view reshape flatten relu leaky_relu mean index_select contiguous clone detach get_data dropout dropout1d "
    "dropout2d dropout3d"
) | {f"{kind}_pool{n}d" for kind in ("max", "avg", "adaptive_avg", "adaptive_max") for n in (1, 2, 3)}
