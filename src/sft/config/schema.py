"""Every setting's type and range; defaults and explanations are in `conf/`.

A group's option is known by its `_target_`. What a class or function of the user's own takes is for it to say.
"""

import re
from datetime import date
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, create_model


def whole(least: int, most: int | None = None) -> Any:
    """The type of a whole number."""
    words = f"a whole number from {least} {'on' if most is None else f'to {most}'}"
    return Annotated[int, Field(ge=least, le=most, description=words)]


def number(words: str, **bounds: Any) -> Any:
    """The type of a number, whole or not."""
    return Annotated[float, Field(allow_inf_nan=False, **bounds), Field(description=f"a number {words}".rstrip())]


def one_of(*options: str) -> Any:
    return Annotated[Literal[options], Field(description=f"one of {', '.join(options)}")]


def _share_or_whole(value: float) -> float:
    if value >= 1 and value != int(value):
        raise ValueError
    return value


def _legal(name: str) -> str:
    odd = set(name) & set("/\\#?%:") or not name.isprintable() or name.startswith((".", "-", "~"))
    if odd or name != name.strip() or len(name.encode()) > 120:
        raise ValueError
    return name


def _day(text: str) -> str:
    if not re.fullmatch(r"\d{4}-\d\d-\d\d", text):
        raise ValueError
    date.fromisoformat(text)
    return text


def described(words: str, kind: Any) -> Any:
    """A type with what a setting must be, as a sentence goes on with it."""
    return Annotated[kind, Field(description=words)]


Yes = described("true or false", bool)
Text = Annotated[str, Field(min_length=1, description="a text")]
Texts = Annotated[list[Text], Field(min_length=1)]
Paths = described("a path or a name, or a list of them", Text | Texts)
SetName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,30}$")]
Open = described("a mapping of names of your own choice", dict[str, Any])
# Of a folder, and of the run in W&B.
Name = described(
    "a name of at most 120 bytes, all of it visible, none of it one of / \\ # ? % : and no . - or ~ at its start",
    Annotated[Text, AfterValidator(_legal)],
)
Day = described("a day, YYYY-MM-DD", Annotated[str, AfterValidator(_day)])
Fraction = Annotated[float, Field(ge=0, allow_inf_nan=False), AfterValidator(_share_or_whole)]
Size = described("0, a share below 1, or a whole number from 1 on", Fraction)
Steps = described("a share of the run from 0 to below 1, or a whole number of steps", Fraction)
Start = described("a share of the run from 0 to below 1, or a whole number of a step", Fraction)
Share = number("from 0 to 1", ge=0, le=1)
BelowOne = number("from 0 to below 1", ge=0, lt=1)
Positive = number("above 0", gt=0)
NotNegative = number("from 0 on", ge=0)
Seed = whole(0, 2**32 - 1)


class Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())


class OpenSettings(Settings):
    """Settings beside which names of the user's own choice may stand."""

    model_config = ConfigDict(extra="allow")


def maybe(kind: Any) -> Any:
    """The type of a setting that may be null."""
    return kind | None


def rare(kind: Any) -> Any:
    """A setting that may be left out, and that conf/ leaves out."""
    return kind, None


def table(title: str, base: type[Settings] = Settings, /, **settings: Any) -> type[Settings]:
    """A class with these settings: a type each, or a `rare` one."""
    fields = {key: kind if isinstance(kind, tuple) else (kind, ...) for key, kind in settings.items()}
    return create_model(title, __base__=base, **fields)  # type: ignore[call-overload]


Globs = described("a list of patterns of parameters' names like ['*.layers.0.*']", Texts)
Group = table("Group", match=Text, lr=rare(maybe(Positive)), weight_decay=rare(maybe(NotNegative)))


def _group(group: dict[str, Any]) -> dict[str, Any]:
    Group.model_validate(group)
    return group


Train = table(  # conf/train.yaml; its groups are checked by the tables below
    "Train",
    name=Name,
    run=maybe(Name),
    runs_dir=Text,
    seed=Seed,
    epochs=number("above 0", gt=0),
    max_steps=maybe(whole(1)),
    max_time=rare(maybe(Text)),
    global_batch_size=maybe(whole(1)),
    micro_batch_size=whole(1),
    val_every=maybe(whole(1)),
    loss=table("Loss", label_smoothing=BelowOne, z_loss=NotNegative, router_aux=NotNegative),
    parameters=table(
        "Parameters",
        train=maybe(Globs),
        freeze=maybe(Globs),
        groups=maybe(
            described(
                "a list of groups like {match: '*.layers.0.*', lr: 1e-5}, of match, lr and weight_decay",
                Annotated[list[Annotated[dict[str, Any], AfterValidator(_group)]], Field(min_length=1)],
            )
        ),
    ),
    checkpoint=table(
        "Checkpoint",
        save_every=maybe(whole(1)),
        keep_last=whole(1),
        export=maybe(one_of("best", "last")),
        drop_optimizer=Yes,
    ),
    resume=rare(table("Resume", allow=described("a list of what may change: [code]", list[Literal["code"]]))),
    extend=rare(
        table("Extend", run=maybe(Text), schedule=one_of("continue", "restart"), step=maybe(whole(1))),
    ),
    evaluation=rare(
        table(
            "Evaluation",
            samples=whole(0),
            max_new_tokens=whole(1),
            seconds=Positive,
            scorer=Open,
            kl_tokens=whole(0),
            text=maybe(Text),
            layers_every=whole(0),
        )
    ),
    export=Yes,
    extra=rare(Open),
    data=Open,
    model=Open,
    adapter=rare(maybe(Open)),
    strategy=rare(maybe(Open)),
    trainer=Open,
    optimizer=Open,
    schedule=Open,
    logger=rare(maybe(Open)),
    callbacks=rare(maybe(Open)),
    averaging=rare(maybe(Open)),
    cluster=Open,
)
STATES = "running queued starting interrupted failed died silent finished new unreadable"
COMMANDS: dict[str, type[Settings]] = {
    "preview": table("Preview", Train, check=Yes, preview=table("PreviewOptions", packs=whole(0), dump=maybe(Text))),
    "rehearse": table("Rehearse", Train, rehearse=table("RehearseOptions", num_rows=whole(1), timeout=Positive)),
    "certify": table(
        "Certify",
        Train,
        quick=Yes,
        output=maybe(Text),
        device=one_of("cpu", "gpu"),
        precision=one_of("32-true", "bf16-mixed"),
        cell_timeout=Positive,
        optimizers=Open,
        strategies=Open,
    ),
    "score": table("Score", run=Text, path=maybe(Paths), split=maybe(Text), output=maybe(Text), runs_dir=Text),
    "generate": table(
        "Generate",
        run=Text,
        prompt=maybe(described("a text", str)),
        file=maybe(Text),
        max_new_tokens=whole(1),
        temperature=NotNegative,
        top_p=number("above 0, at most 1", gt=0, le=1),
        seed=Seed,
        batch_size=whole(1),
        runs_dir=Text,
    ),
    "export": table(
        "Export",
        run=Text,
        checkpoint=described("last, best or a step", Literal["last", "best"] | whole(0)),
        weights=maybe(one_of("trained", "average")),
        output=maybe(Text),
        dtype=maybe(one_of("float32", "bfloat16")),
        merge=maybe(Yes),
        max_shard_size=described("a number of bytes, or a size like 500MB", int | Text),
        runs_dir=Text,
    ),
    "compare": table("Compare", runs=list[Text], output=maybe(Text), html=maybe(Text), runs_dir=Text),
    "check": table("Check", run=Text, runs_dir=Text),
    "runs": table("Runs", run=maybe(Paths), state=maybe(one_of(*STATES.split())), runs_dir=Text),
    "watch": table("Watch", run=maybe(Paths), once=Yes, every=Positive, runs_dir=Text),
}

Data = table(
    "Data",
    conversation=Open,
    path=maybe(Paths),
    name=maybe(Text),
    split=Text,
    val_path=maybe(
        described(
            "a path or a name, a list of them, or a mapping to them of the validation sets' names (at most 30 letters, "
            "digits, - and _)",
            Text | Texts | Annotated[dict[SetName, Text | Texts], Field(min_length=1)],
        )
    ),
    val_split=maybe(Text),
    val_size=Size,
    max_length=whole(2),
    supervise=one_of("response", "all"),
    train_on=one_of("all", "last"),
    train_reasoning=Yes,
    train_tool_calls=Yes,
    special_text=maybe(one_of("as_text", "as_tokens")),
    sample_by=one_of("line", "document"),
    overlong=one_of("drop", "truncate_prompt", "error"),
    max_lost=Share,
    packing=Yes,
    num_workers=whole(1),
    cache_dir=Text,
)
Roles = maybe(described("a mapping of role names", dict[str, Text]))
ROW_COLUMNS = """
    prompt response column role content tools system_column instruction input output history labels attention_mask
"""
Pair = table(
    "PromptResponse", prompt=Text, response=Text, system=maybe(Text), chat=Yes, system_column=rare(maybe(Text))
)
Messages = table(
    "Messages", column=Text, role=Text, content=Text, roles=Roles, tools=maybe(Text), system_column=rare(maybe(Text))
)
Alpaca = table("Alpaca", instruction=Text, input=Text, output=Text, history=Text, system_column=maybe(Text))
Conversational = table("Conversational", prompt=Text, response=Text, tools=maybe(Text), system_column=maybe(Text))
Pretokenized = table("Pretokenized", column=Text, labels=maybe(Text), attention_mask=Text)
Auto = table("Auto", system=maybe(Text), chat=Yes, roles=Roles, **dict.fromkeys(ROW_COLUMNS.split(), maybe(Text)))
Model = table(
    "Model",
    path=maybe(Text),
    revision=maybe(Text),
    tokenizer=maybe(Text),
    chat_template=maybe(Text),
    template=table("Template", OpenSettings, today=rare(maybe(Day))),
    init=one_of("pretrained", "random"),
    config=Open,
    attention=Text,
    isolate=one_of("auto", "packed", "apart"),
    gradient_checkpointing=Yes,
    activation_offload=Yes,
    compile=Yes,
    neftune_alpha=NotNegative,
    trust_remote_code=Yes,
    new_weights=maybe(described("a list of names or glob patterns of weights", Texts)),
    add_tokens=maybe(described("a list of texts", Texts)),
)
Adapter = table(
    "Adapter",
    r=whole(1),
    alpha=Positive,
    dropout=BelowOne,
    target_modules=described("all-linear, a list of names, or one regular expression for whole names", Text | Texts),
    use_rslora=Yes,
    use_dora=Yes,
    init=described(
        "one of default, gaussian, orthogonal (pissa, olora, corda, loftq and eva change the base's weights or need "
        "data)",
        Literal["default", "gaussian", "orthogonal"],
    ),
    modules_to_save=maybe(described("a list of names of modules", Texts)),
    trainable_tokens=maybe(described("a list of texts of one token each", Texts)),
    quantize=Yes,
    merge=Yes,
)
Trainer = table(
    "Trainer",
    accelerator=described(
        "one of auto, cpu, gpu, cuda, mps, or an accelerator's _target_",
        Literal["auto", "cpu", "gpu", "cuda", "mps"] | dict[str, Any],
    ),
    devices=described(
        "a whole number from 1 on, auto (all), or a list of GPUs like [0,2]",
        whole(1) | Literal[-1, "auto"] | Annotated[list[whole(0)], Field(min_length=1)],  # type: ignore[misc]
    ),
    num_nodes=described("a whole number from 1 on, or auto", whole(1) | Literal["auto"]),
    precision=described(
        "one of 32-true, bf16-mixed, bf16-true (16-bit floats would need a loss scale, which no checkpoint holds: "
        "bf16-mixed; 64 bits are untested: 32-true)",
        Literal["32-true", "bf16-mixed", "bf16-true"],
    ),
    deterministic=described("true, false or warn", bool | Literal["warn"]),
    gradient_clip_val=maybe(NotNegative),
    gradient_clip_algorithm=one_of("norm", "value"),
    profiler=rare(
        maybe(
            described(
                "one of simple, advanced, pytorch, or a profiler's _target_",
                Literal["simple", "advanced", "pytorch"] | dict[str, Any],
            )
        )
    ),
    detect_anomaly=rare(Yes),
    benchmark=rare(maybe(Yes)),
)

Backend = rare(maybe(one_of("nccl", "gloo")))
DDP = table(
    "DDP",
    find_unused_parameters=Yes,
    gradient_as_bucket_view=Yes,
    static_graph=rare(Yes),
    bucket_cap_mb=rare(Positive),
    process_group_backend=Backend,
)
Offload = table(
    "Offload",
    device=one_of("cpu"),
    pin_memory=Yes,
    ratio=rare(Share),
    buffer_count=rare(whole(0)),
    buffer_size=rare(whole(0)),
    max_in_cpu=rare(whole(0)),
)
# DeepSpeed's own names.
ZERO_YES = """
    contiguous_gradients reduce_scatter use_multi_rank_bucket_allreduce allgather_partitions overlap_comm
    round_robin_gradients parameter_alignment stage3_use_all_reduce_for_fetch_params stage3_allgather_sequential
    zero_quantized_weights zero_quantized_nontrainable_weights zero_quantized_gradients memory_efficient_linear
    log_trace_cache_warnings enable_sanity_checks ignore_unused_parameters override_module_apply
"""
ZERO_WHOLE = """
    reduce_bucket_size allgather_bucket_size sub_group_size stage3_prefetch_bucket_size
    stage3_param_persistence_threshold stage3_model_persistence_threshold stage3_max_live_parameters
    stage3_max_reuse_distance stage3_module_granularity_threshold
"""
Zero = table(
    "Zero",
    stage=whole(0, 3),
    offload_optimizer=rare(maybe(Offload)),
    offload_param=rare(maybe(Offload)),
    zero_hpz_partition_size=rare(whole(1)),
    **dict.fromkeys(ZERO_YES.split(), rare(Yes)),
    **dict.fromkeys(ZERO_WHOLE.split(), rare(whole(0))),
)
DeepSpeed = table(
    "DeepSpeed",
    config=table(
        "DeepSpeedConfig",
        zero_optimization=Zero,
        data_types=table("DataTypes", grad_accum_dtype=one_of("fp32", "bf16")),
        communication_data_type=rare(maybe(one_of("fp32", "bf16"))),
        zero_force_ds_cpu_optimizer=rare(Yes),
        wall_clock_breakdown=rare(Yes),
        comms_logger=rare(Open),
        flops_profiler=rare(Open),
        timers=rare(Open),
    ),
    process_group_backend=Backend,
)
AdamW = table(
    "AdamW",
    lr=Positive,
    betas=described(
        "two numbers from 0 to below 1",
        Annotated[list[BelowOne], Field(min_length=2, max_length=2)],  # type: ignore[valid-type]
    ),
    eps=NotNegative,
    fused=maybe(Yes),
    foreach=rare(maybe(Yes)),
    weight_decay=NotNegative,
)
SGD = table(
    "SGD",
    lr=Positive,
    momentum=BelowOne,
    weight_decay=NotNegative,
    nesterov=rare(Yes),
    fused=rare(maybe(Yes)),
    foreach=rare(maybe(Yes)),
)
Decay = table("Decay", warmup=Steps, final=Share)
Tags = maybe(described("a list of texts", list[Text]))
Wandb = table(
    "Wandb",
    project=Text,
    mode=one_of("auto", "online", "offline"),
    entity=rare(maybe(Text)),
    group=rare(maybe(Text)),
    job_type=rare(maybe(Text)),
    tags=rare(Tags),
    notes=rare(maybe(Text)),
    log_model=rare(one_of("none", "reference", "upload")),
)
MLflow = table(
    "MLflow",
    project=Text,
    group=rare(maybe(Text)),
    job_type=rare(maybe(Text)),
    tags=rare(Tags),
    notes=rare(maybe(Text)),
    tracking_uri=rare(maybe(Text)),
)
EarlyStopping = table(
    "EarlyStopping",
    monitor=Text,
    mode=one_of("min", "max"),
    patience=whole(1),
    min_delta=rare(NotNegative),
    verbose=rare(Yes),
    strict=rare(Yes),
    check_finite=rare(Yes),
    stopping_threshold=rare(maybe(number(""))),
    divergence_threshold=rare(maybe(number(""))),
    log_rank_zero_only=rare(Yes),
)
CAUSES = "signal lost timeout killed hung out_of_memory not_finite failed disk_full misconfigured"
Cluster = table(
    "Cluster",
    hang_after=NotNegative,
    max_requeues=table("MaxRequeues", **dict.fromkeys(CAUSES.split(), whole(0))),
)
Nothing = table("Nothing")

# The option of a group, by the last part of its `_target_`; "" where it has none.
OPTIONS: dict[str, dict[str, type[Settings]]] = {
    "data": {"DataConfig": Data},
    "data.conversation": {
        "prompt_response": Pair,
        "messages": Messages,
        "alpaca": Alpaca,
        "conversational": Conversational,
        "pretokenized": Pretokenized,
        "auto": Auto,
        "text": table("PlainText", column=Text),
    },
    "model": {"ModelSource": Model},
    "adapter": {"": Nothing, "Adapter": Adapter},
    "strategy": {
        "": Nothing,
        "DDP": DDP,
        "DeepSpeed": DeepSpeed,
        "FSDP2": table("FSDP2", reshard_after_forward=Yes, process_group_backend=Backend),
    },
    "trainer": {"Trainer": Trainer},
    "optimizer": {"AdamW": AdamW, "SGD": SGD},
    "schedule": {
        "constant": table("Constant", warmup=Steps),
        "linear": Decay,
        "cosine": Decay,
        "warmup_stable_decay": table("WarmupStableDecay", Decay, decay=Steps),
    },
    # Each logger is a mapping of its own, by its `_target_`; what they have in common stands beside them.
    "logger": {"": Nothing, "wandb_logger": Wandb, "tensorboard_logger": Nothing, "mlflow_logger": MLflow},
    "cluster": {"": Cluster},
    "averaging": {
        "": Nothing,
        "ema": table("EMA", decay=BelowOne, start=Start, export=Yes),
        "swa": table("SWA", start=Start, every=whole(1), export=Yes),
    },
}
CALLBACKS = {"EarlyStopping": EarlyStopping}
OURS = ("sft.", "lightning.", "torch.optim.")  # a `_target_` elsewhere is the user's own, whatever its last part
