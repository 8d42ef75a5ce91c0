"""Text to token ids and back, without TensorFlow: SentencePiece, bytes, Hugging Face.

SentencePiece and bytes have the ids of the T5 papers: pad 0, eos 1, unk 2, and the sentinels
"<extra_id_0>", ... of span corruption (Raffel et al. 2020, arXiv:1910.10683, section 3.1.4) at the
end of the vocabulary. SentencePiece ids equal those of SeqIO's `SentencePieceVocabulary`, byte ids
those of its `ByteVocabulary` (ByT5, Xue et al. 2022, arXiv:2105.13626). GPT-2's byte-level BPE,
BERT's WordPiece and any tokenizer.json have the ids of transformers, which builds them
(`as_transformers.py`); `HuggingFaceTokenizer` says which ids end and pad a text. The data pipeline
uses the same objects (`t5jax/data/bridge/vocabulary.py`), so that training, evaluation and serving
agree by construction.

Each kind of tokenizer has a file of its own; `load.py` finds the tokenizer for a name.
"""

from t5jax.tokenizers.byt5 import ByteTokenizer
from t5jax.tokenizers.common import Tokenizer
from t5jax.tokenizers.hugging_face import HuggingFaceTokenizer
from t5jax.tokenizers.labels import LabelTokenizer
from t5jax.tokenizers.load import MissingTokenizer, load_tokenizer
from t5jax.tokenizers.sentence_piece import SentencePieceTokenizer

__all__ = [
    "ByteTokenizer",
    "HuggingFaceTokenizer",
    "LabelTokenizer",
    "MissingTokenizer",
    "SentencePieceTokenizer",
    "Tokenizer",
    "load_tokenizer",
]
