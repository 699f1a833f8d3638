"""Episodes of openpi's relatives, and the extra request keys.

vla-eval: the PyPI package's own connection and episode runners, with an environment of ours.
RoboArena publishes no package: `RoboArena` below is a client of our own that speaks its protocol.
vLLM-Omni's path: openpi's own client, and what vLLM-Omni's example clients make of its answers.
"""

import dataclasses
import io
import re
import threading
import time
import unittest

import anyio
import numpy as np
import websockets.sync.client
from openpi_client import action_chunk_broker, msgpack_numpy, websocket_client_policy
from PIL import Image
from test_golden_policies import CASES, Served, observation as recorded_observation, read
from test_openpi_client import DIMS, HORIZON, Server, observation
from vla_eval.benchmarks.base import StepBenchmark, StepResult
from vla_eval.connection import Connection
from vla_eval.protocol import numpy_codec
from vla_eval.runners.clock import Clock
from vla_eval.runners.live_runner import LiveEpisodeRunner
from vla_eval.runners.sync_runner import SyncEpisodeRunner
from vla_eval.specs import DimSpec, check_specs


class Table(StepBenchmark):
    """An environment like LIBERO's to look at: two cameras, a state, seven numbers an action."""

    def __init__(self, steps: int, dims: int, state: np.ndarray):
        super().__init__()
        self.steps, self.dims, self.state = steps, dims, state
        self.actions: list[np.ndarray] = []
        self.random = np.random.default_rng(1)

    def get_tasks(self):
        return [{"name": "put the bowl on the plate"}]

    def reset(self, task):
        self.actions = []
        return None

    def step(self, action):
        actions = np.asarray(action["actions"])
        assert actions.shape == (self.dims,) and actions.dtype == np.float32, actions
        assert np.isfinite(actions).all()
        self.actions.append(actions)
        return StepResult(obs=None, reward=0.0, done=len(self.actions) >= self.steps, info={})

    def make_obs(self, raw_obs, task):
        image = lambda: self.random.integers(256, size=(64, 64, 3), dtype=np.uint8)
        return {
            "images": {"agentview": image(), "wrist": image()},
            "task_description": task["name"],
            "states": self.state,
        }

    def get_step_result(self, step_result):
        return {"success": step_result.done}

    def get_hold_action(self, last_action):
        return {"actions": np.zeros(self.dims, dtype=np.float32)}


def run_vla_eval(url: str, runner, table: Table, episodes: int = 2) -> tuple[list[dict], dict]:
    async def run():
        results = []
        async with Connection(url) as connection:
            for _ in range(episodes):
                task = table.get_tasks()[0]
                results.append(await runner.run_episode(table, task, connection, max_steps=50))
            return results, connection.server_info

    return anyio.run(run)


class VlaEval(unittest.TestCase):
    def tearDown(self):
        numpy_codec.set_image_format("png")

    def check(self, url: str, table: Table, runner):
        results, info = run_vla_eval(url, runner, table)
        for result in results:
            self.assertTrue(result["metrics"]["success"], result)
        self.assertEqual(info["protocol_version"], 1)
        self.assertEqual(info["observation_params"], {"send_wrist_image": True, "send_state": True})
        specs = {k: DimSpec.from_dict(v) for k, v in info["action_spec"].items()}
        seen = {k: DimSpec.from_dict(v) for k, v in info["observation_spec"].items()}
        self.assertEqual(check_specs(specs, specs, seen, seen), [])

    def test_episodes_against_a_recorded_policy(self):
        state = np.linspace(-0.3, 0.3, 8)
        with Served("pi0_libero", "pi0_libero", "--dialect", "vla-eval") as server:
            for form in ("png", "jpeg", "raw"):
                with self.subTest(form):
                    numpy_codec.set_image_format(form)
                    table = Table(12, 7, state)
                    self.check(f"ws://127.0.0.1:{server.port}", table, SyncEpisodeRunner())
                    self.assertEqual(len(table.actions), 12)

    def test_the_path_and_auto_find_vla_eval(self):
        state = np.zeros(8, dtype=np.float32)
        with Server("--times", "1") as server:
            table = Table(15, DIMS, state)
            self.check(f"ws://127.0.0.1:{server.port}/vla-eval", table, SyncEpisodeRunner())
            metrics = server.get("/metrics")[1]
            # Two episodes of 15 steps, ten actions of each chunk.
            self.assertIn('pirouette_requests_total{outcome="ok"} 4', metrics)
            self.assertIn('pirouette_requests_total{outcome="from_chunk"} 26', metrics)
        with Server("--times", "1", "--dialect", "auto") as server:
            self.check(f"ws://127.0.0.1:{server.port}", Table(5, DIMS, state), SyncEpisodeRunner())
            answer = server.client().infer(observation())
            self.assertEqual(answer["actions"].shape, (HORIZON, DIMS))

    def test_a_live_episode(self):
        with Server("--times", "1") as server:
            table = Table(20, DIMS, np.zeros(8, dtype=np.float32))
            runner = LiveEpisodeRunner(hz=50, clock=Clock(), wait_first_action=True)
            self.check(f"ws://127.0.0.1:{server.port}/vla-eval", table, runner)

    def test_an_error_is_told_and_the_connection_goes_on(self):
        async def run(url):
            async with Connection(url) as connection:
                await connection.start_episode({})
                with self.assertRaisesRegex(RuntimeError, "observation_failed: KeyError: 'prompt'"):
                    await connection.act({"states": np.zeros(8, dtype=np.float32)})
                table = Table(1, DIMS, np.zeros(8, dtype=np.float32))
                action = await connection.act(table.make_obs(None, table.get_tasks()[0]))
                self.assertEqual(action["actions"].shape, (DIMS,))

        with Server("--times", "1") as server:
            anyio.run(run, f"ws://127.0.0.1:{server.port}/vla-eval")


@dataclasses.dataclass
class ServerConfig:
    """What RoboArena's evaluator is told, field by field; unknown fields are errors there too."""

    image_resolution: tuple[int, int] | None
    needs_wrist_camera: bool
    n_external_cameras: int
    needs_stereo_camera: bool
    needs_session_id: bool
    action_space: str


class RoboArena:
    """A client of RoboArena's protocol."""

    def __init__(self, url: str):
        self.socket = websockets.sync.client.connect(url, compression=None, max_size=None)
        self.config = ServerConfig(**msgpack_numpy.unpackb(self.socket.recv(timeout=60)))

    def observation(self, first_camera: int) -> dict:
        height, width = self.config.image_resolution
        image = lambda: np.zeros((height, width, 3), dtype=np.uint8)
        out = {
            "observation/joint_position": np.zeros(7, dtype=np.float32),
            "observation/cartesian_position": np.zeros(6, dtype=np.float32),
            "observation/gripper_position": np.zeros(1, dtype=np.float32),
            "prompt": "put the cup into the sink",
            "session_id": "38DSA3hd3",
        }
        for i in range(self.config.n_external_cameras):
            out[f"observation/exterior_image_{i + first_camera}_left"] = image()
        if self.config.needs_wrist_camera:
            out["observation/wrist_image_left"] = image()
        return out

    def ask(self, request: dict, endpoint: str):
        self.socket.send(msgpack_numpy.packb(request | {"endpoint": endpoint}))
        return self.socket.recv(timeout=60)


class RoboArenaProtocol(unittest.TestCase):
    def episode(self, url: str, shape: tuple[int, int], space: str):
        client = RoboArena(url)
        self.assertEqual(client.config.action_space, space)
        for episode in range(2):
            for _ in range(4):
                answer = client.ask(client.observation(episode), "infer")
                self.assertIsInstance(answer, bytes, answer)
                self.assertEqual(msgpack_numpy.unpackb(answer)["actions"].shape, shape)
            self.assertEqual(client.ask({"session_id": "38DSA3hd3"}, "reset"), "reset successful")
        client.socket.close()

    def test_episodes(self):
        with Served("pi05_droid", "pi05_droid", "--dialect", "roboarena") as server:
            self.episode(f"ws://127.0.0.1:{server.port}", (15, 8), "joint_velocity")
        with Server("--times", "1") as server:
            url = f"ws://127.0.0.1:{server.port}/roboarena"
            self.episode(url, (HORIZON, DIMS), "joint_position")
        with Server("--times", "1", "--dialect", "auto") as server:
            self.episode(f"ws://127.0.0.1:{server.port}", (HORIZON, DIMS), "joint_position")


class VllmOmniPath(unittest.TestCase):
    def test_openpis_client_and_a_reset(self):
        with Server("--times", "1") as server:
            url = f"ws://127.0.0.1:{server.port}/v1/realtime/robot/openpi"
            client = websocket_client_policy.WebsocketClientPolicy(host=url, port=None)
            self.assertEqual(client.get_server_metadata()["n_external_cameras"], 1)
            for i in range(3):
                answer = client.infer(observation(i))
                self.assertEqual(answer["actions"].shape, (HORIZON, DIMS))
            done = client.infer({"endpoint": "reset"})
            self.assertEqual(done, {"status": "reset successful"})

    def test_vllm_omnis_clients(self):
        def actions(sent: dict) -> np.ndarray:
            answer = client.infer(sent | {"session_id": "3f2a"})
            if isinstance(answer, dict) and answer.get("type") == "error":
                raise RuntimeError(answer["message"])
            return np.asarray(answer, dtype=np.float32)

        with Server("--times", "1") as server:
            url = f"ws://127.0.0.1:{server.port}/v1/realtime/robot/openpi"
            client = websocket_client_policy.WebsocketClientPolicy(host=url, port=None)
            for i in range(3):
                chunk = actions(observation(i) | {"seed": i})
                self.assertEqual((chunk.shape, chunk.dtype), ((HORIZON, DIMS), np.float32))
                want = client.infer(observation(i) | {"seed": i})["actions"]
                np.testing.assert_array_equal(chunk, want.astype(np.float32))
                with self.assertRaisesRegex(RuntimeError, "^KeyError: 'observation/state'$"):
                    actions({"prompt": "no state"})


def encoded(image: np.ndarray, form: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format=form, quality=95)
    return buffer.getvalue()


class ExtraKeys(unittest.TestCase):
    def test_image_files_against_a_recorded_policy(self):
        case = read(CASES / "pi05_droid" / "case.safetensors")
        plain = recorded_observation(case, "pick up the cup") | {"seed": 3}
        key = "observation/exterior_image_1_left"
        image = np.random.default_rng(0).integers(256, size=(120, 160, 3), dtype=np.uint8)
        with Served("pi05_droid", "pi05_droid") as server:
            client = server.client()
            want = client.infer(plain | {key: image})["actions"]
            png = encoded(image, "PNG")
            for sent in (png, np.frombuffer(png, dtype=np.uint8)):
                np.testing.assert_array_equal(client.infer(plain | {key: sent})["actions"], want)
            jpeg = client.infer(plain | {key: encoded(image, "JPEG")})["actions"]
            self.assertEqual(jpeg.shape, want.shape)
            with self.assertRaisesRegex(RuntimeError, f"ValueError: '{key}' is a JPEG that can't"):
                client.infer(plain | {key: encoded(image, "JPEG")[:900]})

    def test_batches(self):
        with Server("--times", "20:20", "--max-batch", "8") as server:
            client = server.client()
            batch = [observation(i, side=64) | {"seed": i % 2} for i in (0, 1, 0)]
            answer = client.infer({"batch": [*batch, {"prompt": "no state"}], "explain": True})
            self.assertEqual(list(answer), ["batch", "server_timing"])
            first, second, third, wrong = answer["batch"]
            np.testing.assert_array_equal(first["actions"], third["actions"])
            self.assertFalse(np.array_equal(first["actions"], second["actions"]))
            self.assertEqual(wrong["error"], "KeyError: 'observation/state'")
            self.assertGreaterEqual(first["timing"]["batch"], 1)
            self.assertEqual(client.infer(observation())["actions"].shape, (HORIZON, DIMS))

    def test_the_chunk_broker_leaves_explanations_alone(self):
        with Server("--times", "1") as server:
            broker = action_chunk_broker.ActionChunkBroker(server.client(), action_horizon=4)
            for _ in range(4):
                step = broker.infer(observation() | {"explain": True})
                self.assertEqual(step["actions"].shape, (DIMS,))
                self.assertGreater(step["timing"]["run_ms"], 0)

    def test_the_newest_request_of_a_session_wins(self):
        def until(pattern: str):
            limit = time.monotonic() + 20
            while not re.search(pattern, server.get("/metrics")[1]):
                self.assertLess(time.monotonic(), limit, pattern)
                time.sleep(0.01)

        with Server("--times", "3000", "--max-batch", "1") as server:
            sent = observation(side=64) | {"newest_wins": True, "session": "arm"}
            outcomes: dict[str, object] = {}
            clients = {name: server.client() for name in ("running", "old", "new")}

            def ask(name: str):
                try:
                    outcomes[name] = clients[name].infer(sent)["actions"].shape
                except RuntimeError as error:
                    outcomes[name] = str(error).strip().splitlines()[-1]

            threads = []
            for name, seen in [
                ("running", r"pirouette_device_busy\{.*\} 1\n"),
                ("old", r"pirouette_queue_depth 1\n"),
                ("new", r"outcome=\"superseded\"\} 1\n"),
            ]:
                threads.append(threading.Thread(target=ask, args=(name,)))
                threads[-1].start()
                until(seen)
            for thread in threads:
                thread.join()
            superseded = "RuntimeError: superseded by a newer request of the session"
            chunk = (HORIZON, DIMS)
            self.assertEqual(outcomes, {"running": chunk, "old": superseded, "new": chunk})


if __name__ == "__main__":
    unittest.main()
