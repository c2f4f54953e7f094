"""The static step decodes what the growing cache decodes: every family, unequal prompts, 4 bits, kernels, graphs."""

import pytest
import tiny_models
import torch
from ops.kernels import needs_triton

from lumen import ops
from lumen.adapter import attach_lora
from lumen.checkpoint import load_model
from lumen.config import Lora
from lumen.decoding import Decoding, available
from lumen.errors import KernelError
from lumen.ops.rotary import _heads_of_both
from lumen.sampling import generate

SPARSE = {"mixtral", "qwen2-moe", "qwen3-moe"}
DENSE = [shape for shape in tiny_models.FAMILIES if shape not in SPARSE]
KERNELS = ("append_column", "decode_attention", "project", "rotary", "rms_norm")


def prompts(*lengths):
    random = torch.Generator().manual_seed(5)
    return [torch.randint(2, 257, (length,), generator=random).tolist() for length in lengths]


def steps(model, given, count, kind, *, chunk=2048, kernels=()):
    """Greedy ids (steps, B) and the logits (steps, B, V) they came from; `kernels` run in the interpreter."""
    ids, logits = [], []
    with torch.no_grad():
        with ops.use(kind, "decoding"):
            decoding = Decoding(model, given, count, chunk)
        assert decoding.kind == kind
        found = decoding.read()
        for _ in range(count - 1):
            logits.append(found.clone())
            ids.append(found.argmax(-1))
            with ops.use("triton" if kernels else kind, *(kernels or ("decoding",))):
                found = decoding.step(ids[-1], ids[-1].tolist())
        assert (decoding.static is not None) == (kind != "reference")
    return torch.stack([*ids, found.argmax(-1)]).tolist(), torch.stack([*logits, found])


def assert_the_same(model, given, count, **options):
    ids, logits = steps(model, given, count, "static", **options)
    wanted, reference = steps(model, given, count, "reference", chunk=options.get("chunk", 2048))
    assert ids == wanted
    assert tiny_models.relative_error(logits, reference) <= 1e-5  # fp32: sums in another order


def adapted(folder, device="cpu"):
    """In 4 bits, with an adapter that does much."""
    model = load_model(folder, dtype="float32", device=device, nf4=True)
    torch.manual_seed(0)
    for pair in attach_lora(model, Lora(rank=4)).values():
        torch.nn.init.normal_(pair.b, std=0.3)
    return model.eval()


@pytest.fixture(scope="module", params=DENSE)
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param.replace(" ", "_"))
    tiny_models.family(folder, request.param)
    return folder


def test_every_family_decodes_unequal_prompts_as_with_the_growing_cache(folder):
    """Prompts shorter and longer than windows, one token among them; a rope that changes with the length does so on
    the way.
    """
    model = load_model(folder, dtype="float32", device="cpu")
    assert_the_same(model, prompts(2, 35, 11, 1), 24, chunk=6)
    assert_the_same(model, prompts(3), 12)


def test_a_4_bit_base_with_an_adapter_too(folder):
    assert_the_same(adapted(folder), prompts(4, 19), 20)


@pytest.mark.parametrize("shape", sorted(SPARSE))
def test_experts_are_left_to_the_growing_cache_and_the_reason_is_said(tmp_path, shape):
    tiny_models.family(tmp_path, shape)
    model = load_model(tmp_path, dtype="float32", device="cpu")
    generate(model, prompts(3), max_tokens=3, stop_ids=())
    assert ops.explain()["decoding"].startswith("reference: experts")
    with pytest.raises(KernelError, match="decoding: 'static' was forced"), ops.use("static", "decoding"):
        generate(model, prompts(3), max_tokens=3, stop_ids=())


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    tiny_models.llama(folder)
    return folder


def test_without_a_gpu_the_growing_cache_serves_and_the_reason_is_said(llama):
    model = load_model(llama, dtype="float32", device="cpu")
    generate(model, prompts(3), max_tokens=3, stop_ids=())
    assert ops.explain()["decoding"].startswith("reference: not on a GPU")
    assert list(available(model)) == ["reference", "static"]


@pytest.mark.parametrize("shape", ["gemma", "llama"])
def test_a_graph_serves_families_that_scale_their_embedding_too(tmp_path, shape, monkeypatch):
    getattr(tiny_models, shape, lambda folder: tiny_models.family(folder, shape))(tmp_path)
    model = load_model(tmp_path, dtype="bfloat16", device="cpu")
    assert (model.embed.scale != 1.0) == (shape == "gemma")
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    assert list(available(model)) == ["graph", "static", "reference"]


def test_an_embedding_is_scaled_by_the_factor_as_its_dtype_holds_it(tmp_path):
    tiny_models.family(tmp_path, "gemma")
    model = load_model(tmp_path, dtype="float32", device="cpu")
    tokens = torch.arange(2, 40)[None]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        factor = torch.tensor(model.embed.scale, dtype=dtype)
        wanted = torch.nn.functional.embedding(tokens, model.embed.weight).to(dtype) * factor
        assert torch.equal(model.embed(tokens, dtype), wanted)


@pytest.mark.parametrize("options", [{}, {"temperature": 1.5, "top_p": 0.9, "seed": 3}, {"repetition_penalty": 1.4}])
def test_generate_gives_the_same_answers_with_a_static_step(llama, options):
    """Rows that stop at their own time, and one that ends with its first token."""
    model = load_model(llama, dtype="float32", device="cpu")
    given = prompts(5, 1, 9, 3)
    free = generate(model, given, max_tokens=20, stop_ids=(), **options)
    stops = {free[0].ids[5], free[3].ids[0]}
    wanted = generate(model, given, max_tokens=20, stop_ids=stops, **options)
    with ops.use("static", "decoding"):
        assert generate(model, given, max_tokens=20, stop_ids=stops, **options) == wanted
        assert generate(model, given, max_tokens=1, stop_ids=stops, **options) == [
            type(answer)(ids=answer.ids[:1], finish="stop" if answer.ids[0] in stops else "length") for answer in wanted
        ]


@needs_triton
def test_the_kernels_of_a_step_give_the_logits_of_the_references(tmp_path):
    tiny_models.llama(tmp_path, num_hidden_layers=1, intermediate_size=64, num_attention_heads=2, num_key_value_heads=1)
    assert_the_same(adapted(tmp_path), prompts(3, 6), 3, kernels=KERNELS)


@needs_triton
@pytest.mark.parametrize("gap", [0, 8])
@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (1, 3), (2, 3)])
def test_heads_of_few_tokens_turn_as_by_the_reference_whether_q_and_k_lie_side_by_side_or_not(shape, gap):
    source = torch.Generator().manual_seed(gap)
    joined, angle = (torch.randn(*shape, width, generator=source) for width in (24 + gap + 16 + 16, 3))
    q, _, k, v = joined.split([24, gap, 16, 16], -1)
    heads = [part.view(*shape, -1, 8) for part in (q, k, v)]
    assert (_heads_of_both(*heads[:2]) is None) == bool(gap)
    wanted = [part.clone() for part in ops.rotate_qk(*heads, angle.cos(), angle.sin())]
    with ops.use("triton"):
        found = ops.rotate_qk(*heads, angle.cos(), angle.sin())
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("shape", ["llama", "gemma2"])
def test_a_captured_step_is_bit_equal_to_the_same_step_launched_from_python(tmp_path, shape):
    """Over a growth of the cache, after which the step is captured again."""
    getattr(tiny_models, shape, lambda folder: tiny_models.family(folder, shape))(tmp_path)
    model = adapted(tmp_path, "cuda")
    for given in (prompts(7), prompts(3, 19, 1)):
        (ids, logits), (wanted, reference) = (steps(model, given, 1100, kind) for kind in ("graph", "static"))
        assert ids == wanted and torch.equal(logits, reference)
