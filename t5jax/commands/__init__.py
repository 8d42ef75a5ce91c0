"""The commands of `t5jax`, one group a file. Each is a dataclass, whose fields are its options."""
