"""The site's first page, its table of contents, and notebooks as pages."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from myst_parser.sphinx_ import Parser
from sphinx.application import Sphinx

# What the sidebar shows under which heading. The README ends with it, on the site alone.
CONTENTS = {
    "Start": ["first-steps", "choosing", "offsets", "supported", "gallery"],
    "Notebooks": ["notebooks/first_layer", "notebooks/swap_and_fine_tune", "notebooks/where_it_looks"],
    "Guides": [
        "pytorch",
        "gpu",
        "looking",
        "detection",
        "attention",
        "family",
        "jax",
        "flax",
        "equinox",
        "keras",
        "gluon",
        "serving",
        "deploy",
        "performance",
        "extending",
    ],
    "Coming from": [
        "checkpoints",
        "from-torchvision",
        "from-mmcv",
        "from-transformers",
        "from-internimage",
        "from-detectron2",
        "from-dcnv2",
        "from-basicsr",
        "from-paddledetection",
        "from-mxnet",
    ],
    "API": [
        "api/root",
        "api/torch",
        "api/jax",
        "api/flax",
        "api/equinox",
        "api/keras",
        "api/gluon",
        "api/vision",
        "api/convert",
        "api/plots",
    ],
    "Behind it": ["mathematics", "design", "style", "../benchmarks/README", "../benchmarks/detection"],
    "The project": ["../CHANGELOG", "../VERSIONING", "../CONTRIBUTING", "../SECURITY", "../CODE_OF_CONDUCT"],
}


class Notebook(Parser):
    """A notebook is read as Markdown: its cells, and what they printed and drew when it was last run."""

    supported = ("notebook",)

    def parse(self, inputstring: str, document: Any) -> None:
        super().parse(written(json.loads(inputstring), Path(document["source"]).name), document)


def written(notebook: dict[str, Any], name: str) -> str:
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", ()):
            if "text" in output:
                parts.append("```text\n" + "".join(output["text"]).rstrip("\n") + "\n```")
            elif "image/png" in output.get("data", ()):
                image = "".join(output["data"]["image/png"]).replace("\n", "")
                parts.append(f'<img alt="What the program above draws" src="data:image/png;base64,{image}">')
    return "\n\n".join([*parts, f"The notebook itself: {{download}}`{name}`\n"])


def add_contents(app: Sphinx, docname: str, source: list[str]) -> None:
    if docname != app.config.root_doc:
        return
    for caption, pages in CONTENTS.items():
        entries = "\n".join(str(Path("docs", page)).replace("docs/../", "") for page in pages)
        source[0] += f"\n```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{entries}\n```\n"


def add_index(app: Sphinx, error: Exception | None) -> None:
    if error is None and app.builder.format == "html":
        shutil.copyfile(Path(app.outdir) / "README.html", Path(app.outdir) / "index.html")


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_source_parser(Notebook)
    app.connect("source-read", add_contents)
    app.connect("build-finished", add_index)
    return {"parallel_read_safe": True}
