"""Text tasks: documents and the objective that makes examples of their tokens."""
