"""Merging against transformers and PEFT, and the export verb end to end."""

import json

import peft
import pytest
import torch
import transformers
from llama_cpp import LlamaCpp
from safetensors.torch import load_file, save_file
from tiny_models import LLAMAS, llama, relative_error

from lumen.adapter import attach_lora, save_adapter
from lumen.checkpoint import linear_layers, load_model
from lumen.config import Lora
from lumen.errors import CheckpointError, ConfigError, ExportError, LumenError
from lumen.export.__main__ import main
from lumen.export.merge import merge
from lumen.nn.linear import Linear
from lumen.ops.lora import lora_weight
from lumen.sampling import generate
from lumen.source import find_source

TOKENS = torch.randint(257, (2, 20), generator=torch.Generator().manual_seed(6))
POSITIONS = torch.arange(20).expand(2, 20)


def adapted(base, adapter, *, nf4=False, rank=4):
    """A model with a trained-looking adapter, which is also saved in the folder `adapter`."""
    model = load_model(base, nf4=nf4)
    torch.manual_seed(0)
    for pair in attach_lora(model, Lora(rank=rank, alpha=8.0)).values():
        torch.nn.init.normal_(pair.b, 0, 0.05)
    adapter.mkdir()
    save_adapter(model, adapter, Lora(rank=rank, alpha=8.0), str(base))
    return model


@pytest.fixture
def base(tmp_path, shared_data):
    """Pretrained weights with their tokenizer, copied, so that a test may damage them."""
    folder = tmp_path / "base"
    folder.mkdir()
    for name in (
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ):
        (folder / name).write_bytes((shared_data / "models/stories260K" / name).read_bytes())
    return folder


def logits(model):
    return model.logits(model(TOKENS, POSITIONS))


def test_the_merged_folder_loads_in_transformers_with_the_logits_and_the_greedy_text_of_the_adapter(base, tmp_path):
    model = adapted(base, tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "merged")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    assert relative_error(logits(model), theirs(TOKENS).logits) < 1e-5
    prompt = [1, 403, 407]
    (ours,) = generate(model, [prompt], max_tokens=60, stop_ids=[2])
    wanted = theirs.generate(torch.tensor([prompt]), max_new_tokens=60, do_sample=False, eos_token_id=2)[0, 3:]
    assert ours.ids == wanted.tolist()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer.decode(wanted, skip_special_tokens=True).strip()


def test_merging_equals_pefts_own_merge(base, tmp_path):
    adapted(base, tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "merged")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").merge_and_unload().state_dict()
    ours = load_file(tmp_path / "merged/model.safetensors")
    for name, values in ours.items():
        torch.testing.assert_close(values, theirs[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", LLAMAS)
def test_every_shape_merges_to_the_logits_of_its_adapter(tmp_path, shape, monkeypatch):
    llama(tmp_path / "base", **LLAMAS[shape])
    monkeypatch.setattr(
        "lumen.source.load_tokenizer", lambda folder: type("None_", (), {"save": lambda self, to: None})()
    )
    model = adapted(tmp_path / "base", tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "merged", shard_bytes=30_000)
    assert len(list((tmp_path / "merged").glob("model-*.safetensors"))) > 2
    assert relative_error(logits(load_model(tmp_path / "merged")), logits(model)) < 1e-5


def test_the_nf4_base_gives_the_model_that_was_trained_and_the_original_base_another(base, tmp_path):
    model = adapted(base, tmp_path / "adapter", nf4=True)
    merge(tmp_path / "adapter", tmp_path / "image", base="nf4")
    merge(tmp_path / "adapter", tmp_path / "original")
    assert relative_error(logits(load_model(tmp_path / "image")), logits(model)) < 1e-5
    assert relative_error(logits(load_model(tmp_path / "original")), logits(model)) > 1e-3


def test_a_bf16_base_is_summed_in_fp32_and_rounded_once(base, tmp_path):
    half = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    half.save_pretrained(base)
    model = adapted(base, tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "merged")
    merged = load_file(tmp_path / "merged/model.safetensors")
    assert {values.dtype for values in merged.values()} == {torch.bfloat16}
    layers: dict[str, Linear] = linear_layers(model)
    for role, layer in layers.items():
        name = model.spec.names.by_role(role).checkpoint + ".weight"
        wanted = layer.weight.float() + lora_weight(layer.lora.a.detach(), layer.lora.b.detach(), layer.lora.scale)
        assert torch.equal(merged[name], wanted.to(torch.bfloat16))


def test_an_adapter_of_another_model_and_a_result_that_overflows_are_refused(base, tmp_path):
    llama(tmp_path / "other")
    adapted(tmp_path / "other", tmp_path / "foreign")
    config = json.loads((tmp_path / "foreign/adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(base)
    (tmp_path / "foreign/adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="Was it trained on this base model"):
        merge(tmp_path / "foreign", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()

    transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float16).save_pretrained(base)
    model = adapted(base, tmp_path / "wild")
    for pair in (layer.lora for layer in linear_layers(model).values()):
        pair.b.data.fill_(1e9)
    save_adapter(model, tmp_path / "wild", Lora(rank=4, alpha=8.0), str(base))
    with pytest.raises(ExportError, match=r"finite values in torch\.float16"):
        merge(tmp_path / "wild", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    with pytest.raises(ConfigError, match="Did you mean 'nf4'"):
        merge(tmp_path / "wild", tmp_path / "merged", base="nf5")


def test_the_verb_writes_gguf_files_that_llama_cpp_continues_like_the_adapter(base, tmp_path, capsys):
    model = adapted(base, tmp_path / "adapter")
    out = tmp_path / "out"
    code = main([str(tmp_path / "adapter"), str(out), "--as", "gguf", "--quant", "f32,q8_0", "--json"])
    written = json.loads(capsys.readouterr().out)
    assert code == 0
    assert {path.name for path in out.iterdir()} == {
        "adapter-f32.gguf", "adapter-q8_0.gguf", "Modelfile", "README.md",
    }  # fmt: skip
    prompt = [1, 403, 407]
    (ours,) = generate(model, [prompt], max_tokens=40, stop_ids=[2])
    assert LlamaCpp(written["files"]["f32"]).generate(prompt, 40) == ours.ids
    assert "FROM" in (out / "Modelfile").read_text()


def test_the_verb_merges_copies_adapters_and_refuses_what_is_wrong(base, tmp_path, capsys):
    adapted(base, tmp_path / "adapter")
    assert main([str(tmp_path / "adapter"), str(tmp_path / "merged"), "--as", "merged"]) == 0
    assert main([str(tmp_path / "adapter"), str(tmp_path / "copy"), "--as", "adapter"]) == 0
    assert load_file(tmp_path / "copy/adapter_model.safetensors").keys()
    capsys.readouterr()
    wrong = [
        ([str(base), str(tmp_path / "a"), "--as", "adapter"], "has no adapter"),
        ([str(base), str(tmp_path / "a"), "--as", "gguf", "--quant", "q8_1"], "Did you mean 'q8_0'"),
        ([str(tmp_path / "nothing"), str(tmp_path / "a"), "--as", "merged"], "found nothing"),
        ([str(tmp_path), str(tmp_path / "a"), "--as", "merged"], "a folder without any of these"),
    ]
    for arguments, words in wrong:
        assert main(arguments) == 2
        said = capsys.readouterr().err
        assert words in said and "Traceback" not in said
        assert not (tmp_path / "a").exists()
    for form, option in (
        ("merged", ["--quant", "q8_0"]),
        ("adapter", ["--base", "nf4"]),
        ("adapter", ["--no-modelfile"]),
        ("nf4", ["--no-modelfile"]),
    ):
        with pytest.raises(SystemExit) as refused:
            main([str(tmp_path / "adapter"), str(tmp_path / "a"), "--as", form, *option])
        assert refused.value.code == 2 and not (tmp_path / "a").exists()
        assert f"{option[0]} changes nothing --as {form}; it goes with --as" in capsys.readouterr().err
    assert main([str(base), str(tmp_path / "merged"), "--as", "merged"]) != 0  # it is in use
    (base / "model.safetensors").unlink()
    assert main([str(base), str(tmp_path / "a"), "--as", "merged"]) == 1


def test_an_adapter_on_a_module_that_the_model_lacks_is_refused_and_not_dropped(base, tmp_path):
    adapted(base, tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter/adapter_model.safetensors")
    head = {"base_model.model.lm_head.lora_A.weight": (4, 64), "base_model.model.lm_head.lora_B.weight": (512, 4)}
    tensors |= {name: torch.ones(shape) for name, shape in head.items()}
    save_file(tensors, tmp_path / "adapter/adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="changes 'head', which is no linear layer of a block"):
        merge(tmp_path / "adapter", tmp_path / "merged")


def test_a_copy_of_a_runs_adapter_is_not_taken_for_the_run(base, tmp_path):
    adapted(base, tmp_path / "adapter-v1")
    (tmp_path / "config.toml").write_text("[model]\n")
    assert find_source(str(tmp_path / "adapter-v1")).adapter == tmp_path / "adapter-v1"


def test_a_source_says_what_it_lacks(tmp_path):
    with pytest.raises(LumenError, match=r"config\.toml.*adapter_config\.json.*config\.json"):
        find_source(str(tmp_path))


def test_exporting_an_adapter_copies_its_own_files_alone_and_none_that_is_damaged_or_a_link(base, tmp_path, capsys):
    adapted(base, tmp_path / "adapter")
    (tmp_path / "adapter/notes.txt").write_text("private")
    assert main([str(tmp_path / "adapter"), str(tmp_path / "copy"), "--as", "adapter"]) == 0
    assert {path.name for path in (tmp_path / "copy").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors",
    }  # fmt: skip
    (tmp_path / "adapter/tokenizer.json").symlink_to(tmp_path / "adapter/notes.txt")
    assert main([str(tmp_path / "adapter"), str(tmp_path / "linked"), "--as", "adapter"]) == 1
    assert "is a link" in capsys.readouterr().err and not (tmp_path / "linked").exists()


def test_the_working_directory_and_a_mount_point_are_named_or_refused_before_the_work(
    base, tmp_path, monkeypatch, capsys
):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert main([str(base), ".", "--as", "merged"]) == 0
    assert (tmp_path / "empty/model.safetensors").exists()
    assert main([str(base), "/proc", "--as", "merged"]) == 2
    assert "is a mount point" in capsys.readouterr().err
