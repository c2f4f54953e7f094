"""Under torch.compile: every operation, and a decoder's step, give what they give without, and compile once.

On the CPU the graphs are traced and run as they are, and small kernels in Triton's interpreter; on a GPU, the default
compiler and every kernel.
"""

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lumen import ops
from lumen.adapter import attach_lora
from lumen.config import Lora
from lumen.data.batch import Batch, stack
from lumen.models.decoder import Decoder
from lumen.nn.linear import Linear
from lumen.nn.recompute import Keeping
from lumen.objectives.sft import sft_loss
from lumen.ops._triton import triton
from lumen.ops.adamw import Moments
from lumen.ops.dropout import draw_seeds, thinned
from lumen.spec import Family
from lumen.text.conversation import Encoded

BACKENDS = {"cpu": "aot_eager", "cuda": "inductor"}
GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]
DEVICES = ["cpu", pytest.param("cuda", marks=GPU)]
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}
# relative: what the compiler puts around an operation rounds once where PyTorch rounds every product to bf16
TOLERANCE = {"cpu": 0.0, "cuda": 1.5e-2}
T, D, R, V = 9, 64, 4, 50

Case = tuple[Callable[..., object], list[Tensor]]


@pytest.fixture(autouse=True)
def fresh():
    torch.manual_seed(0)
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def random(device: str, *shape: int, learns: bool = True) -> Tensor:
    return torch.randn(shape, device=device, dtype=DTYPES[device]).requires_grad_(learns)


def wide(device: str, *shape: int) -> Tensor:
    return (torch.randn(shape, device=device) * 0.1).requires_grad_()


def rms_norm(device: str) -> Case:
    return lambda x, weight: ops.rms_norm(x, weight, 1e-5), [random(device, T, D), random(device, D)]


def gated(device: str) -> Case:
    return lambda gate, up: ops.gated(gate, up, "silu"), [random(device, T, D), random(device, T, D)]


def rotate_qk(device: str) -> Case:
    angles = torch.randn(2, T, 8, device=device)
    heads = [random(device, 2, T, count, 16) for count in (4, 2, 2)]
    return lambda q, k, v: ops.rotate_qk(q * 1, k * 1, v, angles.cos(), angles.sin()), heads


def rotary(device: str) -> Case:
    angles = torch.randn(2, T, 8, device=device)
    return lambda x: ops.rotary(x, angles.cos(), angles.sin()), [random(device, 2, T, 4, 16)]


def attention(device: str) -> Case:
    document = torch.tensor([0] * 4 + [1] * 5, device=device).expand(2, T)

    def function(q, k, v):
        reach = ops.reach(T, T, document, 3, q.device)
        return ops.attention(q, k, v, scale=0.25, reach=reach, softcap=30.0)

    return function, [random(device, 2, T, heads, 16) for heads in (4, 2, 2)]


def dequantize_nf4(device: str) -> Case:
    packed = ops.quantize_nf4(random(device, 32, D, learns=False))
    return lambda x: x @ ops.dequantize_nf4(packed, x.dtype).T, [random(device, T, D)]


def nf4_linear(device: str) -> Case:
    packed = ops.quantize_nf4(random(device, 32, D, learns=False))
    return lambda x: ops.nf4_linear(x, packed), [random(device, T, D)]


def pair(device: str) -> list[Tensor]:
    return [random(device, T, D), wide(device, R, D), wide(device, 32, R)]


def project(device: str) -> Case:
    packed = ops.quantize_nf4(random(device, 32, D, learns=False))
    return lambda x, a, b: ops.project([ops.Projection(weight=packed, a=a, b=b, scale=2.0)], x * 1)[0], pair(device)


def project_with_dora(device: str) -> Case:
    packed = ops.quantize_nf4(random(device, 32, D, learns=False))

    def function(x, a, b, magnitude):
        layer = ops.Projection(weight=packed, a=a, b=b, scale=2.0, magnitude=magnitude)
        return ops.project([layer], x * 1)[0]

    return function, [*pair(device), wide(device, 32)]


def linear_cross_entropy(device: str) -> Case:
    weight, target = random(device, V, D, learns=False), torch.randint(V, (T,), device=device)
    return lambda x: ops.linear_cross_entropy(x, weight, target)[0], [random(device, T, D)]


def linear_logprobs(device: str) -> Case:
    weight, target = random(device, V, D, learns=False), torch.randint(V, (T,), device=device)
    return lambda x: ops.linear_logprobs(x, weight, target), [random(device, T, D)]


def dropout(device: str) -> Case:
    seed = draw_seeds(1, torch.device(device))[0]
    return lambda x: thinned(x, 0.3, seed), [random(device, T, D)]


def grouped_linear(device: str) -> Case:
    ends = torch.tensor([4, T], dtype=torch.int32, device=device)
    return lambda x, weight: ops.grouped_linear(x, weight, ends), [random(device, T, D), random(device, 2, 32, D)]


CASES = (
    rms_norm, gated, rotate_qk, rotary, attention, dequantize_nf4, nf4_linear, project, project_with_dora,
    linear_cross_entropy, linear_logprobs, dropout, grouped_linear,
)  # fmt: skip
INTERPRETED = (rms_norm, gated, rotate_qk, dequantize_nf4, dropout)  # kernels that take no time there either


def results(function: Callable[..., object], leaves: list[Tensor]) -> list[Tensor]:
    """The outputs, and the gradients of a sum of their squares."""
    outputs = function(*leaves)
    total = sum(output.float().square().sum() for output in outputs)
    return [*outputs, *torch.autograd.grad(total, leaves)]


def assert_compiling_changes_nothing(case: Callable[[str], Case], device: str) -> None:
    operation, leaves = case(device)

    def function(*leaves: Tensor) -> tuple[Tensor, ...]:
        """The operation between two that the compiler may have."""
        found = operation(*(leaf * 1.5 for leaf in leaves))
        return tuple(output * 0.5 for output in (found if isinstance(found, tuple) else (found,)))

    compiled = torch.compile(function, backend=BACKENDS[device])
    results(compiled, leaves)
    others = [(leaf.detach() * 0.7).requires_grad_() for leaf in leaves]
    with torch.compiler.set_stance("fail_on_recompile"):
        found = results(compiled, others)
    for one, other in zip(found, results(function, others), strict=True):
        assert (one - other).norm() <= TOLERANCE[device] * other.norm()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_an_operation_in_a_compiled_function_gives_what_it_gives_without(case, device):
    assert_compiling_changes_nothing(case, device)


@pytest.mark.skipif(triton is None or torch.cuda.is_available(), reason="wants Triton's interpreter")
@pytest.mark.parametrize("case", INTERPRETED, ids=lambda case: case.__name__)
def test_the_compiler_does_not_look_into_kernels(case):
    with ops.use("triton"):
        assert_compiling_changes_nothing(case, "cpu")


def test_who_compiles_nothing_does_not_load_the_compiler():
    program = "import sys, torch; from lumen import ops; ops.rms_norm(torch.ones(2, 8), torch.ones(8), 1e-5)"
    program += "; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


@pytest.mark.parametrize("device", DEVICES)
def test_a_compiled_update_of_the_weights_is_the_update(device):
    def updated(compiled: bool) -> list[Tensor]:
        torch.manual_seed(0)
        weights = [torch.randn(16, 30, device=device), torch.randn(300, device=device)]
        grads, moments = [torch.randn_like(w) for w in weights], [Moments.zeros(w) for w in weights]
        each = {"rates": [1e-3] * 2, "corrections": [0.5] * 2, "decays": [1e-4] * 2}
        factor = torch.ones((), device=device)

        def step():
            halved = [grad * 0.5 for grad in grads]
            ops.adamw(weights, halved, moments, beta1=0.9, beta2=0.999, eps=1e-8, factor=factor, **each)

        step = torch.compile(step, backend=BACKENDS[device]) if compiled else step
        for _ in range(2):
            step()
        return weights

    assert all(torch.equal(one, other) for one, other in zip(updated(True), updated(False), strict=True))


# --- a decoder's step ------------------------------------------------------------------------------------------------


def small_decoder(device: str) -> Decoder:
    config = {
        "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "hidden_size": D, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 128, "vocab_size": V,
        "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 1e4,
        "rope_scaling": {"rope_type": "default"}, "tie_word_embeddings": False,
    }  # fmt: skip
    model = Decoder(Family.load("llama3").bind(config), DTYPES[device]).to(device)
    for name, parameter in list(model.named_parameters()):
        role, _, kind = name.rpartition(".")
        module = model.get_submodule(role)
        values = (torch.randn(parameter.shape, device=device) * 0.1).to(DTYPES[device])
        if isinstance(module, Linear) and role.startswith("blocks."):
            module.quantize(values)
        else:
            setattr(module, kind, torch.nn.Parameter(values, requires_grad=False))
    for pair in attach_lora(model, Lora(rank=R, dropout=0.1)).values():
        torch.nn.init.normal_(pair.b, std=0.05)
    return model.train()


def some_batch(device: str) -> Batch:
    def document(length: int) -> Encoded:
        return Encoded(ids=torch.randint(0, V, (length,)).tolist(), learn=[True] * length)

    return stack([[document(5), document(3)], [document(7)]], 10).to(device)


def step(model: Decoder, batch: Batch) -> dict[str, Tensor]:
    torch.manual_seed(1)  # dropout
    total = sft_loss(model, batch).total
    total.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found | {"total": total.detach()}


@pytest.mark.parametrize(
    ("device", "level", "moved"),
    [("cpu", level, False) for level in ("all", "attention", "input")]
    + [pytest.param("cuda", *kept, marks=GPU) for kept in (("all", False), ("attention", True), ("input", False))],
)
def test_a_compiled_decoder_takes_the_same_step(device, level, moved):
    model, batches = small_decoder(device), [some_batch(device), some_batch(device)]
    model.keeping = (Keeping(level, moved),) * 3
    wanted = step(model, batches[1])
    model.compile(backend=BACKENDS[device])
    step(model, batches[0])
    with torch.compiler.set_stance("fail_on_recompile"):
        found = step(model, batches[1])
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert (found[name] - wanted[name]).norm() <= TOLERANCE[device] * wanted[name].norm(), name
