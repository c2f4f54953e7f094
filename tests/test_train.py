"""The loop: what must not depend on how a step is split, packed or interrupted, and what stops it."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import llama, relative_error

from lumen.adapter import attach_lora
from lumen.checkpoint import load_model
from lumen.config import Lora, load_config
from lumen.data.batch import batches, stack
from lumen.data.packing import pack
from lumen.errors import CheckpointError, ConfigError, DataError, LumenError, SpecError
from lumen.objectives.sft import SFT, mean_loss, sft_loss
from lumen.run import Run
from lumen.source import find_source
from lumen.text.conversation import Encoded
from lumen.train import finetune, main, prepare

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny random model with a byte-level tokenizer of its own."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    folder = tmp_path_factory.mktemp("base")
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        ["one two three"], trainers.BpeTrainer(vocab_size=270, special_tokens=special, initial_alphabet=alphabet)
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": TEMPLATE, "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    llama(folder, vocab_size=tokenizer.get_vocab_size(), bos_token_id=0, eos_token_id=1)
    return folder


@pytest.fixture
def chats(tmp_path):
    """Twelve conversations of unequal length."""
    rows = [
        {"messages": [{"role": "user", "content": f"say {'x' * n}"}, {"role": "assistant", "content": "x" * n}]}
        for n in range(1, 13)
    ]
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def config(base, chats, folder, *overrides):
    source = folder.with_suffix(".toml")
    source.write_text(
        f'[model]\npath = "{base}"\nnf4 = false\n[lora]\nrank = 4\n[data]\ntrain = "{chats}"\nmax_length = 64\n'
        f"[train]\nsteps = 6\nbatch_size = 2\nlr = 1e-2\n"
        f'[output]\nfolder = "{folder}"\n'
    )
    return load_config(source, overrides)


def losses(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def test_a_run_leaves_every_file_of_the_contract(base, chats, tmp_path):
    folder = tmp_path / "run"
    overrides = ('sample.prompts=["say xx"]', "data.eval_fraction=0.25", "train.eval_every=3", "train.save_every=2")
    summary = finetune(config(base, chats, folder, *overrides))
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {
        "config.toml", "metrics.jsonl", "samples.jsonl", "loss.png", "report.html", "summary.json",
        "adapter/adapter_config.json", "adapter/adapter_model.safetensors",
        "adapter/tokenizer.json", "adapter/tokenizer_config.json",
        "checkpoints/step-6/manifest.json", "checkpoints/step-4/manifest.json",
    } <= found  # fmt: skip
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    wanted = {"step", "tokens", "loss", "learning_rate", "grad_norm", "tokens_per_s", "peak_memory_bytes"}
    assert all(wanted <= set(line) for line in lines if "loss" in line)
    assert [line["step"] for line in lines if "eval_loss" in line] == [0, 3, 6]
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert [sample["step"] for sample in samples] == [0, 6]
    assert summary["status"] == "done" and summary["steps"] == 6
    assert summary["final_eval_loss"] == lines[-1]["eval_loss"] < summary["first_eval_loss"]


@pytest.mark.parametrize(
    "split", [("train.batch_size=4", "train.accumulate=1"), ("train.batch_size=1", "train.accumulate=4")]
)
def test_a_step_split_into_micro_batches_has_the_same_loss_and_gradient(base, chats, tmp_path, split):
    finetune(config(base, chats, tmp_path / "one", "train.batch_size=2", "train.accumulate=2"))
    finetune(config(base, chats, tmp_path / "two", *split))
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "two"), rel=1e-5)


def examples(lengths):
    random = torch.Generator().manual_seed(8)
    ids = [torch.randint(3, 250, (length,), generator=random).tolist() for length in lengths]
    return [Encoded(ids=each, learn=[False] * (len(each) // 3) + [True] * (len(each) - len(each) // 3)) for each in ids]


def test_packed_rows_have_the_loss_and_the_gradients_of_the_documents_one_by_one(base):
    model = load_model(base)
    pairs = attach_lora(model, Lora(rank=2))
    with torch.no_grad():
        for pair in pairs.values():
            pair.b.normal_(0, 0.1)
    results = []
    for packing in (True, False):
        rows = pack(examples([5, 30, 12, 3, 21, 9]), 40, packing=packing).rows
        model.zero_grad()
        total = count = 0
        for batch in batches(rows, 2):
            loss = sft_loss(model, batch)
            loss.total.backward()
            total, count = total + loss.total.item(), count + loss.count.item()
        results.append((total, count, torch.cat([pair.b.grad.flatten() for pair in pairs.values()])))
    (total, count, gradient), (other_total, other_count, other_gradient) = results
    assert count == other_count
    assert total == pytest.approx(other_total, rel=1e-5)
    assert relative_error(gradient, other_gradient) < 1e-5


def test_padding_does_not_change_the_loss(base):
    model = load_model(base)
    short, long = examples([7, 38])
    alone = sft_loss(model, stack([[short]])).total + sft_loss(model, stack([[long]])).total
    torch.testing.assert_close(sft_loss(model, stack([[short], [long]])).total, alone)


@pytest.mark.parametrize("step", [1, 3, 5])
@pytest.mark.parametrize("changes", [("lora.dropout=0.2",), ("train.method=full", "train.accumulate=2")])
def test_a_run_resumed_at_any_step_is_the_uninterrupted_run_bit_for_bit(base, chats, tmp_path, step, changes):
    finetune(config(base, chats, tmp_path / "whole", *changes))
    overrides = [*changes, "train.save_every=1", "train.keep_checkpoints=9"]
    finetune(config(base, chats, tmp_path / "cut", *overrides))
    for later in range(step + 1, 7):
        checkpoint = tmp_path / f"cut/checkpoints/step-{later}"
        for file in checkpoint.iterdir():
            file.unlink()
        checkpoint.rmdir()
    finetune(config(base, chats, tmp_path / "cut", *overrides), resume=True)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    result = "model/model.safetensors" if "train.method=full" in changes else "adapter/adapter_model.safetensors"
    resumed, wanted = load_file(tmp_path / "cut" / result), load_file(tmp_path / "whole" / result)
    assert all(torch.equal(resumed[name], wanted[name]) for name in wanted)


def test_a_run_past_its_last_step_is_not_resumed_and_stays_as_it_was(base, chats, tmp_path, capsys):
    folder = tmp_path / "run"
    finetune(config(base, chats, folder, "train.steps=3"))
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert main([str(folder), "train.steps=2", "--resume"]) == 2
    assert "3 steps are done already, and 2 are asked for" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_run_is_no_adapter_but_holds_one(base, chats, tmp_path):
    finetune(config(base, chats, tmp_path / "first", "train.steps=1"))
    with pytest.raises(ConfigError, match=r"is a run's folder\. Its adapter is there: lora.adapter=.*first/adapter"):
        finetune(config(base, chats, tmp_path / "second", f"lora.adapter={tmp_path / 'first'}"))


def test_a_path_is_no_configuration(base, chats, tmp_path):
    with pytest.raises(ConfigError, match="wanted a RunConfig, found 'run\\.toml'"):
        finetune("run.toml")


def test_a_bound_that_binds_nothing_is_told(base, chats, tmp_path, capsys):
    finetune(config(base, chats, tmp_path / "run", "train.memory_gib=2", "train.steps=1", "model.device=cpu"))
    assert "train.memory_gib = 2 bounds the memory of a GPU" in capsys.readouterr().err


def test_the_config_of_a_run_repeats_it(base, chats, tmp_path):
    finetune(config(base, chats, tmp_path / "first"))
    finetune(load_config(tmp_path / "first", [f"output.folder={tmp_path / 'second'}"]))
    assert losses(tmp_path / "first") == losses(tmp_path / "second")


def test_sigint_finishes_the_step_saves_everything_and_resume_continues(base, chats, tmp_path):
    folder = tmp_path / "run"
    source = config(base, chats, folder, "train.steps=4000").output.folder
    command = [sys.executable, "-m", "lumen.train", str(folder.with_suffix(".toml")), "train.steps=4000"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (folder / "metrics.jsonl").exists() or len(losses(folder)) < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "--resume" in said
    stopped = losses(folder)
    assert (folder / f"checkpoints/step-{len(stopped)}/manifest.json").exists()
    assert json.loads((folder / "summary.json").read_text())["status"] == "stopped"
    assert find_source(source).adapter == folder / "adapter"
    steps = len(stopped) + 2
    assert main([str(folder), f"train.steps={steps}", "--resume"]) == 0
    assert losses(folder)[: len(stopped)] == stopped and len(losses(folder)) == steps


def test_a_loss_that_is_not_finite_stops_before_the_optimizer_moves_and_names_the_batch(
    base, chats, tmp_path, monkeypatch
):
    folder = tmp_path / "run"
    real, calls = SFT.loss, []

    def poisoned(self, model, batch):
        calls.append(batch)
        loss = real(self, model, batch)
        return loss if len(calls) < 3 else type(loss)(total=loss.total * float("nan"), count=loss.count)

    monkeypatch.setattr(SFT, "loss", poisoned)
    with pytest.raises(LumenError, match=r"Step 3: the loss is nan.*chats\.jsonl:\d+.*train\.lr"):
        finetune(config(base, chats, folder))
    assert len(losses(folder)) == 2
    assert not (folder / "adapter").exists()


def test_a_first_step_that_does_not_fit_leaves_the_folder_free_for_the_corrected_command(
    base, chats, tmp_path, monkeypatch, capsys
):
    def exceeding(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    folder, real = tmp_path / "run", SFT.loss
    config(base, chats, folder)
    monkeypatch.setattr(SFT, "loss", exceeding)
    assert main([str(folder.with_suffix(".toml"))]) == 1
    said = capsys.readouterr().err
    assert re.search(r"^error: The GPU's memory does not suffice for a pass over 2 rows x \d+ tokens", said, re.M)
    assert not folder.exists()
    monkeypatch.setattr(SFT, "loss", real)
    finetune(config(base, chats, folder, "train.batch_size=1", "train.steps=1"))


def test_weights_that_do_not_fit_are_told_as_such(base, chats, tmp_path, monkeypatch):
    def exceeding(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr("lumen.loading.load_model", exceeding)
    with pytest.raises(LumenError, match=r"the model and what it learns with.*model\.nf4=true"):
        finetune(config(base, chats, tmp_path / "run"))


def test_sigint_while_data_is_encoded_stops_at_once_and_leaves_no_process_and_no_folder(base, chats, tmp_path):
    chats.write_text((chats.read_text() + "\n") * 10_000)  # half a minute of work for two processes
    folder = tmp_path / "run"
    config(base, chats, folder)
    command = [sys.executable, "-m", "lumen.train", str(folder.with_suffix(".toml")), "data.workers=2"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)

    def workers():
        listed = subprocess.run(["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True, check=True).stdout
        rows = [line.split(maxsplit=2) for line in listed.splitlines()]
        return [row[0] for row in rows if row[1] == str(process.pid) and "lumen.objectives.encoding" in row[2]]

    deadline = time.monotonic() + 60
    while len(started := workers()) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=15)
    assert process.returncode == 1 and "stopped before the first step" in said and "Traceback" not in said
    alive = subprocess.run(["ps", "-o", "pid=", "-p", ",".join(started)], capture_output=True, text=True).stdout
    assert not alive.strip() and not folder.exists()


def test_an_evaluation_leaves_dropout_as_it_was(base):
    model = load_model(base).train()
    mean_loss(model, pack(examples([9, 9]), 20), 1)
    assert model.training


# What a user can get wrong --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"messages": [', r"chats\.jsonl:1"),
        ("", "chats.jsonl"),
        ('{"messages": [{"role": "user", "content": "hi"}]}', "chats.jsonl:1"),
        ('{"words": 3}', "words"),
        ('{"prompt": "a", "completion": ""}', "chats.jsonl:1"),
    ],
)
def test_bad_data_is_refused_with_file_and_line_before_any_step(base, tmp_path, text, words):
    path = tmp_path / "chats.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match=words):
        finetune(config(base, path, tmp_path / "run"))


def test_data_in_which_nothing_is_learned_is_refused(base, tmp_path):
    path = tmp_path / "chats.jsonl"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]
    path.write_text(json.dumps({"messages": turns}))
    with pytest.raises(DataError, match=r"learned"):
        finetune(config(base, path, tmp_path / "run"))


def test_a_failed_start_leaves_the_folder_free_for_the_corrected_command(base, chats, tmp_path):
    with pytest.raises(DataError):
        finetune(config(base, tmp_path / "nothing.jsonl", tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    assert finetune(config(base, chats, tmp_path / "run"))["status"] == "done"


def test_changed_data_is_not_resumed_as_if_it_were_the_same(base, chats, tmp_path):
    finetune(config(base, chats, tmp_path / "run"))
    chats.write_text(chats.read_text().replace("say xx", "say yy"))
    with pytest.raises(CheckpointError, match=r"the encoded data was .* is"):
        finetune(config(base, chats, tmp_path / "run", "train.steps=8"), resume=True)
    assert len(losses(tmp_path / "run")) == 6


def test_a_run_without_a_whole_checkpoint_is_not_begun_anew(base, chats, tmp_path):
    finetune(config(base, chats, tmp_path / "run"))
    with (tmp_path / "run/checkpoints/step-6/weights.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(CheckpointError, match="no checkpoint is whole"):
        finetune(config(base, chats, tmp_path / "run"), resume=True)
    assert len(losses(tmp_path / "run")) == 6


def test_an_evaluation_that_diverges_says_so_and_loses_no_checkpoint(base, chats, tmp_path):
    wild = ("train.steps=1", "train.lr=1e30", "train.warmup_fraction=0", "data.eval_fraction=0.25")
    with pytest.raises(LumenError, match=r"evaluation loss after step 1 is .*diverged"):
        finetune(config(base, chats, tmp_path / "run", *wild))
    assert (tmp_path / "run/checkpoints/step-1/manifest.json").exists()


def test_full_fine_tuning_in_bf16_learns_fp32_masters_of_the_files_values(base, chats, tmp_path):
    told = config(base, chats, tmp_path / "run", "train.method=full", "model.dtype=bfloat16")
    model = prepare(told, Run.create(tmp_path / "run", told), None).model
    assert model.dtype == torch.bfloat16
    stored = load_file(base / "model.safetensors")["model.norm.weight"]
    assert model.norm.weight.dtype == torch.float32 and torch.equal(model.norm.weight, stored)


def test_float16_gradients_do_not_vanish_in_the_division_by_the_token_count(base, chats, tmp_path):
    finetune(config(base, chats, tmp_path / "half", "model.dtype=float16"))
    finetune(config(base, chats, tmp_path / "full"))
    assert losses(tmp_path / "half") == pytest.approx(losses(tmp_path / "full"), rel=2e-2)


def copy_of(base, folder, **changes):
    folder.mkdir()
    for file in base.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | changes))
    return folder


def test_what_could_not_be_saved_is_refused_before_training(base, chats, tmp_path):
    odd = copy_of(base, tmp_path / "base", dtype="float64")
    with pytest.raises(SpecError, match="torch_dtype is 'float64'"):
        finetune(config(odd, chats, tmp_path / "run", "train.method=full"))


def test_a_token_without_a_row_in_the_embedding_is_refused(base, chats, tmp_path):
    llama(tmp_path / "small", vocab_size=100)
    odd = copy_of(base, tmp_path / "base", vocab_size=100)
    (odd / "model.safetensors").write_bytes((tmp_path / "small/model.safetensors").read_bytes())
    with pytest.raises(DataError, match=r"chats\.jsonl:\d+: holds the token \d+, but .* has 100 rows"):
        finetune(config(odd, chats, tmp_path / "run"))


def test_overrides_may_follow_flags(base, chats, tmp_path):
    config(base, chats, tmp_path / "run")
    assert main([str(tmp_path / "run.toml"), "--json", "train.steps=2"]) == 0
    assert len(losses(tmp_path / "run")) == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["lora.rank=0"], "lora.rank"),
        (["lora.rnak=8"], "Did you mean 'rank'"),
        (["train.lr=fast"], "train.lr"),
        (["lora.targets=[\"attn.w\"]"], "names no linear layer"),
        (["model.path=/nowhere"], "/nowhere"),
        (["model.device=cuda"], "GPU"),
        (["data.chat_template=/nowhere.jinja"], "data.chat_template: /nowhere.jinja cannot be read"),
        (["output.folder=/dev/null/run"], "cannot be made"),
    ],
)  # fmt: skip
def test_the_command_line_says_what_is_wrong_and_exits_with_2_or_1(base, chats, tmp_path, arguments, words, capsys):
    if arguments == ["model.device=cuda"] and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    config(base, chats, tmp_path / "run")
    code = main([str(tmp_path / "run.toml"), *arguments])
    said = capsys.readouterr().err
    assert code == (1 if "model.path" in arguments[0] else 2)
    assert said.startswith("error: ") or "\nerror: " in said
    assert words in said and "Traceback" not in said


def test_a_run_folder_in_use_is_refused_and_left_alone(base, chats, tmp_path):
    finetune(config(base, chats, tmp_path / "run"))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    with pytest.raises(ConfigError, match="--resume"):
        finetune(config(base, chats, tmp_path / "run"))
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}


def test_a_truncated_base_is_refused(base, chats, tmp_path):
    copy = tmp_path / "base"
    copy.mkdir()
    for file in base.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    weights = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(weights[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        finetune(config(copy, chats, tmp_path / "run"))


def test_list_show_and_schema_answer_without_a_run(capsys):
    assert main(["--list"]) == 0 and "lumen-demo" in capsys.readouterr().out
    assert main(["--show", "lumen-demo"]) == 0 and "[lora]" in capsys.readouterr().out
    assert main(["--schema"]) == 0 and json.loads(capsys.readouterr().out)["$defs"]
    assert main([]) == 2 and "--list" in capsys.readouterr().err


def test_json_prints_one_object_on_stdout(base, chats, tmp_path, capsys):
    config(base, chats, tmp_path / "run")
    assert main([str(tmp_path / "run.toml"), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert Path(summary["result"]) == tmp_path / "run/adapter"
