"""What a person types is put into Hydra's grammar, or answered in a line."""

import shlex
from pathlib import Path

import pytest

from sft.config import arguments
from sft.errors import UserError


def settings(line: str) -> list[str]:
    command, *words = shlex.split(line)
    return arguments.parse(command, words).all()


@pytest.mark.parametrize(
    ("line", "meant"),
    [
        # Hydra's options go before the settings, wherever they stand.
        ("train optimizer.lr=1 -m seed=1,2", ["--multirun", "optimizer.lr=1", "seed=1,2"]),
        ("train seed=1 --cfg job", ["--cfg", "job", "seed=1"]),
        ("train seed=1 --cfg=job", ["--cfg", "job", "seed=1"]),
        ("train seed=1 --config-dir mine", ["--config-dir", "mine", "seed=1"]),
        # A text means itself.
        ("train data.path=~/x.jsonl", ["data.path=HOME/x.jsonl"]),
        ("train 'data.path=data(1).jsonl'", ['data.path="data(1).jsonl"']),
        ("train data.path=a=b.jsonl", ['data.path="a=b.jsonl"']),
        ("train data.path=a,b.jsonl", ['data.path="a,b.jsonl"']),
        ("train -m data.path=a.jsonl,b.jsonl", ["--multirun", "data.path=a.jsonl,b.jsonl"]),
        ("train 'data.path=[a,b]'", ["data.path=[a,b]"]),
        ("train data.path=null", ["data.path=null"]),
        ("train run=5", ['run="5"']),
        ("train run=1e3", ['run="1e3"']),
        ("train name=true", ['name="true"']),
        ("""train 'data.conversation.system=Be brief, {polite}: "yes".'""", None),
        ("train 'model.path=${runs_dir}/x'", ["model.path=${runs_dir}/x"]),
        ("train 'optimizer.betas=[0.9,0.95]'", ["optimizer.betas=[0.9,0.95]"]),
        # A setting may be added with or without a plus.
        ("train +experiment=demo", ["experiment=demo"]),
        ("train +optimizer.lr=1", ["++optimizer.lr=1"]),
        ("train model.config.attention_dropout=0.1", ["++model.config.attention_dropout=0.1"]),
        ("train extra.note=first", ["++extra.note=first"]),
        ("train model.template.enable_thinking=false", ["++model.template.enable_thinking=false"]),
        ("train model.template.today=2026-01-31", ["model.template.today=2026-01-31"]),
        # No option of a group.
        ("train logger=null", ["logger=csv"]),
        ("train strategy=null", ["strategy=single"]),
        ("train adapter=null", ["adapter=none"]),
        ("train debug=null", ["debug=null"]),
        ("train ~logger", ["~logger"]),
        # Runs are named with or without `run=`.
        ("generate demo", ['run="demo"']),
        ("export demo checkpoint=best", ['run="demo"', "checkpoint=best"]),
        ("score demo data=new.jsonl", ['run="demo"', "path=new.jsonl"]),
        ("compare a b output=x.csv", ["output=x.csv", 'runs=["a","b"]']),
        ("runs gsm8k-* state=failed", ["state=failed", 'run=["gsm8k-*"]']),
        ("watch a", ['run=["a"]']),
        ("generate demo --prompt 'a, b = {c}'", ['run="demo"', 'prompt="a, b = {c}"']),
        ("generate demo --prompt=-5", ['run="demo"', 'prompt="-5"']),
        ("generate demo -p x", ['run="demo"', 'prompt="x"']),
        ("generate demo 'prompt=a, b'", ['run="demo"', 'prompt="a, b"']),
    ],
)
def test_what_is_typed_is_what_is_meant(line: str, meant: list[str] | None) -> None:
    if meant is None:
        meant = ['data.conversation.system="Be brief, {polite}: \\"yes\\"."']
    assert settings(line) == [word.replace("HOME", str(Path.home())) for word in meant]


CHOICES = "alpaca, auto, conversational, gsm8k, messages, pretokenized, prompt_response, sharegpt, text"
READ = "a number is written like 1e-4, a list like [a,b], and a text with other signs in it in two pairs of quotes"


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        ("train --lr 1e-4", "--lr: settings are written without dashes: sft train optimizer.lr=1e-4"),
        ("train --lr=1e-4", "--lr=1e-4: settings are written without dashes: sft train optimizer.lr=1e-4"),
        ("generate --run demo", "--run: settings are written without dashes: sft generate run=demo"),
        ("train --resume", "there is no option --resume; in its place: the same command resumes the run"),
        ("train -x", "there is no option -x; settings are written NAME=VALUE; see sft train --help"),
        ("train --cfg", "--cfg needs a value"),
        (
            "train -m seed=1,2 --cfg job",
            "-m and --cfg: each setting of a sweep has a configuration of its own: leave out -m, and give one value to "
            "each setting",
        ),
        ("train demo", "demo: settings are written NAME=VALUE: experiment=demo"),
        ("train my.jsonl", "my.jsonl: settings are written NAME=VALUE: data.path=my.jsonl"),
        ("train nothing", "nothing: settings are written NAME=VALUE; sft train --help has examples"),
        ("generate demo other", "other: settings are written NAME=VALUE; sft generate --help has examples"),
        ("train data=my.jsonl", f"data=my.jsonl is no option of data ({CHOICES}): set data.path=my.jsonl"),
        ("train model=models/x", "model=models/x is no option of model (pretrained, scratch): set model.path=models/x"),
        (
            "train experiment=conf/experiment/demo.yaml",
            "experiment=conf/experiment/demo.yaml: an option is named without folder and .yaml: experiment=demo",
        ),
        (
            "train experiment=mine/conf/experiment/own.yaml",
            "experiment=mine/conf/experiment/own.yaml: an option is named without folder and .yaml: experiment=own "
            "--config-dir mine/conf",
        ),
        (
            "train experiment=own.yaml",
            "experiment=own.yaml: an option is named without folder and .yaml: experiment=own, with the file in "
            "conf/experiment/ or in experiment/ of a --config-dir",
        ),
        ("train +experiment=", "experiment= chooses nothing: choose demo, demo_base, gsm8k"),
        (
            "train schedule=null",
            "schedule=null chooses nothing: choose constant, cosine, linear, warmup_stable_decay",
        ),
        (
            "train strategy=[ddp,fsdp2]",
            "strategy=[ddp,fsdp2]: there is one strategy at a time: choose ddp, deepspeed_zero1, deepspeed_zero2, "
            "deepspeed_zero2_offload, deepspeed_zero3, deepspeed_zero3_offload, deepspeed_zeropp, fsdp2, single",
        ),
        ("train data=text,messages", "data=text,messages has several values: add -m to train with each of them"),
        (
            "train optimizer.lr=1e-4,1e-5",
            "optimizer.lr=1e-4,1e-5 has several values: add -m to train with each of them, or write a list as "
            "optimizer.lr=[1e-4,1e-5]",
        ),
        ("train optimizer.lr=10^-4", f"optimizer.lr=10^-4 can't be read: {READ}, 'optimizer.lr=\"10^-4\"'"),
        ("train optimizer.lr=[1", f"optimizer.lr=[1 can't be read: {READ}, 'optimizer.lr=\"[1\"'"),
        ("generate demo --prompt", '--prompt needs a text: sft generate run=NAME --prompt "..."'),
        (
            "generate demo --prompt a --prompt b",
            "there are two prompts: put them into a file, one a line, and set file=FILE",
        ),
    ],
)
def test_what_can_not_be_meant(line: str, answer: str) -> None:
    with pytest.raises(UserError) as refused:
        settings(line)
    assert str(refused.value) == answer


def test_options_of_the_users_own_folder_are_known(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "own.yaml").write_text("")
    assert "own" in arguments.groups(tmp_path)["experiment"]
    own = f"--config-dir {tmp_path}"
    assert settings(f"train {own} experiment=own") == ["--config-dir", str(tmp_path), "experiment=own"]
    with pytest.raises(UserError, match="choose demo, demo_base, gsm8k, own"):
        settings(f"train {own} experiment=")
