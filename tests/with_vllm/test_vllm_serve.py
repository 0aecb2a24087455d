"""``vllm serve FOLDER`` as a process: it finds the plugin by its entry point, and answers over HTTP."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from axolotl_bitnet import load_packed
from support import TINY
from support.greedy import Greedy, greedy
from support.packed_models import pack

pytestmark = pytest.mark.timeout(1800)

COUNT = 10
CLEAR = 0.1  # tokens that are ahead by more are the same in both engines
QUESTIONS = [f"What is {number} + {3 * number + 1}?" for number in range(1, 25)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    def __init__(self, process: subprocess.Popen[bytes], log: Path, port: int):
        self.process, self.log, self.url = process, log, f"http://127.0.0.1:{port}"

    def ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=300) as answer:
            return json.loads(answer.read() or b"{}")

    def wait(self, seconds: float) -> bool:
        """Whether it comes up; False if it ends."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None:
            try:
                self.ask("/health")
                return True
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(1)
        return False


@contextmanager
def serving(folder: Path, log: Path, *options: str) -> Iterator[Server]:
    """``vllm serve``, and the end of all of its processes."""
    port = free_port()
    command = [str(Path(sys.executable).parent / "vllm"), "serve", str(folder), "--port", str(port), *options]
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with (
        log.open("wb") as file,
        subprocess.Popen(
            command, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        ) as process,
    ):
        try:
            yield Server(process, log, port)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(60)
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small packed model with the tiny recipe's tokenizer and its chat template."""
    length = len(AutoTokenizer.from_pretrained(TINY / "model"))
    return pack(tmp_path_factory.mktemp("served"), attention_bias=True, vocab_size=max(512, length))


def clearest(model: Any, prompts: list[list[int]]) -> tuple[int, Greedy]:
    """The prompt, by its number, after which most tokens are beyond doubt."""
    said = [greedy(model, ids, COUNT) for ids in prompts]
    best = max(range(len(said)), key=lambda number: len(said[number].certain(CLEAR)))
    assert len(said[best].certain(CLEAR)) >= 3
    return best, said[best]


def turn(question: str) -> dict[str, str]:
    return {"role": "user", "content": question}


def test_completions_and_chat(folder: Path, tmp_path: Path) -> None:
    tokenizer, model = AutoTokenizer.from_pretrained(folder), load_packed(folder, dtype=torch.float32)
    prompts = [tokenizer(question)["input_ids"] for question in QUESTIONS]
    chats = [
        tokenizer.apply_chat_template([turn(question)], add_generation_prompt=True)["input_ids"]
        for question in QUESTIONS
    ]
    (prompt, after_prompt), (chat, after_chat) = clearest(model, prompts), clearest(model, chats)
    options = ["--dtype", "float32", "--max-model-len", "128", "--enforce-eager"]  # compiled: the other file
    with serving(folder, tmp_path / "log", *options) as server:
        assert server.wait(1500), server.log.read_text(errors="replace")[-6000:]
        how = {"model": str(folder), "temperature": 0, "max_tokens": COUNT, "ignore_eos": True}
        how["return_token_ids"] = True
        completed = server.ask("/v1/completions", how | {"prompt": QUESTIONS[prompt]})["choices"][0]
        answered = server.ask("/v1/chat/completions", how | {"messages": [turn(QUESTIONS[chat])]})
    certain = after_prompt.certain(CLEAR)
    assert completed["token_ids"][: len(certain)] == certain
    assert completed["text"] == tokenizer.decode(completed["token_ids"], skip_special_tokens=True)
    assert answered["prompt_token_ids"] == chats[chat]  # by the folder's template
    certain, (choice,) = after_chat.certain(CLEAR), answered["choices"]
    assert choice["token_ids"][: len(certain)] == certain
    assert choice["message"]["content"] == tokenizer.decode(choice["token_ids"], skip_special_tokens=True)


def test_tensor_parallelism_is_refused_with_the_reason(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|0")  # else two workers need two NUMA nodes
    options = ["--tensor-parallel-size", "2", "--max-model-len", "128", "--enforce-eager"]
    with serving(folder, tmp_path / "log", *options) as server:
        assert not server.wait(1500) and server.process.poll()
    said = server.log.read_text(errors="replace")
    assert "cannot be served with --tensor-parallel-size above 1: a slice of packed bytes is no slice" in said
