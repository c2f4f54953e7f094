"""A base model trained with a named format stops at the same token in lumen, in transformers and in llama.cpp."""

import json
import logging
import re

import pytest
import torch
import transformers
from llama_cpp import LlamaCpp
from tiny_models import byte_level_tokenizer, family

from lumen.chat import load_speaker
from lumen.config import load_config
from lumen.demo import demo_folder
from lumen.errors import ConfigError, DataError
from lumen.export.gguf import write_gguf
from lumen.export.merge import merge
from lumen.export.modelfile import write_modelfile
from lumen.objectives.examples import load_examples
from lumen.sampling import generate
from lumen.source import find_source
from lumen.text.turns import question_ids
from lumen.train import finetune

QUESTION, ANSWER = "Who is there?", "Tom and a cat."
SYSTEM = "Once upon a time."


def write_toml(folder, base, data: dict, **train) -> str:
    values = {
        "model": {"path": str(base), "nf4": False, "device": "cpu"},
        "lora": {"rank": 16, "alpha": 32},
        "data": {"train": "chats.jsonl", "max_length": 256, **data},
        "train": {"epochs": 30, "lr": 3e-3, "batch_size": 1, **train},
    }
    lines = [
        line
        for section, table in values.items()
        for line in (f"[{section}]", *(f"{key} = {json.dumps(value)}" for key, value in table.items()))
    ]
    (folder / "run.toml").write_text("\n".join(lines))
    return str(folder / "run.toml")


def write_chats(folder, *conversations) -> None:
    rows = [{"messages": [{"role": r, "content": c} for r, c in said]} for said in conversations]
    (folder / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)))


TALK = (("user", QUESTION), ("assistant", ANSWER))


@pytest.mark.parametrize(
    ("model", "format", "end", "system"),
    [
        ("stories260K", "chatml", "</s>", ""),  # SentencePiece; EOS takes the place of <|im_end|>
        ("stories260K", "mistral", "</s>", SYSTEM),  # the system text inside the first question
        ("lumen-demo", "llama-3", "<|eot_id|>", ""),  # byte-level; a token of the vocabulary
        ("lumen-demo", "vicuna", "<|eot_id|>", SYSTEM),  # the format's own EOS
    ],
)
def test_generation_stops_at_the_same_place_everywhere(model, format, end, system, shared_data, tmp_path):
    base = demo_folder(model) if model == "lumen-demo" else shared_data / "models" / model
    method = "lora" if model == "lumen-demo" else "full"  # stories260K's row of </s> must learn, too, to be likely
    write_chats(tmp_path, TALK)
    config = load_config(
        write_toml(tmp_path, base, {"chat_format": format, "system": system}, method=method),
        [f"output.folder={tmp_path / 'run'}"],
    )
    torch.manual_seed(0)
    finetune(config)
    trained, tokenizer = find_source(str(tmp_path / "run")).load()
    prompt = question_ids(QUESTION, tokenizer)
    [answer] = generate(trained, [prompt], max_tokens=40, stop_ids=tokenizer.stop_ids)
    assert answer.finish == "stop" and tokenizer.id_to_token(answer.ids[-1]) == end
    assert tokenizer.decode(answer.ids, skip_special=True).strip() == ANSWER
    said = load_speaker(str(tmp_path / "run"), {"max_tokens": 40}).answer([{"role": "user", "content": QUESTION}], list)
    assert said.text.strip() == ANSWER and said.finish == "stop"

    merged = merge(str(tmp_path / "run"), tmp_path / "merged")
    files = [json.loads((merged / f"{name}.json").read_text()) for name in ("config", "generation_config")]
    for values in files:
        ids = values["eos_token_id"]
        assert tokenizer.eos_id in (ids if isinstance(ids, list) else [ids])
        assert values["pad_token_id"] == tokenizer.pad_id not in (None, tokenizer.eos_id)
    assert json.loads((merged / "tokenizer_config.json").read_text())["eos_token"] == end

    theirs = transformers.AutoTokenizer.from_pretrained(merged)
    asked = theirs.apply_chat_template(
        [{"role": "user", "content": QUESTION}], add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    assert asked["input_ids"].tolist() == [prompt]
    assert (theirs.eos_token, theirs.pad_token_id) == (end, tokenizer.pad_id)
    network = transformers.AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    assert network.generate(**asked, max_new_tokens=40, do_sample=False)[0, len(prompt) :].tolist() == answer.ids

    write_gguf(merged, tmp_path / "model.gguf", "f32")
    with LlamaCpp(tmp_path / "model.gguf") as llama:
        assert llama.generate(prompt, 40) == answer.ids[:-1] and llama.is_eog(answer.ids[-1])
        assert llama.metadata("tokenizer.ggml.eos_token_id") == str(tokenizer.eos_id) == str(answer.ids[-1])
        assert llama.metadata("tokenizer.ggml.padding_token_id") == str(tokenizer.pad_id)
        text = tokenizer.decode(prompt).removeprefix(tokenizer.id_to_token(tokenizer.bos_id))
        if model == "lumen-demo":  # llama.cpp keeps the blanks that stories260K's tokenizer drops
            assert llama.tokenize(text, add_special=True, parse_special=True) == prompt
    write_modelfile(merged, tmp_path / "Modelfile", "model.gguf")
    stops = re.findall('PARAMETER stop "(.*)"', (tmp_path / "Modelfile").read_text())
    assert stops == [tokenizer.id_to_token(id) for id in tokenizer.stop_ids] and stops[0] == end


def test_full_fine_tuning_names_the_new_eos_in_config_json(tmp_path):
    write_chats(tmp_path, TALK)
    config = write_toml(tmp_path, demo_folder("lumen-demo"), {"chat_format": "llama-3"}, method="full", steps=1)
    summary = finetune(load_config(config, [f"output.folder={tmp_path / 'run'}"]))
    written = json.loads((tmp_path / "run/model/config.json").read_text())
    tokenizer = find_source(summary["folder"]).tokenizer()
    assert tokenizer.id_to_token(tokenizer.eos_id) == "<|eot_id|>"
    assert tokenizer.eos_id in written["eos_token_id"] and written["pad_token_id"] == tokenizer.pad_id


# --- what a run says about its words ---------------------------------------------------------------------------------


def test_a_run_says_which_token_ends_an_answer_and_which_one_pads(shared_data, tmp_path, caplog):
    write_chats(tmp_path, TALK)
    source = write_toml(tmp_path, shared_data / "models/stories260K", {"chat_format": "chatml"})
    with caplog.at_level(logging.WARNING, logger="lumen"):
        examples = load_examples(load_config(source))
    assert examples.notes == tuple(record.getMessage() for record in caplog.records)
    format, pad = examples.notes
    assert format == "chatml: '</s>', the EOS token, stands in the place of '<|im_end|>', no token here."
    assert pad == "The padding token is '<unk>' (id 0)."


def test_a_format_whose_tokens_the_run_adds_ends_with_its_own(shared_data, tmp_path):
    write_chats(tmp_path, TALK)
    source = write_toml(tmp_path, shared_data / "models/stories260K", {"chat_format": "qwen-2.5"})
    examples = load_examples(load_config(source, ['tokens.add=["<|im_start|>", "<|im_end|>"]']))
    tokenizer = examples.tokenizer
    assert tokenizer.id_to_token(tokenizer.eos_id) == "<|im_end|>" and tokenizer.stop_ids == (513, 2)
    [[example]] = examples.train.rows
    learned = [id for id, learn in zip(example.ids, example.learn, strict=True) if learn]
    assert learned[-1] == 513 and example.ids[:2] == [tokenizer.bos_id, 512]


def test_a_runs_system_text_stands_in_conversations_without_one(shared_data, tmp_path):
    write_chats(tmp_path, TALK, (("system", "Other."), *TALK))
    for format in ("chatml", "llama", "qwen3-instruct"):
        base = demo_folder("lumen-demo") if format == "llama" else shared_data / "models/stories260K"
        data = {"chat_format": format, "system": SYSTEM, "packing": False}
        source = write_toml(tmp_path, base, data)
        if format == "qwen3-instruct":
            with pytest.raises(ConfigError, match=r"Add the format's tokens"):
                load_examples(load_config(source))
            continue
        examples = load_examples(load_config(source))
        texts = [examples.tokenizer.decode(row[0].ids) for row in examples.train.rows]
        assert [SYSTEM in text for text in texts] == [True, False]
        assert SYSTEM in examples.tokenizer.decode(question_ids("Hi?", examples.tokenizer))


def test_a_system_text_that_the_template_would_not_write_is_refused(shared_data, tmp_path):
    write_chats(tmp_path, TALK)
    base = shared_data / "models/stories260K"
    with pytest.raises(ConfigError, match=r"data.system: The chat template refuses .*no turn for the role system"):
        load_examples(load_config(write_toml(tmp_path, base, {"chat_format": "gemma", "system": SYSTEM})))
    template = tmp_path / "silent.jinja"
    template.write_text("{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}")
    with pytest.raises(ConfigError, match=r"data\.system: the chat template does not write a system text"):
        load_examples(load_config(write_toml(tmp_path, base, {"chat_template": str(template), "system": SYSTEM})))


def test_keys_that_contradict_each_other_are_refused(shared_data, tmp_path):
    write_chats(tmp_path, TALK)
    base = shared_data / "models/stories260K"
    for data, words in (
        ({"chat_format": "chatml", "chat_template": "x.jinja"}, "a chat template, or a format, not both"),
        ({"response_part": "A:"}, "belong together"),
        ({"response_part": "A:", "instruction_part": "Q:", "train_on": "everything"}, "markers say what is learned"),
    ):
        with pytest.raises(ConfigError, match=words):
            load_config(write_toml(tmp_path, base, data))
    with pytest.raises(ConfigError, match=r"no format 'chatlm'\. Did you mean 'chatml'"):
        load_examples(load_config(write_toml(tmp_path, base, {"chat_format": "chatlm"})))


def test_a_page_whose_turns_no_token_ends_is_refused_unless_that_token_is_added(tmp_path):
    family(tmp_path / "base", "gemma")  # whose turns end with <end_of_turn>
    byte_level_tokenizer(tmp_path / "base")
    write_chats(tmp_path, TALK)
    told = write_toml(tmp_path, tmp_path / "base", {})
    with pytest.raises(ConfigError, match=r"page 'gemma' end with '<end_of_turn>', which is no token of its tokenizer"):
        load_examples(load_config(told))
    assert load_examples(load_config(told, ["data.chat_format=chatml"])).tokenizer.chat_template
    examples = load_examples(load_config(told, ['tokens.add=["<end_of_turn>"]']))
    assert examples.tokenizer.token_to_id("<end_of_turn>") in examples.tokenizer.stop_ids
    family(tmp_path / "other", "phi3")  # whose last turn ends with <|end|> and EOS
    byte_level_tokenizer(tmp_path / "other")
    assert load_examples(load_config(told, [f"model.path={tmp_path}/other"])).tokenizer.chat_template


# --- markers ---------------------------------------------------------------------------------------------------------

MARKERS = {"instruction_part": "Q:", "response_part": "A:"}


def test_a_run_with_markers_learns_what_lies_between_them(shared_data, tmp_path):
    (tmp_path / "chats.jsonl").write_text(json.dumps({"text": "Q: Who? A: Tom. Q: And? A: A cat."}))
    examples = load_examples(load_config(write_toml(tmp_path, shared_data / "models/stories260K", MARKERS)))
    [[example]] = examples.train.rows
    learned = [id for id, learn in zip(example.ids, example.learn, strict=True) if learn]
    assert examples.tokenizer.decode(learned) == "Tom.  A cat.</s>"  # the blank before Q: is the answer's
    (tmp_path / "chats.jsonl").write_text('{"text": "Q: Who? A: Tom."}\n{"text": "Who? Tom."}')
    with pytest.raises(DataError, match=r"chats\.jsonl:2: data\.response_part 'A:' does not stand in 'Who"):
        load_examples(load_config(write_toml(tmp_path, shared_data / "models/stories260K", MARKERS)))


@pytest.mark.parametrize(("empty", "warned"), [(9, True), (8, False)])
def test_a_run_that_learns_nothing_of_nine_in_ten_examples_is_warned_with_numbers(empty, warned, shared_data, tmp_path):
    rows = [{"text": "Q: Who? A: Q: And?"}] * empty + [{"text": "Q: Who? A: Tom."}] * (10 - empty)
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
    examples = load_examples(load_config(write_toml(tmp_path, shared_data / "models/stories260K", MARKERS)))
    said = [note for note in examples.notes if "nothing is learned" in note]
    assert bool(said) == warned and (not warned or "in 9 of 10 examples" in said[0])


def test_answers_that_never_end_are_warned_of(shared_data, tmp_path):
    write_chats(tmp_path, TALK)
    (tmp_path / "endless.jinja").write_text(
        "{% for m in messages %}{{ '\nQ: ' if m.role == 'user' else '\nA: ' }}{{ m.content }}{% endfor %}"
    )
    data = {**MARKERS, "chat_template": "endless.jinja"}
    examples = load_examples(load_config(write_toml(tmp_path, shared_data / "models/stories260K", data)))
    assert "in 1 of 1 examples no token is learned that ends an answer ('</s>')" in examples.notes[-1]
