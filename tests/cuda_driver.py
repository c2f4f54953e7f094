"""A library in the place of CUDA's driver, and the environment of a process that compiles kernels beside it.

Triton's launchers in C are linked with it and loaded; nothing of it is ever called.
"""

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FUNCTIONS = ("CtxGetCurrent", "CtxSetCurrent", "DeviceGet", "DevicePrimaryCtxRetain", "FuncSetAttribute")
FUNCTIONS += ("GetErrorString", "PointerGetAttribute")


def compiling_environment(folder: Path) -> dict[str, str]:
    """Writes the library into `folder`; kernels are compiled, not interpreted, into `folder / "cache"`."""
    source = folder / "driver.c"
    source.write_text("".join(f"int cu{name}(void) {{ return 0; }}\n" for name in FUNCTIONS))
    library = folder / "libcuda.so.1"
    subprocess.run(["cc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", library, source], check=True)
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = {name: str(folder) for name in ("TRITON_LIBCUDA_PATH", "LD_LIBRARY_PATH")}
    return kept | paths | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TRITON_CACHE_DIR": str(folder / "cache")}
