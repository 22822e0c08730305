"""How to get what an extra brings, in the way in which this copy of deformconv was installed."""

from __future__ import annotations

from typing import Any

__all__ = ["command", "import_for"]


def import_for(user: str, module: str, package: str) -> Any:
    """Import a module for a function or class of ours; where its `package` is missing, the error says who needs it."""
    from importlib import import_module

    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise ModuleNotFoundError(
            f"{user} needs {package}, which is not installed: pip install {package}", name=package
        ) from None


def command(extra: str, *packages: str) -> str:
    """What to type for an extra.

    The extra is asked for by the name under which pip found deformconv: in an index, in a folder (a clone, editable or not),
    in a file, at an address. Where that is unknown or gone, the command names the `packages` themselves.
    """
    from importlib.metadata import PackageNotFoundError, distribution
    from json import loads
    from pathlib import Path
    from urllib.parse import urlparse
    from urllib.request import url2pathname

    alone = f"pip install {' '.join(map(_quoted, packages))}"
    here = Path(__file__).resolve().parent
    try:
        found = distribution("deformconv")
    except PackageNotFoundError:  # a folder on the path
        return alone
    text = found.read_text("direct_url.json")  # https://packaging.python.org/specifications/direct-url
    origin = loads(text) if text else {}
    address, editable = origin.get("url", ""), origin.get("dir_info", {}).get("editable", False)
    path = Path(url2pathname(urlparse(address).path)) if address.startswith("file:") else None
    installed = Path(str(found.locate_file("deformconv"))).resolve()
    ours = path is not None and path.resolve() in here.parents if editable else installed == here
    if not ours or (path is not None and not path.exists()):
        return alone
    if path is not None:
        return f"pip install {'--editable ' * editable}{_quoted(f'{path}[{extra}]')}"
    if "vcs_info" in origin:
        address = f"{origin['vcs_info']['vcs']}+{address}@{origin['vcs_info']['commit_id']}"
    return f"pip install {_quoted(f'deformconv[{extra}]' + (f' @ {address}' if address else ''))}"


def _quoted(word: str) -> str:
    return word if word.replace("-", "").replace("_", "").isalnum() else f"'{word}'"
