"""Which processor this is."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from deformconv.runtime.host import arm_features, processor_name

TWO = "".join(
    f"processor\t: {number}\nvendor_id\t: GenuineIntel\ncpu family\t: 6\nmodel\t\t: {model}\nmodel name\t: A: Processor\n\n"
    for number, model in enumerate((207, 208))
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (TWO, "A: Processor (cpu family 6, model 207)"),  # the first one's
        ("model name\t: A Processor\n", "A Processor"),
        ("CPU implementer\t: 0x41\n", platform.machine()),  # as on ARM
        ("", platform.machine()),
    ],
)
def test_a_processor_s_name_and_numbers(text: str, expected: str, tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text(text)
    assert processor_name(file) == expected


def test_a_system_that_does_not_say(tmp_path: Path) -> None:
    assert processor_name(tmp_path / "absent") == (platform.processor() or platform.machine())


def test_what_an_arm_processor_has(tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text("processor\t: 0\nFeatures\t: fp asimd atomics\nCPU part\t: 0xd0c\n\nprocessor\t: 1\n")
    assert arm_features(file) == {"fp", "asimd", "atomics"}
    assert arm_features(tmp_path / "absent") == frozenset()


def test_it_is_read_nowhere_else() -> None:
    import deformconv

    package = Path(deformconv.__file__).parent
    readers = [file.relative_to(package).as_posix() for file in package.rglob("*.py") if "/proc/cpuinfo" in file.read_text()]
    assert readers == ["runtime/host.py"]
