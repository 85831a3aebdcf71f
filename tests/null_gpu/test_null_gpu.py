"""The null GPU: its library compiles, its errors are clear, and its replacements compute the kernels' results."""

from __future__ import annotations

import ctypes
import doctest
import importlib.metadata
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.null_gpu import check, engine_kernels, kernels, run

ROOT = Path(__file__).parents[2]

SUCCESS, OUT_OF_MEMORY, INVALID_DEVICE, NOT_READY = 0, 2, 101, 600
CAPTURE_UNSUPPORTED, CAPTURE_INVALIDATED = 900, 901
GLOBAL = 0  # capture mode
NCCL_INVALID_USAGE = 5
SUM, MAX, AVERAGE = 0, 2, 4
NCCL_TYPES = {torch.int64: 4, torch.float16: 6, torch.float32: 7, torch.bfloat16: 9}
LENGTHS = ((3, 5), (4, 4), (1, 6))


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """driver.c and nccl.c, compiled without warnings."""
    if shutil.which("gcc") is None:
        pytest.skip("needs gcc")
    if not all(map(Path.is_dir, run.include_folders())):
        pytest.skip("needs the headers of NVIDIA's wheels, which come with torch's build for CUDA 13")
    folder = tmp_path_factory.mktemp("null_gpu")
    run.compile_library(folder, run.SOURCES, folder / "library.so", "-Werror")
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


class AllocationProperties(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int), ("handles", ctypes.c_int), ("place", ctypes.c_int), ("device", ctypes.c_int),
                ("rest", ctypes.c_char * 64))  # fmt: skip


def test_reserved_addresses_use_no_memory_until_mapped(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NULL_GPU_GIB", "1")
    begin, size = ctypes.c_void_p(), ctypes.c_size_t(2**30)
    unused, total = ctypes.c_size_t(), ctypes.c_size_t()
    place, handles = AllocationProperties(), [ctypes.c_void_p() for _ in range(3)]

    def free() -> int:
        library.cudaMemGetInfo(ctypes.byref(unused), ctypes.byref(total))
        return unused.value

    def create(handle: ctypes.c_void_p) -> int:
        made: int = library.cuMemCreate(ctypes.byref(handle), ctypes.c_size_t(2**29), ctypes.byref(place), zero)
        return made

    zero = ctypes.c_size_t(0)
    assert library.cuMemAddressReserve(ctypes.byref(begin), size, zero, None, zero) == SUCCESS and free() == 2**30
    assert begin.value is not None
    assert [create(handle) for handle in handles] == [SUCCESS, SUCCESS, OUT_OF_MEMORY] and free() == 0
    pieces = [ctypes.c_void_p(begin.value + first) for first in (0, 2**29)]
    for piece, handle in zip(pieces, handles, strict=False):
        assert library.cuMemMap(piece, ctypes.c_size_t(2**29), zero, handle, zero) == SUCCESS
    ctypes.memset(begin.value + 2**29 - 4, 7, 8)
    for piece, handle in zip(pieces, handles, strict=False):
        assert library.cuMemUnmap(piece, ctypes.c_size_t(2**29)) == SUCCESS
        assert library.cuMemRelease(handle) == SUCCESS
    assert free() == 2**30 and create(handles[0]) == SUCCESS
    assert library.cuMemMap(pieces[0], ctypes.c_size_t(2**29), zero, handles[0], zero) == SUCCESS
    assert ctypes.string_at(begin.value + 2**29 - 4, 4) == bytes(4), "the old content must be gone"
    assert library.cuMemRelease(handles[0]) == SUCCESS
    assert library.cuMemAddressFree(begin, size) == SUCCESS and free() == 2**30


@pytest.mark.parametrize("wait", ["cudaStreamSynchronize", "cudaEventSynchronize", "cudaDeviceSynchronize"])
def test_a_wait_of_the_host_breaks_a_capture(library: ctypes.CDLL, wait: str) -> None:
    stream, event, graph = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_void_p()
    library.cudaStreamCreate(ctypes.byref(stream))
    library.cudaEventCreate(ctypes.byref(event))
    waited_for = event if "Event" in wait else stream
    for breaks in (True, False):
        assert library.cudaStreamBeginCapture(stream, GLOBAL) == SUCCESS
        if breaks:
            assert getattr(library, wait)(waited_for) == CAPTURE_UNSUPPORTED
        assert library.cudaStreamEndCapture(stream, ctypes.byref(graph)) == (CAPTURE_INVALIDATED if breaks else SUCCESS)
    assert getattr(library, wait)(waited_for) == SUCCESS


@pytest.mark.parametrize(
    ("grid", "block", "error"),
    [((2**31 - 1, 65535, 1), (1024, 1, 1), 0), ((0, 1, 1), (32, 1, 1), 9), ((1, 65536, 1), (32, 1, 1), 9),
     ((1, 1, 1), (1024, 2, 1), 9)],
)  # fmt: skip
def test_impossible_grids_are_errors(library: ctypes.CDLL, grid: Any, block: Any, error: int) -> None:
    library.cudaGetLastError()
    assert library.cuLaunchKernel(None, *grid, *block, 0, None, None, None) == error
    assert library.cudaGetLastError() == error


class UniqueId(ctypes.Structure):
    _fields_ = (("internal", ctypes.c_char * 128),)


class Ranks:
    """Ranks of an nccl.c communicator in one process, each with its own stream."""

    def __init__(self, library: ctypes.CDLL, count: int) -> None:
        self.nccl = library
        name = UniqueId()
        library.ncclGetUniqueId(ctypes.byref(name))
        self.comms = [ctypes.c_void_p() for _ in range(count)]
        self.streams = [ctypes.c_void_p() for _ in range(count)]
        for rank, (comm, stream) in enumerate(zip(self.comms, self.streams, strict=True)):
            assert library.ncclCommInitRank(ctypes.byref(comm), count, name, rank) == SUCCESS
            library.cudaStreamCreate(ctypes.byref(stream))

    def call(self, rank: int, name: str, *args: Any) -> int:
        """Call NCCL's ``name`` on one rank's stream; tensors are passed as pointers, numbers as int or size_t."""
        values = [ctypes.c_void_p(x.data_ptr()) if isinstance(x, torch.Tensor) else ctypes.c_size_t(x) for x in args]
        result: int = getattr(self.nccl, name)(*values, self.comms[rank], self.streams[rank])
        return result

    def wait(self, rank: int) -> None:
        assert self.nccl.cudaStreamSynchronize(self.streams[rank]) == SUCCESS

    def collective(self, name: str, inputs: list[torch.Tensor], outputs: list[torch.Tensor], *args: int) -> None:
        """Run NCCL's ``name`` on every rank, to its end."""
        for rank, (given, output) in enumerate(zip(inputs, outputs, strict=True)):
            assert self.call(rank, name, given, output, *args) == SUCCESS
        for rank in range(len(inputs)):
            self.wait(rank)


@pytest.fixture()
def ranks(library: ctypes.CDLL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ranks]:
    """Two ranks; checks that they leave no files."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    made = Ranks(library, 2)
    yield made
    for comm in made.comms:
        assert library.ncclCommDestroy(comm) == SUCCESS
    assert not list(tmp_path.iterdir())


def test_a_collective_is_done_when_its_stream_is_waited_for(library: ctypes.CDLL, ranks: Ranks) -> None:
    values = [torch.tensor([1.0, 2.0]), torch.tensor([10.0, 20.0])]
    event = ctypes.c_void_p()
    library.cudaEventCreate(ctypes.byref(event))
    assert ranks.call(0, "ncclAllReduce", values[0], values[0], 2, 7, SUM) == SUCCESS
    library.cudaEventRecord(event, ranks.streams[0])
    assert library.cudaEventQuery(event) == library.cudaStreamQuery(ranks.streams[0]) == NOT_READY
    assert ranks.call(1, "ncclAllReduce", values[1], values[1], 2, 7, SUM) == SUCCESS
    # A query does not finish it: torch's threads query at any time.
    assert library.cudaEventQuery(event) == NOT_READY and values[0].tolist() == [1, 2]
    ranks.wait(1)
    assert values[1].tolist() == [11, 22] and values[0].tolist() == [1, 2]
    assert library.cudaStreamWaitEvent(ranks.streams[1], event, 0) == SUCCESS
    assert values[0].tolist() == [11, 22]
    library.cudaEventDestroy(event)


def test_a_missing_rank_blocks_only_its_stream(library: ctypes.CDLL, ranks: Ranks) -> None:
    values, other = torch.ones(1), ctypes.c_void_p()
    library.cudaStreamCreate(ctypes.byref(other))
    ranks.call(0, "ncclAllReduce", values, values, 1, 7, SUM)
    assert library.cudaStreamSynchronize(other) == SUCCESS
    assert library.cuLaunchKernel(None, 1, 1, 1, 32, 1, 1, 0, other, None, None) == SUCCESS
    assert values.item() == 1
    ranks.call(1, "ncclAllReduce", torch.ones(1), values, 1, 7, SUM)
    for rank, stream in enumerate(ranks.streams):  # a kernel runs after the earlier work of its stream
        assert library.cuLaunchKernel(None, 1, 1, 1, 32, 1, 1, 0, stream, None, None) == SUCCESS, rank
    assert values.item() == 2


def test_ranks_that_send_to_each_other_do_not_deadlock(library: ctypes.CDLL, ranks: Ranks) -> None:
    received = [torch.zeros(1), torch.zeros(1)]
    for rank in range(2):
        library.ncclGroupStart()
        assert ranks.call(rank, "ncclRecv", received[rank], 1, 7, 1 - rank) == SUCCESS
        assert ranks.call(rank, "ncclSend", torch.full((1,), rank + 5.0), 1, 7, 1 - rank) == SUCCESS
        library.ncclGroupEnd()
    for rank in range(2):
        ranks.wait(rank)
    assert torch.cat(received).tolist() == [6, 5]


@pytest.mark.parametrize(
    ("name", "extra", "count", "given", "expected"),
    [
        ("ncclAllReduce", (AVERAGE,), 2, [[1, 2], [3, 5]], [[2, 3.5], [2, 3.5]]),
        ("ncclReduceScatter", (SUM,), 1, [[1, 2], [3, 5]], [[4], [7]]),
        ("ncclReduce", (MAX, 1), 2, [[1, 7], [3, 5]], [[0, 0], [3, 7]]),
        ("ncclAllGather", (), 1, [[1], [3]], [[1, 3], [1, 3]]),
        ("ncclAlltoAll", (), 1, [[1, 2], [3, 5]], [[1, 3], [2, 5]]),
        ("ncclBroadcast", (1,), 2, [[1, 2], [3, 5]], [[3, 5], [3, 5]]),
    ],
)
def test_values_of_collectives(
    ranks: Ranks, name: str, extra: tuple[int, ...], count: int, given: list[list[int]], expected: list[list[float]]
) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.int64):
        inputs = [torch.tensor(row, dtype=dtype) for row in given]
        outputs = [torch.zeros(len(row), dtype=dtype) for row in expected]
        ranks.collective(name, inputs, outputs, count, NCCL_TYPES[dtype], *extra)
        assert [output.tolist() for output in outputs] == torch.tensor(expected).to(dtype).tolist()


def test_sums_are_rounded_once_and_nan_stays(ranks: Ranks) -> None:
    nan = float("nan")
    rows = [torch.tensor(row).bfloat16() for row in ([256.0, nan, 1.0], [1.0, 1.0, nan])]
    for operation in (SUM, MAX):  # the sum 257 lies between two bfloat16 numbers: rounds to even
        outputs = [torch.zeros(3).bfloat16() for _ in rows]
        ranks.collective("ncclAllReduce", rows, outputs, 3, NCCL_TYPES[torch.bfloat16], operation)
        for output in outputs:
            assert output[0].item() == 256 and output[1:].isnan().all()


def test_bits_beyond_float32_count_in_a_bfloat16_sum(
    library: ctypes.CDLL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    for little, expected in ((2**-40, 1 + 2**-7), (0.0, 1.0), (-(2**-40), 1.0)):
        # Without the last bit the sum is half-way between two numbers.
        values, result = [torch.tensor([x]).bfloat16() for x in (1.0, 2**-8, little)], torch.zeros(1).bfloat16()
        Ranks(library, 3).collective("ncclAllReduce", values, [result] * 3, 1, NCCL_TYPES[torch.bfloat16], SUM)
        assert result.item() == expected


def test_unsupported_nccl_calls_are_refused(library: ctypes.CDLL, ranks: Ranks) -> None:
    library.ncclGetLastError.restype = ctypes.c_char_p
    half = torch.ones(1).half()
    assert ranks.call(0, "ncclAllReduce", half, half, 1, NCCL_TYPES[torch.float16], SUM) == NCCL_INVALID_USAGE
    assert b"reduces no float16" in library.ncclGetLastError(None)


@pytest.mark.parametrize("count", [4, 2**19])  # large ones are not copied
def test_ranks_that_differ_in_a_collective_are_stopped(count: int, tmp_path: Path, library: ctypes.CDLL) -> None:
    script = """if True:
        import ctypes, pathlib, sys, torch
        from tests.null_gpu.test_null_gpu import Ranks
        ranks, count = Ranks(ctypes.CDLL(sys.argv[1]), 2), int(sys.argv[2])
        for rank in range(2):
            ranks.call(rank, "ncclAllReduce", torch.ones(count), torch.ones(count), count - rank, 7, 0)
        ranks.wait(0)"""
    done = subprocess.run(
        [sys.executable, "-c", script, library._name, str(count)], text=True, capture_output=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode < 0 and "rank 0 takes part in collective 0 of" in done.stderr
    assert f"with {4 * count} bytes of type 7, rank 1 with {4 * count - 4} of 7" in done.stderr


def test_devices_are_counted_and_have_memory_of_their_own(
    library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NULL_GPU_DEVICES", "4")
    monkeypatch.setenv("NULL_GPU_GIB", "1")
    count = ctypes.c_int()
    for visible, expected in (("", 0), ("-1", 0), ("0,1,2,3", 4), ("3,1", 2), ("0,7,1", 1)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        library.cudaGetDeviceCount(ctypes.byref(count))
        assert count.value == expected, visible
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert library.cudaSetDevice(4) == INVALID_DEVICE
    blocks = [ctypes.c_void_p() for _ in range(3)]
    sizes = ((0, 2**30, SUCCESS), (0, 512, OUT_OF_MEMORY), (1, 2**30, SUCCESS))
    for block, (device, size, error) in zip(blocks, sizes, strict=True):
        assert library.cudaSetDevice(device) == SUCCESS
        assert library.cudaMalloc(ctypes.byref(block), ctypes.c_size_t(size)) == error
    library.cudaSetDevice(0)
    for block in blocks:
        library.cudaFree(block)


@pytest.mark.skipif("+cpu" not in torch.__version__, reason="needs torch's build for the CPU")
def test_a_build_of_torch_without_cuda_is_refused(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.touch()
    done = subprocess.run([sys.executable, "-m", "tests.null_gpu.run", str(script)], text=True, capture_output=True)
    assert done.returncode == 1
    assert f"torch {importlib.metadata.version('torch')} is a build without CUDA. Run make null-gpu" in done.stderr


def test_a_missing_requirement_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "has an NVIDIA driver: run the command without null_gpu" in run.why_not([Path("/")])
    for program, package in (("gcc", "gcc"), ("nm", "binutils")):
        monkeypatch.setattr(shutil, "which", lambda name, missing=program: None if name == missing else name)
        assert run.why_not([]) == f"{program} is not installed: install {package}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "SCRIPT is missing"),
        (["nowhere.py"], "nowhere.py is not a file: name a Python script"),
        (["--devices", "0", __file__], "--devices 0: must be from 1 to 64"),
        (["--gib", "0", __file__], "--gib 0.0: must be above 0"),
        (["--interpret", __file__], "--interpret needs --compute"),
    ],
)
def test_wrong_arguments_are_refused(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
    with pytest.raises(SystemExit):
        run.main()
    assert message in capsys.readouterr().err


def _packed() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """(query, key, value [T, H, D] with gradients, ends of the sequences); five extra rows belong to no sequence."""
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


def test_varlen_attention_uses_the_window_as_the_rule() -> None:
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
    expected = torch.tensor([0.0, 1.0, 1.0, 1 + step, -1 - step, 1.0, top, -top])  # ties round to even
    rounded = engine_kernels.round_to_float8(values / 4, torch.tensor(4.0), dtype)
    assert rounded.dtype == torch.uint8 and torch.equal(rounded.view(dtype).float(), expected)


def test_a_failed_part_reports_its_own_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ours = "[rank1]: ValueError: too many"
    output = f"Traceback\n{ours}\ntorch.distributed.elastic.multiprocessing.errors.ChildFailedError: \n=====\n"
    failed = subprocess.CompletedProcess([], 1, output)
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: failed)
    assert check.launch("tp2-te", tmp_path, tmp_path, 2) == {"error": ours}


_AGAIN = "CUDA graph 1 of 8\nCUDA graphs released 1 GiB\n"


@pytest.mark.parametrize(
    ("part", "losses", "more", "good", "words"),
    [
        ("te", [2.0, 1.009], {}, True, "within 9.0e-03 of cpu"),
        ("te", [2.0, 1.011], {}, False, ""),
        ("te", [2.0, float("nan")], {}, False, ""),
        ("te", [2.0, 1.009], {"calls": {"generic_gemm": 1}}, False, "fused_attn_fwd"),
        ("fusion-norms", [1.0], {"compiled": 3}, False, ""),
        ("fusion-norms", [1.0], {"compiled": 4}, True, ""),
        ("graph", [1.0], {"output": "CUDA graph 1 of 8"}, True, ""),
        ("graph", [1.0], {}, False, ""),
        ("graph-again", [1.0], {"output": _AGAIN}, False, ""),
        ("graph-again", [1.0], {"output": f"{_AGAIN}CUDA graph 1 of 8"}, True, ""),
    ],
)
def test_a_part_fails_when_losses_differ_or_the_engine_was_not_called(
    part: str, losses: list[float], more: dict[str, Any], good: bool, words: str
) -> None:
    result = {"losses": losses, "calls": dict.fromkeys(check.PARTS[part].calls, 1), "compiled": 0, "output": "", **more}
    passes, measured = check.judge(part, {"cpu": {"losses": [2.0, 1.0]}, "fusion-none": {"compiled": 3}, part: result})
    assert passes == good and words in measured
