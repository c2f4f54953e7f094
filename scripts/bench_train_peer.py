"""One peer's training step, as `bench_train.py --peer` runs it: a JSON object of the case in, one of figures out.

unsloth  Unsloth with its own gradient checkpointing
hf       transformers, PEFT and bitsandbytes, checkpointing every block

Both train through TRL's SFTTrainer with adamw_8bit on rows that are full, and time the trainer's step.
"""

import json
import os
import sys
import tempfile
import time
from statistics import median

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", UNSLOTH_DISABLE_STATISTICS="1", WANDB_DISABLED="true")
case = json.loads(sys.argv[1])
if case["peer"] == "unsloth":
    import unsloth  # before transformers, which it changes

# ruff: noqa: E402
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    TrainerCallback,
)
from trl import SFTConfig, SFTTrainer

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
folder = tempfile.mkdtemp()
config = LlamaConfig(
    hidden_size=case["dim"], num_hidden_layers=case["layers"], num_attention_heads=case["heads"],
    num_key_value_heads=case["kv_heads"], head_dim=case["head_dim"], intermediate_size=case["mlp_dim"],
    vocab_size=128_256, tie_word_embeddings=case["tied"], max_position_embeddings=131_072, rope_theta=500_000.0,
)  # fmt: skip
with torch.device("cuda"):
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
words = {"<s>": 0, "</s>": 1, "<unk>": 2} | {f"w{i}": i for i in range(3, 1000)}
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=Tokenizer(WordLevel(words, unk_token="<unk>")),
    bos_token="<s>",
    eos_token="</s>",
    pad_token="<unk>",
)
tokenizer.save_pretrained(folder)
torch.cuda.empty_cache()
if case["peer"] == "unsloth":
    model, tokenizer = unsloth.FastLanguageModel.from_pretrained(
        folder, max_seq_length=case["length"], load_in_4bit=True, dtype=torch.bfloat16
    )
    model = unsloth.FastLanguageModel.get_peft_model(
        model, r=case["rank"], lora_alpha=16, lora_dropout=0, bias="none", target_modules=TARGETS,
        use_gradient_checkpointing="unsloth",
    )  # fmt: skip
else:
    packed = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_use_double_quant=True,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=packed, dtype=torch.bfloat16, device_map={"": 0}
    )
    model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    model = get_peft_model(
        model, LoraConfig(r=case["rank"], lora_alpha=16, target_modules=TARGETS, task_type="CAUSAL_LM")
    )
times: list[float] = []


class Clock(TrainerCallback):
    def on_step_begin(self, *args, **kwargs):
        torch.cuda.synchronize()
        self.began_s = time.perf_counter()

    def on_step_end(self, *args, **kwargs):
        torch.cuda.synchronize()
        times.append(time.perf_counter() - self.began_s)
        if len(times) == 4:
            torch.cuda.reset_peak_memory_stats()


generator = torch.Generator().manual_seed(0)
rows = torch.randint(4, 300, (case["rows"] * (4 + case["steps"]), case["length"]), generator=generator).tolist()
data = Dataset.from_list([{"input_ids": row, "labels": row, "attention_mask": [1] * len(row)} for row in rows])
settings = SFTConfig(
    output_dir=os.path.join(folder, "out"), per_device_train_batch_size=case["rows"], max_steps=4 + case["steps"],
    learning_rate=1e-4, optim="adamw_8bit", report_to="none", bf16=True, max_length=case["length"], save_strategy="no",
    dataset_kwargs={"skip_prepare_dataset": True}, gradient_checkpointing=case["peer"] == "hf",
    gradient_checkpointing_kwargs={"use_reentrant": False} if case["peer"] == "hf" else None,
)  # fmt: skip
SFTTrainer(model=model, args=settings, train_dataset=data, processing_class=tokenizer, callbacks=[Clock()]).train()
step_s = median(times[4:])
figures = {
    "peer": case["peer"],
    "step_s": round(step_s, 4),
    "tokens_per_s": round(case["rows"] * case["length"] / step_s),
    "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
}
print(json.dumps(figures))
