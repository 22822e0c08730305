"""The command line: help, exit codes, and what each command says."""

import shutil
import subprocess
import sys

import pytest

from deformconv import __version__, installation
from deformconv.cli import doctor, warmup
from deformconv.cli import main as command_line
from deformconv.cli.main import main

ESCAPE = "\x1b"


def run(*arguments: str, prelude: str = "") -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, after some lines of Python."""
    code = f"import sys\n{prelude}\nfrom deformconv.cli.main import main\nsys.exit(main({list(arguments)!r}))"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--help"], ["demo", "doctor", "warmup", "Commands:"]),
        (["demo", "--help"], ["--fast", "--seeds", "--output", "--seed", "digits"]),
        (["warmup", "-h"], ["--dtype", "--rank", "DEFORMCONV_CACHE_DIR"]),
        (["doctor", "--help"], ["backends"]),
        (["--version"], [__version__]),
    ],
)
def test_help(arguments, words, capsys):
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert all(word in text for word in words)
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dance"], "dance"),
        (["demo", "--sedes", "3"], "--seeds"),
        (["demo", "--seeds", "0"], "--seeds"),
        (["warmup", "--dtype", "int8"], "float32"),
        (["warmup", "--rank", "4"], "--rank"),
    ],
)
def test_a_wrong_call_is_explained_and_ends_with_2(arguments, message, capsys):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_the_module_runs_as_the_command_does():
    result = subprocess.run([sys.executable, "-m", "deformconv.cli", "--version"], capture_output=True, text=True, check=True)
    assert result.stdout == f"deformconv {__version__}\n"


def test_an_interrupt_ends_with_130_and_a_short_message(monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(warmup, "run", interrupted)
    assert main(["warmup"]) == 130
    assert capsys.readouterr().err.strip() == "Interrupted: nothing is left half-written."


def test_the_demo_says_in_one_sentence_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(command_line, "find_spec", lambda name: None if name in ("torch", "rich") else object())
    assert main(["demo"]) == 1
    assert capsys.readouterr().err == (
        f"Error: the demo needs torch, rich, not installed here: {installation.command('demo', 'torch', 'rich')}\n"
    )


def test_the_gluon_demo_says_in_one_sentence_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(command_line, "find_spec", lambda name: None if name == "mxnet" else object())
    assert main(["demo-gluon"]) == 1
    assert capsys.readouterr().err == (
        f"Error: the Gluon demo needs mxnet, not installed here: {installation.command('demo-gluon', 'mxnet')}\n"
    )


def test_the_demo_says_at_once_that_its_folder_cannot_be_made(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command_line, "find_spec", lambda name: object())
    (tmp_path / "file").touch()
    assert main(["demo", "--output", str(tmp_path / "file" / "folder")]) == 1
    assert "Error: cannot make the folder" in capsys.readouterr().err


def test_the_command_imports_no_framework_before_it_knows_what_to_do():
    heavy = ("torch", "numba", "rich", "matplotlib")
    code = f"import deformconv.cli.main, sys; print([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.fixture
def damaged(tmp_path, monkeypatch):
    """The only damaged file of a cache that has all kernels for two axes."""
    from deformconv.runtime import cache

    assert run("warmup", "--rank", "2").returncode == 0
    for file in cache.cached_files():
        if not file.name.startswith("collect-"):  # there may be others than for two axes
            (tmp_path / file.parent.name).mkdir(exist_ok=True)
            shutil.copy(file, tmp_path / file.parent.name)
    monkeypatch.setenv("DEFORMCONV_CACHE_DIR", str(tmp_path))
    assert run("warmup", "--rank", "2").returncode == 0
    (file,) = tmp_path.rglob("collect-*.bin")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    return file


class TestWarmup:
    def test_options_reach_the_kernels(self, monkeypatch, capsys):
        from deformconv.ops.conv import cpu

        calls = []

        def compile_all(dtypes, ranks, notify):
            calls.append((list(dtypes), list(ranks)))
            notify("this and that")

        monkeypatch.setattr(cpu, "warmup", compile_all)
        main(["warmup"])
        main(["warmup", "--dtype", "all", "--rank", "3", "--rank", "1"])
        assert calls == [(["float32"], [1, 2, 3]), (["float32", "float64"], [3, 1])]
        assert "this and that ...\n" in capsys.readouterr().out

    def test_what_cannot_be_kept_ends_with_1(self, monkeypatch, capsys):
        from deformconv.ops.conv import cpu
        from deformconv.runtime import cache

        monkeypatch.setattr(cpu, "warmup", lambda *_, **__: None)
        monkeypatch.setattr(cache, "cached_files", tuple)
        monkeypatch.setattr(cache, "cache_folder", lambda: None)
        assert main(["warmup"]) == 1
        assert "DEFORMCONV_CACHE_DIR" in capsys.readouterr().err

    @pytest.mark.slow
    def test_kernels_are_compiled_once(self):
        assert run("warmup", "--rank", "2").returncode == 0
        again = run("warmup", "--rank", "2")
        assert again.returncode == 0 and again.stdout.splitlines()[-1].startswith("Nothing to compile: ")

    def test_a_damaged_file_is_compiled_again(self, damaged):
        result = run("warmup", "--rank", "2")
        assert result.returncode == 0 and "\n1 kernels compiled in " in result.stdout
        assert f"{damaged} is damaged: the kernel is compiled again\n" in result.stderr
        assert run("warmup", "--rank", "2").stdout.splitlines()[-1].startswith("Nothing to compile: ")


class TestDoctor:
    def test_a_sound_installation_ends_with_0(self, capsys):
        assert main(["doctor"]) == 0
        text = capsys.readouterr().out
        for title in ("Versions", "Processor", "Kernel cache", "Backends", "Self-test"):
            assert f"\n{title}" in text
        assert "cpu backward      ok" in text and "All in order." in text
        assert "FAILED" not in text and ESCAPE not in text
        assert max(len(line) for line in text.splitlines() if "/" not in line) <= 80

    @pytest.mark.slow
    def test_without_torch(self):
        result = run("doctor", prelude="sys.modules['torch'] = None")
        assert result.returncode == 0, result.stdout + result.stderr
        assert "torch             not installed" in result.stdout

    def test_a_wrong_result_ends_with_1(self, monkeypatch, capsys):
        right = doctor._values

        def wrong(backend, *arguments):
            values = right(backend, *arguments)
            if backend == "portable":
                values["output"] = values["output"] * 1.001
            return values

        monkeypatch.setattr(doctor, "_values", wrong)
        assert main(["doctor"]) == 1
        text = capsys.readouterr().out
        assert "portable forward  FAILED: error 1.0e-03 in output" in text
        assert text.endswith("Not in order: portable forward.\n")

    def test_nan_is_a_wrong_result(self):
        import numpy as np

        assert doctor._verdict({"a": np.array([np.nan, 1])}, {"a": np.ones(2)}).startswith("FAILED: error nan in a")

    def test_a_section_that_breaks_does_not_hide_the_others(self, monkeypatch, capsys):
        def broken():
            raise OSError("no such processor")
            yield

        monkeypatch.setattr(doctor, "_processor", broken)
        assert main(["doctor"]) == 1
        text = capsys.readouterr().out
        assert "FAILED: OSError: no such processor" in text
        assert "cpu forward       ok" in text and text.endswith("Not in order: processor.\n")

    def test_a_cache_that_cannot_be_written_is_reported(self, monkeypatch, capsys):
        from deformconv.runtime import cache

        monkeypatch.setattr(cache, "cache_folder", lambda: None)
        assert main(["doctor"]) == 0
        assert "DEFORMCONV_CACHE_DIR" in capsys.readouterr().out

    def test_a_damaged_file_is_named_before_the_self_test_writes_it_again(self, damaged):
        kernels = len(list(damaged.parents[1].rglob("*.bin")))
        first, second = run("doctor"), run("doctor")
        assert first.returncode == second.returncode == 0, first.stdout + first.stderr
        assert f"kernels in it     {kernels - 1}\n  damaged " in first.stdout
        assert f"{damaged}: its" in " ".join(first.stdout.split()) and "All in order." in first.stdout
        assert f"kernels in it     {kernels}\n" in second.stdout
        assert "  damaged " not in second.stdout and "is damaged" not in second.stderr
