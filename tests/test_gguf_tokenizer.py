"""Tokenizers in GGUF files: which pre-tokenizer llama.cpp is told, special tokens, and the same ids there."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors, trainers
from tokenizers import pre_tokenizers as pieces
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from axolotl_bitnet.formats.gguf import pretokenizer as gguf_pretokenizer
from axolotl_bitnet.formats.gguf.pretokenizer import find_pretokenizer
from axolotl_bitnet.formats.gguf.tokenizer import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    read_vocabulary,
)
from axolotl_bitnet.storage.atomic import CheckpointError, write_json
from support import TINY
from support.llamas import build, save

TEXTS = [
    *gguf_pretokenizer._TEXTS,
    *("Ünïcödé  \n\n x", "1 22 333 4444 55555 666666", "\n\n\n", "a", "trailing  ", "\t\ttabs", "x=1;y=2"),
    *(
        "ÀÉÎ'S don'T",
        "ﬁ ligature",
        "👍🏽",
        "Zażółć gęślą jaźń",
        "…",
        "\r\nwin\r\n",
        "日本語テキスト。",
        "it''s 's 't",
    ),
    *("foo_bar__baz", "３４５ fullwidth", "<|im_start|>user\nhi<|im_end|>\n"),
]
DOCS = [path.read_text(encoding="utf-8") for path in sorted((TINY.parents[2] / "docs").glob("*.md"))]
CORPUS = [text[:5000] for text in DOCS] + list(gguf_pretokenizer._TEXTS) * 20
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTES = pieces.ByteLevel(add_prefix_space=False)


def split(expression: str) -> pieces.PreTokenizer:
    bytes_only = pieces.ByteLevel(add_prefix_space=False, use_regex=False)
    return pieces.Sequence([pieces.Split(Regex(expression), "isolated"), bytes_only])


def byte_level(
    steps: pieces.PreTokenizer, whole_words: bool = False, nfc: bool = False, size: int = 900
) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(ignore_merges=whole_words))
    tokenizer.pre_tokenizer, tokenizer.decoder = steps, decoders.ByteLevel()
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pieces.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def sentencepiece(first_only: bool = False) -> Tokenizer:
    """As transformers writes Llama 2's: spaces become ▁, bytes are there to fall back on, bos is added."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if first_only:
        tokenizer.pre_tokenizer = pieces.Metaspace(prepend_scheme="first", split=False)
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=special + [f"<0x{i:02X}>" for i in range(256)], max_token_length=16
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    spec = json.loads(tokenizer.to_str())
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] in special]
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


KINDS: dict[str, tuple[str, Callable[[], Tokenizer]]] = {
    "gpt-2": ("gpt-2", lambda: byte_level(BYTES)),
    "digits": ("smollm", lambda: byte_level(pieces.Sequence([pieces.Digits(individual_digits=True), BYTES]))),
    "llama 3": ("llama-bpe", lambda: byte_level(split(WORDS), whole_words=True)),
    "qwen 2": ("qwen2", lambda: byte_level(split(WORDS.replace("{1,3}", "")))),
    "falcon 7b": (
        "falcon",
        lambda: byte_level(
            pieces.Sequence(
                [
                    pieces.Punctuation("contiguous"),
                    BYTES,
                    pieces.Digits(individual_digits=False),
                    pieces.Split(Regex("[0-9][0-9][0-9]"), "isolated"),
                ]
            )
        ),
    ),
    "llama 2": ("default", sentencepiece),
}


def save_tokenizer(tokenizer: Tokenizer, folder: Path, **options: Any) -> Path:
    ends = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    if tokenizer.token_to_id("<s>") is None:
        ends = {"eos_token": "<|im_end|>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **(ends | options)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_the_pre_tokenizer_is_found(tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    name, make = KINDS[kind]
    vocabulary = read_vocabulary(save_tokenizer(make(), tmp_path), 1000)
    assert vocabulary.pre == name and not caplog.records
    assert vocabulary.model == ("llama" if kind == "llama 2" else "gpt2")


@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_gives_the_same_ids(tmp_path: Path, kind: str) -> None:
    pytest.importorskip("gguf")
    pytest.importorskip("xllamacpp")
    from axolotl_bitnet.formats.export import export_gguf
    from support.llamacpp import LlamaCpp

    folder = save_tokenizer(KINDS[kind][1](), tmp_path / "tokenizer")
    model = build(vocab_size=1000, num_hidden_layers=1)
    runner = LlamaCpp(export_gguf(save(model, tmp_path / "latents", folder), tmp_path / "model.gguf"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        assert runner.tokenize(text) == tokenizer(text).input_ids, text


def test_the_tiny_recipe_s_vocabulary() -> None:
    vocabulary = read_vocabulary(TINY / "model", 512)
    assert (vocabulary.model, vocabulary.pre) == ("gpt2", "smollm")
    assert vocabulary.tokens[:3] == ["<|pad|>", "<|im_start|>", "<|im_end|>"]
    assert vocabulary.types[:4] == [CONTROL, CONTROL, CONTROL, NORMAL]
    assert vocabulary.merges[:2] == ["i s", "W h"]
    wanted = {"eos_token_id": 2, "padding_token_id": 0, "add_bos_token": False, "add_eos_token": False}
    assert vocabulary.numbers == wanted
    assert vocabulary.templates == {"default": AutoTokenizer.from_pretrained(TINY / "model").chat_template}


def test_types_padding_and_scores(tmp_path: Path) -> None:
    tokenizer = sentencepiece()
    tokenizer.add_tokens([AddedToken("<tool>", special=False)])
    size = tokenizer.get_vocab_size()
    vocabulary = read_vocabulary(save_tokenizer(tokenizer, tmp_path), size + 3)
    assert vocabulary.types[:4] == [UNKNOWN, CONTROL, CONTROL, BYTE]
    assert vocabulary.types[size - 1 :] == [USER_DEFINED, UNUSED, UNUSED, UNUSED]
    assert vocabulary.tokens[size:] == [f"[PAD{i}]" for i in range(size, size + 3)]
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    first, last = (vocabulary.tokens.index("".join(merges[i])) for i in (0, -1))
    assert vocabulary.scores[first] == 0.0 > vocabulary.scores[last] and not vocabulary.merges
    numbers = vocabulary.numbers
    assert numbers["add_bos_token"] and not numbers["add_eos_token"] and numbers["add_space_prefix"]
    assert (numbers["bos_token_id"], numbers["eos_token_id"], numbers["unknown_token_id"]) == (1, 2, 0)


def test_further_ends_and_templates(tmp_path: Path) -> None:
    folder = save_tokenizer(byte_level(BYTES), tmp_path, chat_template={"default": "a", "tools": "b"})
    write_json(folder / "generation_config.json", {"eos_token_id": [2, 0]})
    vocabulary = read_vocabulary(folder, 1000)
    assert vocabulary.numbers["eos_token_id"] == 2 and vocabulary.numbers["eot_token_id"] == 0
    assert vocabulary.templates == {"default": "a", "tools": "b"}


def test_what_differs_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        read_vocabulary(save_tokenizer(byte_level(split(WORDS), nfc=True), tmp_path / "nfc"), 1000)
        assert "but 1 of" in caplog.text and "get other tokens, 'café" in caplog.text
        read_vocabulary(save_tokenizer(sentencepiece(first_only=True), tmp_path / "first"), 1000)
        assert "texts that begin with a space get one token more" in caplog.text


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no tokenizer"):
        read_vocabulary(tmp_path, 100)
    with pytest.raises(CheckpointError, match="has 512 tokens, the model only 511 embeddings"):
        read_vocabulary(TINY / "model", 511)
    letters = pieces.Sequence([pieces.Split("e", "isolated"), pieces.ByteLevel(False, use_regex=False)])
    cases = {
        "pre-tokenizers of llama.cpp": byte_level(letters),
        "normalizes text": byte_level(BYTES),
        "adds more to a text": byte_level(BYTES),
        "has no merges": byte_level(BYTES, size=200),
        "a WordLevel tokenizer": Tokenizer(models.WordLevel({"a": 0, "<|im_end|>": 1}, unk_token="a")),
        "neither byte-level BPE nor SentencePiece": Tokenizer(
            models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")])
        ),
    }
    cases["normalizes text"].normalizer = normalizers.Lowercase()
    cases["adds more to a text"].post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    for number, (reason, tokenizer) in enumerate(cases.items()):
        folder = save_tokenizer(tokenizer, tmp_path / str(number))
        with pytest.raises(CheckpointError, match=reason):
            read_vocabulary(folder, 1000)
    folder = save_tokenizer(byte_level(BYTES), tmp_path / "broken")
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="its tokenizer cannot be loaded"):
        read_vocabulary(folder, 1000)


def test_the_tokenizer_is_left_as_it_is() -> None:
    tokenizer = byte_level(split(WORDS), nfc=True)
    before = tokenizer.to_str()
    match = find_pretokenizer(tokenizer)
    assert tokenizer.to_str() == before
    assert match is not None and match.name == "llama-bpe" and match.tried > 600
