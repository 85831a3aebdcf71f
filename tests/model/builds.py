"""The model of a configuration, for tests that run in processes of their own."""

from __future__ import annotations

from genlip_megatron.config import RunConfig
from genlip_megatron.model.genlip import GenLIP, build_model
from genlip_megatron.model.specs import transformer_config
from genlip_megatron.parallel import groups


def build(config: RunConfig) -> GenLIP:
    """This rank's part of the model, with new process groups."""
    groups.initialize(config)
    return build_model(config, transformer_config(config))[0]
