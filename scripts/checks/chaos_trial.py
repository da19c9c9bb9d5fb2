"""A trial of scripts/chaos: a folder with model and data, a run in it, and the same command until it has finished."""

import json
import os
import random
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from checks import chaos_judge as judge
from checks.chaos_judge import HUNG, LOST, REFUSED, SILENT, SURVIVED, TRACEBACK, Truth, Verdict
from checks.chaos_start import Ended, Planted, Start

STARTS = 5  # after the fault
LIMIT = 120.0  # seconds for a start
SETTINGS = [
    *("train", "run=run", "model.path=model", "data.path=rows.jsonl", "data.max_length=256", "data.num_workers=1"),
    *("max_steps=6", "global_batch_size=4", "micro_batch_size=2", "optimizer.lr=1e-2", "trainer=cpu", "logger=csv"),
    *(
        "evaluation.samples=2",
        "evaluation.max_new_tokens=8",
        "checkpoint.save_every=2",
        "val_every=3",
        "+model.config.attention_dropout=0.1",
    ),
]
LAYOUTS = {
    "single": (1, []),
    "single, no export": (1, ["export=false", "checkpoint.save_every=1"]),
    "ddp": (2, ["strategy=ddp", "trainer.devices=2"]),
    "zero2": (2, ["strategy=deepspeed_zero2", "trainer.devices=2"]),
}
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
RUN = Path("runs") / "run"


def write_assets(folder: Path) -> None:
    """A tiny Llama with bytes as tokens, and 60 rows."""
    import torch
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 264, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=True)).save_pretrained(folder / "model")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    backend.add_special_tokens([AddedToken(token, special=True) for token in special])
    PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=special[1:],
        chat_template=CHATML,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder / "model")
    draw, rows = random.Random(0), []
    for number in range(60):
        word = "".join(draw.choices("abcdefgh", k=draw.randint(2, 12)))
        rows.append(json.dumps({"prompt": f"Reverse {word} ({number}).", "response": word[::-1]}) + "\n")
    (folder / "rows.jsonl").write_text("".join(rows))


@dataclass
class Reference:
    """What an uninterrupted run of a layout comes to, in `folder`; made when it is first asked for."""

    folder: Path  # of this layout
    assets: Path
    layout: str
    _lock: Any = field(default_factory=threading.RLock)
    seconds: float = 0.0  # that the run takes
    changes: list[int] = field(default_factory=list)  # that each rank makes to the disk

    @cached_property
    def whole(self) -> Path:
        """A folder with the finished run."""
        num_ranks, settings = LAYOUTS[self.layout]
        folder = self.folder / "whole"
        counts = [self.folder / f"changes-{rank}" for rank in range(num_ranks)]
        shutil.copytree(self.assets, folder)
        planted = {rank: Planted(count=str(count)) for rank, count in enumerate(counts)}
        ended = Start(folder, [*SETTINGS, *settings], num_ranks, planted=planted).wait(LIMIT * 2)
        if ended.code:
            raise RuntimeError(f"the reference of {self.layout} ended with {ended.codes}:\n{ended.output}")
        self.seconds, self.changes = ended.seconds, [int(count.read_text()) for count in counts]
        return folder

    @cached_property
    def killed(self) -> Path:
        """A folder with a run that was killed after its second checkpoint."""
        num_ranks, settings = LAYOUTS[self.layout]
        folder = self.folder / "killed"
        shutil.copytree(self.assets, folder)
        slow = {rank: Planted(slow=0.03) for rank in range(num_ranks)}
        start = Start(folder, [*SETTINGS, *settings], num_ranks, planted=slow)
        while start.running() and not (folder / RUN / "checkpoints" / "step-00000004").exists():
            time.sleep(0.01)
        start.signal(9, list(range(num_ranks)))
        start.wait(LIMIT)
        if (folder / RUN / "checkpoints" / "step-00000006").exists():
            raise RuntimeError("the run that was to be killed had ended")
        return folder

    @cached_property
    def truth(self) -> Truth:
        return Truth.of(self.whole / RUN)

    def answer(self, command: tuple[str, ...]) -> str:
        """What a command on the finished run prints to standard output."""
        if command not in self._answers:
            self._answers[command] = Start(self.whole, list(command)).wait(LIMIT).output
        return self._answers[command]

    _answers: dict[tuple[str, ...], str] = field(default_factory=dict)

    def make(self) -> None:
        with self._lock:
            self.truth  # noqa: B018
            self.killed  # noqa: B018


@dataclass
class Trial:
    """A run in `folder` that something happens to."""

    folder: Path
    reference: Reference
    fault: str = ""  # of the project itself, planted by its tests: MODULE:FUNCTION
    limit: float = LIMIT
    extra: list[str] = field(default_factory=list)  # settings
    environment: dict[str, str] = field(default_factory=dict)
    ended: list[Ended] = field(default_factory=list)
    mounts: list[Path] = field(default_factory=list)
    what: str = ""  # happens, in words

    @property
    def run(self) -> Path:
        return self.folder / RUN

    @property
    def num_ranks(self) -> int:
        return LAYOUTS[self.reference.layout][0]

    @property
    def ranks(self) -> list[int]:
        return list(range(self.num_ranks))

    def copy(self, source: Path) -> None:
        shutil.copytree(source, self.folder, ignore=shutil.ignore_patterns("output-*", "tmp"), symlinks=True)

    def start(self, planted: dict[int, Planted] | None = None) -> Start:
        """The command that trains, by now."""
        given = {rank: Planted(fault=self.fault) for rank in self.ranks} | (planted or {})
        command = [*SETTINGS, *LAYOUTS[self.reference.layout][1], *self.extra]
        return Start(self.folder, command, self.num_ranks, self.environment, given)

    def command(self, *arguments: str) -> Ended:
        """Another command, on one rank."""
        start = Start(self.folder, list(arguments), 1, self.environment, {0: Planted(fault=self.fault)})
        return self.keep(start.wait(self.limit))

    def keep(self, ended: Ended) -> Ended:
        self.ended.append(ended)
        return ended

    def bad(self, ended: Ended) -> Verdict | None:
        """What no fault excuses: a traceback, or no end."""
        if None in ended.codes:
            return Verdict(HUNG, f"codes {ended.codes} after {ended.seconds:.0f} s")
        if line := judge.crashed(ended):
            return Verdict(TRACEBACK, line)
        if reports := [*self.folder.glob("runs/run/crash-*"), *self.folder.glob("tmp/sft-crash*")]:
            return Verdict(TRACEBACK, f"{reports[0].name} was written")
        return None

    def once(self, ended: Ended) -> Verdict | None:
        """For a fault that a run outlives: the start that met it has finished."""
        return self.bad(ended) or (Verdict(LOST, f"it ended with {ended.codes}: {ended.last}") if ended.code else None)

    def finish(
        self,
        names: Iterable[str] = (),
        heal: Callable[[], object] | None = None,
        resumes: bool = False,
        may_begin_anew: bool = False,
        must_name: bool = False,
    ) -> Verdict:
        """The same command until the run has finished as it should.

        A refusal that names one of `names` is followed: what it says to remove is removed; otherwise `heal` mends what
        was damaged. `resumes`: it began before, and resumes from a checkpoint, unless it says why it can't and
        `may_begin_anew`. `must_name`: one of the names must be said.
        """
        first, names, refused = len(self.ended), list(names), ""
        for _ in range(STARTS):
            ended = self.keep(self.start().wait(self.limit))
            if verdict := self.bad(ended):
                return verdict
            if not any(ended.codes):
                break
            if 2 in ended.codes:
                line = judge.refusal(ended, names)
                if line is None:
                    return Verdict(LOST, f"refused without a name or an advice: {ended.last}")
                refused, path = line, judge.to_remove(line)
                # An advice that takes nothing away is the one to restore or to wait.
                if path and self._remove(path):
                    continue
                if heal is None:
                    return Verdict(LOST, f"its advice can't be followed: {line[:300]}")
                heal()
                heal = None
            elif ended.code not in (75, 130):  # a signal that came late
                return Verdict(LOST, f"started again it ended with {ended.codes}: {ended.last}")
        else:
            return Verdict(LOST, f"not finished after {STARTS} starts")
        after = self.ended[first:]
        if difference := self.reference.truth.differs(self.run):
            metrics_alone = self.reference.truth.differs(self.run, with_metrics=False) is None
            if not (metrics_alone and judge.says(after, names)):
                return Verdict(SILENT, difference)
        if must_name and not judge.says(after, names):
            return Verdict(SILENT, f"nothing said of {names[0]}")
        if resumes and not judge.resumed(ended) and not (may_begin_anew and judge.says(after, names)):
            return Verdict(LOST, f"began anew; {refused[:200]}")
        return Verdict(REFUSED, refused) if refused else Verdict(SURVIVED)

    def _remove(self, path: str) -> bool:
        """Removes what a line names, if that is below this trial's folder."""
        target = (self.folder / path).resolve()
        if not target.is_relative_to(self.folder.resolve()) or target == self.folder.resolve() or not target.exists():
            return False
        if target.is_dir() and not target.is_symlink():
            shutil.rmtree(target)
        else:
            target.unlink()
        return True

    def mount(self, name: str, options: str) -> Path:
        """Puts a small file system in the place of a folder, with what was in it."""
        path = self.folder / name
        kept = path.with_name(f"{name}.kept")
        if path.exists():
            path.rename(kept)
        path.mkdir(parents=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)], check=True, capture_output=True)
        self.mounts.append(path)
        if kept.exists():
            shutil.copytree(kept, path, dirs_exist_ok=True, symlinks=True)
        return path

    def close(self) -> None:
        for path in self.mounts:
            subprocess.run(["umount", "-l", str(path)], check=False, capture_output=True)


def remount(path: Path, options: str) -> bool:
    """Whether it worked: a file system with a file that is open for writing can't be made read-only."""
    command = ["mount", "-o", f"remount,{options}", str(path)]
    return subprocess.run(command, check=False, capture_output=True).returncode == 0


def can_mount(folder: Path) -> bool:
    if os.geteuid():
        return False
    trial = folder / "mount"
    trial.mkdir(exist_ok=True)
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(trial)], check=False, capture_output=True
    )
    if not done.returncode:
        subprocess.run(["umount", str(trial)], check=False, capture_output=True)
    return not done.returncode
