"""Folders of tiny models as transformers writes them, with tokenizers of the published form.

Weights are random; tokenizers are trained on a few lines.
"""

import io
import json

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

LINES = [
    "The quick brown fox jumps over the lazy dog.",
    "She sells sea shells by the sea shore, he said.",
    "What is the capital of France? It is Paris.",
    "Numbers such as 12, 7 and 2026 are read digit by digit.",
]


# --- Tokenizers -----------------------------------------------------------------------------------


def byte_level(specials: list[str], bos: str | None = None) -> Tokenizer:
    """Byte-level BPE, as in GPT-2, Qwen and Llama 3; only with `bos` do texts begin with it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=alphabet, show_progress=False, special_tokens=specials
    )
    tokenizer.train_from_iterator(LINES, trainer)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    if bos:
        tokenizer.post_processor = processors.Sequence(
            [processors.ByteLevel(trim_offsets=False), starting_with(tokenizer, bos)]
        )
    return tokenizer


def sentence_piece_like(specials: list[str], bos: str, prefix_space: bool) -> Tokenizer:
    """BPE with spaces as "▁", as in Llama 2 and Mistral (prefix_space) and Gemma."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    if prefix_space:
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        strip = [decoders.Strip(" ", 1, 0)]
    else:
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        strip = []
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), *strip])
    trainer = trainers.BpeTrainer(vocab_size=200, show_progress=False, special_tokens=specials)
    tokenizer.train_from_iterator(LINES, trainer)
    tokenizer.post_processor = starting_with(tokenizer, bos)
    return tokenizer


def starting_with(tokenizer: Tokenizer, bos: str):
    return processors.TemplateProcessing(
        single=f"{bos} $A",
        pair=f"{bos} $A {bos} $B",
        special_tokens=[(bos, tokenizer.token_to_id(bos))],
    )


def write_tokenizer(folder, tokenizer: Tokenizer, **config) -> None:
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def write_spiece(folder) -> None:
    """T5's tokenizer: a SentencePiece model, and sentinels in its configuration."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES),
        model_writer=model,
        vocab_size=59,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    (folder / "spiece.model").write_bytes(model.getvalue())
    names = [f"<extra_id_{i}>" for i in range(10)]
    config = {
        "tokenizer_class": "T5Tokenizer",
        "extra_ids": 10,
        "additional_special_tokens": names,
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def unigram(pad_id: int) -> Tokenizer:
    """T5's kind of vocabulary with other ids: pad 1 and eos 2, or pad 0 and eos 1."""
    specials = ["<pad>", "</s>", "<unk>"]
    if pad_id:
        specials = ["<unk>", "<pad>", "</s>"]
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=100, show_progress=False, special_tokens=specials, unk_token="<unk>"
    )
    tokenizer.train_from_iterator(LINES, trainer)
    tokenizer.add_special_tokens([AddedToken("<extra_id_0>", special=True)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>",
        pair="$A </s> $B </s>",
        special_tokens=[("</s>", tokenizer.token_to_id("</s>"))],
    )
    return tokenizer


# --- Models ---------------------------------------------------------------------------------------


def write_model(folder, model_type: str, often=(), seed=3, **config) -> None:
    """Writes a model of transformers with random weights, wide enough that its texts differ.

    The library fills config.json in, and writes a generation_config.json. Ids that are written
    `often` have large embeddings.
    """
    import torch
    import transformers

    torch.manual_seed(seed)
    described = transformers.AutoConfig.for_model(model_type, **config)
    kind = "Seq2SeqLM" if described.is_encoder_decoder else "CausalLM"
    if model_type == "bert":
        kind = ""
    model = getattr(transformers, f"AutoModel{'For' if kind else ''}{kind}").from_config(described)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(0, 0.4)
        if "gemma" in model_type:  # It multiplies them by the root of the width.
            for name, weight in model.named_parameters():
                if "embed_tokens" in name:
                    weight *= 0.1
        for i in often:
            model.get_input_embeddings().weight[i] *= 1.3
    model.save_pretrained(folder)


def edit(path, **values) -> None:
    """Changes keys of a JSON file; `...` removes one."""
    content = json.loads(path.read_text()) | values
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not ...}))


STACK = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}


def write_folder(folder, name: str) -> None:
    """Writes the folder of one of FOLDERS."""
    folder.mkdir(parents=True, exist_ok=True)
    _WRITERS[name](folder)


def _t5(folder):
    ids = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    write_model(folder, "t5", often=range(59, 69), vocab_size=72, **T5, **ids)
    write_spiece(folder)


def _padding_1(folder, family):
    """Padding is 1, as in Pile-T5 and other vocabularies of Llama's form."""
    ids = {"pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    tokenizer = unigram(1)
    write_model(folder, family, vocab_size=tokenizer.get_vocab_size() + 3, **T5, **ids)
    tokens = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    write_tokenizer(folder, tokenizer, tokenizer_class="PreTrainedTokenizerFast", **tokens)


def _gpt2(folder):
    tokenizer = byte_level(["<|endoftext|>"])
    ids = {"bos_token_id": 0, "eos_token_id": 0}
    shape = {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 96}
    write_model(folder, "gpt2", vocab_size=tokenizer.get_vocab_size(), **shape, **ids)
    tokens = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    write_tokenizer(folder, tokenizer, tokenizer_class="GPT2Tokenizer", **tokens)


def _qwen3(folder):
    tokenizer = byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    shape = STACK | {"vocab_size": tokenizer.get_vocab_size() + 5}
    write_model(folder, "qwen3", **shape, bos_token_id=0, eos_token_id=2)
    tokens = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "bos_token": None}
    write_tokenizer(folder, tokenizer, tokenizer_class="Qwen2Tokenizer", **tokens)


def _llama(folder):
    """Llama 3's form: bytes, and a post-processor that begins texts."""
    names = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
    tokenizer = byte_level(names, names[0])
    shape = STACK | {"vocab_size": tokenizer.get_vocab_size()}
    write_model(folder, "llama", **shape, bos_token_id=0, eos_token_id=[1, 2])
    tokens = {"bos_token": names[0], "eos_token": names[2]}
    write_tokenizer(folder, tokenizer, tokenizer_class="PreTrainedTokenizerFast", **tokens)


def _mistral(folder):
    """Llama 2's form."""
    tokenizer = sentence_piece_like(["<unk>", "<s>", "</s>"], "<s>", True)
    shape = STACK | {"vocab_size": tokenizer.get_vocab_size(), "sliding_window": None}
    write_model(folder, "mistral", **shape, bos_token_id=1, eos_token_id=2)
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    write_tokenizer(folder, tokenizer, tokenizer_class="PreTrainedTokenizerFast", **tokens)


_GEMMA = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]


def _gemma_tokenizer(folder) -> Tokenizer:
    tokenizer = sentence_piece_like(_GEMMA, "<bos>", False)
    tokens = {f"{token[1:-1]}_token": token for token in _GEMMA[:4]}
    write_tokenizer(folder, tokenizer, tokenizer_class="PreTrainedTokenizerFast", **tokens)
    return tokenizer


def _gemma(folder, family):
    tokenizer = _gemma_tokenizer(folder)
    shape = STACK | {"vocab_size": tokenizer.get_vocab_size(), "sliding_window": 8}
    shape |= {"num_hidden_layers": 2}  # A local one, and a global one.
    ids = {"pad_token_id": 0, "eos_token_id": [1, 5], "bos_token_id": 2}
    write_model(folder, family, **shape, **ids, query_pre_attn_scalar=8)


def _t5gemma(folder):
    tokenizer = _gemma_tokenizer(folder)
    side = STACK | {"vocab_size": tokenizer.get_vocab_size(), "sliding_window": 8}
    ids = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    side |= {"query_pre_attn_scalar": 8, **ids}
    write_model(folder, "t5gemma", encoder=side, decoder=side, vocab_size=side["vocab_size"], **ids)


def _bert(folder):
    letters = sorted({c for line in LINES for c in line.lower() if c != " "})
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokens = [*specials, *letters, *(f"##{c}" for c in letters), "the", "sea", "##ick"]
    shape = {k: v for k, v in STACK.items() if k not in ("num_key_value_heads", "head_dim")}
    write_model(folder, "bert", vocab_size=len(tokens), **shape)
    (folder / "vocab.txt").write_text("".join(f"{token}\n" for token in tokens))
    config = {"tokenizer_class": "BertTokenizer", "do_lower_case": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


_WRITERS = {
    "t5": _t5,
    "umt5": lambda folder: _padding_1(folder, "umt5"),
    "pile_t5": lambda folder: _padding_1(folder, "t5"),
    "t5gemma": _t5gemma,
    "gpt2": _gpt2,
    "qwen3": _qwen3,
    "llama": _llama,
    "mistral": _mistral,
    "gemma2": lambda folder: _gemma(folder, "gemma2"),
    "gemma3": lambda folder: _gemma(folder, "gemma3_text"),
    "bert": _bert,
}
FOLDERS = tuple(_WRITERS)
