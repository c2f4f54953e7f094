"""Tiny random checkpoints, made and judged by transformers."""

from pathlib import Path

import torch
import transformers

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
    """‖found − wanted‖ / ‖wanted‖ in float64."""
    return ((found.double() - wanted.double()).norm() / wanted.double().norm()).item()
