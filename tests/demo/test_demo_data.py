"""The demo's texts and tokenizer: the repository holds what the generator makes, and the examination is fair."""

import hashlib
import json
import random
import re

import pytest
from tokenizers import Tokenizer

from lumen import demo
from lumen.demo import world
from lumen.demo.guests import GUESTS, HELD_OUT_GUESTS, invented_name
from lumen.demo.orders import MENU, Order, is_reserved, random_order, same_order
from lumen.demo.phrases import HELD_OUT_PHRASES, PHRASES, Phrases
from lumen.errors import ConfigError
from lumen.text.template import ChatTemplate

BASE = demo.demo_folder("lumen-demo")
LLAMA_BPE_SPLIT_SHA256 = "d98f9631be1e9607a9848c26c1f9eac1aa9fc21ac6ba82a2fc0741af9780a48f"


def read_chats(name: str) -> list[world.Chat]:
    lines = demo.demo_data(name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["messages"] for line in lines]


def said(chats: list[world.Chat], role: str) -> list[str]:
    return [turn["content"] for chat in chats for turn in chat if turn["role"] == role]


def orders_in(chats: list[world.Chat]) -> list[Order]:
    return [Order(**json.loads(answer)) for answer in said(chats, "assistant") if answer.startswith("{")]


def speaks_heldout_phrase(text: str) -> bool:
    """Whether a sentence of `text` is made like one of HELD_OUT_PHRASES, whatever is ordered and for whom."""
    pieces = [piece.rstrip(".?") for piece in (*HELD_OUT_PHRASES.whole, *HELD_OUT_PHRASES.wishes)]
    patterns = [re.sub(r"\\{\w+\\}", ".+", re.escape(piece)) for piece in pieces]
    return re.search(rf"(?:^|[.!?] )(?:{'|'.join(patterns)})", text, re.IGNORECASE) is not None


@pytest.fixture(scope="module")
def train() -> list[world.Chat]:
    return read_chats("lumen-demo")


@pytest.fixture(scope="module")
def heldout() -> list[world.Chat]:
    return read_chats("lumen-demo-heldout")


@pytest.fixture(scope="module")
def pretraining() -> list[world.Chat]:
    return list(world.pretraining_chats(seed=0, n=3000))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(BASE / "tokenizer.json"))


def test_the_files_are_what_the_generator_makes(train, heldout):
    assert train == list(world.training_chats())
    assert heldout == list(world.heldout_chats())


def test_the_data_is_small_enough_to_ship():
    assert sum(path.stat().st_size for path in demo.DATA.values()) <= 1_000_000


def test_pretraining_chats_depend_on_the_seed_and_on_nothing_else():
    first = list(world.pretraining_chats(seed=7, n=50))
    assert first == list(world.pretraining_chats(seed=7, n=50))
    assert first != list(world.pretraining_chats(seed=8, n=50))


def test_no_heldout_message_or_answer_occurs_in_the_training_data(train, heldout, pretraining):
    for role in ("user", "assistant"):
        seen = set(said(train, role)) | set(said(pretraining, role))
        assert not seen & set(said(heldout, role))


def test_heldout_names_occur_nowhere_in_the_training_data():
    text = demo.demo_data("lumen-demo").read_text(encoding="utf-8")
    assert [name for name in HELD_OUT_GUESTS if name in text] == []


def test_no_invented_guest_bears_a_heldout_name():
    rng = random.Random(0)
    assert {invented_name(rng) for _ in range(50_000)}.isdisjoint(HELD_OUT_GUESTS)
    assert set(GUESTS).isdisjoint(HELD_OUT_GUESTS)


def test_heldout_combinations_are_never_ordered_in_training(train, heldout):
    def combinations(chats):
        return {(order.item, order.size, order.count, order.extra) for order in orders_in(chats)}

    assert combinations(train).isdisjoint(combinations(heldout))
    assert all(is_reserved(order) for order in orders_in(heldout))


def test_half_of_the_examination_uses_phrasings_that_training_never_uses(train, heldout):
    odd = [chat[0]["content"] for chat in heldout[1::2]]
    assert all(speaks_heldout_phrase(text) for text in odd)
    assert not any(speaks_heldout_phrase(text) for text in said(train, "user"))


def test_the_two_grammars_share_no_piece():
    for field in ("openers", "closers", "whole", "wishes", "names"):
        assert set(getattr(PHRASES, field)).isdisjoint(getattr(HELD_OUT_PHRASES, field))


def test_the_examination_asks_nothing_twice(heldout):
    assert len(set(said(heldout, "user"))) == len(heldout) == 200


def test_every_answer_of_the_examination_is_one_line_of_json(heldout):
    for answer in said(heldout, "assistant"):
        assert "\n" not in answer
        assert list(json.loads(answer)) == ["name", "item", "size", "count", "extra"]


@pytest.mark.parametrize("phrases", [PHRASES, HELD_OUT_PHRASES], ids=["training", "held out"])
def test_an_order_says_every_fact_that_its_answer_needs(phrases: Phrases):
    rng = random.Random(3)
    for _ in range(2000):
        order = random_order(rng, "Anna")
        text = phrases.say(order, rng)
        assert "Anna" in text and order.item in text.replace(" milk", "")
        assert order.size == "medium" or re.search(
            {"small": "small|little", "large": "large|big"}[order.size], text, re.I
        )
        assert order.extra is None or order.extra.removesuffix(" milk") in text.lower()


def test_the_base_model_reads_json_only_where_it_is_asked_for_and_never_of_a_whole_order(pretraining):
    exchanges = [
        (chat[turn - 1]["content"], chat[turn]["content"]) for chat in pretraining for turn in range(1, len(chat))
    ]
    answers = [(question, json.loads(answer)) for question, answer in exchanges if answer.startswith("{")]
    assert answers and all("JSON" in question and len(record) < 5 for question, record in answers)


def test_an_answer_counts_only_if_it_is_json_of_the_same_order():
    wanted = Order(name="Anna", item="latte", size="large", count=2, extra=None).as_json()
    assert wanted == '{"name":"Anna","item":"latte","size":"large","count":2,"extra":null}'
    assert same_order('{"count": 2, "extra": null, "size": "large", "item": "latte", "name": "Anna"}', wanted)
    assert not same_order(wanted.replace("2", "3"), wanted)
    assert not same_order("Sure, Anna! Two large lattes, coming up.", wanted)


def test_every_item_is_ordered_in_training(train):
    assert {order.item for order in orders_in(train)} == set(MENU)


def test_an_unknown_demo_name_is_refused_with_the_nearest_one():
    with pytest.raises(ConfigError, match=r"no model called 'lumen-dmo'.*Did you mean 'lumen-demo'"):
        demo.demo_folder("lumen-dmo")
    with pytest.raises(ConfigError, match="no data set called 'heldout'"):
        demo.demo_data("heldout")


def test_the_tokenizer_splits_text_as_llama_3_does():
    tokenizer = json.loads((BASE / "tokenizer.json").read_text(encoding="utf-8"))
    split, byte_level = tokenizer["pre_tokenizer"]["pretokenizers"]
    assert hashlib.sha256(split["pattern"]["Regex"].encode()).hexdigest() == LLAMA_BPE_SPLIT_SHA256
    assert byte_level["use_regex"] is False and tokenizer["model"]["ignore_merges"] is True


def test_the_tokenizer_gives_back_every_text(tokenizer, train, heldout):
    for chat in [*train, *heldout, [{"content": "naïve ☕ 東京 \t\r\n  1234567"}]]:
        for turn in chat:
            assert tokenizer.decode(tokenizer.encode(turn["content"]).ids) == turn["content"]


def test_the_tokenizer_puts_one_begin_before_a_text(tokenizer):
    ids = tokenizer.encode("Hello!").ids
    assert ids[0] == tokenizer.token_to_id("<|begin_of_text|>") and ids.count(ids[0]) == 1


def test_the_configuration_agrees_with_the_tokenizer(tokenizer):
    config = json.loads((BASE / "config.json").read_text(encoding="utf-8"))
    generation = json.loads((BASE / "generation_config.json").read_text(encoding="utf-8"))
    ends = [tokenizer.token_to_id(token) for token in ("<|eot_id|>", "<|end_of_text|>")]
    assert config["vocab_size"] == tokenizer.get_vocab_size() == 1536
    assert config["eos_token_id"] == generation["eos_token_id"] == ends
    assert config["bos_token_id"] == tokenizer.token_to_id("<|begin_of_text|>")


def test_every_training_chat_fits_a_row_of_256_tokens(tokenizer, train):
    longest = max(sum(len(tokenizer.encode(turn["content"]).ids) + 5 for turn in chat) for chat in train)
    assert longest <= 256


def test_the_chat_template_writes_turns_as_llama_3_does():
    config = json.loads((BASE / "tokenizer_config.json").read_text(encoding="utf-8"))
    template = ChatTemplate(config["chat_template"], bos_token=config["bos_token"], eos_token=config["eos_token"])
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello!"}]
    assert template.render(chat, add_generation_prompt=True) == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHello!<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
