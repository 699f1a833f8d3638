"""openpi's own client, as published, against the null server ($NULL_SERVER)."""

import os
import pathlib
import signal
import socket
import subprocess
import tempfile
import threading
import time
import unittest
import urllib.error
import urllib.request

import numpy as np
import websockets.exceptions
import websockets.sync.client
from openpi_client import action_chunk_broker, msgpack_numpy, websocket_client_policy

SERVER = os.environ["NULL_SERVER"]
HORIZON, DIMS = 50, 8


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Server:
    """A null server in a process of its own."""

    def __init__(self, *flags: str, port: int | None = None):
        self.port = port or free_port()
        command = [SERVER, "--port", str(self.port), *flags]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        line = self.process.stdout.readline()
        assert line.startswith("listening on"), line

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.process.stdout.close()

    def client(self, **options):
        return websocket_client_policy.WebsocketClientPolicy(
            host="127.0.0.1", port=self.port, **options
        )

    def get(self, path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}") as r:
                return r.status, r.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()


def observation(i: int = 0, side: int = 224) -> dict:
    rng = np.random.default_rng(i)
    image = lambda: rng.integers(256, size=(side, side, 3), dtype=np.uint8)
    return {
        "observation/exterior_image_1_left": image(),
        "observation/wrist_image_left": image(),
        "observation/state": np.full(8, i, dtype=np.float32),
        "prompt": "pick up the fork",
    }


class OpenpiClient(unittest.TestCase):
    def check(self, answer: dict):
        actions = answer["actions"]
        self.assertEqual(actions.shape, (HORIZON, DIMS))
        self.assertEqual(actions.dtype, np.float64)
        self.assertTrue(np.isfinite(actions).all())
        self.assertGreater(answer["policy_timing"]["infer_ms"], 0)
        self.assertGreater(answer["server_timing"]["infer_ms"], 0)

    def test_thousand_requests(self):
        with Server("--times", "1") as server:
            client = server.client()
            self.assertEqual(client.get_server_metadata(), {"policy": "null"})
            for i in range(1000):
                answer = client.infer(observation(i, side=64))
                self.check(answer)
                self.assertEqual("prev_total_ms" in answer["server_timing"], i > 0)
            client.reset()

    def test_the_answer_depends_on_observation_and_seed(self):
        with Server("--times", "0") as server:
            client = server.client()
            first = client.infer({**observation(1), "seed": 7})["actions"]
            again = client.infer({**observation(1), "seed": np.uint64(7)})["actions"]
            other = client.infer({**observation(2), "seed": 7})["actions"]
            np.testing.assert_array_equal(first, again)
            self.assertFalse(np.array_equal(first, other))
            drawn = client.infer(observation(1))
            repeated = client.infer({**observation(1), "seed": drawn["seed"]})
            np.testing.assert_array_equal(drawn["actions"], repeated["actions"])

    def test_connecting_while_the_model_loads(self):
        # Keepalive is far shorter than loading: only answered pings keep the client.
        with Server("--load-ms", "3000", "--keepalive-ms", "200") as server:
            began = time.monotonic()
            with websockets.sync.client.connect(
                f"ws://127.0.0.1:{server.port}",
                compression=None,
                max_size=None,
                ping_interval=0.3,
                ping_timeout=0.5,
            ) as raw:
                self.assertLess(time.monotonic() - began, 1.0)
                self.assertEqual(server.get("/healthz"), (200, "OK\n"))
                self.assertEqual(server.get("/readyz")[0], 503)
                metadata = msgpack_numpy.unpackb(raw.recv(timeout=10))
                self.assertEqual(metadata, {"policy": "null"})
                self.assertGreater(time.monotonic() - began, 2.0)
                self.assertEqual(server.get("/readyz"), (200, "ready\n"))
                raw.send(msgpack_numpy.packb(observation()))
                self.check(msgpack_numpy.unpackb(raw.recv(timeout=10)))
            self.check(server.client().infer(observation()))

    def test_pings_during_a_long_inference(self):
        with Server("--times", "1500") as server:
            with websockets.sync.client.connect(
                f"ws://127.0.0.1:{server.port}",
                compression=None,
                max_size=None,
                ping_interval=0.2,
                ping_timeout=0.4,
            ) as raw:
                raw.recv()
                raw.send(msgpack_numpy.packb(observation()))
                self.check(msgpack_numpy.unpackb(raw.recv(timeout=10)))

    def test_an_error_ends_the_connection_as_with_openpi_and_another_one_works(self):
        with Server("--times", "1") as server:
            client = server.client()
            self.check(client.infer(observation()))
            with self.assertRaises(RuntimeError) as raised:
                client.infer({"prompt": "no state"})
            text = str(raised.exception)
            self.assertTrue(text.startswith("Error in inference server:\nTraceback"), text)
            self.assertEqual(text.strip().splitlines()[-1], "KeyError: 'observation/state'")
            with self.assertRaises(websockets.exceptions.ConnectionClosedError) as closed:
                client.infer(observation())
            self.assertEqual(closed.exception.rcvd.code, 1011)
            self.assertEqual(
                closed.exception.rcvd.reason,
                "Internal server error. Traceback included in previous frame.",
            )
            self.check(server.client().infer(observation()))

    def test_a_missed_deadline_leaves_the_connection_open(self):
        with Server("--times", "50") as server:
            client = server.client()
            self.check(client.infer(observation()))
            began = time.monotonic()
            with self.assertRaisesRegex(RuntimeError, "TimeoutError: the deadline is"):
                client.infer({**observation(), "deadline_ms": 5})
            self.assertLess(time.monotonic() - began, 0.04)
            self.check(client.infer({**observation(), "deadline_ms": 500.0}))

    def test_reconnecting_to_a_restarted_server(self):
        with Server("--times", "1") as server:
            port = server.port
            client = server.client()
            self.check(client.infer(observation()))
            server.process.send_signal(signal.SIGTERM)
            self.assertEqual(server.process.wait(timeout=5), 0)
            self.assertEqual(server.process.stdout.read(), "drained\n")
            with self.assertRaises(websockets.exceptions.ConnectionClosed) as closed:
                client.infer(observation())
            self.assertEqual(closed.exception.rcvd.code, 1001)
        with Server("--times", "1", port=port) as server:
            self.check(server.client().infer(observation()))

    def test_action_chunk_broker(self):
        with Server("--times", "1") as server:
            client = server.client()
            broker = action_chunk_broker.ActionChunkBroker(client, action_horizon=10)
            chunk = [broker.infer({**observation(3), "seed": 5}) for _ in range(10)]
            whole = client.infer({**observation(3), "seed": 5})["actions"]
            for i, step in enumerate(chunk):
                self.assertEqual(step["actions"].shape, (DIMS,))
                np.testing.assert_array_equal(step["actions"], whole[i])
            # Drawn seeds come back as plain integers, which the broker leaves alone.
            broker.reset()
            self.assertIsInstance(broker.infer(observation(3))["seed"], int)

    def test_sixty_four_clients(self):
        with Server("--times", "1:10,8:20") as server:
            errors: list[str] = []

            def robot(index: int):
                try:
                    client = server.client()
                    for i in range(10):
                        sent = {**observation(index, side=64), "seed": index}
                        actions = client.infer(sent)["actions"]
                        if i == 0:
                            first = actions
                        np.testing.assert_array_equal(actions, first)
                except Exception as error:  # noqa: BLE001 (a thread must tell what it saw)
                    errors.append(repr(error))

            robots = [threading.Thread(target=robot, args=(i,)) for i in range(64)]
            for thread in robots:
                thread.start()
            for thread in robots:
                thread.join()
            self.assertEqual(errors, [])
            metrics = server.get("/metrics")[1]
            self.assertIn('pirouette_requests_total{outcome="ok"} 640', metrics)
            self.assertIn('pirouette_batches_total{size="8"}', metrics)

    def test_api_keys(self):
        with tempfile.TemporaryDirectory() as folder:
            keys = pathlib.Path(folder, "keys")
            keys.write_text("# robots\nkey-of-the-first-robot\n")
            with Server("--times", "1", "--api-key-file", str(keys)) as server:
                self.check(server.client(api_key="key-of-the-first-robot").infer(observation()))
                for wrong in ("key-of-the-last-robot", None):
                    with self.assertRaises(websockets.exceptions.InvalidStatus) as refused:
                        server.client(api_key=wrong)
                    self.assertEqual(refused.exception.response.status_code, 401)

    def test_every_numpy_type_is_accepted(self):
        with Server("--times", "0") as server:
            client = server.client()
            extra = {
                "half": np.float16(1.5),
                "scalar": np.int64(3),
                "flag": np.bool_(True),
                "zero_d": np.array(2.5),
                "text": np.array("open the drawer"),
                "bytes": np.array(b"ab"),
                "big_endian": np.arange(3, dtype=">f4"),
                "empty": np.zeros((0, 7), dtype=np.float32),
                "fortran": np.asfortranarray(np.ones((3, 4))),
                "nested": {"list": [1, 2.5, None, "x", b"y"], "tuple": (1, 2)},
            }
            self.check(client.infer({**observation(), **extra}))


if __name__ == "__main__":
    unittest.main()
