"""Products in 8 bits: the rounding against PyTorch's own, scales to the bit, gradients by the equation."""

import json
from dataclasses import replace

import pytest
import torch
from kernels import assert_kernel_equals_reference, needs_triton, random, relative_error
from tiny_models import llama

from lumen import ops
from lumen.adapter import attach_lora
from lumen.checkpoint import linear_layers, load_model
from lumen.config import Lora, load_config
from lumen.errors import ConfigError, KernelError
from lumen.nn.linear import Linear, round_to_fp8
from lumen.ops import fp8
from lumen.ops.fp8 import (
    add_to,
    fp8_gradient,
    fp8_linear,
    fp8_product,
    fp8_weights,
    quantize_rows,
    quantize_rows_reference,
)
from lumen.ops.nf4 import quantize_nf4
from lumen.ops.project import Projection, project, project_reference
from lumen.run import Run
from lumen.train import describe, prepare

E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()  # 254 numbers and two NaN


def codes(rounded) -> torch.Tensor:
    return rounded[0].view(torch.uint8)


def test_a_scale_is_the_least_power_of_two_that_brings_its_row_to_448():
    largest = torch.tensor([448.0, 448.1, 447.9, 1.0, 1.75, 1.76, 3e-5, 1e38])
    rows = random(8, 32, learns=False).clamp(-0.9, 0.9) * largest[:, None]
    rows[:, 3] = -largest
    found, scale = quantize_rows_reference(rows)
    mantissa, _ = torch.frexp(scale)
    assert (mantissa == 0.5).all()
    share = largest / scale.flatten()
    assert ((share > 224) & (share <= 448)).all()
    assert torch.equal(found[:, 3].float(), (rows[:, 3] / scale.flatten()).to(torch.float8_e4m3fn).float())


def test_numbers_of_e4m3_and_rows_of_zeros_come_back_as_they_were():
    rows = torch.stack([E4M3.nan_to_num(0.0) * power for power in (1.0, 2.0**-40, 2.0**60, 0.0)])
    found, scale = quantize_rows_reference(rows)
    assert torch.equal(found.float() * scale, rows)
    assert scale[3] > 0 and scale[3].reciprocal().isfinite()


def test_what_is_rounded_is_less_than_a_seventeenth_of_a_number_or_of_its_place():
    rows = random(64, 500, learns=False)
    found, scale = quantize_rows_reference(rows)
    error = (found.float() * scale - rows).abs()
    assert (error <= torch.maximum(rows.abs() / 17, scale * 2**-10) * 1.000001).all()
    assert relative_error(found.float() * scale, rows) == pytest.approx(1 / 38, rel=0.03)


def test_products_are_those_of_the_rounded_factors():
    x, grad = random(7, 48, learns=False), random(7, 32, learns=False)
    weight = random(32, 48, learns=False) * torch.logspace(-3, 3, 32)[:, None]
    [part] = fp8_weights([weight])
    c, s = quantize_rows_reference(weight)
    q, r = quantize_rows_reference(x)
    assert torch.equal(fp8_product(x, part), ((q.float() @ c.float().T) * r * s.T).bfloat16().float())
    g, t = quantize_rows_reference(grad * s.T)
    assert torch.equal(fp8_gradient(grad, part), ((g.float() @ c.float()) * t).bfloat16().float())
    assert relative_error(fp8_product(x, part), x @ weight.T) < 0.05
    assert relative_error(fp8_gradient(grad, part), grad @ weight) < 0.05


def test_pytorchs_own_scaled_product_gives_the_same():
    x, grad = random(9, 64, learns=False) * torch.logspace(-2, 2, 9)[:, None], random(9, 32, learns=False)
    [part] = fp8_weights([random(32, 64, learns=False) * torch.logspace(-3, 3, 32)[:, None]])
    for found, rounded, codes, scale in (
        (fp8_product(x, part), quantize_rows(x), part.codes, part.scale),
        (fp8_gradient(grad, part), quantize_rows(grad, part.factor), part.across, part.ones),
    ):
        scales = {"scale_a": rounded[1], "scale_b": scale[None]}
        wanted = torch._scaled_mm(rounded[0], codes.t(), **scales, out_dtype=torch.bfloat16)
        # sums in another order fall to the other side of a bfloat16 now and then
        assert relative_error(found, wanted) < 1e-3


def test_the_gradient_that_autograd_finds_is_the_rounded_product():
    x, grad = random(2, 3, 48), random(2, 3, 32, learns=False)
    [part] = fp8_weights([random(32, 48, learns=False)])
    [found] = torch.autograd.grad(fp8_linear(x, part), [x], [grad])
    assert torch.equal(found, fp8_gradient(grad.flatten(0, 1), part).view(2, 3, 48))


def test_infinity_and_nan_are_not_hidden():
    [part] = fp8_weights([random(16, 16, learns=False)])
    for value in (float("inf"), float("nan")):
        x = random(2, 16, learns=False)
        x[0, 5] = value
        finite = fp8_product(x, part).isfinite()
        assert not finite[0].any() and finite[1].all()
    with pytest.raises(KernelError, match="finite"):
        fp8_weights([torch.full((16, 16), float("nan"))])


@needs_triton
@pytest.mark.parametrize(("rows", "width", "held"), [(5, 64, 16384), (3, 100, 16384), (4, 9000, 4096), (2, 8192, 4096)])
def test_the_kernel_rounds_as_pytorch_does(rows, width, held, monkeypatch):
    monkeypatch.setattr(fp8, "HELD", held)  # wider rows are read twice
    x = random(rows, width, learns=False) * torch.logspace(-6, 6, rows)[:, None] * torch.logspace(-5, 0, width)
    x[0], x[1, 3] = 0.0, 1e4
    exponents = random(width, seed=3, learns=False).mul(3).round()
    for factor in (None, exponents.exp2().bfloat16()):
        with ops.use("triton"):
            found = quantize_rows(x, factor)
        wanted = quantize_rows_reference(x, factor)
        assert torch.equal(codes(found), codes(wanted)) and torch.equal(found[1], wanted[1])


@needs_triton
def test_the_kernel_rounds_every_tie_and_what_is_next_to_it_as_pytorch_does():
    values = E4M3[E4M3.isfinite()].unique()
    ties = (values[1:] + values[:-1]) / 2
    beside = [torch.nextafter(ties, torch.tensor(side)) for side in (500.0, -500.0)]
    row = torch.cat([values, ties, *beside, torch.tensor([448.0, float("nan")])])[None]
    with ops.use("triton"):
        found = codes(quantize_rows(row))
    wanted = codes(quantize_rows_reference(row[:, :-1]))
    assert torch.equal(found[:, :-1], wanted) and found[0, -1] & 0x7F == 0x7F


@needs_triton
def test_a_row_with_infinity_has_an_infinite_scale_from_the_kernel_too():
    x = random(3, 80, learns=False)
    x[1, 70], x[2, 3] = -float("inf"), float("nan")
    with ops.use("triton"):
        found = quantize_rows(x)
    wanted = quantize_rows_reference(x)
    assert torch.equal(codes(found)[0], codes(wanted)[0]) and torch.equal(found[1][:2], wanted[1][:2])
    assert found[1][1].isinf() and found[0][2].float()[3].isnan()


@needs_triton
def test_update_and_residual_are_added_in_one_pass():
    shapes = [(70, 150), (70, 150), (70, 24), (150, 90)]
    y, residual, waist, wide = (random(*shape, seed=i, learns=False) for i, shape in enumerate(shapes))
    wanted = y + residual + waist @ wide[:, :24].T
    assert relative_error(add_to(y, residual, waist, wide[:, :24]), wanted) < 2e-6


@needs_triton
def test_rows_may_lie_apart():
    wide = random(6, 96, learns=False)
    with ops.use("triton"):
        found = quantize_rows(wide[:, 16:64])
    assert torch.equal(codes(found), codes(quantize_rows_reference(wide[:, 16:64].contiguous())))


def group(outputs, adapted, packed=False, bias=False):
    """Projections of one group in 8 bits, and their leaves."""
    weights = [random(out, 64, seed=i, learns=False) for i, out in enumerate(outputs)]
    parts, leaves, made = fp8_weights(weights), [], []
    for i, (weight, part) in enumerate(zip(weights, parts, strict=True)):
        options = {"weight": quantize_nf4(weight) if packed else weight, "fp8": part}
        if bias:
            options["bias"] = random(len(weight), seed=20 + i)
            leaves.append(options["bias"])
        if adapted:
            options |= {"a": random(4 + i, 64, seed=i), "b": random(len(weight), 4 + i, seed=i), "scale": 0.7}
            leaves += [options["a"], options["b"]]
        made.append(Projection(**options))
    return made, leaves


@needs_triton
@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("source", ["plain", "norm", "gated", "residual"])
def test_a_fused_group_equals_the_reference(source, adapted):
    made, leaves = group((64,) if source == "residual" else (32, 16, 16), adapted, source == "norm", source == "plain")
    joined = random(2, 5, 128)
    options = {"residual": random(2, 5, 64, seed=31)} if source == "residual" else {}
    leaves += list(options.values())
    if source == "norm":
        options = {"norm": torch.ones(64), "eps": 1e-5}

    def run():
        x, up = (joined * 1).split(64, dim=-1)
        return project(made, x, **options, **({"up": up, "kind": "silu"} if source == "gated" else {}))

    # both sum in their own order, and now and then a number lies on the edge of two codes or of two of bfloat16
    assert_kernel_equals_reference(run, [joined, *leaves], tolerance=3e-3)


def test_a_group_is_rounded_together_and_the_update_is_not():
    made, _ = group((32, 16), True)
    x, grads = random(3, 64), [random(3, out, seed=9, learns=False) for out in (32, 16)]
    found = project_reference(made, x)
    whole = made[0].fp8.whole
    exact = torch.cat([(x @ part.a.T) @ part.b.T * part.scale for part in made], 1)
    assert relative_error(torch.cat(found, 1), fp8_product(x, whole) + exact) < 1e-6
    [grad_x] = torch.autograd.grad(found, [x], grads)
    rest = sum((grad @ part.b) @ part.a * part.scale for part, grad in zip(made, grads, strict=True))
    assert relative_error(grad_x, fp8_gradient(torch.cat(grads, 1), whole) + rest) < 1e-6


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_learned_lengths_go_with_rounded_products(dropout):
    [plain], _ = group((32,), True)
    made = [replace(plain, magnitude=random(32, seed=5).abs().detach().requires_grad_(), dropout=dropout)]
    x = random(3, 64)
    torch.manual_seed(0)
    [found] = project(made, x)
    torch.manual_seed(0)
    [wanted] = project([replace(made[0], fp8=None)], x)
    assert 0.01 < relative_error(found, wanted) < 0.06
    leaves = [x, plain.a, plain.b, made[0].magnitude]
    for one, other in zip(*(torch.autograd.grad(y.square().sum(), leaves) for y in (found, wanted)), strict=True):
        assert relative_error(one, other) < 0.1


def test_parts_of_different_groups_are_refused():
    one, other = group((32, 16), False)[0], group((32, 16), False)[0]
    with pytest.raises(KernelError, match="round them together"):
        project([one[0], other[1]], random(3, 64))


def test_a_layer_is_exact_when_it_does_not_train_and_when_its_weight_learns():
    layer = Linear(64, 32).requires_grad_(False)
    torch.nn.init.normal_(layer.weight)
    assert round_to_fp8([layer])
    x = random(3, 64, learns=False)
    exact = x @ layer.weight.T
    assert 0.01 < relative_error(layer.train()(x), exact) < 0.05
    assert torch.equal(layer.eval()(x), exact)
    assert torch.equal(layer.train().requires_grad_(True)(x), exact)


def test_a_size_that_is_no_multiple_of_16_keeps_the_whole_group_as_it_is():
    layers = [Linear(64, 32), Linear(64, 24)]
    assert not round_to_fp8(layers)
    assert layers[0].fp8 is None and layers[1].fp8 is None
    with pytest.raises(KernelError, match="multiples of 16"):
        fp8_weights([torch.ones(32, 24)])


def test_a_loaded_model_trains_in_8_bits_evaluates_exactly_and_says_what_stays(tmp_path, caplog):
    llama(tmp_path, intermediate_size=172)
    tokens, positions = torch.randint(257, (2, 20)), torch.arange(20).expand(2, 20)
    exact, rounded = load_model(tmp_path), load_model(tmp_path, fp8=True)
    assert "model.fp8 serves 8 of the blocks' 14 linear layers" in caplog.text
    torch.manual_seed(0)
    attach_lora(exact, Lora(rank=4))
    torch.manual_seed(0)
    attach_lora(rounded, Lora(rank=4))
    with torch.no_grad():
        assert torch.equal(rounded(tokens, positions), exact(tokens, positions))
    wanted, found = exact.train()(tokens, positions), rounded.train()(tokens, positions)
    # 4 % a product; the attention of such random weights is sharp, and makes more of it
    assert 0.01 < relative_error(found, wanted) < 0.25
    found.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in rounded.parameters() if p.requires_grad)


def test_a_run_that_asks_for_8_bits_trains_in_them(tmp_path):
    turns = [{"role": "user", "content": "A latte, please."}, {"role": "assistant", "content": "Here it is."}]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    told = [f"data.train={tmp_path}/chats.jsonl", "data.eval=", "train.eval_every=0", f"output.folder={tmp_path}/run"]
    config = load_config("lumen-demo", [*told, "model.fp8=true"])
    trainer = prepare(config, Run.create(tmp_path / "run", config), None)
    assert all(layer.fp8 is not None for layer in linear_layers(trainer.model).values())
    assert "NF4 base, products in 8 bits" in describe(trainer)


def test_a_gpu_without_products_in_8_bits_is_refused(tmp_path, monkeypatch):
    llama(tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ConfigError, match=r"8.9 or higher .* found NVIDIA A100 with 8.0. Leave it out"):
        load_model(tmp_path, fp8=True, dtype="bfloat16", device="cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    assert not fp8.refusal(torch.device("cuda")) and not fp8.refusal(torch.device("cpu"))


def test_a_full_fine_tuning_in_8_bits_is_refused():
    with pytest.raises(ConfigError, match=r"model\.fp8=true \(override\) contradict each other: only frozen weights"):
        load_config("lumen-demo", ["train.method=full", "model.nf4=false", "model.fp8=true"])
    assert not load_config("lumen-demo").model.fp8
