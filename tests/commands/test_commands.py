"""preview, score, generate and export on a finished run, and what a Hugging Face user makes of its folder."""

import io
import json
import math
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from running import Sft
from sft.cli import COMMANDS
from sft.runs.metrics_file import Metrics


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, model_folder: Path, data_file: Path) -> Path:
    """A folder with a finished run called `run`."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        sft = Sft(tmp_path_factory.mktemp("finished"), model_folder, data_file, monkeypatch)
        assert sft.train("run=run", "epochs=4", "val_every=4") == 0
    return sft.folder


@pytest.fixture
def there(sft: Sft, finished: Path, monkeypatch: pytest.MonkeyPatch) -> Sft:
    monkeypatch.chdir(finished)
    return sft


def test_help_of_every_command_imports_little_and_has_an_example() -> None:
    script = str(Path(sys.executable).with_name("sft"))
    for arguments in ([], *([command] for command in COMMANDS)):
        command = [sys.executable, "-X", "importtime", script, *arguments, "--help"]
        shown = subprocess.run(command, capture_output=True, text=True, check=True)
        imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in shown.stderr.splitlines()}
        assert "sft" in imported and not imported & {"torch", "numpy", "hydra", "omegaconf", "rich"}
        assert f"sft {arguments[0] if arguments else 'train'} " in shown.stdout


def test_cfg_job_prints_the_configuration(sft: Sft, capsys: pytest.CaptureFixture[str]) -> None:
    assert sft("train", "--cfg", "job", "optimizer.lr=0.125") == 0
    assert "lr: 0.125" in capsys.readouterr().out
    assert not (sft.folder / "runs").exists()


def test_preview_marks_what_is_supervised(sft: Sft, capsys: pytest.CaptureFixture[str]) -> None:
    assert sft("preview", *sft.settings, "preview.packs=1", "preview.dump=samples.jsonl") == 0
    shown = capsys.readouterr().out
    assert "57 training, 3 validation" in shown
    assert "rows.jsonl" in shown
    samples = [json.loads(line) for line in (sft.folder / "samples.jsonl").read_text().splitlines()]
    rows = [json.loads(line) for line in Path(sft.settings[1].removeprefix("data.path=")).read_text().splitlines()]
    assert len(samples) == 57
    tokenizer = AutoTokenizer.from_pretrained(sft.settings[0].removeprefix("model.path="))
    marked = 0
    for sample in samples:
        row = rows[sample["row"]]
        assert sample["source"] == "rows.jsonl"
        assert tokenizer.decode(sample["input_ids"]) == (
            f"<|im_start|>user\n{row['prompt']}<|im_end|>\n<|im_start|>assistant\n{row['response']}<|im_end|>"
        )
        supervised = [token for token in sample["labels"] if token != -100]
        assert tokenizer.decode(supervised) == f"{row['response']}<|im_end|>"
        marked += f"[[{row['response']}<|im_end|>]]" in shown
    assert marked >= 4  # those of the pack that was shown


def test_generate(there: Sft, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    text = 'Reverse a, {b}="c" ${d} \\ e.'
    assert there("generate", "run=run", "--prompt", text, "max_new_tokens=6") == 0
    alone = capsys.readouterr().out.rstrip("\n")
    (there.folder / "prompts.txt").write_text(f"Reverse abc (1).\n\n{text}\n")
    assert there("generate", "run=run", f"file={there.folder / 'prompts.txt'}", "max_new_tokens=6") == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["prompt"] for line in lines] == ["Reverse abc (1).", text]
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{text}\n"))
    assert there("generate", "run=run", "max_new_tokens=6") == 0
    assert json.loads(capsys.readouterr().out) == lines[1]
    # Whatever the batch and its padding, each answer is the one the model gives to this prompt alone.
    tokenizer = AutoTokenizer.from_pretrained("runs/run/export")
    model = AutoModelForCausalLM.from_pretrained("runs/run/export").eval()
    ids = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer(ids, return_tensors="pt", add_special_tokens=False).input_ids
    made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    assert lines[1]["response"] == tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
    assert alone == lines[1]["response"]


def test_generate_from_rows(there: Sft, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = ["Reverse abc (1).", 'Reverse "x, y" (2).']
    (tmp_path / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt in prompts))
    rows = Dataset.from_list([{"prompt": prompt, "response": "cba"} for prompt in prompts])
    rows.to_json(tmp_path / "rows.jsonl")
    rows.to_parquet(tmp_path / "rows.parquet")
    rows.remove_columns("response").to_csv(tmp_path / "questions.csv")
    made = {}
    for file in ("prompts.txt", "rows.jsonl", "rows.parquet", "questions.csv"):
        assert there("generate", "run=run", f"file={tmp_path / file}", "max_new_tokens=6") == 0
        made[file] = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [list(line) for line in made["prompts.txt"]] == [["prompt", "response"]] * 2
    assert [line["prompt"] for line in made["prompts.txt"]] == prompts
    assert made["questions.csv"] == made["prompts.txt"]
    with_reference = [line | {"reference": "cba"} for line in made["prompts.txt"]]
    assert made["rows.jsonl"] == made["rows.parquet"] == with_reference


def test_files_that_generate_refuses(there: Sft, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "other.csv").write_text("question,answer\na,b\n")
    (tmp_path / "blank.jsonl").write_text('{"prompt": "a"}\n{"prompt": ""}\n')
    for name, line in {
        "none.csv": f"file={tmp_path}/none.csv: there is no such file (looked in {tmp_path})",
        ".": f"file={tmp_path}/. is a folder: name a file",
        "empty.txt": f"file={tmp_path}/empty.txt holds no prompt: it has one on each line",
        "empty.csv": f"{tmp_path}/empty.csv: the file is empty",
        "other.csv": f"file={tmp_path}/other.csv has no column 'prompt', only 'question', 'answer': rename the one "
        "with the prompts, because the run was trained with data.conversation.prompt=prompt",
        "blank.jsonl": f"row 1 of {tmp_path}/blank.jsonl: there is nothing to answer (empty_prompt)",
    }.items():
        assert there("generate", "run=run", f"file={tmp_path}/{name}") == 2
        assert capsys.readouterr() == ("", f"sft: {line}\n")


@pytest.mark.parametrize(
    ("command", "setting"),
    [("score", "output"), ("compare", "output"), ("export", "output"), ("preview", "preview.dump")],
)
def test_an_output_that_can_not_be_written_is_refused_first(
    there: Sft, command: str, setting: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = {"compare": [], "preview": there.settings}.get(command, ["run=run"])
    Path("a file").touch()
    if command == "export":  # which makes folders
        outputs = {
            "a file/x": f"a file/x can't be written ({Path.cwd()}/a file: Not a directory): set output to another "
            "folder"
        }
    else:
        outputs = {
            "none/x": f"{setting}=none/x: there is no folder {Path.cwd()}/none: make it, or name another file",
            "runs": f"{setting}=runs is a folder: name a file",
        }
    for output, line in outputs.items():
        assert there(command, *arguments, f"{setting}={output}") == 2
        assert capsys.readouterr() == ("", f"sft: {line}\n")


def test_score_against_a_plain_forward_pass(there: Sft, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": "Reverse abc.", "response": "cba"}, {"prompt": "Reverse x.", "response": "xylophone"}]
    data = there.folder / "new.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = there.folder / "scores.jsonl"
    assert there("score", "run=run", f"data={data}", f"output={output}") == 0
    scores = [json.loads(line) for line in output.read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained("runs/run/export")
    model = AutoModelForCausalLM.from_pretrained("runs/run/export").eval()

    def log_prob(text: str) -> float:
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
        with torch.no_grad():
            log_probs = model(ids).logits.double().log_softmax(-1)[0, :-1]
        return log_probs.gather(1, ids[0, 1:, None]).sum().item()

    assert [score["row"] for score in scores] == [0, 1]
    for row, score in zip(rows, scores, strict=True):
        prompt = f"<|im_start|>user\n{row['prompt']}<|im_end|>\n<|im_start|>assistant\n"
        joint = log_prob(f"{prompt}{row['response']}<|im_end|>")
        assert score["source"] == "new.jsonl"
        assert score["log_p_joint"] == pytest.approx(joint, abs=1e-3)
        assert score["log_p_prompt"] == pytest.approx(log_prob(prompt), abs=1e-3)
        assert score["log_p_response"] == pytest.approx(joint - log_prob(prompt), abs=1e-3)
        assert score["num_response_tokens"] == len(row["response"]) + 1
    # The run's own validation data, without naming any: its loss is that of metrics.csv.
    capsys.readouterr()
    assert there("score", "run=run") == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    loss = -sum(line["log_p_response"] for line in lines) / sum(line["num_response_tokens"] for line in lines)
    metrics = Metrics.read(Path("runs/run/metrics.csv"))
    assert loss == pytest.approx(metrics.last("val/loss"), abs=1e-5)
    assert math.exp(loss) == pytest.approx(metrics.last("val/perplexity"), rel=1e-4)


def test_export_is_a_hugging_face_folder(there: Sft) -> None:
    folder = Path("runs/run/export")
    assert {"model.safetensors", "config.json", "tokenizer.json", "generation_config.json", "README.md"} <= {
        path.name for path in folder.iterdir()
    }
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [
        tokenizer.convert_tokens_to_ids("<|im_end|>")
    ]
    assert tokenizer.apply_chat_template(
        [{"role": "user", "content": "x"}], tokenize=False, add_generation_prompt=True
    ) == ("<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n")
    card = (folder / "README.md").read_text()
    assert "base_model" not in card  # a folder of this machine is nobody else's base model
    assert "| global batch | 4 packs of up to 256 tokens |" in card
    verdict = json.loads((folder / "verified.json").read_text())
    assert verdict["equal"]
    assert verdict["num_tokens"] > 100
    assert verdict["largest_difference"] < 1e-4


def test_export_again_elsewhere_and_otherwise(there: Sft, capsys: pytest.CaptureFixture[str]) -> None:
    output = there.folder / "half"
    assert there("export", "run=run", f"output={output}", "dtype=bfloat16", "checkpoint=best") == 0
    model = AutoModelForCausalLM.from_pretrained(output, dtype="auto")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert there("export", "run=run", f"output={output}") == 2
    assert "exists: name another folder" in capsys.readouterr().err
    assert there("export", "run=run", "checkpoint=7") == 2
    assert "checkpoint=7 is not there: set last, best or a step, one of 8, 12" in capsys.readouterr().err


def test_data_set_saved_to_disk_and_columns_of_ones_own(sft: Sft) -> None:
    rows = [{"question": f"What is {n}?", "answer": f"It is {n}."} for n in range(20)]
    Dataset.from_list(rows).save_to_disk(str(sft.folder / "saved"))
    columns = ("data.conversation.prompt=question", "data.conversation.response=answer")
    assert sft.train("run=run", "data.path=./saved", *columns, "max_steps=1", "export=false") == 0
    (source,) = json.loads((sft.run_folder() / "data.json").read_text())["train"]["sources"]
    assert source["rows"] == 20


def test_plain_text_is_language_modelling(sft: Sft, capsys: pytest.CaptureFixture[str]) -> None:
    (sft.folder / "text.jsonl").write_text("".join(json.dumps({"text": f"abc {n}"}) + "\n" for n in range(40)))
    settings = [setting for setting in sft.settings if not setting.startswith("data.path")]
    arguments = (*settings, "data=text", "data.path=text.jsonl", "max_steps=2", "run=run")
    assert sft("preview", *arguments, "preview.packs=1") == 0
    assert "a[[bc 0<|endoftext|>]]" in capsys.readouterr().out
    assert sft("train", *arguments) == 0
    assert sft("generate", "run=run", "--prompt", "abc", "max_new_tokens=2") == 0


def test_random_weights_from_a_configuration(sft: Sft) -> None:
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = [f"+model.config.{key}={value}" for key, value in {**shape, "vocab_size": 264}.items()]
    tokenizer = sft.settings[0].replace("model.path=", "model.tokenizer=")
    settings = [tokenizer, *sft.settings[1:]]
    assert sft("train", "model=scratch", *model, *settings, "max_steps=2", "run=run") == 0
    assert sft("train", "model=scratch", *model, *settings, "max_steps=2", "run=again", "export=false") == 0
    made = [
        next(sft.run_folder(name).glob("checkpoints/*/shard-00000-of-00001.safetensors")).read_bytes()
        for name in ("run", "again")
    ]
    assert made[0] == made[1]  # the weights are drawn from the run's seed
    assert all(a < b for a, b in pairwise([0, len(made[0])]))
