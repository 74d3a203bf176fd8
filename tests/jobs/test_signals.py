"""Claims about the owner of the command line's signals, in processes that do nothing else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs.stopping import STOPPED
from tests.waiting import PATIENCE

ROOT = Path(__file__).parents[2]
ANY = pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
_BEGIN = """
import os, signal, sys, time
from pathlib import Path
from jobs.stopping import SIGNALS, Stopped
from prismaquant_ray.interruption import uninterrupted
say = lambda text: os.write(1, text.encode() + b"\\n")
def send(number=signal.SIGTERM): os.kill(os.getpid(), number)
"""
_RUN = """
SIGNALS.begin()
try:
    code = SIGNALS.run(command)
except Stopped as stopped:
    say("stopped")
    code = stopped.exit_code
sys.exit(code)
"""


def started(script: str, prepare: Callable[[], object] | None = None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", _BEGIN + script], cwd=ROOT, text=True, preexec_fn=prepare,  # noqa: PLW1509
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def ended(process: subprocess.Popen[str], code: int) -> tuple[str, str]:
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == code, (out, err)
    return out, err


def ran(command: str, code: int) -> tuple[str, str]:
    """What a process says whose command has this body."""
    body = "\n".join(f"    {line}" for line in command.splitlines())
    return ended(started(f"def command():\n{body}\n{_RUN}"), code)


@ANY
def test_a_signal_during_the_imports_ends_the_process_at_once(number: signal.Signals) -> None:
    out, err = ended(started(f"SIGNALS.begin()\nsend({number})\ntime.sleep(600)"), 128 + number)
    assert (out, err) == ("", f"{STOPPED}\n")


@ANY
def test_a_signal_ends_a_command_in_python_in_a_system_call_and_in_a_lock(number: signal.Signals) -> None:
    for where in ("time.sleep(600)", "import threading; threading.Event().wait()", "while True: pass"):
        assert ran(f"send({number})\n{where}", 128 + number) == ("stopped\n", "")


def test_a_signal_after_the_command_changes_nothing() -> None:
    script = f"def command(): return 2\n{_RUN}".replace(
        "sys.exit(code)", "send(); time.sleep(0.2); send(2); sys.exit(code)"
    )
    assert ended(started(script), 2) == ("", "")
    assert ended(started(script.replace("return 2", "return 0")), 0) == ("", "")


def test_later_signals_are_answered_with_a_line_and_do_not_disturb_what_is_closed() -> None:
    closing = "for _ in range(3): send(signal.SIGINT); time.sleep(0.1)"
    out, err = ran(f"send()\ntry: time.sleep(600)\nfinally:\n    {closing}\n    say('closed')", 143)
    assert out == "closed\nstopped\n"
    assert err.count("\n") == err.count("stopping: what is open is being closed") == 3


def test_a_stop_waits_for_the_end_of_what_is_marked_and_of_an_import(tmp_path: Path) -> None:
    (tmp_path / "slow_module.py").write_text("import os, time\ntime.sleep(0.3)\nos.write(1, b'whole\\n')\n")
    command = "@uninterrupted\ndef whole():\n    time.sleep(0.3)\n    say('whole')\nsend()\nwhole()\ntime.sleep(600)"
    assert ran(command, 143) == ("whole\nstopped\n", "")
    command = f"sys.path.insert(0, {str(tmp_path)!r})\nsend()\nimport slow_module\ntime.sleep(600)"
    assert ran(command, 143) == ("whole\nstopped\n", "")


def test_a_stop_that_is_raised_where_it_is_lost_is_raised_again() -> None:
    callback = (
        "import weakref\nclass A: pass\na = A()\ndef gone(_): send(); time.sleep(0.3)\nr = weakref.ref(a, gone)\n"
    )
    assert ran(f"{callback}del a\ntime.sleep(600)", 143) == ("stopped\n", "")
    destructor = "class A:\n    def __del__(self): send(); time.sleep(0.3)\na = A()\n"
    assert ran(f"{destructor}del a\ntime.sleep(600)", 143) == ("stopped\n", "")


def test_a_stop_that_others_lose_or_replace_is_a_stop_all_the_same() -> None:
    lost = (
        "import jobs.stopping; jobs.stopping._CLOSING = 0.3\nsend()\ntry: time.sleep(600)\nexcept BaseException: pass\n"
    )
    assert ran(f"{lost}time.sleep(600)", 143) == ("stopped\n", "")
    # As Ray does.
    replaced = "send()\ntry: time.sleep(600)\nexcept KeyboardInterrupt: raise KeyboardInterrupt from None"
    assert ran(replaced, 143) == ("stopped\n", "")


def test_an_error_in_closing_does_not_hide_that_the_command_was_stopped() -> None:
    assert ran("send()\ntry: time.sleep(600)\nfinally: raise OSError('full')", 143) == ("stopped\n", "")
    assert "OSError: full" in ran("raise OSError('full')", 1)[1]


def test_handlers_that_a_library_sets_change_nothing() -> None:
    command = "signal.signal(signal.SIGTERM, signal.SIG_DFL)\nsend()\ntime.sleep(600)"
    assert ran(command, 143) == ("stopped\n", "")
    assert ran(command.replace("SIG_DFL", "default_int_handler"), 143) == ("stopped\n", "")


def test_what_whoever_starts_the_process_ignores_stays_ignored() -> None:
    script = (
        f"def command(): send(signal.SIGHUP); send(signal.SIGINT); time.sleep(0.2); send(); time.sleep(600)\n{_RUN}"
    )

    def ignore() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    assert ended(started(script, ignore), 143) == ("stopped\n", "")


def test_a_child_can_be_ended_and_does_not_hear_of_a_closed_terminal() -> None:
    command = (
        "import subprocess\n"
        "child = subprocess.Popen(['sleep', '600'], preexec_fn=lambda: None)\n"
        "child.send_signal(signal.SIGHUP); time.sleep(0.1)\n"
        "say(str(child.poll()))\n"
        "child.terminate()\n"
        "say(str(child.wait()))\n"
        "return 0"
    )
    assert ran(command, 0) == ("None\n-15\n", "")


def test_importing_the_library_and_the_command_line_changes_no_handler() -> None:
    code = (
        "import signal, prismaquant_ray, jobs.command_line\n"
        "assert signal.getsignal(signal.SIGINT) is signal.default_int_handler\n"
        "assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL\n"
        "assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "PYTHONSAFEPATH": ""}, check=False)
    assert done.returncode == 0
