"""Functions that move data, executed on labels; and what makes them do the same once channels are gone."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from math import gcd, lcm
from typing import Any

import numpy as np
import torch
from torch import Tensor

from netslim.prune.map.classes import (
    UNNORMALISED,
    Classes,
    Ints,
    along,
    compact,
    distinct,
    line,
    merged,
    tight,
    varying,
)
from netslim.prune.map.counts import Count, Term, asks_itself, plain
from netslim.prune.map.operations import CHOOSING, RESHAPING, SAMPLING, Labelled, Step, to_labels
from netslim.prune.map.values import channelless, no_channels, not_zero, raised, together
from netslim.prune.record import line_of_user, parts_of


class Moves:
    """Follows labels through functions that move data, and remembers the counts of channels to check at the end."""

    def __init__(self, classes: Classes, *, hashes: bool) -> None:
        self.classes, self.hashes = classes, hashes
        """Whether the network looks numbers of channels up."""
        self._promises: list[tuple[Sequence[Term], int, str]] = []

    def sizes(self, labels: Tensor) -> tuple[int, ...]:
        """Give the shape of a value, the dimensions that hold channels as counts of these."""
        vary = varying(labels)
        return tuple(Count(n, line(labels, d), self) if d in vary else n for d, n in enumerate(labels.shape))

    def promise(self, terms: Sequence[Term], what: str, multiple: int = 0) -> None:
        """Learn that a sum of numbers of channels has to stay, or to stay a multiple of something."""
        if not asks_itself():
            where = line_of_user()
            self._promises.append((terms, multiple, f"its number of channels is {what}{' at ' * bool(where)}{where}"))

    def follow(self, step: Step) -> tuple[Sequence[Tensor] | None, str | None]:
        operands = step.operands
        if step.name in ("cat", "stack"):
            given = step.given("tensors", "dim")
            dim = given.get("dim", given.get("axis", 0)) % len(step.shape)
            parts = [part.unsqueeze(dim) for part in operands] if step.name == "stack" else operands
            made = together(self.classes, parts, dim, step.shape)
            if made is not None:
                return [made], None
        if step.name == "channel_shuffle":
            shuffled, why = self.shuffle(step)
            return None if shuffled is None else [shuffled], why
        if step.name in ("expand", "broadcast_to", "repeat") and self._is_bare(operands[0]):
            asked = self.asked("expand", step.args, step.kwargs)
            if any(isinstance(size, Count) for size in asked):
                made = self.counted(asked, step.shape, UNNORMALISED)
                return (None, "computed from the number of channels") if made is None else ([made], None)
        if not any(map(varying, operands)) and len(operands) == 1 and step.name not in RESHAPING:
            single, why = channelless(operands, torch.Size((1,)))
            return None if single is None else [single[0].expand(shape) for shape in step.shapes], why
        return self.move(step)

    def _is_bare(self, labels: Tensor) -> bool:
        """Tell whether a value has no channels yet."""
        return not varying(labels) or self.classes.is_free(labels)

    def anew(self, step: Step) -> tuple[Sequence[Tensor] | None, str | None]:
        """Label what is made of sizes: a constant, unless channels are counted for it."""
        args = step.args
        if step.name in SAMPLING and args and isinstance(args[0], Tensor) and varying(args[0]):
            return [raised(self.classes, args[0], not_zero(step))], None
        if not parts_of((args, step.kwargs), Count):
            return [no_channels(shape) for shape in step.shapes], None
        if step.name.removeprefix("new_") not in _SIZED:
            return None, "computed from the number of channels"
        rest = [part for part in args if not isinstance(part, Tensor)]
        asked = step.kwargs.get("size", rest[0] if rest and isinstance(rest[0], (tuple, list)) else rest)
        counted = self.counted(asked, step.shape, 0 if step.name.endswith("zeros") else UNNORMALISED)
        return (None, "computed from the number of channels") if counted is None else ([counted], None)

    def move(self, step: Step) -> tuple[list[Tensor] | None, str | None]:
        """Execute the function on the labels; say why if it would do something else once channels are gone."""
        name, args, kwargs = step.name, step.args, step.kwargs
        try:
            result = to_labels(step)
        except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError):
            return None, f"'{name}' with these arguments"
        before, after = step.operands, [tight(t) for t in parts_of(result, Tensor)]
        if [t.shape for t in after] != list(step.shapes):
            return None, f"'{name}' with these arguments"
        why = None
        if name == "squeeze" and len(args) + len(kwargs) == 1 and varying(before[0]):
            why = "'squeeze' without a dimension (it would drop a single channel; use flatten(1))"
        elif name in RESHAPING and name != "flatten":
            why = self._reshaped(name, self.asked(name, args, kwargs), after[0], step.place)
        elif name in CHOOSING:
            why = self._chosen(name, args, kwargs, before[0], after, step.place)
        if why is None and any(len(self._spread(t)) > 1 for t in (*before, *after)):
            why = f"'{name}' lays channels over two dimensions"
        return after, why

    def counted(self, shape: Sequence[Any], value: torch.Size, raw: int) -> Tensor | None:
        """Label what is made anew in the sizes given: as many channels as are counted; None where none are."""
        if len(shape) != len(value) or any(count.share != 1 for count in shape if isinstance(count, Count)):
            return None
        dims = [dim for dim, size in enumerate(shape) if isinstance(size, Count)]
        if len(dims) != 1:
            return None
        counted = shape[dims[0]].labels
        made = self.classes.fresh(len(counted), raw)
        self.classes.join(counted, made)
        return along(made, dims[0], value)

    def shuffle(self, step: Step) -> Labelled:
        """Take labels through a shuffle of equal groups of channels, which stay equal."""
        labels, groups = step.operands[0], step.given("input", "groups")["groups"]
        if varying(labels) != {1} or isinstance(groups, Count):
            return None, "'channel_shuffle' of something else than whole channels"
        parts = line(labels, 1).view(groups, -1)
        self.classes.join(parts, parts[:1].expand_as(parts))
        return along(parts.t().flatten(), 1, labels.shape), None

    def settle(self, norms: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Keep the channels without which a number that the network computes from them would be another.

        Args: norms, the labels before and after each BatchNorm: where it reads all that another one makes, their
        number is the same if they are one channel.
        """
        sides = [np.concatenate([part.numpy() for part in side]) for side in zip(*norms, strict=True)] or [_NONE, _NONE]
        connected = merged(self.classes.roots(), *sides)
        for terms, _, _ in self._promises:
            if len(terms) == 2 and not sum(share for _, share in terms):
                before, after = (labels.numpy() for labels, _ in terms)
                if before.shape == after.shape and np.array_equal(connected[before], connected[after]):
                    self.classes.join(*(labels for labels, _ in terms))
        roots = self.classes.roots()
        for terms, multiple, why in self._promises:
            scale = lcm(*(share.denominator for _, share in terms))
            numbers = [roots[labels.numpy()].flatten() for labels, _ in terms]
            weights = [int(share * scale) for _, share in terms]
            found, places = np.unique(np.concatenate(numbers), return_inverse=True)
            each = np.repeat(weights, [len(some) for some in numbers])
            tally = np.bincount(places, each, len(found)).round().astype(np.int64)
            odd = tally % (multiple * scale) if multiple else tally
            self.classes.freeze(torch.from_numpy(found[odd != 0]), why)
        self._promises = []

    def _spread(self, labels: Tensor) -> set[int]:
        vary = varying(labels)
        if len(vary) < 2 or self.classes.is_free(labels):
            return set() if len(vary) > 1 else vary
        return varying(tight(torch.from_numpy(self.classes.roots()[labels.numpy()])))

    def _reshaped(self, name: str, asked: Sequence[Any], labels: Tensor, place: str) -> str | None:
        """Bind channels along dimensions whose size is written down; one dimension may shrink with its channels."""
        vary = varying(labels)
        written = {d for d in vary if d < len(asked) and not isinstance(asked[d], Count) and asked[d] != -1}
        if self.classes.is_free(labels):
            return f"the size of a parameter is written into '{name}' (use -1)" if written else None
        if len(vary) == 1 and written:
            return f"the number of channels is written into '{name}' (use flatten(1) or -1)"
        for dim in written if len(vary - written) == 1 else ():
            some = compact(labels)
            self.classes.join(some, some.narrow(dim, 0, 1).expand_as(some))
        if len(vary) > 1 and len(vary - written) != 1:
            return f"'{name}' lays channels over two dimensions"
        for dim in vary - written:
            if isinstance(asked[dim], Count):
                terms = [asked[dim].term, (line(labels, dim), Fraction(-1))]
                self._promises.append((terms, 0, f"'{name}' counts other channels at {place}"))
        return None

    def _chosen(self, name: str, args: Any, kwargs: Any, labels: Tensor, after: list[Tensor], place: str) -> str | None:
        """Bind the parts of a chunk or split in equal parts; other choices along the channels freeze them."""
        if name == "getitem" and not _is_plain_index(args[1]) and not self._stands_apart(args[1], labels):
            return "'getitem' chooses by a list or tensor"
        whole = distinct(labels)
        if name == "roll":
            dims = (*args[2:], *kwargs.get("dims", ()))
            flat = dims[0] if dims and isinstance(dims[0], (tuple, list)) else dims
            if flat and not varying(labels) & {dim % labels.dim() for dim in flat}:
                return None
        elif all(np.array_equal(distinct(t), whole) for t in after):
            return None
        if self._is_alike(labels, after):
            return None
        size = args[1] if len(args) > 1 else kwargs.get("split_size_or_sections", kwargs.get("split_size"))
        equal = len(after) > 1 and len({t.shape for t in after}) == 1
        counted = isinstance(size, Count) or (
            isinstance(size, (list, tuple)) and bool(size) and all(isinstance(part, Count) for part in size)
        )
        if name in ("getitem", "narrow") and self._halved(name, args, kwargs, labels, place):
            return None
        if name not in ("chunk", "split", "split_with_sizes", "tensor_split") or not equal:
            return f"'{name}' chooses channels by position"
        if name in ("split", "split_with_sizes") and not counted:
            return f"'{name}' chooses channels by position"
        for part in after[1:]:
            self.classes.join(compact(after[0]), compact(part))
        for one in parts_of(size, Count) if name.startswith("split") else ():
            terms = [one.term, (compact(after[0]).flatten(), Fraction(-1))]
            self._promises.append((terms, 0, f"'{name}' counts other channels at {place}"))
        return None

    def _halved(self, name: str, args: Any, kwargs: Any, labels: Tensor, place: str) -> bool:
        """Bind equal parts of the channels of which some are chosen, by bounds that are counted."""
        (dim,) = varying(labels) if len(varying(labels)) == 1 else (-1,)
        if name == "narrow":
            given = dict(zip(("input", "dim", "start", "length"), args, strict=False)) | kwargs
            asked, chosen = {given["dim"] % labels.dim(): (given["start"], given["length"])}, None
            bounds = asked.get(dim, ())
        else:
            parts = args[1] if isinstance(args[1], tuple) else (args[1],)
            places = [part for part in parts if part is not None and part is not Ellipsis]
            chosen = places[dim] if len(places) == len(parts) and 0 <= dim < len(places) else None
            if not isinstance(chosen, slice) or plain(chosen.step) not in (None, 1):
                return False
            bounds = (chosen.start, chosen.stop)
        counted = [bound for bound in bounds if isinstance(bound, Count)]
        if not counted or any(type(bound) is int and bound for bound in bounds):
            return False
        own = line(labels, dim)
        size = gcd(len(own), *map(plain, counted))
        blocks = own.view(-1, size)
        self.classes.join(blocks[:1].expand_as(blocks), blocks)
        why = f"'{name}' counts other channels at {place}"
        for bound in counted:
            terms = [bound.term, (own, Fraction(-plain(bound), len(own)))]
            self._promises.append((terms, 0, why))
        return True

    def _stands_apart(self, index: Any, labels: Tensor) -> bool:
        """Tell whether lists or tensors choose among places alone: dimensions before and after hold the channels."""
        parts = index if isinstance(index, tuple) else (index,)
        if any(part is None or part is Ellipsis for part in parts):
            return False
        vary = varying(labels)
        chosen = {d for d, part in enumerate(parts) if not isinstance(part, (int, slice))}
        if any(isinstance(part, Tensor) and part.dim() > 1 and part.dtype == torch.bool for part in parts):
            return False
        return not chosen & vary and len(parts) <= labels.dim()

    def _is_alike(self, labels: Tensor, after: Sequence[Tensor]) -> bool:
        """Tell whether the channels left out are of the classes of those that were chosen, in equal number each.

        So it is where a dimension of written size holds channels that live or die together.
        """
        if len(varying(labels)) < 2:
            return False
        roots = self.classes.roots()
        want, counts = np.unique(roots[compact(labels).flatten().numpy()], return_counts=True)
        for part in after:
            have, some = np.unique(roots[compact(part).flatten().numpy()], return_counts=True)
            if not np.array_equal(want, have) or len(np.unique(counts / some)) > 1:
                return False
        return True

    def asked(self, name: str, args: Any, kwargs: Any) -> Sequence[Any]:
        """List the sizes that were asked for, by dimension of the result; -1 = it follows from the others."""
        if name.endswith("_as"):
            return self.sizes(args[1])
        if name == "unflatten":
            rest: list[Any] = [*args[1:], *(kwargs[key] for key in ("dim", "sizes") if key in kwargs)]
            dim, sizes = rest
            dim %= args[0].dim()
            return (*(-1,) * dim, *sizes, *(-1,) * (args[0].dim() - dim - 1))
        asked = kwargs.get("shape", kwargs.get("size", args[1:]))
        if len(asked) == 1 and isinstance(asked[0], (tuple, list)):
            asked = asked[0]
        if name == "expand":  # only what it makes larger is asked for
            before = (1,) * (len(asked) - args[0].dim()) + tuple(args[0].shape)
            return tuple(-1 if old == plain(new) else new for old, new in zip(before, asked, strict=False))
        return tuple(asked)


_SIZED = ("zeros", "ones", "empty", "rand", "randn")
_NONE: Ints = np.zeros(0, np.int64)


def _is_plain_index(index: Any) -> bool:
    parts = index if isinstance(index, tuple) else (index,)
    return all(part is None or part is Ellipsis or isinstance(part, (int, slice)) for part in parts)
