"""The callback that has the model answer a few held-out prompts at each validation, and keeps and shows the answers."""

import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig
from rich.text import Text

from sft.config.literal import instantiate
from sft.data.chat_template import ChatTemplate
from sft.errors import UserError
from sft.evaluation import scorers
from sft.evaluation.generation import answer, answering, decode
from sft.evaluation.prompts import Prompt, choose, question
from sft.export.folder import generation_config
from sft.ranks import together
from sft.report.screen import EMPTY
from sft.runs import answers_file, signals, watchdog
from sft.runs.answers_file import Answer
from sft.runs.plain import plain
from sft.runs.run import Run
from sft.training.log import is_main, log
from sft.training.module import SFTModule
from sft.training.prepare import Prepared
from sft.training.strategies import placement

SHOWN = 4  # answers of a validation
LONGEST_LINE = 120  # characters, where no terminal has a width
TOKENS_AT_ONCE = 8192  # of a batch with its answers, or as many as a micro-batch has if that is more

Given = tuple[int, list[int]]  # the number of a prompt, and the token ids that the model makes of it


@dataclass(eq=False)
class Answers(Callback):
    """Answers the prompts greedily at each validation, that before training included, whose answers stand beside all
    later ones. The prompts are shared out over the ranks.

    Nothing of it changes what is trained: no random number is drawn, and the model is as it was afterwards. If it
    fails, one line says so, and nothing more is asked. Where a strategy shards the weights, all ranks make equal
    batches and equally many passes.
    """

    folder: Path  # of the run
    prompts: Sequence[Prompt]
    chat: ChatTemplate
    scorer: Callable[[str, str], float]  # of (answer, reference)
    max_new_tokens: int
    seconds: float  # for all answers of a validation
    tokens_at_once: int
    stops: Sequence[int]
    pad: int
    base: dict[tuple[str, int], tuple[str, float | None]] = field(default_factory=dict)  # by source and row
    off: bool = False

    def on_fit_start(self, trainer: L.Trainer, module: SFTModule) -> None:
        for known in answers_file.read(self.folder) if trainer.is_global_zero else ():
            if known["base"] is not None:
                self.base[known["source"], known["row"]] = known["base"], known["base_score"]

    def on_validation_end(self, trainer: L.Trainer, module: SFTModule) -> None:
        if self.off or trainer.state.fn != "fit":
            return
        begun = time.perf_counter()
        try:
            parts = together(partial(self._given, trainer, module))
        except Exception as error:  # on all ranks at once
            self.off = True
            log(f"no more answers to held-out prompts in this run, which continues ({in_a_line(error)})")
        if self.off:  # what was under way is let go by now
            torch.cuda.empty_cache()
        elif trainer.is_global_zero and not any(is_cut for _, is_cut in parts):
            try:
                self._record(trainer, module, dict(one for given, _ in parts for one in given), begun)
            except Exception as error:  # a full disk, a tracker
                log(f"step {trainer.global_step}: answers to held-out prompts are lost ({in_a_line(error)})")

    def _given(self, trainer: L.Trainer, module: SFTModule) -> tuple[list[Given], bool]:
        """This rank's answers, and whether a signal has cut one."""
        num_ranks, given = trainer.world_size, []
        is_sharded = num_ranks > 1 and placement(trainer.strategy).sharding is not None
        batches = self._batches(num_ranks)
        limit = getattr(module.model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
        end = time.monotonic() + self.seconds
        try:
            with answering(module.model), trainer.precision_plugin.forward_context():
                for number, batch in enumerate(batches):
                    mine, width = batch[trainer.global_rank :: num_ranks], len(batch[0].ids)
                    mine += batch[-1:] * (-(-len(batch) // num_ranks) - len(mine))  # as many as the others have
                    now = time.monotonic()
                    ids = answer(
                        module.model,
                        [prompt.ids for prompt in mine],
                        max_new_tokens=min(self.max_new_tokens, limit - width),
                        pad=self.pad,
                        stops=self.stops,
                        width=width,
                        device=module.device,
                        synced=is_sharded,
                        is_over=partial(_is_over, now + (end - now) / (len(batches) - number)),
                    )
                    given += [(prompt.number, of_prompt) for prompt, of_prompt in zip(mine, ids, strict=True)]
        except Exception as error:
            if is_sharded and not trainer.is_global_zero:  # the others may wait for this rank, and say nothing
                print(
                    f"rank {trainer.global_rank}: answering held-out prompts failed ({in_a_line(error)}); if the run "
                    "hangs now, resume it with evaluation.samples=0",
                    file=sys.stderr,
                    flush=True,
                )
            raise
        ended = (len(ids) == self.max_new_tokens or ids[-1] in self.stops for _, ids in given)
        return given, signals.received() != 0 and not all(ended)

    def _batches(self, num_ranks: int) -> list[list[Prompt]]:
        """Those of all ranks, the longest prompts first."""
        in_order = sorted(self.prompts, key=lambda prompt: -len(prompt.ids))
        longest = len(in_order[0].ids) + self.max_new_tokens
        size = max(1, self.tokens_at_once // longest) * num_ranks
        return [in_order[first : first + size] for first in range(0, len(in_order), size)]

    def _record(self, trainer: L.Trainer, module: SFTModule, given: Mapping[int, list[int]], begun: float) -> None:
        step = trainer.global_step
        answers = [self._answer(prompt, given[prompt.number], step, trainer.sanity_checking) for prompt in self.prompts]
        answers_file.append(self.folder, answers)
        metrics = scorers.measures(answers)
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=step)
            if hasattr(logger, "log_answers"):
                logger.log_answers(step, answers)
        base = f" (base model {metrics['answers/base_score']:.2f})" if "answers/base_score" in metrics else ""
        log(
            f"step {step}: {len(answers)} answers score {metrics['answers/score']:.2f}{base}, "
            f"{metrics['answers/exact']:.0%} exact, {metrics['answers/stopped']:.0%} stopped, "
            f"{time.perf_counter() - begun:.1f} s"
        )
        is_last = step == module.num_steps or trainer.should_stop
        if is_last or trainer.sanity_checking:
            for line in shown(answers[:SHOWN], with_now=is_last):
                log(line)
            if len(answers) > SHOWN:
                log(f"  all in {self.folder / 'samples.jsonl'}")

    def _answer(self, prompt: Prompt, ids: list[int], step: int, is_base: bool) -> Answer:
        tokenizer = self.chat.tokenizer
        text, reference = (decode(tokenizer, each, self.stops) for each in (ids, prompt.reference))
        score = self._score(text, reference)
        if is_base:
            self.base[prompt.source, prompt.row] = text, score
        base, base_score = self.base.get((prompt.source, prompt.row), (None, None))
        return {
            "step": step,
            "number": prompt.number,
            "source": prompt.source,
            "row": prompt.row,
            "prompt": question(self.chat, prompt.ids),
            "reference": reference,
            "base": base,
            "answer": text,
            "score": score,
            "base_score": base_score,
            "num_tokens": len(ids),
            "num_reference_tokens": len(prompt.reference),
            "stopped": bool(ids) and ids[-1] in self.stops,
        }

    def _score(self, text: str, reference: str) -> float:
        try:
            return float(self.scorer(text, reference))
        except Exception as error:  # of the user's own code
            log(f"evaluation.scorer failed, so answers are scored by exact match from here on ({in_a_line(error)})")
            self.scorer = scorers.exact
            return scorers.exact(text, reference)


def of(config: DictConfig, prepared: Prepared, run: Run, start_step: int) -> Answers | None:
    """The run's answers from `start_step` on; None where it has no validation, or no prompts to answer."""
    if is_main():
        answers_file.keep_until(run.folder, start_step)
    settings, data = config.evaluation, prepared.data
    if not settings.samples or prepared.splits.val is None:
        return None
    try:
        scorer = instantiate(settings.scorer)
        if not callable(scorer):
            raise TypeError(f"it gives {type(scorer).__name__}, no function of (answer, reference)")
    except Exception as error:
        raise UserError(
            f"evaluation.scorer: {' '.join(str(error.__cause__ or error).split())}: name a function of (answer, "
            "reference) in _target_, with _partial_: true"
        ) from error
    try:
        generation = generation_config(prepared.source, prepared.tokenizer, prepared.stop_token_ids, lambda line: None)
    except UserError as error:  # the export refuses it, where there is one
        log(f"no answers to held-out prompts: {error}")
        return None
    sets = list(data.val_sets.values())
    prompts = choose(prepared.splits.val, sets, settings.samples, settings.max_new_tokens)
    if not prompts:
        return None
    hang_after = config.cluster.hang_after
    return Answers(
        folder=run.folder,
        prompts=prompts,
        chat=ChatTemplate(prepared.tokenizer, prepared.template),
        scorer=scorer,
        max_new_tokens=settings.max_new_tokens,
        # A rank that has finished before the others gives no sign of life.
        seconds=min(settings.seconds, hang_after / 2) if hang_after else settings.seconds,
        tokens_at_once=max(TOKENS_AT_ONCE, data.max_length * data.micro_batch_size),
        stops=generation.eos_token_id,
        pad=generation.pad_token_id,
    )


def shown(answers: Sequence[Answer], with_now: bool) -> Iterator[str]:
    """Lines of the log, cut to the terminal where there is one."""
    width = (shutil.get_terminal_size().columns if sys.stdout.isatty() else 0) or LONGEST_LINE
    for each in answers:
        parts = {"prompt": each["prompt"], "reference": each["reference"], "base": each["base"]}
        for name, text in (parts | ({"now": each["answer"]} if with_now else {})).items():
            if text is not None:
                place = each["number"] + 1 if name == "prompt" else ""
                line = Text(f"{place:>3} {name:<9}  {plain(text) or EMPTY}")
                line.truncate(width - 1, overflow="ellipsis")
                yield line.plain.rstrip()


def in_a_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def _is_over(end: float) -> bool:
    watchdog.beat()
    return time.monotonic() > end or signals.received() != 0
