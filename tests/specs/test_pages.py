"""Every page of model_specs/, found by listing the folder."""

import pytest
import torch

from lumen.checkpoint import new_model
from lumen.names import TRANSFORMS
from lumen.spec import Family

GEMMA3_VISION = 416_866_032  # the tower of all sizes; its projector from 1152 to D is one norm and one matrix
PARAMETERS = {  # as the model cards say, in the sizes that a page lists; of Gemma 3 from 4b on the text half
    ("llama2", "7b"): 6_738_415_616,
    ("llama2", "13b"): 13_015_864_320,
    ("llama2", "70b"): 68_976_648_192,
    ("llama3", "8b"): 8_030_261_248,
    ("llama3", "70b"): 70_553_706_496,
    ("llama3.1", "3.2-1b"): 1_235_814_400,
    ("llama3.1", "3.2-3b"): 3_212_749_824,
    ("llama3.1", "8b"): 8_030_261_248,
    ("llama3.1", "70b"): 70_553_706_496,
    ("qwen2", "0.5b"): 494_032_768,
    ("qwen2", "1.5b"): 1_543_714_304,
    ("qwen2", "3b"): 3_085_938_688,
    ("qwen2", "7b"): 7_615_616_512,
    ("qwen2", "14b"): 14_770_033_664,
    ("qwen2", "32b"): 32_763_876_352,
    ("qwen2", "72b"): 72_706_203_648,
    ("qwen2-vl", "2b"): 1_543_714_304,  # that of the text model of the same size, whose shape it has
    ("qwen2-vl", "2.5-3b"): 3_085_938_688,
    ("qwen2-vl", "7b"): 7_615_616_512,
    ("qwen2-vl", "2.5-32b"): 32_763_876_352,
    ("qwen2-vl", "72b"): 72_706_203_648,
    ("qwen3-vl", "2b"): 1_720_574_976,  # so is this
    ("qwen3-vl", "4b"): 4_022_468_096,
    ("qwen3-vl", "8b"): 8_190_735_360,
    ("qwen3-vl", "32b"): 32_762_123_264,
    ("mistral", "7b"): 7_241_732_096,
    ("mistral-v0.2", "7b-v0.2"): 7_241_732_096,
    ("mistral-v0.2", "7b-v0.3"): 7_248_023_552,
    ("mistral-v0.2", "nemo-12b"): 12_247_782_400,
    ("mistral-small", "24b"): 23_572_403_200,
    ("qwen3", "0.6b"): 596_049_920,
    ("qwen3", "1.7b"): 1_720_574_976,
    ("qwen3", "4b"): 4_022_468_096,
    ("qwen3", "8b"): 8_190_735_360,
    ("qwen3", "14b"): 14_768_307_200,
    ("qwen3", "32b"): 32_762_123_264,
    ("mixtral", "8x7b"): 46_702_792_704,
    ("mixtral", "8x22b"): 140_630_071_296,
    ("qwen2-moe", "1.5-a2.7b"): 14_315_784_192,
    ("qwen2-moe", "57b-a14b"): 57_408_658_944,
    ("qwen3-moe", "30b-a3b"): 30_532_122_624,
    ("qwen3-moe", "235b-a22b"): 235_093_634_560,
    ("phi3", "mini"): 3_821_079_552,
    ("phi3", "medium"): 13_960_238_080,
    ("phi4", "14b"): 14_659_507_200,
    ("phi4-mini", "3.8b"): 3_836_021_760,
    ("gemma", "2b"): 2_506_172_416,
    ("gemma", "7b"): 8_537_680_896,
    ("gemma2", "2b"): 2_614_341_888,
    ("gemma2", "9b"): 9_241_705_984,
    ("gemma2", "27b"): 27_227_128_320,
    ("gemma3", "270m"): 268_098_176,
    ("gemma3", "1b"): 999_885_952,
    ("gemma3", "4b"): 4_300_079_472 - GEMMA3_VISION - 1152 * (2560 + 1),
    ("gemma3", "12b"): 12_187_325_040 - GEMMA3_VISION - 1152 * (3840 + 1),
    ("gemma3", "27b"): 27_432_406_640 - GEMMA3_VISION - 1152 * (5376 + 1),
}
TIED = {
    *[("llama3.1", size) for size in ("3.2-1b", "3.2-3b")],
    *[("qwen2", size) for size in ("0.5b", "1.5b", "3b")],
    *[("qwen2-vl", size) for size in ("2b", "2.5-3b")],
    *[("qwen3-vl", size) for size in ("2b", "4b")],
    ("phi4-mini", "3.8b"),
    *[("qwen3", size) for size in ("0.6b", "1.7b", "4b")],
}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
           "shared_expert_intermediate_size": 40, "norm_topk_prob": True}  # fmt: skip
TINY = {"layers": 2, "dim": 32, "heads": 4, "kv_heads": 2, "head_dim": 8, "mlp_dim": 48, "vocab": 61}


def bind(page: str, size: dict, tied: bool = False):
    """The page bound to a config.json that has the given size and whatever numbers the page asks for."""
    family = Family.load(page)
    config = EXPERTS | {
        "sliding_window": 4096,
        "query_pre_attn_scalar": size["head_dim"],
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "rope_local_base_freq": 10000.0,
        "rope_theta": 10000.0,
        "mrope_section": [size["head_dim"] // 2 - 2, 1, 1],
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
    config |= {key: wanted for key, wanted in family.page.match.items() if key == "partial_rotary_factor"}
    absent = {key for key, wanted in (family.page.match | family.page.expect).items() if wanted == "absent"}
    config = {key: value for key, value in config.items() if key not in absent}
    return family.bind(config | {family.size_keys[name]: value for name, value in size.items()})


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
        assert spec.names.by_role(name.role) == name
        assert all(name in spec.names.by_checkpoint(module) for module in name.modules)


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
