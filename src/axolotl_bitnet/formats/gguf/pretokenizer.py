"""Which of llama.cpp's pre-tokenizers splits text as a tokenizer does.

llama.cpp knows pre-tokenizers by name, and its own converter looks the name up by a hash of some token ids,
so a new vocabulary is never known. Here the candidates are built again from their expressions, and the one is
taken that gives the same ids for many texts: words of the vocabulary and texts that distinguish
pre-tokenizers (digits, contractions, spaces, punctuation, other scripts).
"""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import Regex, Tokenizer
from tokenizers.pre_tokenizers import ByteLevel, PreTokenizer, Sequence, Split

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_ENDINGS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = _ENDINGS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|"
_UPPER, _LOWER = r"((?=[\p{L}])([^a-z]))", r"((?=[\p{L}])([^A-Z]))"  # llama.cpp's stand-ins for cases
_CASED = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+<ending>|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*<ending>"
    r"|\p{N}<digits>| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class _Known:
    """A pre-tokenizer of llama.cpp: its expressions, applied one after the other, and whether whole words are
    looked up before merging."""

    name: str
    expressions: tuple[str, ...]
    whole_words: bool = False


_KNOWN = (
    _Known("llama-bpe", (_WORDS + r"\p{N}{1,3}" + _REST,), whole_words=True),
    _Known("smaug-bpe", (_WORDS + r"\p{N}{1,3}" + _REST,)),
    _Known("smollm", (r"\p{N}", _GPT2)),
    _Known("gpt-2", (_GPT2,)),
    _Known("qwen2", (_WORDS + r"\p{N}" + _REST,)),
    _Known("tekken", (_CASED.replace("<ending>", "").replace("<digits>", ""),), whole_words=True),
    _Known("gpt-4o", (_CASED.replace("<ending>", f"{_ENDINGS}?").replace("<digits>", "{1,3}"),)),
    _Known("falcon", (r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]")),
)

_TEXTS = (
    "Hello, world! How are you today?",
    "I've told you: he'll say it isn't; they'RE here, WE'D go, it'S mine, don'T.",
    "What is 17 + 25? 1234567890 3.14159 1,000,000 2024-11-23 007 x2y3 100% 5th",
    "  two  spaces   three    four\tand\ttabs \t mixed",
    "line\nbreaks\n\nand\r\n\r\nmore\n \n  \n end\n",
    "for (int i = 0; i < 10; ++i) { a[i] += b->c(i) * 2; }  // comment\n",
    "def f(x):\n    return x**2 if x != 0 else None\n\n\n",
    '{"key": [1, 2.5, null], "url": "https://example.org/a?b=c&d=e#f"}',
    "$100 ~ 50€ <b>bold</b> a_b-c/d\\e ^_^ `code` ... !!! ??? --- ===",
    "café naïve Übermaß Łódź İstanbul déjà-vu e\u0301 n\u0303",
    "Привет, мир! Год 2024. Καλημέρα κόσμε",
    "我想在apple工作1314151天～ 你好，世界。こんにちは 안녕하세요",
    "مرحبا بالعالم ١٢٣ नमस्ते १२३ สวัสดี",
    "🚀 rockets 🦙🦙 and 👨\u200d👩\u200d👧 ✅ ½ ² Ⅷ ©™",
    "'quoted' \"double\" “curly” ‘single’ it’s — dash – range",
    "CamelCase HTTPServer iPhone NASA's eBay mL don't_stop ALLCAPS",
    "\u00a0nbsp\u00a0 \u3000wide \u200bzero\ufeff end ",
)
_WORDS_TRIED = 2000
_MOST_WRONG = 0.2  # of the texts above; words of the vocabulary are split alike by most


@dataclass(frozen=True)
class Match:
    """llama.cpp's name of a pre-tokenizer, and texts that it tokenizes otherwise than the tokenizer."""

    name: str
    wrong: tuple[str, ...]
    tried: int


def find_pretokenizer(tokenizer: Tokenizer) -> Match | None:
    """The pre-tokenizer of llama.cpp that gives the same ids for all texts tried, or else for the most; None
    if even that one splits text in another way.

    Args:
        tokenizer: byte-level BPE. Left as it is.
    """
    texts = [*_TEXTS, *_vocabulary_texts(tokenizer)]
    wanted = _ids(tokenizer, texts)
    cuts = _cuts(tokenizer.pre_tokenizer, texts)
    twin = Tokenizer.from_str(tokenizer.to_str())
    twin.normalizer = None  # llama.cpp has none
    best: tuple[tuple[int, int], Match] | None = None
    for known in _KNOWN:
        twin.pre_tokenizer = Sequence(
            [Split(Regex(each), "isolated") for each in known.expressions]
            + [ByteLevel(add_prefix_space=False, use_regex=False)]
        )
        twin.model.ignore_merges = known.whole_words
        found = _ids(twin, texts)
        wrong = tuple(text for text, a, b in zip(texts, wanted, found, strict=True) if a != b)
        uneven = sum(a != b for a, b in zip(cuts, _cuts(twin.pre_tokenizer, texts), strict=True))
        rank = (len(wrong), uneven)  # the same ids; among those, the same pieces
        if best is None or rank < best[0]:
            best = rank, Match(known.name, wrong, len(texts))
    assert best is not None
    match = best[1]
    return match if len(set(match.wrong) & set(_TEXTS)) <= _MOST_WRONG * len(_TEXTS) else None


def _vocabulary_texts(tokenizer: Tokenizer) -> list[str]:
    size = tokenizer.get_vocab_size(with_added_tokens=False)
    step = max(1, size // _WORDS_TRIED)
    words = (tokenizer.decode([i], skip_special_tokens=True) for i in range(0, size, step))
    return [word for word in words if word and "\ufffd" not in word]


def _ids(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    return [each.ids for each in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def _cuts(pieces: PreTokenizer | None, texts: list[str]) -> list[list[str]]:
    texts = list(texts[: len(_TEXTS)])
    return [[piece for piece, _ in pieces.pre_tokenize_str(text)] if pieces else [text] for text in texts]
