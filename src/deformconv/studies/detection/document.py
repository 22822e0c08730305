"""Write what the experiment found into the repository: `python -m deformconv.studies.detection.document FOLDER`, in its folder.

benchmarks/detection.json and its table, benchmarks/detection.md; docs/detection.md gets the table and pictures.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deformconv.bench.readme import replaced
from deformconv.studies.detection import report
from deformconv.studies.files import whole_file

__all__ = ["RESULTS", "main", "section"]

RESULTS, TABLES, GUIDE = "benchmarks/detection.json", "benchmarks/detection.md", "docs/detection.md"
PICTURES = {"detections.png": "docs/images/detections.png", "where-v2-looks.png": "docs/images/where_v2_looks.png"}


def section(found: Mapping[str, Any]) -> str:
    """What the guide says of it."""
    machine = found["machine"]
    return f"""
{report.tables(found).rstrip()}

Measured on {machine["processor"]}, two processes of one thread each; [every training](../{TABLES}).

![Detections of every arm in five test scenes](images/detections.png)

![Where the second version looks: sampling points of a convolution, and bins of boxes](images/where_v2_looks.png)

"""


def main(source: Path, repository: Path) -> None:
    """Write the files of the repository from those of a run."""
    found = json.loads((source / "detection.json").read_text(encoding="utf-8"))
    guide = repository / GUIDE
    texts = {
        RESULTS: json.dumps(found, indent=1) + "\n", TABLES: report.page(found),
        GUIDE: replaced(guide.read_text(encoding="utf-8"), section(found)),
    }  # fmt: skip
    for name, text in texts.items():
        with whole_file(repository / name) as part:
            part.write_text(text, encoding="utf-8")
    for name, target in PICTURES.items():
        if (source / name).exists():
            with whole_file(repository / target) as part:
                shutil.copyfile(source / name, part)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2] if len(sys.argv) > 2 else "."))
