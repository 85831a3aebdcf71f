"""What a run reports: useful arithmetic, the progress line, TensorBoard and Weights & Biases."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from genlip_megatron.batch import PATCH_VALUES, PackedBatch
from genlip_megatron.config import LogConfig, ModelConfig

# Dense bfloat16 rate of one Hopper SXM GPU, which MFU is quoted against.
HOPPER_TFLOPS = 989.5

COUNTS = ("tokens", "samples", "image_tokens", "image_pairs", "text_pairs", "loss_rows", "slots")


def count_batch(batch: PackedBatch) -> Tensor:
    """float64 [len(COUNTS)] on the CPU: what a micro-batch holds, for rates and FLOPs."""
    images, texts = batch.image_lengths.double(), batch.text_lengths.double()
    text_pairs = images * texts + texts * (texts + 1) / 2
    counts = [
        (images + texts).sum(),
        (images + texts > 0).sum().double(),
        images.sum(),
        (images**2).sum(),
        text_pairs.sum(),
        (batch.loss_weights > 0).sum().double(),
        torch.tensor(float(batch.num_tokens), dtype=torch.float64),
    ]
    return torch.stack([count.cpu() for count in counts])


def training_flops(counts: Tensor, model: ModelConfig) -> float:
    """Useful floating-point operations of training on ``counts``: forward and twice that backward.

    Blocks 2 N L (5 D^2 + 3 D F), attention 4 D L x exact prefix-LM pairs, head 2 E V x answer rows, patch embedding
    2 x 768 D x patches (its input needs no gradient). Recomputation and padding never count.
    """
    by_name = dict(zip(COUNTS, counts.tolist(), strict=True))
    width, layers = model.hidden_size, model.num_layers
    projections = 5 if model.attention_output_gate else 4
    blocks = 2 * by_name["tokens"] * layers * (projections * width**2 + 3 * width * model.ffn_hidden_size)
    attention = 4 * width * layers * (by_name["image_pairs"] + by_name["text_pairs"])
    head = 2 * model.text_hidden_size * model.vocab_size * by_name["loss_rows"]
    patches = 2 * PATCH_VALUES * width * by_name["image_tokens"]
    return 3 * (blocks + attention + head) + 2 * patches


@dataclass
class Progress:
    """One log interval, as the progress line and the writers show it."""

    iteration: int
    train_iters: int
    loss: float
    learning_rate: float
    grad_norm: float
    seconds: float  # of one step
    consumed_samples: int
    consumed_tokens: int
    tokens_per_second: float
    tflops: float  # per rank
    mfu: float | None
    pack_fill: float
    memory_gib: float
    data_wait: float  # seconds of a step, on the rank that waited longest
    quarantined: int  # bad samples met so far
    truncated: int  # captions cut to what their image leaves of a pack
    skipped: int  # steps without an update
    spikes: int

    def line(self) -> str:
        """The progress line."""
        left = int((self.train_iters - self.iteration) * self.seconds)
        mfu = "-" if self.mfu is None else f"{100 * self.mfu:.1f}%"
        return (
            f"iteration {self.iteration:>7}/{self.train_iters} | samples {self.consumed_samples} | "
            f"tokens {self.consumed_tokens} | lm loss {self.loss:.4f} | learning rate {self.learning_rate:.3e} | "
            f"grad norm {self.grad_norm:.3f} | step {1000 * self.seconds:.0f} ms | "
            f"tokens/s {self.tokens_per_second:.0f} | TFLOP/s {self.tflops:.3f} | MFU {mfu} | "
            f"pack fill {100 * self.pack_fill:.1f}% | data wait {1000 * self.data_wait:.0f} ms | "
            f"quarantined {self.quarantined} | truncated {self.truncated} | "
            f"skipped {self.skipped} | spikes {self.spikes} | memory {self.memory_gib:.1f} GiB | "
            f"left {left // 3600}:{left % 3600 // 60:02d}:{left % 60:02d}"
        )

    def scalars(self) -> dict[str, float]:
        """Values under Megatron's TensorBoard tag names."""
        values = {
            "lm loss": self.loss,
            "learning-rate": self.learning_rate,
            "grad-norm": self.grad_norm,
            "iteration-time": self.seconds,
            "throughput": self.tflops,
            "tokens-per-second": self.tokens_per_second,
            "pack-fill": self.pack_fill,
            "consumed-samples": float(self.consumed_samples),
            "mem-allocated-gib": self.memory_gib,
            "data-wait": self.data_wait,
            "quarantined-samples": float(self.quarantined),
            "truncated-captions": float(self.truncated),
            "skipped-steps": float(self.skipped),
            "spikes": float(self.spikes),
        }
        return values if self.mfu is None else {**values, "mfu": self.mfu}


class Writer:
    """TensorBoard and, when asked for, Weights & Biases; does nothing on ranks that do not write."""

    def __init__(self, config: LogConfig, folder: str, active: bool, settings: dict[str, Any]) -> None:
        """Raises ValueError when Weights & Biases is asked for but not installed."""
        self._board: Any = None
        self._wandb: Any = None
        if config.wandb_project and importlib.util.find_spec("wandb") is None:
            raise ValueError(
                f"log.wandb_project = {config.wandb_project!r}: wandb is not installed; "
                "pip install 'genlip-megatron[wandb]', or leave the setting out"
            )
        if not active:
            return
        if folder:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(folder)
        if config.wandb_project:
            self._wandb = importlib.import_module("wandb")
            self._wandb.init(project=config.wandb_project, config=settings)

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Write named values of a step."""
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
            self._board.flush()
        if self._wandb is not None:
            self._wandb.log(values, step=step)

    def caption(self, number: int, image: Tensor, text: str, step: int) -> None:
        """A validation image uint8 [3, height, width] and its generated caption beside the true one."""
        if self._board is not None:
            self._board.add_image(f"validation/{number}", image, step)
            self._board.add_text(f"validation/{number}", text, step)

    def close(self) -> None:
        """Write what is buffered."""
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()
