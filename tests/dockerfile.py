"""What examples/serving/Dockerfile does, without Docker: its steps, in a folder that stands for the image's root.

`python tests/dockerfile.py FOLDER` makes a fresh virtual environment there, runs every step of the Dockerfile in it, starts the
server and asks it for scores (`make check-serving`).
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import venv
from collections.abc import Iterator, Mapping
from pathlib import Path
from shutil import copy, copytree, ignore_patterns

PROJECT = Path(__file__).parents[1]
DOCKERFILE = PROJECT / "examples" / "serving" / "Dockerfile"
SHAPE_BYTES = 4 * 3 * 64 * 64


def steps(text: str) -> Iterator[tuple[str, str]]:
    """The instructions, with what follows them."""
    for line in text.replace("\\\n", " ").splitlines():
        if line.strip() and not line.startswith("#"):
            instruction, _, rest = line.partition(" ")
            yield instruction, rest.strip()


class Image:
    """A folder in which steps are run."""

    def __init__(self, root: Path, environment: Mapping[str, str], given: Mapping[str, str]) -> None:
        self.root, self.environment, self.given = root, dict(environment), given
        self.folder = root
        self.command: list[str] = []
        self.outputs: dict[str, str] = {}  # by RUN command

    def build(self, without: str = "(?!)") -> None:
        """Run the steps of the Dockerfile, without those RUN commands that a pattern matches."""
        for instruction, rest in steps(DOCKERFILE.read_text(encoding="utf-8")):
            if instruction == "ARG":
                name, _, default = rest.partition("=")
                self.environment[name] = self.given.get(name, self._filled(default))
            elif instruction == "ENV":
                name, _, value = rest.partition("=")
                value = self._filled(value)
                self.environment[name] = str(self._path(value)) if value.startswith("/") else value
            elif instruction == "WORKDIR":
                self.folder = self._path(rest)
                self.folder.mkdir(parents=True, exist_ok=True)
            elif instruction == "COPY":
                self._copy(*rest.split())
            elif instruction == "CMD":
                self.command = json.loads(rest)
            elif instruction == "RUN":
                if not re.match(without, rest):
                    self.outputs[rest] = self.run(["sh", "-c", rest])
            elif instruction not in ("FROM", "USER", "EXPOSE"):
                raise ValueError(f"{instruction} {rest}: nothing is known of this instruction")

    def _filled(self, value: str) -> str:
        return re.sub(r"\$(\w+)", lambda found: self.environment[found[1]], value)

    def _path(self, path: str) -> Path:
        return self.root / path.lstrip("/") if path.startswith("/") else self.folder / path

    def _copy(self, *paths: str) -> None:
        *sources, into = paths
        for source in sources:
            place = PROJECT / source
            if place.is_dir():  # of a folder, Docker copies what is in it
                copytree(place, self._path(into), ignore=ignore_patterns("__pycache__"))
            else:
                copy(place, self._path(into))

    def run(self, command: list[str]) -> str:
        """A command's output; it raises if the command fails."""
        done = subprocess.run(
            command, cwd=self.folder, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}")
        return done.stdout


def check(root: Path) -> None:
    """Build in a fresh environment and serve."""
    venv.create(root / "venv", with_pip=True)
    own = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "DEFORMCONV", "VIRTUAL"))}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = own | {"PATH": f"{root / 'venv' / 'bin'}:{os.environ['PATH']}", "WORKERS": "2"}
    image = Image(root, environment, own)
    image.build()
    for command, output in image.outputs.items():
        print(f"$ {command}\n  {output.splitlines()[-1]}")
    server = subprocess.Popen([*image.command, "--bind", f"127.0.0.1:{port}"], cwd=image.folder, env=image.environment)
    try:
        print(f"{len(_scores(port))} scores from {' '.join(image.command)}")
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(timeout=60)


def _scores(port: int) -> list[float]:
    request = urllib.request.Request(f"http://127.0.0.1:{port}", data=bytes(SHAPE_BYTES))
    for _ in range(60):
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                scores: list[float] = json.load(answer)
                return scores
        except OSError:  # it has not begun to listen
            time.sleep(1)
    raise RuntimeError("the server does not answer")


if __name__ == "__main__":
    folder = Path(sys.argv[1]).resolve()
    folder.mkdir(parents=True)
    check(folder)
