"""The report of a run."""

import json
from pathlib import Path
from typing import Any


def write(report: dict[str, Any], folder: Path) -> None:
    """Write report.json into the folder."""
    (folder / "report.json").write_text(json.dumps(report, indent=1))
