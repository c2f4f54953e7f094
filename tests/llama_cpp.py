"""llama.cpp as an oracle: its libraries through ctypes, to load a GGUF file, tokenize, compute logits and generate.

The libraries come from `scripts/fetch_llama_cpp`. The structs below are those of llama.h and ggml.h of the 0.5 series;
their fields are set only after `llama_*_default_params()` has filled them.
"""

import ctypes
import os
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int8, c_int32, c_int64, c_size_t, c_uint32, c_void_p
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

FOLDER = Path(__file__).resolve().parent.parent / ".ref" / "llama.cpp"
F32 = 0  # ggml's number for the type of the key/value cache


class Refused(Exception):
    """llama.cpp did not load the file; the text is what it logged."""


class _ModelParams(ctypes.Structure):
    _fields_ = [
        *[(name, c_void_p) for name in ("devices", "tensor_buft_overrides")],
        *[(name, c_int32) for name in ("n_gpu_layers", "split_mode", "load_mode", "lazy_mode", "main_gpu")],
        *[(name, c_void_p) for name in ("tensor_split", "progress_callback", "progress_user_data", "kv_overrides")],
        *[
            (name, c_bool)
            for name in ("vocab_only", "check_tensors", "use_extra_bufts", "no_host", "no_alloc", "load_mtp")
        ],
    ]


class _ContextParams(ctypes.Structure):
    _fields_ = [
        *[(name, c_uint32) for name in ("n_ctx", "n_batch", "n_ubatch", "n_seq_max", "n_rs_seq")],
        *[(name, c_uint32) for name in ("n_outputs_max", "n_outputs_max_per_seq")],
        *[(name, c_int32) for name in ("n_threads", "n_threads_batch", "ctx_type", "rope_scaling_type")],
        *[(name, c_int32) for name in ("pooling_type", "attention_type", "flash_attn_type")],
        *[(name, c_float) for name in ("rope_freq_base", "rope_freq_scale", "yarn_ext_factor", "yarn_attn_factor")],
        *[(name, c_float) for name in ("yarn_beta_fast", "yarn_beta_slow")],
        ("yarn_orig_ctx", c_uint32),
        ("defrag_thold", c_float),
        *[(name, c_void_p) for name in ("cb_eval", "cb_eval_user_data")],
        *[(name, c_int32) for name in ("type_k", "type_v")],
        *[(name, c_void_p) for name in ("abort_callback", "abort_callback_data")],
        *[(name, c_bool) for name in ("embeddings", "offload_kqv", "no_perf", "op_offload", "swa_full", "kv_unified")],
        ("samplers", c_void_p),
        ("n_samplers", c_size_t),
        ("ctx_other", c_void_p),
    ]


class _Batch(ctypes.Structure):
    _fields_ = [
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", POINTER(c_float)),
        ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)),
        ("seq_id", POINTER(POINTER(c_int32))),
        ("logits", POINTER(c_int8)),
    ]


_LogCallback = ctypes.CFUNCTYPE(None, c_int32, c_char_p, c_void_p)
_SIGNATURES = {  # name: (result, arguments)
    "llama_log_set": (None, [_LogCallback, c_void_p]),
    "llama_backend_init": (None, []),
    "llama_model_default_params": (_ModelParams, []),
    "llama_context_default_params": (_ContextParams, []),
    "llama_model_load_from_file": (c_void_p, [c_char_p, _ModelParams]),
    "llama_model_free": (None, [c_void_p]),
    "llama_model_get_vocab": (c_void_p, [c_void_p]),
    "llama_model_meta_val_str": (c_int32, [c_void_p, c_char_p, c_char_p, c_size_t]),
    "llama_init_from_model": (c_void_p, [c_void_p, _ContextParams]),
    "llama_free": (None, [c_void_p]),
    "llama_get_memory": (c_void_p, [c_void_p]),
    "llama_memory_clear": (None, [c_void_p, c_bool]),
    "llama_batch_init": (_Batch, [c_int32, c_int32, c_int32]),
    "llama_batch_free": (None, [_Batch]),
    "llama_decode": (c_int32, [c_void_p, _Batch]),
    "llama_get_logits_ith": (POINTER(c_float), [c_void_p, c_int32]),
    "llama_vocab_n_tokens": (c_int32, [c_void_p]),
    "llama_vocab_is_eog": (c_bool, [c_void_p, c_int32]),
    "llama_vocab_is_control": (c_bool, [c_void_p, c_int32]),
    "llama_vocab_get_add_bos": (c_bool, [c_void_p]),
    "llama_vocab_bos": (c_int32, [c_void_p]),
    "llama_tokenize": (c_int32, [c_void_p, c_char_p, c_int32, POINTER(c_int32), c_int32, c_bool, c_bool]),
    "llama_token_to_piece": (c_int32, [c_void_p, c_int32, c_char_p, c_int32, c_int32, c_bool]),
}


@cache
def _libraries() -> tuple[ctypes.CDLL, ctypes.CDLL, list[str]]:
    """(libllama, libggml-base, the log so far). Skips the test when they are absent, and fails it in CI."""
    if not FOLDER.is_dir():
        reason = f"llama.cpp's libraries are not in {FOLDER}; scripts/fetch_llama_cpp puts them there"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    base = ctypes.CDLL(str(FOLDER / "libggml-base.so"), ctypes.RTLD_GLOBAL)
    ggml = ctypes.CDLL(str(next(FOLDER.glob("libggml.v*.so"))), ctypes.RTLD_GLOBAL)
    llama = ctypes.CDLL(str(next(FOLDER.glob("libllama.v*.so"))), ctypes.RTLD_GLOBAL)
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(llama, name)
        function.restype, function.argtypes = result, arguments
    log: list[str] = []
    llama.kept_callback = _LogCallback(lambda level, text, _: log.append(text.decode(errors="replace")))
    llama.llama_log_set(llama.kept_callback, None)
    ggml.ggml_backend_load_all_from_path.argtypes = [c_char_p]
    ggml.ggml_backend_load_all_from_path(str(FOLDER).encode())  # the CPU backend is a plug-in too
    llama.llama_backend_init()
    return llama, base, log


def quantize_chunk(type_number: int, rows: Tensor) -> bytes:
    """ggml's own encoding of (rows, columns) fp32, whose columns the type's block must divide."""
    _, base, _ = _libraries()
    source = rows.to(torch.float32).contiguous()
    target = ctypes.create_string_buffer(source.numel() * 4)
    function = base.ggml_quantize_chunk
    function.restype = c_size_t
    function.argtypes = [c_int32, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p]
    size = function(type_number, source.data_ptr(), target, 0, *source.shape, None)
    return target.raw[:size]


class LlamaCpp:
    """A GGUF file opened by llama.cpp; a context manager. Arithmetic is fp32 on one thread, without flash attention."""

    def __init__(self, path: Path, *, vocab_only: bool = False, context: int = 512):
        self.llama, _, log = _libraries()
        log.clear()
        params = self.llama.llama_model_default_params()
        params.vocab_only, params.check_tensors, params.use_extra_bufts = vocab_only, True, False
        params.n_gpu_layers = 0
        self.model = self.llama.llama_model_load_from_file(str(path).encode(), params)
        if not self.model:
            raise Refused("".join(log))
        self.vocab = self.llama.llama_model_get_vocab(self.model)
        self.rows = self.llama.llama_vocab_n_tokens(self.vocab)
        self.log = "".join(log)
        self.context = None if vocab_only else self._new_context(context)

    def _new_context(self, length: int) -> int:
        params = self.llama.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = length
        params.n_threads = params.n_threads_batch = 1
        params.flash_attn_type = 0
        params.type_k = params.type_v = F32
        return self.llama.llama_init_from_model(self.model, params)

    def __enter__(self) -> "LlamaCpp":
        return self

    def __exit__(self, *_) -> None:
        if self.context:
            self.llama.llama_free(self.context)
        self.llama.llama_model_free(self.model)

    def logits(self, ids: list[int]) -> Tensor:
        """(T, V) fp32, the logits after each of `ids`, from an empty cache."""
        self.llama.llama_memory_clear(self.llama.llama_get_memory(self.context), True)
        return self._decode(ids, start=0)

    def _decode(self, ids: list[int], start: int) -> Tensor:
        batch = self.llama.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, start + i, 1, 1
            batch.seq_id[i][0] = 0
        status = self.llama.llama_decode(self.context, batch)
        self.llama.llama_batch_free(batch)
        assert status == 0, f"llama_decode: {status}"
        rows = [self.llama.llama_get_logits_ith(self.context, i)[: self.rows] for i in range(len(ids))]
        return torch.tensor(rows)

    def generate(self, ids: list[int], max_tokens: int) -> list[int]:
        """The greedy continuation of `ids`, up to and without an end-of-generation token."""
        logits = self.logits(ids)
        answer: list[int] = []
        while len(answer) < max_tokens:
            token = int(logits[-1].argmax())
            if self.is_eog(token):
                break
            answer.append(token)
            logits = self._decode([token], start=len(ids) + len(answer) - 1)
        return answer

    def tokenize(self, text: str, *, add_special: bool = False, parse_special: bool = False) -> list[int]:
        data = text.encode()
        room = len(data) + 16
        ids = (c_int32 * room)()
        count = self.llama.llama_tokenize(self.vocab, data, len(data), ids, room, add_special, parse_special)
        assert count >= 0, f"{-count} tokens for {len(data)} bytes"
        return list(ids[:count])

    def piece(self, token: int) -> bytes:
        room = ctypes.create_string_buffer(256)
        size = self.llama.llama_token_to_piece(self.vocab, token, room, len(room), 0, True)
        assert size >= 0
        return room.raw[:size]

    def is_eog(self, token: int) -> bool:
        """Whether generation ends at this token."""
        return self.llama.llama_vocab_is_eog(self.vocab, token)

    def is_control(self, token: int) -> bool:
        return self.llama.llama_vocab_is_control(self.vocab, token)

    def adds_bos(self) -> bool:
        return self.llama.llama_vocab_get_add_bos(self.vocab)

    def bos(self) -> int:
        return self.llama.llama_vocab_bos(self.vocab)

    def metadata(self, key: str) -> str | None:
        """A scalar metadata value as llama.cpp prints it, or None when the file has no such key."""
        room = ctypes.create_string_buffer(1 << 16)
        size = self.llama.llama_model_meta_val_str(self.model, key.encode(), room, len(room))
        return None if size < 0 else room.raw[:size].decode()
