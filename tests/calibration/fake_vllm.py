"""An OpenAI server whose one engine takes, in real time, exactly what a StepModel says."""

import json
import queue
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Sequence:
    def __init__(self, prompt: int, output: int) -> None:
        self.context, self.left = prompt, output
        self.tokens: queue.Queue[bool] = queue.Queue()


class Engine(threading.Thread):
    """Whole prompts are prefilled along with everybody's decoding, one iteration after the other."""

    def __init__(self, step: Any, slower: float) -> None:
        super().__init__(daemon=True)
        self.step, self.slower, self.waiting, self.stopped = step, slower, queue.Queue(), False

    def run(self) -> None:
        decoding: list[Sequence] = []
        while not self.stopped:
            fresh = []
            try:
                if not decoding:
                    fresh.append(self.waiting.get(timeout=0.2))
                    time.sleep(0.002 * self.slower)  # those sent together come together
                while True:
                    fresh.append(self.waiting.get_nowait())
            except queue.Empty:
                pass
            if not decoding and not fresh:
                continue
            seconds = self.step.iteration_s(
                len(decoding) + sum(each.context for each in fresh),
                len(decoding) + len(fresh),
                sum(each.context for each in decoding),
                sum(each.context * (each.context + 1) // 2 for each in fresh),
            )
            time.sleep(seconds * self.slower)
            decoding += fresh
            for each in decoding:
                each.context, each.left = each.context + 1, each.left - 1
                each.tokens.put(each.left > 0)
            decoding = [each for each in decoding if each.left]


@contextmanager
def fake_vllm(step: Any, *, num_gpu_blocks: int, max_model_len: int, slower: float = 1.0) -> Iterator[str]:
    """The URL of a server that serves the model "fake" until the block ends.

    ``slower``: in slow motion, so that what a busy machine adds is so many times less.
    """
    engine = Engine(step, slower)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            blocks = f'vllm:cache_config_info{{block_size="16",num_gpu_blocks="{num_gpu_blocks}"}} 1.0'
            pages = {
                "/v1/models": json.dumps({"data": [{"id": "fake", "max_model_len": max_model_len}]}),
                "/version": json.dumps({"version": "0.11.2"}),
                "/metrics": blocks,
            }
            self._answer(200 if self.path in pages else 404, pages.get(self.path, "not found"))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if len(body["prompt"]) + body["max_tokens"] > max_model_len:
                self._answer(400, '{"message": "too long"}')
                return
            sequence = Sequence(len(body["prompt"]), body["max_tokens"])
            engine.waiting.put(sequence)
            self.send_response(200)
            self.send_header("Connection", "close")
            self.end_headers()
            more = True
            while more:
                more = sequence.tokens.get()
                self._event({"choices": [{"text": "x"}]})
            self._event({"choices": [], "usage": {"completion_tokens": body["max_tokens"]}})
            self.wfile.write(b"data: [DONE]\n\n")

        def _event(self, value: Any) -> None:
            self.wfile.write(f"data: {json.dumps(value)}\n\n".encode())

        def _answer(self, status: int, text: str) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(text.encode())))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    engine.start()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        engine.stopped = True
        server.shutdown()
        server.server_close()
