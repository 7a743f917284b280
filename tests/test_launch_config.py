"""Configuration: preset, file, flags; and what a mistake in them says."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from netslim.data import DataConfig
from netslim.launch.config import RunConfig, differences, fixed_fields, to_dict, to_yaml
from netslim.launch.presets import PRESETS, find_preset
from netslim.launch.reading import from_dict, parse
from netslim.prune import Origin, RepairConfig, Rules
from netslim.train import (
    CheckpointConfig,
    EngineConfig,
    FitConfig,
    ModelConfig,
    RecordConfig,
    SparsityConfig,
)


def resolve(*arguments: str) -> RunConfig:
    return parse("netslim run digits", "", PRESETS["digits"](), arguments)


def test_flags_override_a_file_which_overrides_the_preset(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("sparsity: {weight: 1e-4}\nsparsify:\n  epochs: 3\n")
    config = resolve("--config", str(file), "--sparsify.epochs", "5")
    assert (config.sparsity.weight, config.sparsify.epochs, config.data.batch_size) == (1e-4, 5, 64)


def test_several_ratios_are_given_one_after_the_other() -> None:
    assert resolve("--prune.ratio", "0.3", "0.7").prune.ratio == (0.3, 0.7)


def test_a_json_file_gives_back_the_configuration_it_was_made_of(tmp_path: Path) -> None:
    import json

    config = resolve("--seed", "4", "--engine.compile")
    file = tmp_path / "config.json"
    file.write_text(json.dumps(to_dict(config)))
    assert resolve("--config", str(file)) == config


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_resolves_and_says_where_it_comes_from(name: str) -> None:
    make = find_preset(name)
    assert isinstance(make(), RunConfig)
    for word in ("Origin:", "Hardware:", "Expected", f"Command: netslim run {name}"):
        assert word in (make.__doc__ or "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prune.ratio", "1.0"], "prune.ratio is 1.0: input should be less than 1"),
        (["--prune.ratio", "-0.1"], "prune.ratio is -0.1: input should be greater than or equal to 0"),
        (["--prune.ratio", "0.5", "0.5"], "names a ratio twice"),
        (["--sparsity.weight", "-1e-5"], "sparsity.weight is -1e-05: input should be greater than or equal to 0"),
        (["--sparsity.weight", "nan"], "sparsity.weight is nan"),
        (["--ratio", "0.5"], "there is no field --ratio; the nearest are --prune.ratio"),
        (["--sparsify.epoch", "3"], "there is no field --sparsify.epoch; the nearest are --sparsify.epochs"),
        (["--seed", "x"], "--seed: invalid literal for int"),
        (["--data.source", "digit"], "--data.source"),
        (["--sparsify.schedule", "cosin"], "invalid choice 'cosin' for argument '--sparsify.schedule'"),
        (["--sparsify.nesterov", "--sparsify.momentum", "0"], "nesterov needs a momentum"),
        (["--data.fit", "cut"], "invalid choice 'cut' for argument '--data.fit'"),
        (["--data.white", "0"], "data.white is 0"),
        (["--config"], "--config needs a file"),
        (["--config", "/nowhere.yaml"], "/nowhere.yaml: there is no such file"),
        (["--config", "a.yaml", "--config=b.yaml"], "--config names a.yaml and b.yaml, and takes one"),
    ],
)
def test_a_mistake_is_one_line_that_names_field_and_rule(arguments: list[str], message: str) -> None:
    with pytest.raises((ValueError, OSError)) as caught:
        resolve(*arguments)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prune: {rato: 0.5}", "there is no field prune.rato; the nearest are prune.ratio"),
        ("seed: many", "seed is 'many': input should be a valid integer"),
        ("- 1", "holds list, not fields with values"),
        ("a: [", "neither JSON nor YAML"),
    ],
)
def test_a_mistake_in_a_file_names_the_file_and_the_field(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"mine\.yaml") as caught:
        resolve("--config", str(file))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "section", "field", "value"),
    [
        ("prune: {ratio: 0.5}", "prune", "ratio", (0.5,)),
        ("prune: {ratio: 5e-1, exclude: features.0}", "prune", "exclude", ("features.0",)),
        ("finetune: {start: scratch, milestones: 0.5}", "finetune", "start", ("scratch",)),
        ("repair: {steps: absorb}", "repair", "steps", ("absorb",)),
        ("record: {tags: mine}", "record", "tags", ("mine",)),
        ("inspect: {ratios: 0.5}", "inspect", "ratios", (0.5,)),
    ],
)
def test_one_value_in_a_file_stands_for_a_list_of_one(
    text: str, section: str, field: str, value: tuple[object, ...], tmp_path: Path
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    assert getattr(getattr(resolve("--config", str(file)), section), field) == value


@pytest.mark.parametrize("name", PRESETS)
def test_a_yaml_file_gives_back_the_configuration_it_was_made_of(name: str, tmp_path: Path) -> None:
    config = PRESETS[name]()
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config))
    assert resolve("--config", str(file)) == config


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Origin(function="here"), "Origin: num_classes is missing"),
        (lambda: Origin(function="here", num_classes=2), "Origin: 'here' names no function; write module:function"),
        (lambda: Origin(function="my.nets:build", num_classes="2"), "num_classes is '2': input should be a valid int"),
        (lambda: Rules(rato=0.5), "Rules: rato is no field of it"),  # type: ignore[call-arg]
        (lambda: RepairConfig(steps=("absrb",)), "RepairConfig: steps.0 is 'absrb': input should be 'absorb'"),
        (lambda: DataConfig(size=3), "DataConfig: size is 3: input should be greater than or equal to 8"),
        (lambda: FitConfig(nesterov=True, momentum=0), "FitConfig: nesterov needs a momentum above 0"),
        (lambda: SparsityConfig(weight=-1), "SparsityConfig: weight is -1"),
        (lambda: EngineConfig(zero=5), "EngineConfig: zero is 5"),
        (lambda: CheckpointConfig(keep=0), "CheckpointConfig: keep is 0"),
        (lambda: ModelConfig(width=0), "ModelConfig: width is 0: input should be greater than 0"),
        (lambda: RecordConfig(wandb="on"), "RecordConfig: wandb is 'on'"),
        (lambda: RunConfig(seed=-1), "RunConfig: seed is -1"),
    ],
)
def test_a_mistake_in_python_is_one_line_too(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        make()
    assert "\n" not in str(caught.value)
    assert "pydantic" not in str(caught.value)


def test_an_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"no preset is called 'digit'; the nearest are digits"):
        find_preset("digit")


def test_differences_name_the_fields_and_pass_over_where_a_run_is_made() -> None:
    old = to_dict(resolve())
    new = to_dict(resolve("--sparsify.epochs", "2", "--num-processes", "1", "--record.wandb", "offline"))
    assert differences(old, new) == ["sparsify.epochs was 14, now 2"]


NEWER = ("data.fit", "data.upright", "data.white", "prune.normalise", "prune.scope")


def as_an_older_netslim_wrote_it(config: RunConfig) -> dict[str, Any]:
    """Without the fields that there were not yet."""
    values = to_dict(config)
    for name in NEWER:
        section, _, field = name.partition(".")
        del values[section][field]
    return values


def test_fields_that_an_older_run_does_not_name_are_no_difference_at_their_defaults() -> None:
    older = as_an_older_netslim_wrote_it(resolve())
    assert differences(older, to_dict(resolve())) == []
    # by which a checkpoint knows its run
    assert fixed_fields(older) == fixed_fields(to_dict(resolve()))
    assert to_dict(from_dict(older, "config.json")) == to_dict(resolve())


def test_fields_that_an_older_run_does_not_name_are_differences_elsewhere() -> None:
    older = as_an_older_netslim_wrote_it(resolve())
    other = resolve("--data.fit", "pad", "--data.no-upright", "--data.white", "4095", "--prune.scope", "layer")
    want = [
        'data.fit was "crop", now "pad"',
        "data.upright was true, now false",
        "data.white was null, now 4095.0",
        'prune.scope was "network", now "layer"',
    ]
    assert sorted(differences(older, to_dict(other))) == want


def test_the_launchers_mixed_precision_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert resolve().engine.precision == "bf16"
    assert resolve("--engine.precision", "no").engine.precision == "no"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(ValueError, match="the launcher asks for mixed precision fp8; netslim has no, bf16, fp16"):
        resolve()
