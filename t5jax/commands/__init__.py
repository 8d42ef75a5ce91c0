"""The commands of `t5jax`, one group per file; a command is a dataclass of its options."""
