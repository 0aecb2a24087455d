"""English documentation and prose out of Debian packages, as token files, for the study of conversion.

    apt-get download $(python experiments/convert_data.py --packages)      # bookworm: 315 MB
    for f in *.deb; do dpkg -x $f docs/${f%%_*}; done
    bible -f -p docs/bible-kjv-text/usr/lib/ "ge1:1-rev22:21" > kjv.txt    # from the package bible-kjv
    python experiments/convert_data.py docs kjv.txt MODEL_FOLDER OUT

OUT gets ``train.npy`` and ``held_out.npy`` (uint16 tokens; documents end with the tokenizer's end of text),
``kjv.npy`` and ``kjv_held_out.npy`` (the last tenth of the lines), and ``sources.csv``.

HTML loses its tags, scripts and menus; a paragraph is kept where it first occurs (held-out documents are read
first, so nothing of theirs is in the training text), if it is 60 characters or longer, mostly letters, and
ASCII but for 3 %. A package gives at most 12 million characters. The Bible's training lines are mixed in.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import html
import os
import random
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from shared import write_csv

PACKAGES = [
    "linux-doc-6.1",
    "python3.11-doc",
    "debian-reference-en",
    "debian-handbook",
    "developers-reference",
    "anarchism",
    "postgresql-doc-15",
    "gimp-help-en",
    "bible-kjv-text",
    "perl-doc",
    "git-doc",
    "octave-doc",
    "sqlite3-doc",
    "apache2-doc",
    "python-django-doc",
    "debian-policy",
    "jargon-text",
    "gap-doc",
    "libreoffice-help-en-us",
    "nodejs-doc",
    "rust-doc",
    "python-scipy-doc",
    "python-sympy-doc",
    "python-pandas-doc",
    "cppreference-doc-en-html",
    "libboost1.81-doc",
    "maint-guide",
    "doc-debian",
    "manpages",
    "manpages-dev",
    "ghc-doc",
]

MOST = 12_000_000  # characters of a package
HELD_OUT = 40  # one document in so many
OTHER_LANGUAGES = re.compile(
    r"/translations/|/(?!en)[a-z]{2}-[A-Z]{2}/|\.(de|fr|es|ja|ko|tr|pt-br|zh-cn|da|ru)\b"
)
DROPPED = re.compile(r"(?is)<(script|style|nav|head|svg|footer)\b.*?</\1\s*>|<!--.*?-->")
BREAKS = re.compile(
    r"(?i)</?(p|div|li|ul|ol|dl|dt|dd|tr|table|h[1-6]|pre|section|article|blockquote|br)\b[^>]*>"
)
TAGS = re.compile(r"<[^>]*>")
ROFF = re.compile(r"(?m)^[.'].*$|\\f[BIRP]|\\&")


def documents(folder: Path) -> Iterator[tuple[str, str]]:
    """Path and text of a package's documents, in an order of their own."""
    paths = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    for path in sorted(paths, key=lambda path: hashlib.md5(str(path.relative_to(folder)).encode()).digest()):
        name = path.name.removesuffix(".gz")
        kind = name.rsplit(".", 1)[-1].lower() if "." in name else ""
        if kind not in ("html", "htm", "txt", "rst", "md", "pod", "1", "2", "3", "4", "5", "7", "8"):
            continue
        if OTHER_LANGUAGES.search(str(path)) or "changelog" in name.lower() or "/src/" in str(path):
            continue
        data = path.read_bytes()
        text = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode("utf-8", "replace")
        if kind in ("html", "htm"):
            text = html.unescape(TAGS.sub("", BREAKS.sub("\n\n", DROPPED.sub(" ", text))))
        elif kind.isdigit():
            text = ROFF.sub("", text)
        yield str(path.relative_to(folder)), text


def paragraphs(text: str, seen: set[bytes]) -> list[str]:
    kept = []
    for part in re.split(r"\n\s*\n", text.replace("\r", "")):
        part = re.sub(r"[ \t]+", " ", part).strip()
        if len(part) < 60 or sum(c.isalpha() or c == " " for c in part) < 0.75 * len(part):
            continue
        if sum(ord(c) > 126 for c in part) > 0.03 * len(part):
            continue
        key = hashlib.blake2b(re.sub(r"\W+", "", part.lower()).encode(), digest_size=8).digest()
        if key not in seen:
            seen.add(key)
            kept.append(part)
    return kept


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--packages", action="store_true", help="print the packages' names and leave")
    parser.add_argument("docs", type=Path, nargs="?")
    parser.add_argument("kjv", type=Path, nargs="?")
    parser.add_argument("model", type=Path, nargs="?", help="folder with a GGUF file, for its tokenizer")
    parser.add_argument("out", type=Path, nargs="?")
    args = parser.parse_args()
    if args.packages:
        print(" ".join(PACKAGES))
        return 0
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    from transformers import AutoTokenizer

    gguf = next(args.model.glob("*.gguf"))
    tokenizer = AutoTokenizer.from_pretrained(args.model, gguf_file=gguf.name)

    seen: set[bytes] = set()
    train: list[str] = []
    held: list[str] = []
    rows = []
    found = {p: list(documents(args.docs / p)) for p in PACKAGES if (args.docs / p).is_dir()}
    for package, texts in found.items():
        for name, text in texts:
            if hashlib.md5(f"{package}/{name}".encode()).digest()[0] % HELD_OUT == 0:
                held.append("\n\n".join(paragraphs(text, seen)))
    held = [text for text in held if len(text) > 1500]
    for package, texts in found.items():
        size = count = 0
        for name, text in texts:
            if hashlib.md5(f"{package}/{name}".encode()).digest()[0] % HELD_OUT == 0 or size > MOST:
                continue
            text = "\n\n".join(paragraphs(text, seen))
            if len(text) > 300:
                train.append(text)
                size, count = size + len(text), count + 1
        rows.append({"package": package, "documents": count, "characters": size})
        print(package, count, size, flush=True)
    lines = [line.strip() for line in args.kjv.read_text(encoding="utf-8").splitlines() if line.strip()]
    edge = len(lines) * 9 // 10
    bible = ["\n".join(lines[i : i + 60]) for i in range(0, edge, 60)]
    rows.append({"package": "kjv", "documents": len(bible), "characters": sum(map(len, bible))})
    train += bible
    random.Random(0).shuffle(train)
    random.Random(1).shuffle(held)

    args.out.mkdir(parents=True, exist_ok=True)
    write_csv(args.out / "sources.csv", rows)
    end = tokenizer.eos_token_id
    for name, texts in (("held_out", held), ("train", train)):
        pieces: list[int] = []
        for start in range(0, len(texts), 1000):
            for ids in tokenizer(texts[start : start + 1000])["input_ids"]:
                pieces += [*ids, end]
        np.save(args.out / f"{name}.npy", np.array(pieces, dtype=np.uint16))
        print(name, len(texts), "documents,", len(pieces), "tokens", flush=True)
    for name, part in (("kjv", lines[:edge]), ("kjv_held_out", lines[edge:])):
        np.save(args.out / f"{name}.npy", np.array(tokenizer("\n".join(part))["input_ids"], dtype=np.uint16))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
