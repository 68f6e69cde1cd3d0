"""The whole program: exit codes, usage, signals, and what a terminal gets to see."""

import errno
import io
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

import sklora
from sklora.__main__ import main
from sklora.cli import _inspect


def start(*arguments, **options):
    command = [sys.executable, "-m", "sklora", *map(str, arguments)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


class TestUsage:
    @pytest.mark.parametrize(
        "arguments",
        [
            (),
            ("ponder",),
            ("inspect",),
            ("inspect", "a", "--names", "odd"),
            ("fit", "zoo"),
            ("fit", "zoo", "--labels", "l.csv", "--target", "t"),
            ("fit", "z", "--labels", "l", "--target", "t", "-o", "m", "--architecture", "cnn"),
            ("fit", "z", "--labels", "l", "--target", "t", "-o", "m", "--jobs", "0"),
            ("fit", "z", "--labels", "l", "--target", "t", "-o", "m", "--seed", str(2**32)),
            ("compare", "z", "--labels", "l", "--target", "t", "--folds", "1"),
            ("compare", "z", "--labels", "l", "--target", "t", "-o", "c.png", "--no-chart"),
            ("fit", "--labels", "l", "--target", "t", "-o", "m"),
            ("fit", "z", "--target", "t", "-o", "m"),
            ("fit", "z", "--labels", "l", "-o", "m"),
            ("predict", "m"),
            ("predict", "m", "a", "--csv", "--json"),
            ("predict", "m", "a", "--keys", "{module}.a"),
            ("predict", "m", "a", "--lokr", "odd"),
        ],
    )
    def test_wrong_call_is_two(self, run, arguments):
        code, out, err = run(*arguments)
        assert (code, out) == (2, "")
        assert "usage: sklora" in err

    @pytest.mark.parametrize("command", ["inspect", "fit", "predict", "compare"])
    def test_help(self, run, command):
        code, out, err = run(command, "--help")
        assert (code, err) == (0, "")
        assert f"usage: sklora {command}" in out

    def test_version(self, run):
        assert run("--version") == (0, f"sklora {sklora.__version__}\n", "")


class TestProcess:
    def test_bad_file_is_one_and_one_line(self, tmp_path):
        (tmp_path / "a.safetensors").write_bytes(b"nothing")
        with start("predict", tmp_path / "a.safetensors", tmp_path) as process:
            out, err = process.communicate(timeout=120)
        assert (process.returncode, out) == (2, "")
        assert err.startswith("sklora: error: ")
        assert err.count("\n") == 1

    def test_reader_that_leaves_ends_it_quietly(self, zoo):
        with start("inspect", zoo, zoo, zoo, zoo, "--json") as process:
            process.stdout.close()
            assert process.stderr.read() == ""
            assert process.wait(timeout=120) == 128 + signal.SIGPIPE


@pytest.mark.parametrize("closed", ["stdout", "stderr"])
@pytest.mark.parametrize("form", ["--csv", "--json"])
def test_closed_streams_do_not_matter(zoo, models, capsys, monkeypatch, closed, form):
    """Python has None for those."""
    monkeypatch.setattr(sys, closed, None)
    assert main(["predict", models["style"], str(zoo / "a00"), "none", form]) == 1
    seen = capsys.readouterr()
    assert "none" in (seen.err if closed == "stdout" else seen.out)


def test_interrupt_is_130(run, monkeypatch):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(_inspect, "run", interrupted)
    assert run("inspect", "a") == (130, "", "")


def test_termination_is_143_and_passes_by_what_catches_errors(run, monkeypatch):
    def terminated(args):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except Exception as error:  # as in a fold that fails
            pytest.fail(repr(error))

    monkeypatch.setattr(_inspect, "run", terminated)
    before = signal.getsignal(signal.SIGTERM)
    assert run("inspect", "a") == (143, "", "")
    assert signal.getsignal(signal.SIGTERM) is before


def test_other_threads_have_no_signals():
    with ThreadPoolExecutor() as pool:
        assert pool.submit(main, ["--version"]).result() == 0


def test_broken_pipe_is_141(monkeypatch, capfd):
    def broken(args):
        raise BrokenPipeError

    monkeypatch.setattr(_inspect, "run", broken)
    monkeypatch.setattr("sklora.__main__._forget_streams", lambda: None)
    assert main(["inspect", "a"]) == 141


@pytest.fixture
def forgotten(monkeypatch):
    """Holds True if Python cannot fail again on its way out, with a code of its own."""
    forgotten = []
    monkeypatch.setattr("sklora.__main__._forget_streams", lambda: forgotten.append(True))
    return forgotten


class Full(io.StringIO):
    """What is written stays in its buffer, for which there is no room on the disk."""

    def flush(self, text=""):
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    "arguments", [("inspect", "none"), ("inspect", "none", "--json"), ("--version",)]
)
def test_output_without_room_is_one_and_one_line(run, monkeypatch, forgotten, arguments):
    monkeypatch.setattr(sys, "stdout", Full())
    code, _, err = run(*arguments)
    assert (code, err) == (1, "sklora: error: [Errno 28] No space left on device\n")
    assert forgotten == [True]


def test_messages_without_room_are_one(monkeypatch, capsys, forgotten):
    monkeypatch.setattr(sys, "stderr", Full())
    monkeypatch.setattr(Full, "write", Full.flush)
    assert main(["predict", "none", "none"]) == 1
    assert forgotten == [True]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        *((kind("bad\nnews"), "bad\\nnews") for kind in (ValueError, OSError, RuntimeError)),
        (MemoryError(), "MemoryError"),
    ],
)
def test_other_errors_are_one_and_one_line(run, monkeypatch, error, message):
    def failing(args):
        raise error

    monkeypatch.setattr(_inspect, "run", failing)
    assert run("inspect", "a") == (1, "", f"sklora: error: {message}\n")


def test_bugs_have_a_traceback(run, monkeypatch):
    def buggy(args):
        raise TypeError

    monkeypatch.setattr(_inspect, "run", buggy)
    with pytest.raises(TypeError):
        run("inspect", "a")
