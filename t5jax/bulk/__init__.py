"""Files of prompts in, files of answers out, of any size."""
