"""On a GPU: every kernel against its reference in the real dtypes, what blocks keep, and recorded steps."""

import pytest
import torch
from torch import Tensor

from lumen import ops
from lumen.adapter import attach_lora
from lumen.capture import Passes
from lumen.config import Lora
from lumen.data.batch import stack
from lumen.models.decoder import Decoder
from lumen.nn import recompute
from lumen.nn.linear import Linear
from lumen.nn.recompute import Keeping
from lumen.objectives.sft import sft_loss
from lumen.ops.adamw import Averages, Moments, adamw
from lumen.ops.linear_loss import linear_cross_entropy, linear_cross_entropy_reference
from lumen.ops.nf4 import dequantize_nf4, dequantize_nf4_reference, quantize_nf4
from lumen.ops.nf4_matvec import nf4_matvec
from lumen.ops.product import _Kernel, add_product, product
from lumen.ops.project import Projection, project
from lumen.spec import Family
from lumen.text.conversation import Encoded

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]

# relative distance to the reference in fp32; in bf16 that of one rounding of the inputs' products, as PyTorch's own
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 8e-3}
DTYPES = list(TOLERANCE)


def random(*shape: int, dtype=torch.float32, learns: bool = True, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, device="cuda") * scale).to(dtype).requires_grad_(learns)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def compare(function, leaves: list[Tensor], tolerance: float) -> None:
    """`function(*leaves)` with kernels, against the reference on the same values in fp32."""

    def run(leaves):
        found = function(*leaves)
        outputs = found if isinstance(found, tuple) else (found,)
        generator = torch.Generator("cuda").manual_seed(1)
        incoming = [torch.randn(o.shape, device="cuda", generator=generator).to(o.dtype) for o in outputs]
        return [*outputs, *torch.autograd.grad(outputs, leaves, incoming)]

    found = run(leaves)
    with ops.use("reference"):
        wanted = run([leaf.detach().float().requires_grad_() for leaf in leaves])
    for index, (one, other) in enumerate(zip(found, wanted, strict=True)):
        assert ((one.float() - other).norm() / other.norm()).item() <= tolerance, index


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("plus_one", [False, True])
def test_rms_norm(dtype, plus_one):
    leaves = [random(37, 2000, dtype=dtype), random(2000, dtype=dtype)]
    compare(lambda x, w: ops.rms_norm(x, w, 1e-5, plus_one), leaves, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_of_heads_that_lie_apart(dtype):
    leaves = [random(2, 301, 12, 128, dtype=dtype), random(128, dtype=dtype), random(128, dtype=dtype)]

    def heads(joined, of_q, of_k):
        return ops.rms_norm(joined[:, :, :8], of_q, 1e-6), ops.rms_norm(joined[:, :, 8:10], of_k, 1e-6)

    compare(heads, leaves, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["silu", "gelu_tanh", "gelu"])
def test_gated(dtype, kind):
    leaves = [random(37, 3000, dtype=dtype), random(37, 3000, dtype=dtype)]
    compare(lambda gate, up: ops.gated(gate, up, kind), leaves, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("half", [32, 24])
def test_rotary(dtype, half):
    angles = torch.randn(2, 37, half, device="cuda")
    leaves = [random(2, 37, 6, 64, dtype=dtype)]
    compare(lambda x: ops.rotary(x, angles.cos(), angles.sin()), leaves, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [64, 80, 128, 256])
@pytest.mark.parametrize(("documents", "window", "softcap"), [(False, 0, 0.0), (True, 0, 0.0), (True, 64, 30.0)])
def test_attention(dtype, width, documents, window, softcap):
    document = torch.tensor([0] * 100 + [1] * 150 + [-1] * 50, device="cuda").expand(2, -1) if documents else None
    seen = ops.reach(300, 300, document, window, torch.device("cuda"))
    leaves = [random(2, 300, heads, width, dtype=dtype) for heads in (8, 2, 2)]
    options = {"scale": width**-0.5, "reach": seen, "softcap": softcap}
    compare(lambda q, k, v: ops.attention(q, k, v, **options), leaves, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_to_a_single_key_is_its_value(dtype):
    seen = ops.reach(1, 1, None, 0, torch.device("cuda"))
    q, k, v = (random(3, 1, heads, 64, dtype=dtype) for heads in (8, 2, 2))
    out = ops.attention(q, k, v, scale=0.125, reach=seen)
    assert torch.equal(out, v.repeat_interleave(4, dim=2))
    incoming = torch.randn_like(out)
    of_q, of_k, of_v = torch.autograd.grad(out, (q, k, v), incoming)
    wanted = incoming.float().view(3, 1, 2, 4, 64).sum(3)
    assert (of_v.float() - wanted).norm() <= TOLERANCE[dtype] * wanted.norm()
    # the softmax of one value is 1, whatever it is: what is left are roundings of products of 64 values
    assert max(of_q.abs().max(), of_k.abs().max()) <= TOLERANCE[dtype] * 64


@pytest.mark.parametrize("source", ["plain", "norm", "gated"])
def test_layers_that_share_an_input(source):
    packed = [quantize_nf4(random(out, 512, learns=False, scale=0.05)) for out in (256, 128)]
    leaves = [random(2, 37, 1024, dtype=torch.bfloat16)]
    leaves += [random(*shape, scale=0.1) for shape in ((8, 512), (256, 8), (8, 512), (128, 8))]

    def function(joined, a, b, c, d):
        x, up = (joined * 1).split(512, dim=-1)
        layers = [
            Projection(weight=packed[0], a=a, b=b, scale=2.0),
            Projection(weight=packed[1], a=c, b=d, scale=2.0),
        ]
        options = {"norm": torch.ones(512, device="cuda"), "eps": 1e-5} if source == "norm" else {}
        return project(layers, x, **options, **({"up": up, "kind": "silu"} if source == "gated" else {}))

    compare(function, leaves, 1.5e-2)  # chains of up to four roundings to bf16


def test_nf4_is_packed_and_unpacked_bit_for_bit():
    for shape in ((129, 64), (37, 200), (1024, 4096)):
        weight = random(*shape, learns=False, dtype=torch.bfloat16)
        packed = quantize_nf4(weight)
        with ops.use("reference"):
            wanted = quantize_nf4(weight)
        for name, tensor in packed.tensors.items():
            assert torch.equal(tensor, wanted.tensors[name]), (shape, name)
        for dtype in (torch.bfloat16, torch.float32, torch.float16):
            assert torch.equal(dequantize_nf4(packed, dtype), dequantize_nf4_reference(packed, dtype))


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_few_rows_meet_the_packed_weight(rows):
    packed = quantize_nf4(random(1000, 4096, learns=False))
    x = random(rows, 4096, dtype=torch.bfloat16, learns=False)
    wanted = x.float() @ dequantize_nf4(packed, torch.float32).T
    assert ((nf4_matvec(x, packed).float() - wanted).norm() / wanted.norm()).item() <= 4e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("turned", [False, True])
def test_large_products_are_those_of_pytorch(dtype, turned, monkeypatch):
    """By rows of any stride; of rows and inputs that are no multiple of a tile's; recorded as well."""
    calls = []
    monkeypatch.setattr(_Kernel, "__call__", lambda *a, inner=_Kernel.__call__: calls.append(a) or inner(*a))
    rows, outputs, inputs = 5000, 8192, 2056
    x = random(rows, inputs + 128, dtype=dtype, learns=False)[:, :inputs]
    w = random(*((outputs, inputs) if turned else (inputs, outputs)), dtype=dtype, learns=False)
    w = w.T if turned else w
    start = random(rows, outputs + 256, dtype=dtype, learns=False)[:, :outputs]
    wanted = x.double() @ w.double()
    found, added = product(x, w), add_product(start.clone(memory_format=torch.preserve_format), x, w)
    into = torch.zeros(rows, outputs + 256, dtype=dtype, device="cuda")[:, :outputs]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        add_product(into, x, w)
    graph.replay()
    torch.cuda.synchronize()
    # half of the last of 8 or 11 bits; as PyTorch's, a product that is added has been rounded by itself
    share = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    total = start.double() + wanted
    bounds = (wanted.abs(), (1 + share) * wanted.abs() + total.abs(), wanted.abs())
    for one, other, bound in zip((found, added, into), (wanted, total, wanted), bounds, strict=True):
        assert ((one.double() - other).abs() <= share * bound + 1e-3).all()
    assert len(calls) == (3 if torch.cuda.get_device_capability() == (9, 0) else 0)


def test_a_product_that_is_small_or_lies_askew_is_pytorchs_own():
    with ops.use("cublaslt", "product"):
        for at, inputs, outputs in ((0, 4096, 64), (8, 512, 4096)):  # 8 values: it begins between 256 bytes
            x = random(8192 * inputs + at, dtype=torch.bfloat16, learns=False)[at:].view(8192, inputs)
            w = random(inputs, outputs, dtype=torch.bfloat16, learns=False)
            assert product(x, w).equal(x @ w)


@pytest.mark.parametrize("softcap", [0.0, 30.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_cross_entropy(dtype, softcap):
    x, weight = random(300, 256, dtype=dtype), random(50_257, 256, dtype=dtype, learns=False, scale=0.1)
    target = torch.randint(0, 50_257, (300,), device="cuda")
    target[::3] = -100
    found, count = linear_cross_entropy(x, weight, target, softcap, chunk=128)
    leaf = x.detach().float().requires_grad_()
    wanted, _ = linear_cross_entropy_reference(leaf, weight.float(), target, softcap)
    assert count == 200 and abs(found / wanted - 1) <= 1e-5
    one, other = torch.autograd.grad(found, x)[0].float(), torch.autograd.grad(wanted, leaf)[0]
    assert ((one - other).norm() / other.norm()).item() <= TOLERANCE[dtype]


@pytest.mark.parametrize("kind", [Averages, Moments])
def test_adamw(kind):
    results = []
    for implementation in ("triton", "reference"):
        torch.manual_seed(0)
        parameters = [random(16, 300, learns=False), random(9000, learns=False)]
        states = [kind.zeros(parameter) for parameter in parameters]
        for _ in range(3):
            grads = [random(*parameter.shape, learns=False, scale=0.01) for parameter in parameters]
            numbers = {"rates": [1e-3] * 2, "corrections": [0.5] * 2, "decays": [1e-4] * 2}
            with ops.use(implementation):
                factor = torch.ones((), device="cuda")
                adamw(parameters, grads, states, beta1=0.9, beta2=0.999, eps=1e-8, factor=factor, **numbers)
        results.append(parameters)
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def small_llama(dropout: float = 0.0) -> Decoder:
    config = {
        "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "hidden_size": 512, "num_hidden_layers": 4,
        "num_attention_heads": 8, "num_key_value_heads": 2, "intermediate_size": 1536, "vocab_size": 1000,
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 1e4,
        "rope_scaling": {"rope_type": "default"}, "tie_word_embeddings": False,
    }  # fmt: skip
    with torch.device("meta"):
        model = Decoder(Family.load("llama3").bind(config), torch.bfloat16)
    for name, parameter in list(model.named_parameters()):
        role, _, kind = name.rpartition(".")
        module = model.get_submodule(role)
        values = random(*parameter.shape, dtype=torch.bfloat16, learns=False, scale=0.05)
        if isinstance(module, Linear) and role.startswith("blocks."):
            module.quantize(values)
        else:
            setattr(module, kind, torch.nn.Parameter(values, requires_grad=False))
    for pair in attach_lora(model, Lora(rank=8, dropout=dropout)).values():
        torch.nn.init.normal_(pair.b, std=0.05)
    return model.train()


def some_batch(seed: int = 0, pairs: int = 1):
    generator = torch.Generator().manual_seed(seed)

    def document(length: int) -> Encoded:
        return Encoded(ids=torch.randint(0, 1000, (length,), generator=generator).tolist(), learn=[True] * length)

    return stack([[document(300), document(200)], [document(450)]] * pairs, 512)


def gradients(model: Decoder) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    for parameter in model.parameters():
        parameter.grad = None
    return found


def test_whatever_blocks_keep_the_gradients_have_the_same_bits():
    model, batch = small_llama(), some_batch().to("cuda")
    wanted = None
    for level in ("all", "attention", "input"):
        for moved in (False, True):
            model.keeping = (Keeping(level, moved),) * 4
            for _ in range(2):  # the second time in memory that was used before
                total = sft_loss(model, batch).total
                total.backward()
                found = gradients(model)
            wanted = wanted or (total, found)
            assert torch.equal(total, wanted[0])
            assert all(torch.equal(found[name], wanted[1][name]) for name in wanted[1]), (level, moved)


def test_an_mlp_over_many_rows_has_the_same_gradients_in_lots(monkeypatch):
    model, batch = small_llama(), some_batch().to("cuda")
    found = []
    for level, moved in (("all", False), ("attention", True), ("input", False), ("input", True)):
        model.keeping = (Keeping(level, moved),) * 4
        total = sft_loss(model, batch).total
        total.backward()
        found.append((total, gradients(model)))
        monkeypatch.setattr(recompute, "MOST_ROWS", 100)
    (wanted, whole), *others = found
    total, lots = others[0]
    torch.testing.assert_close(total, wanted, rtol=1e-3, atol=0)  # bf16 products of other shapes, by other kernels
    assert all((lots[name] - whole[name]).norm() <= 2e-2 * whole[name].norm() for name in whole)
    for other, again in others[1:]:
        assert torch.equal(other, total) and all(torch.equal(again[name], lots[name]) for name in lots)


def test_weights_unpacked_for_good_change_nothing():
    model, batch = small_llama(), some_batch().to("cuda")
    sft_loss(model, batch).total.backward()
    wanted = gradients(model)
    assert model.hold_unpacked() > 0
    sft_loss(model, batch).total.backward()
    found = gradients(model)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_a_recorded_pass_equals_the_pass_itself():
    model = small_llama()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    eager, recorded = Passes(model, sft_loss, capture=False), Passes(model, sft_loss, capture=True)
    batches = [some_batch(seed) for seed in range(5)]
    results = []
    for passes in (eager, recorded):
        for batch in batches:
            total = passes.run(batch).total
            results.append((total.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}))
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad.zero_()
    assert recorded._recordings
    for one, other in zip(results[:5], results[5:], strict=True):
        assert one[0] == other[0] and all(torch.equal(one[1][name], other[1][name]) for name in one[1])


def recorded_passes(model: Decoder, batch) -> Passes:
    """Passes that have recorded the shape of `batch`; all gradients are zero."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    passes = Passes(model, sft_loss, capture=True)
    for _ in range(3):
        passes.run(batch)
    assert len(passes._recordings) == 1
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.zero_()
    return passes


def test_recorded_dropout_of_blocks_that_run_again_is_that_of_blocks_that_do_not():
    model, batch = small_llama(dropout=0.2), some_batch().to("cuda")
    torch.manual_seed(5)
    wanted = [(sft_loss(model, batch).total.backward(), gradients(model))[1] for _ in range(2)]
    assert any(not torch.equal(wanted[0][name], wanted[1][name]) for name in wanted[0])
    model.keeping = (Keeping("input"),) * 4
    passes = recorded_passes(model, batch)
    torch.manual_seed(5)
    for each in wanted:
        passes.run(batch)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                assert torch.equal(parameter.grad, each[name]), name
                parameter.grad.zero_()


def test_recordings_give_way_to_another_shape_that_finds_no_memory(caplog):
    model, other = small_llama(), some_batch(1, pairs=7)
    sft_loss(model, other.to("cuda")).total.backward()
    wanted = gradients(model)
    passes = recorded_passes(model, some_batch(pairs=8))
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    try:
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (64 << 20)) / total)
        passes.run(other)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "none is recorded any more" in caplog.text and not passes._recordings
    found = gradients(model)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_recorded_passes_of_one_step_sum_their_gradients():
    model, batches = small_llama(), [some_batch(seed) for seed in range(3)]
    for batch in batches:
        sft_loss(model, batch.to("cuda")).total.backward()
    wanted = gradients(model)
    passes = recorded_passes(model, batches[0])
    for parameter in model.parameters():
        parameter.grad = None
    for batch in batches:
        passes.run(batch)
    found = gradients(model)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
