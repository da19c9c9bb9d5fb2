"""`sft COMMAND [hydra overrides]`: finds the command, composes its configuration, and tells a user's mistake in
one line. Nothing heavy is imported before the configuration is known to be right."""

import difflib
import faulthandler
import os
import socket
import sys
import traceback
from contextlib import nullcontext, suppress
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from sft.cluster import submitit_rank
from sft.mistakes import CONF, CONFIGURATION, explain
from sft.runs import failure, signals

COMMANDS = {
    "train": "fine-tune a model; started again, resume it",
    "preview": "show what would be trained, token by token",
    "compare": "runs side by side, the best first, with what differs",
    "rehearse": "run a small form of a job through all its stages before it is queued",
    "submit": "queue training on a Slurm cluster, once all is checked",
    "score": "log-probabilities of samples under a run's model",
    "generate": "answer prompts with a run's model",
    "export": "write a run's checkpoint as a verified Hugging Face folder",
    "certify": "prove that every way of training makes the numbers of a plain loop",
}
BATCH = ("job",)  # what only batch scripts call


def main() -> None:
    """Entry point of the `sft` script. Exit code 2 for a user's mistake, 75 for a run stopped by a signal, 1 for a
    failure of ours."""
    arguments = sys.argv[1:]
    command = arguments[0] if arguments else "--help"
    if command in ("-h", "--help", "help"):
        print(_usage())
        return
    if command not in (*COMMANDS, *BATCH):
        nearest = difflib.get_close_matches(command, COMMANDS, n=1)
        _fail(f"there is no command {command}" + (f": did you mean {nearest[0]}?" if nearest else ": see sft --help"))
    if any(argument in ("-h", "--help") for argument in arguments[1:]):
        print(_command_help(command))
        return
    if command in ("train", "job"):
        signals.install()  # before all that takes time, in which a signal would be fatal
        faulthandler.enable(sys.__stderr__ or sys.stderr)
        if command == "train" and "SFT_JOB_FOLDER" in os.environ:  # a rank's file holds all attempts of a job
            print(f"restart {os.environ.get('SLURM_RESTART_COUNT', 0)} on {socket.gethostname()}", file=sys.stderr)
    try:
        _run(command, arguments[1:])
    except Exception as error:
        _report(error, command)
    _leave()


def _leave(code: int = 0) -> None:
    """Ends a process that was one of several ranks: threads of a process group can crash an interpreter's own end."""
    ranks: Any = sys.modules.get("sft.ranks")
    if ranks is not None:
        ranks.disband()
    if ranks is not None and ranks.disbanded:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    if code:
        sys.exit(code)


def _run(command: str, arguments: list[str]) -> None:
    if command == "job" and arguments[:1] != ["begin"]:
        from sft.commands import job

        job.end(arguments)
        return
    import hydra

    # Hydra reads sys.argv; Lightning's launcher of further ranks needs it as the user typed it.
    typed = list(sys.argv)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # its errors come here instead of to the terminal

    def task(config: Any) -> Any:  # pickled where it is a job: it must refer to nothing that only lives here
        sys.argv = typed
        with submitit_rank.rank() if submitit_rank.is_submitted() else nullcontext():
            try:
                return import_module(f"sft.commands.{command}").main(config)
            except signals.Interrupted as stopped:
                if submitit_rank.is_submitted():
                    raise
                _report(stopped, command)
            except Exception as error:  # here, since Hydra would print a line of its own
                if not _is_one_of_several(command):
                    _report(error, command)
                message = _tell(error, command)
            raise RuntimeError(message)  # and not from the error, which would hold on to all that it has seen

    sys.argv = [f"sft {command}", *_hydra_arguments(command, arguments)]
    name = CONFIGURATION.get(command, command)
    hydra.main(version_base="1.3", config_path=str(CONF), config_name=name)(task)()


def _is_one_of_several(command: str) -> bool:
    """Whether this is a setting of `sft train -m`, whose others go on when it fails."""
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    return command == "train" and not OmegaConf.is_missing(HydraConfig.get().job, "num")


def _tell(error: Exception, command: str) -> str:
    """Prints what `_report` would, and returns it in one line."""
    message = None if os.environ.get("SFT_TRACEBACK") else explain(error, command)
    if message is None:
        traceback.print_exception(error)
        return f"{type(error).__name__}: {error}"
    print(f"sft: {message}", file=sys.stderr, flush=True)
    return message


def _report(error: Exception, command: str) -> NoReturn:
    """Ends with the line for a user's mistake, or with the traceback of ours; a run that a signal has stopped has said
    so."""
    if isinstance(error, signals.Interrupted):
        _leave(error.exit_code)
        sys.exit()
    if folder := os.environ.get("SFT_JOB_FOLDER"):
        with suppress(OSError):  # a full disk must not hide what filled it
            failure.write(Path(folder), error)
    if isinstance(error, BrokenPipeError):  # sft preview ... | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    message = None if os.environ.get("SFT_TRACEBACK") else explain(error, command)
    if message is None:
        traceback.print_exception(error)
        sys.exit(1)
    _fail(message)


def _hydra_arguments(command: str, arguments: list[str]) -> list[str]:
    """What Hydra's grammar can't say: `--prompt TEXT` with commas, braces or `=` in it, `data=FILE` where `data` is the
    name of a configuration group too, and the folders of `compare`."""
    if command == "job":
        return arguments[1:]
    if command == "submit":
        from sft.commands.submit import request

        return request(arguments)[1].overrides
    if command == "score":
        return [f"path={each.removeprefix('data=')}" if each.startswith("data=") else each for each in arguments]
    if command == "compare":
        folders: list[str] = []
        others: list[str] = []
        for before, each in zip(["", *arguments], arguments, strict=False):
            setting = each.startswith("-") or before == "--cfg" or ("=" in each and not Path(each).is_dir())
            (others if setting else folders).append(each)
        return [*others, f"runs=[{','.join(map(_quoted, folders))}]"] if folders else others
    if command != "generate" or "--prompt" not in arguments:
        return arguments
    at = arguments.index("--prompt")
    if at + 1 == len(arguments):
        _fail('--prompt needs a text: sft generate run=NAME --prompt "..."')
    return [*arguments[:at], f"prompt={_quoted(arguments[at + 1])}", *arguments[at + 2 :]]


def _quoted(text: str) -> str:
    """As Hydra's grammar wants a text that means what it says."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("${", "\\${")
    return f'"{escaped}"'


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {what}" for name, what in COMMANDS.items()]
    return "\n".join(
        [
            "Supervised fine-tuning of causal language models.",
            "",
            "  sft COMMAND [setting=value ...]",
            "",
            *lines,
            "",
            "Examples",
            "  sft train model.path=Qwen/Qwen3-0.6B data.path=my.jsonl",
            "  sft train experiment=gsm8k optimizer.lr=1e-5",
            "  sft generate run=gsm8k-1a2b3c4d --prompt 'How many legs have 3 cats?'",
            "",
            "sft COMMAND --help shows more of each; sft COMMAND --cfg job prints every setting with its value.",
        ]
    )


def _command_help(command: str) -> str:
    """The docstring of the command's file, read without importing it."""
    import ast

    source = (Path(__file__).parent / "commands" / f"{command}.py").read_text()
    return (ast.get_docstring(ast.parse(source)) or "").strip()


def _fail(message: str) -> NoReturn:
    print(f"sft: {message}", file=sys.stderr, flush=True)
    sys.exit(2)
