"""The README's commands, run as they stand there, and what they leave held against llama.cpp."""

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from llama_cpp import LlamaCpp

from lumen.config import load_config
from lumen.demo.__main__ import Exam
from lumen.demo.__main__ import main as demo
from lumen.sampling import generate
from lumen.source import find_source
from lumen.text.tokenizer import load_tokenizer
from lumen.text.turns import question_ids

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text("utf-8")
pytestmark = pytest.mark.xdist_group("readme")  # one worker: the runs are shared


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the README's shell commands were run, one after another."""
    folder = tmp_path_factory.mktemp("readme")
    [commands] = blocks("sh")
    said = {}
    for command in commands.strip().splitlines():
        python, *arguments = shlex.split(command)
        assert python == "python"
        done = subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        said[arguments[1]] = done.stdout
    (folder / "said.json").write_text(json.dumps(said))
    return folder


def test_the_commands_leave_what_the_readme_names(folder):
    run = {path.name for path in (folder / "runs/lumen-demo").iterdir()}
    for name in re.search(r"The run's folder holds (.*?)Ctrl-C", README, re.DOTALL)[1].split("`")[1::2]:
        assert name.rstrip("/") in run, name
    exported = {path.name for path in (folder / "exported").iterdir()}
    assert exported == {"lumen-demo-f16.gguf", "lumen-demo-q8_0.gguf", "Modelfile", "README.md"}


def test_the_fine_tuned_model_answers_the_readmes_order_in_json(folder):
    said = json.loads((folder / "said.json").read_text())["lumen.chat"]
    assert json.loads(said) == {"name": "Anna", "item": "latte", "size": "large", "count": 2, "extra": "oat milk"}


@pytest.fixture(scope="module")
def answers(folder):
    """Ids of prompts and greedy answers of forty held-out orders, by the merged model."""
    source = find_source(str(folder / "runs/lumen-demo"))
    model, tokenizer = source.load()
    prompts = [question_ids(order, tokenizer) for order in Exam.read().orders[:40]]
    return prompts, [answer.ids for answer in generate(model, prompts, max_tokens=64, stop_ids=tokenizer.stop_ids)]


@pytest.mark.parametrize("quant", ["f16", "q8_0"])
def test_llama_cpp_gives_the_same_greedy_answers(folder, answers, quant):
    llama = LlamaCpp(folder / f"exported/lumen-demo-{quant}.gguf")
    llama_ends = {id for id in range(1536) if llama.is_eog(id)}
    for prompt, answer in zip(*answers, strict=True):
        assert answer[-1] in llama_ends and llama.generate(prompt, 64) == answer[:-1]  # it stops where we do


def test_llama_cpps_tokenizer_gives_the_demos_ids_on_its_chats_and_on_all_golden_texts(folder, shared_data):
    llama = LlamaCpp(folder / "exported/lumen-demo-q8_0.gguf", vocab_only=True)
    tokenizer = load_tokenizer(folder / "runs/lumen-demo/adapter")
    exam = Exam.read()
    lines = (shared_data / "tokenizers/goldens.jsonl").read_text("utf-8").splitlines()
    golden = [json.loads(line)["text"] for line in lines]
    assert len(golden) == 106
    for text in [*exam.orders, *exam.wanted, *golden, "<|start_header_id|>user<|end_header_id|>\n\nCafé  №5\t ok"]:
        assert llama.tokenize(text, add_special=False, parse_special=True) == tokenizer.encode(text)
    assert all(llama.is_eog(id) for id in tokenizer.stop_ids)


def test_the_library_example_runs(tmp_path):
    [code] = blocks("python")
    assert len(code.strip().splitlines()) <= 11
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["name"] == "Anna"
    assert {"merged", "model-q8_0.gguf", "Modelfile", "runs"} <= {path.name for path in tmp_path.iterdir()}


def test_the_demo_counts_what_the_readme_says(tmp_path, capsys):
    assert demo(["--folder", str(tmp_path / "demo"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["orders"] == 200
    assert result["right_before"] == 0, "the README says: 0 before"
    assert result["right_after"] >= 190 and result["right_merged"] >= 190
    assert result["finetune_seconds"] > 0
    for path in (result["folder"], result["merged"], result["modelfile"], *result["gguf"]):
        assert Path(path).exists()


@pytest.mark.parametrize("block", blocks("toml"), ids=lambda block: block.partition("\n")[0])
def test_the_readmes_run_files_say_what_a_run_understands(tmp_path, block):
    (tmp_path / "run.toml").write_text(block)
    missing = {"model.path": "lumen-demo", "data.train": "lumen-demo"}
    said = {f"{section}.{key}" for section, values in tomllib.loads(block).items() for key in values}
    load_config(tmp_path / "run.toml", [f"{key}={value}" for key, value in missing.items() if key not in said])


def test_every_verb_has_help():
    for verb in ("train", "inspect", "chat", "export", "doctor", "demo"):
        command = [sys.executable, "-m", f"lumen.{verb}", "--help"]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"COLUMNS": "100"})
        assert done.returncode == 0 and "usage: python -m lumen." in done.stdout


def test_the_tests_that_the_readme_names_exist():
    for path in re.findall(r"`(tests/[\w/.]+)`", README):
        assert (ROOT / path).exists(), path
