"""Runs laid out side by side in a W&B workspace, built without a network and saved to a stand-in for the server."""

import json
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from stand_in import KEY, account, server

from netslim.launch.compare.workspace import make_workspace, save_workspace

pytest.importorskip("wandb_workspaces", reason="needs the extra: pip install '.[workspaces]'")

GROUPS = ["first", "second"]


@pytest.fixture
def address(tmp_path: Path) -> Iterator[Callable[[str], None]]:
    with account(tmp_path / "home") as set_address:
        yield set_address


def spec_of(workspace: Any) -> dict[str, Any]:
    """As it is sent: plain JSON."""
    section: dict[str, Any] = json.loads(workspace._to_model().spec.model_dump_json(by_alias=True))["section"]
    return section


def panels_of(section: dict[str, Any], name: str) -> list[dict[str, Any]]:
    (found,) = [each for each in section["panelBankConfig"]["sections"] if each["name"] == name]
    panels: list[dict[str, Any]] = found["panels"]
    return panels


def test_a_workspace_shows_the_runs_of_the_groups_by_lambda_and_ratio() -> None:
    (runs,) = spec_of(make_workspace("netslim", "someone", GROUPS, "both"))["runSets"]
    (chosen,) = runs["filters"]["filters"]
    assert chosen["key"] == {"section": "run", "name": "group"}
    assert (chosen["op"], chosen["value"]) == ("IN", GROUPS)
    assert [key["name"] for key in runs["grouping"]] == ["lambda.value", "ratio.value"]


def test_a_workspace_plots_accuracy_against_cost_by_stage_and_by_epoch_and_shows_the_cuts() -> None:
    section = spec_of(make_workspace("netslim", "someone", GROUPS, "both"))
    *scatters, parallel = panels_of(section, "Accuracy against cost")
    axes = [(panel["config"]["xAxis"], panel["config"]["yAxis"]) for panel in scatters]
    assert axes[:2] == [(f"summary:{cost}", "summary:accuracy_finetuned") for cost in ("params", "macs")]
    columns = [column["accessor"] for column in parallel["config"]["columns"]]
    assert columns[:2] == ["config:lambda.value", "config:ratio.value"]
    assert columns[-1] == "summary:params"
    bars = [panel["config"]["metrics"] for panel in panels_of(section, "Accuracy by stage")]
    assert ["summary_metrics.accuracy_repaired"] in bars
    curve = panels_of(section, "Training")[0]["config"]
    assert (curve["xAxis"], curve["metrics"]) == ("epoch", ["accuracy"])
    pictures, table = panels_of(section, "Pruning")
    assert pictures["config"]["mediaKeys"] == ["channels_by_layer", "gamma_density"]
    assert "channels" in json.dumps(table["config"])


@pytest.mark.parametrize(("entity", "owner"), [("team", "team"), (None, "someone")])
def test_a_workspace_is_saved_where_the_runs_are(
    entity: str | None, owner: str, address: Callable[[str], None], capfd: pytest.CaptureFixture[str]
) -> None:
    with server() as there:
        address(there.url)
        where = save_workspace("netslim", entity, GROUPS, "both")
    (sent,) = there.variables("UpsertView2")
    assert (sent["entityName"], sent["projectName"], sent["displayName"]) == (owner, "netslim", "both")
    assert json.loads(sent["spec"])["section"]["runSets"][0]["filters"]["filters"][0]["value"] == GROUPS
    assert where.startswith(f"{there.url}/{owner}/netslim?nw=")
    assert KEY not in where + "".join(capfd.readouterr())


@pytest.mark.parametrize("status", [200, 403, 404])
def test_a_workspace_that_the_server_refuses_names_the_place_and_the_remedy(
    status: int, address: Callable[[str], None]
) -> None:
    with server() as there:
        address(there.url)
        there.refusals["UpsertView2"] = (status, "permission denied")
        with pytest.raises(ValueError, match=r"^W&B did not save .* in nobody/netslim \(.*\); name .*$") as said:
            save_workspace("netslim", "nobody", GROUPS, "both")
    assert "permission denied" in str(said.value)
    assert "\n" not in str(said.value)


def test_a_workspace_without_a_key_says_how_to_set_one(
    address: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    with server() as there:
        address(there.url)
        monkeypatch.delenv("WANDB_API_KEY")
        with pytest.raises(ValueError, match="needs a key; set one by `wandb login`"):
            save_workspace("netslim", None, GROUPS, "both")
    assert there.calls == []


def test_a_workspace_without_a_server_says_where_it_was_looked_for(address: Callable[[str], None]) -> None:
    with socket.socket() as taken:  # bound, so that nobody else answers there, and not listening
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        address(url)
        with pytest.raises(ValueError, match=f"W&B does not answer at {url}"):
            save_workspace("netslim", None, GROUPS, "both")


def test_a_workspace_without_the_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    monkeypatch.delitem(sys.modules, "wandb_workspaces.workspaces", raising=False)
    monkeypatch.delitem(sys.modules, "wandb_workspaces.reports.v2", raising=False)
    with pytest.raises(ValueError, match=r"pip install '\.\[workspaces\]'"):
        save_workspace("netslim", None, GROUPS, "both")
