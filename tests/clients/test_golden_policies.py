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
TESTDATA = pathlib.Path(__file__).parents[2] / "testdata"
CASES = TESTDATA / "A_tiny" / "e2e"
TOKENIZER = TESTDATA / "D_preprocess" / "tokenizer" / "tok_bpe.model"
DTYPES = {"U8": "u1", "F32": "<f4", "F64": "<f8", "I32": "<i4", "I64": "<i8", "BOOL": "?"}


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

    def __init__(self, name: str, *flags: str):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        self.log = tempfile.TemporaryFile(mode="w+")
        checkpoint = CASES / name / "checkpoint"
        self.process = subprocess.Popen(
            [PIROUETTE, "serve", *flags, "--port", str(self.port), "--device", "cpu",
             "--tokenizer", str(TOKENIZER)]
            + ([] if "--policy.dir" in " ".join(flags) else ["--checkpoint", str(checkpoint)]),
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

    def test_errors_are_openpis(self):
        case = read(CASES / "pi05_droid" / "case.safetensors")
        good = observation(case, "pick up the cup")
        bad = [
            ({k: v for k, v in good.items() if "joint" not in k}, "KeyError"),
            (good | {"observation/joint_position": np.full(7, np.nan)}, "ValueError"),
            (good | {"observation/wrist_image_left": np.zeros((2, 2), np.uint8)}, "Error"),
            ({k: v for k, v in good.items() if k != "prompt"}, "ValueError: Prompt is required"),
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
