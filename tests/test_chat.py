"""lumen.chat as a person and as a program meet it: answers, conversations, runs, and what it refuses."""

import io
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
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


def converse(folder, lines, monkeypatch, capsys, *arguments):
    """Exit code, answers and notes of a conversation in which `lines` are typed."""
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
    code = main([str(folder), "--max-tokens", "8", *arguments])
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


def test_a_system_text_may_be_said_at_once(chatty, monkeypatch, capsys):
    wanted = ask(chatty, [{"role": "system", "content": "Be sad."}, user("One?")])
    _, out, _ = converse(chatty, ["One?", "/reset", "One?"], monkeypatch, capsys, "--system", "Be sad.")
    assert out == f"{wanted}\n{wanted}\n"
    assert main([str(chatty), "--max-tokens", "8", "--system", "Be sad.", "--prompt", "One?"]) == 0
    assert capsys.readouterr().out == f"{wanted}\n"


def test_a_model_without_a_template_has_no_place_for_a_system_text(stories, monkeypatch, capsys):
    assert main([str(stories), "--system", "Be sad.", "--prompt", "One?"]) == 2
    assert "no chat template, and so no place for a system text" in capsys.readouterr().err
    code, out, err = converse(stories, ["/system Be sad.", "/system", "One"], monkeypatch, capsys)
    assert (code, len(out.splitlines())) == (0, 1)
    assert err.count("no place for a system text") == 1


def test_a_line_is_saved_behind_a_last_line_without_an_end(chatty, tmp_path, monkeypatch, capsys):
    file = tmp_path / "talk.jsonl"
    file.write_text('{"text": "é"}')
    converse(chatty, ["One?", f"/save {file}"], monkeypatch, capsys)
    assert [list(json.loads(line)) for line in file.read_text().splitlines()] == [["text"], ["messages"]]


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
    lines += [f"/save {tmp_path}", "caf\udce9"]
    code, out, err = converse(chatty, lines, monkeypatch, capsys)
    assert (code, out) == (0, ask(chatty, [user("One?")]) + "\n")
    errors = [line for line in err.splitlines() if line.startswith("error:")]
    assert len(errors) == 7
    assert "/save wants the name of a file, found the folder" in errors[5]
    assert "UTF-8 was wanted, found another byte after 'caf'" in errors[6]
    assert "there is no /rest. Did you mean '/reset'?" in errors[0]
    assert "context is 512 tokens" in errors[3]


@pytest.fixture
def say(capsys):
    """A function that asks "One?" by the command line; the object of --json, and the notes."""

    def ask_once(folder, *arguments):
        assert main([str(folder), "--prompt", "One?", "--json", *arguments]) == 0
        out, err = capsys.readouterr()
        return json.loads(out), err

    return ask_once


def test_an_answer_ends_before_any_of_the_stops(chatty, say):
    free, _ = say(chatty, "--max-tokens", "60")
    stop, other = free["answer"][40:48], free["answer"][60:66]
    told, _ = say(chatty, "--max-tokens", "60", "--stop", other, "--stop", "never said", "--stop", stop)
    assert (told["answer"], told["finish"]) == (free["answer"].partition(stop)[0], "stop")
    assert told["tokens"] < free["tokens"]


def test_why_an_answer_ended_is_told(chatty, say, monkeypatch, capsys):
    assert say(chatty, "--max-tokens", "5")[0]["finish"] == "length"
    told, _ = say(chatty, "--max-tokens", "100000", "--repetition-penalty", "3")
    assert told["finish"] == "context"
    assert "(cut off after 8 tokens; --max-tokens allows more)" in converse(chatty, ["One?"], monkeypatch, capsys)[2]


def generation_config(folder, **values):
    (folder / "generation_config.json").write_text(json.dumps(values))


def test_what_a_generation_config_says_and_lumen_does_not_follow_is_named_in_one_line(chatty, capsys):
    generation_config(chatty, no_repeat_ngram_size=3, stop_strings=["###"], num_beams=1, typical_p=1.0, max_length=20)
    assert main([str(chatty), "--prompt", "Hi", "--max-tokens", "2"]) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if "does not follow" in line]
    ending = "also says what lumen does not follow: no_repeat_ngram_size 3, stop_strings ['###']"
    assert told == [f"generation_config.json of the model {ending}"]
    generation_config(chatty, do_sample=False, no_repeat_ngram_size=0, stop_strings=None, num_beams=1)
    assert main([str(chatty), "--prompt", "Hi", "--max-tokens", "2"]) == 0
    assert "does not follow" not in capsys.readouterr().err


SAMPLED = {"do_sample": True, "temperature": 1.4, "top_k": 40, "top_p": 0.9, "repetition_penalty": 1.1}


def test_what_nobody_said_is_as_the_models_generation_config_says(chatty, say):
    generation_config(chatty, **SAMPLED)
    told, notes = say(chatty, "--max-tokens", "20")
    wanted = {name: value for name, value in SAMPLED.items() if name != "do_sample"}
    assert told["answer"] == ask(chatty, [user("One?")], max_tokens=20, **wanted)
    assert "says: temperature 1.4, top_k 40, top_p 0.9, repetition_penalty 1.1\n" in notes
    told, notes = say(chatty, "--max-tokens", "20", "--temperature", "0.9", "--top-k", "0", "--seed", "3")
    wanted |= {"temperature": 0.9, "top_k": 0, "seed": 3}
    assert told["answer"] == ask(chatty, [user("One?")], max_tokens=20, **wanted)
    assert "says: top_p 0.9, repetition_penalty 1.1\n" in notes


def test_a_temperature_that_is_not_to_be_sampled_by_does_not_count(chatty, say):
    generation_config(chatty, **SAMPLED | {"do_sample": None})
    told, notes = say(chatty, "--max-tokens", "20")
    assert told["answer"] == ask(chatty, [user("One?")], max_tokens=20, repetition_penalty=1.1)
    assert "says: repetition_penalty 1.1\n" in notes


def test_sampling_without_a_temperature_has_temperature_one(chatty, say):
    generation_config(chatty, do_sample=True)
    told, notes = say(chatty, "--max-tokens", "20")
    assert told["answer"] == ask(chatty, [user("One?")], max_tokens=20, temperature=1.0)
    assert "says: temperature 1\n" in notes


def test_a_run_samples_as_its_base_does(make_run, chatty, say):
    generation_config(chatty, **SAMPLED)
    assert "temperature 1.4" in say(make_run("model.nf4=false").folder, "--max-tokens", "3")[1]


def test_cuts_without_a_temperature_are_said_to_change_nothing(chatty, say):
    _, notes = say(chatty, "--max-tokens", "3", "--top-k", "4", "--min-p", "0.1")
    assert "temperature is 0, which takes the likeliest token: top_k 4, min_p 0.1 changes nothing" in notes


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"do_sample": True, "temperature": "hot"}, "temperature: a number was wanted, found 'hot'"),
        ({"do_sample": True, "top_k": 2.5}, "top_k: a number was wanted, found 2.5"),
        (
            {"do_sample": True, "top_p": 7},
            "top_p must be above 0 and at most 1, found 7. Say --top-p to go without it.",
        ),
        ({"do_sample": "yes"}, "do_sample: true or false was wanted, found 'yes'"),
        ({"repetition_penalty": True}, "repetition_penalty: a number was wanted, found True"),
    ],
)
def test_a_generation_config_that_is_no_good_is_refused_by_its_key(chatty, values, message, capsys):
    generation_config(chatty, **values)
    assert main([str(chatty), "--prompt", "Hi"]) == 1
    assert f"{chatty / 'generation_config.json'}: {message}" in capsys.readouterr().err


OWN_TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.executable, [sys.executable, "-m", "lumen.chat", *sys.argv[1:]])
"""


class Terminal:
    """`python -m lumen.chat` as a person has it: a terminal of its own, whose Ctrl-C reaches it as a signal."""

    def __init__(self, *arguments):
        self.own, other = os.openpty()
        command = [sys.executable, "-c", OWN_TERMINAL, *arguments]
        env = {**os.environ, "TERM": "dumb", "OMP_NUM_THREADS": "1"}
        streams = dict.fromkeys(("stdin", "stdout", "stderr"), other)
        self.process = subprocess.Popen(command, start_new_session=True, env=env, **streams)
        os.close(other)
        self.shown = ""

    def type(self, text):
        os.write(self.own, text.encode())

    def press(self, key, text):
        """Types a key until it shows `text`: one that comes while the line editor sets the terminal up may be lost."""
        for _ in range(6):
            self.type(key)
            if self.shows(text, 10):
                return self.read_until(text)
        raise AssertionError(self.shown)

    def shows(self, text, timeout_s):
        """Whether `text` is shown in time."""
        end_s = time.monotonic() + timeout_s
        while text not in self.shown:
            if not select.select([self.own], [], [], max(0.0, end_s - time.monotonic()))[0]:
                return False
            self.shown += os.read(self.own, 4096).decode().replace("\r", "")
        return True

    def read_until(self, text, timeout_s=60):
        """What is shown up to and with `text`."""
        assert self.shows(text, timeout_s), self.shown
        read, _, self.shown = self.shown.partition(text)
        return read + text


@pytest.fixture
def terminal(chatty):
    # a penalty, so that it rambles on to the end of its context: time enough to press a key
    terminal = Terminal(str(chatty), "--max-tokens", "100000", "--repetition-penalty", "3", "--system", "Be sad.")
    yield terminal
    terminal.process.kill()
    terminal.process.wait()
    os.close(terminal.own)


def test_ctrl_c_stops_the_answer_and_not_the_program(terminal, chatty, tmp_path):
    file = tmp_path / "talk.jsonl"
    whole = ask(chatty, [{"role": "system", "content": "Be sad."}, user("One?")], max_tokens=500, repetition_penalty=3)
    terminal.read_until("\n> ")
    terminal.type("One?\n")
    terminal.read_until(whole[:5])
    terminal.type("\x03")
    seen = whole[:5] + terminal.read_until("(interrupted)").partition("^C")[0]
    terminal.read_until("> ")
    terminal.type("never sent")
    terminal.read_until("never sent")
    terminal.press("\x03", "/exit or Ctrl-D leaves\n")  # a line that is not finished is dropped
    terminal.read_until("> ")
    terminal.type(f"/save {file}\n")
    terminal.read_until("added to")
    system, question, answer = json.loads(file.read_text())["messages"]
    assert (system["content"], question["content"]) == ("Be sad.", "One?")
    assert whole.startswith(answer["content"]) and 5 <= len(answer["content"]) < len(whole)
    assert answer["content"].startswith(seen)
    terminal.type("/exit\n")
    assert terminal.process.wait(60) == 0


def test_ctrl_c_ends_the_program_that_answers_one_question(chatty):
    command = [sys.executable, "-m", "lumen.chat", str(chatty), "--prompt", "One?", "--max-tokens", "100000"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([*command, "--repetition-penalty", "3"], env=env, **pipes) as process:
        said = process.stdout.read(5)
        process.send_signal(signal.SIGINT)
        rest, notes = process.communicate(timeout=60)
    assert process.returncode == 1
    assert len(said) == 5 and rest.endswith(b"\n") and b"interrupted)" in notes


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
        (["nowhere", "--stop", ""], "--stop wants a text"),
        (["nowhere", "--repetition-penalty", "0"], "repetition_penalty must be above 0"),
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
    options = "--prompt --system --max-tokens --stop --temperature --top-k --top-p --min-p --repetition-penalty --seed"
    for option in [*options.split(), "--json"]:
        assert option in shown
