"""`sft COMMAND [hydra overrides]`: finds the command, composes its configuration, and reports a user's mistake in one
line. Nothing heavy is imported before the configuration is known to be right."""

import difflib
import faulthandler
import os
import select
import socket
import sys
import traceback
from contextlib import nullcontext, suppress
from importlib import import_module, metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from sft.cluster import submitit_rank
from sft.config import CONF, arguments
from sft.errors import UserError, by_hand
from sft.mistakes import CONFIGURATION, one_line
from sft.runs import crash, failure, secrets, signals, startup
from sft.runs.plain import plain
from sft.runs.process import leave
from sft.training.launch import find

if TYPE_CHECKING:
    from omegaconf import DictConfig

COMMANDS = {
    "train": "fine-tune a model, or resume an unfinished run",
    "preview": "show the training samples, token by token",
    "watch": "follow a run in the terminal: progress, curves, answers, events",
    "runs": "list all runs with their state, step, time left, host and job",
    "check": "compare every file of a run with its checksum, and say what losing it would cost",
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
    """Entry point of the `sft` script. Exit code 2 for a user's mistake, 75 for a run stopped by a signal, 1 for a
    failure of ours."""
    typed = sys.argv[1:]
    command = typed[0] if typed else "--help"
    try:
        if command in ("-h", "--help", "help"):
            print(_command_help(typed[1]) if typed[1:] and typed[1] in COMMANDS else _usage())
        elif command in ("--version", "version"):
            print(f"sft {metadata.version('sft')}")
        elif command in ("-sc", "--shell-completion"):
            _complete(typed[1:])
        elif command not in (*COMMANDS, *BATCH):
            raise UserError(_unknown_command(command))
        elif {"-h", "--help"} & set(typed) or typed[1:] == ["help"]:
            print(_command_help(command))
        else:
            _start(command, typed[1:])
        sys.stdout.flush()
    except BaseException as error:
        if by_hand(error):
            crash.interrupted(command)
            startup.tell("interrupted", 130)
            _leave_ranks(130)
            sys.exit(130)
        if not isinstance(error, Exception):
            raise
        _end_with(error, command)
    startup.leave()
    _leave_ranks(0)


def _start(command: str, typed: list[str]) -> None:
    if command in ("train", "job"):
        signals.install()  # before anything slow, during which a signal would be fatal
        faulthandler.enable(sys.__stderr__ or sys.stderr)
    if command == "train":
        with suppress(UserError):  # which the command says
            launch = find(os.environ)
            if launch.by and launch.rank == launch.local_rank:  # where the first rank is
                startup.join(launch.rank, os.environ | launch.variables)
        if "SFT_JOB_FOLDER" in os.environ:  # a rank's file holds all attempts of a job
            print(f"restart {os.environ.get('SLURM_RESTART_COUNT', 0)} on {socket.gethostname()}", file=sys.stderr)
    _run(command, typed)


def _leave_ranks(code: int) -> None:
    """Ends the process if it was one of several ranks, without the interpreter's own end."""
    ranks = sys.modules.get("sft.ranks")
    if ranks is not None:
        ranks.disband()
        if ranks.disbanded:
            leave(code)


def _run(command: str, typed: list[str]) -> None:
    if command == "job" and typed[:1] != ["begin"]:
        from sft.commands import job

        job.without_configuration(typed)
        return
    import hydra

    # Hydra reads sys.argv; Lightning's launcher of further ranks needs it as the user typed it.
    argv = list(sys.argv)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises its errors instead of printing them
    parsed = _parsed(command, typed)

    def task(config: "DictConfig") -> object:  # pickled for a job: it must not refer to anything that lives only here
        sys.argv = argv
        _find_own_code()
        with submitit_rank.rank() if submitit_rank.is_submitted() else nullcontext():
            try:
                _check(command, config, parsed.names)
                return import_module(f"sft.commands.{command}").main(config)
            except signals.Interrupted as stopped:
                if submitit_rank.is_submitted():
                    raise
                _end_with(stopped, command)
            except Exception as error:  # here, because Hydra would print a line of its own
                if not _is_one_of_several(command):
                    _end_with(error, command, config)
                message, _ = _report(error, command, config)
            raise RuntimeError(message)  # not from the error, which would keep alive all that its frames hold

    sys.argv = [f"sft {command}", *parsed.all()]
    name = CONFIGURATION.get(command, command)
    hydra.main(version_base="1.3", config_path=str(CONF), config_name=name)(task)()


def _parsed(command: str, typed: list[str]) -> arguments.Typed:
    """The arguments in Hydra's grammar."""
    if command == "job":
        return arguments.parse("train", typed[1:])
    if command == "submit":
        from sft.commands.submit import request

        return arguments.parse("train", request(typed)[1].overrides)
    return arguments.parse(command, typed)


def _check(command: str, config: "DictConfig", typed: set[str]) -> None:
    """What can be known to be wrong before torch is imported."""
    name = CONFIGURATION.get(command, command)
    from omegaconf import OmegaConf

    if "data" in config:
        from sft.training.settings import check_inputs, check_schema, settle_batch
        from sft.training.shape import settle_data

        secrets.learn(OmegaConf.to_container(config, resolve=True))  # type: ignore[arg-type]
        check_schema(config, name, typed)
        settle_data(config)
        settle_batch(config)
    else:
        from sft.config.check import check

        settings: Any = OmegaConf.to_container(config, resolve=True)
        check(settings, name, typed)
    if command in ON_A_RUN:
        from sft.runs.files import input_file
        from sft.runs.run import Run

        run = Run.find(config.run, config.runs_dir)
        if command == "export":
            run.check_step(str(config.checkpoint))
        else:
            run.exported()
        if command == "generate" and config.file:
            input_file(config.file, "file")
    elif command in ("preview", "rehearse"):
        check_inputs(config)


def _find_own_code() -> None:
    """A `_target_` may be in the folder of the command, or in src/ there."""
    for folder in (Path.cwd(), Path.cwd() / "src"):
        if str(folder) not in sys.path:
            sys.path.append(str(folder))


def _complete(options: list[str]) -> None:
    """Hydra's completion by the shell, of a command line whose first word is a command: `eval "$(sft -sc
    install=bash)"`."""
    import hydra

    command = "train"
    if options[:1] and options[0].startswith("query="):
        line = os.environ["COMP_LINE"]
        words = line.split()
        if len(words) < 2 or (len(words) == 2 and not line.endswith(" ")):
            print(" ".join(COMMANDS))
            return
        command = words[1]
        os.environ["COMP_LINE"] = line.replace(f" {command}", "", 1)
    sys.argv = ["sft", "-sc", *options]
    name = CONFIGURATION.get(command, command)
    hydra.main(version_base="1.3", config_path=str(CONF), config_name=name)(lambda config: None)()


def _is_one_of_several(command: str) -> bool:
    """Whether this is one setting of `sft train -m`: if it fails, the others continue."""
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    return command == "train" and not OmegaConf.is_missing(HydraConfig.get().job, "num")


def _report(error: Exception, command: str, config: "DictConfig | None" = None) -> tuple[str, int]:
    """Prints the line for a user's mistake, or those for an error of ours; with SFT_TRACEBACK in the environment the
    traceback, too. Returns a line and the exit code."""
    message = one_line(error, command)
    if os.environ.get("SFT_TRACEBACK"):
        traceback.print_exception(error)
    if message is None:
        return crash.report(error, config), 1
    message = plain(secrets.redacted(message))  # it may quote a row, or what a library said
    print(f"sft: {message}", file=sys.stderr, flush=True)
    return message, 2


def _end_with(error: Exception, command: str, config: "DictConfig | None" = None) -> NoReturn:
    """Ends the process with a report of the error; a run that a signal stopped has already reported it."""
    if isinstance(error, signals.Interrupted):
        startup.leave()
        _leave_ranks(error.exit_code)
        sys.exit(error.exit_code)
    if isinstance(error, BrokenPipeError) and _is_unread():
        _end_unread()
    if folder := os.environ.get("SFT_JOB_FOLDER"):
        with suppress(OSError):  # a full disk must not hide the error that filled it
            failure.write(Path(folder), error)
    message, code = _report(error, command, config)
    startup.tell(message, code)
    sys.exit(code)


def _is_unread() -> bool:
    """Whether the reader of standard output has gone, as in sft preview ... | head."""
    poll = select.poll()
    poll.register(1, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _end_unread() -> NoReturn:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is left to print at the interpreter's end
    sys.exit(1)


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


def _unknown_command(command: str) -> str:
    nearest = difflib.get_close_matches(command, COMMANDS, n=1)
    if "=" in command:
        return f"the command is missing: sft train {command}"
    return f"there is no command {command}: " + (f"did you mean {nearest[0]}?" if nearest else "see sft --help")


if __name__ == "__main__":
    main()
