"""A stage as a value: what it makes, where it leaves that, and what it is made from; no file is touched here."""

from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Literal, get_args

from netslim.launch.config import RunConfig, Start

Command = Literal["sparsify", "prune", "repair", "finetune"]
COMMANDS: tuple[Command, ...] = get_args(Command)
"""The commands that make a stage, in their order."""
StageName = Literal["sparse", "cut", "repaired", "finetuned", "finetuned_cut", "scratch"]
STAGE_NAMES: tuple[StageName, ...] = get_args(StageName)
"""What results.json calls the stages, in the order of a table's lines and columns."""


class Kind(Enum):
    """What a stage makes: the command for it, its name in results.json, and what its directory's name begins with."""

    SPARSE = "sparsify", "sparse", "sparse"
    CUT = "prune", "cut", "prune"
    REPAIRED = "repair", "repaired", "repair"
    FINETUNED = "finetune", "finetuned", "finetune"
    FINETUNED_CUT = "finetune", "finetuned_cut", "finetune-cut"
    SCRATCH = "finetune", "scratch", "scratch"

    def __init__(self, command: Command, stage_name: StageName, prefix: str) -> None:
        self.command, self.stage_name, self.prefix = command, stage_name, prefix


TRAINED: dict[Start, Kind] = {"slim": Kind.FINETUNED, "cut": Kind.FINETUNED_CUT, "scratch": Kind.SCRATCH}
"""What fine-tuning makes from each start."""


@dataclass(frozen=True)
class Pass:
    """One of the rounds of sparsity training and pruning by which a network comes to a ratio."""

    ratio: float
    """That the last of them reaches."""
    number: int = 1
    count: int = 1

    @property
    def share(self) -> float:
        """The share of all channels that is gone after this pass: each takes the same share of what is left."""
        return self.ratio if self.is_last else 1 - (1 - self.ratio) ** (self.number / self.count)

    @property
    def is_last(self) -> bool:
        return self.number == self.count

    @property
    def before(self) -> "Pass":
        """The pass before this one."""
        return replace(self, number=self.number - 1)


def passes_to(ratio: float, count: int) -> list[Pass]:
    """The passes by which a network comes to a ratio, in their order."""
    return [Pass(ratio, number, count) for number in range(1, count + 1)]


@dataclass(frozen=True)
class Stage:
    """One stage of a run. The first sparsity training is the same for all ratios, and of ratio 0."""

    kind: Kind
    turn: Pass

    @property
    def name(self) -> StageName:
        return self.kind.stage_name

    @property
    def ratio(self) -> float:
        """The share of all channels that is gone once it is done, up to those that sparsity training has cut itself."""
        return self.turn.before.share if self.kind is Kind.SPARSE else self.turn.share

    @property
    def directory_name(self) -> str:
        """As sparse, prune-0.50, finetune-0.50, and in earlier passes prune-0.50-pass-1."""
        if self.kind is Kind.SPARSE and self.turn.number == 1:
            return self.kind.prefix
        # two decimals sort and align; a ratio that has more keeps them
        name = f"{self.kind.prefix}-{max(f'{self.turn.ratio:.2f}', str(self.turn.ratio), key=len)}"
        is_last = self.turn.is_last and self.kind is not Kind.SPARSE
        return name if is_last else f"{name}-pass-{self.turn.number}"

    def directory(self, run_directory: Path) -> Path:
        """Where it leaves its artefact."""
        return run_directory / self.directory_name

    def is_last(self, config: RunConfig) -> bool:
        """Whether a whole run ends with it."""
        return self.kind is TRAINED[config.finetune.start[-1]] and self.turn.ratio == config.prune.ratio[-1]

    def sources(self, config: RunConfig) -> "tuple[Stage, ...]":
        """The stages that it is made from."""
        match self.kind:
            case Kind.SPARSE:
                return () if self.turn.number == 1 else (slim_stage(self.turn.before, config),)
            case Kind.CUT:
                return (Stage(Kind.SPARSE, self.turn),)
            case Kind.REPAIRED:
                return (Stage(Kind.SPARSE, self.turn), Stage(Kind.CUT, self.turn))
            case Kind.FINETUNED:
                return (slim_stage(self.turn, config),)
            case Kind.FINETUNED_CUT | Kind.SCRATCH:
                return (Stage(Kind.CUT, self.turn),)


SPARSE = Stage(Kind.SPARSE, Pass(0.0))
"""The first sparsity training, from which every ratio starts."""


def slim_stage(turn: Pass, config: RunConfig) -> Stage:
    """The one whose network a pass leaves to what follows."""
    return Stage(Kind.REPAIRED if config.repair.steps else Kind.CUT, turn)
