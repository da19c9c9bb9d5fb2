"""Does a whole run work? `sft train` with each strategy: saved, killed, resumed to the same bits, exported."""

import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

from checks.assets import write_data, write_model
from checks.process import Failed, NotRun, Place, Sft, Started, context

STEPS, SAVED, KILLED = 6, 2, 5  # killed in this step, counted from 1, and so resumed after the one before
KILL = f"+callbacks.kill={{_target_: sft.proof.rehearsal.SignalInStep, step: {KILLED}, name: SIGKILL}}"
MEASURED = ("rms_difference", "rms_of_bf16", "largest_difference", "num_tokens")  # of an export
EXPORTED_ON_CPU = ("single", "deepspeed_zero2", "fsdp2")  # a cold process each
# What gloo says of an operation that it has for the processor alone, and a device mesh of options that can't be copied.
UNSUPPORTED = ("not supported", "unsupported", "not implemented", "only supports", "no backend type", "cannot pickle")


class Lab:
    """A folder with a tiny model and rows, and the settings of runs on them."""

    def __init__(self, place: Place, name: str, **changes: Any) -> None:
        self.sft = Sft(place.folder / name)
        folder = self.sft.folder
        os.environ["SFT_CACHE"] = str(folder / "cache")
        model, data = write_model(folder / "model", **changes), write_data(folder)
        self.settings = (
            f"model.path={model}",
            f"data.path={data}",
            "data.max_length=128",
            "data.num_workers=1",
            "global_batch_size=4",
            "micro_batch_size=1",
            f"max_steps={STEPS}",
            f"val_every={STEPS}",
            f"checkpoint.save_every={SAVED}",
            "schedule.warmup=0",
            "logger=csv",
            "trainer=gpu" if place.gpu else "trainer=cpu",
        )

    def start(self, name: str, run: str, *settings: str, **environment: str) -> Started:
        return self.sft.start(name, "train", *self.settings, f"run={run}", *settings, **environment)

    def run_folder(self, run: str) -> Path:
        return self.sft.folder / "runs" / run

    def last(self, run: str) -> Any:
        from sft.checkpoint.checkpoint import complete

        return complete(self.run_folder(run) / "checkpoints")[-1]

    def difference(self, run: str, other: str) -> float:
        """Of the weights of the last checkpoints."""
        one, two = self.last(run), self.last(other)
        if (one.step, two.step) != (STEPS, STEPS):
            raise Failed(f"the last checkpoints are of the steps {one.step} and {two.step}")
        return max(float((one.tensor(name).float() - two.tensor(name).float()).abs().max()) for name in one.shapes)


def strategy(place: Place, name: str) -> tuple[str, dict[str, Any]]:
    return whole_life(place, Lab(place, name), name)


def qlora(place: Place) -> tuple[str, dict[str, Any]]:
    # Widths that blocks of 64 weights divide.
    lab = Lab(place, "qlora", hidden_size=192, intermediate_size=384, head_dim=32)
    return whole_life(place, lab, "single", "adapter=qlora", "adapter.r=4")


def whole_life(place: Place, lab: Lab, name: str, *extra: str) -> tuple[str, dict[str, Any]]:
    """A run with deterministic kernels in bf16-mixed, and one that is killed on its way."""
    settings = [f"strategy={name}", "trainer.precision=bf16-mixed", "trainer.deterministic=true"]
    settings += ["optimizer.lr=1e-3", *extra]
    begun = time.monotonic()
    if name.endswith("offload"):
        load_cpu_adam(place)
    loaded = time.monotonic()
    whole = lab.start("whole", "whole", *settings, "export=false")
    killed = lab.start("killed", "run", *settings, KILL)
    whole.end()
    killed.end(-9)
    after_killed = time.monotonic()
    exports = place.gpu or name in EXPORTED_ON_CPU
    printed = lab.start("resumed", "run", *settings, f"export={str(exports).lower()}").end()
    if f"resumed after step {KILLED - 1}" not in printed:
        raise Failed(f"it did not resume after step {KILLED - 1}")
    same_bits(lab)
    if name == "single" and not extra:
        answer(lab)
    figures: dict[str, Any] = {
        "optimizer_seconds": round(loaded - begun, 1),
        "train_seconds": round(after_killed - loaded, 1),
        "resume_and_export_seconds": round(time.monotonic() - after_killed, 1),
    }
    told = f"killed in step {KILLED} and resumed: the same bits"
    if exports:
        verdict = json.loads((lab.run_folder("run") / "export" / "verified.json").read_text())
        figures["export"] = {key: verdict[key] for key in MEASURED}
        told += f"; export off by {verdict['rms_difference']:.1e}, bf16 by itself {verdict['rms_of_bf16']:.1e}"
    return told, figures


def answer(lab: Lab) -> None:
    """The exported model answers and scores."""
    generated = lab.sft("generate", "generate", "run=run", "--prompt", "Spell enunur.", "max_new_tokens=8")
    scored = lab.sft("score", "score", "run=run", f"data={lab.sft.folder / 'rows.jsonl'}", "output=scores.jsonl")
    if "60 samples scored" not in scored:
        raise Failed(f"sft score printed {scored[-200:]!r}")
    print(generated, flush=True)


def load_cpu_adam(place: Place) -> None:
    """DeepSpeed's AdamW for the host, compiled where it isn't yet; so that it is done once and not by each run."""
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # where ninja is
    if not place.gpu:
        _load_cpu_adam()
        return
    process = context().Process(target=_load_cpu_adam)  # it looks at CUDA
    process.start()
    process.join()
    if process.exitcode:
        raise Failed("DeepSpeed's CPU AdamW can't be compiled")


def _load_cpu_adam() -> None:
    from deepspeed.ops.op_builder import CPUAdamBuilder

    CPUAdamBuilder().load()


def same_bits(lab: Lab) -> None:
    whole, resumed = (lab.last(run) for run in ("whole", "run"))
    names = [*whole.state["files"], "probes.json"]
    differing = [name for name in names if (whole.path / name).read_bytes() != (resumed.path / name).read_bytes()]
    if differing:
        off = lab.difference("whole", "run")
        raise Failed(f"resumed, {', '.join(differing)} have other bits: weights are off by {off:.1e}")


def two_ranks(place: Place, name: str) -> tuple[str, dict[str, Any]]:
    """Two ranks that share the device, over gloo since NCCL refuses that, against one rank, in fp32."""
    lab = Lab(place, f"two_ranks_{name}")
    # SGD, and nothing clipped: no adaptive scale hides an error in the gradient's.
    settings = ["trainer.precision=32-true", "optimizer=sgd", "optimizer.lr=0.1", "trainer.gradient_clip_val=null"]
    settings += ["export=false"]
    lab.start("one", "one", *settings).end()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    settings += [f"strategy={name}", "trainer.num_nodes=2", "+strategy.process_group_backend=gloo"]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    ranks = [  # each as on a node of its own: two ranks of one would be refused the same device
        lab.start(f"rank{rank}", "two", *settings, **shared, SLURMD_NODENAME=f"n{rank}", RANK=str(rank))
        for rank in (0, 1)
    ]
    wait_for(ranks)
    try:
        for rank in ranks:
            rank.end()
    except Failed as fault:
        said = "".join(each.log.read_text(errors="replace") for each in ranks).lower()
        if place.gpu and any(words in said for words in UNSUPPORTED):
            raise NotRun(f"gloo can't do it on CUDA: {fault}") from fault
        raise
    off = lab.difference("one", "two")
    if not off < 1e-5:
        raise Failed(f"the weights of two ranks are off by {off:.1e} from those of one")
    return f"the weights of two ranks are within {off:.1e} of those of one", {"difference": off}


def wait_for(ranks: list[Started]) -> None:
    """Until all have ended; when one has failed, the others wait for it in vain."""
    while any(rank.process.exitcode is None for rank in ranks):
        time.sleep(0.1)
        if any(rank.process.exitcode for rank in ranks):
            time.sleep(3)
            for rank in ranks:
                rank.process.kill()


def preflight(place: Place) -> tuple[str, dict[str, Any]]:
    """What slurm/preflight.sbatch runs on each rank, for one: NCCL, clocks, locks, the GPU's health."""
    sft, folder = Sft(place.folder / "preflight"), place.folder / "preflight" / "report"
    folder.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    rank = {"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_LOCALID": "0", "SLURMD_NODENAME": "here"}
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "SLURM_GPUS_ON_NODE": str(int(place.gpu))}
    check = ("sft.cluster.preflight.__main__", "check", str(folder), "--write-mb", "16", "--timeout", "60")
    sft.start("check", *check, **rank, **shared).end()
    report = json.loads((folder / "rank-0.json").read_text())
    health = report["gpus"]["health"]
    if place.gpu and (report["gpus"]["visible"] < 1 or not health):
        raise Failed(f"it sees {report['gpus']}")
    faults = [fault for each in health for fault in each["faults"]]
    told = f"came to {report['stage']}, {report['all_mb']} MB reduced" + (f"; {faults}" if faults else "")
    return told, {name: report[name] for name in ("versions", "gpus", "write_mb_s", "all_gb_s")}
