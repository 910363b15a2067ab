"""What is misspelt is refused before PyTorch is imported, which takes seconds."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import sys
from specplug.cli.main import main
try:
    main()
finally:
    heavy = sorted({"torch", "transformers"} & set(sys.modules))
    print("imported:", *heavy)
"""
CONFIG = "--speculative-config"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("generate", "tiny", "--prompt", "x", "--tempratur", "1"), "No such option '--tempratur'"),
        (("generate", "tiny", "--prompt", "x", CONFIG, '{"method": "ngarm"}'), "no speculator named 'ngarm'; did you"),
        (("plan", "tiny", CONFIG, '{"method": "ngarm"}'), "no speculator named 'ngarm'; did you mean 'ngram'?"),
        (("bench", "tiny", CONFIG, '{"method": "ngarm"}'), "no speculator named 'ngarm'; did you mean 'ngram'?"),
        (("chat", "tiny", CONFIG, '{"method": "ngarm"}'), "no speculator named 'ngarm'; did you mean 'ngram'?"),
        (("serve", "tiny", CONFIG, '{"method": "ngarm"}'), "no speculator named 'ngarm'; did you mean 'ngram'?"),
        (("check", "ngarm"), "no speculator named 'ngarm'; did you mean 'ngram'?"),
        (("demo", "--method", "ngarm"), "no speculator named 'ngarm'; did you mean 'ngram'?"),
        (
            ("plan", "tiny", CONFIG, '{"method": "ngram", "prompt_lokup_max": 3}'),
            "unknown key 'prompt_lokup_max' for method 'ngram'; did you mean 'prompt_lookup_max'?",
        ),
        (("check", "ngram", CONFIG, '{"prompt_lokup_max": 3}'), "unknown key 'prompt_lokup_max' for method 'ngram'"),
    ],
)
def test_before_any_import(words: tuple[str, ...], message: str) -> None:
    command = [sys.executable, "-c", SCRIPT, *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    (line,) = done.stderr.splitlines()
    assert message in line
    assert done.stdout == "imported:\n"
    assert done.returncode in (1, 2)
