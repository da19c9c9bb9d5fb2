"""A certificate passes what trains right, and finds each fault in the cells where it matters."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

import faults
import warm
from faults import EXPERTS, FAULTS, cell
from made_up import drawn, weigh
from running import Sft
from sft.commands import certify
from sft.config import CONF
from sft.proof import cells
from sft.proof.cells import STRATEGIES, VARIANTS, Cell, Key, all_cells, with_experts
from sft.proof.certificate import Certificate
from sft.proof.excerpt import Excerpt
from sft.proof.rank_pool import seeing
from sft.proof.reference import Reference

pytestmark = pytest.mark.xdist_group("certify")  # the plain loop is made once


References = tuple[dict[Key, Reference], float]


def composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("certify", overrides=list(overrides))


def made(folder: Path, chosen: list[Cell], before: Callable[[], None] | None = None, *overrides: str) -> Certificate:
    warm.start()
    with seeing("cpu"):
        return certify.certify(composed(*overrides), folder, chosen, before)


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> References:
    """The plain loop, by each optimizer and packed or not, and with each variant; not packed, with bf16's noise."""
    warm.start()
    keys = {
        "bf16-mixed": [("adamw", False, ""), ("sgd", False, "")],
        "32-true": [
            ("adamw", True, ""),
            *(("sgd", True, name) for name in VARIANTS if name != EXPERTS.variant),
        ],
    }
    made: dict[Key, Reference] = {}
    with seeing("cpu"):
        for precision, of_precision in keys.items():
            folder = tmp_path_factory.mktemp("references")
            config, excerpt = certify.prepare(composed(f"precision={precision}"), folder)
            references, clip = certify.make_references(config, folder, excerpt, of_precision)
            made |= references
    return made, clip


@pytest.fixture
def same_references(references: References, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop is not made again: no fault is planted in it."""
    made, clip = references

    def known(config: DictConfig, folder: Path, excerpt: Excerpt, keys: list[Key]) -> References:
        return {key: made[key] for key in keys}, clip

    monkeypatch.setattr(certify, "make_references", known)


def test_matrix_is_whole() -> None:
    assert set(STRATEGIES) <= {path.stem for path in (CONF / "strategy").glob("*.yaml")}
    everything = all_cells()
    assert len(set(everything)) == len(everything) == (1 + 5 * 3) * 29
    assert len(set(with_experts(everything, quick=False))) == (1 + 5 * 3) * 30
    quick = all_cells(quick=True)
    assert set(quick) <= set(everything)
    assert {each.strategy for each in quick} == set(STRATEGIES)
    for name, values in {"num_ranks": {2}, "accumulation": {1, 2}, "packed": {True, False}}.items():
        assert {getattr(each, name) for each in quick if each.strategy == "ddp"} == values
    assert [f"{each.strategy}-{each.variant}" for each in quick if each.variant] == [
        *("ddp-weighted", "deepspeed_zero3-patterns"),
        *("deepspeed_zero3-averaging", "deepspeed_zero3-averaging", "fsdp2-objective"),
    ]
    assert {*with_experts(quick, quick=True)} - {*quick} == {EXPERTS}
    assert {each.strategy for each in all_cells(quick=True, max_ranks=1)} == set(STRATEGIES)


@pytest.mark.timeout(900)
def test_quick_certificate_passes(sft: Sft, capfd: pytest.CaptureFixture[str]) -> None:
    assert sft("certify", "quick=true", "output=certificate") == 0
    assert f"passed: {len(all_cells(quick=True))} of {len(all_cells(quick=True))} cells pass" in capfd.readouterr().out
    document = json.loads(Path("certificate/certificate.json").read_text())
    assert document["passed"] and all(each["passed"] for each in document["cells"])
    for reference in document["references"]:
        assert 0 < reference["num_clipped"] < 20
        assert reference["movement"] > 5e-3
    variants = [reference["variant"] for reference in document["references"] if reference["variant"]]
    assert sorted(variants) == ["averaging", "objective", "patterns", "weighted"]
    assert "# Certificate passed" in Path("certificate/certificate.md").read_text()


@pytest.mark.usefixtures("same_references")
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_fault_is_found_where_it_matters(fault: Callable[[], None], tmp_path: Path) -> None:
    failing, passing = FAULTS[fault]
    order = all_cells()
    certificate = made(tmp_path, sorted([*failing, *passing], key=order.index), fault)
    assert {result.cell for result in certificate.results if not result.passed} == set(failing)
    # By its numbers: what raises shows nothing of the fault.
    assert fault is faults.dies or {result.error for result in certificate.results} == {None}
    assert not certificate.passed


@pytest.mark.usefixtures("same_references")
@pytest.mark.parametrize(
    ("fault", "failing"),
    [
        (None, []),
        (faults.mean_of_each_micro_batch, ["single"]),
        (faults.small_step_without_update, ["single"]),
        (faults.weights_decay_all, ["single"]),
        (faults.masters_rounded, ["deepspeed_zero2"]),  # of all the nearest to what is right
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_in_bf16_what_is_right_is_told_from_what_is_not(
    fault: Callable[[], None] | None, failing: list[str], tmp_path: Path
) -> None:
    chosen = [cell(accumulation=2, precision="bf16-mixed")]
    if fault in (None, faults.masters_rounded):
        others = [("deepspeed_zero2", "sgd"), ("deepspeed_zero2", "adamw"), ("fsdp2", "sgd")]
        chosen += [cell(strategy, precision="bf16-mixed", optimizer=optimizer) for strategy, optimizer in others]
    certificate = made(tmp_path, chosen, fault, "precision=bf16-mixed")
    for result in certificate.results:
        assert result.passed is (result.cell.strategy not in failing), result
        # It was not made in fp32.
        assert result.weight > 0.1
    assert "in bf16-mixed" in certificate.page()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("precision=16", "precision=16 is not one of 32-true, bf16-mixed"),
        ("device=tpu", "device=tpu is not one of cpu, gpu"),
        ("device=gpu", "sees no CUDA device"),
    ],
)
def test_what_can_not_be_certified(
    sft: Sft, setting: str, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert sft("certify", setting) == 2
    assert message in capsys.readouterr().err


@pytest.mark.usefixtures("same_references")
def test_rank_that_fails_says_why_and_the_others_go_on(tmp_path: Path) -> None:
    chosen = [cell("ddp", 2), cell("ddp", 2, accumulation=2)]
    certificate = made(tmp_path, chosen, faults.second_rank_raises_without_accumulation)
    failed, passed = certificate.results
    assert failed.error is not None and "raised RuntimeError: out of luck" in failed.error
    assert passed.passed
    assert "out of luck" in certificate.page() and "FAILED: 1 of 2 cells pass" in certificate.page()


@pytest.mark.usefixtures("same_references")
def test_rank_that_hangs_is_stopped(tmp_path: Path) -> None:
    certificate = made(tmp_path, [cell("ddp", 2)], faults.hangs, "cell_timeout=5")
    assert "gave no answer within 5 s" in str(certificate.results[0].error)


def test_model_whose_samples_run_apart_is_certified(tmp_path: Path) -> None:
    chosen = [cell("ddp", 2, 2, packed=True)]  # each rank has packs of other numbers of samples
    certificate = made(tmp_path, chosen, None, "+model.config.model_type=bloom")
    assert certificate.model["model_type"] == "bloom" and certificate.passed


def test_own_model_and_data(sft: Sft, model_folder: Path, data_file: Path, tmp_path: Path) -> None:
    # Its vocabulary shrinks to the bytes that occur, its two heads a group stay two.
    settings = (f"model.path={model_folder}", f"data.path={data_file}", "data.max_length=256", "data.num_workers=1")
    chosen = [cell("ddp", 2, 2, packed, optimizer="adamw") for packed in (True, False)]
    certificate = made(tmp_path, chosen, None, *settings)
    assert certificate.passed
    assert certificate.model["vocab_size"] < 100
    assert certificate.model["num_attention_heads"] == 2 * certificate.model["num_key_value_heads"]
    assert certificate.model["tie_word_embeddings"]
    assert len(certificate.excerpt) in (51, 50, 49)  # of 60: three steps of 16 and a small one


@pytest.mark.parametrize(
    ("fault", "passes"),
    [(None, True), (faults.weights_left_out_of_the_sum, False), (faults.weights_left_out_of_the_divisor, False)],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_own_data_with_weights(
    fault: Callable[[], None] | None, passes: bool, model_folder: Path, data_file: Path, tmp_path: Path
) -> None:
    settings = (f"model.path={model_folder}", f"data.path={data_file}", "data.max_length=256", "data.num_workers=1",
                f"data.cache_dir={tmp_path}/cache")  # fmt: skip
    warm.start()
    with seeing("cpu"):
        certify.prepare(composed(*settings), tmp_path)
    weigh(tmp_path / "cache")
    certificate = made(tmp_path, [cell("ddp", 2, 2, packed=True)], fault, *settings)
    assert certificate.passed is passes
    _, labels = certificate.excerpt[0]
    weights = certificate.excerpt.weights(0)
    assert weights is not None and weights.tolist() == drawn(labels.tolist())


def test_adapter_is_certified(tmp_path: Path) -> None:
    chosen = [cell(strategy, 2) for strategy in ("ddp", "deepspeed_zero2", "deepspeed_zero3", "fsdp2")]
    certificate = made(tmp_path, chosen, None, "adapter=lora", "adapter.r=3")
    assert certificate.passed


@pytest.mark.parametrize(
    ("fault", "passes"),
    [
        (None, True),
        (faults.experts_balanced_by_the_supervised_tokens, False),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_experts_are_certified(fault: Callable[[], None] | None, passes: bool, tmp_path: Path) -> None:
    model = ("model_type=mixtral", "num_local_experts=4")
    certificate = made(tmp_path, [EXPERTS], fault, *(f"+model.config.{field}" for field in model))
    assert certificate.passed is passes and certificate.results[0].error is None


@pytest.mark.parametrize(("fault", "passes"), [(None, True), (faults.biases_of_experts_moved, False)])
def test_buffers_that_belong_to_the_weights_are_certified(
    fault: Callable[[], None] | None, passes: bool, tmp_path: Path
) -> None:
    certificate = made(tmp_path, [cell()], fault, "+model.config.model_type=deepseek_v3")
    (result,) = certificate.results
    assert result.passed is passes and result.error is None and result.loss < 1e-5


def test_linear_attention_is_certified(tmp_path: Path) -> None:
    """Its normed vectors have enough channels in the small form: of few, rounding grows from step to step."""
    assert made(tmp_path, [cell()], None, "+model.config.model_type=qwen3_5_text").passed


@pytest.mark.usefixtures("same_references")
@pytest.mark.parametrize(("fault", "passes"), [(None, True), (faults.weights_decay_all, False)])
def test_rounding_is_told_from_a_fault_by_what_it_does_to_the_loop(
    fault: Callable[[], None] | None, passes: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cells, "DEFAULT_WEIGHT_TOLERANCE", 1e-9)  # of which rounding alone is more
    certificate = made(tmp_path, [cell()], fault)
    (result,) = certificate.results
    assert result.passed is passes and result.error is None
    if passes:
        assert 0 < result.weight <= result.tolerance == 4 * certificate.references[result.cell.key].rounding < 1e-6
    else:
        assert result.rounding == 0.0  # too far for it to be measured


def test_weights_that_hardly_move_prove_nothing(tmp_path: Path) -> None:
    certificate = made(tmp_path, [cell()], None, "optimizers.sgd.lr=1e-6")
    assert "raise the learning rate" in str(certificate.results[0].error)


def test_exit_code_is_1_where_a_cell_fails(sft: Sft, capsys: pytest.CaptureFixture[str]) -> None:
    sft.monkeypatch.setattr(cells, "all_cells", lambda *_: [cell()])
    assert sft("certify", "optimizers.sgd.lr=1e-6") == 1
    assert "FAILED: 0 of 1 cells pass" in capsys.readouterr().out
    assert len(list(Path("certificates").glob("*/certificate.md"))) == 1


def test_too_little_data_is_refused(sft: Sft, model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("few.jsonl").write_text('{"prompt": "a", "response": "b"}\n' * 9)
    assert sft("certify", f"model.path={model_folder}", "data.path=few.jsonl", "data.max_length=256") == 2
    assert "too few to certify with" in capsys.readouterr().err
