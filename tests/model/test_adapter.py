"""Adapters: what is trained, what merging makes of the weights, and what is refused."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

import settings
from conftest import tiny_llama
from made_up import SIZE, OneRank, Weights
from sft.errors import UserError
from sft.export.merge import merged, stored_weights, write_adapter
from sft.model import adapter as adapters
from sft.model.head import head_is_plain_matrix
from sft.model.loading import ModelSource

# Any kind of model whose linear layers differ from the others' in something that merging has to know.
KINDS = {
    "tied": {"model_type": "llama", "tie_word_embeddings": True},
    "transposed": {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 264},
    "other names on disk": {"model_type": "gpt_neox"},
    "experts joined in memory": {"model_type": "mixtral", "num_local_experts": 4},
}


def base_folder(folder: Path, kind: str) -> Path:
    config = dict(KINDS[kind])
    config = AutoConfig.for_model(config.pop("model_type"), **(SIZE if kind != "transposed" else {}) | config)
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder, max_shard_size=40_000)
    return folder


def trained(source: ModelSource, dtype: torch.dtype = torch.float32) -> Any:
    """The model with an adapter that changes it."""
    torch.manual_seed(0)
    model: Any = source.load(dtype)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def adapter_of(model: Any) -> Weights:
    weights = Weights(model)
    weights.tensors = {name: tensor for name, tensor in weights.tensors.items() if "lora_" in name}
    weights.layout = {name: weights.layout[name] for name in weights.tensors}
    return weights


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_adapter_alone_gets_a_gradient_and_adds_nothing_at_first(model_folder: Path, checkpointing: bool) -> None:
    bare = settings.model_source(path=str(model_folder), attention="eager", gradient_checkpointing=checkpointing)
    model: Any = replace(bare, adapter=settings.adapter(r=4)).load(torch.float32)
    ids = torch.arange(20)[None]
    assert torch.equal(model(ids).logits, bare.load(torch.float32)(ids).logits)
    model(ids, labels=ids).loss.backward()
    with_grad = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    # 2 layers, 7 linear layers in each, 2 matrices beside each.
    assert len(with_grad) == 28
    assert all("lora_" in name for name in with_grad)
    assert sum(float(p.grad.abs().sum()) for n, p in model.named_parameters() if "lora_B" in n) > 0


def test_gradient_checkpointing_changes_no_gradient(model_folder: Path) -> None:
    ids = torch.arange(20)[None]
    gradients = []
    for checkpointing in (False, True):
        source = settings.model_source(
            path=str(model_folder), attention="eager", adapter=settings.adapter(r=4, dropout=0.1)
        )
        model = trained(replace(source, gradient_checkpointing=checkpointing))
        torch.manual_seed(5)
        model(ids, labels=ids).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.requires_grad])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_it_is_drawn_from_the_seed_alone(model_folder: Path) -> None:
    def drawn(seed: int, before: int) -> torch.Tensor:
        source = settings.model_source(path=str(model_folder))
        torch.manual_seed(seed)
        model = source.load(torch.float32)
        torch.rand(before)  # as another way of loading the model might
        settings.adapter(r=4).add(model)
        return model.model.layers[1].mlp.up_proj.lora_A.default.weight.detach()

    first = drawn(3, before=0)
    assert torch.equal(first, drawn(3, before=7))
    assert not torch.equal(first, drawn(4, before=0))
    # Uniform in ±1 / sqrt(32), as peft draws it: 4 × 32 values.
    assert float(first.abs().max()) <= 1 / math.sqrt(32)
    assert float(first.std()) == pytest.approx(1 / math.sqrt(3 * 32), rel=0.15)
    assert abs(float(first.mean())) < 0.04


def test_no_two_layers_are_drawn_alike_and_no_other_draw_moves(model_folder: Path) -> None:
    model = settings.model_source(path=str(model_folder)).load(torch.float32)
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    settings.adapter(r=4).add(model)
    assert torch.equal(torch.rand(1), expected)
    layers: Any = model.model.layers
    drawn = [layer.self_attn.q_proj.lora_A.default.weight for layer in layers]
    assert not torch.equal(*drawn)


@pytest.mark.filterwarnings("ignore")  # peft's, of what it does about kinds of layers
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rslora", [False, True])
def test_merged_weights_are_those_of_peft(kind: str, rslora: bool, tmp_path: Path) -> None:
    adapter = settings.adapter(r=4, alpha=6, use_rslora=rslora)
    source = settings.model_source(path=str(base_folder(tmp_path / "base", kind)), attention="eager", adapter=adapter)
    weights = adapter_of(trained(source))
    layout, read = merged(source, weights.layout, weights.read, torch.float32)

    (tmp_path / "adapter").mkdir()
    write_adapter(tmp_path / "adapter", source, weights.layout, weights.read, None)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    before = {name: parameter.detach().clone() for name, parameter in base.named_parameters()}
    expected = PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload()
    after = dict(expected.named_parameters())
    assert layout.keys() == after.keys()
    changed = 0
    for name, parameter in after.items():
        assert torch.equal(read(name), parameter), name
        changed += not torch.equal(parameter, before[name])
    assert changed == len(weights.tensors) // 2 > 0


def test_merging_is_in_fp32_and_holds_one_weight(tmp_path: Path) -> None:
    source = settings.model_source(
        path=str(base_folder(tmp_path, "tied")), attention="eager", adapter=settings.adapter(r=4, alpha=6)
    )
    model = trained(source, torch.bfloat16)
    weights = adapter_of(model)
    layout, read = merged(source, weights.layout, weights.read, torch.bfloat16)
    assert {dtype for dtype, _ in layout.values()} == {torch.bfloat16}
    layer = model.model.layers[0].mlp.down_proj
    a, b = layer.lora_A.default.weight.double(), layer.lora_B.default.weight.double()
    exact = layer.base_layer.weight.double() + 6 / 4 * b @ a
    assert torch.equal(read("model.layers.0.mlp.down_proj.weight"), exact.bfloat16())
    for name in layout:
        read(name)
    assert weights.most_held <= 4 * a.numel() + 4 * b.numel()


def test_files_that_are_not_the_model_as_it_is_are_left_to_peft(tmp_path: Path) -> None:
    from sft.export.merge import empty_model, weights

    for kind, streams in (("tied", True), ("other names on disk", True), ("experts joined in memory", False)):
        source = settings.model_source(path=str(base_folder(tmp_path / kind, kind)))
        model = empty_model(source)
        layout = {name: (tensor.dtype, list(tensor.shape)) for name, tensor in weights(model).items()}
        assert (stored_weights(source, model, layout) is not None) == streams


def test_rslora_and_rank_scale(model_folder: Path) -> None:
    for rslora, scale in ((False, 32 / 4), (True, 32 / math.sqrt(4))):
        model: Any = settings.model_source(
            path=str(model_folder), adapter=settings.adapter(r=4, use_rslora=rslora)
        ).load(torch.float32)
        assert model.model.layers[0].self_attn.q_proj.scaling == {"default": scale}


@pytest.mark.parametrize(
    ("targets", "layers"),
    [
        ("all-linear", 14),
        (["q_proj", "v_proj"], 4),
        (["layers.1.mlp.up_proj"], 1),
        (r".*\.1\.self_attn\.[qk]_proj", 2),
    ],
    ids=str,
)
def test_targets(model_folder: Path, targets: Any, layers: int) -> None:
    model = settings.model_source(path=str(model_folder), adapter=settings.adapter(target_modules=targets)).load(
        torch.float32
    )
    assert sum("lora_A" in name for name, _ in model.named_parameters()) == layers


KNOWN = "its linear layers are q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, lm_head"


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["q_proj", "query"], f"query is no layer of LlamaForCausalLM: {KNOWN}"),
        ("q_proj", f"q_proj is no layer of LlamaForCausalLM: {KNOWN}"),
        ("(", "no regular expression"),
        (["mlp"], f"mlp means model.layers.0.mlp, no linear layer: {KNOWN}"),
        (["embed_tokens"], "embed_tokens means model.embed_tokens, no linear layer"),
        (["lm_head"], "shares its weight with the input embeddings"),
    ],
    ids=str,
)
def test_wrong_targets_are_refused(model_folder: Path, targets: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        settings.model_source(path=str(model_folder), adapter=settings.adapter(target_modules=targets)).load(
            torch.float32
        )
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantize": True}, "set adapter.merge=false"),
    ],
    ids=str,
)
def test_wrong_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        settings.adapter(**options)


def test_random_weights_are_not_adapted() -> None:
    with pytest.raises(UserError, match="set adapter=none"):
        settings.model_source(init="random", tokenizer="x", adapter=settings.adapter())


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_four_bits_need_cuda(model_folder: Path) -> None:
    source = settings.model_source(path=str(model_folder), adapter=settings.adapter(quantize=True, merge=False))
    with pytest.raises(UserError, match="needs a CUDA device: set adapter=lora"):
        source.load(torch.float32)


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize(
    ("strategy", "accelerator", "message"),
    [
        ("single", "cpu", "needs a CUDA device: set adapter=lora"),
        ("deepspeed_zero3", "gpu", "strategy=deepspeed_zero3 can't shard"),
        ("fsdp2", "gpu", "strategy=fsdp2 can't shard"),
        ("ddp", "gpu", "pip install bitsandbytes"),
    ],
)
def test_where_four_bits_are_not(
    strategy: str, accelerator: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapters.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=message):
        adapters.check_quantization(strategy, accelerator)


@pytest.mark.filterwarnings("ignore")  # peft's, of what it does about kinds of layers
@pytest.mark.parametrize("kind", ["tied", "transposed"])
def test_dora_begins_as_the_base_and_merges_as_peft_merges(kind: str, tmp_path: Path) -> None:
    source = settings.model_source(
        path=str(base_folder(tmp_path / "base", kind)),
        attention="eager",
        adapter=settings.adapter(r=4, alpha=6, use_dora=True),
    )
    ids = torch.arange(20)[None]
    model: Any = source.load(torch.float32)
    with torch.no_grad():
        before = replace(source, adapter=None).load(torch.float32).eval()(ids).logits
        assert torch.allclose(model.eval()(ids).logits, before, atol=1e-6)
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "magnitude" in name:
                parameter.add_(torch.full_like(parameter, 0.05))
        trained_logits = model(ids).logits
    weights = adapter_of(model)
    assert sum("magnitude" in name for name in weights.tensors) == len(weights.tensors) // 3 > 0
    _, read = merged(source, weights.layout, weights.read, torch.float32)
    (tmp_path / "adapter").mkdir()
    write_adapter(tmp_path / "adapter", source, weights.layout, weights.read, None)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32, attn_implementation="eager")
    adapted = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        assert torch.equal(adapted(ids).logits, trained_logits)
    for name, parameter in adapted.merge_and_unload().named_parameters():
        assert torch.allclose(read(name), parameter, atol=1e-6), name
    with pytest.raises(UserError, match=r"adapter.use_dora=true needs the norms of whole weights"):
        source.load(torch.float32, sharding=OneRank())


def test_other_first_weights(model_folder: Path) -> None:
    source = settings.model_source(path=str(model_folder), attention="eager")
    ids = torch.arange(20)[None]
    expected = source.load(torch.float32)(ids).logits
    for init, std in (("gaussian", 1 / 16), ("orthogonal", 0.1 / math.sqrt(2))):
        torch.manual_seed(3)
        model: Any = replace(source, adapter=settings.adapter(init=init)).load(torch.float32)
        layer = model.model.layers[1].mlp.up_proj
        a, b = layer.lora_A.default.weight.detach(), layer.lora_B.default.weight.detach()
        assert float(a.std()) == pytest.approx(std, rel=0.1)
        assert float((b @ a).abs().max()) < 1e-6
        assert bool(b.any()) == (init == "orthogonal")
        assert torch.allclose(model(ids).logits, expected, atol=1e-5)
    with pytest.raises(UserError, match=r"orthogonal needs an even adapter.r, and it is 5"):
        settings.adapter(init="orthogonal", r=5)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")  # peft asks transformers by an older name
def test_modules_that_are_trained_whole(tmp_path: Path) -> None:
    torch.manual_seed(1)
    tiny_llama(tie_word_embeddings=False).save_pretrained(tmp_path / "base")
    adapter = settings.adapter(r=4, modules_to_save=["embed_tokens", "lm_head"], target_modules=["q_proj"])
    source = settings.model_source(path=str(tmp_path / "base"), attention="eager", adapter=adapter)
    model, sharded = source.load(torch.float32), source.load(torch.float32, sharding=OneRank())
    for (name, one), other in zip(model.named_parameters(), sharded.parameters(), strict=True):
        assert torch.equal(one, other) and one.requires_grad == other.requires_grad, name
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 6
    for tensor in trained.values():
        tensor += 0.01
    with torch.no_grad():
        logits = model(torch.arange(20)[None]).logits
    specs = {name: (tensor.dtype, list(tensor.shape)) for name, tensor in trained.items()}
    (tmp_path / "adapter").mkdir()
    write_adapter(tmp_path / "adapter", source, specs, trained.__getitem__, None)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32, attn_implementation="eager")
    adapted = PeftModel.from_pretrained(base, tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(adapted(torch.arange(20)[None]).logits, logits)
    layout, read = merged(source, specs, trained.__getitem__, torch.float32)
    expected = dict(adapted.merge_and_unload().named_parameters())
    assert layout.keys() == expected.keys()
    assert all(torch.equal(read(name), parameter) for name, parameter in expected.items())


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")  # peft asks transformers by an older name
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "added", [None, ["<new>"], [f"<new{number}>" for number in range(7)]], ids=["none added", "room", "grown"]
)
def test_tokens_whose_rows_are_trained(
    tied: bool, added: list[str] | None, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    torch.manual_seed(1)
    tiny_llama(tie_word_embeddings=tied).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    adapter = settings.adapter(r=4, target_modules=["q_proj"], trainable_tokens=["<|im_end|>", *(added or ["a"])])
    source = settings.model_source(path=str(tmp_path / "base"), attention="eager", adapter=adapter, add_tokens=added)
    trained_ids, ids = source.trained_ids, torch.tensor([[0, 1, *source.trained_ids, 5]])
    assert trained_ids == sorted(source.load_tokenizer().convert_tokens_to_ids(adapter.trainable_tokens))
    bare: Any = replace(source, adapter=None).load(torch.float32)
    model: Any = source.load(torch.float32)
    assert not head_is_plain_matrix(model)
    assert torch.equal(model(ids).logits, bare(ids).logits)
    model(ids, labels=ids).loss.backward()
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    rows = {name: p for name, p in trained.items() if "lora_" not in name}
    assert [list(p.shape) for p in rows.values()] == [[len(trained_ids), 32]] * (1 if tied else 2)
    assert all(bool(model.get_parameter(name).grad.any(1).all()) for name in rows)
    for tensor in trained.values():
        tensor += torch.linspace(-0.1, 0.2, tensor.numel()).view(tensor.shape)
    with torch.no_grad():
        logits = model(ids).logits
    specs = {name: (tensor.dtype, list(tensor.shape)) for name, tensor in trained.items()}
    layout, read = merged(source, specs, trained.__getitem__, torch.float32)
    assert set(layout) == {name for name, _ in bare.named_parameters()}
    with torch.no_grad():
        for name, parameter in bare.named_parameters():
            value = read(name)
            if name in ("model.embed_tokens.weight", "lm_head.weight"):
                changed = (value != parameter).any(1).nonzero()[:, 0].tolist()
                assert changed == trained_ids
            parameter.copy_(value)
        assert torch.allclose(bare(ids).logits, logits, atol=1e-6)
    if added:  # an adapter alone would lack its base's rows
        return
    (tmp_path / "adapter").mkdir()
    write_adapter(tmp_path / "adapter", source, specs, trained.__getitem__, None)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        assert torch.equal(PeftModel.from_pretrained(base, tmp_path / "adapter")(ids).logits, logits)


def test_tokens_whose_rows_can_not_be_trained(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    torch.manual_seed(1)
    tiny_llama(tie_word_embeddings=False).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)

    def load(add_tokens: list[str] | None = None, sharding: Any = None, **options: Any) -> None:
        adapter = settings.adapter(**{"trainable_tokens": ["a"]} | options)
        source = settings.model_source(path=str(tmp_path), adapter=adapter, add_tokens=add_tokens)
        source.load(torch.float32, sharding=sharding)

    with pytest.raises(UserError, match=r"adapter.trainable_tokens: 'ab' is 2 tokens of the tokenizer, not one"):
        load(trainable_tokens=["a", "ab"])
    for module in ("embed_tokens", "lm_head"):
        with pytest.raises(UserError, match=f"{module} is trained whole, and adapter.trainable_tokens trains rows of"):
            load(modules_to_save=[module])
    with pytest.raises(UserError, match=r"lm_head means lm_head, of which adapter.trainable_tokens trains rows"):
        load(target_modules=["lm_head"])
    biased: Any = tiny_llama(tie_word_embeddings=False)
    biased.lm_head.bias = torch.nn.Parameter(torch.zeros(264))
    with pytest.raises(UserError, match=r"the head of LlamaForCausalLM can't be trained row by row \(Linear, or its"):
        settings.adapter(trainable_tokens=["a"]).add(biased, [5])
    with pytest.raises(UserError, match=r"trainable_tokens leaves 1 of the new tokens of model.add_tokens"):
        load(add_tokens=["<one>", "<two>"], trainable_tokens=["<one>"])
    with pytest.raises(UserError, match=r"adapter.trainable_tokens needs rows of whole embeddings"):
        load(sharding=OneRank())


def test_modules_that_can_not_be_trained_whole(model_folder: Path) -> None:
    for module, message in (
        ("head", "head is no module of Llama"),
        ("embed_tokens", "its weight with the head"),
    ):
        with pytest.raises(UserError, match=message):
            settings.model_source(path=str(model_folder), adapter=settings.adapter(modules_to_save=[module])).load(
                torch.float32
            )


def test_a_router_that_derives_from_a_linear_layer_is_left_alone(tmp_path: Path) -> None:
    """It returns a pair, and peft would take it for a matrix."""
    config = AutoConfig.for_model(
        "llama4_text", **SIZE, intermediate_size_mlp=32, num_local_experts=2, moe_layers=[0, 1], num_experts_per_tok=1
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model = settings.model_source(path=str(tmp_path), adapter=settings.adapter(), attention="eager").load(torch.float32)
    adapted = {name.split(".lora_")[0] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.split(".")[-1] for name in adapted} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }
    model(input_ids=torch.tensor([[1, 2, 3]]), use_cache=False)
    named = settings.adapter(target_modules=["router"])
    with pytest.raises(UserError, match=r"router means \S+\.router, no linear layer, but a Llama4Router: "):
        settings.model_source(path=str(tmp_path), adapter=named).load(torch.float32)


@pytest.mark.parametrize(
    ("kind", "fields", "adapted"),
    [
        # Its linear layers have a product of their own, which is an ordinary one.
        ("falcon", {"num_attention_heads": 2}, ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]),
        # Its kernels are given the weight of out_proj, and peft refuses that layer by the model's name.
        ("mamba2", {"num_heads": 8, "head_dim": 8, "n_groups": 1}, ["in_proj"]),
        # The same, in a model that peft doesn't know.
        ("zamba2", {"hybrid_layer_ids": [], "layers_block_type": 2 * ["linear_attention"]}, ["in_proj"]),
    ],
)
def test_layers_that_an_adapter_has_an_effect_on_are_adapted(
    kind: str, fields: dict[str, Any], adapted: list[str], tmp_path: Path
) -> None:
    config = AutoConfig.for_model(kind, **{**SIZE, **fields})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model = settings.model_source(path=str(tmp_path), adapter=settings.adapter()).load(torch.float32)
    names = [name.split(".lora_")[0] for name, one in model.named_parameters() if one.requires_grad]
    assert list(dict.fromkeys(name.split(".")[-1] for name in names)) == adapted
    if "in_proj" in adapted:
        named = settings.adapter(target_modules=["in_proj", "out_proj"])
        match = r"out_proj means \S+\.out_proj, whose weight \S+ may use by itself, .*: leave it out"
        with pytest.raises(UserError, match=match):
            settings.model_source(path=str(tmp_path), adapter=named).load(torch.float32)
