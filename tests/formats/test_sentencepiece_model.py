"""The reader of tokenizer.model against sentencepiece itself, and against damaged files."""

import contextlib
import io
import random
from pathlib import Path

import pytest
import sentencepiece

from lumen.errors import CheckpointError
from lumen.formats.sentencepiece_model import Piece, parse_sentencepiece_model

FILES = (
    "models/stories260K/tokenizer.model",
    "tokenizers/mistral/tokenizer.model.v1",
    "tokenizers/mistral/mistral_instruct_tokenizer_241114.model.v7",
)


@pytest.mark.parametrize("file", FILES)
def test_pieces_scores_and_kinds_equal_sentencepiece(file, shared_data):
    data = (shared_data / file).read_bytes()
    model = parse_sentencepiece_model(Path(file), data)
    reference = sentencepiece.SentencePieceProcessor(model_proto=data)
    assert len(model.pieces) == reference.get_piece_size()
    for id, piece in enumerate(model.pieces):
        assert (piece.text, piece.score) == (reference.id_to_piece(id), reference.get_score(id))
        asked = (reference.is_unknown, reference.is_control, None, reference.is_unused, reference.is_byte)
        kinds = [kind for kind, ask in zip(range(2, 7), asked, strict=True) if ask and ask(id)]
        assert [piece.kind] == kinds or (not kinds and piece.kind in (1, 4))
    assert model.model_type == "bpe" and model.dummy_prefix and model.marks_spaces and not model.charsmap
    assert model.trims_whitespace == (reference.normalize(" a  b ") == "▁a▁b")


def test_user_defined_pieces_are_told_from_normal_ones(shared_data):
    file = shared_data / "tokenizers/mistral/mistral_instruct_tokenizer_241114.model.v7"
    model = parse_sentencepiece_model(file, file.read_bytes())
    assert Piece("[REF]", 0.0, 4) in model.pieces
    assert all(piece.kind == 1 for piece in model.pieces if piece.text in ("▁the", "a"))


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"model_type": "unigram"}, {"model_type": "unigram", "charsmap": True}),
        ({"model_type": "bpe", "add_dummy_prefix": False}, {"model_type": "bpe", "dummy_prefix": False}),
        ({"model_type": "bpe", "normalization_rule_name": "identity"}, {"charsmap": False, "trims_whitespace": True}),
        ({"model_type": "bpe", "remove_extra_whitespaces": False}, {"trims_whitespace": False, "dummy_prefix": True}),
        ({"model_type": "bpe", "treat_whitespace_as_suffix": True}, {"marks_spaces": False}),
    ],
)
def test_the_preparation_of_text_is_read(options, wanted, tmp_path):
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["to be or not to be that is the question"] * 20),
        model_writer=written,
        vocab_size=18,
        minloglevel=2,
        **options,
    )
    model = parse_sentencepiece_model(tmp_path, written.getvalue())
    assert {key: getattr(model, key) for key in wanted} == wanted


def test_damaged_files_are_refused_or_read_and_never_crash(shared_data):
    whole = (shared_data / FILES[0]).read_bytes()
    for data in (
        b"",
        b"hello",
        whole[:-1],
        whole[:100],
        b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",
        b"\x08\x01",
    ):
        with pytest.raises(CheckpointError, match=r"x/tokenizer\.model"):
            parse_sentencepiece_model(Path("x/tokenizer.model"), data)
    generator = random.Random(0)
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(3):
            damaged[generator.randrange(len(damaged))] = generator.randrange(256)
        with contextlib.suppress(CheckpointError):
            parse_sentencepiece_model(Path("x/tokenizer.model"), bytes(damaged))
