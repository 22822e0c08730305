"""What is found of Triton and of what it builds launchers with, and the sentences that say what to install."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest

from deformconv.runtime import toolchain

CACHED = [value for name in toolchain.__all__ if hasattr(value := getattr(toolchain, name), "cache_clear")]


@pytest.fixture(autouse=True)
def fresh():
    """Nothing is remembered, before and after."""
    for function in CACHED:
        function.cache_clear()
    yield
    for function in CACHED:
        function.cache_clear()


@pytest.fixture
def installed(monkeypatch):
    """Sets which package brings which version of the module `triton`, if any, on which system."""

    def install(package, version, platform="linux"):
        def version_of(name):
            if name == package:
                return version
            raise metadata.PackageNotFoundError(name)

        found = {} if package is None else {"triton": [package]}
        stand_in = SimpleNamespace(
            version=version_of, packages_distributions=lambda: found, PackageNotFoundError=metadata.PackageNotFoundError
        )
        monkeypatch.setattr(toolchain, "find_spec", lambda name: None if version is None else object())
        monkeypatch.setattr(toolchain, "metadata", stand_in)
        monkeypatch.setattr(toolchain, "sys", SimpleNamespace(platform=platform, version_info=(3, 12)))

    return install


@pytest.mark.parametrize(
    ("package", "version"),
    [
        ("triton", "3.3.0"),
        ("triton", "3.8.0+git1a2b3c"),
        ("triton", "10.0"),
        ("triton-windows", "3.4.0.post20"),
        ("pytorch-triton-rocm", "3.3.1"),
        ("a-triton-of-ones-own", "3.5.1"),
    ],
)
def test_a_triton_that_is_new_enough(installed, package, version):
    installed(package, version)
    assert toolchain.triton_version() == version
    assert toolchain.without_triton() is None


def test_a_triton_that_no_package_brought(installed):
    """As a folder of sources on the path."""
    installed(None, "any")
    assert toolchain.triton_version() == "unknown"
    assert toolchain.without_triton() is None


@pytest.mark.parametrize(
    ("platform", "sentence"),
    [
        ("linux", "Triton is not installed, which PyTorch's packages for GPUs bring on Linux: pip install triton"),
        ("win32", "Triton is not installed: pip install triton-windows"),
        ("darwin", "its kernels are written in Triton, which there is none of for macOS"),
    ],
)
def test_no_triton(installed, platform, sentence):
    installed(None, None, platform)
    assert toolchain.triton_version() is None
    assert toolchain.without_triton() == sentence


@pytest.mark.parametrize(
    ("platform", "package", "how"),
    [
        ("linux", "triton", "PyTorch 2.7 and newer bring it"),
        ("win32", "triton-windows", "pip install --upgrade triton-windows"),
    ],
)
@pytest.mark.parametrize("version", ["3.2.0", "2.10.1"])
def test_an_old_triton(installed, version, platform, package, how):
    installed(package, version, platform)
    assert toolchain.without_triton() == f"Triton is {version}, and its kernels need 3.3 or newer: {how}"


@pytest.fixture
def programs(monkeypatch):
    """Sets which programs there are, and CC."""

    def put(*names, cc=None):
        monkeypatch.setattr(toolchain.shutil, "which", lambda name: f"/usr/bin/{name}" if name in names else None)
        if cc is None:
            monkeypatch.delenv("CC", raising=False)
        else:
            monkeypatch.setenv("CC", cc)

    return put


@pytest.mark.parametrize(
    ("names", "cc", "found"),
    [
        (("gcc", "clang"), None, "/usr/bin/gcc"),
        (("clang", "cc"), None, "/usr/bin/clang"),
        (("gcc", "x86_64-conda-linux-gnu-cc"), "x86_64-conda-linux-gnu-cc", "/usr/bin/x86_64-conda-linux-gnu-cc"),
    ],
)
def test_the_compiler_that_triton_calls(programs, names, cc, found):
    programs(*names, cc=cc)
    assert toolchain.compiler() == found
    assert toolchain.without_compiler() is None


@pytest.mark.parametrize(
    ("names", "cc", "sentence"),
    [
        (
            (),
            None,
            "Triton has a C compiler build what launches kernels, and finds neither gcc nor clang: install one "
            "(apt-get install gcc), or set CC to one",
        ),
        (
            ("cc",),
            None,
            "Triton has a C compiler build what launches kernels, and finds neither gcc nor clang: set CC=/usr/bin/cc",
        ),
        (
            ("gcc",),
            "gcc -pthread",
            "CC is 'gcc -pthread', and Triton, which calls it as a C compiler, needs the name or path of a program there",
        ),
    ],
)
def test_no_compiler(programs, names, cc, sentence):
    programs(*names, cc=cc)
    assert toolchain.compiler() is None
    assert toolchain.without_compiler() == sentence


def test_triton_for_windows_brings_a_compiler(programs, monkeypatch):
    programs()
    monkeypatch.setattr(toolchain, "sys", SimpleNamespace(platform="win32"))
    assert toolchain.without_compiler() is None


@pytest.mark.parametrize(
    ("platform", "how"),
    [
        ("linux", "install those of this Python (apt-get install python3.12-dev)"),
        ("win32", "an embeddable Python has none, python.org's installer brings them"),
    ],
)
def test_the_headers(monkeypatch, tmp_path, platform, how):
    monkeypatch.setattr(toolchain, "sys", SimpleNamespace(platform=platform, version_info=(3, 12)))
    monkeypatch.setattr(toolchain.sysconfig, "get_path", lambda name, scheme: str(tmp_path))
    assert toolchain.without_headers() == (
        f"Triton builds what launches kernels with Python.h, which is not in {tmp_path}: {how}"
    )
    (tmp_path / "Python.h").touch()
    toolchain.without_headers.cache_clear()
    assert toolchain.without_headers() is None


def test_debians_python_has_its_headers_where_the_plain_scheme_says(monkeypatch):
    asked = []
    monkeypatch.setattr(toolchain.sysconfig, "get_default_scheme", lambda: "posix_local")
    monkeypatch.setattr(toolchain.sysconfig, "get_path", lambda name, scheme: asked.append((name, scheme)) or "/usr/include")
    assert toolchain.headers() == Path("/usr/include")
    assert asked == [("include", "posix_prefix")]


@pytest.mark.parametrize(("value", "expected"), [(None, False), ("0", False), ("", False), ("1", True), ("True", True)])
def test_the_interpreter(monkeypatch, value, expected):
    if value is None:
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    else:
        monkeypatch.setenv("TRITON_INTERPRET", value)
    assert toolchain.is_interpreted() is expected
    knobs = pytest.importorskip("triton.knobs")
    assert knobs.runtime.interpret is expected


def test_where_triton_keeps_machine_code(monkeypatch, tmp_path):
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    monkeypatch.setenv("TRITON_HOME", str(tmp_path))
    assert toolchain.kernel_folder() == tmp_path / ".triton" / "cache"
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "kernels"))
    assert toolchain.kernel_folder() == tmp_path / "kernels"
    monkeypatch.delenv("TRITON_CACHE_DIR")
    monkeypatch.delenv("TRITON_HOME")
    assert toolchain.kernel_folder() == Path.home() / ".triton" / "cache"


def test_triton_says_the_same():
    """Of its own choices, where it is installed."""
    build = pytest.importorskip("triton.runtime.build")
    if not hasattr(build, "_find_compiler"):
        pytest.skip("needs a Triton that finds its compiler by a function of its own")
    assert toolchain.triton_version() == sys.modules["triton"].__version__
    if toolchain.compiler() is None:
        with pytest.raises(RuntimeError, match="Failed to find C compiler"):
            build._find_compiler("c")
    else:
        assert toolchain.shutil.which(build._find_compiler("c")) == toolchain.compiler()


def test_looking_loads_neither_triton_nor_pytorch():
    code = f"""
import sys
from deformconv.runtime import toolchain
for name in {toolchain.__all__}:
    value = getattr(toolchain, name)
    value() if callable(value) else value
print([name for name in ("triton", "torch", "numba") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr
