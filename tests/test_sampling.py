"""Generation against golden ids, against transformers, and against itself: batches, cuts, seeds, stops and limits."""

import json
from itertools import pairwise

import pytest
import tiny_models
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lumen.adapter import attach_lora
from lumen.checkpoint import load_model
from lumen.config import Lora
from lumen.errors import ConfigError, LumenError
from lumen.sampling import AnswerText, choose, cut, generate, penalize
from lumen.text.tokenizer import load_tokenizer

PROMPTS = [[1, 17, 30, 2, 99], [5], [60, 61, 62], [7, 7, 7, 7, 7, 7, 7, 7, 12]]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A tiny random Llama of transformers, and the same weights in lumen; a context of 64, nothing ends it."""
    folder = tmp_path_factory.mktemp("llama")
    theirs = tiny_models.llama(folder, vocab_size=101, max_position_embeddings=64, eos_token_id=None)
    return theirs, load_model(folder, dtype="float32", device="cpu")


@pytest.fixture
def model(llama):
    return llama[1]


def ids(model, prompts, max_tokens=12, stop_ids=(), **options):
    return [answer.ids for answer in generate(model, prompts, max_tokens=max_tokens, stop_ids=stop_ids, **options)]


@pytest.fixture(scope="session")
def stories(shared_data):
    return shared_data / "models" / "stories260K"


@pytest.mark.parametrize("prefill_chunk", [2048, 3])
@pytest.mark.parametrize("given", [1, 50])
def test_greedy_ids_equal_the_golden_story(stories, given, prefill_chunk):
    golden = json.loads((stories / "golden_greedy.json").read_text())["ids"]
    model = load_model(stories, dtype="float32", device="cpu")
    left = len(golden) - given
    (answer,) = generate(model, [golden[:given]], max_tokens=left, stop_ids=(), prefill_chunk=prefill_chunk)
    assert answer.ids == golden[given:]
    assert answer.finish == "length"


# --- every family ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=tiny_models.FAMILIES)
def made(request, tmp_path_factory):
    """The folder of a tiny checkpoint, transformers' model of it, and lumen's."""
    folder = tmp_path_factory.mktemp(request.param.replace(" ", "_"))
    theirs = tiny_models.family(folder, request.param)
    return folder, theirs, load_model(folder, dtype="float32", device="cpu")


def random_prompts(*lengths):
    """Shorter and longer than the families' windows, and than the lengths that their ropes were trained for."""
    random = torch.Generator().manual_seed(5)
    return [torch.randint(2, 320, (length,), generator=random).tolist() for length in lengths]


def test_greedy_ids_of_every_family_equal_transformers_up_to_the_end_of_the_context(made):
    _, theirs, ours = made
    prompts = random_prompts(2 * tiny_models.WINDOW + 1, tiny_models.CONTEXT - 19)
    left = tiny_models.CONTEXT - len(prompts[0])
    answers = generate(ours, prompts, max_tokens=left + 1, stop_ids=(), prefill_chunk=5)
    for prompt, answer in zip(prompts, answers, strict=True):
        options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        wanted = theirs.generate(torch.tensor([prompt]), max_length=tiny_models.CONTEXT, **options)[0].tolist()
        assert (prompt + answer.ids)[: tiny_models.CONTEXT] == wanted
        if ours.spec.context_length == tiny_models.CONTEXT:  # a rope may make it longer
            assert (answer.finish, len(answer.ids)) == ("context", len(wanted) - len(prompt))


def test_greedy_ids_of_every_family_equal_transformers_from_prompts_shorter_than_its_windows(made):
    """And, where a rope changes with the length of a text, across that length. Without a cache, since transformers' own
    differs there from what it computes without one.
    """
    _, theirs, ours = made
    options = {"do_sample": False, "use_cache": False, "eos_token_id": None, "pad_token_id": 0}
    for prompt in random_prompts(1, 3):
        wanted = theirs.generate(torch.tensor([prompt]), max_new_tokens=12, **options)[0].tolist()
        assert prompt + ids(ours, [prompt])[0] == wanted


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_a_batch_of_every_family_gives_what_each_prompt_gives_alone_in_one_piece(made, temperature):
    """A row's dice are its own: seed + row alone roll what seed rolls in the batch."""
    ours, prompts = made[2], random_prompts(2, 35, 11)
    together = ids(ours, prompts, 20, temperature=temperature, seed=4, prefill_chunk=3)
    for row, prompt in enumerate(prompts):
        assert ids(ours, [prompt], 20, temperature=temperature, seed=4 + row) == [together[row]]


def test_a_4_bit_base_with_an_adapter_decodes_what_it_computes_without_a_cache(made):
    model = load_model(made[0], dtype="float32", device="cpu", nf4=True)
    torch.manual_seed(0)
    for pair in attach_lora(model, Lora(rank=4)).values():
        torch.nn.init.normal_(pair.b, std=0.3)
    prompts = random_prompts(4, 19)
    answers = ids(model.eval(), prompts, 30, prefill_chunk=6)
    for prompt, answer in zip(prompts, answers, strict=True):
        tokens = torch.tensor([prompt + answer])
        with torch.no_grad():
            logits = model.logits(model(tokens, torch.arange(tokens.shape[1])[None]))
        assert logits[0, len(prompt) - 1 : -1].argmax(-1).tolist() == answer
    assert answers != ids(load_model(made[0], dtype="float32", device="cpu", nf4=True), prompts, 30)


# --- one model -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_ids_equal_transformers(llama, prompt):
    theirs, ours = llama
    wanted = theirs.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=30, use_cache=True)
    assert ids(ours, [prompt], 30) == [wanted[0, len(prompt) :].tolist()]


def test_a_batch_of_unequal_prompts_gives_what_each_prompt_gives_alone(model):
    assert ids(model, PROMPTS, 40) == [ids(model, [prompt], 40)[0] for prompt in PROMPTS]


def test_cached_decoding_equals_the_whole_pass(model):
    (answer,) = ids(model, [PROMPTS[0]], 20)
    tokens = torch.tensor([[*PROMPTS[0], *answer]])
    with torch.no_grad():
        logits = model.logits(model(tokens, torch.arange(tokens.shape[1])[None]))
    start = len(PROMPTS[0]) - 1
    assert logits[0, start:-1].argmax(-1).tolist() == answer


def test_each_row_stops_at_its_own_stop_token_and_the_others_go_on(model):
    free = ids(model, PROMPTS, 20)
    stop = free[1][4]
    for answer, whole in zip(generate(model, PROMPTS, max_tokens=20, stop_ids=[stop]), free, strict=True):
        if stop in whole:
            assert answer.ids == whole[: whole.index(stop) + 1]
            assert answer.finish == "stop"
        else:
            assert (answer.ids, answer.finish) == (whole, "length")


def test_a_repetition_penalty_is_that_of_transformers(llama):
    theirs, ours = llama
    for prompt, answer in zip(PROMPTS, ids(ours, PROMPTS, 40, repetition_penalty=1.4), strict=True):
        options = {"do_sample": False, "max_new_tokens": 40, "repetition_penalty": 1.4}
        assert prompt + answer == theirs.generate(torch.tensor([prompt]), **options)[0].tolist()
    assert answer != ids(ours, [prompt], 40)[0]


def test_one_token_is_one_token(model):
    assert [len(row) for row in ids(model, PROMPTS, 1)] == [1, 1, 1, 1]


def test_tokens_are_reported_as_they_come(model):
    heard = [[] for _ in PROMPTS]
    stop = ids(model, PROMPTS, 20)[0][7]
    answers = ids(model, PROMPTS, 20, [stop], on_token=lambda row, token: heard[row].append(token))
    assert heard == answers


@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.2}])
def test_a_seed_repeats_its_answers_and_leaves_the_global_random_state_alone(model, options):
    state = torch.get_rng_state()
    first, second, other = (ids(model, PROMPTS, 20, temperature=1.5, seed=seed, **options) for seed in (4, 4, 5))
    assert first == second != other
    assert torch.equal(state, torch.get_rng_state())


def test_copies_of_a_prompt_are_sampled_independently(model):
    answers = ids(model, [PROMPTS[0]] * 8, 12, temperature=1.5)
    assert len({tuple(answer) for answer in answers}) == 8


def random_logits(rows=40, vocab=101):
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(0)) * 3


CUTS = [(5, 1.0, 0.0), (0, 0.7, 0.0), (0, 1.0, 0.1), (20, 0.9, 0.05), (1000, 0.01, 0.0), (0, 1.0, 1.0), (1, 1.0, 0.0)]


@pytest.mark.parametrize(("top_k", "top_p", "min_p"), CUTS)
def test_cuts_equal_transformers_warpers_in_their_order(top_k, top_p, min_p):
    wanted = logits = random_logits()
    warpers = [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    warpers += [MinPLogitsWarper(min_p)] if min_p else []
    for warper in warpers:
        wanted = warper(None, wanted)
    assert torch.equal(cut(logits, top_k, top_p, min_p), wanted)


@pytest.mark.parametrize("penalty", [1.3, 0.7])
def test_a_penalty_lowers_or_raises_the_tokens_that_are_held(penalty):
    logits, prompt = random_logits(), torch.randint(0, 101, (40, 9), generator=torch.Generator().manual_seed(1))
    held = torch.zeros(40, 101, dtype=torch.bool).scatter_(1, prompt, True)
    wanted = RepetitionPenaltyLogitsProcessor(penalty)(prompt, logits)
    assert torch.equal(penalize(logits, held, penalty), wanted)


def test_each_token_is_drawn_from_as_much_of_the_unit_as_transformers_gives_it():
    draws = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    for logits in random_logits(5):
        wanted = logits[None]
        warpers = [TemperatureLogitsWarper(0.8), TopKLogitsWarper(30), TopPLogitsWarper(0.95), MinPLogitsWarper(0.02)]
        for warper in warpers:
            wanted = warper(None, wanted)
        options = {"temperature": 0.8, "top_k": 30, "top_p": 0.95, "min_p": 0.02}
        chosen = choose(logits.expand(10_000, -1), **options, draws=draws)
        counts = torch.bincount(chosen, minlength=101)
        assert (counts - wanted.softmax(-1)[0] * 10_000).abs().max() <= 1
        assert not counts[wanted[0] == -torch.inf].any()


def test_the_ends_of_the_unit_draw_tokens_that_no_cut_left_out():
    logits = torch.tensor([[-5.0, 3.0, 2.0, -5.0]]).expand(2, 4)
    draws = torch.tensor([0.0, 1.0 - 2**-53], dtype=torch.float64)
    assert choose(logits, temperature=1.0, top_k=2, top_p=1.0, min_p=0.0, draws=draws).tolist() == [1, 2]


def test_tokens_come_as_often_as_their_probability_says():
    logits = torch.tensor([[1.0, 0.0, -1.0, 2.0]])
    draws = torch.rand(20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    chosen = choose(logits.expand(20_000, 4), temperature=0.7, top_k=0, top_p=1.0, min_p=0.0, draws=draws)
    share = torch.bincount(chosen, minlength=4) / 20_000
    assert torch.allclose(share, (logits / 0.7).softmax(-1)[0], atol=0.01)  # three standard deviations


def test_a_tiny_temperature_is_greedy_and_not_a_number_too_large():
    logits = random_logits()
    draws = torch.rand(len(logits), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    chosen = choose(logits, temperature=1e-40, top_k=0, top_p=1.0, min_p=0.0, draws=draws)
    assert torch.equal(chosen, logits.argmax(-1))


def test_an_answer_ends_where_the_context_does(model):
    short, long = generate(model, [[1] * 10, [1] * 60], max_tokens=100, stop_ids=())
    assert (len(short.ids), len(long.ids)) == (54, 4)
    assert short.finish == long.finish == "context"


def test_logits_that_are_no_numbers_are_refused(tmp_path):
    tiny_models.llama(tmp_path, vocab_size=101)
    model = load_model(tmp_path, dtype="float32", device="cpu")
    model.norm.weight.data[3] = torch.nan
    for temperature in (0.0, 1.0):
        with pytest.raises(LumenError, match="logits for prompt 1 are not numbers after 0 tokens"):
            generate(model, PROMPTS, max_tokens=3, stop_ids=(), temperature=temperature)


def test_dropout_is_off_meanwhile_and_training_mode_is_restored(tmp_path):
    tiny_models.llama(tmp_path, vocab_size=101)
    model = load_model(tmp_path, dtype="float32", device="cpu")
    for pair in attach_lora(model, Lora(dropout=0.9)).values():
        torch.nn.init.normal_(pair.b)
    wanted = ids(model.eval(), PROMPTS)
    assert ids(model.train(), PROMPTS) == wanted
    assert model.training and torch.is_grad_enabled()


def test_no_prompts_are_no_answers(model):
    assert generate(model, [], max_tokens=3, stop_ids=()) == []


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([[1], []], "Prompt 2 is empty"),
        (["One"], "Prompt 1: wanted a list of token ids, found 'One'"),
        ([1, 2], "Prompt 1: wanted a list of token ids, found 1"),
        ([[1] * 64], "Prompt 1 has 64 tokens and leaves no room.*context is 64 tokens"),
        ([[1, 101]], "Prompt 1 holds token 101, but the model has the tokens 0 to 100"),
    ],
)
def test_prompts_that_cannot_be_continued_are_refused(model, prompts, message):
    with pytest.raises(ConfigError, match=message):
        generate(model, prompts, max_tokens=3, stop_ids=())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("min_p", 1.5),
        ("repetition_penalty", 0.0),
        ("seed", -1),
        ("prefill_chunk", 0),
    ],
)
def test_options_outside_their_range_are_refused_by_name(model, name, value):
    with pytest.raises(ConfigError, match=f"^{name} must be .*found {value}"):
        generate(model, PROMPTS, **{"max_tokens": 3, "stop_ids": (), name: value})


# --- text ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def tokenizers(stories, tmp_path_factory):
    """A byte-level tokenizer and a SentencePiece one, each with the ids that are single bytes or characters."""
    folder = tmp_path_factory.mktemp("byte_level")
    tiny_models.byte_level_tokenizer(folder)
    return {"byte-level": load_tokenizer(folder), "sentencepiece": load_tokenizer(stories)}


def single_bytes(tokenizer, text):
    """Ids of `text`, one a byte: token borders inside every character."""
    of_byte = {tokenizer.bytes_of(id): id for id in range(tokenizer.size) if id not in tokenizer.special_ids}
    return [of_byte[bytes([byte])] for byte in text.encode()]


def cut_character_by_character(text, stops):
    """The definition: characters come one by one; the first that completes a stop string cuts off the longest."""
    for end in range(len(text) + 1):
        if done := [stop for stop in stops if text[:end].endswith(stop)]:
            return text[: end - max(map(len, done))], True
    return text, False


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece"])
@settings(max_examples=150, deadline=None)
@given(
    text=st.text(alphabet="ab é🙂\n", max_size=30),
    stops=st.lists(st.text(alphabet="ab é🙂\n", min_size=1, max_size=5), max_size=3),
    special=st.integers(0, 30),
    data=st.data(),
)
def test_a_stop_string_cuts_the_text_wherever_tokens_begin_and_end(tokenizers, kind, text, stops, special, data):
    tokenizer = tokenizers[kind]
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=6)) | {0, len(text)})
    parts = [text[start:end] for start, end in pairwise(cuts)]
    ids = []
    for part in parts:
        ids += tokenizer.encode(part) if data.draw(st.booleans()) else single_bytes(tokenizer, part)
    ids[special:special] = [tokenizer.eos_id]  # says nothing
    wanted, stopped = cut_character_by_character(tokenizer.decode(ids, skip_special=True), stops)
    answer, shown = AnswerText(tokenizer, stops), ""
    for id in ids:
        shown += answer.push(id)
        assert shown == answer.text and wanted.startswith(shown)
    shown += answer.flush()
    assert (shown, answer.text, answer.stopped) == (wanted, wanted, stopped)


def test_text_waits_only_as_long_as_it_may_be_a_stop_string(tokenizers):
    tokenizer = tokenizers["byte-level"]
    answer = AnswerText(tokenizer, ["\nUser:", "\n\n"])
    said = [answer.push(id) for id in single_bytes(tokenizer, "a\nUse it\n🙂")]
    assert said == ["a", "", "", "", "", "\nUse ", "i", "t", "", "", "", "", "\n🙂"]


def test_a_stop_string_ends_a_row_at_the_token_where_transformers_ends_it(stories):
    model, tokenizer = load_model(stories, dtype="float32", device="cpu"), load_tokenizer(stories)
    golden = json.loads((stories / "golden_greedy.json").read_text())
    theirs = transformers.AutoModelForCausalLM.from_pretrained(stories)
    cutter = transformers.AutoTokenizer.from_pretrained(stories)
    text = tokenizer.decode(golden["ids"], skip_special=True)
    for stop in (text[60:71], text[101:103], text[40:41]):
        pieces = []
        (answer,) = generate(
            model,
            [golden["ids"][:1]],
            max_tokens=120,
            stop_ids=(),
            stop_strings=["never said", stop],
            tokenizer=tokenizer,
            on_text=lambda row, piece, pieces=pieces: pieces.append((row, piece)),
        )
        options = {"max_new_tokens": 120, "do_sample": False, "stop_strings": [stop], "tokenizer": cutter}
        assert answer.ids == theirs.generate(torch.tensor([golden["ids"][:1]]), **options)[0, 1:].tolist()
        assert (answer.text, answer.finish) == (text.partition(stop)[0], "stop")
        assert "".join(piece for _, piece in pieces) == answer.text and {row for row, _ in pieces} == {0}


def test_each_row_stops_at_the_stop_string_of_its_own_text(stories):
    model, tokenizer = load_model(stories, dtype="float32", device="cpu"), load_tokenizer(stories)
    prompts = [tokenizer.encode(text) for text in ("Once upon a time", "Lily saw a big dog and")]
    free = generate(model, prompts, max_tokens=60, stop_ids=(), tokenizer=tokenizer)
    assert [answer.text for answer in free] == [tokenizer.decode(answer.ids, skip_special=True) for answer in free]
    stop = free[1].text[30:36]
    assert stop not in free[0].text
    long, short = generate(model, prompts, max_tokens=60, stop_ids=(), tokenizer=tokenizer, stop_strings=[stop])
    assert long == free[0]
    assert (short.text, short.finish) == (free[1].text.partition(stop)[0], "stop")


def test_the_name_of_a_special_token_stops_at_that_token(tokenizers, tmp_path):
    tokenizer = tokenizers["byte-level"]
    tiny_models.llama(tmp_path, vocab_size=tokenizer.size, eos_token_id=None)
    model = load_model(tmp_path, dtype="float32", device="cpu")
    model.head.weight.data.zero_()  # every token is as likely, so the first is taken
    assert tokenizer.token_to_id("<|endoftext|>") == 0
    options = {"max_tokens": 9, "stop_ids": (), "tokenizer": tokenizer}
    (answer,) = generate(model, [[5]], stop_strings=["<|endoftext|>"], **options)
    assert (answer.ids, answer.text, answer.finish) == ([0], "", "stop")
    (answer,) = generate(model, [[5]], stop_strings=["<|im_end|>"], **options)
    assert answer.finish == "length"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stop_strings": ["x"]}, "want the tokenizer"),
        ({"on_text": print}, "want the tokenizer"),
        ({"stop_strings": ["x", ""]}, "wants a list of texts, none of them empty"),
        ({"stop_strings": "User:"}, "wants a list of texts"),
    ],
)
def test_stops_that_cannot_be_looked_for_are_refused(model, options, message):
    with pytest.raises(ConfigError, match=message):
        generate(model, PROMPTS, max_tokens=3, stop_ids=(), **options)
