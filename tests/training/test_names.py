"""What changes the update is in a run's name: every setting is changed, alone, and the update compared.

A setting that no table here names fails the first test: say there what another value of it does.
"""

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from pydantic import BaseModel
from torch import Tensor

from sft.checkpoint.checkpoint import latest
from sft.config import CONF
from sft.config.check import nested
from sft.config.schema import OPTIONS, Train
from sft.runs.identity import deciding, flatten, identity
from sft.training.fit import fit
from sft.training.prepare import quiet, setup

pytestmark = pytest.mark.filterwarnings("ignore")  # libraries' of each other

LORA, SGD = ("adapter=lora",), ("optimizer=sgd", "optimizer.lr=0.1")
TINY = "{vocab_size: 264, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 4}"

# Another value, and what else is set in both runs. The update is another, so the name must be, too.
UPDATE: dict[str, tuple[str, ...]] = {
    "seed": ("1",),
    "max_steps": ("3",),
    "global_batch_size": ("2",),
    "data.path": ("OTHER",),
    "data.split": ("'train[:50%]'",),
    "data.val_path": ("OTHER",),
    "data.val_size": ("0.5",),
    "data.max_length": ("100",),
    "data.supervise": ("all",),
    "data.overlong": ("truncate_prompt", "data.max_length=45", "data.max_lost=1"),
    "data.packing": ("false",),
    "data.conversation.prompt": ("response", "data=prompt_response"),
    "data.conversation.response": ("prompt", "data=prompt_response"),
    "data.conversation.system": ("Briefly.", "data=prompt_response"),
    "data.conversation.system_column": ("prompt", "data=prompt_response"),
    "data.conversation.chat": ("false", "data=prompt_response"),
    "model.path": ("OTHER_MODEL",),
    "model.chat_template": ("OTHER_TEMPLATE",),
    "model.init": ("random", "model.tokenizer=MODEL", f"++model.config={TINY}"),
    "model.config": ("{attention_dropout: 0.1}",),
    "model.neftune_alpha": ("5",),
    "adapter.r": ("8", *LORA),
    "adapter.alpha": ("8", *LORA),
    "adapter.dropout": ("0.5", *LORA),
    "adapter.target_modules": ("[q_proj]", *LORA),
    "adapter.use_rslora": ("true", *LORA),
    "trainer.precision": ("bf16-mixed",),
    "trainer.gradient_clip_val": ("0.1",),
    "trainer.gradient_clip_algorithm": ("value", "trainer.gradient_clip_val=0.01"),
    "optimizer.lr": ("1e-3",),
    "optimizer.betas": ("[0.5,0.5]",),
    "optimizer.eps": ("1e-2",),
    "optimizer.weight_decay": ("1",),
    "optimizer.momentum": ("0.9", *SGD),
    "optimizer.nesterov": ("true", *SGD, "optimizer.momentum=0.9"),
    "schedule.warmup": ("1",),
    "schedule.final": ("1",),
    "schedule.decay": ("2", "schedule=warmup_stable_decay"),
    "loss.label_smoothing": ("0.1",),
    "loss.z_loss": ("0.1",),
    "parameters.train": ("['*norm*']",),
    "parameters.freeze": ("['*norm*']",),
    "parameters.groups": ("[{match: '*norm*', lr: 1e-4, weight_decay: null}]",),
}  # fmt: skip

# The same update, under the same name: each is changed, all in one run.
SAME = {
    "name": "other",
    "run": "another",
    "runs_dir": "elsewhere",
    "max_time": "'9:00:00'",
    "val_every": "1",
    "checkpoint.save_every": "1",
    "checkpoint.keep_last": "1",
    "export": "false",
    "extra": "{note: first}",
    "resume.allow": "[code]",
    "micro_batch_size": "2",
    "data.max_lost": "1",
    "data.num_workers": "2",
    "data.cache_dir": "OTHER_CACHE",
    "model.attention": "sdpa",
    "model.isolate": "apart",
    "model.gradient_checkpointing": "true",
    "model.activation_offload": "true",
    "trainer.detect_anomaly": "true",
    "trainer.profiler": "simple",
}

# In the name, and not tried here: another value, and the reason.
NAMED: dict[str, tuple[str, str]] = {
    "epochs": ("1", "how many steps there are, here limited by max_steps"),
    "data.name": ("main", "a Hub data set's rows"),
    "data.val_split": ("test", "takes rows away from training where it is a slice of its file"),
    "data.train_on": ("last", "the mask: tests/data/test_mask.py"),
    "data.train_reasoning": ("false", "the mask"),
    "data.train_tool_calls": ("false", "the mask"),
    "data.special_text": ("as_text", "the tokens"),
    "data.sample_by": ("document", "the samples of text files"),
    "model.revision": ("main", "the Hub's files"),
    "model.tokenizer": ("other", "the tokens"),
    "model.template": ("{enable_thinking: false}", "what a template of the user's reads"),
    "model.template.today": ("2026-01-01", "the prompt of a template that asks for the day"),
    "model.trust_remote_code": ("true", "code of the model's own"),
    "model.new_weights": ("['*']", "weights drawn from the seed"),
    "model.add_tokens": ("[x]", "the tokens"),
    "adapter.quantize": ("true", "needs CUDA"),
    "adapter.modules_to_save": ("[embed_tokens]", "tests of the adapter"),
    "adapter.trainable_tokens": ("[x]", "tests of the adapter"),
    "adapter.use_dora": ("true", "tests of the adapter"),
    "adapter.init": ("gaussian", "tests of the adapter"),
    "optimizer.fused": ("false", "rounding alone, and named from the first day"),
    "optimizer.foreach": ("true", "rounding alone, and named from the first day"),
    "loss.router_aux": ("0.1", "needs a mixture of experts"),
    "averaging.decay": ("0.5", "the average of the weights"),
    "averaging.start": ("2", "the average of the weights"),
    "averaging.every": ("2", "the average of the weights"),
    "extend.run": ("other", "where the weights begin"),
    "extend.schedule": ("restart", "the learning rate: tests/training/test_extension.py"),
    "extend.step": ("3", "where the weights begin"),
    "strategy.config.data_types.grad_accum_dtype": ("bf16", "rounds the sums of gradients"),
    "strategy.config.communication_data_type": ("bf16", "rounds what is sent"),
    **{
        f"strategy.config.zero_optimization.{name}": ("true", "4- and 8-bit weights and gradients; needs CUDA")
        for name in ("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients")
    },
}
NAMED_GROUPS = ("data.conversation.",)  # columns: of which row shapes are made

# Not in the name: by their groups, with the reason why none can change an update.
FREE = {
    "strategy.": "rule 2: the certificate compares all of them; DeepSpeed's that round are in the name",
    "logger.": "what is logged is written after the step",
    "evaluation.": "measured beside training: tests/training/test_evaluation.py",
    "cluster.": "when a process is ended or a job requeued",
    "callbacks": "those of a user's own are for him to name; Lightning's that change an update are refused",
    "trainer.accelerator": "where the same sums are made, in another order",
    "trainer.devices": "rule 2",
    "trainer.num_nodes": "rule 2",
    "trainer.deterministic": "the same sums in another order",
    "trainer.benchmark": "the same sums in another order",
    "model.compile": "the same sums in another order: tests/model/test_compile.py",
    "adapter.merge": "the form of the export",
    "averaging.export": "which weights are exported",
    "checkpoint.export": "which checkpoint is exported",
    "checkpoint.drop_optimizer": "what is kept of a finished run",
}


def leaves(model: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, field in model.model_fields.items():
        inner = nested(field.annotation)
        if inner is not None and inner.model_fields:
            yield from leaves(inner, f"{prefix}{name}.")
        elif f"{prefix}{name}" not in OPTIONS:
            yield f"{prefix}{name}"


KNOWN = {*leaves(Train, "")}.union(
    *(leaves(option, f"{group}.") for group, options in OPTIONS.items() for option in options.values())
)


def test_every_setting_is_in_a_table() -> None:
    groups = (*NAMED_GROUPS, *FREE)
    missing = {name for name in KNOWN if name not in {**UPDATE, **SAME, **NAMED} and not name.startswith(groups)}
    assert not missing, f"what do they do to the update? {sorted(missing)}"
    assert {*UPDATE, *SAME, *NAMED} - {"model.template"} <= KNOWN  # which takes any names


@pytest.fixture(scope="module")
def made(
    tmp_path_factory: pytest.TempPathFactory, model_folder: Path, data_file: Path
) -> Callable[..., tuple[str, dict[str, Tensor]]]:
    """Name and weights after the run, by the overrides of its settings."""
    folder = tmp_path_factory.mktemp("names")
    other = folder / "other.jsonl"
    other.write_text("".join(data_file.read_text().splitlines(keepends=True)[5:]))
    template = folder / "template.jinja"
    template.write_text("{% for message in messages %}[{{ message.role }}]{{ message.content }}<|im_end|>{% endfor %}")
    changed = folder / "model"
    changed.mkdir()
    places = {
        "OTHER_CACHE": folder / "cache2",
        "OTHER_MODEL": changed,
        "OTHER_TEMPLATE": template,
        "OTHER": other,
        "MODEL": model_folder,
    }
    quiet()

    @cache
    def run(*overrides: str) -> tuple[str, dict[str, Tensor]]:
        for name, place in places.items():
            overrides = tuple(each.replace(name, str(place)) for each in overrides)
        config = composed(
            f"model.path={model_folder}", f"data.path={data_file}", f"data.cache_dir={folder}/cache", *overrides
        )
        name = identity(OmegaConf.to_container(config, resolve=True))  # type: ignore[arg-type]
        prepared = setup(config)
        checkpoints = folder / f"run{len(list(folder.glob('run*')))}" / "checkpoints"
        checkpoints.mkdir(parents=True)
        fit(
            config,
            prepared.source,
            prepared.data,
            checkpoints=checkpoints,
            resume=None,
            loggers=[],
            facts={"seed": config.seed},
        )
        checkpoint = latest(checkpoints)
        assert checkpoint is not None
        return name, {each: checkpoint.tensor(each) for each in checkpoint.shapes}

    import transformers

    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(model_folder))
    model.save_pretrained(changed)
    transformers.AutoTokenizer.from_pretrained(model_folder).save_pretrained(changed)
    return run


def composed(*overrides: str) -> DictConfig:
    fixed = ["trainer=cpu", "logger=csv", "max_steps=2", "global_batch_size=4", "optimizer.lr=1e-2"]
    fixed += ["data.max_length=256", "data.num_workers=1", "cluster.hang_after=0"]
    # Rounding in gradients near zero would otherwise be scaled up to the size of the learning rate.
    eps = () if "optimizer=sgd" in overrides else ("optimizer.eps=1e-3",)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", [*fixed, *eps, *overrides])


def differ(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """By more than rounding."""
    if {name: tensor.shape for name, tensor in one.items()} != {name: tensor.shape for name, tensor in other.items()}:
        return True
    return max(float((one[name] - other[name]).abs().max()) for name in one) > 2e-6


@pytest.mark.parametrize("setting", list(UPDATE))
def test_what_changes_the_update_changes_the_name(made: Any, setting: str) -> None:
    value, *also = UPDATE[setting]
    name, weights = made(*also)
    other_name, other_weights = made(*also, f"++{setting}={value}")
    assert differ(weights, other_weights), f"{setting}={value} changes nothing: choose another value for this test"
    assert name != other_name


def test_what_changes_no_update_changes_no_name(made: Any) -> None:
    name, weights = made()
    other_name, other_weights = made(*(f"++{setting}={value}" for setting, value in SAME.items()))
    assert not differ(weights, other_weights)
    assert name == other_name


def test_what_is_not_tried_is_named_or_has_its_reason() -> None:
    def named(setting: str, value: object) -> bool:
        config: Any = OmegaConf.to_container(composed("strategy=deepspeed_zero2", "adapter=lora"), resolve=True)
        before = identity(config)
        changed = OmegaConf.create(config)
        OmegaConf.update(changed, setting, value, force_add=True)
        return identity(OmegaConf.to_container(changed)) != before  # type: ignore[arg-type]

    for setting, (value, reason) in NAMED.items():
        assert named(setting, OmegaConf.create(f"x: {value}").x), (setting, reason)
    for setting in KNOWN:
        if setting.startswith(NAMED_GROUPS):
            assert named(setting, "another"), setting
    config: Any = OmegaConf.to_container(composed("strategy=deepspeed_zero2", "adapter=lora"), resolve=True)
    decided = deciding(config).keys()
    for setting in flatten(config):
        if setting.startswith(tuple(FREE)) and setting not in NAMED:
            assert setting not in decided, setting
