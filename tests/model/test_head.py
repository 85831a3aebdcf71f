"""The head's loss and gradients: by torch, by Triton kernels, into DDP's buffer; and their memory."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from genlip_megatron.model import cross_entropy, head

ROOT = Path(__file__).parent.parent.parent
ONE_RANK = SimpleNamespace(size=lambda: 1)
ROWS, COLUMNS, WIDTH, PADDED = 300, 61, 8, 64


def problem(dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [R, E], weight [V, E] with padded rows, labels [R] and row weights [R], some 0."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, WIDTH, generator=generator)
    weight = torch.randn(PADDED, WIDTH, generator=generator)
    labels = torch.randint(0, COLUMNS, (ROWS,), generator=generator)
    row_weights = (torch.rand(ROWS, generator=generator) > 0.2).float()
    return x.to(device, dtype), weight.to(device, dtype), labels.to(device), row_weights.to(device)


def loss_and_gradients(
    dtype: torch.dtype, in_buffer: bool, factor: float = 1.0, device: str = "cpu"
) -> tuple[Tensor, ...]:
    """(loss, gradient of x, gradient of the weight) of the head's function, in chunks."""
    x, weight, labels, row_weights = problem(dtype, device)
    x.requires_grad_()
    weight = torch.nn.Parameter(weight)
    if in_buffer:
        weight.main_grad = torch.ones(PADDED, WIDTH, device=device)
        weight.grad_added_to_main_grad = False
    loss = head._HeadLoss.apply(x, weight, labels, row_weights, 0, COLUMNS, ONE_RANK, True)
    (loss * factor).backward()
    assert x.grad is not None and weight.grad is not None
    if not in_buffer:
        return loss.detach(), x.grad, weight.grad
    assert weight.grad_added_to_main_grad and weight.grad.data_ptr() == weight.data_ptr()
    return loss.detach(), x.grad, weight.main_grad - 1


@pytest.fixture
def _short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "_CPU_ROWS", 128)
    monkeypatch.setattr(cross_entropy, "PIECE", 24)


@pytest.mark.usefixtures("_short_chunks")
@pytest.mark.parametrize("in_buffer", [False, True])
def test_loss_and_gradients_equal_torch(in_buffer: bool) -> None:
    x, weight, labels, row_weights = problem(torch.float32)
    x.requires_grad_()
    weight.requires_grad_()
    expected = (F.cross_entropy(x @ weight[:COLUMNS].T, labels, reduction="none") * row_weights).sum()
    expected.backward()
    found = loss_and_gradients(torch.float32, in_buffer)
    for ours, theirs in zip(found, (expected.detach(), x.grad, weight.grad), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert found[2][COLUMNS:].eq(0).all()


@pytest.mark.usefixtures("_short_chunks")
def test_bfloat16_sums_its_weight_gradient_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "_CPU_ROWS", 4)  # many short sums; a bfloat16 sum would round each of them
    exact = loss_and_gradients(torch.float32, True)
    for in_buffer in (False, True):
        found = loss_and_gradients(torch.bfloat16, in_buffer)
        for ours, theirs in zip(found, exact, strict=True):
            # Measured: 0.0040 from bfloat16 operands; 0.0075 with a bfloat16 sum.
            assert (ours.float() - theirs).norm() <= 0.006 * theirs.norm()


def test_a_scaled_loss_turns_the_gradient_in_the_buffer_into_nan() -> None:
    """The gradient was added for the factor 1, so any other factor must be found."""
    assert loss_and_gradients(torch.float32, True)[2].isfinite().all()
    assert loss_and_gradients(torch.float32, True, factor=2.0)[2].isnan().any()
    plain, scaled = (loss_and_gradients(torch.float32, False, factor) for factor in (1.0, 2.0))
    torch.testing.assert_close(scaled[2], 2 * plain[2])


BY_KERNELS = """
import sys, torch
from genlip_megatron.model.cross_entropy import _in_place, _plain

rank, folder = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
found = {}
for dtype in (torch.float32, torch.bfloat16):
    for columns in (9150, 4500):
        generator = torch.Generator().manual_seed(0)
        logits = 10 * torch.randn(4, 9200, generator=generator)
        labels = torch.tensor([0, columns - 1, columns // 2, 4599 if columns > 4600 else 5])
        row_weights = torch.tensor([1.0, 0.5, 0.0, 1.0])
        mine = min(max(columns - 4600 * rank, 0), 4600)
        for function in (_plain, _in_place):
            part = logits[:, 4600 * rank : 4600 * (rank + 1)].to(dtype).contiguous()
            losses = function(part, labels - 4600 * rank, row_weights, mine, torch.distributed.group.WORLD, True)
            found[str(dtype), columns, function.__name__] = losses, part
torch.save(found, f"{folder}/{rank}.pt")
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton: pip install triton")
def test_kernels_equal_torch(tmp_path: Path) -> None:
    """On two tensor-parallel ranks; the second has padding columns, or no tokens at all. In separate processes, since
    Triton must be imported with its interpreter on."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    ranks = [
        subprocess.Popen([sys.executable, "-c", BY_KERNELS, str(rank), str(tmp_path)], env=environment, cwd=ROOT)
        for rank in range(2)
    ]
    assert [process.wait(200) for process in ranks] == [0, 0]
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        for dtype, columns, name in found:
            (losses, gradient), (expected_losses, expected) = (
                found[dtype, columns, name] for name in ("_in_place", "_plain")
            )
            torch.testing.assert_close(losses, expected_losses)
            torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=2**-7 if "bf" in dtype else 1e-5)
            assert gradient[2].eq(0).all()
            assert gradient[1].eq(0).all() == ((rank, columns) == (1, 4500))


class Peak(TorchDispatchMode):
    """Peak bytes of the tensors created within it."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._seen: set[int] = set()

    def _freed(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in before and storage._cdata not in self._seen:
                    self._seen.add(storage._cdata)
                    self.now += storage.nbytes()
                    self.most = max(self.most, self.now)
                    weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        return out


@pytest.mark.parametrize("width", [1024, 1152, 1536])
def test_head_of_a_64k_micro_batch_takes_less_than_1_gib(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device, along a GPU's path; the kernels work in place and allocate nothing."""
    kernels = SimpleNamespace(
        row_statistics=lambda logits, *_: logits.new_empty(3, len(logits), dtype=torch.float32).unbind(),
        to_gradient_=lambda *_: None,
    )
    monkeypatch.setattr(cross_entropy, "has_triton", lambda: True)
    monkeypatch.setitem(sys.modules, "genlip_megatron.model.cross_entropy_kernels", kernels)  # type: ignore[arg-type]
    monkeypatch.setattr(head, "cross_entropy_", cross_entropy._in_place)
    rows, vocabulary = 16512, 151936
    x = torch.empty(rows, width, dtype=torch.bfloat16, device="meta", requires_grad=True)
    weight = torch.nn.Parameter(torch.empty(vocabulary, width, dtype=torch.bfloat16, device="meta"))
    weight.main_grad = torch.empty(vocabulary, width, device="meta")
    # The product is added in place, as addmm.dtype_out does.
    monkeypatch.setattr(head, "add_product_", lambda total, grad, x: total.add_(0.0))
    labels = torch.empty(rows, dtype=torch.int64, device="meta")
    row_weights = torch.empty(rows, device="meta")
    with Peak() as peak:
        head._HeadLoss.apply(x, weight, labels, row_weights, 0, vocabulary, ONE_RANK, True).backward()
    # The caller keeps the rows' gathered hidden states, the norm's output and the projection's output.
    kept = 3 * rows * max(width, 1152) * 2
    print(f"E = {width}: {peak.most / 2**30:.3f} GiB, with the rows themselves {(peak.most + kept) / 2**30:.3f} GiB")
    assert peak.most > cross_entropy._LOGITS_BUDGET * 0.9
    assert peak.most + kept < 2**30


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_kernels_and_buffer_on_a_gpu() -> None:
    expected = loss_and_gradients(torch.float32, False)
    for in_buffer in (False, True):
        found = loss_and_gradients(torch.bfloat16, in_buffer, device="cuda")
        for ours, theirs in zip(found[1:], expected[1:], strict=True):
            assert (ours.float().cpu() - theirs).norm() <= 0.01 * theirs.norm()
