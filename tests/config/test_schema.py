"""Every setting has a type and a range, and what isn't in it is answered in one line."""

from functools import cache
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from sft.config import CONF, check, schema
from sft.config.arguments import groups
from sft.errors import UserError
from sft.mistakes import one_line

GROUPS = [(group, option) for group, options in groups().items() for option in options]


@cache
def composed(command: str, *overrides: str) -> Any:
    needed = ["run=x"] if command in ("score", "generate", "export", "check") else []
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return OmegaConf.to_container(compose(command, [*needed, *overrides]), resolve=True)


def answer(setting: str, command: str = "train", overrides: tuple[str, ...] = (), typed: tuple[str, ...] = ()) -> str:
    """The line that a setting is answered with; "" where it is taken."""
    config = OmegaConf.create(composed(command, *overrides))
    name, _, value = setting.partition("=")
    parsed = OmegaConf.from_dotlist([f"x={value}"]).x if value else ""
    OmegaConf.update(config, name, parsed, force_add=True)
    try:
        check.check(OmegaConf.to_container(config), command, (*typed, name))  # type: ignore[arg-type]
    except UserError as error:
        return str(one_line(error, command))
    return ""


@pytest.mark.parametrize(("group", "option"), GROUPS)
def test_no_leaf_of_an_option_is_without_a_type(group: str, option: str) -> None:
    assert list(check.faults(composed("train", f"{group}={option}"), "train")) == []


@pytest.mark.parametrize("command", ["train", *schema.COMMANDS])
def test_no_leaf_of_a_command_is_without_a_type(command: str) -> None:
    assert list(check.faults(composed(command), command)) == []


def test_each_type_is_said_in_words() -> None:
    options = [option for group in schema.OPTIONS.values() for option in group.values()]
    for model in (schema.Train, *schema.COMMANDS.values(), *options, *schema.CALLBACKS.values()):
        for name, field in model.model_fields.items():
            assert check.description(field.annotation, field.description), name


PRECISION = (
    "is not one of 32-true, bf16-mixed, bf16-true (16-bit floats would need a loss scale, which no checkpoint holds: "
    "bf16-mixed; 64 bits are untested: 32-true)"
)
WHOLE, ABOVE_0 = "is not a whole number from 1 on", "is not a number above 0"
NAME = (
    "is not a name of at most 120 bytes, all of it visible, none of it one of / \\ # ? % : and no . - or ~ at its start"
)


@pytest.mark.parametrize(
    ("setting", "line"),
    [
        ("seed=1.5", "seed=1.5 is not a whole number from 0 to 4294967295"),
        ("seed=abc", "seed=abc is not a whole number from 0 to 4294967295"),
        ("seed=-1", "seed=-1 is not a whole number from 0 to 4294967295"),
        ("seed=null", "seed=null is not a whole number from 0 to 4294967295"),
        ("seed=true", "seed=true is not a whole number from 0 to 4294967295"),
        ("epochs=many", "epochs=many is not a number above 0"),
        ("max_steps=0", f"max_steps=0 {WHOLE} (or null)"),
        ("checkpoint.keep_last=null", f"checkpoint.keep_last=null {WHOLE}"),
        ("checkpoint=3", "checkpoint=3 is not a mapping of settings"),
        ("run=", f"run= {NAME} (or null)"),
        ("run=p/q", f"run=p/q {NAME} (or null)"),
        ("run=a:b", f"run=a:b {NAME} (or null)"),
        ("name=..", f"name=.. {NAME}"),
        ("export=maybe", "export=maybe is not true or false"),
        (
            "trainer.devices=0",
            "trainer.devices=0 is not a whole number from 1 on, auto (all), or a list of GPUs like [0,2]",
        ),
        ("trainer.precision=16-true", f"trainer.precision=16-true {PRECISION}"),
        ("trainer.precision=16-mixed", f"trainer.precision=16-mixed {PRECISION}"),
        ("trainer.precision=64-true", f"trainer.precision=64-true {PRECISION}"),
        ("trainer.precision=fp8", f"trainer.precision=fp8 {PRECISION}"),
        (
            "trainer.accelerator=tpu",
            "trainer.accelerator=tpu is not one of auto, cpu, gpu, cuda, mps, or an accelerator's _target_",
        ),
        ("trainer.gradient_clip_val=-1", "trainer.gradient_clip_val=-1 is not a number from 0 on (or null)"),
        ("optimizer.lr=0", f"optimizer.lr=0 {ABOVE_0}"),
        ("optimizer.lr=.nan", f"optimizer.lr=nan {ABOVE_0}"),
        ("optimizer.lr=10**-4", f"optimizer.lr=10**-4 {ABOVE_0}"),
        ("optimizer.betas=[0.9]", "optimizer.betas=[0.9] is not two numbers from 0 to below 1"),
        ("optimizer.weight_decay=-1", "optimizer.weight_decay=-1 is not a number from 0 on"),
        (
            "schedule.warmup=-1",
            "schedule.warmup=-1 is not a share of the run from 0 to below 1, or a whole number of steps",
        ),
        ("schedule.final=2", "schedule.final=2 is not a number from 0 to 1"),
        ("data.packing=maybe", "data.packing=maybe is not true or false"),
        ("data.val_size=1.5", "data.val_size=1.5 is not 0, a share below 1, or a whole number from 1 on"),
        ("data.supervise=none", "data.supervise=none is not one of response, all"),
        ("data.max_length=1", "data.max_length=1 is not a whole number from 2 on"),
        ("data.path=[]", "data.path=[] is not a path or a name, or a list of them (or null)"),
        ("data.conversation.chat=1", "data.conversation.chat=1 is not true or false"),
        ("cluster.max_requeues.signal=-1", "cluster.max_requeues.signal=-1 is not a whole number from 0 on"),
        ("logger.mode=no1", "logger.mode=no1 is not one of auto, online, offline"),
        ("model.config=3", "model.config=3 is not a mapping of names of your own choice"),
        ("model.template.today=31.1.2026", "model.template.today=31.1.2026 is not a day, YYYY-MM-DD (or null)"),
        ("model.template.today=2026-02-30", "model.template.today=2026-02-30 is not a day, YYYY-MM-DD (or null)"),
        ("callbacks.mine=x", "callbacks.mine=x is not a callback: a mapping with its class as _target_"),
    ],
)
def test_a_value_out_of_its_range(setting: str, line: str) -> None:
    assert answer(setting) == line


@pytest.mark.parametrize(
    ("setting", "line"),
    [
        ("lr=1", "there is no setting lr: did you mean optimizer.lr?"),
        ("optimizer.lrr=1", "there is no setting optimizer.lrr: did you mean optimizer.lr?"),
        ("globl_batch_size=1", "there is no setting globl_batch_size: did you mean global_batch_size?"),
        ("tags=[a]", "there is no setting tags; in its place: logger.tags"),
        (
            "xyzzy.bar=1",
            "there is no setting xyzzy: see sft train --cfg job; settings of your own go under extra, as "
            "extra.NAME=VALUE",
        ),
        (
            "checkpoint.save_top_k=3",
            "there is no setting checkpoint.save_top_k; in its place: checkpoint.keep_last; the best is kept besides",
        ),
        ("trainer.max_epochs=3", "there is no setting trainer.max_epochs; in its place: epochs"),
        ("trainer.max_steps=3", "there is no setting trainer.max_steps; in its place: max_steps"),
        ("trainer.fast_dev_run=1", "there is no setting trainer.fast_dev_run; in its place: debug=quick"),
        ("trainer.overfit_batches=1", "there is no setting trainer.overfit_batches; in its place: debug=overfit"),
        (
            "trainer.accumulate_grad_batches=4",
            "there is no setting trainer.accumulate_grad_batches; in its place: nothing; it follows from "
            "global_batch_size, micro_batch_size and the number of ranks",
        ),
        ("learning_rate=1", "there is no setting learning_rate; in its place: optimizer.lr"),
        ("optimizer.momentun=1", "there is no setting optimizer.momentun: did you mean optimizer.momentum?"),
        (
            "adapter.r=8",
            "there is no setting adapter.r with the adapter that is chosen: choose another of lora, none, qlora",
        ),
        (
            "data.conversation.x=1",
            "there is no setting data.conversation.x: data.conversation has prompt, response, system, chat, "
            "system_column, column, role, content, roles, tools, instruction, input, output, history, labels, "
            "attention_mask",
        ),
        ("schedule.foo=1", "there is no setting schedule.foo: schedule has warmup, final, decay"),
    ],
)
def test_a_name_that_is_unknown(setting: str, line: str) -> None:
    assert answer(setting) == line


@pytest.mark.parametrize(
    "setting",
    [
        *("model.config.attention_dropout=0.1", "extra.note=first", "trainer.profiler=simple", "trainer.devices=[0,2]"),
        *("trainer.devices=auto", "trainer.gradient_clip_val=null", "schedule.warmup=10", "data.val_size=20"),
        *("data.path=[a,b]", "data.val_size=0", "run=a b+c=d"),
        *("model.template.today=2024-02-29", "model.template.enable_thinking=false", "model.template.a=[1,2]"),
    ],
)
def test_what_is_taken(setting: str) -> None:
    assert answer(setting) == ""


@pytest.mark.parametrize(
    ("name", "here"),
    [
        ("train_batch_size", "global_batch_size, in packs"),
        ("gradient_clipping", "trainer.gradient_clip_val"),
        ("optimizer", "optimizer, a file of conf/optimizer/"),
    ],
)
def test_what_the_project_sets_in_the_configuration_of_deepspeed(name: str, here: str) -> None:
    line = answer(f"strategy.config.{name}=1", overrides=("strategy=deepspeed_zero2",))
    assert line == f"there is no setting strategy.config.{name}; in its place: {here}"


@pytest.mark.parametrize(
    ("command", "setting", "line"),
    [
        ("generate", "max_new_tokens=0", f"max_new_tokens=0 {WHOLE}"),
        ("generate", "temperature=-1", "temperature=-1 is not a number from 0 on"),
        ("generate", "top_p=0", "top_p=0 is not a number above 0, at most 1"),
        ("generate", "max_tokens=1", "there is no setting max_tokens: did you mean max_new_tokens?"),
        ("export", "checkpoint=first", "checkpoint=first is not last, best or a step"),
        ("export", "dtype=fp8", "dtype=fp8 is not one of float32, bfloat16 (or null)"),
        ("certify", "cell_timeout=0", f"cell_timeout=0 {ABOVE_0}"),
        ("preview", "preview.packs=-1", "preview.packs=-1 is not a whole number from 0 on"),
        ("rehearse", "epochs=0", "epochs=0 is not a number above 0"),
    ],
)
def test_other_commands(command: str, setting: str, line: str) -> None:
    assert answer(setting, command) == line


def test_what_an_experiment_sets_for_another_option_is_left_over() -> None:
    config = composed("train", "experiment=demo", "schedule=constant")
    assert check.check(config) == ["schedule.final"]
    with pytest.raises(UserError, match=r"no setting schedule\.final"):  # but not what was typed
        check.check(config, typed=["schedule.final"])
    with pytest.raises(UserError, match=r"no setting schedule\.fnal"):  # nor what no schedule has
        check.check({**config, "schedule": {**config["schedule"], "fnal": 1}})


def test_what_is_the_users_own_is_not_known_here() -> None:
    config = composed("train")
    own = {"_target_": "mine.AdamW", "rate": 3}
    assert check.check({**config, "optimizer": own, "callbacks": {"a": {"_target_": "mine.EarlyStopping"}}}) == []
    assert ("optimizer._target_", "mine.AdamW") in list(check.targets({**config, "optimizer": own}))


def test_settings_of_several_loggers() -> None:
    several = ("logger=[wandb,tensorboard,mlflow]", "logger.tags=[a]", "logger.tracking_uri=x")
    assert check.check(composed("train", *several)) == []
    mine = {"_target_": "mine.Logger", "rate": 3}
    config = composed("train", "logger=tensorboard")
    assert check.check({**config, "logger": {**config["logger"], "mine": mine, "rate": 3}}) == []
    assert check.check({**config, "logger": mine}) == []
    for logger, name in (
        ({**config["logger"], "rate": 3}, "logger.rate"),
        ({"mine": mine, "tensorboard": {**config["logger"]["tensorboard"], "rate": 3}}, "logger.tensorboard.rate"),
        ({"rate": 3}, "logger.rate"),
    ):
        with pytest.raises(UserError, match=rf"no setting {name}"):
            check.check({**config, "logger": logger})
    assert check.check({**config, "logger": {**config["logger"], "project": "p"}}) == ["logger.project"]
    with pytest.raises(UserError, match=r"logger\.log_model=all is not one of none, reference, upload"):
        check.check(composed("train", "logger.log_model=all"))
