"""The workers' end of the mover's socket, whose answers both trio and the channel take."""

from __future__ import annotations

import socket
from pathlib import Path

import trio

from cache import messages
from cache.client import SocketMoverClient
from cache.messages import Answer, Fetch

ANSWERS = 3000


def _answer_all(listening: socket.socket) -> None:
    """Answer each request with its number, over and over. In a thread: so answers come at any moment."""
    reader = messages.FrameReader()
    connected, _ = listening.accept()
    with connected:
        for _ in range(ANSWERS):
            chunk = connected.recv(1 << 16)
            for packed in reader.feed(chunk):
                asked = messages.decode_asked(packed)
                body = asked.number.to_bytes(4, "big") * 5_000
                connected.sendall(messages.frame(Answer(asked.number, body=body)))


async def test_answers_are_taken_in_their_order_whoever_takes_them(tmp_path: Path) -> None:
    path = str(tmp_path / "mover")
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(path)
    listening.listen()
    client = SocketMoverClient(path, lambda entries: None, patience_s=5)
    heard: list[int] = []

    def take(answer: Answer) -> None:
        assert not answer.error, answer.text
        assert answer.body == answer.number.to_bytes(4, "big") * 5_000
        heard.append(answer.number)

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, _answer_all, listening)
            nursery.start_soon(client.run)
            asked = [client.ask_then(Fetch(1, 0, 1), 0, take) for _ in range(ANSWERS)]
            turns = 0
            while len(heard) < ANSWERS:
                client.receive_nowait()  # As the channel does, while trio waits for the same.
                turns += 1
                for _ in range(turns % 7):
                    await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()
    listening.close()
    assert heard == asked
