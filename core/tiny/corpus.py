"""Collect the `tiny` target's corpus and train its tokenizer.

The corpus is the Python source of the running interpreter's own standard library (PSF-2.0), plus rename exercises
derived from it: a function as it is, then the same function with one identifier renamed. The exercises teach the
model to copy from its prompt, which code editing (and so speculative decoding on it) lives on.

    python core/tiny/corpus.py --out build/tiny
"""

from __future__ import annotations

import argparse
import ast
import builtins
import hashlib
import json
import keyword
import random
import re
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

VOCABULARY = 4096
END_OF_TEXT = "<|endoftext|>"
SKIPPED = re.compile(r"site-packages|lib2to3/tests/data|/encodings/|cjkencodings|test_unicode_identifiers|__pycache__")
HELD_OUT_PERCENT = 2


def source_files() -> list[Path]:
    """Every readable UTF-8 source of the standard library, without installed packages and tables."""
    root = Path(sysconfig.get_paths()["stdlib"])
    return sorted(path for path in root.rglob("*.py") if not SKIPPED.search(path.as_posix()))


def documents() -> Iterator[tuple[str, str]]:
    """Yields (path below the library, text) of every source that parses and holds mostly ASCII."""
    root = Path(sysconfig.get_paths()["stdlib"])
    seen: set[str] = set()
    for path in source_files():
        try:
            text = path.read_text(encoding="utf-8")
            ast.parse(text)
        except (UnicodeDecodeError, SyntaxError, ValueError):
            continue
        digest = hashlib.sha256(text.encode()).hexdigest()
        ascii_share = sum(character < "\x80" for character in text) / max(len(text), 1)
        if digest not in seen and len(text) > 200 and ascii_share > 0.98:
            seen.add(digest)
            yield path.relative_to(root).as_posix(), text


def held_out(path: str) -> bool:
    """Whether a file belongs to the validation split (decided by its name, so that it never moves)."""
    return int(hashlib.sha256(path.encode()).hexdigest(), 16) % 100 < HELD_OUT_PERCENT


def functions(text: str) -> Iterator[str]:
    """Yields the dedented source of every function of 4 to 30 lines."""
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and 4 <= node.end_lineno - node.lineno + 1 <= 30:
            body = lines[node.lineno - 1 : node.end_lineno]
            yield "\n".join(line[node.col_offset :] if line[: node.col_offset].isspace() else line for line in body)


def rename_exercise(function: str, names: list[str], rng: random.Random) -> str | None:
    """Returns the function, an instruction, and the function with one identifier renamed."""
    used = set(re.findall(r"\b[a-z_]\w{2,}\b", function)) - set(keyword.kwlist) - set(dir(builtins)) - {"self", "cls"}
    candidates = sorted(name for name in used if len(re.findall(rf"\b{name}\b", function)) >= 2)
    if not candidates:
        return None
    old, new = rng.choice(candidates), rng.choice(names)
    if new in used:
        return None
    return f"# Before:\n{function}\n\n# After renaming {old} to {new}:\n" + re.sub(rf"\b{old}\b", new, function) + "\n"


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Trains a byte-level BPE of `VOCABULARY` entries, so that any text encodes without an unknown token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for tokenizer.json, train.bin and held_out.bin")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)

    rng = random.Random(0)
    corpus = list(documents())
    tokenizer = train_tokenizer([text for path, text in corpus if not held_out(path)])
    tokenizer.save(str(out / "tokenizer.json"))

    names = sorted(
        set(re.findall(r"\b[a-z][a-z_]{3,14}\b", " ".join(text for _, text in corpus))) - set(keyword.kwlist)
    )
    splits: dict[bool, list[str]] = {False: [], True: []}
    exercises: dict[bool, list[str]] = {False: [], True: []}
    for path, text in corpus:
        splits[held_out(path)].append(text)
        made = (rename_exercise(function, names, rng) for function in functions(text))
        exercises[held_out(path)].extend(exercise for exercise in made if exercise)
    summary = {"python": sys.version.split()[0], "licence": "PSF-2.0", "files": len(corpus), "vocabulary": VOCABULARY}
    for is_held_out, name in ((False, "train"), (True, "held_out")):
        texts = splits[is_held_out] + exercises[is_held_out]
        rng.shuffle(texts)
        encoded = tokenizer.encode_batch([END_OF_TEXT + text for text in texts])
        ids = np.concatenate([np.array(item.ids, dtype=np.uint16) for item in encoded])
        ids.tofile(out / f"{name}.bin")
        summary[name] = {
            "files": len(splits[is_held_out]),
            "rename_exercises": len(exercises[is_held_out]),
            "bytes": sum(len(text.encode()) for text in texts),
            "tokens": len(ids),
        }
    (out / "corpus.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(json.dumps(summary, indent=2))


if __name__ == "__main__":
    main()
