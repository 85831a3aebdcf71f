"""The GPU that is none: its library compiles, refusals say what is wrong, and stand-ins compute what kernels would."""

from __future__ import annotations

import ctypes
import doctest
import importlib.metadata
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

TOOLS = Path(__file__).parent.parent.parent / "tools"
sys.path.insert(0, str(TOOLS))

from null_gpu import check, engine_kernels, kernels, run  # noqa: E402

SUCCESS, OUT_OF_MEMORY, CAPTURE_UNSUPPORTED, CAPTURE_INVALIDATED, NCCL_INVALID_USAGE = 0, 2, 900, 901, 5
GLOBAL = 0  # capture mode
LENGTHS = ((3, 5), (4, 4), (1, 6))


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """driver.c, compiled without a warning."""
    if shutil.which("gcc") is None:
        pytest.skip("needs gcc")
    if not all(map(Path.is_dir, run.include_folders())):
        pytest.skip("needs the headers of NVIDIA's wheels, which torch's build for CUDA 13 brings")
    folder = tmp_path_factory.mktemp("null_gpu")
    run.compile_driver(folder, [run.DRIVER], folder / "library.so", "-Werror")
    return ctypes.CDLL(str(folder / "library.so"))


def test_memory_runs_out_as_on_a_device(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NULL_GPU_GIB", "2")
    first, second = ctypes.c_void_p(), ctypes.c_void_p()
    unused, total = ctypes.c_size_t(), ctypes.c_size_t()
    assert library.cudaMalloc(ctypes.byref(first), ctypes.c_size_t(2**30 + 1)) == SUCCESS
    assert library.cudaMalloc(ctypes.byref(second), ctypes.c_size_t(2**30)) == OUT_OF_MEMORY and not second
    assert library.cudaMemGetInfo(ctypes.byref(unused), ctypes.byref(total)) == SUCCESS
    assert (unused.value, total.value) == (2**30 - 512, 2**31)
    assert [library.cudaGetLastError(), library.cudaGetLastError()] == [OUT_OF_MEMORY, SUCCESS]
    library.cudaFree(first)
    assert library.cudaMalloc(ctypes.byref(second), ctypes.c_size_t(2**31)) == SUCCESS
    library.cudaFree(second)


@pytest.mark.parametrize("wait", ["cudaStreamSynchronize", "cudaEventSynchronize", "cudaDeviceSynchronize"])
def test_a_wait_of_the_host_breaks_a_capture(library: ctypes.CDLL, wait: str) -> None:
    stream, graph = ctypes.c_void_p(), ctypes.c_void_p()
    library.cudaStreamCreate(ctypes.byref(stream))
    for breaks in (True, False):
        assert library.cudaStreamBeginCapture(stream, GLOBAL) == SUCCESS
        if breaks:
            assert getattr(library, wait)(stream) == CAPTURE_UNSUPPORTED
        assert library.cudaStreamEndCapture(stream, ctypes.byref(graph)) == (CAPTURE_INVALIDATED if breaks else SUCCESS)
    assert getattr(library, wait)(stream) == SUCCESS


@pytest.mark.parametrize(
    ("grid", "block", "error"),
    [((2**31 - 1, 65535, 1), (1024, 1, 1), 0), ((0, 1, 1), (32, 1, 1), 9), ((1, 65536, 1), (32, 1, 1), 9),
     ((1, 1, 1), (1024, 2, 1), 9)],
)  # fmt: skip
def test_impossible_grids_are_errors(library: ctypes.CDLL, grid: Any, block: Any, error: int) -> None:
    library.cudaGetLastError()
    assert library.cuLaunchKernel(None, *grid, *block, 0, None, None, None) == error
    assert library.cudaGetLastError() == error


def test_groups_of_more_than_one_rank_are_refused(library: ctypes.CDLL) -> None:
    class UniqueId(ctypes.Structure):
        _fields_ = (("internal", ctypes.c_char * 128),)

    comm = ctypes.c_void_p()
    assert library.ncclCommInitRank(ctypes.byref(comm), 1, UniqueId(), 0) == SUCCESS
    assert library.ncclCommInitRank(ctypes.byref(comm), 2, UniqueId(), 0) == NCCL_INVALID_USAGE


@pytest.mark.skipif("+cpu" not in torch.__version__, reason="needs torch's build for the CPU")
def test_a_build_of_torch_without_cuda_is_refused(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.touch()
    done = subprocess.run(
        [sys.executable, str(TOOLS / "null_gpu" / "run.py"), str(script)], text=True, capture_output=True
    )
    assert done.returncode == 1
    assert f"torch {importlib.metadata.version('torch')} is a build without CUDA: make null-gpu" in done.stderr


def test_a_machine_that_lacks_something_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "has an NVIDIA driver: run the command by itself" in run.why_not([Path("/")])
    for program, package in (("gcc", "gcc"), ("nm", "binutils")):
        monkeypatch.setattr(shutil, "which", lambda name, missing=program: None if name == missing else name)
        assert run.why_not([]) == f"{program} is not installed: install {package}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "SCRIPT is missing"),
        (["nowhere.py"], "nowhere.py is no file: allowed is a Python script"),
        (["--gib", "0", __file__], "--gib 0.0: must be above 0"),
        (["--interpret", __file__], "--interpret needs --compute"),
    ],
)
def test_odd_arguments_are_refused(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
    with pytest.raises(SystemExit):
        run.main()
    assert message in capsys.readouterr().err


def _packed() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """query, key, value [T, H, D] that need gradients, and ends of the sequences; five rows more are in no sequence."""
    generator = torch.Generator().manual_seed(0)
    ends = [torch.tensor((0, *lengths)).cumsum(0).int() for lengths in zip(*LENGTHS, strict=True)]
    rows = [int(ends[0][-1]) + 5, int(ends[1][-1]) + 5, int(ends[1][-1]) + 5]
    return [torch.randn(n, 2, 8, generator=generator, requires_grad=True) for n in rows], ends


def _plain(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, causal: str) -> torch.Tensor:
    """Softmax attention of one sequence by torch, [Q, H, D]."""
    mask = None
    if causal:
        queries, keys = len(query), len(key)
        offset = keys - queries if causal == "bottom_right" else 0
        mask = torch.tensor([[column <= row + offset for column in range(keys)] for row in range(queries)])
    heads = (x.transpose(0, 1) for x in (query, key, value))
    return F.scaled_dot_product_attention(*heads, attn_mask=mask).transpose(0, 1)


@pytest.mark.parametrize("causal", ["", "top_left", "bottom_right"])
def test_attention_is_softmax_attention_of_each_sequence(causal: str) -> None:
    (query, key, value), (ends_q, ends_k) = _packed()
    pieces = kernels.pieces_of(ends_q, ends_k)
    assert [(rows.stop - rows.start, keys.stop - keys.start) for rows, keys in pieces] == list(LENGTHS)
    expected = torch.cat([_plain(query[rows], key[keys], value[keys], causal) for rows, keys in pieces])
    output, _ = kernels.attention(query.detach(), key.detach(), value.detach(), pieces, causal, 8**-0.5)
    torch.testing.assert_close(output[: len(expected)], expected.detach())
    assert output[len(expected) :].isnan().all()
    grad_output = torch.randn_like(output)
    expected_gradients = torch.autograd.grad(expected, (query, key, value), grad_output[: len(expected)])
    gradients = kernels.attention_backward(
        grad_output, query.detach(), key.detach(), value.detach(), pieces, causal, 8**-0.5
    )
    torch.testing.assert_close(gradients, expected_gradients)


def test_varlen_attention_takes_the_window_for_the_rule() -> None:
    (query, key, value), (ends_q, ends_k) = _packed()
    output, *_ = kernels._varlen_attention(query, key, value, ends_q, ends_k, 4, 6, window_size=[-1, 0])
    first = _plain(query[:3], key[:5], value[:5], "bottom_right")
    torch.testing.assert_close(output[:3], first)
    with pytest.raises(NotImplementedError, match=r"window_size \(2, 0\)"):
        kernels._varlen_attention(query, key, value, ends_q, ends_k, 4, 6, window_size=[2, 0])


@pytest.mark.parametrize("module", [kernels, engine_kernels])
def test_worked_examples_hold(module: Any) -> None:
    failed, tried = doctest.testmod(module)
    assert tried and not failed


def test_products_in_bfloat16_are_summed_in_float32() -> None:
    a, b = torch.full((1, 4096), 1.0).bfloat16(), torch.full((4096, 1), 1.001).bfloat16()
    total = kernels._OWN["aten::addmm.dtype_out"](torch.ones(1, 1), a, b, torch.float32, out=torch.empty(1, 1))
    assert total.item() == 1 + 4096 * b[0].item()


@pytest.mark.parametrize(("dtype", "step"), [(torch.float8_e4m3fn, 1 / 8), (torch.float8_e5m2, 1 / 4)])
def test_rounding_to_float8(dtype: torch.dtype, step: float) -> None:
    top = torch.finfo(dtype).max
    values = torch.tensor([0.0, 1.0, 1 + 0.4 * step, 1 + 0.6 * step, -1 - 0.6 * step, 1 + step / 2, 1e6, -1e6])
    expected = torch.tensor([0.0, 1.0, 1.0, 1 + step, -1 - step, 1.0, top, -top])  # halves to the even number
    rounded = engine_kernels.round_to_float8(values / 4, torch.tensor(4.0), dtype)
    assert rounded.dtype == torch.uint8 and torch.equal(rounded.view(dtype).float(), expected)


def _result(losses: list[float], part: str) -> dict[str, Any]:
    calls = dict.fromkeys(check.PARTS[part].calls, 1)
    return {"losses": losses, "calls": calls, "compiled": 0, "output": ""}


def test_a_part_fails_when_losses_differ_or_the_engine_was_not_called() -> None:
    results = {"cpu": {"losses": [2.0, 1.0]}, "te": _result([2.0, 1.009], "te")}
    assert check.judge("te", results)[0]
    assert not check.judge("te", {**results, "te": _result([2.0, 1.011], "te")})[0]
    assert not check.judge("te", {**results, "te": _result([2.0, float("nan")], "te")})[0]
    without = {**results["te"], "calls": {"generic_gemm": 1}}
    good, measured = check.judge("te", {**results, "te": without})
    assert not good and "fused_attn_fwd" in measured
    plain = {"fusion-none": {"compiled": 3}, "fusion-norms": {**_result([1.0], "fusion-norms"), "compiled": 3}}
    assert not check.judge("fusion-norms", plain)[0]
    plain["fusion-norms"]["compiled"] = 4
    assert check.judge("fusion-norms", plain)[0]
    assert check.judge("graph", {"graph": {**_result([1.0], "graph"), "output": "CUDA graph 1 of 8"}})[0]
    assert not check.judge("graph", {"graph": _result([1.0], "graph")})[0]
    again = "CUDA graph 1 of 8\nCUDA graphs have given up 1 GiB\n"
    assert not check.judge("graph-again", {"graph-again": {**_result([1.0], "graph-again"), "output": again}})[0]
    again += "CUDA graph 1 of 8"
    assert check.judge("graph-again", {"graph-again": {**_result([1.0], "graph-again"), "output": again}})[0]
