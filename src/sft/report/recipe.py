"""The recipe as it really was, and how to make the run again; without what is secret."""

import json
import shlex
from collections.abc import Callable, Mapping
from typing import Any

import yaml

from sft.config.check import shown
from sft.report.folder import Folder
from sft.report.html import code, escaped, figure, more, pairs, table
from sft.runs.identity import deciding
from sft.runs.secrets import of_code, redacted

Clean = Callable[[object], str]
WORDS = {  # of recipe.json, in this order; what else is in it follows under its own name
    "device": "device",
    "num_ranks": "ranks",
    "num_nodes": "nodes",
    "strategy": "strategy",
    "precision": "precision",
    "weights_dtype": "weights",
    "attention": "attention",
    "samples": "samples",
    "num_parameters": "parameters",
    "num_trained_parameters": "trained parameters",
    "optimizer": "optimizer",
    "global_batch_size": "packs a step",
    "micro_batch_size": "packs of a rank at once",
    "accumulation": "accumulation",
    "pack_length": "tokens of a pack",
    "tokens_per_step": "tokens a step, mean",
    "supervised_tokens_per_step": "supervised tokens a step, mean",
    "num_steps": "steps",
    "gradient_checkpointing": "gradient checkpointing",
    "compile": "compiled",
    "flops_per_token": "FLOPs a token",
    "peak_flops": "peak FLOP/s of a device",
}


def cleaner(folder: Folder) -> Clean:
    """Text without the values of settings whose names say that they are secret."""
    return lambda text: redacted(str(text), folder.config)


def recipe(folder: Folder, clean: Clean) -> str:
    """What the run really did, what differs from the default, and the whole configuration."""
    found = folder.recipe
    items = [(word, _value(found[key], clean)) for key, word in WORDS.items() if found.get(key) not in (None, "", [])]
    items += [
        (key.replace("_", " "), _value(value, clean))
        for key, value in found.items()
        if key not in WORDS and key not in ("changed", "hosts") and not isinstance(value, dict) and value is not None
    ]
    parts = [pairs(items) if items else ""]
    changed = found.get("changed")
    if isinstance(changed, dict):
        pairs_of = {name: value for name, value in changed.items() if isinstance(value, list) and len(value) == 2}
        rows = [_setting(name, [before, after], clean) for name, (before, after) in pairs_of.items()]
        parts.append("<h3>What differs from the default</h3>")
        parts.append(table(("setting", "default", "here"), rows) if rows else "<p>Nothing.</p>")
    elif folder.config:
        rows = [_setting(name, [value], clean) for name, value in deciding(folder.config).items() if value is not None]
        parts.append(more("Settings that decide the numbers", table(("setting", "value"), rows)))
    if folder.config:
        text = clean(yaml.safe_dump(dict(folder.config), sort_keys=False))
        parts.append(more("The whole configuration", code(text)))
    return "".join(parts)


def _setting(name: str, values: list[object], clean: Clean) -> list[str]:
    # With its name before it, so that a secret one is seen to be one.
    cells = [clean(f"{name}={shown(value)}").partition("=")[2] for value in values]
    return [f"<code>{escaped(name)}</code>", *(f"<code>{escaped(cell[:300])}</code>" for cell in cells)]


def _value(value: object, clean: Clean) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if value < 1e12 else figure(value, 3)
    if isinstance(value, float):
        return figure(value)
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return escaped(clean(text)[:300])


def command(folder: Folder, clean: Clean) -> str:
    """The command that the run was begun with, as one types it."""
    words = [str(word) for word in folder.provenance.get("command") or []]
    if not words:
        return ""
    return clean(shlex.join(["sft", *words[1:]]))


def again(folder: Folder, clean: Clean) -> str:
    """How to make the run again: command, code, versions, seed, data and model."""
    known = folder.provenance
    if not known:
        return ""
    parts = [code(command(folder, clean))] if known.get("command") else []
    versions: Mapping[str, Any] = known.get("versions") or {}
    diff = known.get("uncommitted_diff") or ""
    commit = escaped(known.get("commit") or "")
    parts.append(
        pairs(
            [
                ("commit", f"<code>{commit}</code>{' and the changes below' if diff else ''}" if commit else ""),
                ("seed", escaped(folder.config.get("seed", ""))),
                ("begun", escaped(known.get("started", ""))),
                ("Python", escaped(known.get("python", ""))),
                ("versions", ", ".join(escaped(f"{name} {number}") for name, number in versions.items())),
                ("data", _fingerprints(known.get("data") or {})),
                ("day in the template", escaped(known.get("today") or "")),
            ]
        )
    )
    if model := known.get("model"):
        files = [(part, name, value) for part, of_part in model.items() for name, value in of_part.items()]
        rows = [(f"{part}: {name}", f"<code>{escaped(value)}</code>") for part, name, value in files]
        parts.append(more("Fingerprints of the model's files", pairs(rows)))
    if diff:
        parts.append(more("Uncommitted changes of the code", code(of_code(diff, folder.config)[:100_000])))
    return "".join(parts)


def _fingerprints(data: Mapping[str, Any]) -> str:
    return "<br>".join(f"{escaped(split)} <code>{escaped(value)}</code>" for split, value in data.items())


def use(folder: Folder, clean: Clean) -> str:
    """Commands and a snippet for the exported model."""
    name = shlex.quote(folder.name)
    runs_dir = folder.config.get("runs_dir", "runs")
    elsewhere = "" if runs_dir == "runs" else f" runs_dir={shlex.quote(str(runs_dir))}"
    export = folder.run.export
    if not folder.verified:
        if folder.state != "finished":
            return "<p>The model is exported once the run has finished; a checkpoint before that by</p>" + code(
                f"sft export run={name} checkpoint=last{elsewhere}"
            )
        return "<p>Nothing is exported yet:</p>" + code(f"sft export run={name}{elsewhere}")
    adapter = (export / "adapter_config.json").exists()
    loads, module = ("AutoPeftModelForCausalLM", "peft") if adapter else ("AutoModelForCausalLM", "transformers")
    imports = (
        f"from {module} import {loads}\nfrom transformers import AutoTokenizer"
        if adapter
        else (f"from transformers import {loads}, AutoTokenizer")
    )
    prompt = folder.answers[-1]["prompt"] if folder.answers and len(folder.answers[-1]["prompt"]) < 200 else "..."
    conversation = (folder.config.get("data") or {}).get("conversation") or {}
    plain = conversation.get("chat") is False or str(conversation.get("_target_", "")).endswith(".text")
    asks = f"inputs = tokenizer({json.dumps(prompt, ensure_ascii=False)}, return_tensors=\"pt\")" if plain else (
        f'messages = [{{"role": "user", "content": {json.dumps(prompt, ensure_ascii=False)}}}]\n'
        'inputs = tokenizer.apply_chat_template(\n'
        '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True\n'
        ')'
    )  # fmt: skip
    snippet = f"""{imports}

folder = {json.dumps(str(export), ensure_ascii=False)}
tokenizer = AutoTokenizer.from_pretrained(folder)
model = {loads}.from_pretrained(folder)
{asks}
output = model.generate(**inputs, max_new_tokens=128)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))"""
    checked = folder.verified
    verified = (
        f"<p>Step {escaped(checked.get('step', '?'))} is in <code>{escaped(export)}</code>. It was loaded again in a "
        f"fresh process: the log-probabilities of {escaped(checked.get('num_tokens', '?'))} tokens differ from the "
        f"trained model's by at most {figure(checked.get('largest_difference'), 2)}.</p>"
    )
    return verified + code(f'sft generate run={name} --prompt "..."{elsewhere}') + code(clean(snippet))
