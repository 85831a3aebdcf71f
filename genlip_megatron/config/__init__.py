# ruff: noqa: F401  what is imported here is what others use
"""The settings of a run: what they are, how they are read, and which combinations are refused."""

from genlip_megatron.config.mixture import source_epochs, source_weights
from genlip_megatron.config.recipes import load_yaml, recipe_names
from genlip_megatron.config.schema import (
    ATTENTION_BACKENDS,
    DEFAULT_PROMPT,
    LINEAR_INPUTS,
    PATCH_SIZE,
    PATCH_VALUES,
    SECTIONS,
    SETTINGS,
    CheckpointConfig,
    DataConfig,
    FaultsConfig,
    LogConfig,
    ModelConfig,
    OnResume,
    ParallelConfig,
    RunConfig,
    TrainConfig,
)
from genlip_megatron.config.suggest import nearest
from genlip_megatron.config.values import LOCAL_LAYERS, ONE_RANK, from_dict, override
