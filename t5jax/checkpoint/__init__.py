"""Checkpoints of a run, by Orbax: the train state, the loop's state with its data, the config.

    run_dir/
      t5jax_config.json      the config as last started
      tokenizer/             files that Hugging Face loads too
      checkpoints/STEP/      state, loop, config, metrics, checksums; complete or absent

Every file is compared with its checksum before a checkpoint is read.
"""

import logging

from t5jax.checkpoint.damage import check, newest_sound
from t5jax.checkpoint.finding import (
    best_checkpoint,
    best_loss,
    is_checkpoint,
    is_evaluated,
    latest_checkpoint,
    validation_loss,
)
from t5jax.checkpoint.reading import is_imported, load_params, read_base, read_config, read_loop
from t5jax.checkpoint.run_dir import (
    CHECKPOINTS_DIR,
    CONFIG_FILE,
    TOKENIZER_DIR,
    changed_settings,
    check_same_run,
    check_writable_name,
    create_run_dir,
    is_run,
    read_run_config,
    write_config,
)
from t5jax.checkpoint.writing import Checkpoints

__all__ = [
    "CHECKPOINTS_DIR",
    "CONFIG_FILE",
    "TOKENIZER_DIR",
    "Checkpoints",
    "best_checkpoint",
    "best_loss",
    "changed_settings",
    "check",
    "check_same_run",
    "check_writable_name",
    "create_run_dir",
    "is_checkpoint",
    "is_evaluated",
    "is_imported",
    "is_run",
    "latest_checkpoint",
    "load_params",
    "newest_sound",
    "read_base",
    "read_config",
    "read_loop",
    "read_run_config",
    "validation_loss",
    "write_config",
]

# Orbax reports every step of a save, warns of each checkpoint without a validation loss, and logs
# the traceback of what it raises.
logging.getLogger("absl").setLevel(logging.CRITICAL)
logging.getLogger("asyncio").addFilter(lambda record: "orbax" not in record.getMessage())
