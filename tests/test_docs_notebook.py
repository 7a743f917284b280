"""The notebook on the pages runs from top to bottom, in a kernel of its own, and comes to what it says."""

import os
import re
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell

NOTEBOOK = Path(__file__).parents[1] / "docs" / "slimming.ipynb"
HELD = """from netslim.prune import map_channels

class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Sequential(*block(1, 4)), nn.Sequential(*block(4, 4), nn.Conv2d(4, 2, 1))

    def forward(self, x):
        return self.last(torch.cumsum(self.first(x), 1))

map_channels(Counting(), images[:2])
"""
"""A cell more: a network of which some channels stay."""


def read() -> NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=4)


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> NotebookNode:
    """The notebook as it is after a run, and the result of one cell more."""
    place = tmp_path_factory.mktemp("notebook")
    notebook = read()
    notebook.cells.append(new_code_cell(HELD))
    with pytest.MonkeyPatch.context() as patch:
        for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR"):
            patch.setenv(name, str(place / name.lower()))
        patch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
        NotebookClient(notebook, kernel_name="python3", resources={"metadata": {"path": str(place)}}).execute()
    assert (place / "runs" / "slimming" / "weights.safetensors").is_file()
    return notebook


def shown_by(notebook: NotebookNode, code: str) -> dict[str, Any]:
    """What the cell that ends with this code shows, by kind."""
    (cell,) = [cell for cell in notebook.cells if cell.source.rstrip().endswith(code)]
    (data,) = [each.data for each in cell.outputs if each.output_type == "execute_result"]
    return dict(data)


def test_the_notebook_is_kept_without_what_a_run_leaves_in_it() -> None:
    codes = [cell for cell in read().cells if cell.cell_type == "code"]
    assert codes
    assert [(cell.outputs, cell.execution_count, dict(cell.metadata)) for cell in codes] == [([], None, {})] * len(
        codes
    )


def test_its_links_lead_somewhere() -> None:
    texts = "".join(cell.source for cell in read().cells if cell.cell_type == "markdown")
    targets = [target for target in re.findall(r"\]\(([^)\s]+)\)", texts) if not target.startswith("https://")]
    assert targets
    assert [target for target in targets if not (NOTEBOOK.parent / target).is_file()] == []


def test_it_slims_digits_to_less_than_half_and_keeps_the_accuracy(executed: NotebookNode) -> None:
    texts = [each.text for cell in executed.cells for each in cell.get("outputs", ()) if each.output_type == "stream"]
    lines = re.findall(r"^([a-z-]+): ([\d.]+)% of the test images, ([\d,]+) parameters$", "".join(texts), re.MULTILINE)
    found = {name: (float(accuracy), int(size.replace(",", ""))) for name, accuracy, size in lines}
    assert list(found) == ["sparse", "cut", "repaired", "fine-tuned", "loaded", "before"]
    assert found["fine-tuned"][0] > 90
    assert found["fine-tuned"][1] < found["sparse"][1] / 2
    assert found["loaded"] == found["fine-tuned"]
    assert found["before"] == found["sparse"]


def test_its_table_and_its_picture_are_shown_and_nothing_is_said_on_stderr(executed: NotebookNode) -> None:
    assert shown_by(executed, "\nscales")["text/html"].startswith("<table><tr><th>layer</th><th>channels</th>")
    assert shown_by(executed, "scales.plot()")["image/png"]
    assert shown_by(executed, "\nplan")["text/plain"].startswith("BatchNorm  before ->  after")
    streams = [each for cell in executed.cells for each in cell.get("outputs", ()) if each.output_type == "stream"]
    assert [each.text for each in streams if each.name == "stderr"] == []


def test_a_reason_names_the_cell_and_its_line(executed: NotebookNode) -> None:
    number = executed.cells[-1].execution_count
    assert f"[1] 'cumsum' over channels at In[{number}]:9" in shown_by(executed, "images[:2])")["text/plain"]
