"""A crash report: what it holds, where it lies, and what it must not hold."""

import re
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from sft.runs import crash
from sft.runs.run import Run
from sft.runs.secrets import SECRET

SECRETS = ("hf_0123456789", "abc def", "k3y!", "s3cret")


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.chdir(tmp_path)
    return folder


def raised(message: str) -> RuntimeError:
    try:
        OmegaConf.create("{")  # in a library, with frames of its own
    except Exception:
        try:
            raise RuntimeError(message)
        except RuntimeError as error:
            return error
    raise AssertionError


CONFIG = {
    "name": "sft",
    "run": "run",
    "runs_dir": "runs",
    "seed": 3,
    "twice": "${seed}",
    "data": {"max_new_tokens": 7, "tokenizer": "a/b"},
    "logger": {"wandb_api_key": SECRETS[0], "extra": [{"Password": SECRETS[1]}, {"hub_token": SECRETS[2]}]},
}


def test_it_holds_what_is_known_but_no_secret(
    temporary: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["sft", "train", f"+logger.wandb_api_key={SECRETS[0]}", "+x={secret_key: s3cret}"])
    monkeypatch.setenv("MY_TOKEN", "environment")
    error = raised(f"no access with {SECRETS[0]}\nand password='abc def'" + "x" * 400)
    assert crash.report(error, OmegaConf.create(CONFIG)) == "RuntimeError: no access with ***"
    (report,) = temporary.iterdir()
    first, second, third = capsys.readouterr().err.splitlines()
    assert first == "sft: RuntimeError: no access with ***"
    assert second == f"  at {__file__}:{error.__traceback__.tb_lineno}; all that is known of it: {report}"
    assert third == "  report it to the maintainers of your copy of sft, with that file"
    text = report.read_text()
    for secret in (*SECRETS, "environment"):
        assert secret not in text
    for known in (
        "command: sft train +logger.wandb_api_key=*** '+x={secret_key: ***}'",
        f'"torch": "{version("torch")}"',
        '"twice": 3',
        '"max_new_tokens": 7',
        '"tokenizer": "a/b"',
        "Traceback (most recent call last):",
        "RuntimeError: no access with ***",
    ):
        assert known in text


def test_it_lies_in_the_runs_folder(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {**CONFIG, "trainer": {}, "twice": 3}
    with Run(Path("runs/run")).attempt(config, {}, 9, main=True):
        pass
    of_another_command = {"run": "run", "runs_dir": "runs"}  # sft generate and the like
    for settings, rank, name in ((config, "0", ""), (config, "3", "-rank-3"), (of_another_command, "0", "")):
        monkeypatch.setenv("RANK", rank)
        crash.report(raised("x"), OmegaConf.create(settings))
        (report,) = Path("runs/run").glob("crash-*")
        assert re.fullmatch(rf"crash-\d{{8}}T\d{{6}}Z{name}\.txt", report.name)
        report.unlink()
    assert not list(temporary.iterdir())


def test_a_rank_that_lost_another_writes_none(temporary: Path, capsys: pytest.CaptureFixture[str]) -> None:
    crash.report(raised("Connection closed by peer"), None)
    assert capsys.readouterr().err == "sft: RuntimeError: Connection closed by peer\n"
    assert not list(temporary.iterdir())


def test_a_report_that_can_not_be_written(temporary: Path, capsys: pytest.CaptureFixture[str]) -> None:
    temporary.rmdir()
    crash.report(raised("x"), None)
    assert "Traceback" in capsys.readouterr().err


def test_the_address_to_report_it_to(
    temporary: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from email.message import Message

    of_package = Message()
    of_package["Project-URL"] = "Issues, https://example.org/issues"
    monkeypatch.setattr(crash, "metadata", lambda name: of_package)
    crash.report(raised("x"), None)
    assert capsys.readouterr().err.splitlines()[-1] == "  report it at https://example.org/issues, with that file"


@pytest.mark.parametrize(
    ("key", "secret"),
    [
        *((key, True) for key in ("api_key", "WANDB_API_KEY", "apiKey", "token", "hfToken", "db_password", "secret")),
        *((key, False) for key in ("tokenizer", "stop_token_ids", "max_new_tokens", "key", "num_tokens", "seed")),
    ],
)
def test_which_keys_are_secret(key: str, secret: bool) -> None:
    assert bool(SECRET.search(key)) == secret
