"""Added tokens: what tokenizer, adapter, merged folder and GGUF say of them, in transformers, PEFT and llama.cpp."""

import json
import shutil

import peft
import pytest
import torch
import transformers
from llama_cpp import LlamaCpp
from safetensors.torch import load_file
from tiny_models import byte_level_tokenizer, llama, relative_error

from lumen.checkpoint import load_model
from lumen.config import load_config
from lumen.embeddings import fill_rows
from lumen.errors import ConfigError
from lumen.export.gguf import write_gguf
from lumen.export.merge import merge
from lumen.source import find_source
from lumen.text.added_tokens import add_tokens, spelled_before
from lumen.text.tokenizer import load_tokenizer
from lumen.train import finetune

NEW = ["<tool>", "<|answer 2|>"]
TEXT = "the<tool>quick<|answer 2|>fox"  # no blanks around: the SentencePiece model drops them there, llama.cpp does not
SIZE = 290  # tokens of the byte-level tokenizer


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"{TEXT} {number}"}) for number in range(4)))
    return path


def byte_level(folder, **changes):
    llama(folder, vocab_size=SIZE, bos_token_id=None, eos_token_id=1, **changes)
    byte_level_tokenizer(folder)
    return folder


def run(base, texts, folder, *overrides):
    """The folder of a finished run of three steps that adds NEW to the vocabulary."""
    source = folder.with_suffix(".toml")
    source.write_text(
        f'[model]\npath = "{base}"\nnf4 = false\n[lora]\nrank = 2\n[tokens]\nadd = {json.dumps(NEW)}\n'
        f'[data]\ntrain = "{texts}"\nmax_length = 64\ntoo_long = "truncate"\n[train]\nsteps = 3\nlr = 1e-2\n'
        f'schedule = "constant"\nwarmup_fraction = 0.0\n[output]\nfolder = "{folder}"\n'
    )
    finetune(load_config(source, overrides))
    return folder


@torch.no_grad()
def logits(model, ids):
    return model.logits(model(torch.tensor([ids]), torch.arange(len(ids))[None]))[0]


def check_everywhere(base, folder, rows, special=True):
    """The proof: one id everywhere, and the logits of lumen everywhere."""
    model, tokenizer = find_source(str(folder)).load()
    size = load_tokenizer(base).size
    ids = tokenizer.encode(TEXT)
    assert [tokenizer.encode(text) for text in NEW] == [[size], [size + 1]]
    assert {size, size + 1} <= set(ids)
    assert (size in tokenizer.special_ids) == special
    assert model.spec.vocab == rows
    ours = logits(model, ids)

    merged = merge(folder, folder.parent / "merged")
    config = json.loads((merged / "config.json").read_text())
    assert config["vocab_size"] == rows
    theirs = transformers.AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    encoder = transformers.AutoTokenizer.from_pretrained(merged)
    assert encoder(TEXT, add_special_tokens=False).input_ids == ids
    assert encoder.convert_tokens_to_ids(NEW) == [size, size + 1]
    assert torch.equal(theirs.get_input_embeddings().weight[size], model.embed.weight[size])
    assert relative_error(theirs(torch.tensor([ids])).logits[0], ours) <= 1e-5

    resized = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if resized.get_input_embeddings().num_embeddings != rows:
        resized.resize_token_embeddings(rows)
    adapted = peft.PeftModel.from_pretrained(resized, folder / "adapter").eval()
    assert relative_error(adapted(torch.tensor([ids])).logits[0], ours) <= 1e-5
    assert (
        transformers.AutoTokenizer.from_pretrained(folder / "adapter")(TEXT, add_special_tokens=False).input_ids == ids
    )

    write_gguf(merged, folder.parent / "model.gguf", "f32")
    with LlamaCpp(folder.parent / "model.gguf") as cpp:
        assert cpp.rows == rows
        assert [cpp.tokenize(text, parse_special=True)[-1] for text in NEW] == [size, size + 1]
        assert cpp.tokenize(TEXT, parse_special=True) == ids
        assert cpp.is_control(size) == special
        assert cpp.is_control(size + 1)  # whatever has the look of a control token is one there
        assert relative_error(cpp.logits(ids), ours) <= 1e-4


@pytest.mark.parametrize("tied", [False, True], ids=["apart", "tied"])
@pytest.mark.parametrize("rows", [SIZE, SIZE + 1, 320], ids=["full", "one free row", "padded"])
def test_a_token_is_one_id_with_the_trained_row_in_transformers_peft_and_llama_cpp(tmp_path, texts, rows, tied, caplog):
    llama(tmp_path / "base", vocab_size=rows, eos_token_id=1, bos_token_id=None, tie_word_embeddings=tied)
    byte_level_tokenizer(tmp_path / "base")
    with caplog.at_level("WARNING", "lumen"):
        folder = run(tmp_path / "base", texts, tmp_path / "run")
    assert f"2 tokens are new, ids 290 to 291; embedding and head have {max(rows, 292)} rows." in caplog.text
    saved = json.loads((folder / "adapter/adapter_config.json").read_text())
    assert saved["modules_to_save"] == ["embed_tokens", "lm_head"]
    assert saved["ensure_weight_tying"] == tied
    check_everywhere(tmp_path / "base", folder, max(rows, SIZE + 2))


def test_tokens_that_are_words_are_no_control_tokens(tmp_path, texts):
    folder = run(byte_level(tmp_path / "base"), texts, tmp_path / "run", "tokens.special=false")
    check_everywhere(tmp_path / "base", folder, SIZE + 2, special=False)
    _, tokenizer = find_source(str(folder)).load()
    assert tokenizer.decode(tokenizer.encode(TEXT), skip_special=True) == TEXT


@pytest.mark.parametrize("without", ["tokenizer.json", "tokenizer.model", None])
@pytest.mark.parametrize("special", [True, False], ids=["special", "words"])
def test_a_sentencepiece_vocabulary_takes_tokens_too(tmp_path, texts, shared_data, without, special):
    (tmp_path / "base").mkdir()
    for file in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer.model", "tokenizer_config.json"):
        if file != without:
            shutil.copyfile(shared_data / "models/stories260K" / file, tmp_path / "base" / file)
    folder = run(tmp_path / "base", texts, tmp_path / "run", f"tokens.special={str(special).lower()}")
    check_everywhere(tmp_path / "base", folder, 514, special=special)


def test_full_fine_tuning_writes_a_model_with_the_new_rows(tmp_path, texts):
    folder = run(byte_level(tmp_path / "base"), texts, tmp_path / "run", "train.method=full")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    model, tokenizer = find_source(str(folder)).load()
    ids = tokenizer.encode(TEXT)
    assert transformers.AutoTokenizer.from_pretrained(folder / "model")(TEXT).input_ids == ids
    assert relative_error(theirs(torch.tensor([ids])).logits[0], logits(model, ids)) <= 1e-5


def test_a_run_that_goes_on_from_an_adapter_keeps_its_tokens_and_may_add_more(tmp_path, texts):
    first = run(byte_level(tmp_path / "base"), texts, tmp_path / "first")
    second = run(first, texts, tmp_path / "second", 'tokens.add=["<more>"]')
    model, tokenizer = find_source(str(second)).load()
    assert [tokenizer.encode(text) for text in (*NEW, "<more>")] == [[SIZE], [SIZE + 1], [SIZE + 2]]
    assert model.spec.vocab == len(model.embed.weight) == len(model.head_weight) == SIZE + 3
    before = find_source(str(first)).load()[0]
    moved = (model.embed.weight[:SIZE] - before.embed.weight[:SIZE]).norm() / before.embed.weight.norm()
    assert 0 < moved < 0.5  # trained further, not begun anew
    named = json.loads((second / "adapter/adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == str(tmp_path / "base")


def test_resuming_a_run_that_added_tokens_is_the_uninterrupted_run_bit_for_bit(tmp_path, texts):
    byte_level(tmp_path / "base")
    whole = run(tmp_path / "base", texts, tmp_path / "whole", "train.steps=4")
    parts = run(tmp_path / "base", texts, tmp_path / "parts", "train.steps=2")
    finetune(load_config(parts, ["train.steps=4"]), resume=True)
    tensors = [load_file(folder / "adapter/adapter_model.safetensors") for folder in (whole, parts)]
    assert all(torch.equal(tensors[0][key], tensors[1][key]) for key in tensors[0])


def test_the_mean_leaves_out_rows_that_nothing_was_trained_on(tmp_path):
    base = llama(tmp_path, vocab_size=320)
    trained = [*range(10), *range(14, SIZE)]
    model = load_model(tmp_path)
    with torch.no_grad():
        model.embed.weight[10:14] = 1e-17
        model.head.weight[10:14] = 7.0  # a head may hold anything where the embedding was never read
        model.embed.weight[SIZE:] = 3.0  # padding, whatever its values
    fill_rows(model, {SIZE: [], SIZE + 1: [3, 11, 4], 321: []}, known=range(SIZE))
    wanted = base.model.embed_tokens.weight[trained].mean(0)
    for token in (SIZE, 321):
        torch.testing.assert_close(model.embed.weight[token], wanted)
        torch.testing.assert_close(model.head.weight[token], base.lm_head.weight[trained].mean(0))
    torch.testing.assert_close(model.embed.weight[SIZE + 1], base.model.embed_tokens.weight[[3, 4]].mean(0))
    assert model.spec.vocab == model.spec.config["vocab_size"] == len(model.head.weight) == 322
    assert torch.equal(model.embed.weight[:10], base.model.embed_tokens.weight[:10])
    with pytest.raises(ConfigError, match="none of the rows that token 322 would begin from is trained"):
        fill_rows(model, {322: [11, 12]}, known=range(SIZE))


def test_rows_may_begin_at_the_tokens_that_spelled_them(tmp_path, texts):
    byte_level(tmp_path / "base")
    folder = run(tmp_path / "base", texts, tmp_path / "run", "tokens.init=subtokens", "train.lr=1e-12")
    model, before = find_source(str(folder)).load()[0], load_tokenizer(tmp_path / "base")
    base = load_model(tmp_path / "base")
    for number, text in enumerate(NEW):
        wanted = base.embed.weight[before.encode(text)].mean(0)
        torch.testing.assert_close(model.embed.weight[SIZE + number], wanted)
        assert spelled_before(before, NEW)[SIZE + number] == before.encode(text)


def test_embedding_and_head_have_a_learning_rate_of_their_own(tmp_path, texts):
    byte_level(tmp_path / "base")
    folder = run(tmp_path / "base", texts, tmp_path / "run", "train.embedding_lr=1e-5")
    model, base = find_source(str(folder)).load()[0], load_model(tmp_path / "base")
    moved = (model.head.weight[:SIZE] - base.head.weight).abs().max()
    assert 1e-6 < moved < 1e-4
    assert model.blocks[0].attn.q.lora.b.abs().max() > 1e-3


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (["<|im_end|>"], "'<|im_end|>' is token 1 already"),
        (["the"], "'the' is token"),
        ([" "], "a text was wanted"),
        (["<a>", "<a>"], "'<a>' stands there twice"),
    ],
)
def test_tokens_that_cannot_be_added_are_refused(tmp_path, texts, words):
    byte_level_tokenizer(tmp_path)
    with pytest.raises(ConfigError) as refused:
        add_tokens(load_tokenizer(tmp_path), texts, special=True)
    assert words in str(refused.value)
