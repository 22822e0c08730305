"""The command line: help, exit codes, and what each command says."""

import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from deformconv import __version__, installation
from deformconv.cli import doctor, trial, warmup
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
        (["warmup", "-h"], ["--dtype", "--rank", "--cpu", "x86-64-v3", "DEFORMCONV_CACHE_DIR", "DEFORMCONV_CPU", "--gpu"]),
        (["doctor", "--help"], ["backends"]),
        (
            ["look", "--help"],
            ["--model", "--weights", "--layer", "--at", "--view", "--out", "module:function", "runs their code"],
        ),
        (["--version"], [__version__]),
    ],
)
def test_help(arguments, words, capsys):
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert all(word in text for word in words)
    assert not re.search(r"\w\.\.\.$", text, re.M)  # a sentence that is cut off
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


NOTHING_IS_KEPT = (
    "No folder can be written, so every process compiles anew: set DEFORMCONV_CACHE_DIR to one that can be written.\n"
)


class TestWarmup:
    def test_options_reach_the_kernels(self, monkeypatch, capsys):
        from deformconv.ops.aggregate import cpu as aggregate_cpu
        from deformconv.ops.attention import cpu as attention_cpu
        from deformconv.ops.conv import cpu
        from deformconv.ops.roi_pool import cpu as roi_pool_cpu

        calls = []

        def compile_all(dtypes, ranks, notify):
            calls.append((list(dtypes), list(ranks)))
            notify("this and that")

        monkeypatch.setattr(cpu, "warmup", compile_all)
        monkeypatch.setattr(roi_pool_cpu, "warmup", lambda dtypes, notify: calls.append(list(dtypes)))
        monkeypatch.setattr(attention_cpu, "warmup", lambda dtypes, notify: calls.append(("attention", list(dtypes))))
        monkeypatch.setattr(aggregate_cpu, "warmup", lambda dtypes, ranks, notify: calls.append((list(dtypes), list(ranks))))
        main(["warmup"])
        main(["warmup", "--dtype", "all", "--rank", "3", "--rank", "1", "--rois"])
        main(["warmup", "--rank", "2", "--attention"])
        main(["warmup", "--rank", "3", "--aggregate"])
        main(["warmup", "--dtype", "bfloat16", "--rank", "2", "--rois"])
        every = ["float16", "bfloat16", "float32", "float64"]
        assert calls == [
            (["float32"], [1, 2, 3]), (every, [3, 1]), ["float32", "float64"], (["float32"], [2]),
            ("attention", ["float32"]), (["float32"], [3]), (["float32"], [3]), (["bfloat16"], [2]), ["float32"],
        ]  # fmt: skip
        assert "this and that ...\n" in capsys.readouterr().out

    def test_what_cannot_be_kept_ends_with_1(self, monkeypatch, capsys):
        from deformconv.ops.conv import cpu
        from deformconv.runtime import cache

        monkeypatch.setattr(cpu, "warmup", lambda *_, **__: None)
        monkeypatch.setattr(cache, "cached_files", tuple)
        monkeypatch.setattr(cache, "cache_folder", lambda: None)
        assert main(["warmup"]) == 1
        assert "DEFORMCONV_CACHE_DIR" in capsys.readouterr().err

    def test_where_nothing_can_be_kept_nothing_is_compiled(self, monkeypatch, capsys):
        from deformconv.ops.conv import cpu
        from deformconv.runtime import cache

        monkeypatch.setattr(cpu, "warmup", lambda *_, **__: pytest.fail("compiled"))
        monkeypatch.setattr(cache, "cached_files", tuple)
        monkeypatch.setattr(cache, "cache_folder", lambda: None)
        assert main(["warmup"]) == 1
        assert capsys.readouterr() == ("", NOTHING_IS_KEPT)

    def test_a_folder_that_is_warm_need_not_be_written(self, tmp_path, monkeypatch, capsys):
        """As in an image with a read-only root."""
        from deformconv.ops.conv import cpu
        from deformconv.runtime import cache, notices

        monkeypatch.setattr(cpu, "warmup", lambda *_, **__: None)
        monkeypatch.setattr(cache, "cached_files", lambda: [tmp_path / "kernels" / "forward.bin"])
        monkeypatch.setattr(cache, "cache_folder", lambda: None)
        assert main(["warmup"]) == 0
        assert capsys.readouterr() == (f"Nothing to compile: 1 kernels are in {tmp_path}\n", "")

        kernel = notices.Kind("cpu_kernels.forward", "float32", 2)
        monkeypatch.setattr(cpu, "warmup", lambda *_, **__: notices.tell("compiled", kernel))
        assert main(["warmup"]) == 1  # for another level, say
        assert capsys.readouterr() == ("", NOTHING_IS_KEPT)
        assert notices.watchers == []

    def test_a_level_that_nobody_knows_is_explained(self, monkeypatch):
        result = run("warmup", "--cpu", "8086")
        assert (result.returncode, result.stdout) == (1, "")
        assert result.stderr.startswith("Error: --cpu is '8086'; expected a name for processors like this one (")
        monkeypatch.setenv("DEFORMCONV_CPU", "8086")
        assert run("warmup").stderr.startswith("Error: DEFORMCONV_CPU is '8086'; expected a name for processors like")

    def test_one_process_compiles_for_one_level(self, monkeypatch, capsys):
        from deformconv.runtime import cache, target

        monkeypatch.setattr(cache, "LEVEL", None)
        monkeypatch.setattr(target, "chosen", lambda: "x86-64-v3")
        assert main(["warmup"]) == 1
        assert capsys.readouterr().err == "Error: kernels for native are loaded already: use another process\n"

    @pytest.mark.slow
    @pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="a level of x86-64")
    def test_an_image_for_other_processors(self, tmp_path, monkeypatch):
        """What a Dockerfile runs, and what a service says that starts from it, with a folder that cannot be written."""
        monkeypatch.setenv("DEFORMCONV_CACHE_DIR", str(tmp_path))
        monkeypatch.setenv("DEFORMCONV_REQUIRE_CACHE", "1")
        first = run("warmup", "--rank", "1", "--cpu", "x86-64-v2")
        assert first.returncode == 0 and "\n10 kernels compiled in " in first.stdout and first.stderr == ""
        assert first.stdout.splitlines()[-1] == (
            "Processes that have DEFORMCONV_CPU=x86-64-v2 in their environment load those for x86-64-v2."
        )
        refused = run("doctor")
        text = " ".join(refused.stdout.split())
        assert refused.returncode == 1 and "warm for not for this processor, " in text
        assert "x86-64-v2: 10 kernels, loaded where DEFORMCONV_CPU=x86-64-v2" in text
        assert "DEFORMCONV_REQUIRE_CACHE forbids to compile it." in text and "Or set DEFORMCONV_CPU=x86-64-v2" in text
        monkeypatch.setenv("DEFORMCONV_CPU", "x86-64-v2")
        again = run("warmup", "--rank", "1")
        assert again.stdout.splitlines() == ["float32, 1-D ...", f"Nothing to compile: 10 kernels are in {tmp_path}"]
        assert "warm for          x86-64-v2: 10 kernels\n" in run("doctor").stdout

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
        for title in ("Versions", "Processor", "Kernel cache", "Backends", "GPUs", "Self-test"):
            assert f"\n{title}" in text
        assert "cpu backward      ok" in text and "All in order." in text
        assert "FAILED" not in text and ESCAPE not in text
        assert max(len(line) for line in text.splitlines() if "/" not in line) <= 80
        for package in ("torch", "mxnet", "jax", "flax", "equinox", "keras"):
            assert re.search(rf"^  {package}  +\S", text, re.M)
        # Their versions decide whether an exported net runs.
        assert re.search(r"^  onnx  .*\n  onnxruntime  .*\n  openvino  .*\n  ncnn  ", text, re.M)

    def test_kernels_in_a_folder_that_cannot_be_written_are_found(self, monkeypatch, capsys):
        from deformconv.runtime import cache

        monkeypatch.setattr(cache, "cache_folder", lambda: None)
        for files, folder in (
            ([], "so every process compiles anew"),
            ([Path("forward.bin")], "so what is missing is compiled anew"),
        ):
            monkeypatch.setattr(cache, "cached_files", lambda files=files: files)
            main(["doctor"])
            text = " ".join(capsys.readouterr().out.split())
            assert f"folder none can be written, {folder}" in text
            assert ("kernels found 1 warm for" in text) == bool(files)

    @pytest.mark.slow
    def test_without_torch(self):
        result = run("doctor", prelude="sys.modules['torch'] = None")
        assert result.returncode == 0, result.stdout + result.stderr
        assert "torch             not installed" in result.stdout

    def test_a_wrong_result_ends_with_1(self, monkeypatch, capsys):
        right = trial.values

        def wrong(backend, *arguments):
            values = right(backend, *arguments)
            if backend == "portable":
                values["output"] = values["output"] * 1.001
            return values

        monkeypatch.setattr(trial, "values", wrong)
        assert main(["doctor"]) == 1
        text = capsys.readouterr().out
        assert "portable forward  FAILED: error 1.0e-03 in output" in text
        assert text.endswith("Not in order: portable forward.\n")

    def test_nan_is_a_wrong_result(self):
        import numpy as np

        assert trial.verdict({"a": np.array([np.nan, 1])}, {"a": np.ones(2)}).startswith("FAILED: error nan in a")

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

    def test_kernels_of_other_processors_are_told_apart(self, monkeypatch, capsys):
        from collections import Counter

        from deformconv.runtime import cache, target

        level = next(iter(target.levels()))
        found = {cache.own_processor(): 4, f"{level}.0123ab": 1, "znver9.4567cd": 2}
        monkeypatch.setattr(cache, "processors", lambda: Counter(found))
        monkeypatch.setattr(target, "lacks", lambda name: ["this", "that"])
        assert main(["doctor"]) == 0
        text = " ".join(capsys.readouterr().out.split())
        assert f"{level}: 1 kernel, but this processor lacks this, that znver9: 2 kernels, which another processor" in text
        assert "warm for this processor, " in text and ": 4 kernels " in text

    def test_a_damaged_file_is_named_before_the_self_test_writes_it_again(self, damaged):
        kernels = len(list(damaged.parents[1].rglob("*.bin")))
        first, second = run("doctor"), run("doctor")
        assert first.returncode == second.returncode == 0, first.stdout + first.stderr
        assert f"kernels found     {kernels - 1}\n  damaged " in first.stdout
        assert f"{damaged}: its" in " ".join(first.stdout.split()) and "All in order." in first.stdout
        assert f"kernels found     {kernels}\n" in second.stdout
        assert "  damaged " not in second.stdout and "is damaged" not in second.stderr
