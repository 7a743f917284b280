"""A sweep's directory: an index, and a run directory for each member of the grid."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from pydantic import TypeAdapter, ValidationError

from netslim.launch.config import RunConfig, to_dict
from netslim.launch.mistakes import naming
from netslim.launch.reading import from_dict
from netslim.launch.run import (
    FAILED_MARK,
    PREEMPTED_MARK,
    claim,
    commands_of,
    is_complete,
    is_occupied,
    read_json,
    stages_of,
    why_failed,
    write_json,
)

INDEX = "sweep.json"


@dataclass(frozen=True)
class Member:
    """A run of the sweep: sparsity training, or what follows it at one ratio."""

    weight: float
    seed: int
    ratio: float | None = None
    """None: sparsity training alone, whose model all ratios share."""

    @property
    def name(self) -> str:
        """Its directory in the sweep's."""
        short = f"{self.weight:g}"
        sparse = f"lambda-{short if float(short) == self.weight else self.weight}_seed-{self.seed}"
        return sparse if self.ratio is None else f"{sparse}_ratio-{max(f'{self.ratio:.2f}', str(self.ratio), key=len)}"

    @property
    def sparse(self) -> "Member":
        """The one that trains the sparse model of this one."""
        return replace(self, ratio=None)


@dataclass
class Sweep:
    directory: Path
    preset: str
    base: RunConfig
    """What all members have in common."""
    members: list[Member]
    """Each sparse model before what is made of it."""
    slurm: list[str]
    """The flags with which members were last submitted to SLURM."""
    jobs: dict[str, str]
    """The last job of each member that was submitted, by the member's name."""

    @classmethod
    def read(cls, directory: Path) -> Self:
        """Raises ValueError where the index is not what `write` left."""
        path = directory / INDEX
        values = read_json(path)
        try:
            members = TypeAdapter(list[Member]).validate_python(
                [{key: m[key] for key in ("weight", "seed", "ratio")} for m in values["members"]]
            )
            slurm = TypeAdapter(list[str]).validate_python(values["slurm"])
            jobs = TypeAdapter(dict[str, str]).validate_python(values["jobs"])
            base = from_dict(values["config"], str(path))
        except (KeyError, TypeError, ValidationError) as error:
            what = " ".join(str(error).split())[:200]
            raise ValueError(
                f"{path} is damaged ({what}); delete it, and give the sweep's whole command again"
            ) from None
        return cls(directory.absolute(), str(values["preset"]), base, members, slurm, jobs)

    def write(self) -> None:
        values = {
            "preset": self.preset,
            "members": [{"name": member.name, **vars(member)} for member in self.members],
            "jobs": self.jobs,
            "slurm": self.slurm,
            "config": to_dict(self.base),
        }
        with naming("--run-dir", self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
            write_json(self.directory / INDEX, values)

    def path(self, member: Member) -> Path:
        return self.directory / member.name

    def config_of(self, member: Member) -> RunConfig:
        """A member's own configuration."""
        ratios = tuple(dict.fromkeys(each.ratio for each in self.members if each.ratio is not None))
        return replace(
            self.base,
            sparsity=replace(self.base.sparsity, weight=member.weight),
            # with all of them, a ratio that cannot be reached is found out before sparsity training
            prune=replace(self.base.prune, ratio=ratios if member.ratio is None else (member.ratio,)),
            seed=member.seed,
            record=replace(
                self.base.record,
                group=self.base.record.group or self.directory.name,
                name=self.base.record.name and f"{self.base.record.name} {member.name}",
            ),
            run_dir=self.path(member),
        )

    def commands(self, member: Member) -> tuple[str, ...]:
        """What a member's processes do; of the stages of a ratio the first finds the sparse model that is shared."""
        return ("sparsify",) if member.ratio is None else commands_of("run", self.base)

    def directories(self, member: Member) -> list[Path]:
        """Of these stages, in their order."""
        stages = stages_of(self.commands(member), self.config_of(member))
        return [stage.directory(self.path(member)) for stage in stages]

    def make(self, members: Collection[Member]) -> None:
        """Make the run directories of members, each with its configuration; raises what `claim` raises."""
        for member in members:
            link = self.path(member) / "sparse"
            with naming("--run-dir", self.directory):
                link.parent.mkdir(parents=True, exist_ok=True)
                if member.ratio is not None and not link.is_symlink():
                    link.symlink_to(Path("..", member.sparse.name, "sparse"))
            claim(link.parent, self.preset, self.config_of(member))

    def is_done(self, member: Member) -> bool:
        return all(is_complete(directory) for directory in self.directories(member))

    def note_failure(self, members: Sequence[Member], why: str) -> Member | None:
        """Leave in the directory of the member at work why it failed, where that is not known already."""
        failed = next((member for member in members if not self.is_done(member)), None)
        if failed is not None and why_failed(self.path(failed)) is None:
            self.mark_failed(failed, why)
        return failed

    def mark_failed(self, member: Member, why: str) -> None:
        (self.path(member) / FAILED_MARK).write_text(f"{why}\n", encoding="utf-8")

    def why_failed(self, member: Member) -> str | None:
        """Why a member failed, or that its sparse model did, without which it is never run; None: neither did."""
        why = why_failed(self.path(member))
        if why is None and member.ratio is not None and why_failed(self.path(member.sparse)) is not None:
            return f"its sparse model, {member.sparse.name}, did"
        return why

    def state(self, member: Member, queue: Mapping[str, str]) -> str:
        """How far a member is; ``queue`` is what SLURM says of jobs that have not ended."""
        path, job = self.path(member), self.jobs.get(member.name, "")
        try:
            if self.is_done(member):
                return "done"
        except ValueError as error:
            return f"damaged: {error}"
        if job in queue:
            return queue[job].lower()
        if is_occupied(path):
            return "running"
        if (why := self.why_failed(member)) is not None:
            return f"failed: {why}"
        return "preempted" if (path / PREEMPTED_MARK).is_file() else "waiting"
