"""Writes requests with extra keys and RoboArena's, as openpi-client 0.1.2 packs them."""

import pathlib

import numpy as np
from openpi_client import msgpack_numpy

HERE = pathlib.Path(__file__).parent

png = (HERE.parent / "G_images" / "gray.png").read_bytes()
droid = {
    "observation/exterior_image_1_left": np.full((8, 8, 3), 7, dtype=np.uint8),
    "observation/wrist_image_left": png,
    "observation/joint_position": np.linspace(-1, 1, 7),
    "observation/gripper_position": np.float32(0.5),
    "prompt": "pick up the fork",
}
keys = {"seed": 7, "deadline_ms": 80.5, "num_steps": np.int64(10), "explain": True}
noise = np.zeros((15, 32), dtype=np.float32)

requests = {
    "keys": droid | keys | {"newest_wins": np.bool_(True), "session": "left arm"},
    "noise": droid | {"noise": noise, "seed": None},
    "batch": {
        "batch": [droid, droid | {"seed": 3}, {"noise": noise}, 5],
        **keys,
        "newest_wins": True,
    },
    "roboarena": droid | {"endpoint": "infer", "session_id": "38DSA3hd3"},
    "reset": {"endpoint": "reset", "session_id": "38DSA3hd3"},
}
for name, request in requests.items():
    (HERE / f"{name}.msgpack").write_bytes(msgpack_numpy.packb(request))
