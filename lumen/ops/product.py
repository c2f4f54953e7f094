"""Products of large matrices, y = x w and y += x w: on an H100 or H200 by a kernel of cuBLASLt that PyTorch passes by.

Asked for a product of 16-bit matrices, cuBLAS (13.0) answers with tiles of 192 × 192 or 320 × 128 where there are many
rows and columns: by itself that is the fastest kernel. In a training step the chip is at its power limit, and what
counts is what a kernel does with a joule: there tiles of 256 × 128 do 2 to 4 % more, or of 176 × 128, for the outputs
of a wide weight. So the library is asked for all that it would take, and the first with such tiles is run. It adds up
in fp32 and rounds as PyTorch's products do: once, and once more where the product is added to what is there. Every
other product is PyTorch's, and so are these where `ops.use` forces another implementation.

The library is the one that PyTorch has loaded; its interface for C is called through ctypes (NVIDIA cuBLAS Library,
"Using the cuBLASLt API"), which sees matrices by columns: y (M, N) by rows is yᵀ = wᵀ xᵀ by columns.
"""

import ctypes
import operator
from ctypes import c_float, c_int, c_int64, c_size_t, c_uint32, c_uint64, c_void_p
from functools import lru_cache

import torch
from torch import Tensor

from lumen.errors import KernelError
from lumen.ops._choose import choice, forced
from lumen.ops._triton import processors

TILE_256x128, TILE_176x128 = 24, 201  # cublasLtMatmulTile_t
WIDE = 4096  # outputs; measured on an H200 with the weights of Llama 3.1 8B
WAVES = 4  # tiles for each multiprocessor: of fewer, the last wave is much of the time
KINDS = {torch.bfloat16: 14, torch.float16: 2}  # cudaDataType_t
FLOAT32, SUMS_IN_FLOAT32 = 0, 68  # cudaDataType_t; cublasComputeType_t
TRANSPOSE_A = 3  # cublasLtMatmulDescAttributes_t
MOST_WORKSPACE = 1  # cublasLtMatmulPreferenceAttributes_t
TILE, SHARES = 1, 2  # cublasLtMatmulAlgoConfigAttributes_t; shares of a sum, rounded one by one, that are added up
ALIGNED = 256  # bytes: what the library takes for granted of a matrix
ANSWERS = 16  # kernels that it is asked for
WORKSPACE = 1024  # bytes: kernels that deal out their tiles as they go count them there

_workspaces: dict[tuple[torch.device, int], Tensor] = {}


class _Algorithm(ctypes.Structure):
    """cublasLtMatmulAlgo_t"""

    _fields_ = (("data", c_uint64 * 8),)


class _Answer(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t"""

    _fields_ = (
        ("algorithm", _Algorithm),
        ("workspace", c_size_t),
        ("state", c_int),
        ("waves", c_float),
        ("reserved", c_int * 4),
    )


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL | None:
    """cuBLASLt of a version whose numbers are those above; None where it is not found."""
    major = (torch.version.cuda or "").partition(".")[0]
    if major not in ("12", "13"):
        return None
    try:
        return ctypes.CDLL(f"libcublasLt.so.{major}")
    except OSError:  # on Windows, or linked into PyTorch
        return None


@lru_cache(maxsize=8)
def _handle(device: int) -> c_void_p | None:
    """The library's state for one GPU; None where it cannot serve."""
    handle = c_void_p()
    if torch.cuda.get_device_capability(device) != (9, 0) or _library() is None:
        return None
    with torch.cuda.device(device):
        return None if _library().cublasLtCreate(ctypes.byref(handle)) else handle


class _Kernel:
    """The kernel for one shape of product.

    sizes    rows of x, outputs, inputs
    turned   w (in, out) lies by columns: it is a weight (out, in), transposed
    strides  of the rows of x, of the rows of w, or its columns, and of the rows of y; in values
    """

    def __init__(self, device: int, dtype: torch.dtype, sizes: tuple[int, ...], turned: bool, strides: tuple[int, ...]):
        self.made: list[tuple[str, c_void_p]] = []
        (rows, outputs, inputs), kind = sizes, KINDS[dtype]
        self.cublas, self.handle = _library(), _handle(device)
        self.how = self._make("MatmulDesc", SUMS_IN_FLOAT32, FLOAT32)
        self._set("MatmulDesc", self.how, TRANSPOSE_A, c_int(turned))
        shapes = ((inputs, rows), (inputs, outputs) if turned else (outputs, inputs), (outputs, rows))
        self.x, self.w, self.y = (
            self._make("MatrixLayout", kind, c_uint64(height), c_uint64(width), c_int64(stride))
            for (height, width), stride in zip(shapes, strides, strict=True)
        )
        self.algorithm = self._find((TILE_176x128, TILE_256x128) if turned and outputs > WIDE else (TILE_256x128,))

    def _make(self, what: str, *arguments) -> c_void_p:
        made = c_void_p()
        _check(getattr(self.cublas, f"cublasLt{what}Create")(ctypes.byref(made), *arguments))
        self.made.append((what, made))
        return made

    def _set(self, what: str, made: c_void_p, attribute: int, value: c_int | c_size_t) -> None:
        set_attribute = getattr(self.cublas, f"cublasLt{what}SetAttribute")
        _check(set_attribute(made, attribute, ctypes.byref(value), c_size_t(ctypes.sizeof(value))))

    def _find(self, tiles: tuple[int, ...]) -> _Algorithm | None:
        """The library's first answer with the first of these tiles that it has at all."""
        limits = self._make("MatmulPreference")
        self._set("MatmulPreference", limits, MOST_WORKSPACE, c_size_t(WORKSPACE))
        answers, count = (_Answer * ANSWERS)(), c_int()
        # where this fails, the library has no kernel: count stays 0
        self.cublas.cublasLtMatmulAlgoGetHeuristic(
            self.handle, self.how, self.w, self.x, self.y, self.y, limits, ANSWERS, answers, ctypes.byref(count)
        )
        found: dict[int, _Algorithm] = {}
        for answer in answers[: count.value]:
            if not answer.state and self._number(answer, SHARES) <= 1:
                found.setdefault(self._number(answer, TILE), _Algorithm.from_buffer_copy(answer.algorithm))
        return next((found[tile] for tile in tiles if tile in found), None)

    def _number(self, answer: _Answer, attribute: int) -> int:
        number, size = c_uint32(), c_size_t()
        self.cublas.cublasLtMatmulAlgoConfigGetAttribute(
            ctypes.byref(answer.algorithm), attribute, ctypes.byref(number), c_size_t(4), ctypes.byref(size)
        )
        return number.value

    def __call__(self, x: Tensor, w: Tensor, y: Tensor, add: bool) -> Tensor:
        at_y, of_y = c_void_p(y.data_ptr()), ctypes.byref(c_float(add))
        stream = torch.cuda.current_stream(y.device).cuda_stream
        workspace = c_void_p(_workspace(y.device, stream).data_ptr())
        _check(
            self.cublas.cublasLtMatmul(
                self.handle, self.how, ctypes.byref(c_float(1)), c_void_p(w.data_ptr()), self.w,
                c_void_p(x.data_ptr()), self.x, of_y, at_y, self.y, at_y, self.y,
                ctypes.byref(self.algorithm), workspace, c_size_t(WORKSPACE), c_void_p(stream),
            )
        )  # fmt: skip
        return y

    def __del__(self) -> None:
        for what, made in self.made:
            getattr(self.cublas, f"cublasLt{what}Destroy")(made)


def _workspace(device: torch.device, stream: int) -> Tensor:
    """Of each stream its own: two may run a product at the same time. It stays: a captured graph may write there."""
    if (device, stream) not in _workspaces:
        _workspaces[device, stream] = torch.empty(WORKSPACE, dtype=torch.uint8, device=device)
    return _workspaces[device, stream]


def _check(status: int) -> None:
    if status:
        raise KernelError(f'cuBLASLt failed with status {status}. `ops.use("reference", "product")` does without it.')


_kernel = lru_cache(maxsize=1024)(_Kernel)  # a few hundred bytes each


def _large(x: Tensor, w: Tensor, y: Tensor) -> _Kernel | None:
    """The kernel for y (+)= x w; None where PyTorch's serves, and for what PyTorch refuses."""
    (rows, inputs), outputs, device = x.shape, w.shape[1], x.get_device()
    if x.dtype not in KINDS or not x.dtype == w.dtype == y.dtype or not x.device == w.device == y.device:
        return None
    if x.is_meta:  # on its way to a kernel's compiler (`ops/ahead.py`): there is no GPU to ask
        return None
    if inputs != w.shape[0] or y.shape != (rows, outputs) or outputs < 256:
        return None
    tiles = -(-rows // 128) * -(-outputs // 256)
    if tiles < WAVES * processors(x.device) or device != torch.cuda.current_device() or _handle(device) is None:
        return None
    turned = w.stride(0) == 1
    strides = (x.stride(0), w.stride(1 if turned else 0), y.stride(0))
    by_rows = x.stride(1) == y.stride(1) == 1 and 1 in w.stride()
    apart = all(map(operator.ge, strides, (inputs, inputs if turned else outputs, outputs)))  # no row within another
    if not by_rows or not apart or any(t.data_ptr() % ALIGNED for t in (x, w, y)):
        return None
    found = _kernel(device, x.dtype, (rows, outputs, inputs), turned, strides)
    if found.algorithm is None or forced("product") not in (None, "cublaslt"):
        return None
    choice("product", {"cublaslt": "its tiles of 256 × 128 or 176 × 128 do most at the power limit"})
    return found


def product(x: Tensor, w: Tensor) -> Tensor:
    """x w (N, out), for x (N, in) and w (in, out), which may be a weight (out, in) transposed."""
    if not x.is_cuda:
        return x @ w
    y = x.new_empty(len(x), w.shape[1])
    kernel = _large(x, w, y)
    return torch.mm(x, w, out=y) if kernel is None else kernel(x, w, y, False)


def add_product(y: Tensor, x: Tensor, w: Tensor) -> Tensor:
    """y + x w, in place; shapes as in `product`."""
    kernel = _large(x, w, y) if x.is_cuda else None
    return y.addmm_(x, w) if kernel is None else kernel(x, w, y, True)
