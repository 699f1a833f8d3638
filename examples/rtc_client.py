"""Real-time chunking with openpi's client: the next chunk is computed while this one is executed.

    pirouette serve pi05_droid --checkpoint DIR --rtc
    python examples/rtc_client.py --hz 15

`RtcPolicy.step` never waits for the model but for the first chunk. Needs
`pip install openpi-client typing_extensions`: the client imports the latter without saying so.
"""

import argparse
import math
import threading
import time

import numpy as np
from openpi_client import websocket_client_policy


class RtcPolicy:
    """One action per call; a new chunk is asked for once `refill` actions or fewer are left, half
    of the chunk unless told otherwise."""

    def __init__(
        self, policy, hz: float, refill: int | None = None, execution_horizon: int = 10
    ):
        self.policy, self.hz = policy, hz
        self.refill, self.execution_horizon = refill, execution_horizon
        self.actions = None  # the chunk in execution
        self.next = 0  # its first action that was not yet executed
        self.executed = 0  # actions executed in all
        self.slowest = 0.0  # seconds of the slowest answer so far
        self.chunks, self.error = 0, None
        self.lock = threading.Lock()
        self.running: threading.Thread | None = None

    def step(self, observation: dict) -> np.ndarray:
        if self.error:
            raise self.error
        if self.actions is None:
            self._replace(observation)
            if self.error:
                raise self.error
        with self.lock:
            left = len(self.actions) - self.next
            refill = len(self.actions) // 2 if self.refill is None else self.refill
            if left <= refill and not (self.running and self.running.is_alive()):
                work = threading.Thread(target=self._replace, args=(observation,), daemon=True)
                self.running = work
                work.start()
            action = self.actions[min(self.next, len(self.actions) - 1)]  # late: hold the last one
            self.next += 1
            self.executed += 1
        return action

    def _replace(self, observation: dict):
        request = dict(observation)
        with self.lock:
            asked_at = self.executed
            if self.actions is not None:
                # As the robot takes them: only so can the server read those that are relative to
                # the state of then against the state of now.
                left = self.actions[self.next :]
                request |= {
                    "prev_chunk_left_over_actions": left,
                    "inference_delay": min(math.ceil(self.slowest * self.hz), len(left)),
                    "execution_horizon": self.execution_horizon,
                }
        started = time.monotonic()
        try:
            answer = self.policy.infer(request)
        except Exception as error:  # step() raises it on the robot's thread
            self.error = error
            return
        with self.lock:
            self.slowest = max(self.slowest, time.monotonic() - started)
            self.actions = answer["actions"]
            self.next = self.executed - asked_at  # what was executed meanwhile is past
            self.chunks += 1


def random_droid() -> dict:
    """Stands for the robot's cameras and joints."""
    image = lambda: np.random.randint(256, size=(224, 224, 3), dtype=np.uint8)
    return {
        "observation/exterior_image_1_left": image(),
        "observation/wrist_image_left": image(),
        "observation/joint_position": np.zeros(7),
        "observation/gripper_position": np.zeros(1),
        "prompt": "pick up the cup",
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--host", default="localhost")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--hz", type=float, default=15.0)
    parser.add_argument("--seconds", type=float, default=10.0)
    args = parser.parse_args()
    client = websocket_client_policy.WebsocketClientPolicy(host=args.host, port=args.port)
    robot = RtcPolicy(client, args.hz)
    for _ in range(int(args.seconds * args.hz)):
        started = time.monotonic()
        action = robot.step(random_droid())
        print(np.array2string(action, precision=3, suppress_small=True))  # drive the robot here
        time.sleep(max(0.0, 1 / args.hz - (time.monotonic() - started)))
    print(f"{robot.executed} actions, {robot.chunks} chunks, slowest answer {robot.slowest:.3f} s")


if __name__ == "__main__":
    main()
