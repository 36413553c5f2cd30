"""A job's process: found again by number and birth, and a job only once it was written down."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tests.server.job_site import until

from logitcache.labels.errors import DiskFull
from logitcache.server.jobs.folder import JobFolder
from logitcache.server.jobs.job import ProcessId
from logitcache.server.jobs.process import JobProcess
from logitcache.server.jobs.recording import VARIABLE, recorded

ID = "0123456789abcdef"


@pytest.fixture
def folder(tmp_path: Path) -> JobFolder:
    folder = JobFolder(tmp_path, ID)
    folder.path.mkdir()
    return folder


def test_a_process_that_has_the_number_of_an_earlier_one_is_not_taken_for_it(folder: JobFolder) -> None:
    with subprocess.Popen(["/bin/cat"], stdin=subprocess.PIPE, start_new_session=True) as other:
        recycled = JobProcess(ProcessId(pid=other.pid, began="long ago"))
        assert not recycled.is_alive()
        recycled.signal(signal.SIGKILL)
        assert other.poll() is None
    assert other.returncode == 0


def test_a_process_is_found_again_until_it_is_dead_though_nobody_buried_it(folder: JobFolder) -> None:
    begun = JobProcess.begin(["precompute", "x"], folder.path, folder.log, {})
    found = JobProcess(begun.id)
    assert found.is_alive()
    assert found.exit_code is None
    found.signal(signal.SIGKILL)
    until(lambda: not found.is_alive(), "the process to die")
    assert not begun.is_alive()
    assert begun.exit_code == -signal.SIGKILL
    begun.give_up()


def test_a_process_that_was_not_written_down_before_its_server_died_does_nothing(folder: JobFolder) -> None:
    words = ["--teacher=mine:one", "--dataset=mine:points", "--top-k=3", f"--store={folder.path / 'store'}"]
    begun = JobProcess.begin(["precompute", "x", *words], folder.path, folder.log, {VARIABLE: str(folder.path)})
    # As when the server ends: the other end of its pipe closes, and nothing was said.
    begun._close("")
    until(lambda: not begun.is_alive(), "the process to end")
    assert begun.exit_code == 1
    assert "the next one begins it anew" in folder.log_tail()[-1]
    assert (folder.outcome(), folder.progress()) == (None, None)
    assert not (folder.path / "store").exists()


def test_without_a_server_nothing_is_waited_for_and_nothing_recorded(
    folder: JobFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.chdir(folder.path)
    with recorded() as job:
        assert job.progress is None
        job.succeeded("sha256:aa")
    assert list(folder.path.iterdir()) == []


def test_the_end_is_recorded_with_the_code_of_an_error_and_an_interrupt_is_none(folder: JobFolder) -> None:
    for kind, code in (("DiskFull('no room')", DiskFull.code), ("ValueError('odd')", "server-fault")):
        assert end(folder, f"raise {kind}") != 0
        outcome = folder.outcome()
        assert outcome is not None
        assert outcome.error is not None
        assert outcome.error.code == code
        folder.clear(1)
    assert end(folder, "raise KeyboardInterrupt") != 0
    assert folder.outcome() is None
    assert end(folder, f"assert {VARIABLE!r} not in os.environ; job.succeeded('sha256:aa')") == 0
    assert json.loads((folder.path / "outcome.json").read_text()) == {"digest": "sha256:aa"}


def end(folder: JobFolder, statement: str) -> int:
    """Exit code of a job's process that does this."""
    program = (
        "import os\nfrom logitcache.labels.errors import DiskFull\n"
        f"from logitcache.server.jobs.recording import recorded\nwith recorded() as job:\n    {statement}\n"
    )
    environment = os.environ | {VARIABLE: str(folder.path)}
    command = [sys.executable, "-c", program]
    return subprocess.run(command, env=environment, input=b"go\n", capture_output=True, timeout=60).returncode
