"""Config files: Python files with `get_config() -> Config`."""

import importlib.util
import inspect

from t5jax import shipped
from t5jax.config.config import Config


def load_config(name_or_path: str) -> Config:
    """Runs a config file and returns what its `get_config()` returns.

    Args:
      name_or_path: a Python file, or the name of one in ./configs or of a shipped config; an
        argument of its `get_config` may follow: "t5_pretrain:large".
    Raises:
      ValueError: if there is no such file, or it does not return a Config.
    """
    name_or_path, argument = split_config_name(name_or_path)
    path = shipped.find("configs", name_or_path)
    spec = importlib.util.spec_from_file_location(f"t5jax_config_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ValueError(
            f"{path} has no get_config(); a config file defines get_config() -> Config"
        )
    takes = inspect.signature(module.get_config).parameters
    if argument and not takes:
        raise ValueError(
            f"{path} has one config, so {argument!r} has no effect; leave :{argument} out"
        )
    config = module.get_config(*([argument] if argument else []))
    if not isinstance(config, Config):
        raise ValueError(f"get_config() in {path} returned {type(config).__name__}, not a Config")
    return config


def split_config_name(name_or_path: str) -> tuple[str, str]:
    """Returns a config's name or path, and the argument behind its colon, or ""."""
    name, _, argument = name_or_path.rpartition(":")
    # A colon in a path, such as that of a drive, is none of ours.
    return (name, argument) if name and not {"/", "\\"} & set(argument) else (name_or_path, "")
