"""lumen: fine-tune open language models and get back an adapter, a merged model, a GGUF and a Modelfile that agree.

The names below are the library, in reading order:

    finetune(load_config(source, overrides))    the training loop, as the command line runs it
    find_source(path).load()                    the model and the tokenizer that a run, an adapter or a model stands for
    load_family, load_model, load_tokenizer     the parts of a model's folder: spec, weights (4-bit where asked), text
    attach_lora, save_adapter, load_adapter     low-rank adapters in PEFT's layout
    question_ids, generate                      a prompt's ids, and how the model goes on
    merge, write_gguf, write_modelfile          what leaves: safetensors, GGUF, Modelfile
    ops                                         the pure functions underneath

Each is imported when it is first asked for: `import lumen` alone is quick, and works where a dependency is missing.
"""

from importlib import import_module as _import_module

_HOMES = {  # name → the module that it comes from
    "Batch": "lumen.data.batch",
    "Conversation": "lumen.text.conversation",
    "ModelSpec": "lumen.spec",
    "RunConfig": "lumen.config",
    "attach_lora": "lumen.adapter",
    "find_source": "lumen.source",
    "finetune": "lumen.train",
    "generate": "lumen.sampling",
    "load_adapter": "lumen.adapter",
    "load_config": "lumen.config",
    "load_family": "lumen.spec",
    "load_model": "lumen.checkpoint",
    "load_tokenizer": "lumen.text.tokenizer",
    "merge": "lumen.export.merge",
    "question_ids": "lumen.text.turns",
    "save_adapter": "lumen.adapter",
    "write_gguf": "lumen.export.gguf",
    "write_modelfile": "lumen.export.modelfile",
}
__all__ = sorted([*_HOMES, "ops"])


def __getattr__(name: str) -> object:
    if name == "ops":
        return _import_module("lumen.ops")
    if name not in _HOMES:
        raise AttributeError(f"module 'lumen' has no attribute {name!r}")
    globals()[name] = getattr(_import_module(_HOMES[name]), name)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
