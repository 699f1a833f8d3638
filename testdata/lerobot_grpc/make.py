"""Records what LeRobot's robot client sends, with LeRobot's own classes and chunking.

    pip download --no-deps lerobot==0.4.4 && unzip lerobot-*.whl -d LEROBOT
    PYTHONPATH=LEROBOT python make.py numpy2      (with numpy 2, grpcio, protobuf)
    PYTHONPATH=LEROBOT python make.py numpy1      (with numpy 1.26)

torch and the rest of LeRobot are stand-ins: none of them gets into a client's pickles.
"""

import importlib.abc
import importlib.machinery
import os
import pathlib
import pickle
import sys
import types
from unittest import mock

import numpy as np

REAL = {"lerobot", "lerobot.async_inference", "lerobot.async_inference.helpers"}
STAND_INS = ("torch", "lerobot", "draccus", "datasets", "huggingface_hub")


class StandIn(types.ModuleType):
    __path__ = []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return mock.MagicMock(name=name)


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name in REAL or name.split(".")[0] not in STAND_INS:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        return StandIn(spec.name)

    def exec_module(self, module):
        pass


sys.meta_path.insert(0, Finder())
from lerobot.async_inference import helpers  # noqa: E402

HERE = pathlib.Path(__file__).parent
MOTORS = ["shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper"]
KEYS = [f"{motor}.pos" for motor in MOTORS]
CAMERAS = {"front": (28, 28, 3), "wrist": (21, 28, 3)}
FEATURES = {
    "observation.state": {"dtype": "float32", "shape": (6,), "names": list(KEYS)},
    **{
        f"observation.images.{name}": {
            "dtype": "image",
            "shape": shape,
            "names": ["height", "width", "channels"],
        }
        for name, shape in CAMERAS.items()
    },
}


def image(name):
    shape = CAMERAS[name]
    count = int(np.prod(shape))
    return ((np.arange(count) * 7 + len(name)) % 251).astype(np.uint8).reshape(shape)


def observation(timestep, must_go, numbers=float):
    raw = {key: numbers(i * 10.5 - 20) for i, key in enumerate(KEYS)}
    raw |= {name: image(name) for name in CAMERAS}
    raw["task"] = "put the cube into the box"
    return helpers.TimedObservation(
        timestamp=1764000000.25 + timestep / 30, observation=raw, timestep=timestep, must_go=must_go
    )


class Call:
    """What makes unrestricted unpickling dangerous."""

    def __reduce__(self):
        return os.system, ("echo this must never run",)


def write(name, data, protocol):
    (HERE / f"{name}.p{protocol}.pickle").write_bytes(pickle.dumps(data, protocol=protocol))


def main(numpy):
    for protocol in (4, 5):
        write(f"observation.{numpy}", observation(7, True), protocol)
        if numpy == "numpy1":
            continue
        setup = helpers.RemotePolicyConfig("pi05", "lerobot/pi05_base", FEATURES, 3, "cuda")
        write("setup", setup, protocol)
        write("observation.float32", observation(70000, False, np.float32), protocol)
        misc = observation(0, False)
        misc.observation = {
            "float32": np.arange(6, dtype=np.float32).reshape(2, 3),
            "float64": np.array([0.5, -1.25]),
            "int64": np.array([-(2**40), 2**40]),
            "bool": np.array([True, False]),
            "none": None,
            "view": image("front")[::2, :, ::-1],
            "bytes": b"\x00\xff",
            "negative": -5,
            "many": list(range(300)),
        }
        write("misc", misc, protocol)
        misc.observation = {"front": np.asfortranarray(image("front"))}
        write("refused.fortran", misc, protocol)
        misc.observation = {"front": image("front").astype(">i2")}
        write("refused.int16", misc, protocol)
        misc.observation = {"state": np.array([1.5], dtype=">f4")}
        write("refused.big_endian", misc, protocol)
        write("refused.call", Call(), protocol)
        misc.observation = {"where": pathlib.PurePosixPath("/etc")}
        write("refused.path", misc, protocol)


if __name__ == "__main__":
    main(sys.argv[1])
