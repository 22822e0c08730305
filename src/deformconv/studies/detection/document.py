"""Write what the experiment found into the repository: `python -m deformconv.studies.detection.document FOLDER`, in its folder.

benchmarks/detection.json and its table, benchmarks/detection.md; docs/detection.md gets the table and pictures.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from deformconv.bench.readme import replaced
from deformconv.files import whole_file
from deformconv.studies.detection import report

__all__ = ["RESULTS", "main", "section", "write"]

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


def write(source: Path, repository: Path) -> None:
    """Write the files of the repository from those of a run; nothing where one is missing.

    Raises ClickException if the folder of the run or the repository lacks a file, or has another.
    """
    found = _results(source)
    guide = repository / GUIDE
    if not guide.is_file():
        raise click.ClickException(f"there is no {guide}: run this in a clone's folder, or name that after the run's")
    for name in PICTURES:
        if not (source / name).is_file():
            raise click.ClickException(f"{source} has no {name}, which the guide shows: it comes of a run with the arm v2")
    try:
        texts = {
            RESULTS: json.dumps(found, indent=1) + "\n", TABLES: report.page(found),
            GUIDE: replaced(guide.read_text(encoding="utf-8"), section(found)),
        }  # fmt: skip
    except (KeyError, TypeError):
        raise _foreign(source) from None
    except ValueError as error:
        raise click.ClickException(f"{guide}: {error}") from None
    for name, text in texts.items():
        with whole_file(repository / name) as part:
            part.write_text(text, encoding="utf-8")
    for name, target in PICTURES.items():
        with whole_file(repository / target) as part:
            shutil.copyfile(source / name, part)


def _results(source: Path) -> dict[str, Any]:
    """What the run wrote at its end."""
    path = source / "detection.json"
    if not path.is_file():
        raise click.ClickException(
            f"{source} has no detection.json, which a run writes at its end: `deformconv experiment detect --output {source}`"
        )
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise _foreign(source)
    return found


def _foreign(source: Path) -> click.ClickException:
    return click.ClickException(
        f"{source / 'detection.json'} is not what this version's `deformconv experiment detect` writes: run it again"
    )


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("repository", type=click.Path(exists=True, file_okay=False, path_type=Path), default=".")
def main(folder: Path, repository: Path) -> None:
    """Write what `deformconv experiment detect --output FOLDER` found into the REPOSITORY, this folder if none is named."""
    write(folder, repository)


if __name__ == "__main__":
    main()
