"""What another process does in the tests of tasks. It imports this, which is little."""

from __future__ import annotations

import pickle

from lora_tools.engine import threads
from lora_tools.engine.buffers import Buffers


def work(sent: bytes) -> bytes:
    """One task, as another process does it that was sent all there is to it."""
    task, sources, sink = pickle.loads(sent)
    with threads.one_torch_thread(), threads.one_torch_thread_here():
        result = task.run(sources, sink, Buffers())
    return pickle.dumps((result, None if sink is None else sink.hand_over()))
