"""Tiny random checkpoints, made and judged by transformers."""

import copy
import json
from pathlib import Path

import tokenizers
import torch
import transformers

QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

LLAMAS = {  # the shapes in which Llama checkpoints differ
    "plain": {"num_key_value_heads": 4},
    "grouped": {},
    "llama3_rope": {"rope_scaling": LLAMA3_ROPE, "rope_theta": 500000.0},
    "linear_rope": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "tied": {"tie_word_embeddings": True},
    "wide_heads": {"head_dim": 24},
}


def llama(folder: Path, **changes: object) -> transformers.LlamaForCausalLM:
    """Writes a random Llama of 2 layers into `folder` and returns transformers' own model of it, in fp32 and eval mode.

    Norms and weights are drawn wide, so that no tensor is close to doing nothing.
    """
    settings = {
        "vocab_size": 257,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    torch.manual_seed(7)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings | changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0, 0.15)
    model.save_pretrained(folder)
    return model


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """‖found − wanted‖ / ‖wanted‖ in float64; 0 where both are zeros, as gradients of an expert without tokens."""
    if not wanted.any() and not found.any():
        return 0.0
    return ((found.double() - wanted.double()).norm() / wanted.double().norm()).item()


WINDOW = 8  # tokens, of the window layers of the models below
CONTEXT = 64  # tokens that the models below are said to be made for
GEMMA3 = {"num_hidden_layers": 7, "head_dim": 24, "query_pre_attn_scalar": 24, "sliding_window": WINDOW}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 64}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}  # the betas fall on its pairs
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.3, 1.2, 1.5, 1.6],
    "long_factor": [1.0, 1.5, 2.5, 2.0, 6.0, 8.0],
}
PHI3_LONGROPE = {  # four tokens are all that it was trained with: nearly every text is beyond them
    "sliding_window": WINDOW,
    "original_max_position_embeddings": 4,
    "rope_theta": 100.0,
}
FAMILIES = {  # a shape of a family → its page, the first word of its classes, and what it sets beyond the sizes
    "llama2": ("llama2", "Llama", {"num_key_value_heads": 4}),
    "llama2 linear": ("llama2", "Llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "llama2 tied": ("llama2", "Llama", {"head_dim": 24, "tie_word_embeddings": True}),
    # the vocabulary is what tells its checkpoints from those of Llama 2
    "llama3": ("llama3", "Llama", {"vocab_size": 128256, "hidden_size": 32, "tie_word_embeddings": True}),
    # so wide a head has a frequency of each kind: kept, divided, and between the two
    "llama3.1": ("llama3.1", "Llama", {"head_dim": 32, "rope_scaling": LLAMA3_ROPE, "rope_theta": 500000.0}),
    "qwen2": ("qwen2", "Qwen2", {}),
    "qwen2 tied": ("qwen2", "Qwen2", {"tie_word_embeddings": True}),
    "qwen2 yarn": ("qwen2", "Qwen2", {"rope_scaling": YARN, "rope_theta": 100.0}),
    # its text half alone, tests/test_text_only.py has the whole; llama.cpp takes its norms to have no epsilon
    "qwen2-vl": ("qwen2-vl", "Qwen2", {"mrope_section": [2, 3, 3], "rms_norm_eps": 1e-7}),
    "qwen2-vl tied": (
        "qwen2-vl",
        "Qwen2",
        {"mrope_section": [4, 2, 2], "rms_norm_eps": 1e-7, "tie_word_embeddings": True},
    ),
    # llama.cpp turns all pairs of these sections; tests/test_text_only_qwen.py has such as it does not
    "qwen3-vl": ("qwen3-vl", "Qwen3", {"mrope_section": [3, 3, 2], "deepstack_layers": 1, "head_dim": 16}),
    "phi3": ("phi3", "Phi3", {"sliding_window": WINDOW}),
    "phi3 longrope": (
        "phi3",
        "Phi3",
        PHI3_LONGROPE | {"num_attention_heads": 8, "hidden_size": 96, "rope_scaling": LONGROPE},
    ),
    "phi4": ("phi4", "Phi3", {"rope_theta": 250000.0}),
    "phi4-mini": (
        "phi4-mini",
        "Phi3",
        PHI3_LONGROPE | {"rope_scaling": LONGROPE, "partial_rotary_factor": 0.75, "tie_word_embeddings": True},
    ),
    "mistral": ("mistral", "Mistral", {"sliding_window": WINDOW}),
    "mistral v0.2": ("mistral-v0.2", "Mistral", {"sliding_window": None, "rope_theta": 1e6}),
    "mistral nemo": ("mistral-v0.2", "Mistral", {"sliding_window": None, "head_dim": 24}),
    "mistral small": ("mistral-small", "Mistral", {"sliding_window": None, "head_dim": 24, "rope_theta": 1e8}),
    "qwen3": ("qwen3", "Qwen3", {"head_dim": 24}),
    "qwen3 tied": ("qwen3", "Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen3 yarn": ("qwen3", "Qwen3", {"head_dim": 16, "rope_scaling": YARN, "rope_theta": 100.0}),
    "mixtral": ("mixtral", "Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2-moe": ("qwen2-moe", "Qwen2Moe", EXPERTS | {"shared_expert_intermediate_size": 96, "norm_topk_prob": False}),
    "qwen3-moe": ("qwen3-moe", "Qwen3Moe", EXPERTS | {"head_dim": 24, "norm_topk_prob": True}),
    "gemma": ("gemma", "Gemma", {"head_dim": 24, "num_key_value_heads": 1}),
    "gemma2": (
        "gemma2",
        "Gemma2",
        {
            "head_dim": 24,
            "query_pre_attn_scalar": 24,
            "sliding_window": WINDOW,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3": ("gemma3", "Gemma3", GEMMA3),
    "gemma3 linear": (
        "gemma3",
        "Gemma3",
        GEMMA3
        | {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 3000.0},
            }
        },
    ),
}


def family(folder: Path, shape: str, **changes: object) -> transformers.PreTrainedModel:
    """Writes a random model, one of `FAMILIES`, into `folder`; returns transformers' own model of it, in fp32, in eval
    mode and with plain attention, the only one that knows every switch.

    Windows and soft caps are small, norms and biases are drawn wide: no mechanism is close to doing nothing.
    """
    _, word, own = FAMILIES[shape]
    settings = {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": None,
    }
    config_class = getattr(transformers, f"{word}TextConfig", None) or getattr(transformers, f"{word}Config")
    # transformers writes into the dictionaries that it is given
    config = config_class(**copy.deepcopy(settings | own | changes), attn_implementation="eager")
    torch.manual_seed(7)
    model = getattr(transformers, f"{word}ForCausalLM")(config).eval()
    identity = 0.0 if word.startswith("Gemma") else 1.0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(identity - 0.5, identity + 0.5)
            else:
                parameter.normal_(0, 0.5 if name.endswith("bias") else 0.12)
    model.save_pretrained(folder)
    return model


def byte_level_tokenizer(folder: Path) -> None:
    """Writes a tokenizer of Qwen 2's kind into `folder`: bytes, no BOS, and merges for at most 44 of its 300 tokens."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(QWEN2_SPLIT), "isolated")
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<|im_end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog"] * 4, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
