"""`sft COMMAND [hydra overrides]`: finds the command, composes its configuration, and reports a user's mistake in one
line. Nothing heavy is imported before the configuration is known to be right."""

import difflib
import faulthandler
import os
import re
import socket
import sys
import traceback
from contextlib import nullcontext, suppress
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from sft.cluster import submitit_rank
from sft.mistakes import CONF, CONFIGURATION, one_line
from sft.runs import failure, signals
from sft.runs.process import leave

if TYPE_CHECKING:
    from omegaconf import DictConfig

COMMANDS = {
    "train": "fine-tune a model, or resume an unfinished run",
    "preview": "show the training samples, token by token",
    "compare": "show runs side by side, the best first, with the settings that differ",
    "rehearse": "run a small version of a job through all its stages before you queue it",
    "submit": "check training on a Slurm cluster, then queue it",
    "score": "compute log-probabilities of samples under a run's model",
    "generate": "answer prompts with a run's model",
    "export": "write a run's checkpoint as a verified Hugging Face folder",
    "certify": "prove that every way of training gives the numbers of a plain loop",
}
BATCH = ("job",)  # called by batch scripts alone
ON_A_RUN = ("score", "generate", "export")


def main() -> None:
    """Entry point of the `sft` script. Exit code 2 for a user's mistake, 75 for a run stopped by a signal or
    by the end of its time, 1 for a failure of ours."""
    arguments = sys.argv[1:]
    command = arguments[0] if arguments else "--help"
    if command in ("-h", "--help", "help"):
        print(_usage())
        return
    if command not in (*COMMANDS, *BATCH):
        nearest = difflib.get_close_matches(command, COMMANDS, n=1)
        _fail(f"there is no command {command}: " + (f"did you mean {nearest[0]}?" if nearest else "see sft --help"))
    if "-h" in arguments or "--help" in arguments:
        print(_command_help(command))
        return
    if command in ("train", "job"):
        signals.install()  # before anything slow, during which a signal would be fatal
        faulthandler.enable(sys.__stderr__ or sys.stderr)
        if command == "train" and "SFT_JOB_FOLDER" in os.environ:  # a rank's file holds all attempts of a job
            print(f"restart {os.environ.get('SLURM_RESTART_COUNT', 0)} on {socket.gethostname()}", file=sys.stderr)
    try:
        _run(command, arguments[1:])
    except Exception as error:
        _end_with(error, command)
    _leave_ranks(0)


def _leave_ranks(code: int) -> None:
    """Ends the process if it was one of several ranks, without the interpreter's own end."""
    ranks = sys.modules.get("sft.ranks")
    if ranks is not None:
        ranks.disband()
        if ranks.disbanded:
            leave(code)


def _run(command: str, arguments: list[str]) -> None:
    if command == "job" and arguments[:1] != ["begin"]:
        from sft.commands import job

        job.without_configuration(arguments)
        return
    import hydra

    # Hydra reads sys.argv; Lightning's launcher of further ranks needs it as the user typed it.
    typed = list(sys.argv)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises its errors instead of printing them

    def task(config: "DictConfig") -> object:  # pickled for a job: it must not refer to anything that lives only here
        sys.argv = typed
        with submitit_rank.rank() if submitit_rank.is_submitted() else nullcontext():
            try:
                if command in ON_A_RUN:
                    from sft.runs.run import Run

                    Run.find(config.run, config.runs_dir)  # a mistake in it is reported before torch is imported
                return import_module(f"sft.commands.{command}").main(config)
            except signals.Interrupted as stopped:
                if submitit_rank.is_submitted():
                    raise
                _end_with(stopped, command)
            except Exception as error:  # here, because Hydra would print a line of its own
                if not _is_one_of_several(command):
                    _end_with(error, command)
                message, _ = _report(error, command)
            raise RuntimeError(message)  # not from the error, which would keep alive all that its frames hold

    sys.argv = [f"sft {command}", *_hydra_arguments(command, arguments)]
    name = CONFIGURATION.get(command, command)
    hydra.main(version_base="1.3", config_path=str(CONF), config_name=name)(task)()


def _is_one_of_several(command: str) -> bool:
    """Whether this is one setting of `sft train -m`: if it fails, the others continue."""
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    return command == "train" and not OmegaConf.is_missing(HydraConfig.get().job, "num")


def _report(error: Exception, command: str) -> tuple[str, int]:
    """Prints the line for a user's mistake, or the traceback for an error of ours. Returns a line and the exit code."""
    message = None if os.environ.get("SFT_TRACEBACK") else one_line(error, command)
    if message is None:
        traceback.print_exception(error)
        return f"{type(error).__name__}: {error}", 1
    print(f"sft: {message}", file=sys.stderr, flush=True)
    return message, 2


def _end_with(error: Exception, command: str) -> NoReturn:
    """Ends the process with a report of the error; a run that a signal stopped has already reported it."""
    if isinstance(error, signals.Interrupted):
        _leave_ranks(error.exit_code)
        sys.exit(error.exit_code)
    if folder := os.environ.get("SFT_JOB_FOLDER"):
        with suppress(OSError):  # a full disk must not hide the error that filled it
            failure.write(Path(folder), error)
    if isinstance(error, BrokenPipeError):  # sft preview ... | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    sys.exit(_report(error, command)[1])


def _hydra_arguments(command: str, arguments: list[str]) -> list[str]:
    """The arguments in Hydra's grammar, which has no `--prompt TEXT` (with commas, braces or `=` in it), no `data=FILE`
    (`data` is a configuration group too) and no list of folders, as `compare` takes."""
    if command == "job":
        return arguments[1:]
    if command == "submit":
        from sft.commands.submit import request

        return request(arguments)[1].overrides
    if command == "score":
        return [re.sub("^data=", "path=", argument) for argument in arguments]
    if command == "compare":
        folders: list[str] = []
        settings: list[str] = []
        for before, argument in zip(["", *arguments], arguments, strict=False):
            is_setting = "=" in argument and not Path(argument).is_dir()
            is_folder = not (is_setting or argument.startswith("-") or before == "--cfg")
            (folders if is_folder else settings).append(argument)
        return [*settings, f"runs=[{','.join(map(_quoted, folders))}]"] if folders else settings
    if command != "generate" or "--prompt" not in arguments:
        return arguments
    flag = arguments.index("--prompt")
    if flag + 1 == len(arguments):
        _fail('--prompt needs a text: sft generate run=NAME --prompt "..."')
    return [*arguments[:flag], f"prompt={_quoted(arguments[flag + 1])}", *arguments[flag + 2 :]]


def _quoted(text: str) -> str:
    """A text in Hydra's grammar, in which it means only itself."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("${", "\\${")
    return f'"{escaped}"'


def _usage() -> str:
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:<{width}}  {purpose}" for name, purpose in COMMANDS.items())
    return f"""Supervised fine-tuning of causal language models.

  sft COMMAND [setting=value ...]

{commands}

Examples
  sft train model.path=Qwen/Qwen3-0.6B data.path=my.jsonl
  sft train experiment=gsm8k optimizer.lr=1e-5
  sft generate run=gsm8k-1a2b3c4d --prompt 'How many legs have 3 cats?'

sft COMMAND --help explains a command; sft COMMAND --cfg job prints every setting with its value."""


def _command_help(command: str) -> str:
    """The docstring of the command's file, read without importing it."""
    import ast

    source = (Path(__file__).parent / "commands" / f"{command}.py").read_text()
    return (ast.get_docstring(ast.parse(source)) or "").strip()


def _fail(message: str) -> NoReturn:
    print(f"sft: {message}", file=sys.stderr, flush=True)
    sys.exit(2)
