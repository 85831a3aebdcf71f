#!/usr/bin/env python3
"""Run a Python script with torch's CUDA build on a machine without a GPU, on fake devices with memory but no kernels.

    python -m tests.null_gpu.run SCRIPT ...            kernels do nothing; code paths, compilers, peak memory are real
    python -m tests.null_gpu.run --compute SCRIPT ...  the CPU computes the kernels; numbers are real too
    python -m tests.null_gpu.run --gib 40 SCRIPT ...   on a device of 40 GiB (default: an H100's 79.1)
    torchrun --nproc-per-node 2 -m tests.null_gpu.run --devices 2 SCRIPT ...    a rank on each of two devices

driver.c and nccl.c replace the CUDA runtime and driver, cuBLAS, cuDNN and NCCL through LD_PRELOAD. Python, torch, its
caching allocator, Transformer Engine, Triton and Inductor are the installed ones; Triton and Inductor compile for an
H100. With --compute Triton's kernels run in Triton's interpreter and nothing is compiled; the head's cross entropy is
too slow there and runs in torch unless --interpret is given. Processes that the script starts see the devices, but the
CPU does not compute for them.

Needs the CUDA 13 build of torch with its wheels of NVIDIA's libraries, gcc and nm. The library is built on first use.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.metadata
import importlib.util
import os
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCES = (HERE / "driver.c", HERE / "nccl.c")
_HEADER = HERE / "queue.h"
# Files that exist if a real driver is loaded.
REAL_DRIVER = (Path("/dev/nvidiactl"), Path("/proc/driver/nvidia/version"))
# Set in a process that was started with the library.
_READY = "NULL_GPU_FOLDER"
_WANTED = re.compile(r"(?!cuFile)(__cuda|cuda[A-Z]|cu[A-Z]|cublas|cudnn|nccl|cusolver|cusparse)\w*")
# Symbols in the headers; Triton's and Inductor's launchers link against them.
_DECLARED = re.compile(r"(?:CUresult CUDAAPI|cudaError_t CUDARTAPI) (cu\w+)\(")
# NVIDIA's wheels lack the compiler's own headers; C code needs only these names from them.
_COMPILER_HEADERS = {
    "crt/host_config.h": "",
    "crt/host_defines.h": """\
#define __host__
#define __device__
#define CUDARTAPI
#define CUDART_CB
#define __cudart_builtin__
#define __device_builtin__
#define __device_builtin_texture_type__
#define __device_builtin_surface_type__
#define __align__(n) __attribute__((aligned(n)))
#define __builtin_align__(n) __align__(n)
""",
    "nv/target": "",
}


def why_not(real_driver: Iterable[Path] = REAL_DRIVER) -> str:
    """Why the null GPU cannot run on this machine, with the remedy; "" if it can."""
    if any(path.exists() for path in real_driver):
        return "this machine has an NVIDIA driver: run the command without null_gpu, or in a container without --gpus"
    for program, package in (("gcc", "gcc"), ("nm", "binutils")):
        if shutil.which(program) is None:
            return f"{program} is not installed: install {package}"
    if importlib.util.find_spec("torch") is None:
        return f"torch is not installed for {sys.executable}. Run make null-gpu, which creates an environment with it"
    if not (_packages() / "torch" / "lib" / "libtorch_cuda.so").exists():
        version = importlib.metadata.version("torch")
        return f"torch {version} is a build without CUDA. Run make null-gpu, which installs a CUDA build"
    if missing := [str(folder) for folder in include_folders() if not folder.is_dir()]:
        return f"headers are missing, {', '.join(missing)}: they come with torch's build for CUDA 13"
    return ""


def _packages() -> Path:
    """The folder of the installed packages."""
    found = importlib.util.find_spec("torch")
    assert found is not None and found.origin is not None
    return Path(found.origin).parent.parent


def include_folders() -> list[Path]:
    """Folders of headers in NVIDIA's wheels."""
    return [_packages() / "nvidia" / name / "include" for name in ("cu13", "cudnn", "nccl")]


def compile_library(folder: Path, sources: Iterable[Path], output: Path, *flags: str) -> None:
    """Compile ``sources`` into the shared library ``output``; the missing headers are written to ``folder``.

    Raises:
        SystemExit: gcc fails; with its message.
    """
    for name, text in _COMPILER_HEADERS.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    headers = [f"-I{path}" for path in (folder, *include_folders())]
    # The dynamic loader reuses a loaded libcuda.so.1 by its name. Calls within the library stay within it.
    command = ["gcc", "-O1", "-Wall", "-shared", "-fPIC", *flags, *headers, *map(str, sources), "-o", str(output)]
    done = subprocess.run(
        [*command, "-Wl,-soname,libcuda.so.1,-Bsymbolic", "-ldl", "-lpthread"], text=True, capture_output=True
    )
    if done.returncode:
        raise SystemExit(
            f"null_gpu: the files in {HERE} do not compile with the headers of {_packages() / 'nvidia'}:\n{done.stderr}"
        )


def _symbols(library: Path, kind: str) -> set[str]:
    done = subprocess.run(["nm", "-D", kind, str(library)], text=True, capture_output=True, check=True)
    return {line.split()[-1].split("@")[0] for line in done.stdout.splitlines()}


def _libraries() -> list[Path]:
    """Installed libraries that call CUDA's."""
    packages = _packages()
    names = ("c10_cuda", "torch_cuda", "torch_cuda_linalg", "torch_python", "caffe2_nvrtc")
    engine = (*packages.glob("transformer_engine*.so"), *packages.glob("transformer_engine*/**/*.so"))
    return [packages / "torch" / "lib" / f"lib{name}.so" for name in names] + sorted(engine)


def build() -> Path:
    """The folder with libcuda.so.1 for the installed libraries; builds it on first use."""
    libraries = _libraries()
    key = hashlib.sha256()
    for file in (*SOURCES, _HEADER, Path(__file__)):
        key.update(file.read_bytes())
    for library in libraries:
        key.update(f"{library} {library.stat().st_size} {library.stat().st_mtime_ns}".encode())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "genlip-null-gpu"
    folder = cache / key.hexdigest()[:16]
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as name:
        work, made = Path(name), Path(name) / "made"
        made.mkdir()
        compile_library(work, SOURCES, work / "driver.so")
        wanted = {symbol for library in libraries for symbol in _symbols(library, "--undefined-only")}
        for header in ("cuda.h", "cuda_runtime_api.h"):
            wanted.update(_DECLARED.findall((include_folders()[0] / header).read_text()))
        missing = {symbol for symbol in wanted if _WANTED.fullmatch(symbol)} - _symbols(
            work / "driver.so", "--defined-only"
        )
        rest = "".join(f'int {name}(void) {{ return null_gpu_generated("{name}"); }}\n' for name in sorted(missing))
        (work / "rest.c").write_text("int null_gpu_generated(const char *name);\n" + rest)
        compile_library(work, [*SOURCES, work / "rest.c"], made / "libcuda.so.1")
        (made / "libcuda.so").symlink_to("libcuda.so.1")
        try:
            made.rename(folder)
        except OSError:  # another process was faster
            if not folder.is_dir():
                raise
    return folder


def environment(folder: Path, compute: bool, gib: float, devices: int) -> dict[str, str]:
    """The environment of a process that uses the library in ``folder`` as its GPU driver."""
    paths = [str(folder), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
    result = {
        **os.environ,
        "LD_PRELOAD": str(folder / "libcuda.so.1"),
        "LD_LIBRARY_PATH": ":".join(paths),
        "TRITON_LIBCUDA_PATH": str(folder),
        "NVTE_DISABLE_NVRTC": "1",  # NVRTC would inspect the compiled kernels
        "NULL_GPU_GIB": str(gib),
        "NULL_GPU_DEVICES": str(devices),
        _READY: str(folder),
    }
    if compute:
        result |= {"NULL_GPU_COMPUTE": "1", "TORCHDYNAMO_DISABLE": "1", "TRITON_INTERPRET": "1"}
    return result


def run_script(command: list[str], compute: bool, interpret: bool) -> None:
    """Run a script with its arguments, in a process started with ``environment``."""
    sys.argv = command
    from tests.null_gpu import engine_kernels, kernels

    if importlib.util.find_spec("transformer_engine") is not None:
        engine_kernels.install(compute)
    with kernels.computing(interpret) if compute else contextlib.nullcontext():
        runpy.run_path(command[0], run_name="__main__")


def main() -> None:
    """Build the library, then replace this process with one that runs the script."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--compute", action="store_true", help="compute the kernels on the CPU")
    parser.add_argument("--interpret", action="store_true", help="with --compute: the head's Triton kernels too; slow")
    parser.add_argument("--gib", type=float, default=79.1, help="memory of the device in GiB (default: 79.1)")
    parser.add_argument("--devices", type=int, default=1, help="number of devices, at most 64 (default: 1)")
    parser.add_argument(
        "command", nargs=argparse.REMAINDER, metavar="SCRIPT ...", help="Python script and its arguments"
    )
    options = parser.parse_args()
    if not options.command:
        parser.error("SCRIPT is missing: name a Python script, followed by its arguments")
    if not Path(options.command[0]).is_file():
        parser.error(f"{options.command[0]} is not a file: name a Python script, followed by its arguments")
    if os.environ.pop(_READY, None):
        run_script(options.command, options.compute, options.interpret)
        return
    if options.gib <= 0:
        parser.error(f"--gib {options.gib}: must be above 0")
    if not 1 <= options.devices <= 64:
        parser.error(f"--devices {options.devices}: must be from 1 to 64")
    if options.interpret and not options.compute:
        parser.error("--interpret needs --compute")
    if reason := why_not():
        raise SystemExit(f"null_gpu: {reason}")
    ready = environment(build(), options.compute, options.gib, options.devices)
    # As Python does for a script: its folder comes first.
    folders = [str(Path(options.command[0]).resolve().parent), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]
    ready["PYTHONPATH"] = os.pathsep.join(filter(None, folders))
    os.execve(sys.executable, [sys.executable, "-m", "tests.null_gpu.run", *sys.argv[1:]], ready)


if __name__ == "__main__":
    main()
