"""lumen: fine-tune open language models and get back an adapter, a merged model, a GGUF and a Modelfile that agree.

The names below are the library, in reading order:

    finetune(load_config(source, overrides))    the training loop, as the command line runs it
    find_source(path).load()                    the model and the tokenizer that a run, an adapter or a model stands for
    load_family, load_model, load_tokenizer     the parts of a model's folder: spec, weights (4-bit where asked), text
    attach_lora, save_adapter, load_adapter     low-rank adapters in PEFT's layout
    question_ids, generate                      a prompt's ids, and how the model goes on
    merge, write_gguf, write_modelfile          what leaves: safetensors, GGUF, Modelfile
    ops                                         the pure functions underneath
"""

from importlib import import_module

from lumen import ops
from lumen.adapter import attach_lora, load_adapter, save_adapter
from lumen.checkpoint import load_model
from lumen.config import RunConfig, load_config
from lumen.data.batch import Batch
from lumen.export.gguf import write_gguf
from lumen.export.merge import merge
from lumen.export.modelfile import write_modelfile
from lumen.sampling import generate
from lumen.source import find_source
from lumen.spec import ModelSpec, load_family
from lumen.text.conversation import Conversation
from lumen.text.tokenizer import load_tokenizer
from lumen.text.turns import question_ids

__all__ = [
    "Batch",
    "Conversation",
    "ModelSpec",
    "RunConfig",
    "attach_lora",
    "find_source",
    "finetune",
    "generate",
    "load_adapter",
    "load_config",
    "load_family",
    "load_model",
    "load_tokenizer",
    "merge",
    "ops",
    "question_ids",
    "save_adapter",
    "write_gguf",
    "write_modelfile",
]


def __getattr__(name: str) -> object:
    if name == "finetune":  # looked up late, so that `python -m lumen.train` does not import itself twice
        return import_module("lumen.train").finetune
    raise AttributeError(f"module 'lumen' has no attribute {name!r}")
