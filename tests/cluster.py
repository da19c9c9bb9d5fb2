"""A Slurm cluster on this machine for tests, by slurm/local-cluster. Tests that use one are in the group "slurm" or
"slurm too", so that a worker has one: `pytestmark = pytest.mark.xdist_group("slurm")`."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "slurm" / "local-cluster"


TIMEOUT = 600  # seconds for anything on a cluster: only a failing test waits for so long, however busy the machine is


def eventually(condition: Callable[[], bool]) -> None:
    """Waits until it holds."""
    end = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < end, f"not within {TIMEOUT} s"
        time.sleep(0.1)


class Cluster:
    """A cluster in `folder`. If `hosts` is true, its nodes are hosts of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.nodes: list[str] = []
        self.hosts = False

    def start(self, **options: int) -> "Cluster":
        """Options as of slurm/local-cluster: nodes, cpus, memory, gpus. Without Slurm, skips the test; in CI, fails."""
        started = self("start", *(f"--{name}={value}" for name, value in options.items()))
        if "is not installed" in started.stderr and not os.environ.get("CI"):
            pytest.skip("no Slurm here: make slurm installs it")
        assert started.returncode == 0, started.stderr
        description = json.loads((self.folder / "cluster.json").read_text())
        self.nodes, self.hosts = description["nodes"], description["hosts"]
        return self

    def stop(self) -> None:
        self("stop")

    def __call__(
        self,
        verb: str,
        *arguments: str,
        cwd: Path | None = None,
        env: dict[str, str] | None = None,
    ) -> "subprocess.CompletedProcess[str]":
        """`slurm/local-cluster VERB ARGUMENTS`, with additions to the environment."""
        command, environment = self._command(verb, *arguments), os.environ | (env or {})
        return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, cwd=cwd, env=environment)

    def _command(self, verb: str, *arguments: str) -> list[str]:
        return [sys.executable, str(SCRIPT), verb, "--dir", str(self.folder), *arguments]

    def exec(
        self, *command: str, cwd: Path | None = None, env: dict[str, str] | None = None
    ) -> "subprocess.CompletedProcess[str]":
        """`command` on the login node."""
        return self("exec", *command, cwd=cwd, env=env)

    @contextmanager
    def background(
        self, *command: str, cwd: Path, output: Path = Path(os.devnull)
    ) -> "Iterator[subprocess.Popen[bytes]]":
        """Runs `command` on the login node meanwhile, and kills it afterwards."""
        with output.open("w") as file:
            process = subprocess.Popen(self._command("exec", *command), stdout=file, cwd=cwd, start_new_session=True)
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def submit(self, *arguments: str, cwd: Path | None = None, env: dict[str, str] | None = None) -> str:
        """The number of the job that sbatch queues."""
        done = self.exec("sbatch", "--parsable", *arguments, cwd=cwd, env=env)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def job(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says: JobState, Restarts, NodeList, ExitCode ..."""
        shown = self.exec("scontrol", "--oneliner", "show", "job", job)
        assert shown.returncode == 0, shown.stderr
        return dict(field.partition("=")[::2] for field in shown.stdout.split())

    def wait(self, job: str, state: str, **wanted: str) -> dict[str, str]:
        """Waits for the job's state, and for other fields where they are named (Restarts="1"); returns all fields."""
        wanted["JobState"] = state
        end = time.monotonic() + TIMEOUT
        while True:
            fields = self.job(job)
            if wanted.items() <= fields.items():
                return fields
            last = fields["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
            if time.monotonic() > end or last:
                output = Path(fields.get("StdOut", "?"))
                raise AssertionError(
                    f"job {job} is not {wanted} but {fields}\n" + (output.read_text() if output.is_file() else "")
                )
            time.sleep(0.3)

    def wait_idle(self) -> None:
        """Waits until no job is left and all nodes are idle."""
        sinfo = ("sinfo", "--noheader", "--Node", "--partition=main", "--format=%T")
        eventually(lambda: self.exec(*sinfo).stdout.split() == ["idle"] * len(self.nodes))
