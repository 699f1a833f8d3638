"""LeRobot's own robot client (PyPI `lerobot`, its code as it is) moving an arm that is not there.

    python lerobot_robot.py ADDRESS ACTIONS

What it would import beside its own modules (PyTorch, the robots' drivers) is replaced by stand-ins.
Prints a JSON line once ACTIONS were executed. Makes a folder `logs`, as LeRobot does.
"""

import importlib.abc
import importlib.machinery
import json
import sys
import threading
import time
import types
from unittest import mock

import numpy as np

INFERENCE = ("robot_client", "helpers", "configs", "constants")
TRANSPORT = ("utils", "services_pb2", "services_pb2_grpc")
OWN = {"lerobot", "lerobot.async_inference", "lerobot.transport"}
OWN |= {f"lerobot.async_inference.{name}" for name in INFERENCE}
OWN |= {f"lerobot.transport.{name}" for name in TRANSPORT}

MOTORS = ["shoulder_pan.pos", "shoulder_lift.pos", "elbow_flex.pos", "gripper.pos"]
CAMERAS = {"front": (224, 224, 3), "wrist": (48, 64, 3)}


class StandIn(types.ModuleType):
    """A module in which every name is something."""

    __path__: list = []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return mock.MagicMock(name=name)


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name in OWN or name.split(".")[0] not in ("torch", "lerobot", "draccus"):
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        return StandIn(spec.name)

    def exec_module(self, module):
        pass


class Tensor:
    """As much of torch.tensor as the client uses."""

    device = types.SimpleNamespace(type="cpu")

    def __init__(self, values):
        self.values = np.array(values, dtype=np.float32)

    def __getitem__(self, index):
        return self.values[index]

    def __rmul__(self, factor):
        return Tensor(factor * self.values)

    def __add__(self, other):
        return Tensor(self.values + other.values)


class Arm:
    action_features = {motor: float for motor in MOTORS}

    def __init__(self):
        self.random = np.random.default_rng(0)
        self.executed: list[dict] = []

    def connect(self):
        pass

    disconnect = connect

    def get_observation(self):
        shapes = CAMERAS.items()
        images = {n: self.random.integers(256, size=s, dtype=np.uint8) for n, s in shapes}
        return {motor: self.random.uniform(-50, 50) for motor in MOTORS} | images

    def send_action(self, action):
        self.executed.append(action)
        return action


def features(robot) -> dict:
    """What LeRobot makes of a robot's description."""
    state = {"dtype": "float32", "shape": (len(MOTORS),), "names": MOTORS}
    names = ["height", "width", "channels"]
    image = lambda shape: {"dtype": "image", "shape": shape, "names": names}
    cameras = {f"observation.images.{name}": image(s) for name, s in CAMERAS.items()}
    return {"observation.state": state} | cameras


def main(address: str, wanted: int):
    sys.meta_path.insert(0, Finder())
    import torch

    torch.tensor = torch.Tensor = Tensor
    from lerobot.async_inference import configs, robot_client

    arm = Arm()
    robot_client.make_robot_from_config = lambda config: arm
    robot_client.map_robot_keys_to_lerobot_features = features
    client = robot_client.RobotClient(configs.RobotClientConfig(
        policy_type="pi05", pretrained_name_or_path="lerobot/pi05_base", robot=object(),
        actions_per_chunk=10, task="put the cube into the box", server_address=address,
    ))
    if not client.start():
        sys.exit("the client did not start")
    loops = (client.receive_actions, ()), (client.control_loop, (client.config.task,))
    for run, arguments in loops:
        threading.Thread(target=run, args=arguments, daemon=True).start()
    until = time.monotonic() + 120
    while len(arm.executed) < wanted and time.monotonic() < until:
        time.sleep(0.05)
    executed = arm.executed[:wanted]
    values = [[float(x) for x in action.values()] for action in executed]
    print(json.dumps({"keys": sorted({k for a in executed for k in a}), "actions": values}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
