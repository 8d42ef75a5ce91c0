"""The config of a run: frozen dataclasses, config files, and conversion to and from JSON.

A config file is a Python file with `get_config() -> Config`. The command line overrides its fields
(`--data.batch-size 64`); `t5jax train --help` prints their docstrings. Plain Python without jax, so
that it loads quickly.
"""

from t5jax.config.adapter import AdapterConfig, LoraConfig, PromptConfig
from t5jax.config.config import Config
from t5jax.config.data import DataConfig, InitConfig
from t5jax.config.files import load_config, split_config_name
from t5jax.config.loss import DistillConfig, LossConfig
from t5jax.config.mesh import MESH_AXES, AxisRules, MeshConfig
from t5jax.config.optimizer import OptimizerConfig
from t5jax.config.patterns import parse_patterns
from t5jax.config.plain import from_json, override, to_json
from t5jax.config.prune import PruneConfig
from t5jax.config.quantize import QuantizeConfig
from t5jax.config.train import CheckpointConfig, EvalConfig, TrainConfig
from t5jax.config.watch import WatchConfig

__all__ = [
    "MESH_AXES",
    "AdapterConfig",
    "AxisRules",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "DistillConfig",
    "EvalConfig",
    "InitConfig",
    "LoraConfig",
    "LossConfig",
    "MeshConfig",
    "OptimizerConfig",
    "PromptConfig",
    "PruneConfig",
    "QuantizeConfig",
    "TrainConfig",
    "WatchConfig",
    "from_json",
    "load_config",
    "override",
    "parse_patterns",
    "split_config_name",
    "to_json",
]
