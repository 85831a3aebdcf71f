#!/usr/bin/env python3
"""An exported encoder in front of a small language model, with a two-layer projector, as in LLaVA.

    python examples/vlm_connector.py                     # random encoder and LLM, on a CPU in seconds
    python examples/vlm_connector.py --encoder FOLDER    # an exported folder
    python examples/vlm_connector.py --train-encoder     # also train the encoder, at a tenth of the rate

The LLM has the architecture of Qwen2 and random weights; for real work use ``AutoModelForCausalLM.from_pretrained`` and
its tokenizer. It sees all features after ``ln_post`` (``last_hidden_state``); there is no class token. The toy task,
plain colours with one word each, shows that gradients flow where they should.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import AutoImageProcessor, AutoModel, Qwen2Config, Qwen2ForCausalLM

from genlip_megatron.hf.configuration_genlip import GenLIPConfig
from genlip_megatron.hf.image_processing_genlip import GenLIPImageProcessor
from genlip_megatron.hf.modeling_genlip import GenLIPVisionModel

COLOURS = {"red": (220, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 220), "grey": (128, 128, 128)}
END, BEGIN = 256, 257
IGNORED_LABEL = -100


class VisionLanguageModel(nn.Module):
    """A causal LLM that sees images, through encoder and projector, before its text.

    Args:
        encoder: a vision model whose ``last_hidden_state`` is [B, patches, D].
        llm: takes ``inputs_embeds``.
        train_encoder: train the encoder; otherwise it is frozen and runs without gradients.
    """

    def __init__(self, encoder: nn.Module, llm: Qwen2ForCausalLM, train_encoder: bool = False) -> None:
        super().__init__()
        self.encoder, self.llm, self.train_encoder = encoder.requires_grad_(train_encoder), llm, train_encoder
        width = llm.config.hidden_size
        self.projector = nn.Sequential(nn.Linear(encoder.config.hidden_size, width), nn.GELU(), nn.Linear(width, width))

    def embed(self, pixel_values: Tensor, input_ids: Tensor) -> Tensor:
        """[B, patches + L, E]: the projected images, then the text of ``input_ids`` int64 [B, L]."""
        with torch.set_grad_enabled(self.train_encoder and torch.is_grad_enabled()):
            features = self.encoder(pixel_values).last_hidden_state
        return torch.cat((self.projector(features), self.llm.get_input_embeddings()(input_ids)), dim=1)

    def forward(self, pixel_values: Tensor, input_ids: Tensor, labels: Tensor) -> Tensor:
        """The loss for images [B, 3, height, width] and labels int64 [B, L]; -100 masks a label."""
        embeds = self.embed(pixel_values, input_ids)
        patches = embeds.shape[1] - labels.shape[1]
        labels = nn.functional.pad(labels, (patches, 0), value=IGNORED_LABEL)
        return self.llm(inputs_embeds=embeds, labels=labels).loss

    @torch.no_grad()
    def generate(self, pixel_values: Tensor, input_ids: Tensor, **options: object) -> Tensor:
        """The new tokens, int64 [B, T]."""
        embeds = self.embed(pixel_values, input_ids)
        mask = torch.ones(embeds.shape[:2], dtype=torch.int64, device=embeds.device)
        return self.llm.generate(inputs_embeds=embeds, attention_mask=mask, **options)


def small_llm() -> Qwen2ForCausalLM:
    """A byte-level Qwen2 of two layers, with begin and end tokens."""
    config = Qwen2Config(
        vocab_size=258,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=BEGIN,
        eos_token_id=END,
        pad_token_id=END,
    )
    return Qwen2ForCausalLM(config)


def small_encoder() -> GenLIPVisionModel:
    """A GenLIP encoder of two layers with random weights."""
    sizes = {"hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 160}
    return GenLIPVisionModel(GenLIPConfig(vocab_size=258, rope_scaling={"mrope_section": [4, 4, 4]}, **sizes))


def batch(processor: GenLIPImageProcessor) -> tuple[Tensor, Tensor, Tensor]:
    """(pixel_values, input_ids, labels) of one plain image per colour, with its name."""
    images = [torch.tensor(colour, dtype=torch.uint8)[:, None, None].expand(3, 48, 48) for colour in COLOURS.values()]
    longest = max(map(len, COLOURS))
    names = [[*name.encode(), *[END] * (longest + 1 - len(name))] for name in COLOURS]
    input_ids = torch.tensor([[BEGIN, *name] for name in names])
    labels = input_ids.clone()
    labels[:, 0] = IGNORED_LABEL
    return processor(images, return_tensors="pt")["pixel_values"], input_ids, labels


def main(arguments: Sequence[str] | None = None) -> float:
    """Train, print losses and generated names, and return the fraction of correct colours."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--encoder", help="exported folder for images of one size (default: a random encoder)")
    parser.add_argument("--train-encoder", action="store_true", help="also train the encoder")
    parser.add_argument("--steps", type=int, default=40, help="training steps")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    if options.encoder:
        encoder = AutoModel.from_pretrained(options.encoder, trust_remote_code=True, dtype=torch.float32)
        processor = AutoImageProcessor.from_pretrained(options.encoder, trust_remote_code=True)
        if getattr(processor, "image_mode", "fixed") != "fixed":
            parser.error(
                f"--encoder {options.encoder}: its images keep their aspect ratio (image_mode = native), but this "
                "example needs images of one size. Export a stage 1 encoder."
            )
    else:
        encoder, processor = small_encoder(), GenLIPImageProcessor(size=48)
    model = VisionLanguageModel(encoder, small_llm(), options.train_encoder).train()
    groups = [{"params": [*model.projector.parameters(), *model.llm.parameters()]}]
    if options.train_encoder:
        groups.append({"params": list(encoder.parameters()), "lr": 3e-4})
    optimizer = torch.optim.AdamW(groups, lr=3e-3)
    pixels, input_ids, labels = batch(processor)
    for step in range(options.steps):
        loss = model(pixels, input_ids, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0 or step == options.steps - 1:
            print(f"step {step}: loss {loss.item():.4f}")
    model.eval()
    tokens = model.generate(pixels, input_ids[:, :1], max_new_tokens=8, do_sample=False)
    right = 0
    for name, row in zip(COLOURS, tokens.tolist(), strict=True):
        said = bytes(token for token in row[: row.index(END) if END in row else None] if token < END)
        print(f"{name}: {said.decode(errors='replace')!r}")
        right += said.decode(errors="replace") == name
    return right / len(COLOURS)


if __name__ == "__main__":
    main()
