"""Every command in the README and docs/ works, on a small model and a few rows in the place of those it names."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from running import Sft
from sft.proof import cells

ROOT = Path(__file__).resolve().parents[1]
PAGES = {path: path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
BLOCKS = [block for page in PAGES.values() for block in re.findall(r"```bash\n(.*?)```", page, re.S)]
COMMANDS = [line.strip() for block in BLOCKS for line in block.splitlines() if line.strip()]
SMALL = ["max_steps=2", "data.max_length=256", "global_batch_size=2", "trainer=cpu", "logger=csv", "data.num_workers=1"]


@pytest.fixture
def ready(sft: Sft, model_folder: Path, data_file: Path, monkeypatch: pytest.MonkeyPatch) -> Sft:
    """A folder beside `shared/data/gsm8k`, as the README supposes it, after `make demo`."""
    work, gsm8k = sft.folder / "work", sft.folder / "shared" / "data" / "gsm8k"
    work.mkdir()
    gsm8k.mkdir(parents=True)
    rows = [{"question": f"What is {n} + {n}?", "answer": f"{n} + {n} = {2 * n}\n#### {2 * n}"} for n in range(20)]
    for split in ("train", "test"):
        (gsm8k / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.copy(data_file, work / "my.jsonl")
    (work / "prompts.txt").write_text("Reverse abc.\n")
    shutil.copytree(model_folder, work / "runs" / "demo-base" / "export")
    monkeypatch.chdir(work)
    return sft


def test_there_are_commands() -> None:
    assert len(COMMANDS) > 8


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith("make ")])
def test_make_target_exists(line: str) -> None:
    # Run for real by CI; here make only says what it would do.
    target = line.split()[1]
    subprocess.run(["make", "--dry-run", target], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith(("sft train", "sft preview"))])
def test_training_command(line: str, ready: Sft, model_folder: Path) -> None:
    _, command, *arguments = shlex.split(line, comments=True)
    arguments = [argument.replace("Qwen/Qwen3-0.6B", str(model_folder)) for argument in arguments]
    if "experiment=gsm8k" in arguments and not any(argument.startswith("data.path") for argument in arguments):
        arguments.append("data.path=../shared/data/gsm8k")
    if "trainer.devices=8" in arguments:
        arguments.remove("trainer.devices=8")
        ended = ready.ranks(2, command, *arguments, *SMALL, folder=Path.cwd())
        assert ended.code == 0, ended.output
    else:
        assert ready(command, *arguments, *SMALL) == 0


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith("sft certify")])
def test_certificate(line: str, ready: Sft, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def one(quick: bool, precision: str, device: str, most_ranks: int) -> list[cells.Cell]:
        fixed = {"accumulation": 2, "packed": True, "resumed": False, "optimizer": "adamw"}
        return [cells.Cell("ddp", 2, **fixed, precision=precision, device=device)]

    monkeypatch.setattr(cells, "all_cells", one)
    arguments = [each.replace("Qwen/Qwen3-0.6B", str(model_folder)) for each in shlex.split(line)[2:]]
    assert ready("certify", *arguments, "data.max_length=256", "data.num_workers=1") == 0


@pytest.mark.parametrize(
    "line",  # sft rehearse: tests/commands/test_rehearse.py; sft submit: tests/commands/test_submit.py
    [
        line
        for line in COMMANDS
        if line.startswith("sft ") and line.split()[1] not in ("train", "preview", "rehearse", "certify", "submit")
    ],
)
def test_command_on_a_finished_run(line: str, ready: Sft) -> None:
    settings = [*ready.settings, "data.path=my.jsonl", "run=NAME"]
    assert ready("train", *settings, *SMALL) == 0
    _, command, *arguments = shlex.split(line, comments=True)
    assert ready(command, *arguments, *(["max_new_tokens=4"] if command == "generate" else [])) == 0


@pytest.mark.parametrize("command", sorted({line.split()[1] for line in COMMANDS if line.startswith("scripts/bench ")}))
def test_benchmark(command: str) -> None:
    options = ["--no-trl"] if command == "train" else []
    bench = [sys.executable, str(ROOT / "scripts" / "bench"), command, "--quick", *options]
    shown = subprocess.run(bench, check=True, capture_output=True, text=True).stdout
    assert re.search(r"tokens/s|rows/s|save, s", shown)


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith("scripts/bench ") and "--gpu" in line])
def test_benchmark_on_a_gpu(line: str, tmp_path: Path) -> None:
    # Its arguments are known, and without a GPU it says so.
    bench = [sys.executable, str(ROOT / "scripts" / "bench"), *shlex.split(line)[1:]]
    ended = subprocess.run(bench, env={"PATH": str(tmp_path)}, capture_output=True, text=True)
    assert ended.stderr == "scripts/bench: nvidia-smi finds no GPU here: leave out --gpu\n"


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith("scripts/gpu")])
def test_gpu(line: str) -> None:
    # Shown and not run, but for --cpu, which CI runs: .ci/run.
    arguments = shlex.split(line, comments=True)[1:]
    shown = subprocess.run([sys.executable, str(ROOT / "scripts" / "gpu"), *arguments, "--list"], capture_output=True)
    assert shown.returncode == 0 and shown.stdout
    assert "scripts/gpu --cpu" in (ROOT / ".ci" / "run").read_text()


def test_every_command_is_covered() -> None:
    rest = [line for line in COMMANDS if not line.startswith(("make ", "sft ", "scripts/bench ", "scripts/gpu"))]
    # Those of a cluster: tests/slurm. The others are what anybody has.
    assert all(
        re.match(r"slurm/local-cluster (start|exec|crash|boot|stop)|sbatch .*slurm/|cmp ", line) for line in rest
    )


@pytest.mark.parametrize(
    ("page", "path"),
    sorted({(page, path) for page, text in PAGES.items() for path in re.findall(r"\]\(([^)#:]+)[)#]", text)}),
)
def test_every_link_leads_somewhere(page: Path, path: str) -> None:
    assert (page.parent / path).exists()
