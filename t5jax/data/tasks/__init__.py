"""The kinds of task, one file a kind: prompted ones, plain text, and SeqIO's own."""
