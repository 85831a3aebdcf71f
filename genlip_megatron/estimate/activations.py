"""Bytes that the modules of ``model/`` keep for the backward pass, and their largest temporaries.

Legend: S tokens of a micro-batch, D hidden size, F inner size, E text width, V vocabulary, L layers; T, P, C sizes of
the tensor-, pipeline- and context-parallel groups; e bytes of an activation.
"""

from __future__ import annotations

import math

from genlip_megatron.config import PATCH_VALUES, RunConfig
from genlip_megatron.estimate.sample import SampleMix
from genlip_megatron.model.cross_entropy import PIECE, chunk_rows, logit_bytes

# Token ids, positions, sample ids and slots of one token, in bytes.
_INDEX_BYTES = 64


def compute_bytes(config: RunConfig, device: str) -> int:
    """Bytes of a weight or an activation: auto is bf16 on ``cuda`` and fp32 on ``cpu``."""
    precision = config.train.precision
    return 2 if precision == "bf16" or (precision == "auto" and device == "cuda") else 4


def backend(config: RunConfig, device: str) -> str:
    """The attention backend whose buffers are counted: the setting, or what auto takes on ``device``."""
    wanted = config.train.attention_backend
    if wanted != "auto":
        return wanted
    if device != "cuda" or compute_bytes(config, device) != 2:
        return "grouped"
    return "te" if config.train.transformer_impl == "transformer_engine" else "varlen"


class Sizes:
    """Bytes of one rank's tensors that the memory formulas are made of."""

    def __init__(self, config: RunConfig, device: str, mix: SampleMix) -> None:
        model, parallel, train = config.model, config.parallel, config.train
        self.config, self.device, self.mix = config, device, mix
        self.e = compute_bytes(config, device)
        self.tp, self.cp = parallel.tensor_model_parallel_size, parallel.context_parallel_size
        self.shards_sequence = parallel.sequence_parallel and self.tp > 1
        total = config.data.seq_length * train.micro_batch_size
        self.tokens = total / self.cp  # of one context-parallel rank
        self.local = self.tokens / self.tp if self.shards_sequence else self.tokens
        self.all_tokens = total
        self.image_share = mix.image_tokens / mix.tokens
        # [S_local, D], [S/C, D], [S/C, D/T], [S/C, F/T] and [V/T, E] in the compute dtype.
        self.hidden = self.local * model.hidden_size * self.e
        self.gathered = self.tokens * model.hidden_size * self.e
        self.heads = self.gathered / self.tp
        self.inner = self.tokens * model.ffn_hidden_size * self.e / self.tp
        self.vocabulary = -(-model.vocab_size // self.tp) * model.text_hidden_size
        self.modules = parallel.recomputed

    def accumulated(self, numel: float) -> float:
        """A weight's gradient on its way into the float32 buffer; a CPU first makes a float32 copy of it."""
        return numel * (self.e + (4 if self.device == "cpu" and self.e == 2 else 0))

    def attention(self, recomputed: bool) -> float:
        """What one layer's attention keeps: queries, keys, values, output, gate, and the projection's input."""
        model, name = self.config.model, backend(self.config, self.device)
        gate = model.attention_output_gate
        qkv = 4 if gate else 3
        gated = gate and "output_gate" not in self.modules
        kept = self.heads * (2 if gated else 1)  # attention's output, and what the projection multiplies
        if gate and self.device == "cpu":
            kept += self.tokens * model.hidden_size / self.tp * 4  # the sigmoid, in float32
        if "core_attn" in self.config.parallel.offload_modules and "core_attn" not in self.modules:
            return kept + (self.heads if gate else 0)  # the gate's own copy; all else is moved
        # A compiled gate on a GPU, and one that is applied again, keep the gate: a view of the whole projection.
        whole = recomputed or (gate and self.device != "cpu") or "output_gate" in self.modules
        kept += self.heads * qkv if whole else 0
        if recomputed:
            return kept
        kept += 4 * model.num_attention_heads / self.tp * self.tokens  # log of the softmax's denominator
        if whole and self.cp == 1 and name not in ("te", "grouped"):
            kept -= self.heads  # the values, where they are attended as they lie in the projection
        if name in ("varlen", "te"):
            # Image queries see their image, text queries the whole sample; each call has its own copies. With the fixed
            # shapes of CUDA graphs each has room for every slot.
            fixed = self.config.train.cuda_graph
            kept += self.heads * (8 if fixed else 4 + 2 * self.image_share)
        else:
            kept += self.heads * 4
        if name == "dense":
            kept += 8 * model.num_attention_heads / self.tp * self.tokens * self.all_tokens
        return kept

    def layer(self) -> float:
        """What one layer keeps until its backward pass, without full recomputation."""
        model, modules = self.config.model, self.modules
        # FP8 linears keep their inputs in FP8. The output projection's stays in bfloat16 as well, so measurements say.
        narrow = 0.5 if self.config.train.fp8 != "none" else 1.0
        norms = 2 * narrow * self.hidden
        if "layernorm" in modules:  # what a recomputed MLP is given stays
            norms = self.hidden if "mlp" in modules else 0
        branches = 2 * self.hidden if model.layer_scale_init else 0
        swiglu = 2 + (0 if "mlp_act" in modules else narrow)  # its input [S, 2F] and output [S, F]
        mlp = 0 if "mlp" in modules else swiglu * self.inner
        residuals = 2 * self.hidden
        statistics = 16 * self.local
        attention = self.attention("core_attn" in modules)
        # Moved to host memory until the backward pass.
        moved = {
            "attn_norm": self.hidden,
            "qkv_linear": self.hidden,
            "attn_proj": self.heads,
            "mlp_norm": self.hidden,
        }
        offloaded = sum(moved.get(name, 0.0) for name in self.config.parallel.offload_modules)
        return max(self.hidden, norms + branches + mlp + residuals + statistics + attention - offloaded)

    def recomputed_bytes(self) -> float:
        """Bytes that go between device and memory while one layer makes the outputs of LINEAR_INPUTS again: inputs and
        output of each, and the output twice more on its way to where it was."""
        norms = 1 if "mlp" in self.modules else 2
        each = {"layernorm": norms * 4 * self.hidden, "mlp_act": 5 * self.inner, "output_gate": 5 * self.heads}
        return sum(each.get(name, 0.0) for name in self.modules)

    def shared(self) -> float:
        """What a stage keeps of a micro-batch beside its layers: indices, rotary angles, masks, DropPath."""
        model, name = self.config.model, backend(self.config, self.device)
        angles = 2 * self.all_tokens * model.head_dim * self.e
        drop_path = 8 * model.num_layers * self.local if model.drop_path_rate else 0
        grouped = angles + self.all_tokens * self.mix.tokens * self.e if name == "grouped" else 0
        dense = self.all_tokens**2 if name == "dense" else 0
        return self.all_tokens * _INDEX_BYTES + angles + drop_path + grouped + dense

    def pixels(self) -> float:
        """The patches of a micro-batch as bytes."""
        return self.image_share * self.tokens * PATCH_VALUES

    def chunk(self, layers: int, first: bool, last: bool) -> float:
        """What a model chunk keeps of one micro-batch between its forward and its backward pass."""
        model, parallel = self.config.model, self.config.parallel
        whole = 0
        if parallel.recompute == "full":
            whole = min(parallel.recompute_num_layers or layers, layers)
        kept = whole * self.hidden + (layers - whole) * self.layer()
        if first:
            patches = self.image_share * self.local
            kept += patches * (PATCH_VALUES + model.hidden_size) * self.e
            kept += self.local * model.text_hidden_size * self.e if model.text_hidden_size != model.hidden_size else 0
        # A stage holds on to the output that it has sent.
        return kept if last else kept + self.hidden

    def passing(self, layers: int) -> float:
        """The most that a layer's passes add to what the chunk keeps, less what they have freed by then."""
        model, parallel = self.config.model, self.config.parallel
        scaled = self.hidden if model.layer_scale_init else 0
        fc1 = 2 * model.ffn_hidden_size * model.hidden_size / self.tp
        # gloo works on a copy of what it reduces.
        staged = self.gathered if self.device == "cpu" and self.shards_sequence else 0
        again = 3 * self.inner + 2 * self.hidden if "mlp" in self.modules else 0
        if parallel.recompute == "full" and (parallel.recompute_num_layers or layers) >= layers:
            again = self.layer()
        freed = scaled + (0 if "mlp_act" in self.modules else self.inner)
        # SwiGLU's input gradient [S, 2F] beside its output's, and on a CPU a product of two of them.
        swiglu = (4 if self.device == "cpu" else 3) * self.inner + self.hidden - freed
        linear = self.gathered + self.hidden - freed + max(fc1 * self.e, staged)
        accumulate = self.gathered + self.accumulated(fc1) - freed - 2 * self.inner
        query = 10 * self.heads + self.hidden - (freed + 2 * self.inner + 2 * self.hidden)
        if "core_attn" in self.modules:
            query += self.attention(False) - self.attention(True)
        if again and "mlp" in self.modules:
            query -= again
        # In the forward pass, the last row-parallel linear's output before it is scattered over the sequence; on a CPU
        # beside the SwiGLU's input without its bias.
        without_bias = 2 * self.inner if self.device == "cpu" else 0
        scatter = self.gathered + staged + without_bias - self.hidden if self.shards_sequence else 0.0
        return again + max(swiglu, linear, accumulate, query, scatter)

    def unit(self, numel: float) -> float:
        """What FSDP holds of a unit while it runs: its weights gathered, and beside them the next unit's."""
        return 2 * numel * self.e

    def head_rows(self) -> int:
        """Answer rows of a micro-batch, rounded up as ``batch.pack_samples`` does; spread over C."""
        rows = self.all_tokens / self.mix.tokens * self.mix.answer_tokens / self.cp
        return max(1, math.ceil(rows / 128)) * 128

    def head(self) -> float:
        """The most that the head holds while it makes its logits and their gradients, chunk by chunk.

        The weight's gradient goes straight into DDP's buffer; under FSDP it is a float32 matrix of its own.
        """
        model, rows = self.config.model, self.head_rows()
        columns = -(-model.vocab_size // self.tp)
        chunk = min(rows, chunk_rows(rows, columns, self.device, self.e))
        kept = rows * (2 * model.hidden_size + 2 * model.text_hidden_size) * self.e
        logits = logit_bytes(self.device, self.e) * columns * chunk
        if model.freeze_head:
            return kept + logits
        # Beside it, at the end, its copy in the compute dtype.
        own = (4 + self.e % 4) * self.vocabulary if self.config.parallel.fsdp else 0
        return kept + own + max(logits, self.e * columns * chunk + self._head_product())

    def _head_product(self) -> float:
        """What is made of the weight's gradient before it is added: a CPU multiplies bfloat16 piece by piece."""
        if self.device != "cpu" or self.e == 4:
            return 0.0
        return self.accumulated(min(PIECE * self.config.model.text_hidden_size, self.vocabulary))

    def head_backward(self) -> float:
        """The gradient of the head's rows beside its scaled copy; under FSDP the weight's too, on its way out."""
        model = self.config.model
        rows = self.head_rows() * (model.hidden_size + 2 * model.text_hidden_size) * self.e
        if model.freeze_head or not self.config.parallel.fsdp:
            return rows
        return rows + max(2 * self.vocabulary * self.e, self.accumulated(self.vocabulary))
