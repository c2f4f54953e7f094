"""lumen: fine-tune open language models and get back an adapter, a merged model, a GGUF and a Modelfile that agree.

The names below are the library, in reading order:

    spec  = lumen.load_family(folder)               what kind of model is in a folder
    model = lumen.load_model(folder, nf4=True)      its weights, 4-bit where asked
    tokenizer = lumen.load_tokenizer(folder)
    lumen.finetune(lumen.load_config("run.toml"))   the training loop
    lumen.generate(model, prompts, ...)             answers
    lumen.merge(...), lumen.write_gguf(...), lumen.write_modelfile(...)
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
from lumen.spec import ModelSpec, load_family
from lumen.text.conversation import Conversation
from lumen.text.tokenizer import load_tokenizer

__all__ = [
    "Batch",
    "Conversation",
    "ModelSpec",
    "RunConfig",
    "attach_lora",
    "finetune",
    "generate",
    "load_adapter",
    "load_config",
    "load_family",
    "load_model",
    "load_tokenizer",
    "merge",
    "ops",
    "save_adapter",
    "write_gguf",
    "write_modelfile",
]


def __getattr__(name: str) -> object:
    if name == "finetune":  # looked up late, so that `python -m lumen.train` does not import itself twice
        return import_module("lumen.train").finetune
    raise AttributeError(f"module 'lumen' has no attribute {name!r}")
