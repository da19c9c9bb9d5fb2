"""The README and docs/ keep their word: every command works, on a small model and a few rows in place of those that it
names, and every link, file, setting and package that they name exists."""

import csv
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from pages import COMMANDS, DOCS, PAGES, ROOT
from running import Sft
from sft.config import CONF
from sft.proof import cells
from sft.training.launch import Launch
from sft.training.settings import devices_and_nodes
from warm import python

LINKED = PAGES | {ROOT / name: (ROOT / name).read_text() for name in ("CONTRIBUTING.md", "CHANGELOG.md")}

TRAIN = r"sft train (?!--cfg)"
FINISHED = r"sft (check|generate|score|export|compare|runs|watch)\b"
SLURM = r"sft submit|sft rehearse|sbatch |slurm/local-cluster "
LAUNCHERS = r"(torchrun|srun) "
# How a command is tested: run, if nothing else is said.
KINDS = (
    r"make ",  # exists; run by CI
    r"mkdir |printf ",
    TRAIN,
    r"sft train --cfg job|sft preview ",
    FINISHED,
    r"sft certify",
    LAUNCHERS,  # parsed; run by tests/training/test_launch.py and tests/slurm/test_launchers.py
    SLURM,  # parsed; run by tests/slurm/test_jobs.py, tests/commands/test_submit.py and test_rehearse.py
    r"scripts/bench ",
    r"scripts/architectures$",  # tests/test_architectures.py, of one model
    r"scripts/chaos",  # tests/test_chaos.py; a minute of it is run by CI
    r"scripts/gpu",  # parsed; run by CI with --cpu, and on a GPU by hand
    r"wandb (sweep|agent) ",  # an agent's runs: tests/training/test_trackers.py
    r"source slurm/site.sh$|cmp ",  # those that every machine has
)
SMALL = (
    *("max_steps=2", "data.max_length=256", "global_batch_size=2", "micro_batch_size=1", "data.num_workers=1"),
    *("trainer=cpu", "logger=csv", "export=false"),
)
BENCHMARKS = {
    "train": ("--no-trl", "--only", "packed", "--threads", "1", "--samples", "8"),
    "data": ("--samples", "1000", "--rows", "200", "--workers", "1"),
    "strategies": ("--only", "ddp"),
    "tracking": ("--threads", "1"),
    "apart": ("--threads", "1"),
    "start": ("--threads", "1"),
}


def commands(kind: str) -> list[str]:
    return [line for line in COMMANDS if re.match(kind, line)]


def words(line: str) -> list[str]:
    return shlex.split(line, comments=True)


def arguments(line: str, model: Path) -> list[str]:
    """Those of an `sft` command, with a local model and local data in place of the Hub's."""
    local = [word.replace("Qwen/Qwen3-0.6B", str(model)) for word in words(line)[2:]]
    return [*local, "data.path=gsm8k"] if "experiment=gsm8k" in local else local


def save_adapter(folder: Path, model: Path) -> None:
    """A LoRA adapter of the model, as peft saves it."""
    base = AutoModelForCausalLM.from_pretrained(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's of transformers
        adapted = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    adapted.save_pretrained(folder)


@pytest.fixture
def project(sft: Sft, model_folder: Path, data_file: Path) -> Sft:
    """A folder after `make demo`, with the data that the pages name."""
    (sft.folder / "gsm8k").mkdir()
    rows = [{"question": f"What is {n} + {n}?", "answer": f"{n} + {n} = {2 * n}\n#### {2 * n}"} for n in range(20)]
    for split in ("train", "test"):
        (sft.folder / "gsm8k" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("my", "more"):
        shutil.copy(data_file, sft.folder / f"{name}.jsonl")
    (sft.folder / "general.txt").write_text("Graz lies on the Mur.\nA day has 24 hours.\n")
    save_adapter(sft.folder / "my-adapter", model_folder)
    shutil.copytree(model_folder, sft.folder / "runs" / "demo-base" / "export")
    for name in ("train", "test"):
        (sft.folder / "cache" / "demo").mkdir(parents=True, exist_ok=True)
        shutil.copy(data_file, sft.folder / "cache" / "demo" / f"{name}.jsonl")
    own = "\n".join(commands("mkdir |printf ")).replace("Qwen/Qwen3-0.6B", str(model_folder))
    subprocess.run(["bash", "-euc", own], check=True, cwd=sft.folder)
    return sft


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, model_folder: Path, data_file: Path) -> Path:
    """A folder with a finished run called NAME."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        sft = Sft(tmp_path_factory.mktemp("finished"), model_folder, data_file, monkeypatch)
        shutil.copy(data_file, "my.jsonl")
        Path("prompts.txt").write_text("Reverse abc.\n")
        assert sft.train("run=NAME", "adapter=lora", "max_steps=2", "evaluation.samples=2") == 0
        for name in ("demo", "faster"):
            shutil.copytree("runs/NAME", f"runs/{name}")
    return sft.folder


def test_every_command_is_of_a_kind_that_is_tested() -> None:
    assert len(COMMANDS) > 30
    assert [line for line in COMMANDS if not any(re.match(kind, line) for kind in KINDS)] == []


@pytest.mark.parametrize("line", commands("make "))
def test_make_target_exists(line: str) -> None:
    subprocess.run(["make", "--dry-run", words(line)[1]], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.parametrize("line", commands(TRAIN))
def test_training(line: str, project: Sft, model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = [*arguments(line, model_folder), *SMALL]
    if "trainer.devices=8" in settings:
        settings.remove("trainer.devices=8")
        ended = project.ranks(2, "train", *settings)
        assert ended.code == 0, ended.output
    else:
        assert project("train", *settings) == 0
    printed = capsys.readouterr().out
    runs = [path.parent for path in project.folder.glob("runs/*/status.json")]
    assert len(runs) == (2 if "-m" in settings else 1)
    for run in runs:
        assert json.loads((run / "status.json").read_text())["state"] == "finished"
        with (run / "metrics.csv").open() as file:
            rows = [row["step"] for row in csv.DictReader(file)]
        assert rows == [*(["0"] if "debug=overfit" not in settings else []), "1", "2"]  # 0: a validation
        assert (run / "checkpoints" / "step-00000002").is_dir()
    if "-m" in settings:
        assert all(re.search(rf"^{run.name} +finished", printed, re.M) for run in runs)
    else:  # the same command, also on another number of devices, is the same run
        assert project("train", *settings) == 0
        assert f"{runs[0].relative_to(project.folder)} is finished" in capsys.readouterr().out


@pytest.mark.parametrize("line", commands("sft preview"))
def test_preview(line: str, project: Sft, model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert project("preview", *arguments(line, model_folder), *SMALL) == 0
    assert re.search(r"\[\[[^]]+<\|im_end\|>\]\]", capsys.readouterr().out)  # a response and its stop token


def test_settings_are_printed(project: Sft, capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = commands("sft train --cfg")
    assert project(*words(line)[1:]) == 0
    assert "global_batch_size: null\n" in capsys.readouterr().out
    assert [path.name for path in project.folder.glob("runs/*")] == ["demo-base"]


@pytest.mark.xdist_group("finished run")
@pytest.mark.parametrize("line", commands(FINISHED))
def test_finished_run(
    line: str, sft: Sft, finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(finished)
    _, command, *rest = words(line)
    assert sft(command, *rest, *(["max_new_tokens=4"] if command == "generate" else [])) == 0
    printed = capsys.readouterr().out
    if command == "compare":
        named = [word for word in rest if "=" not in word]
        name = named[0].replace("runs/gsm8k-*", "NAME") if named else "NAME"
        assert re.search(rf"^{name} +finished +2/2 +\d\.\d{{4}}", printed, re.M)
    elif command == "runs":
        assert re.search(r"^NAME +finished +2/2 ", printed, re.M)
    elif command == "watch":
        assert re.search(r"^\w+  finished  on .*\n━+  2/2  100%  took ", printed)
    elif "file=prompts.txt" in rest:
        assert json.loads(printed)["prompt"] == "Reverse abc."
    elif command == "generate":
        assert printed.endswith("\n")
    elif command == "score":
        scores = [json.loads(score) for score in Path("scores.jsonl").read_text().splitlines()]
        assert len(scores) == len(Path("my.jsonl").read_text().splitlines())
        assert all(score["log_p_response"] < 0 for score in scores)
    elif command == "export":
        output = Path(rest[-1].removeprefix("output="))
        weights = "adapter_model.safetensors" if "merge=false" in rest else "model.safetensors"
        assert (output / weights).exists() and (output / "tokenizer.json").exists()
        assert json.loads((output / "verified.json").read_text())["equal"]


@pytest.mark.xdist_group("finished run")
def test_folder_of_a_finished_run(finished: Path) -> None:
    tree = re.search(r"```\nruns/NAME/\n(.*?)```", PAGES[ROOT / "docs" / "runs.md"], re.S)
    assert tree
    named = set(re.findall(r"^  (\S+?)/? ", tree[1], re.M))
    there = {re.sub(r"^(.sft-lease-)\d+$", r"\1N", path.name) for path in (finished / "runs" / "NAME").iterdir()}
    assert named - {"logs", "crash-TIME.txt"} == there


@pytest.mark.xdist_group("certificate")  # their ranks are forked from one server
@pytest.mark.parametrize("line", commands("sft certify"))
def test_certificate(line: str, project: Sft, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def one(quick: bool, precision: str, device: str, most_ranks: int) -> list[cells.Cell]:
        return [cells.Cell("single", 1, 2, True, False, "adamw", precision, device)]

    monkeypatch.setattr(cells, "all_cells", one)
    assert project("certify", *arguments(line, model_folder), "data.max_length=256", "data.num_workers=1") == 0
    (page,) = project.folder.glob("certificates/*/certificate.md")
    assert page.read_text().startswith("# Certificate passed: 1 of 1 cells pass\n")


@pytest.mark.parametrize("line", commands(SLURM))
def test_slurm(line: str) -> None:
    if line.startswith("slurm/local-cluster"):
        verb, *rest = words(line)[1:]
        subprocess.run([ROOT / "slurm" / "local-cluster", verb, "--help"], check=True, capture_output=True)
        if rest[:1] != ["sft"]:
            return
        line = shlex.join(rest)
    command, *rest = words(line)
    if command == "sbatch":
        (script,) = (word for word in rest if word.startswith("slurm/"))
        assert (ROOT / script).exists()
        settings, name = rest[rest.index(script) + 1 :], "export" if "export" in script else "train"
    else:
        settings, name = rest[rest.index("--") + 1 if "--" in rest else 1 :], "train"
    with initialize_config_dir(str(CONF), version_base="1.3"):
        compose(name, [re.sub(",.*", "", setting) for setting in settings])  # of a sweep the first


@pytest.mark.parametrize("line", commands(LAUNCHERS))
def test_launcher(line: str) -> None:
    launcher, *rest = words(line)
    at = rest.index("sft")
    assert rest[at + 1] == "train" and (launcher == "srun" or rest[at - 1] == "-m")
    options = dict(option.split("=") for option in rest[:at] if "=" in option)
    per_node, nodes = (("nproc-per-node", "nnodes"), ("ntasks-per-node", "nodes"))[launcher == "srun"]
    num_nodes = int(options.get(f"--{nodes}", 1))
    num_devices = int(options[f"--{per_node}"])
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("train", rest[at + 2 :])
    started = Launch(launcher, num_devices * num_nodes, num_nodes=num_nodes)
    assert devices_and_nodes(config, started) == (num_devices, num_nodes)


@pytest.mark.parametrize("command", sorted({words(line)[1] for line in commands("scripts/bench ")}))
def test_benchmark(command: str, tmp_path: Path) -> None:
    bench = [python().executable, ROOT / "scripts" / "bench", command, "--quick"]
    if command == "checkpoint":  # its ranks are run by tests/test_benchmarks.py
        shown = subprocess.run([*bench, "--help"], check=True, capture_output=True, text=True).stdout
        assert shown.startswith("usage: scripts/bench checkpoint ")
        return
    bench += [*BENCHMARKS[command], "--json", tmp_path / "results.json"]
    ended = subprocess.run(bench, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    if command == "train":
        (run,) = results["packed"]["runs"]["project"]
        assert run["losses"][-1] < run["losses"][0]
    elif command == "data":
        assert results["plan"]["num_packs"] == results["plan"]["fewest_packs"]
    elif command == "tracking":
        assert results["ratios"].keys() == results["median_ratios"].keys() >= {"tokens_per_second", "wall"}
    elif command == "start":
        assert results["median"]["start"] > results["median"]["compare"] > 0
    elif command == "apart":
        packed, apart = (results["runs"][name][0]["tokens_per_second"] for name in ("packed", "apart"))
        assert results["slower"] == packed / apart
    else:
        num_bytes = 4 * results["model"]["weights"]
        assert results["strategies"]["ddp"]["bytes_sent"] / num_bytes == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize("line", [line for line in commands("scripts/bench ") if "--gpu" in line])
def test_benchmark_on_a_gpu(line: str, tmp_path: Path) -> None:
    # Its arguments are accepted, and without a GPU it says so.
    bench = [sys.executable, ROOT / "scripts" / "bench", *words(line)[1:]]
    ended = subprocess.run(bench, env={"PATH": str(tmp_path)}, capture_output=True, text=True)
    assert ended.stderr == "scripts/bench: nvidia-smi finds no GPU here: leave out --gpu\n"


@pytest.mark.parametrize("line", commands("scripts/gpu"))
def test_gpu(line: str) -> None:
    gpu = [sys.executable, ROOT / "scripts" / "gpu", *words(line)[1:], "--list"]
    listed = [row.split()[0] for row in subprocess.run(gpu, capture_output=True, text=True).stdout.splitlines()]
    named = [word for word in words(line)[1:] if not word.startswith("-") and word not in ("900", "results")]
    assert listed and (not named or listed == named)
    assert "scripts/gpu --cpu" in (ROOT / ".ci" / "run").read_text()


def test_readme_is_one_screen_and_names_no_folder_of_ours() -> None:
    assert len(PAGES[ROOT / "README.md"].splitlines()) <= 110
    assert [line for line in COMMANDS if "../" in line] == []


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_a_page_is_a_question_and_starts_with_a_command(page: Path) -> None:
    assert re.match(r"# [A-Z].*\?\n\n```bash\n", PAGES[page])
    assert f"docs/{page.name}" in PAGES[ROOT / "README.md"]


def test_every_link_leads_somewhere() -> None:
    broken = []
    for page, text in LINKED.items():
        for path, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]+))?\)", text):
            target = page.parent / path if path else page
            if not target.exists() or (anchor and anchor not in anchors(target)):
                broken.append(f"{page.name}: {path}#{anchor}")
    assert broken == []


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_file_that_is_named_exists() -> None:
    folders = "src|tests|conf|docs|slurm|scripts"
    named = {path for text in LINKED.values() for path in re.findall(rf"`((?:{folders})/[^`*\s]*)[`\s]", text)}
    assert len(named) > 20
    own = {"conf/local/", "conf/local/default.yaml"}
    assert {path for path in named if not (ROOT / path).exists()} - own == set()


def test_settings_have_the_values_that_the_tables_give() -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        plain, lora = (compose("train", settings, return_hydra_config=True) for settings in ([], ["adapter=lora"]))
    for page, config, least in (("runs.md", plain, 10), ("adapters.md", lora, 4)):
        table = re.findall(r"^\| `([\w.]+)=([^`]+)` \|", PAGES[ROOT / "docs" / page], re.M)
        assert len(table) >= least
        choices = config.hydra.runtime.choices
        values = {name: choices.get(name, OmegaConf.select(config, name)) for name, _ in table}
        assert {name: "null" if value is None else str(value).lower() for name, value in values.items()} == dict(table)


def test_packages_are_listed_in_the_order_of_the_import_contract() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = (contract["layers"] for contract in contracts if contract["type"] == "layers")
    _, table = PAGES[ROOT / "docs" / "how-it-works.md"].split("| in `src/sft/` |")
    rows = [re.findall(r"`(\w+)(?:/|\.py)`", row.split("|")[1]) for row in re.findall(r"^\| `.*$", table, re.M)]
    assert rows == [re.findall(r"sft\.(\w+)", layer) for layer in layers]
    assert {name for row in rows for name in row} == {
        path.stem for path in (ROOT / "src" / "sft").iterdir() if not path.name.startswith("__")
    }
