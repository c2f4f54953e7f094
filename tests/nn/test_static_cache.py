"""The static cache shows the queries of a step what the growing cache shows them, whatever it took over."""

from types import SimpleNamespace

import pytest
import torch

from lumen.nn.cache import KVCache
from lumen.nn.static_cache import ROOM, StaticCache

WINDOWS = [0, 1, 2, 8, 24]


def some(tokens, seed):
    return torch.randn(2, tokens, 3, 4, generator=torch.Generator().manual_seed(seed))


def filled_cache(steps, capacity):
    layers = [SimpleNamespace(window=window) for window in WINDOWS]
    spec = SimpleNamespace(layers=layers, kv_heads=3, head_dim=4)
    cache = KVCache(spec, 2, capacity, torch.float32, torch.device("cpu"))
    for seed, tokens in enumerate(steps):
        cache.extend(tokens, None)
        for layer in range(len(WINDOWS)):
            cache.append(layer, some(tokens, seed), some(tokens, seed + 50))
    return cache


@pytest.mark.parametrize("steps", [[1], [5], [30], [3, 1, 1], [7, 20, 1, 1, 1], [1] * 40])
def test_a_step_sees_the_columns_that_the_growing_cache_hands_out(steps):
    growing, taken = filled_cache(steps, 100), filled_cache(steps, 100)
    start = torch.tensor([0, min(sum(steps) - 1, 4)], dtype=torch.int32)
    cache = StaticCache(taken, start, 100)
    assert taken.nbytes == 0
    where = [buffer.data_ptr() for buffer in (*cache.keys, *cache.values)]
    for step in range(30):
        length = sum(steps) + step + 1
        growing.extend(1, None)
        cache.extend(1, None)
        for layer, window in enumerate(WINDOWS):
            k, v = some(1, 100 + step), some(1, 200 + step)
            wanted = growing.append(layer, k, v)
            found = cache.append(layer, k, v)
            seen = cache.filled(window)
            assert seen.length == length
            for row in range(2):
                first = max(int(start[row]), length - growing.seen(window, 1))
                assert seen.first[row] == first
                for one, other in zip(found, wanted, strict=True):
                    assert torch.equal(one[row, first:length], other[row, other.shape[1] - (length - first) :])
    assert where == [buffer.data_ptr() for buffer in (*cache.keys, *cache.values)]


def test_room_grows_by_what_is_filled_up_to_the_capacity_and_keeps_what_is_held():
    cache = StaticCache(filled_cache([3000], 5000), torch.zeros(2, dtype=torch.int32), 5000)
    assert cache.keys[0].shape[1] == cache.room == 4500
    cache.columns = 4500
    assert cache.full
    held = [buffer[:, 2990:3000].clone() for buffer in (*cache.keys, *cache.values)]
    cache.grow()
    assert not cache.full and cache.room == 5000
    for buffer, before in zip((*cache.keys, *cache.values), held, strict=True):
        # as integers: what was never written may be NaN
        assert buffer.shape[1] == 5000 and torch.equal(*(t.view(torch.int32) for t in (buffer[:, 2990:3000], before)))
    assert StaticCache(filled_cache([3], 5000), torch.zeros(2, dtype=torch.int32), 5000).room == 3 + ROOM
