"""lumen.chat as a person and as a program meet it: answers, conversations, runs, and what it refuses."""

import io
import json
import shutil
from types import SimpleNamespace

import pytest
import torch

from lumen.adapter import attach_lora, save_adapter
from lumen.chat import load_speaker, main
from lumen.checkpoint import load_model
from lumen.config import load_config, write_toml
from lumen.sampling import generate
from lumen.text.tokenizer import load_tokenizer
from lumen.text.turns import chat_template, prompt_ids

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message.role }}: {{ message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
OPTIONS = {"max_tokens": 8, "temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 0}


@pytest.fixture
def stories(shared_data):
    """A base model that tells stories; no chat template."""
    return shared_data / "models" / "stories260K"


@pytest.fixture
def chatty(stories, tmp_path):
    """The same model with a chat template, which it was never taught."""
    folder = tmp_path / "chatty"
    folder.mkdir()
    for file in stories.iterdir():
        if file.is_file():
            shutil.copy(file, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture
def make_run(chatty, tmp_path):
    """A function that makes a run's folder of the chatty model, with an adapter that changes its answers."""

    def make(*overrides):
        file = tmp_path / "run.toml"
        file.write_text(
            f"[model]\npath = '{chatty}'\n[data]\ntrain = ['{tmp_path / 'train.jsonl'}']\n[lora]\nrank = 4\n"
        )
        config = load_config(file, [f"output.folder={tmp_path / 'run'}", *overrides])
        folder = tmp_path / "run"
        (folder / "adapter").mkdir(parents=True)
        (folder / "config.toml").write_text(write_toml(config))
        model = load_model(chatty, nf4=config.model.nf4)
        for pair in attach_lora(model, config.lora).values():
            torch.nn.init.normal_(pair.b, std=0.5)
        save_adapter(model, folder / "adapter", config.lora, config.model.path)
        load_tokenizer(chatty).save(folder / "adapter")
        return SimpleNamespace(folder=folder, model=model.eval())

    return make


def ask(folder, messages, model=None, **options):
    """What `generate` says to `messages` in the template, decoded."""
    tokenizer = load_tokenizer(folder)
    ids = prompt_ids(messages, tokenizer, chat_template(tokenizer))
    model = model or load_model(folder)
    (answer,) = generate(model, [ids], **{**OPTIONS, **options}, stop_ids=tokenizer.stop_ids)
    return tokenizer.decode(answer.ids, skip_special=True)


def user(text):
    return {"role": "user", "content": text}


def test_one_question_of_a_base_model_is_continued_as_the_golden_story(stories, capsys):
    golden = json.loads((stories / "golden_greedy.json").read_text())
    assert main([str(stories), "--prompt", "", "--max-tokens", str(len(golden["ids"]) - 1)]) == 0
    out, err = capsys.readouterr()
    assert out.strip() == golden["text"].strip()
    assert "has no chat template: it continues the text as it stands" in err


def test_json_is_one_object_on_stdout_and_all_else_on_stderr(stories, capsys):
    assert main([str(stories), "--prompt", "Lily saw", "--max-tokens", "5", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert list(told) == ["prompt", "answer", "tokens", "finish", "tokens_per_s"]
    assert (told["prompt"], told["tokens"], told["finish"]) == ("Lily saw", 5, "length")
    assert told["answer"] and told["tokens_per_s"] > 0


def test_a_question_is_put_into_the_chat_template(chatty, capsys):
    assert main([str(chatty), "--prompt", "Who is Lily?", "--max-tokens", "8"]) == 0
    assert capsys.readouterr().out == ask(chatty, [user("Who is Lily?")]) + "\n"


def test_sampling_follows_the_seed(chatty, capsys):
    def say(seed):
        main([str(chatty), "--prompt", "Hi", "--max-tokens", "20", "--temperature", "1.5", "--seed", seed, "--json"])
        return json.loads(capsys.readouterr().out)["answer"]

    assert say("1") == say("1") != say("2")


@pytest.mark.parametrize("nf4", ["true", "false"])
def test_a_run_answers_with_its_adapter_on_the_base_it_was_trained_on(make_run, chatty, capsys, nf4):
    run = make_run(f"model.nf4={nf4}")
    assert main([str(run.folder), "--prompt", "Who is Lily?", "--max-tokens", "8"]) == 0
    said = capsys.readouterr().out.removesuffix("\n")
    assert said == ask(chatty, [user("Who is Lily?")], run.model)
    assert said != ask(chatty, [user("Who is Lily?")])


def test_a_run_that_learned_every_weight_answers_with_its_own_model(make_run, chatty, stories, capsys):
    run = make_run("train.method=full", "model.nf4=false")
    shutil.copytree(chatty, run.folder / "model")
    shutil.rmtree(chatty)
    assert main([str(run.folder), "--prompt", "Who is Lily?", "--max-tokens", "8"]) == 0
    assert capsys.readouterr().out == ask(run.folder / "model", [user("Who is Lily?")]) + "\n"


def test_a_run_without_a_result_says_how_to_get_one(make_run, capsys):
    run = make_run("model.nf4=false")
    shutil.rmtree(run.folder / "adapter")
    assert main([str(run.folder), "--prompt", "Hi"]) == 1
    assert "the run has no result yet" in (message := capsys.readouterr().err) and "--resume" in message


def converse(folder, lines, monkeypatch, capsys):
    """Exit code, answers and notes of a conversation in which `lines` are typed."""
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
    code = main([str(folder), "--max-tokens", "8"])
    return code, *capsys.readouterr()


def test_a_conversation_remembers_its_turns_until_it_is_reset(chatty, monkeypatch, capsys):
    code, out, _ = converse(chatty, ["One?", "Two?", "/reset", "Two?", "/exit", "never read"], monkeypatch, capsys)
    first = ask(chatty, [user("One?")])
    second = ask(chatty, [user("One?"), {"role": "assistant", "content": first}, user("Two?")])
    assert (code, out) == (0, f"{first}\n{second}\n{ask(chatty, [user('Two?')])}\n")


def test_a_system_text_opens_the_conversation(chatty, monkeypatch, capsys):
    _, out, _ = converse(chatty, ["Before?", "/system Be sad.", "One?"], monkeypatch, capsys)
    wanted = ask(chatty, [{"role": "system", "content": "Be sad."}, user("One?")])
    assert out == f"{ask(chatty, [user('Before?')])}\n{wanted}\n"


def test_saved_conversations_are_lines_that_a_run_can_train_on(chatty, tmp_path, monkeypatch, capsys):
    file = tmp_path / "talk.jsonl"
    lines = ["/system Be sad.", "One?", f"/save {file}", "/system", "Two?", f"/save {file}"]
    assert converse(chatty, lines, monkeypatch, capsys)[0] == 0
    first, second = (json.loads(line)["messages"] for line in file.read_text().splitlines())
    assert [turn["role"] for turn in first] == ["system", "user", "assistant"]
    assert [turn["role"] for turn in second] == ["user", "assistant"]
    assert first[0]["content"] == "Be sad." and second[1]["content"] == ask(chatty, [user("Two?")])


def test_a_refused_line_ends_no_conversation(chatty, tmp_path, monkeypatch, capsys):
    lines = ["/rest", "/save", "/save x", "word " * 600, "One?", f"/save {tmp_path / 'none' / 'x'}"]
    code, out, err = converse(chatty, lines, monkeypatch, capsys)
    assert (code, out) == (0, ask(chatty, [user("One?")]) + "\n")
    errors = [line for line in err.splitlines() if line.startswith("error:")]
    assert len(errors) == 5
    assert "there is no /rest. Did you mean '/reset'?" in errors[0]
    assert "context is 512 tokens" in errors[3]


def test_an_interrupted_answer_is_what_was_said_so_far(chatty):
    speaker, pieces = load_speaker(str(chatty), OPTIONS), []

    def hear(text):
        pieces.append(text)
        if len(pieces) == 3:
            raise KeyboardInterrupt

    answer = speaker.answer([user("One?")], hear)
    assert (answer.finish, answer.text) == ("interrupted", "".join(pieces))
    assert ask(chatty, [user("One?")]).startswith(answer.text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "--prompt", "Hi"], "nowhere: wanted the folder of a run (config.toml)"),
        (["{empty}", "--prompt", "Hi"], "found a folder without any of these"),
        (["nowhere", "--json"], "--json wants one question"),
        (["nowhere", "--prompt", "Hi", "--temperature", "-1"], "temperature must be 0 or more, found -1.0"),
        (["nowhere", "--prompt", "Hi", "--top-p", "0"], "top_p must be above 0"),
    ],
)
def test_what_is_asked_wrongly_exits_with_2(arguments, message, tmp_path, capsys):
    assert main([argument.format(empty=tmp_path) for argument in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and message in err


def test_an_adapter_alone_answers_on_the_base_it_names(make_run, chatty, capsys):
    run = make_run("model.nf4=false")
    assert main([str(run.folder / "adapter"), "--prompt", "Who is Lily?", "--max-tokens", "8"]) == 0
    assert capsys.readouterr().out == ask(chatty, [user("Who is Lily?")], run.model) + "\n"


def test_damaged_weights_exit_with_1(chatty, capsys):
    weights = chatty / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert main([str(chatty), "--prompt", "Hi"]) == 1
    assert "model.safetensors" in capsys.readouterr().err


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as left:
        main(["--help"])
    assert left.value.code == 0
    shown = capsys.readouterr().out
    for option in ("--prompt", "--max-tokens", "--temperature", "--top-k", "--top-p", "--min-p", "--seed", "--json"):
        assert option in shown
