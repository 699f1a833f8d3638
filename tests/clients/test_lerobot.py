"""LeRobot's asynchronous robot client against `pirouette serve` of a LeRobot checkpoint.

LeRobot needs PyTorch, of which its client uses little: once its own code runs with stand-ins
(lerobot_robot.py); otherwise its client is played here, by grpcio and classes with the module and
the names of LeRobot's own, which are all that a pickle says of them.
"""

import dataclasses
import json
import pathlib
import pickle
import shutil
import subprocess
import sys
import tempfile
import time
import types
import unittest
import urllib.request
from unittest import mock

import grpc
import numpy as np
from openpi_client import websocket_client_policy
from test_golden_policies import CASES, Served
from test_openpi_client import free_port

MOTORS = ["shoulder_pan.pos", "shoulder_lift.pos", "elbow_flex.pos", "gripper.pos"]
CAMERAS = {"front": (224, 224, 3), "wrist": (48, 64, 3)}
# In training; the robot's front camera is sharper.
TRAINED = {"front": [3, 112, 112], "wrist": [3, 48, 64]}
STATE, IMAGES = "observation.state", "observation.images"
HORIZON = 15
PIECE = 2 << 20


@dataclasses.dataclass
class TimedData:
    timestamp: float
    timestep: int


@dataclasses.dataclass
class TimedAction(TimedData):
    action: object


@dataclasses.dataclass
class TimedObservation(TimedData):
    observation: dict
    must_go: bool = False


@dataclasses.dataclass
class RemotePolicyConfig:
    policy_type: str
    pretrained_name_or_path: str
    lerobot_features: dict
    actions_per_chunk: int
    device: str = "cpu"
    rename_map: dict = dataclasses.field(default_factory=dict)


MODULES = {}


def stand_in(name: str, **content):
    """A module that pickles find their classes and functions in, while a test runs."""
    module = types.ModuleType(name)
    for key, value in content.items():
        setattr(module, key, value)
        if isinstance(value, type):
            value.__module__ = name
    MODULES[name] = module


for name in ("lerobot", "lerobot.async_inference"):
    stand_in(name)
stand_in(
    "lerobot.async_inference.helpers",
    TimedAction=TimedAction,
    TimedObservation=TimedObservation,
    RemotePolicyConfig=RemotePolicyConfig,
)
# torch.tensor of a list of floats is float32.
stand_in("torch", tensor=lambda values: np.array(values, dtype=np.float32))


def field(number: int, data: bytes) -> bytes:
    """A protobuf field of bytes."""
    n, size = len(data), b""
    while n >= 0x80:
        size += bytes([n & 0x7F | 0x80])
        n >>= 7
    return bytes([number << 3 | 2]) + size + bytes([n]) + data


def payload(message: bytes) -> bytes:
    """The bytes of a message whose only field they are."""
    if not message:
        return b""
    at = 1
    while message[at] >= 0x80:
        at += 1
    return message[at + 1 :]


class Robot:
    """The calls of LeRobot's client, with its options and its pieces."""

    def __init__(self, port: int):
        options = [("grpc.max_receive_message_length", 4 << 20)]
        self.channel = grpc.insecure_channel(f"127.0.0.1:{port}", options)
        call = lambda kind, name: kind(f"/transport.AsyncInference/{name}")
        self.ready = call(self.channel.unary_unary, "Ready")
        self.set_up = call(self.channel.unary_unary, "SendPolicyInstructions")
        self.send = call(self.channel.stream_unary, "SendObservations")
        self.get_actions = call(self.channel.unary_unary, "GetActions")

    def start(self, config: RemotePolicyConfig, protocol: int):
        assert self.ready(b"", wait_for_ready=True) == b""
        assert self.set_up(field(1, pickle.dumps(config, protocol=protocol))) == b""

    def observe(self, observation: TimedObservation, protocol: int, piece: int = PIECE):
        data = pickle.dumps(observation, protocol=protocol)
        parts = [data[at : at + piece] for at in range(0, len(data), piece)]
        states = [1] + [2] * (len(parts) - 2) + [3] if len(parts) > 1 else [3]
        messages = [bytes([8, s]) + field(2, part) for s, part in zip(states, parts)]
        assert self.send(iter(messages)) == b""

    def actions(self) -> list[TimedAction]:
        data = payload(self.get_actions(b""))
        return pickle.loads(data) if data else []


def config(actions_per_chunk: int = 10, **changes) -> RemotePolicyConfig:
    features = {STATE: {"dtype": "float32", "shape": (len(MOTORS),), "names": MOTORS}}
    for name, shape in CAMERAS.items():
        names = ["height", "width", "channels"]
        features[f"{IMAGES}.{name}"] = {"dtype": "image", "shape": shape, "names": names}
    asked = RemotePolicyConfig("pi05", "lerobot/pi05_base", features, actions_per_chunk, "cuda")
    return dataclasses.replace(asked, **changes)


def observation(step: int, **changes) -> TimedObservation:
    random = np.random.default_rng(step)
    raw: dict = {motor: random.uniform(-50, 50) for motor in MOTORS}
    raw |= {name: random.integers(256, size=s, dtype=np.uint8) for name, s in CAMERAS.items()}
    raw["task"] = "put the cube into the box"
    return TimedObservation(time.time(), step, raw | changes, must_go=True)


def write_tensors(path: pathlib.Path, tensors: dict[str, np.ndarray]):
    header, data = {}, b""
    for name, value in tensors.items():
        raw = value.astype("<f4").tobytes()
        span = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": "F32", "shape": value.shape, "data_offsets": span}
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def checkpoint(folder: pathlib.Path):
    """A small π0.5 as LeRobot would have saved it."""
    shutil.copy(CASES / "pi05_droid" / "checkpoint" / "model.safetensors", folder)
    n = len(MOTORS)
    inputs = {f"{IMAGES}.{name}": {"type": "VISUAL", "shape": shape}
              for name, shape in TRAINED.items()}
    inputs[STATE] = {"type": "STATE", "shape": [n]}
    outputs = {"action": {"type": "ACTION", "shape": [n]}}
    modes = {"VISUAL": "IDENTITY", "STATE": "QUANTILES", "ACTION": "QUANTILES"}
    settings = {"type": "pi05", "input_features": inputs, "output_features": outputs,
                "chunk_size": HORIZON, "normalization_mapping": modes,
                "tokenizer_max_length": 200}
    (folder / "config.json").write_text(json.dumps(settings))
    for file, step, feature, features in (
        ("policy_preprocessor", "normalizer_processor", STATE, inputs),
        ("policy_postprocessor", "unnormalizer_processor", "action", outputs),
    ):
        stats = f"{step}.safetensors"
        norm = {"features": features, "norm_map": modes, "eps": 1e-8}
        steps = [{"registry_name": step, "config": norm, "state_file": stats}]
        (folder / f"{file}.json").write_text(json.dumps({"steps": steps}))
        low, high = np.linspace(-80, -50, n), np.linspace(40, 90, n)
        write_tensors(folder / stats, {f"{feature}.q01": low, f"{feature}.q99": high})


class LeRobotClient(unittest.TestCase):
    def setUp(self):
        self.enter(mock.patch.dict(sys.modules, MODULES))

    def enter(self, context):
        self.addCleanup(context.__exit__, None, None, None)
        return context.__enter__()

    def served(self, *flags: str):
        folder = pathlib.Path(self.enter(tempfile.TemporaryDirectory()))
        checkpoint(folder)
        self.port = free_port()
        flags = (f"--lerobot-port={self.port}", f"--checkpoint={folder}", *flags)
        return self.enter(Served(None, *flags))

    def test_an_exchange_gives_the_actions_openpis_client_gets(self):
        records = pathlib.Path(self.enter(tempfile.TemporaryDirectory()))
        server = self.served(f"--record={records}", "--lerobot-fps=20")
        robot = Robot(self.port)
        asked = []
        for protocol, piece in ((4, PIECE), (5, PIECE), (5, 100_000)):
            robot.start(config(), protocol)
            seen = observation(100 * protocol + len(asked))
            robot.observe(seen, protocol, piece)
            chunk = robot.actions()
            self.assertEqual([type(action) for action in chunk], [TimedAction] * 10)
            self.assertEqual([a.timestep for a in chunk], [seen.timestep + i for i in range(10)])
            times = [seen.timestamp + i / 20 for i in range(10)]
            np.testing.assert_allclose([a.timestamp for a in chunk], times, rtol=0, atol=1e-6)
            actions = np.stack([a.action for a in chunk])
            self.assertEqual((actions.shape, actions.dtype), ((10, len(MOTORS)), np.float32))
            asked.append((seen, actions))
        # The records tell which noise it was: the same observation, by openpi's client.
        for _ in range(200):
            lines = [json.loads(line) for file in sorted(records.glob("*.jsonl"))
                     for line in file.read_text().splitlines()]
            seeds = [line["seed"] for line in lines if "seed" in line]
            if len(seeds) == len(asked):
                break
            time.sleep(0.05)
        self.assertEqual(len(seeds), len(asked), server.text())
        policy = websocket_client_policy.WebsocketClientPolicy("127.0.0.1", server.port)
        for (seen, actions), seed in zip(asked, seeds):
            raw = seen.observation
            request = {f"{IMAGES}.{name}": raw[name] for name in CAMERAS}
            # Half as large, bilinear: the mean of four pixels, rounded to nearest.
            quarters = raw["front"].reshape(112, 2, 112, 2, 3).astype(np.float64)
            request[f"{IMAGES}.front"] = (quarters.mean((1, 3)) + 0.5).astype(np.uint8)
            request[STATE] = np.array([raw[motor] for motor in MOTORS], dtype=np.float32)
            again = policy.infer(request | {"task": raw["task"], "seed": int(seed)})["actions"]
            self.assertEqual(again.shape, (HORIZON, len(MOTORS)))
            np.testing.assert_array_equal(again[:10].astype(np.float32), actions)

    def test_lerobots_own_client_moves_its_arm(self):
        server = self.served()
        script = pathlib.Path(__file__).parent / "lerobot_robot.py"
        command = [sys.executable, str(script), f"127.0.0.1:{self.port}", "40"]
        with tempfile.TemporaryDirectory() as folder:
            run = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=200)
        self.assertEqual(run.returncode, 0, run.stderr + server.text())
        moved = json.loads(run.stdout.splitlines()[-1])
        self.assertEqual(moved["keys"], sorted(MOTORS))
        actions = np.array(moved["actions"])
        self.assertEqual(actions.shape, (40, len(MOTORS)), run.stderr)
        self.assertTrue(np.isfinite(actions).all())
        self.assertGreater(len(np.unique(actions[:, 0])), 10)
        self.assertNotIn("call failed", server.text())

    def test_what_the_client_is_told(self):
        server = self.served()
        robot = Robot(self.port)
        with self.assertRaises(grpc.RpcError) as refused:
            robot.start(config(policy_type="act"), 4)
        self.assertEqual(refused.exception.code(), grpc.StatusCode.INVALID_ARGUMENT)
        self.assertIn("is of type pi05, not act", refused.exception.details())
        with self.assertRaises(grpc.RpcError) as early:
            robot.observe(observation(0), 4)
        self.assertEqual(early.exception.code(), grpc.StatusCode.FAILED_PRECONDITION)
        robot.start(config(), 4)
        with self.assertRaises(grpc.RpcError) as hostile:
            robot.observe(observation(0, where=pathlib.PurePosixPath("/")), 4)
        self.assertEqual(hostile.exception.code(), grpc.StatusCode.INVALID_ARGUMENT)
        self.assertIn("`pathlib.PurePosixPath`", hostile.exception.details())
        robot.observe(observation(0, **{MOTORS[0]: float("nan")}), 4)
        with self.assertRaises(grpc.RpcError) as nan:
            robot.actions()
        self.assertIn("contains NaN", nan.exception.details())
        self.assertEqual(robot.actions(), [], "nothing waits")
        robot.observe(observation(0), 4)
        self.assertEqual(len(robot.actions()), 10)
        url = f"http://127.0.0.1:{server.port}/metrics"
        with urllib.request.urlopen(url) as reply:
            metrics = reply.read().decode()
        self.assertIn('pirouette_requests_total{outcome="ok"} 1', metrics)
        self.assertIn('pirouette_lerobot_observations_total{outcome="queued"} 2', metrics)


if __name__ == "__main__":
    unittest.main()
