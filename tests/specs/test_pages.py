"""Every page of model_specs/, found by listing the folder."""

import pytest
import torch

from lumen.checkpoint import new_model
from lumen.names import TRANSFORMS
from lumen.spec import DIMS, Family

PARAMETERS = {  # as the model cards say, in the sizes that a page lists
    ("llama2", "7b"): 6_738_415_616,
    ("llama2", "13b"): 13_015_864_320,
    ("llama2", "70b"): 68_976_648_192,
    ("llama3", "8b"): 8_030_261_248,
    ("llama3", "70b"): 70_553_706_496,
    ("llama3.1", "3.2-1b"): 1_235_814_400,
    ("llama3.1", "3.2-3b"): 3_212_749_824,
    ("llama3.1", "8b"): 8_030_261_248,
    ("llama3.1", "70b"): 70_553_706_496,
}
TIED = {("llama3.1", "3.2-1b"), ("llama3.1", "3.2-3b")}
TINY = {"layers": 2, "dim": 32, "heads": 4, "kv_heads": 2, "head_dim": 8, "mlp_dim": 48, "vocab": 61}


def bind(page: str, size: dict, tied: bool = False):
    """The page bound to a config.json that has the given size and whatever numbers the page asks for."""
    family = Family.load(page)
    keys = DIMS | {"layers": "num_hidden_layers", "kv_heads": "num_key_value_heads", "head_dim": "head_dim"}
    config = {
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 128,
        "tie_word_embeddings": tied,
        "rope_scaling": {
            "rope_type": "llama3" if family.page.rope["full"].kind == "llama3" else "default",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    }
    return family.bind(config | {keys[name]: value for name, value in size.items()})


@pytest.mark.parametrize(
    ("page", "size"), [(page, size) for page in Family.names() for size in Family.load(page).page.sizes]
)
def test_a_size_has_as_many_parameters_as_the_published_model(page, size):
    spec = bind(page, Family.load(page).page.sizes[size], tied=(page, size) in TIED)
    assert sum(torch.Size(name.shape).numel() for name in spec.tensors()) == PARAMETERS[page, size]


def test_llama_8b_has_the_291_tensors_of_the_published_checkpoint():
    names = list(bind("llama3.1", Family.load("llama3.1").page.sizes["8b"]).tensors())
    assert len(names) == 291
    for column in ("role", "checkpoint", "gguf"):
        assert len({getattr(name, column) for name in names}) == 291


@pytest.mark.parametrize("page", Family.names())
def test_every_name_makes_the_round_trip(page):
    spec = bind(page, TINY)
    for name in spec.names:
        assert spec.names.by_checkpoint(name.checkpoint) == spec.names.by_role(name.role) == name


@pytest.mark.parametrize("page", Family.names())
def test_a_tiny_model_runs_forward_and_backward(page):
    model = new_model(bind(page, TINY), seed=0).requires_grad_(True)
    tokens = torch.randint(TINY["vocab"], (2, 7))
    model.logits(model(tokens, torch.arange(7).expand(2, 7))).square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("shape", [(24, 5), (24,)])
def test_every_transform_has_an_inverse(transform, shape):
    values = torch.randn(shape)
    there = TRANSFORMS[transform].to_gguf(values, 3)
    torch.testing.assert_close(TRANSFORMS[transform].from_gguf(there, 3), values)
    if transform != "same":
        assert not torch.equal(there, values)
