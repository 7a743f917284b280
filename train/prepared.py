"""A model as an engine trains it: wrapped with its loss, with an optimizer, and with the penalty on its gammas."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from netslim.train.given import Slimming
from netslim.train.optim import FitConfig, make_optimizer
from netslim.train.ranks import Fragment, Runtime, synchronise
from netslim.train.sparsity import BetaFade, GammaPenalty, SparsityConfig
from netslim.train.supervised import Supervised


class Prepared:
    """The model that is trained, its engine and its penalty; the model may be exchanged for a smaller one."""

    def __init__(
        self,
        model: nn.Module,
        config: FitConfig,
        run: Runtime,
        gammas: Sequence[nn.Parameter],
        sparsity: SparsityConfig | None,
        slimming: Slimming | None,
    ) -> None:
        self.config, self.run = config, run
        self.sparsity, self.slimming = sparsity, slimming
        self.take(model, gammas)

    def take(self, model: nn.Module, gammas: Sequence[nn.Parameter]) -> None:
        """Give the model to the engine, with an optimizer and the penalty on its gammas."""
        run = self.run
        model.to(run.device, memory_format=run.memory_format)  # type: ignore[call-overload]
        self.model, self.gammas = model, list(gammas) if self.sparsity is not None else []
        self.trained = run.trainee(model)
        self.restore_layers = synchronise(self.trained) if run.config.batch_norm == "sync" else lambda: None
        self.optimizer = make_optimizer(self.trained, self.config)
        supervised = Supervised(self.trained, self.config.label_smoothing, run.autocast)
        self.wrapped, self.stepper = run.prepare(supervised, self.optimizer, self.config.clip)
        self.masters = run.masters(self.trained, self.wrapped, self.optimizer)
        self.refusals = run.refusals(self.wrapped, self.optimizer)
        if self.sparsity is not None:
            penalty = GammaPenalty(gammas, self.sparsity.weight, self.sparsity.method)
            names = _names_of(gammas, model)
            penalty.attach(self.optimizer, self.masters.fragments_of(names))
            if self.slimming is not None:
                BetaFade(self.sparsity.weight).attach(self.optimizer, self.betas(names))
        self.forward: Callable[..., tuple[Tensor, Tensor]] = self.wrapped
        if run.config.compile:
            torch.compiler.reset()  # or the networks before this one would count towards torch's limit of compilations
            self.forward = torch.compile(self.wrapped, dynamic=False)

    def betas(self, gammas: Sequence[str]) -> list[tuple[Fragment, Tensor]]:
        """What this rank steps of the betas beside these gammas, each with the gamma that the forward pass reads."""
        live = dict(self.trained.named_parameters())
        found: list[tuple[Fragment, Tensor]] = []
        for name in gammas:
            beta = f"{name.removesuffix('weight')}bias"
            fragment = self.masters.fragment_of(beta) if beta in self.masters.shapes else None
            if fragment is not None:
                found.append((fragment, live[name]))
        return found

    def exchange(self, model: nn.Module, gammas: Sequence[nn.Parameter], momenta: Mapping[str, Tensor]) -> None:
        """Go on with another model, whose parameters have these momenta; the draws of dropout go on too."""
        draws = [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if self.run.device.type == "cuda" else [])]
        self.restore_layers()
        self.run.release()
        self.take(model, gammas)
        weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        self.masters.restore(weights, momenta)
        torch.set_rng_state(draws[0])
        if draws[1:]:
            torch.cuda.set_rng_state(draws[1])

    def slimmed_model(self, state: str | None) -> nn.Module | None:
        """The network in the shapes of a checkpoint, if those are smaller; no other rank is asked."""
        if state is None:
            return None
        assert self.slimming is not None, "check_values asks"
        return self.slimming.restore(state)

    def resume_slimmed(self, model: nn.Module) -> None:
        """Take what `slimmed_model` gave; its weights and momenta are yet to be read."""
        assert self.slimming is not None, "it gave the model"
        zeros = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
        self.exchange(model, self.slimming.gammas(), zeros)

    def bring_together(self) -> None:
        """Give the model what all ranks have trained, statistics of all their images with it."""
        self.run.reconcile_statistics(self.trained)
        self.bring_back()

    def bring_back(self) -> None:
        """Give the model the weights and statistics of the copy that ZeRO trains."""
        if self.trained is not self.model:
            self.model.load_state_dict({**self.masters.weights(), **dict(self.trained.named_buffers())}, strict=False)


def _names_of(parameters: Sequence[nn.Parameter], model: nn.Module) -> list[str]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names[id(parameter)] for parameter in parameters if parameter.requires_grad]
