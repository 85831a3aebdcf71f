"""Bytes that a micro-batch keeps for the backward pass, and the largest temporaries beside them.

The unit is a tensor that a module keeps, not an operation of a kernel. A kernel's own copies are one measured factor
for each attention backend (``_COPIES``). The estimate is within 10% of the measured peak (``tests/test_estimate.py``).

Legend: S tokens of a micro-batch, D hidden size, F inner size, E text width, V vocabulary; T, P, C sizes of the
tensor-, pipeline- and context-parallel groups.
"""

from __future__ import annotations

from genlip_megatron.config import PATCH_VALUES, RunConfig
from genlip_megatron.estimate.sample import SampleMix
from genlip_megatron.model.cross_entropy import chunk_rows, logit_bytes
from genlip_megatron.model.state_dict import has_layer_scale, has_projections, rank_sizes

# Copies of [S/C, D/T] that attention keeps beside its output: turned queries and keys, rows gathered for kernel calls.
# A backend without a measured figure counts as the largest.
_COPIES = {"varlen": 4.5, "te": 5.5, "grouped": 4.0, "flex": 3.0, "dense": 3.0}
_GRAPH_COPIES = 7.0  # with the fixed shapes of CUDA graphs each call has room for every slot
# Indices, positions and masks of one token, in bytes.
_INDEX_BYTES = 64


def compute_bytes(config: RunConfig, device: str) -> int:
    """Bytes of a weight or an activation: auto is bf16 on ``cuda`` and fp32 on ``cpu``."""
    precision = config.train.precision
    return 2 if precision == "bf16" or (precision == "auto" and device == "cuda") else 4


def backend(config: RunConfig, device: str) -> str:
    """The attention backend of the estimate: the setting, or the choice of auto on ``device``."""
    wanted = config.train.attention_backend
    if wanted != "auto":
        return wanted
    if device != "cuda" or compute_bytes(config, device) != 2:
        return "grouped"
    return "te" if config.train.transformer_impl == "transformer_engine" else "varlen"


class Activations:
    """Bytes of one rank's activations.

    Attributes:
        e: bytes of one value.
        hidden, gathered: [S_local, D] and [S/C, D], which differ with sequence parallelism.
        heads, inner: [S/C, D/T] and [S/C, F/T].
    """

    def __init__(self, config: RunConfig, device: str, mix: SampleMix) -> None:
        model, parallel = config.model, config.parallel
        self.config, self.device, self.mix = config, device, mix
        self.e = compute_bytes(config, device)
        self.tp, self.cp = parallel.tensor_model_parallel_size, parallel.context_parallel_size
        self.shards_sequence = parallel.sequence_parallel and self.tp > 1
        self.all_tokens = config.data.seq_length * config.train.micro_batch_size
        self.tokens = self.all_tokens / self.cp
        self.gathered = self.tokens * model.hidden_size * self.e
        self.hidden = self.gathered / self.tp if self.shards_sequence else self.gathered
        self.heads = self.gathered / self.tp
        self.inner = self.tokens * model.ffn_hidden_size * self.e / self.tp
        self.recomputed = parallel.recomputed

    def attention(self, recomputed: bool) -> float:
        """Bytes that one layer's attention keeps; ``recomputed``: core attention runs again in the backward pass."""
        model, kind = self.config.model, backend(self.config, self.device)
        gate = model.gate_rows / model.head_dim  # relative to the queries
        kept = self.heads * (2 if gate and "output_gate" not in self.recomputed else 1)  # output, gated output
        if gate and self.device == "cpu":
            kept += gate * self.heads * 4 / self.e  # the gate's sigmoid, in float32
        if "core_attn" in self.config.parallel.offload_modules and not recomputed:
            return kept + self.heads * gate
        # The projection's output: query, key, value, gate. A kernel that computes the sigmoid itself needs the gate.
        if recomputed or (gate and self.device != "cpu") or "output_gate" in self.recomputed:
            kept += self.heads * (3 + gate)
        if recomputed:
            return kept
        if kind == "dense":
            kept += 8 * model.num_attention_heads / self.tp * self.tokens * self.all_tokens
        copies = _GRAPH_COPIES if self.config.train.cuda_graph else _COPIES.get(kind, max(_COPIES.values()))
        return kept + self.heads * (copies + (self.cp > 1))  # values come from other ranks, in tensors of their own

    def layer(self) -> float:
        """Bytes that one layer keeps, without full recomputation."""
        modules = self.recomputed
        # FP8 linears keep their inputs in FP8, the output projection in bfloat16 as well.
        input_size = 0.5 if self.config.train.fp8 != "none" else 1.0
        kept = 2 * self.hidden + (2 * self.hidden if has_layer_scale(self.config.model) else 0)
        kept += self.attention("core_attn" in modules)
        # The linears' inputs: both norms, SwiGLU's output; and SwiGLU's input [S, 2F].
        if "layernorm" not in modules:
            kept += 2 * input_size * self.hidden
        elif "mlp" in modules:
            kept += self.hidden
        if "mlp" not in modules:
            kept += (2 + (0 if "mlp_act" in modules else input_size)) * self.inner
        offloaded = {"attn_proj": self.heads} | dict.fromkeys(("attn_norm", "qkv_linear", "mlp_norm"), self.hidden)
        kept -= sum(offloaded.get(name, 0.0) for name in self.config.parallel.offload_modules)
        return max(self.hidden, kept)

    def chunk(self, layers: int, first: bool) -> float:
        """Bytes that a model chunk keeps of one micro-batch between its forward and its backward pass."""
        model, parallel = self.config.model, self.config.parallel
        whole = min(parallel.recompute_num_layers or layers, layers) if parallel.recompute == "full" else 0
        kept = whole * self.hidden + (layers - whole) * self.layer()
        if first:
            patches = self.mix.image_tokens / self.mix.tokens * self.hidden / model.hidden_size
            kept += patches * (PATCH_VALUES + model.hidden_size)
            kept += self.hidden / model.hidden_size * model.text_hidden_size * has_projections(model)
        return kept

    def shared(self) -> float:
        """Bytes that a stage keeps of a micro-batch besides its layers: indices, rotary angles, masks, DropPath."""
        model, kind = self.config.model, backend(self.config, self.device)
        angles = 2 * self.all_tokens * model.head_dim * self.e
        kept = self.all_tokens * (_INDEX_BYTES + 8 * model.num_layers * (model.drop_path_rate > 0) / self.cp) + angles
        if kind == "grouped":
            kept += angles + self.all_tokens * self.mix.tokens * self.e
        return kept + (self.all_tokens**2 if kind == "dense" else 0)

    def pixels(self) -> float:
        """The patches of a micro-batch as bytes."""
        return self.mix.image_tokens / self.mix.tokens * self.tokens * PATCH_VALUES

    def temporaries(self, layers: int) -> float:
        """The most that a layer's backward pass adds to its chunk's activations, less what it has freed by then."""
        model, parallel = self.config.model, self.config.parallel
        recomputed = 3 * self.inner + 2 * self.hidden if "mlp" in self.recomputed else 0.0
        if parallel.recompute == "full" and (parallel.recompute_num_layers or layers) >= layers:
            recomputed = self.layer()
        freed = (self.hidden if has_layer_scale(model) else 0) + (0 if "mlp_act" in self.recomputed else self.inner)
        # The largest are SwiGLU's gradients; on a CPU with a product of two of them.
        return recomputed + (4 if self.device == "cpu" else 3) * self.inner + self.hidden - freed

    def head(self) -> float:
        """The most that the head holds: inputs and gradients of its rows, and one chunk of logits.

        The weight's gradient goes straight into DDP's buffer; under FSDP it is a separate float32 matrix.
        """
        # The context-parallel ranks share the answer rows of the micro-batch.
        model, rows = self.config.model, self.tokens / self.mix.tokens * self.mix.answer_tokens
        vocabulary = rank_sizes(model, self.tp)["head.weight"]
        columns = vocabulary // model.text_hidden_size
        chunk = min(rows, chunk_rows(int(rows), columns, self.device, self.e))
        kept = rows * 2 * (model.hidden_size + model.text_hidden_size) * self.e
        gradient = 4 * vocabulary if self.config.parallel.fsdp and not model.freeze_head else 0
        return kept + gradient + logit_bytes(self.device, self.e) * columns * chunk

    def recomputed_bytes(self) -> float:
        """Memory traffic of recomputing the modules of LINEAR_INPUTS in one layer: each reads its inputs, writes its
        output, and copies it to its old place."""
        norms = 1 if "mlp" in self.recomputed else 2
        traffic = {"layernorm": norms * 4 * self.hidden, "mlp_act": 5 * self.inner, "output_gate": 5 * self.heads}
        return sum(traffic.get(name, 0.0) for name in self.recomputed)
