"""scripts/gpu: what it shows, what it does with checks that fail, hang or die, and its branches for CUDA, with torch's
functions replaced by ones of the same signatures. Its checks themselves are run by CI: scripts/gpu --cpu."""

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import create_autospec

import pytest
import torch

import warm
from benchmarks import conditions, fit_project, shapes
from checks import numbers, speed
from checks.process import Check, Failed, NotRun, Place, Result, run

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "gpu"


def gpu(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, **options)


def test_list_names_every_check_once() -> None:
    listed = gpu("--list").stdout.splitlines()
    names = [line.split()[0] for line in listed]
    assert len(names) == len(set(names)) > 30
    assert {"attention", "single", "deepspeed_zero3_offload", "qlora", "faults", "speed-llama-8b", "load-fsdp2"} <= set(
        names
    )
    assert all(len(line.split(maxsplit=1)) == 2 for line in listed)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["speed"], "there is no check speed: see --list"), ([], "finds no GPU here; scripts/gpu --cpu")],
)
def test_mistakes(arguments: list[str], message: str, tmp_path: Path) -> None:
    ended = gpu(*arguments, env={"PATH": str(tmp_path)})  # where there is no nvidia-smi
    assert ended.returncode != 0
    assert message in ended.stderr and "Traceback" not in ended.stderr


def test_an_interpreter_without_the_packages(tmp_path: Path) -> None:
    # -S: without site-packages. Its own imports need none.
    ended = subprocess.run([sys.executable, "-S", str(SCRIPT), "--cpu"], capture_output=True, text=True, cwd=tmp_path)
    assert ended.returncode == 1
    assert "has no torch: activate" in ended.stderr and "Traceback" not in ended.stderr
    assert not list(tmp_path.iterdir())


def processes(marker: str) -> list[int]:
    found = []
    for each in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if marker.encode() in (each / "environ").read_bytes():
                found.append(int(each.name))
    return found


def test_stopped_it_leaves_nothing_behind(tmp_path: Path) -> None:
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    command = [sys.executable, str(SCRIPT), "--cpu", "single", "--output", str(tmp_path)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as one:
        until(lambda: list(tmp_path.glob("sft-gpu-*/single/killed.log")))  # runs of its own are under way
        one.send_signal(signal.SIGTERM)
        out, err = one.communicate(timeout=20)
    assert one.returncode == 130 and out.endswith("stopped\n") and "Traceback" not in err, err
    until(lambda: not processes(f"TMPDIR={tmp_path}"))
    assert not list(tmp_path.glob("sft-gpu-*"))


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_check_of_the_command_line(tmp_path: Path) -> None:
    ended = gpu("--cpu", "objective", "trl-qwen-0.5b", "qlora", "--output", str(tmp_path))
    assert ended.returncode == 0, ended.stdout + ended.stderr
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert report["about"]["cpu_only"] and report["about"]["versions"]["torch"] == version("torch")
    states = {name: check["state"] for name, check in report["checks"].items()}
    assert states["objective"] == "passed" and states["qlora"] == "not run"
    assert report["checks"]["objective"]["figures"]["32-true"]["gradient"] < 1e-4
    assert (tmp_path / "gpu.txt").read_text() == ended.stdout


# --- what becomes of a check ---


def passes(place: Place) -> tuple[str, dict]:
    return "fine", {"figure": 1}


def fails(place: Place) -> tuple[str, dict]:
    print("first line\nlast line")
    raise Failed("7 is not 8")


def raises(place: Place) -> tuple[str, dict]:
    raise KeyError("key")


def refuses(place: Place) -> tuple[str, dict]:
    raise NotRun("it is Friday")


def hangs(place: Place) -> tuple[str, dict]:
    child = subprocess.Popen(["sleep", "1000"])
    (place.folder / "child").write_text(str(child.pid))
    child.wait()
    return "never", {}


def dies(place: Place) -> tuple[str, dict]:
    os.abort()


def lacks(place: Place) -> tuple[str, dict]:
    import no_such_package  # noqa: F401

    return "never", {}


def lacks_what_is_ours(place: Place) -> tuple[str, dict]:
    import checks.no_such_module  # noqa: F401

    return "never", {}


def check(function: object, **options: object) -> Check:
    return Check(function.__name__, "", f"{__name__}:{function.__name__}", **options)  # type: ignore[attr-defined]


def results(checks: list[Check], folder: Path, seconds: float = 60, gpu: bool = False) -> dict[str, Result]:
    warm.start()
    return {result.check.name: result for result in run(checks, Place(gpu, folder), 2, seconds)}


def test_what_fails_stops_no_other(tmp_path: Path) -> None:
    made = results([check(each) for each in (fails, raises, refuses, dies, passes)], tmp_path)
    assert {name: each.state for name, each in made.items()} == {
        "fails": "failed",
        "raises": "failed",
        "refuses": "not run",
        "dies": "failed",
        "passes": "passed",
    }
    assert made["fails"].line == "7 is not 8" and made["fails"].tail[-2:] == ["first line", "last line"]
    assert "KeyError: 'key'" in made["raises"].line and "in raises" in "\n".join(made["raises"].tail)
    assert made["refuses"].line == "it is Friday"
    assert "SIGABRT" in made["dies"].line
    assert (made["passes"].line, made["passes"].figures) == ("fine", {"figure": 1})
    assert made["fails"].text().splitlines()[-1].strip() == "| last line"


def test_what_hangs_is_ended_with_all_it_has_started(tmp_path: Path) -> None:
    results([check(passes)], tmp_path)  # the server that processes are forked from may only be starting
    # On a GPU a check has a limit of its own.
    made = results([check(hangs, seconds=2), check(passes)], tmp_path, gpu=True)
    assert made["hangs"].state == "failed" and "did not end within" in made["hangs"].line
    assert made["passes"].state == "passed"
    child = Path("/proc", (tmp_path / "child").read_text(), "cmdline")
    assert not child.exists() or not child.read_bytes()  # gone, or a zombie that nobody has asked after


def test_what_there_is_no_time_or_package_for(tmp_path: Path) -> None:
    made = results([check(passes)], tmp_path, seconds=1)
    assert (made["passes"].state, made["passes"].line) == ("not run", "no time is left")
    made = results([check(passes, needs=("no_such_package",)), check(fails, cuda=True)], tmp_path)
    assert made["passes"].line == "no_such_package not installed"
    assert made["fails"].line == "needs a GPU"
    made = results([check(lacks), check(lacks_what_is_ours)], tmp_path)
    assert (made["lacks"].state, made["lacks"].line) == ("not run", "no_such_package not installed")
    assert made["lacks_what_is_ours"].state == "failed"


# --- branches for CUDA ---


class Gpu(Place):
    """A GPU whose tensors are the processor's."""

    device = "cpu"  # type: ignore[assignment]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Gpu:
    """Torch's functions for CUDA take their own arguments and answer as a GPU would."""
    answers = {
        "get_device_properties": SimpleNamespace(
            name="NVIDIA H100 80GB HBM3", major=9, minor=0, total_memory=85e9, multi_processor_count=132
        ),
        "device_count": 1,
        "get_device_name": "NVIDIA H100 80GB HBM3",
        "memory_allocated": 0,
        "max_memory_allocated": 3_000_000,
        "reset_peak_memory_stats": None,
        "synchronize": None,
        "set_sync_debug_mode": None,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, create_autospec(getattr(torch.cuda, name), return_value=answer))
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 28, 9))
    clock = iter(range(1000))
    event = SimpleNamespace(record=lambda: None, elapsed_time=lambda end: 2.0 + next(clock) % 3)
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: event)
    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *size, device=None, **options: ones(*size, **options))
    return Gpu(True, tmp_path)


def test_device(place: Gpu) -> None:
    line, figures = numbers.device(place)
    assert line.startswith("name NVIDIA H100 80GB HBM3, capability 9.0, cuda ") and line.endswith("nccl 2.28.9")
    assert figures["memory_gb"] == 85


def test_memory_of_a_gpu(place: Gpu) -> None:
    with numbers.peak_memory(place) as memory:
        pass
    assert memory["mb"] == 3


def test_rates_of_a_gpu(place: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "TOKENS", 8)
    small = dict.fromkeys(("qwen-0.5b", "qwen-1.5b", "llama-8b"), shapes.SHAPES["toy"])
    monkeypatch.setattr(shapes, "SHAPES", small)
    monkeypatch.setattr(speed, "COPIED", 1000)
    line, figures = speed.roofline(place)
    # Events told 2, 3, 4, 2, ... ms: the median is 3.
    assert figures["tflops"]["qwen-0.5b"]["up_proj"] == pytest.approx(2 * 8 * 64 * 256 / 3e-3 / 1e12)
    assert figures["copy_gb_s"] == pytest.approx(2 * 4000 / 3e-3 / 1e9)
    assert "llama-8b" in line


@pytest.mark.parametrize(
    ("shape", "contestant"), [("qwen-0.5b", "project"), ("llama-8b", "project"), ("qwen-0.5b", "trl")]
)
def test_speed_on_a_gpu(place: Gpu, shape: str, contestant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(shapes.SHAPES, shape, shapes.SHAPES["toy"])
    monkeypatch.setitem(speed.PACKS, shape, (128, 1))
    monkeypatch.setattr(speed, "LONGEST", 40)

    def fit(contestant: str, folder: Path) -> None:
        plan = json.loads((folder / "plan.json").read_text())["packed"]
        num = len(plan["num_tokens"])
        assert num > speed.WARMUP + 2
        assert (folder / "model" / "config.json").exists()
        assert (folder / "model" / "model.safetensors").exists() == (shape == "llama-8b")
        result = {"started": 0, "ends": [(2 + step, 0.5 * step) for step in range(num)], "losses": [3.0] * num}
        result |= {"graphs": [0] * num, "waits": ["a:1", "b:2"], "cuda_peak": 5e9, "rss_before": 0, "rss_peak": 1}
        (folder / "out.json").write_text(json.dumps(result))

    monkeypatch.setattr(speed, "fit", fit)
    line, figures = speed.train(place, shape, contestant)
    assert figures["device"] == "NVIDIA H100 80GB HBM3"
    assert figures["mfu"] == pytest.approx(figures["tflops"] * 1e12 / 989e12)
    assert figures["tokens_per_second"] == pytest.approx(256, rel=0.1)  # two packs of 128 a step of a second
    assert "5 GB, first step after 2 s" in line
    assert ("2 waits a step" in line) == (contestant == "project")


def test_waits_of_a_step_are_counted_with_their_places(place: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    trainer = SimpleNamespace(accumulate_grad_batches=2)
    waits = fit_project.Waits()
    for batch in range(10):
        waits.on_train_batch_start(trainer, None, None, batch)
        with warnings.catch_warnings():
            if waits.places is not None or batch // 2 != fit_project.OBSERVED:
                warnings.simplefilter("ignore")
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
            warnings.warn("something else", stacklevel=1)
        waits.on_train_batch_end(trainer, None, None, None, batch)
    assert len(waits.places) == 2 and all(place.startswith("tests/test_gpu.py:") for place in waits.places)
    assert [call.args[0] for call in torch.cuda.set_sync_debug_mode.call_args_list] == ["warn", "default"]


def test_gpus_as_nvidia_smi_tells_them(monkeypatch: pytest.MonkeyPatch) -> None:
    told = "NVIDIA H100 80GB HBM3, 81559 MiB, 580.159.04\nNVIDIA L40S, 46068 MiB, 580.159.04\n"
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=told))
    first, second = conditions._gpu()
    assert first == {"name": "NVIDIA H100 80GB HBM3", "memory": "81559 MiB", "driver": "580.159.04"}
    assert second["name"] == "NVIDIA L40S"
