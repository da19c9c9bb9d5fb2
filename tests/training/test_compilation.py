"""A lock that a killed compilation has left holds up nobody; one that is held is waited for."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Event, Thread

import pytest
from omegaconf import OmegaConf
from torch.utils import cpp_extension

from sft.errors import UserError
from sft.training import compilation

HOLDS = "import os, sys, time; os.open(sys.argv[1], os.O_CREAT | os.O_EXCL); print(flush=True); time.sleep(600)"
WORKS = "import os, sys, time; os.chdir(sys.argv[1]); print(flush=True); time.sleep(600)"


def started(program: str, argument: Path) -> subprocess.Popen[bytes]:
    process = subprocess.Popen([sys.executable, "-c", program, str(argument)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    return process


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    folder = tmp_path / "cpu_adam"
    folder.mkdir()
    return folder / "lock"


@pytest.fixture
def holder(lock: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that holds the lock as torch does."""
    process = started(HOLDS, lock)
    yield process
    process.kill()
    process.wait()


class Builder:
    """Compiles in a moment what stands for DeepSpeed's AdamW."""

    text = 'extern "C" int one() { return 1; }'

    def load(self, verbose: bool) -> object:
        folder = Path(os.environ["TORCH_EXTENSIONS_DIR"])
        source = folder / "one.cpp"
        source.write_text(self.text)
        return cpp_extension.load(compilation.NAME, [str(source)], is_python_module=False, verbose=verbose)


@pytest.fixture
def builder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> type[Builder]:
    from deepspeed.ops import op_builder

    monkeypatch.setattr(op_builder, "CPUAdamBuilder", Builder)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(cpp_extension, "JIT_EXTENSION_VERSIONER", type(cpp_extension.JIT_EXTENSION_VERSIONER)())
    return Builder


def test_a_lock_that_a_killed_compilation_has_left_is_removed(
    lock: Path, builder: type[Builder], holder: subprocess.Popen[bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    holder.kill()
    holder.wait()
    done = Event()

    def load() -> None:
        compilation.compile_optimizer(print)
        done.set()

    Thread(target=load, daemon=True).start()
    assert done.wait(60), "it waits for a process that is dead"
    assert not lock.exists() and compilation.is_compiled()
    assert f"removed {lock}: the compilation that held it was killed" in capsys.readouterr().out
    assert isinstance(cpp_extension.FileBaton, type) and cpp_extension.FileBaton.__module__.startswith("torch.")


def test_a_process_that_holds_it_is_waited_for(
    lock: Path, holder: subprocess.Popen[bytes], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compilation, "LINE", 0.1)
    assert not compilation.is_left(lock, watched=1e9)
    waits = Thread(target=compilation.wait, args=(lock, print), daemon=True)
    waits.start()
    waits.join(1)
    assert waits.is_alive() and lock.exists()
    assert f"s for the compilation in {lock.parent}" in capsys.readouterr().out
    holder.kill()
    holder.wait()
    waits.join(30)
    assert not waits.is_alive() and not lock.exists()


def test_a_compiler_that_outlives_its_process_is_waited_for(lock: Path) -> None:
    lock.touch()
    compiler = started(WORKS, lock.parent)
    assert not compilation.is_left(lock, watched=1e9)
    compiler.kill()
    compiler.wait()
    assert compilation.is_left(lock, watched=0)
    lock.unlink()
    assert not compilation.is_left(lock, watched=0)  # given back in the meantime


def test_where_other_machines_write_too_silence_is_waited_for(lock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation, "_is_own", lambda folder: False)
    lock.touch()
    assert not compilation.is_left(lock, watched=0)
    assert compilation.is_left(lock, watched=compilation.QUIET + 1)  # whatever the other's clock says
    long_ago = time.time() - compilation.QUIET - 60
    os.utime(lock, (long_ago, long_ago))
    assert compilation.is_left(lock, watched=0)
    (lock.parent / "first.o").touch()  # it is still at it
    assert not compilation.is_left(lock, watched=0)


def test_what_can_not_be_compiled_is_one_line(
    tmp_path: Path, builder: type[Builder], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Builder, "text", "no program")
    with pytest.raises(
        UserError, match=r"^DeepSpeed's AdamW for the host can't be compiled \(.*error.*\): make a C\+\+"
    ):
        compilation.compile_optimizer(print)
    assert not (tmp_path / "cpu_adam" / "lock").exists()


@pytest.mark.parametrize(
    ("strategy", "expected"), [("deepspeed_zero2_offload", True), ("deepspeed_zero2", False), ("single", False)]
)
def test_which_strategies_need_it(strategy: str, expected: bool) -> None:
    from sft.config import CONF

    config = OmegaConf.create({"strategy": OmegaConf.load(CONF / "strategy" / f"{strategy}.yaml")})
    assert compilation.offloads(config) is expected  # type: ignore[arg-type]
