"""What inspect shows is what training learns."""

import json

from lumen.config import load_config
from lumen.inspect import main, spans
from lumen.objectives.examples import load_examples


def test_the_learned_stretches_of_the_demo_are_the_answers_and_the_token_that_ends_them(capsys):
    assert main(["lumen-demo", "--rows", "3", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    examples = load_examples(load_config("lumen-demo"))
    assert shown["train"]["learned"] == examples.train.counted
    assert shown["train"]["examples"] == 1600 and shown["eval"]["examples"] == 200
    for row, wanted in zip(shown["shown"], examples.train.rows, strict=False):
        for example, encoded in zip(row, wanted, strict=True):
            assert [tuple(span) for span in example["spans"]] == spans(encoded, examples.tokenizer)
            learned = [text for is_learned, text in example["spans"] if is_learned]
            assert learned and all(text.endswith("<|eot_id|>") for text in learned)
            assert not any("user" in text or "<|start_header_id|>" in text for text in learned)
            text = "".join(text for _, text in example["spans"])
            assert text.count("<|begin_of_text|>") == 1 and text.startswith("<|begin_of_text|>")


def test_without_a_terminal_learned_words_stand_between_brackets(capsys):
    assert main(["lumen-demo"]) == 0
    said = capsys.readouterr().out
    assert '<|end_header_id|>\n\n⟦{"name":"' in said and "<|eot_id|>⟧" in said
    assert "train.jsonl:" in said and "learned" in said


def test_what_is_asked_wrongly_is_said(capsys):
    assert main(["lumen-demo", "data.max_lenght=9"]) == 2
    assert "Did you mean 'max_length'" in capsys.readouterr().err
    assert main(["lumen-demo", "data.max_length=9"]) == 1
    assert "train.jsonl:" in capsys.readouterr().err
