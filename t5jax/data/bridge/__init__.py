"""TensorFlow and SeqIO, and our tokenizers as SeqIO vocabularies."""
