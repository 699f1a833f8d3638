"""Writes one message of each kind as the PyPI package vla-eval 0.8.0 packs it."""

import pathlib

import numpy as np
from vla_eval.protocol.messages import Message, MessageType, make_hello_payload, pack_message
from vla_eval.protocol.numpy_codec import set_image_format

HERE = pathlib.Path(__file__).parent

y, x = np.mgrid[0:32, 0:32]
image = np.stack([x * 8, y * 8, (x + y) * 4], axis=-1).astype(np.uint8)
observation = {
    "images": {"agentview": image, "wrist": image[::-1].copy()},
    "task_description": "put the bowl on the plate",
    "states": np.linspace(-0.5, 0.5, 8),
    "controller_states": np.zeros(8, dtype=np.float32),
}


def write(name: str, kind: MessageType, payload: dict, seq: int) -> None:
    message = Message(type=kind, payload=payload, seq=seq, timestamp=1700000000.25)
    (HERE / f"{name}.msgpack").write_bytes(pack_message(message))


write("hello", MessageType.HELLO, make_hello_payload(benchmark="LIBERO"), 1)
write("episode_start", MessageType.EPISODE_START, {"task": {"name": "bowl", "task_id": 3}}, 2)
for seq, form in enumerate(("png", "jpeg", "raw"), start=3):
    set_image_format(form)
    write(f"observation_{form}", MessageType.OBSERVATION, observation, seq)
write("episode_end", MessageType.EPISODE_END, {"metrics": {"success": True}, "steps": 3}, 6)
