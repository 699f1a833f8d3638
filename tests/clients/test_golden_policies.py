"""openpi's own client against `pirouette serve` ($PIROUETTE) on openpi's recorded policies."""

import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import unittest
import urllib.request

import numpy as np
from openpi_client import websocket_client_policy

PIROUETTE = os.environ["PIROUETTE"]
ROOT = pathlib.Path(__file__).parents[2]
TESTDATA = ROOT / "testdata"
CASES = TESTDATA / "A_tiny" / "e2e"
TOKENIZER = TESTDATA / "D_preprocess" / "tokenizer" / "tok_bpe.model"
DTYPES = {"U8": "u1", "F32": "<f4", "F64": "<f8", "I32": "<i4", "I64": "<i8", "BOOL": "?"}

sys.path.insert(0, str(ROOT / "examples"))
from rtc_client import RtcPolicy  # noqa: E402


def read(path: pathlib.Path) -> dict[str, np.ndarray]:
    """A safetensors file."""
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    out = {}
    for name, entry in json.loads(data[8:end]).items():
        if name != "__metadata__":
            start, stop = (end + o for o in entry["data_offsets"])
            flat = np.frombuffer(data[start:stop], DTYPES[entry["dtype"]])
            out[name] = flat.reshape(entry["shape"])
    return out


def observation(case: dict[str, np.ndarray], prompt: str) -> dict:
    out: dict = {"prompt": prompt}
    for name, value in case.items():
        if name.startswith("in.") and name != "in.noise":
            *outer, key = name.removeprefix("in.").split("|")
            place = out
            for part in outer:
                place = place.setdefault(part, {})
            place[key] = value
    return out


class Served:
    """`pirouette serve` of one recorded checkpoint."""

    def __init__(self, name: str | None, *flags: str):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        self.log = tempfile.TemporaryFile(mode="w+")
        own = [] if name is None else ["--checkpoint", str(CASES / name / "checkpoint")]
        self.process = subprocess.Popen(
            [PIROUETTE, "serve", *flags, "--port", str(self.port), "--device", "cpu",
             "--tokenizer", str(TOKENIZER)]
            + ([] if "--policy.dir" in " ".join(flags) else own),
            stderr=self.log,
        )
        for _ in range(200):
            try:
                socket.create_connection(("127.0.0.1", self.port)).close()
                return
            except OSError:
                assert self.process.poll() is None, self.text()
                time.sleep(0.05)
        raise TimeoutError(self.text())

    def text(self) -> str:
        self.log.seek(0)
        return self.log.read()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        self.log.close()

    def client(self):
        return websocket_client_policy.WebsocketClientPolicy(host="127.0.0.1", port=self.port)


class GoldenPolicies(unittest.TestCase):
    def check(self, name: str, precision: str, answer_key: str, tolerance: float, *flags: str):
        case = read(CASES / name / "case.safetensors")
        prompt = json.loads((CASES / name / "case.json").read_text())["prompt"]
        request = observation(case, prompt) | {"noise": case["in.noise"]}
        with Served(name, *(flags or (name,)), "--precision", precision) as server:
            answer = server.client().infer(request)
        want = case[answer_key]
        self.assertEqual(answer["actions"].dtype, np.float64)
        self.assertEqual(answer["actions"].shape, want.shape)
        scale = max(1.0, float(np.abs(want).max()))
        self.assertLess(float(np.abs(answer["actions"] - want).max()), tolerance * scale)

    def test_actions_are_openpis_in_f32(self):
        for name in ("pi0_libero", "pi05_droid", "pi0_aloha"):
            with self.subTest(name):
                self.check(name, "f32", "out.actions", 1e-4)

    def test_openpis_own_command_line(self):
        checkpoint = CASES / "pi05_droid" / "checkpoint"
        self.check(
            "pi05_droid", "f32", "out.actions", 1e-4,
            "--env", "DROID", "policy:checkpoint", "--policy.config=pi05_droid",
            f"--policy.dir={checkpoint}",
        )

    def test_a_seed_repeats_and_no_seed_is_told(self):
        case = read(CASES / "pi05_droid" / "case.safetensors")
        request = observation(case, "pick up the cup")
        with Served("pi05_droid", "pi05_droid") as server:
            client = server.client()
            first = client.infer(request)
            again = client.infer(request | {"seed": first["seed"]})
            other = client.infer(request | {"seed": 7})
            np.testing.assert_array_equal(first["actions"], again["actions"])
            self.assertGreater(np.abs(first["actions"] - other["actions"]).max(), 1e-3)

    def test_the_contracts_sample_clients_run(self):
        """As they are printed, but for the port."""
        with Served("pi0_aloha", "pi0_aloha") as server, tempfile.TemporaryDirectory() as folder:
            url = f"http://127.0.0.1:{server.port}/contract"
            samples = json.load(urllib.request.urlopen(url))["samples"]
            python = samples["python"].replace("port=8000", f"port={server.port}")
            run = subprocess.run([sys.executable, "-c", python], capture_output=True, text=True)
            self.assertIn("(50, 14)", run.stdout, run.stderr)
            compiler = shutil.which("g++") or shutil.which("clang++")
            if compiler is None:
                self.skipTest("the C++ sample: no g++ or clang++")
            source = pathlib.Path(folder) / "client.cpp"
            source.write_text(samples["cpp"])
            flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-o", f"{folder}/client"]
            subprocess.run([compiler, *flags, str(source)], check=True)
            command = [f"{folder}/client", "127.0.0.1", str(server.port)]
            run = subprocess.run(command, capture_output=True, text=True)
            self.assertEqual([len(row.split()) for row in run.stdout.splitlines()], [14] * 50)

    def test_the_cpp_sample_answers_pings_and_outlives_its_server(self):
        compiler = shutil.which("g++") or shutil.which("clang++")
        if compiler is None:
            self.skipTest("the C++ sample: no g++ or clang++")
        with Served("pi0_aloha", "pi0_aloha") as server:
            url = f"http://127.0.0.1:{server.port}/contract"
            source = json.load(urllib.request.urlopen(url))["samples"]["cpp"]
        with tempfile.TemporaryDirectory() as folder, socket.socket() as listener:
            client = f"{folder}/client"
            subprocess.run([compiler, "-std=c++17", "-o", client, "-x", "c++", "-"],
                           input=source, text=True, check=True)
            listener.bind(("127.0.0.1", 0))
            listener.listen()
            port = str(listener.getsockname()[1])
            process = subprocess.Popen([client, "127.0.0.1", port], stderr=subprocess.PIPE)
            connection = listener.accept()[0]
            connection.settimeout(20)
            receive = lambda n: connection.recv(n, socket.MSG_WAITALL)
            head = b""
            while not head.endswith(b"\r\n\r\n"):
                head += receive(1)
            connection.sendall(b"HTTP/1.1 101 Switching Protocols\r\n\r\n")
            for payload in [b"", b"x" * 125]:
                connection.sendall(bytes([0x89, len(payload)]) + payload)
                # The mask is zeros. Control frames have no longer form of their length.
                pong = bytes([0x8A, 0x80 | len(payload), 0, 0, 0, 0]) + payload
                self.assertEqual(receive(len(pong)), pong)
            # The server goes away while the client is about to send.
            process.send_signal(signal.SIGSTOP)
            connection.sendall(bytes([0x82, 1, 0x80]))
            connection.close()
            process.send_signal(signal.SIGCONT)
            errors = process.communicate(timeout=20)[1]
            self.assertNotEqual(process.returncode, -signal.SIGPIPE)
            self.assertIn(b"the connection broke", errors)

    def test_real_time_chunking_with_the_example(self):
        case = read(CASES / "pi05_droid" / "case.safetensors")
        request = observation(case, "pick up the cup") | {"seed": 5}
        with Served("pi05_droid", "pi05_droid") as server:
            robot = RtcPolicy(server.client(), hz=1000.0)
            for _ in range(8):
                robot.step(request)
            self.assertIsNone(robot.running, "more than half of the chunk is left")
            robot.step(request)
            first = robot.actions
            # Six are left after the ninth: the next chunk is on its way.
            robot.running.join(timeout=60)
            self.assertEqual((robot.chunks, robot.error), (2, None))
            guided, free = robot.actions, server.client().infer(request)["actions"]
            self.assertEqual(guided.shape, (15, 8))
            # Same seed, same observation: the guidance alone makes the difference, and it pulls
            # the new chunk's first actions to those that were left of the first one.
            left = first[9:]
            gap = lambda chunk: np.abs(chunk[:4] - left[:4]).mean()
            self.assertLess(gap(guided), gap(free))
            plain = server.client().infer(request | {"inference_delay": 3})
            np.testing.assert_array_equal(plain["actions"], free)
            self.assertNotIn("model_actions", plain)

    def test_relative_actions_go_on_where_the_arm_was_going(self):
        """Their left-over is read against the state of now, not against that of then."""
        case = read(CASES / "pi0_libero" / "case.safetensors")
        before = observation(case, "pick up the cup") | {"seed": 5}
        state = "observation/state"
        after = before | {state: before[state] + 0.5}
        with Served("pi0_libero", "pi0_libero", "--precision", "f32") as server:
            robot = RtcPolicy(server.client(), hz=1000.0, refill=42)
            for _ in range(8):
                robot.step(before)
            left = robot.actions[9:]
            robot.step(after)
            robot.running.join(timeout=60)
            self.assertEqual((robot.chunks, robot.error), (2, None))
            free = server.client().infer(after)["actions"]
        # An answer that comes late ties the first ten actions wholly.
        seam = lambda chunk: np.abs(chunk[:5] - left[:5]).max()
        self.assertLess(seam(robot.actions), 0.05)
        self.assertGreater(seam(free), 0.3)

    def test_errors_are_openpis(self):
        case = read(CASES / "pi05_droid" / "case.safetensors")
        good = observation(case, "pick up the cup")
        bad = [
            ({k: v for k, v in good.items() if "joint" not in k}, "KeyError"),
            (good | {"observation/joint_position": np.full(7, np.nan)}, "ValueError"),
            (good | {"observation/wrist_image_left": np.zeros((2, 2), np.uint8)}, "Error"),
            ({k: v for k, v in good.items() if k != "prompt"}, "ValueError: Prompt is required"),
            (good | {"prev_chunk_left_over": np.zeros((16, 8))},
             "ValueError: `prev_chunk_left_over` has shape [16, 8]; it must be [actions, 8]"),
            (good | {"inference_delay": -1}, "ValueError: `inference_delay` must be"),
        ]
        with Served("pi05_droid", "pi05_droid") as server:
            for request, wanted in bad:
                with self.assertRaises(RuntimeError) as raised:
                    server.client().infer(request)
                last = str(raised.exception).rstrip().splitlines()[-1]
                self.assertIn(wanted, last)
                self.assertNotIn(str(TESTDATA), str(raised.exception))
            self.assertEqual(server.client().infer(good)["actions"].shape, (15, 8))
            server.process.send_signal(signal.SIGTERM)
            self.assertEqual(server.process.wait(timeout=20), 0)

    def test_what_can_not_be_served_says_why(self):
        checkpoint = str(CASES / "pi05_droid" / "checkpoint")
        for flags, wanted in [
            (["pi05-droid", "--checkpoint", checkpoint], "did you mean pi05_droid"),
            (["pi0_droid", "--checkpoint", checkpoint], "is for pi0, these weights are pi05"),
            (["pi05_libero", "--checkpoint", checkpoint], "norm"),
            (["pi05_droid", "--checkpoint", "no/such/place"], "no/such/place"),
            (["pi05_droid", "--checkpoint", checkpoint, "--tokenizer", "no.model"], "no.model"),
            (["pi05_droid", "--checkpoint", checkpoint, "--tokenizer", __file__], "tokenizer"),
            (["pi05_droid", "--checkpoint", checkpoint, "--host", "0.0.0.0"], "--insecure"),
        ]:
            with self.subTest(wanted):
                if "--tokenizer" not in flags:
                    flags = flags + ["--tokenizer", str(TOKENIZER)]
                run = subprocess.run(
                    [PIROUETTE, "serve", *flags, "--port", "0"],
                    capture_output=True, text=True, timeout=60,
                )
                self.assertNotEqual(run.returncode, 0)
                self.assertIn(wanted.lower(), run.stderr.lower())
                self.assertNotIn("panicked", run.stderr)

    def test_a_port_in_use(self):
        with Served("pi05_droid", "pi05_droid") as server:
            run = subprocess.run(
                [PIROUETTE, "serve", "pi05_droid", "--device", "cpu", "--checkpoint",
                 str(CASES / "pi05_droid" / "checkpoint"), "--tokenizer", str(TOKENIZER),
                 "--port", str(server.port)],
                capture_output=True, text=True, timeout=60,
            )
            self.assertNotEqual(run.returncode, 0)
            self.assertIn("another --port", run.stderr)


if __name__ == "__main__":
    unittest.main()
