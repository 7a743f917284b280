"""Named, complete configurations. Each docstring says where it comes from, on what it runs and what to expect."""

import inspect
from collections.abc import Callable, Sequence

from netslim.data import DataConfig
from netslim.launch.config import FinetuneConfig, PruneConfig, RunConfig, run_directory, unread_fields
from netslim.launch.help import list_presets as list_presets
from netslim.launch.help import nearest_preset
from netslim.launch.reading import as_it_began, parse, warn_of_unread
from netslim.train import FitConfig, ModelConfig, SparsityConfig


def digits() -> RunConfig:
    """VGG-11 on scikit-learn's 1,797 handwritten digits: the demonstration, in two CPU processes.

    Origin: ours. Hardware: two CPU cores, under two minutes, no download.
    Expected: at least 95 % at ratio 0.5 and 90 % at ratio 0.9, fine-tuned.
    Command: netslim run digits
    """
    return RunConfig(
        data=DataConfig(source="digits", size=32, batch_size=64, flip=False, pad=2),
        model=ModelConfig(name="vgg11", width=0.25),
        sparsify=FitConfig(epochs=14, lr=0.1, schedule="onecycle", weight_decay=1e-4),
        sparsity=SparsityConfig(weight=1e-2),
        # without a floor 90 % leaves single channels, through which little can be learnt
        prune=PruneConfig(ratio=(0.5, 0.9), min_share=0.05),
        finetune=FinetuneConfig(epochs=10, lr=0.02, schedule="onecycle", weight_decay=1e-4),
        cpu=True,
        num_processes=2,
    )


def lab_vgg19_cifar10() -> RunConfig:
    """VGG-19 on CIFAR-10 as in the lab report that netslim began with: lambda 1e-5, ratios 0.5 and 0.9.

    Origin: a student's lab report. Hardware: one GPU.
    Expected by the report: 10 % right after the cut, 91 % and 88 % fine-tuned. docs/lab.md says why, and what to do.
    Command: netslim run lab-vgg19-cifar10 --data.root FOLDER
    """
    return _cifar10(ModelConfig(name="vgg19"), weight=1e-5, ratios=(0.5, 0.9))


def vgg19_cifar10() -> RunConfig:
    """VGG-19 on CIFAR-10 as in the paper: lambda 1e-4, 70 % of the channels, 160 epochs.

    Origin: Liu et al. 2017, table 1, arXiv 1708.06519. Hardware: one GPU or more.
    Expected by the paper: 93.66 % dense, 93.80 % fine-tuned with 88.5 % fewer parameters.
    Command: netslim run vgg19-cifar10 --data.root FOLDER
    """
    return _cifar10(ModelConfig(name="vgg19"), weight=1e-4, ratios=(0.7,))


def preresnet164_cifar10() -> RunConfig:
    """Pre-activation ResNet-164 on CIFAR-10: lambda 1e-5, ratios 0.4 and 0.6.

    Origin: Liu et al. 2017, table 1, arXiv 1708.06519. Hardware: one GPU or more.
    Expected by the paper: 94.58 % dense, 94.92 % and 94.73 % fine-tuned.
    Command: netslim run preresnet164-cifar10 --data.root FOLDER
    """
    return _cifar10(ModelConfig(name="preresnet164"), weight=1e-5, ratios=(0.4, 0.6))


def densenet40_cifar10() -> RunConfig:
    """DenseNet-40 with growth 12 on CIFAR-10: lambda 1e-5, ratios 0.4 and 0.7.

    Origin: Liu et al. 2017, table 1, arXiv 1708.06519. Hardware: one GPU or more.
    Expected by the paper: 93.89 % dense, 94.81 % and 94.35 % fine-tuned.
    Command: netslim run densenet40-cifar10 --data.root FOLDER
    """
    return _cifar10(ModelConfig(name="densenet40"), weight=1e-5, ratios=(0.4, 0.7))


def resnet50_imagenet() -> RunConfig:
    """ResNet-50 on ImageNet folders (train/CLASS/*, val/CLASS/*): 90 epochs, ratio 0.5 of the channels.

    Origin: the usual 90-epoch recipe (He et al. 2016, arXiv 1512.03385). Hardware: eight GPUs.
    Expected: not measured by us. Images are stored at 224 x 224 and augmented by padded translation and flip, which
    costs accuracy against random resized crops.
    Command: netslim run resnet50-imagenet --data.root FOLDER
    """
    schedule = FitConfig(epochs=90, lr=0.4, schedule="cosine", warmup_epochs=5, nesterov=True, label_smoothing=0.1)
    return RunConfig(
        data=DataConfig(source="folder", size=224, batch_size=1024, pad=28, quality=90, num_workers=8),
        model=ModelConfig(name="resnet50", initial_gamma=None),
        sparsify=schedule,
        sparsity=SparsityConfig(weight=1e-5),
        prune=PruneConfig(ratio=(0.5,), min_share=0.1),
        finetune=FinetuneConfig(epochs=30, lr=0.04, schedule="cosine", nesterov=True, label_smoothing=0.1),
    )


def _cifar10(model: ModelConfig, weight: float, ratios: tuple[float, ...]) -> RunConfig:
    """The paper's training: 160 epochs, batch 64, learning rate 0.1 divided by 10 at one half and three quarters.

    And its pruning: every scale counts by itself, also where the network couples channels.
    """
    return RunConfig(
        data=DataConfig(source="cifar10", size=32, batch_size=64),
        model=model,
        sparsify=FitConfig(epochs=160, lr=0.1, schedule="step"),
        sparsity=SparsityConfig(weight=weight),
        prune=PruneConfig(ratio=ratios, coupling="select"),
        finetune=FinetuneConfig(epochs=160, lr=0.1, schedule="step"),
    )


PRESETS: dict[str, Callable[[], RunConfig]] = {
    function.__name__.replace("_", "-"): function
    for function in (
        digits,
        lab_vgg19_cifar10,
        vgg19_cifar10,
        preresnet164_cifar10,
        densenet40_cifar10,
        resnet50_imagenet,
    )
}


def find_preset(name: str) -> Callable[[], RunConfig]:
    """The preset of this name; raises ValueError that names the nearest."""
    if name not in PRESETS:
        raise ValueError(nearest_preset(name))
    return PRESETS[name]


def read_preset(command: str, name: str, flags: Sequence[str], *, is_run: bool = True) -> RunConfig:
    """The configuration that flags make of a preset; raises what `find_preset` and `parse` do.

    Of a run that goes on what `as_it_began` says; of any run, what nothing reads of it is said.
    """
    make = find_preset(name)
    config = parse(f"{command} {name}", inspect.getdoc(make) or "", make(), flags)
    if not is_run:
        return config
    warn_of_unread(make(), config, unread_fields(config))
    return as_it_began(config, run_directory(name, config), flags)
