"""One peer's training step, as `bench_train.py --peer` runs it: a JSON object of the case in, one of figures out.

unsloth  Unsloth, with its own gradient checkpointing
hf       transformers, PEFT and bitsandbytes, checkpointing every block

Where the case says `recompute: false`, neither recomputes anything. Both train through TRL's SFTTrainer with adamw_8bit
on rows that are full. A figure is the median step after 4 of warm-up, synchronised at both ends; memory is the peak
that PyTorch allocated in the loop, warm-up included.
"""

import json
import os
import sys
import time
from pathlib import Path
from statistics import median

WARM_UP = 4  # steps
case = json.loads(sys.argv[1])
folder = Path(case["folder"])  # holds the model with random weights, made here if it does not exist
os.environ.update(
    HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TOKENIZERS_PARALLELISM="false", WANDB_DISABLED="true",
    UNSLOTH_DISABLE_STATISTICS="1", UNSLOTH_COMPILE_LOCATION="unsloth_cache",
)  # fmt: skip
if case["peer"] == "unsloth":
    import unsloth  # before transformers, which it changes

# ruff: noqa: E402
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    TrainerCallback,
)
from trl import SFTConfig, SFTTrainer

LORA = {
    "r": case["rank"],
    "lora_alpha": 16,
    "lora_dropout": 0,
    "bias": "none",
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}


def write_model(folder: Path) -> None:
    """A Llama of the case's size with random weights, and a tokenizer that spells bytes."""
    special = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
    special |= {"pad_token": "<|finetune_right_pad_id|>"}  # Llama 3's own, which Unsloth knows
    config = LlamaConfig(
        hidden_size=case["dim"], num_hidden_layers=case["layers"], num_attention_heads=case["heads"],
        num_key_value_heads=case["kv_heads"], head_dim=case["head_dim"], intermediate_size=case["mlp_dim"],
        vocab_size=case["vocab"], tie_word_embeddings=case["tied"], max_position_embeddings=131_072,
        rope_theta=500_000.0, rms_norm_eps=1e-5, bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.generation_config.pad_token_id = 2
    begun = folder.with_name(folder.name + ".begun")
    model.save_pretrained(begun)
    alphabet = [*special.values(), *sorted(pre_tokenizers.ByteLevel.alphabet())]
    spelling = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(alphabet)}, merges=[]))
    spelling.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    spelling.decoder = decoders.ByteLevel()
    options = special | {"padding_side": "right", "model_max_length": 131_072}
    PreTrainedTokenizerFast(tokenizer_object=spelling, **options).save_pretrained(begun)
    begun.rename(folder)


def unsloth_model() -> tuple[torch.nn.Module, object]:
    model, tokenizer = unsloth.FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=case["length"], load_in_4bit=True, dtype=torch.bfloat16
    )
    recompute = "unsloth" if case["recompute"] else False
    return unsloth.FastLanguageModel.get_peft_model(model, **LORA, use_gradient_checkpointing=recompute), tokenizer


def hf_model() -> tuple[torch.nn.Module, object]:
    packed = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_use_double_quant=True,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=packed, dtype=torch.bfloat16, device_map={"": 0}
    )
    model = prepare_model_for_kbit_training(
        model, use_gradient_checkpointing=case["recompute"], gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    return get_peft_model(model, LoraConfig(**LORA, task_type="CAUSAL_LM")), AutoTokenizer.from_pretrained(folder)


class Clock(TrainerCallback):
    """Notes how long each step of the trainer takes."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_begin(self, *arguments, **options) -> None:
        torch.cuda.synchronize()
        self.began_s = time.perf_counter()

    def on_step_end(self, *arguments, **options) -> None:
        torch.cuda.synchronize()
        self.times.append(time.perf_counter() - self.began_s)


def main() -> None:
    torch.manual_seed(0)
    if not folder.exists():
        write_model(folder)
        torch.cuda.empty_cache()
    model, tokenizer = unsloth_model() if case["peer"] == "unsloth" else hf_model()
    steps = WARM_UP + case["steps"]
    rows = torch.randint(4, 250, (case["rows"] * steps, case["length"])).tolist()
    data = Dataset.from_list([{"input_ids": row, "labels": row, "attention_mask": [1] * len(row)} for row in rows])
    own = case["peer"] == "unsloth"  # it sets checkpointing up by itself
    settings = SFTConfig(
        output_dir=str(folder.parent / "out"), per_device_train_batch_size=case["rows"], max_steps=steps,
        gradient_accumulation_steps=1,  # Unsloth makes the default 2
        learning_rate=1e-4, optim="adamw_8bit", report_to="none", bf16=True, max_length=case["length"],
        save_strategy="no", dataset_kwargs={"skip_prepare_dataset": True}, dataset_num_proc=1, logging_steps=1,
        gradient_checkpointing=case["recompute"] and not own,
        gradient_checkpointing_kwargs=None if own else {"use_reentrant": False},
    )  # fmt: skip
    clock = Clock()
    trainer = SFTTrainer(model=model, args=settings, train_dataset=data, processing_class=tokenizer, callbacks=[clock])
    torch.cuda.reset_peak_memory_stats()
    trainer.train()
    step_s = median(clock.times[WARM_UP:])
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    figures = {
        "peer": case["peer"],
        "kept": ["everything"] if not case["recompute"] else ["its own checkpointing" if own else "each block's input"],
        "step_s": round(step_s, 4),
        "tokens_per_s": round(case["rows"] * case["length"] / step_s),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "loss": round(losses[-1], 4),
    }
    print(f"\n{json.dumps(figures)}", flush=True)


if __name__ == "__main__":
    main()
