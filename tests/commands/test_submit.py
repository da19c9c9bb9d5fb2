"""sft submit: what it refuses, reports and passes to sbatch. Slurm's commands are the tests' own scripts, except in the
last test, which has a cluster."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import constants

import running
from cluster import Cluster
from running import Sft
from sft.cluster.sbatch import PROJECT, site_environment
from sft.commands import submit
from sft.runs.run import Run

# Options of a job that the false Slurm has nodes for.
FITTING = ["--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2", "--cpus-per-task=4"]
GPU = ["trainer=gpu", "strategy=ddp", "micro_batch_size=1", "run=run"]


class FalseSlurm:
    """sbatch, sinfo and squeue. The arguments of sbatch go to the file `arguments`, one a line."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.arguments = folder, folder / "arguments"
        folder.mkdir()
        self.answer("sinfo", "main*|4|16|gpu:a100:2(S:0-1)|infinite|n/a|up|idle\nshort|4|16|gpu:2|2:00|n/a|up|mixed")
        self.answer("squeue", "")
        self.answer("sbatch", "7")

    def answer(self, command: str, text: str, code: int = 0) -> None:
        where = " >&2" if code else ""
        note = f'printf "%s\\n" "$@" >"{self.arguments}"\n' if command == "sbatch" else ""
        lines = f"{text}\n" if text else ""
        (self.folder / command).write_text(f"#!/bin/sh\n{note}cat <<'E'{where}\n{lines}E\nexit {code}\n")
        (self.folder / command).chmod(0o755)


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FalseSlurm:
    monkeypatch.setenv("PATH", f"{tmp_path}/slurm:/usr/bin:/bin")
    for name in [name for name in os.environ if name.startswith("SBATCH_")]:
        monkeypatch.delenv(name)
    site_environment.cache_clear()
    return FalseSlurm(tmp_path / "slurm")


def settings(sft: Sft, *more: str) -> list[str]:
    here = [f"runs_dir={sft.folder}/runs", f"data.cache_dir={sft.folder}/cache"]
    return [*(setting for setting in sft.settings if setting != "trainer=cpu"), *here, *more]


Prepare = Callable[[FalseSlurm], None]


def answer(command: str, text: str, code: int = 0) -> Prepare:
    return lambda slurm: slurm.answer(command, text, code)


def nothing(slurm: FalseSlurm) -> None:
    pass


def queued_before(slurm: FalseSlurm) -> None:
    """Job 3 has finished what it had to, and its number is another's; job 4 waits."""
    run = slurm.folder.parent / "runs" / "run"
    run.mkdir(parents=True)
    for job, event in ((3, "submit"), (3, "finish"), (4, "submit"), (4, "requeue")):
        with (run / "events.jsonl").open("a") as file:
            file.write(
                json.dumps({"time": "2026-01-01T10:00:00+00:00", "event": event, "job": job, "restart": 0}) + "\n"
            )
    slurm.answer("squeue", "3|RUNNING|None|(null)\n4|PENDING|Resources|(null)")


def not_installed(slurm: FalseSlurm) -> None:
    (slurm.folder / "sbatch").unlink()
    os.environ["PATH"] = str(slurm.folder / "bin")
    (slurm.folder / "bin").mkdir()
    (slurm.folder / "bin" / "bash").symlink_to("/bin/bash")
    (slurm.folder / "bin" / "env").symlink_to("/usr/bin/env")


@pytest.mark.parametrize(
    ("prepare", "options", "more", "message"),
    [
        (
            nothing,
            ["--ntasks-per-node=3"],
            [],
            "a global batch of 4 packs does not divide among 6 ranks in micro-batches of 1: use a global batch size "
            "of 6",
        ),
        (
            nothing,
            [],
            ["strategy=single"],
            "strategy=single is for one device, and the trainer has 4: set strategy=ddp",
        ),
        (
            nothing,
            ["--gpus-per-node=1"],
            [],
            "the job has 2 tasks and 1 GPUs a node, and each task is a rank that drives one: set --ntasks-per-node and "
            "--gpus-per-node to the same number",
        ),
        (nothing, [], ["model.path=./missing"], f"model.path=./missing: there is no such folder (looked in {PROJECT})"),
        (
            nothing,
            [],
            ["model.path=org/missing"],
            f"model.path=org/missing is neither in {PROJECT} nor in CACHE, and HF_HUB_OFFLINE is set: give a folder, "
            "or download it first",
        ),
        (nothing, [], ["model.path=FOLDER/slurm"], "model.path=FOLDER/slurm: the folder holds no model (config.json)"),
        (
            nothing,
            [],
            ["data.path=missing.jsonl"],
            f"missing.jsonl: no such file or folder (looked in {PROJECT})",
        ),
        (nothing, ["-p", "gpu"], [], "there is no partition gpu: there are main, short"),
        (
            nothing,
            ["--nodes=8"],
            ["global_batch_size=32"],
            "the job needs 8 nodes with 8 CPUs and 2 GPUs, and partition main has 4 with 16 CPUs and 2 GPUs: set "
            "--nodes, --ntasks-per-node, --gpus-per-node, --cpus-per-task",
        ),
        (
            nothing,
            ["--ntasks-per-node=3", "--gpus-per-node=3"],
            ["global_batch_size=6"],
            "the job needs 2 nodes with 12 CPUs and 3 GPUs, and partition main has 4 with 16 CPUs and 2 GPUs: set "
            "--nodes, --ntasks-per-node, --gpus-per-node, --cpus-per-task",
        ),
        (
            nothing,
            [],
            ["adapter=qlora", "strategy=fsdp2"],
            "adapter=qlora: strategy=fsdp2 can't shard weights in 4 bits: set strategy=ddp or adapter=lora",
        ),
        (
            nothing,
            ["-p", "short"],
            [],
            "--time=24:00:00 is more than partition short allows: set --time=0:02:00 or less; at the time limit the "
            "job is requeued and resumes",
        ),
        (
            nothing,
            ["--time=5"],
            [],
            "a job of 0:05:00 gets its signal 300 s before the end, almost at once: set --time to 0:06:00 or more, or "
            "a later signal with --signal=USR1@SECONDS",
        ),
        (
            answer("sbatch", "allocation failure: Invalid account or account/partition combination specified", code=1),
            ["--account=theirs"],
            [],
            "Slurm refuses the job: Invalid account or account/partition combination specified: set --account, one of: "
            "sacctmgr show assoc user=$USER format=account,partition,qos",
        ),
        (
            queued_before,
            [],
            [],
            "job 4 (PENDING) trains FOLDER/runs/run already: let it, or end it first with scancel 4",
        ),
        (
            answer("sbatch", "allocation failure: Requested node configuration is not available", code=1),
            [],
            [],
            "Slurm refuses the job: Requested node configuration is not available: no nodes have all of it together "
            "(memory, kind of GPU, constraint): see scontrol show node",
        ),
        (
            answer("sbatch", "sbatch: error: Unable to open file seed=3", code=1),
            ["seed=3"],
            [],
            "Slurm refuses the job: Unable to open file seed=3: it is no option of sbatch, and settings of sft train "
            "come after --",
        ),
        (
            answer("sinfo", "slurm_load_partitions: Unable to contact slurm controller", code=1),
            [],
            [],
            "Slurm does not answer (sinfo: slurm_load_partitions: Unable to contact slurm controller): see whether "
            "sinfo works",
        ),
        (
            not_installed,
            [],
            [],
            "sbatch is not found: give the command on a login node of the cluster; slurm/local-cluster makes a small "
            "cluster of this machine to try it on",
        ),
        (
            nothing,
            [],
            ["--config-dir=conf"],
            "--config-dir=conf goes before the settings: sft submit ... -- --config-dir=conf ... experiment=gsm8k",
        ),
    ],
)
def test_refused_before_the_queue(
    prepare: Prepare,
    options: list[str],
    more: list[str],
    message: str,
    sft: Sft,
    slurm: FalseSlurm,
    capsys: pytest.CaptureFixture[str],
) -> None:
    prepare(slurm)
    for name, path in (("FOLDER", str(sft.folder)), ("CACHE", constants.HF_HUB_CACHE)):
        message, more = message.replace(name, path), [setting.replace(name, path) for setting in more]
    before = sorted(sft.folder.rglob("*"))
    assert sft("submit", *FITTING, *options, "--", *settings(sft, *GPU, *more)) == 2
    assert capsys.readouterr().err == f"sft: {message}\n"
    assert [path for path in sorted(sft.folder.rglob("*")) if path != slurm.arguments] == before
    assert not slurm.arguments.exists() or "--test-only" in slurm.arguments.read_text().splitlines()


def test_a_full_disk(
    sft: Sft, slurm: FalseSlurm, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = next(Path(sft.settings[0].partition("=")[2]).glob("*.safetensors")).stat().st_size
    for free, code in ((3 * weights - 1, 2), (3 * weights, 0)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        assert sft("submit", "--dry-run", *FITTING, "--", *settings(sft, *GPU)) == code
    assert f"{sft.folder}/runs/run has 0.0 GB free, and a checkpoint of" in capsys.readouterr().err


def test_without_the_two_dashes(sft: Sft, capsys: pytest.CaptureFixture[str]) -> None:
    assert sft("submit", "experiment=gsm8k") == 2
    assert "sft submit --nodes=2 -- experiment=gsm8k" in capsys.readouterr().err


def test_a_finished_run_is_not_queued(
    sft: Sft, slurm: FalseSlurm, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Run, "status", {"state": "finished"})
    assert sft("submit", *FITTING, "--", *settings(sft, *GPU)) == 2
    assert f"{sft.folder}/runs/run is finished: nothing to do" in capsys.readouterr().err


def test_what_sbatch_gets(sft: Sft, slurm: FalseSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    given, run = settings(sft, *GPU), sft.folder / "runs" / "run"
    ours = [f"--chdir={PROJECT}", "--job-name=run", f"--output={run}/logs/%j.out"]
    rest = [*ours, *FITTING, f"{PROJECT}/slurm/train.sbatch", *given]

    assert sft("submit", "--dry-run", *FITTING, "--", *given) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"{run} (new): 2 nodes × 2 ranks, 1 micro-batches of 1 each a step; 24:00:00 at most")
    assert printed.endswith(" ".join(["sbatch", "--parsable", *rest]) + "\n") and not run.exists()
    assert slurm.arguments.read_text().splitlines() == ["--test-only", "--parsable", *rest]

    assert sft("submit", *FITTING, "--", *given) == 0
    assert slurm.arguments.read_text().splitlines() == ["--parsable", *rest]
    assert f"tail -F {run}/logs/7.out" in capsys.readouterr().out
    assert (run / "logs").is_dir()
    (event,) = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert (event["event"], event["job"], event["options"], event["settings"]) == ("submit", 7, FITTING, given)


def test_names_that_are_given_and_the_tracker_that_is_logged_to(
    sft: Sft, slurm: FalseSlurm, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SBATCH_JOB_NAME", "mine")
    site_environment.cache_clear()
    assert sft("submit", *FITTING, "--", *settings(sft, *GPU, "logger=wandb")) == 0
    assert "--job-name=mine" in slurm.arguments.read_text().splitlines()
    wandb = f"wandb sync {sft.folder}/runs/run/wandb/offline-run-*"
    assert f"W&B: run run; if the nodes are offline: {wandb}" in capsys.readouterr().out
    site_environment.cache_clear()


def test_four_bits_need_a_gpu_on_the_nodes_alone(sft: Sft, slurm: FalseSlurm) -> None:
    assert sft("submit", "--dry-run", *FITTING, "--", *settings(sft, *GPU, "adapter=qlora")) == 0


def test_a_run_that_a_sweep_has_queued_from_a_machine_without_a_gpu(
    sft: Sft, slurm: FalseSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    slurm.answer("squeue", f"5|PENDING|Priority|sft train {sft.folder}/runs/run")
    given = settings(sft, *GPU, "adapter=qlora")
    for command in (["submit", *FITTING, "--", *given], ["train", "-m", *given, "hydra/launcher=slurm"]):
        assert sft(*command) == 2
        assert f"job 5 (PENDING) trains {sft.folder}/runs/run already" in capsys.readouterr().err


OFFLOAD = ("trainer.num_nodes=1", "strategy=deepspeed_zero2_offload")


def test_notes(
    sft: Sft, slurm: FalseSlurm, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(sft.folder))
    # Of five nodes one is there, for which Slurm would refuse what it queues.
    slurm.answer("sinfo", "main*|4|16|gpu:2|infinite|n/a|up|down*\nmain*|1|16|gpu:2|infinite|n/a|up|idle")
    slurm.answer("sbatch", "allocation failure: Requested node configuration is not available", code=1)
    run = sft.folder / "runs" / "run"
    run.mkdir(parents=True)
    (run / "events.jsonl").write_text(
        json.dumps({"time": "2026-01-01T00:00:00+00:00", "event": "save", "step": 10, "seconds": 160.0}) + "\n"
    )
    assert sft("submit", "--dry-run", *FITTING, "--", *settings(sft, *GPU, *OFFLOAD)) == 0
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert notes[0] == "note: trainer.num_nodes=1 gives way to 2, the job's own"
    assert notes[1].startswith("note: on this machine's own disk, which the nodes may not see: runs_dir (")
    assert notes[2:] == [
        "note: the first node compiles DeepSpeed's AdamW for the host before it trains: about a minute, once",
        "note: a save took 160 s in earlier attempts, and --signal leaves 300 s for the step under way and a save: "
        "--signal=USR1@640 is safer",
        "note: 1 of the 2 nodes that it needs are up in partition main, so the job waits",
    ]


def test_a_rehearsal_that_fails_queues_nothing(
    sft: Sft, slurm: FalseSlurm, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    slurm.answer("sft", "", code=1)
    (slurm.folder / "python").symlink_to("/bin/sh")  # runs the sft beside it
    monkeypatch.setattr(running, "python", lambda: SimpleNamespace(executable=f"{slurm.folder}/python"))
    assert sft("submit", "--rehearse", *FITTING, "--", *settings(sft, *GPU)) == 2
    assert capsys.readouterr().err.strip() == "sft: not submitted, since the rehearsal failed"
    assert "--test-only" in slurm.arguments.read_text()
    slurm.answer("sft", "rehearsed")
    assert sft("submit", "--rehearse", *FITTING, "--", *settings(sft, *GPU)) == 0
    assert "--test-only" not in slurm.arguments.read_text()


@pytest.mark.xdist_group("slurm")
def test_on_a_cluster(sft: Sft, cluster: Cluster) -> None:
    script = str(Path(sys.executable).with_name("sft"))
    options = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1"]
    given = settings(sft, "trainer=cpu", "strategy=ddp")
    for wrong, message in (
        (["--", *given, "global_batch_size=5"], "a global batch of 5 packs does not divide among 2 ranks"),
        (["-p", "gpu", "--", *given], "there is no partition gpu: there are main, preemptible, short"),
    ):
        refused = cluster.exec(script, "submit", *options, *wrong)
        assert refused.returncode == 2 and message in refused.stderr and len(refused.stderr.splitlines()) == 1
    shown = cluster.exec(script, "submit", "--dry-run", *options, "--", *given)
    assert shown.returncode == 0, shown.stderr
    assert "Slurm would start it at" in shown.stdout and "sbatch --parsable" in shown.stdout
    assert cluster.exec("squeue", "--noheader").stdout == ""


def test_a_model_that_the_run_has_proven_is_not_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr("sft.proof.first_batch.prove_small", asked.append)
    settings = {"attention": "auto", "isolate": "packed"}
    found = {"first_batch": {"where": {"settings": settings}}}
    (tmp_path / "provenance.json").write_text(json.dumps(found))
    run = SimpleNamespace(folder=tmp_path)
    assert submit.check_first_batch(SimpleNamespace(model=SimpleNamespace(**settings)), run) == []
    assert not asked
    other = SimpleNamespace(model=SimpleNamespace(**settings | {"isolate": "auto"}))
    assert len(submit.check_first_batch(other, run)) == 1
    assert asked == [other]
