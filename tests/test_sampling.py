"""Generation against golden ids, against transformers, and against itself: batches, cuts, seeds, stops and limits."""

import json

import pytest
import tiny_models
import torch
from transformers.generation.logits_process import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from lumen.adapter import attach_lora
from lumen.checkpoint import load_model
from lumen.config import Lora
from lumen.errors import ConfigError
from lumen.sampling import choose, cut, generate

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


def test_greedy_ids_equal_the_golden_story(shared_data):
    folder = shared_data / "models" / "stories260K"
    golden = json.loads((folder / "golden_greedy.json").read_text())["ids"]
    model = load_model(folder, dtype="float32", device="cpu")
    (answer,) = generate(model, [golden[:1]], max_tokens=len(golden) - 1, stop_ids=())
    assert answer.ids == golden[1:]
    assert answer.finish == "length"


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


def test_tokens_come_as_often_as_their_probability_says():
    logits = torch.tensor([[1.0, 0.0, -1.0, 2.0]])
    random = torch.Generator().manual_seed(0)
    draws = choose(logits.expand(20_000, 4), temperature=0.7, top_k=0, top_p=1.0, min_p=0.0, random=random)
    share = torch.bincount(draws, minlength=4) / 20_000
    assert torch.allclose(share, (logits / 0.7).softmax(-1)[0], atol=0.01)  # three standard deviations


def test_a_tiny_temperature_is_greedy_and_not_a_number_too_large():
    random = torch.Generator().manual_seed(0)
    logits = random_logits()
    chosen = choose(logits, temperature=1e-40, top_k=0, top_p=1.0, min_p=0.0, random=random)
    assert torch.equal(chosen, logits.argmax(-1))


def test_an_answer_ends_where_the_context_does(model):
    short, long = generate(model, [[1] * 10, [1] * 60], max_tokens=100, stop_ids=())
    assert (len(short.ids), len(long.ids)) == (54, 4)
    assert short.finish == long.finish == "length"


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
    ],
)
def test_options_outside_their_range_are_refused_by_name(model, name, value):
    with pytest.raises(ConfigError, match=f"^{name} must be .*found {value}"):
        generate(model, PROMPTS, **{"max_tokens": 3, "stop_ids": (), name: value})
