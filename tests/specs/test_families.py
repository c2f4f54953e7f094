"""Every page of `model_specs/`, in tiny: lumen against transformers."""

import copy
from pathlib import Path

import proofs
import torch
from proofs import TOLERANCE
from safetensors.torch import load_file
from tiny_models import CONTEXT, FAMILIES, relative_error
from torch import Tensor, nn
from torch.nn import functional as F

from lumen.checkpoint import load_model, save_model
from lumen.formats.gguf import read_gguf
from lumen.models.decoder import Decoder
from lumen.names import TRANSFORMS, gguf_tensors
from lumen.sampling import generate
from lumen.spec import load_family

LENGTH = CONTEXT + 16  # beyond the models' context, and ten windows
BF16_MARGIN = 1.15  # our error over theirs; 0.89 to 1.04 in these models, as the order of roundings falls
BF16_APART = 2**0.5  # our distance from theirs, over their error: that of two independent errors of one size


def some_tokens(rows: int, length: int, seed: int = 1) -> Tensor:
    return torch.randint(2, 320, (rows, length), generator=torch.Generator().manual_seed(seed))


def logits_of(model: Decoder, tokens: Tensor) -> Tensor:
    return model.logits(model(tokens, torch.arange(tokens.shape[1]).expand_as(tokens)))


@proofs.of("logits")
def test_the_page_is_found(tiny, shape):
    assert load_family(tiny(shape).folder).name == FAMILIES[shape][0]


# --- logits ----------------------------------------------------------------------------------------------------------


@proofs.of("logits")
def test_logits_and_all_gradients_equal_transformers(tiny, shape, tmp_path):
    theirs = copy.deepcopy(tiny(shape).theirs)
    ours = load_model(tiny(shape).folder).requires_grad_(True)
    tokens = some_tokens(2, LENGTH)
    wanted, found = theirs(tokens).logits, logits_of(ours, tokens)
    assert relative_error(found, wanted) <= TOLERANCE
    for logits in (wanted, found):
        F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    become_its_gradients(theirs).save_pretrained(tmp_path / "theirs")
    (tmp_path / "ours").mkdir()
    save_model(become_its_gradients(ours), tmp_path / "ours")
    wanted, found = weights(tmp_path / "theirs"), weights(tmp_path / "ours")
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert relative_error(found[name], wanted[name]) <= TOLERANCE, name


def become_its_gradients(model: nn.Module) -> nn.Module:
    """`model` with every weight replaced by its gradient, so that saving it brings the gradients under file names."""
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        parameter.data = parameter.grad
    return model


def weights(folder: Path) -> dict[str, Tensor]:
    """What is in the safetensors files of a folder."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@proofs.of("bf16")
def test_bf16_logits_are_as_near_to_fp32_as_those_of_transformers(tiny, shape):
    folder, theirs = tiny(shape).folder, tiny(shape).theirs
    tokens = some_tokens(2, LENGTH)
    with torch.no_grad():
        exact = theirs(tokens).logits
        wanted = copy.deepcopy(theirs).to(torch.bfloat16)(tokens).logits
        found = logits_of(load_model(folder, dtype="bfloat16"), tokens)
    error = median_error if load_family(folder).experts else relative_error
    their_error = error(wanted, exact)
    assert error(found, exact) <= BF16_MARGIN * their_error
    assert error(found, wanted) <= BF16_APART * their_error


def median_error(found: Tensor, wanted: Tensor) -> float:
    """The relative error of the median token: a rounding may send one here and there to another expert, in either
    model, and what such a token then says is no matter of rounding."""
    return ((found.double() - wanted.double()).norm(dim=-1) / wanted.double().norm(dim=-1)).median().item()


@proofs.of("packed")
def test_documents_of_a_packed_row_equal_each_document_alone(tiny, shape):
    model = load_model(tiny(shape).folder)
    lengths = [5, 23, 1, 20]
    documents = [some_tokens(1, length, seed) for seed, length in enumerate(lengths)]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    document = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))[None]
    packed = model(torch.cat(documents, dim=1), positions, document).split(lengths, dim=1)
    for alone, together in zip(documents, packed, strict=True):
        assert relative_error(model.logits(together), logits_of(model, alone)) <= TOLERANCE


@proofs.of("generation")
def test_greedy_answers_with_a_cache_equal_those_of_transformers(tiny, shape):
    folder, theirs = tiny(shape).folder, tiny(shape).theirs
    prompts = [some_tokens(1, length, length)[0].tolist() for length in (3, 17, 30)]
    answers = generate(load_model(folder), prompts, max_tokens=24, stop_ids=())
    # Where longrope's other list begins to hold, transformers 5.17 reads only the last token again, not the sequence.
    use_cache = load_family(folder).rope.kind != "longrope"
    for prompt, answer in zip(prompts, answers, strict=True):
        options = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        wanted = theirs.generate(torch.tensor([prompt]), use_cache=use_cache, **options)[0].tolist()
        assert prompt + answer.ids == wanted


# --- files -----------------------------------------------------------------------------------------------------------


@proofs.of("names")
def test_every_tensor_makes_both_round_trips(tiny, exported, shape, tmp_path):
    """Checkpoint → role → checkpoint is the identity on the file, and role → GGUF → role on the values of the roles."""
    folder = tiny(shape, narrow=True).folder
    model = load_model(folder)
    save_model(model, tmp_path)
    wanted, found = weights(folder), weights(tmp_path)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)

    file, state = read_gguf(exported(shape, "f32").path), model.state_dict()
    assert {name.role for name in model.spec.tensors()} == state.keys()
    tensors = gguf_tensors(model.spec.tensors())
    for tensor in tensors:
        pieces = [name for name, _ in tensor.pieces]
        values = file.read_rows(tensor.name).view(tensor.shape).split([name.shape[0] for name in pieces])
        for name, own in zip(pieces, values, strict=True):
            back = TRANSFORMS[name.transform].from_gguf(own, name.heads)
            # `plus_one` adds and takes away in fp32: half a unit in the last place of 1.5
            torch.testing.assert_close(back, state[name.role], atol=1e-7, rtol=0)
    made = {f"{word}.weight" for word in model.spec.gguf.extra}
    assert set(file.tensors) == {tensor.name for tensor in tensors} | made


@proofs.of("saved")
def test_a_saved_folder_has_the_same_logits_in_transformers(tiny, shape, tmp_path):
    folder, theirs = tiny(shape).folder, tiny(shape).theirs
    save_model(load_model(folder), tmp_path)
    again, report = type(theirs).from_pretrained(
        tmp_path, attn_implementation="eager", dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values())
    tokens = some_tokens(2, LENGTH)
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, theirs(tokens).logits)
