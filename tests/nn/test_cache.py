"""The cache gives every layer the keys that its queries can see, however a text is cut, and holds no more."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import FAMILIES, WINDOW, family, relative_error

from lumen.checkpoint import load_model
from lumen.nn.cache import ROOM, KVCache

WINDOWS = [0, 1, 2, 8, 24]
EIGHTH = {1: 1, 2: 1, 8: 1, 24: 3}  # columns beyond window − 1 that a buffer may have
CPU = torch.device("cpu")


def empty_cache(windows=WINDOWS, rows=2, capacity=1000):
    layers = [SimpleNamespace(window=window) for window in windows]
    return KVCache(SimpleNamespace(layers=layers, kv_heads=3, head_dim=4), rows, capacity, torch.float32, CPU)


def some_keys(length, seed=0):
    return torch.randn(2, length, 3, 4, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=60, deadline=None)
@given(steps=st.lists(st.integers(1, 30), min_size=1, max_size=40), ones=st.integers(0, 60))
def test_every_step_is_given_the_last_keys_that_its_window_reaches(steps, ones):
    steps = [*steps, *[1] * ones]
    keys, values = some_keys(sum(steps)), some_keys(sum(steps), 1)
    cache, end = empty_cache(capacity=sum(steps)), 0
    for tokens in steps:
        start, end = end, end + tokens
        assert cache.extend(tokens, None) is None
        for layer, window in enumerate(WINDOWS):
            S = min(end, window - 1 + tokens) if window else end
            assert cache.seen(window, tokens) == S
            k, v = cache.append(layer, keys[:, start:end], values[:, start:end])
            assert torch.equal(k, keys[:, end - S : end]) and torch.equal(v, values[:, end - S : end])
            most = window - 1 + EIGHTH[window] if window else sum(steps)
            assert cache.keys[layer].shape[1] <= most >= cache.values[layer].shape[1]


def test_room_grows_with_what_is_used_and_not_with_what_is_allowed():
    cache = empty_cache([0, 4096], capacity=10**9)
    assert cache.nbytes == 0
    for tokens in (300, *[1] * 500):
        cache.extend(tokens, None)
        for layer in (0, 1):
            cache.append(layer, *[torch.ones(2, tokens, 3, 4)] * 2)
            assert cache.length <= cache.keys[layer].shape[1] <= cache.length * 1.5 + ROOM
    column = 2 * 3 * 4 * 4  # bytes of a column: rows, heads, width, fp32
    assert cache.nbytes == 2 * column * sum(keys.shape[1] for keys in cache.keys)


def test_one_token_is_written_in_place():
    cache = empty_cache([0, 4096])
    cache.extend(5, None)
    for layer in (0, 1):
        cache.append(layer, some_keys(5), some_keys(5))
    where = [buffer.data_ptr() for buffer in (*cache.keys, *cache.values)]
    for _ in range(100):
        cache.extend(1, None)
        for layer in (0, 1):
            k, _ = cache.append(layer, some_keys(1), some_keys(1))
            assert k.data_ptr() == where[layer]
    assert where == [buffer.data_ptr() for buffer in (*cache.keys, *cache.values)]


def test_documents_are_those_of_all_tokens_and_zero_where_nobody_said():
    cache = empty_cache([8])
    assert cache.extend(2, None) is None
    document = torch.tensor([[-1, -1, 0], [0, 0, 0]])
    assert cache.extend(3, document).tolist() == [[0, 0, -1, -1, 0], [0] * 5]
    assert cache.extend(1, None).tolist() == [[0, 0, -1, -1, 0, 0], [0] * 6]


@pytest.mark.parametrize("shape", FAMILIES)
def test_a_text_read_in_steps_has_the_logits_of_the_whole_text(tmp_path, shape):
    """Two rows, one padded on its left by more than a window; steps shorter and longer than windows."""
    family(tmp_path, shape)
    model = load_model(tmp_path, dtype="float32", device="cpu")
    T, padding = 45, WINDOW + 3
    tokens = torch.randint(2, 320, (2, T), generator=torch.Generator().manual_seed(1))
    positions = torch.stack([torch.arange(T), (torch.arange(T) - padding).clamp(min=0)])
    document = torch.zeros(2, T, dtype=torch.int64)
    document[1, :padding] = -1
    cache = KVCache(model.spec, 2, T, model.dtype, CPU)
    cache.reach = positions[:, -1:]
    found, start = [], 0
    with torch.no_grad():
        for step in (3, 20, 1, 1, 2, 9, 1, 1, 1, 1, 1, 4):
            part = slice(start, start + step)
            found.append(model.logits(model(tokens[:, part], positions[:, part], document[:, part], cache)))
            start += step
        found = torch.cat(found, dim=1)
        alone = model.logits(model(tokens[1:, padding:], torch.arange(T - padding)[None]))
        assert relative_error(found[0], model.logits(model(tokens[:1], positions[:1]))[0]) <= 1e-5
        assert relative_error(found[1, padding:], alone[0]) <= 1e-5
